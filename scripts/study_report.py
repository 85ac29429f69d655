"""The report of a study of pauses: a CSV of all cells, tables in Markdown, pictures, one HTML page that holds them."""

import base64
import csv
import html
import io
import json
import statistics
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from finetune.tasks import LOWER_IS_BETTER
from kozero.errors import require
from kozero.folder import write_text
from kozero.json_files import read_json_object
from kozero.metrics import bootstrap_interval
from kozero.plots import save_figure, whole_numbers

Curve = list[tuple[int, float]]  # (step, loss)
Table = list[list[str]]  # the first row is the heading
IN_PERCENT = ("f1", "exact_match")  # scores that are percent already
# Fewer groups may all agree by chance in more than 5 % of the cases: of 5 groups in 2 x 0.5 ** 5 = 6 %.
LEAST_GROUPS = 6
LOWER = " (lower is better)"  # behind the name of such a score
DASHES = ("-", "--", "-.", ":")  # of lines that are no arm's
PRETRAINING = "pre-training"  # its panel
STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}img{max-width:100%}"
    "table{border-collapse:collapse}td,th{border-bottom:1px solid #ccc;padding:.3rem .8rem;text-align:right}"
    "td:first-child,th:first-child,td:nth-child(2),th:nth-child(2){text-align:left}pre{overflow:auto;background:#f6f6f6}"
)


@dataclass(frozen=True)
class Result:
    """One arm on one task with one seed. Shares in percent, perplexity as it is.

    num_pauses: the arm's own at inference. values: M_inf to score; each: M_inf to the score of each example, of
    perplexity its mean loss in nats; weights: of the examples in a mean, empty for equal ones.
    """

    arm: str
    task: str
    seed: int
    num_pauses: int
    metric: str
    values: dict[int, float]
    each: dict[int, np.ndarray]
    milliseconds: dict[int, float]
    tokens: dict[int, float]
    cut: dict[int, int]
    groups: list[int]
    warnings: list[str]
    majority: float | None
    losses: Curve
    step_seconds: float
    weights: list[float] = field(default_factory=list)

    @classmethod
    def read(cls, arm: str, task: str, seed: int, num_pauses: int, folder: Path) -> "Result":
        """From a run's folder: sweep.json and metrics.jsonl."""
        told = read_json_object(folder / "sweep.json")
        require("cells" in told, f"{folder / 'sweep.json'}: is damaged; delete it, and the study scores again")
        cells = {cell["num_pauses"]: cell for cell in told["cells"]}
        metric = cells[num_pauses]["score"]
        whole = metric != "perplexity" or cells[num_pauses].get("weights")
        require(whole, f"{folder / 'sweep.json'}: has no weights of its texts; delete it, and the study scores again")
        scale = 1.0 if metric in IN_PERCENT or metric in LOWER_IS_BETTER else 100.0
        points = read_points(folder / "metrics.jsonl")
        seconds = [point["train/step_time_seconds"] for point in points if "train/step_time_seconds" in point]
        majority = cells[num_pauses]["scores"].get("majority")
        return cls(
            arm, task, seed, num_pauses, metric,
            values={num: scale * cell["value"] for num, cell in cells.items()},
            each={num: scale * np.asarray(cell["each"]) for num, cell in cells.items()},
            milliseconds={num: 1e3 * cell["seconds_per_example"] for num, cell in cells.items()},
            tokens={num: cell["tokens_per_example"] for num, cell in cells.items()},
            cut={num: cell["num_cut"] for num, cell in cells.items()},
            groups=told["groups"],
            warnings=told["warnings"],
            majority=None if majority is None else scale * majority,
            losses=curve(points),
            step_seconds=statistics.median(seconds) if seconds else float("nan"),
            weights=cells[num_pauses].get("weights", []),
        )  # fmt: skip

    @property
    def value(self) -> float:
        """The score with the arm's own number of pauses."""
        return self.values[self.num_pauses]

    @property
    def lower_is_better(self) -> bool:
        """Of its metric."""
        return self.metric in LOWER_IS_BETTER

    def named_metric(self, unit: str = "") -> str:
        """The metric with its direction where lower is better, else with a unit."""
        return self.metric + (LOWER if self.lower_is_better else unit)

    def of_means(self, means: np.ndarray) -> np.ndarray:
        """Scores of means over examples."""
        return np.exp(np.minimum(means, 700.0)) if self.metric == "perplexity" else means


def read_points(path: Path) -> list[dict]:
    """The logged points of a run; a last line that was cut is left out."""
    points = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            points.append(json.loads(line))
    return points


def curve(points: list[dict]) -> Curve:
    """Training loss by step; of a step that a resumed run did again, the last."""
    return sorted({p["step"]: p["train/loss"] for p in points if "train/loss" in p}.items())


def write_report(
    folder: Path, title: str, results: list[Result], baseline: str, pretraining: dict[str, list[Path]], study: str,
    command: str,
) -> list[Path]:  # fmt: skip
    """Write results.csv, report.md, report.html and the pictures of both.

    Args: baseline: the arm that the others are measured against; pretraining: logs by name, one a seed; study: the
        settings as they were written; command: what makes this report. Returns the files.
    """
    pictures = {
        "scores": ("Score by arm, with each arm's own pauses", lambda figure: plot_scores(figure, results)),
        "pauses": ("Score over the pauses at inference", lambda figure: plot_pauses(figure, results)),
        "losses": ("Training losses", lambda figure: plot_losses(figure, results, pretraining)),
    }
    tables = {
        "Scores": (score_table(results), SCORES_TOLD),
        f"Difference to {baseline}": (difference_table(results, baseline), DIFFERENCE_TOLD),
        "Best number of pauses": (pauses_table(results), PAUSES_TOLD),
        "Cost": (cost_table(results), COST_TOLD),
        "Cost of pre-training": (pretraining_table(pretraining), PRETRAINING_TOLD),
        "Warnings": (warnings_table(results, baseline), ""),
    }
    tables = {name: told for name, told in tables.items() if told[0]}
    write_text(folder / "results.csv", as_csv(results))
    pictures = {name: p for name, p in pictures.items() if save_figure(folder / f"{name}.png", p[1], (10, 4.5))}
    write_text(folder / "report.md", as_markdown(title, tables, pictures, study, command))
    write_text(folder / "report.html", as_html(title, tables, pictures, study, command, folder))
    names = ["results.csv", "report.md", "report.html", *(f"{name}.png" for name in pictures)]
    return [folder / name for name in names]


SCORES_TOLD = (
    "Mean and standard deviation over the seeds, with the arm's own number of pauses at inference; in percent, but for "
    "perplexity. A classifier that answers the most frequent label every time scores what is in the last column."
)
DIFFERENCE_TOLD = (
    "Paired: the same examples, the difference of the scores averaged over the seeds, in their unit; where lower is "
    "better, a negative one is an improvement. The interval is the 95 % percentile bootstrap (10,000 draws) over "
    "groups of examples, which are not independent: the questions of an article, the pairs of a premise. It does not "
    "hold the spread between seeds, which the last column shows; so a difference counts as shown only where all seeds "
    "agree on its sign, and with one seed nothing is known of it. "
    f"Of fewer than {LEAST_GROUPS} groups there is no verdict, and of one no interval."
)
PAUSES_TOLD = (
    "The number with the best mean score on these same examples, so a little too good; beside it the score without "
    "pauses and with the arm's own number."
)
PRETRAINING_TOLD = "Medians over all logged steps; the loss of the last logged steps, mean over the seeds."
COST_TOLD = "At inference an example's tokens are those of its prompts, pauses and answers; times are of this machine."


def arms_of(results: list[Result]) -> list[str]:
    """Arms in the order of the study."""
    return list(dict.fromkeys(result.arm for result in results))


def tasks_of(results: list[Result]) -> list[str]:
    """Tasks in the order of the study."""
    return list(dict.fromkeys(result.task for result in results))


def cells_of(results: list[Result]) -> Iterable[tuple[str, str, list[Result]]]:
    """(arm, task, results of all seeds), task by task."""
    for task, arm in product(tasks_of(results), arms_of(results)):
        if found := [result for result in results if (result.arm, result.task) == (arm, task)]:
            yield arm, task, found


def score_table(results: list[Result]) -> Table:
    """A row an arm and task."""
    rows = [["task", "arm", "pauses", "score", "mean ± sd", "seeds", "most frequent label"]]
    for arm, task, found in cells_of(results):
        values, majority = [result.value for result in found], found[0].majority
        told = f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")
        constant = "" if majority is None else f"{majority:.2f}"
        own, metric = str(found[0].num_pauses), found[0].named_metric()
        rows.append([task, arm, own, metric, told, str(len(values)), constant])
    return rows


def difference_table(results: list[Result], baseline: str) -> Table:
    """Every other arm against the baseline, over the seeds that both have finished.

    Raises: UserError when the two were scored on different examples.
    """
    rows = [["task", "arm", "difference", "95 % interval", "shown", "by seed"]]
    for arm, task, found in cells_of(results):
        others = {r.seed: r for r in results if (r.arm, r.task) == (baseline, task)}
        pairs = [(result, others[result.seed]) for result in found if result.seed in others]
        if arm == baseline or not pairs:
            continue
        sizes = {len(result.each[result.num_pauses]) for pair in pairs for result in pair}
        require(len(sizes) == 1, f"{task}, {arm}: scored on other examples than {baseline}; give all the same data")
        rows.append([task, arm, *compare(pairs)])
    return rows


def compare(pairs: list[tuple[Result, Result]]) -> list[str]:
    """Difference, interval, verdict and differences by seed of an arm and the baseline, a pair a seed."""
    one = pairs[0][0]
    columns = [result.each[result.num_pauses] for side in zip(*pairs, strict=True) for result in side]
    values = np.stack(columns, axis=1)  # (N, 2 x seeds): the arm's, then the baseline's

    def differences(means: np.ndarray) -> np.ndarray:
        arm, baseline = np.split(one.of_means(means), 2, axis=-1)
        return arm - baseline

    by_seed = differences(np.average(values, axis=0, weights=one.weights or None))
    low, high = bootstrap_interval(values, one.groups, weights=one.weights, statistic=lambda m: differences(m).mean(-1))
    num_groups, higher = len(set(one.groups)), low > 0 and (by_seed > 0).all()
    shown = "better" if higher != one.lower_is_better else "worse"
    if not (higher or (high < 0 and (by_seed < 0).all())):
        shown = "not shown"
    elif num_groups < LEAST_GROUPS:
        shown = f"too few groups ({num_groups})"
    interval = f"{low:+.2f} to {high:+.2f}" if num_groups > 1 else "none"
    return [f"{by_seed.mean():+.2f}", interval, shown, ", ".join(f"{value:+.2f}" for value in by_seed)]


def mean_curve(found: list[Result]) -> dict[int, float]:
    """M_inf to the mean score over seeds, for numbers that all seeds have."""
    numbers = set.intersection(*(set(result.values) for result in found))
    return {number: statistics.mean(result.values[number] for result in found) for number in sorted(numbers)}


def pauses_table(results: list[Result]) -> Table:
    """Which number of pauses at inference did best."""
    rows = [["task", "arm", "without", "own", "best", "best number"]]
    for arm, task, found in cells_of(results):
        means = mean_curve(found)
        best = (min if found[0].lower_is_better else max)(means, key=means.__getitem__)
        own = means[found[0].num_pauses]
        rows.append([task, arm, f"{means[0]:.2f}", f"{own:.2f}", f"{means[best]:.2f}", str(best)])
    return rows


def cost_table(results: list[Result]) -> Table:
    """What an arm costs in fine-tuning and at inference: medians over seeds."""
    rows = [["task", "arm", "ms a training step", "tokens an example", "ms an example", "contexts cut"]]
    for arm, task, found in cells_of(results):
        number = found[0].num_pauses
        step = 1e3 * statistics.median(result.step_seconds for result in found)
        tokens = statistics.median(result.tokens[number] for result in found)
        time = statistics.median(result.milliseconds[number] for result in found)
        rows.append([task, arm, f"{step:.0f}", f"{tokens:.1f}", f"{time:.1f}", str(found[0].cut[number])])
    return rows


def warnings_table(results: list[Result], baseline: str) -> Table:
    """What the sweeps warned of, and a baseline that is missing; empty without any."""
    rows = [["task", "arm", "warning"]]
    if baseline not in arms_of(results):
        rows.append(["", baseline, "the baseline has no finished cell, so nothing is compared with it"])
    for arm, task, found in cells_of(results):
        rows += [[task, arm, f"seed {r.seed}: {line.removeprefix('warning: ')}"] for r in found for line in r.warnings]
    return rows if len(rows) > 1 else []


def pretraining_table(pretraining: dict[str, list[Path]]) -> Table:
    """What a pre-training costs: over all steps of all seeds; empty without any."""
    rows = [["pre-training", "", "ms a step", "steps", "last loss"]]
    for name, paths in pretraining.items():
        logs = [points for path in paths if (points := [p for p in read_points(path) if "train/loss" in p])]
        if logs:
            times = [1e3 * p["train/step_time_seconds"] for points in logs for p in points]
            last = statistics.mean(points[-1]["train/loss"] for points in logs)
            rows.append([name, "", f"{statistics.median(times):.0f}", str(logs[0][-1]["step"]), f"{last:.4f}"])
    return rows if len(rows) > 1 else []


def as_csv(results: list[Result]) -> str:
    """A line for each arm, task, seed and number of pauses."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    costs = ("tokens_per_example", "seconds_per_example")
    writer.writerow(["task", "arm", "seed", "num_pauses", "own", "metric", "value", *costs])
    for r in results:
        for number, value in sorted(r.values.items()):
            cost = [round(r.tokens[number], 3), round(r.milliseconds[number] / 1e3, 6)]
            own = int(number == r.num_pauses)
            writer.writerow([r.task, r.arm, r.seed, number, own, r.metric, round(value, 4), *cost])
    return text.getvalue()


def panels(figure, names: list[str]):
    """One axes a name, side by side."""
    return zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True)


def task_panels(figure, results: list[Result]) -> Iterator[tuple[Any, list[tuple[str, list[Result]]]]]:
    """A panel a task, as axes and its arms as (color, results of all seeds)."""
    arms = arms_of(results)
    for task, axes in panels(figure, tasks_of(results)):
        cells = [(f"C{arms.index(arm)}", found) for arm, other, found in cells_of(results) if other == task]
        axes.set(title=task, ylabel=cells[0][1][0].named_metric(" (%)"))
        yield axes, cells


def plot_scores(figure, results: list[Result]) -> None:
    """A panel a task: points are seeds, bars mean and standard deviation."""
    arms = arms_of(results)
    for axes, cells in task_panels(figure, results):
        for color, found in cells:
            values, place = [r.value for r in found], arms.index(found[0].arm)
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            axes.errorbar(place, statistics.mean(values), spread, fmt="_", capsize=6, color=color, ms=14)
            axes.plot([place] * len(values), values, "o", color=color, alpha=0.5)
        if found[0].majority is not None:
            axes.axhline(found[0].majority, color="gray", linestyle=":", label="most frequent label")
            axes.legend(fontsize="small")
        axes.set_xticks(range(len(arms)), arms, rotation=30, ha="right")


def plot_pauses(figure, results: list[Result]) -> None:
    """A panel a task: a line an arm, its own number marked, the band from the worst to the best seed."""
    for axes, cells in task_panels(figure, results):
        for color, found in cells:
            means, own = mean_curve(found), found[0].num_pauses
            low, high = ([pick(r.values[number] for r in found) for number in means] for pick in (min, max))
            if len(means) == 1:
                axes.axhline(means[0], color=color, linestyle=":")
            axes.plot(list(means), list(means.values()), marker=".", color=color, label=found[0].arm)
            axes.fill_between(list(means), low, high, color=color, alpha=0.15, linewidth=0)
            axes.plot(own, means[own], "o", color=color, ms=9, mfc="none")
        axes.set_xlabel("pauses at inference")
        whole_numbers(axes)
    name_lines(figure)


def name_lines(figure) -> None:
    """One legend for all panels, below them."""
    lines = {}
    for axes in figure.axes:
        lines |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4)


def plot_losses(figure, results: list[Result], pretraining: dict[str, list[Path]]) -> None:
    """Pre-training, then a panel a task: mean over seeds by arm."""
    arms = arms_of(results)
    logs = {name: [path for path in paths if path.exists()] for name, paths in pretraining.items()}
    before = {name: [curve(read_points(path)) for path in paths] for name, paths in logs.items() if paths}
    lines = {PRETRAINING: before} if before else {}
    for arm, task, found in cells_of(results):
        lines.setdefault(task, {})[arm] = [r.losses for r in found]
    for name, axes in panels(figure, list(lines)):
        for k, (label, curves) in enumerate(lines[name].items()):
            by_step = [dict(points) for points in curves]
            steps = sorted(set.intersection(*map(set, by_step)))
            means = [statistics.mean(points[step] for points in by_step) for step in steps]
            color, style = (f"C{arms.index(label)}", "-") if label in arms else ("black", DASHES[k % 4])
            axes.plot(steps, means, label=label, color=color, linestyle=style)
        axes.set(title=name, xlabel="step", ylabel="loss (nats a token)")
    name_lines(figure)


def as_markdown(title: str, tables: dict, pictures: dict, study: str, command: str) -> str:
    """The report with its pictures beside it."""
    parts = [f"# {title}", f"Made by `{command}`."]
    for name, (table, told) in tables.items():
        lines = [f"| {' | '.join(row)} |" for row in table]
        parts += [f"## {name}", told, "\n".join([lines[0], "|---" * len(table[0]) + "|", *lines[1:]])]
    parts += [f"## {told}\n\n![{told}]({name}.png)" for name, (told, _) in pictures.items()]
    return "\n\n".join([*parts, "## Settings", f"```json\n{study}\n```"]) + "\n"


def as_html(title: str, tables: dict, pictures: dict, study: str, command: str, folder: Path) -> str:
    """The same on one page, pictures within."""
    parts = [f"<h1>{html.escape(title)}</h1><p>Made by <code>{html.escape(command)}</code>.</p>"]
    for name, (table, told) in tables.items():
        head, *rows = ([html.escape(word) for word in row] for row in table)
        body = "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows)
        heading = f"<h2>{html.escape(name)}</h2><p>{html.escape(told)}</p>"
        parts.append(f"{heading}<table><tr><th>{'</th><th>'.join(head)}</th></tr>{body}</table>")
    for name, (told, _) in pictures.items():
        data = base64.b64encode((folder / f"{name}.png").read_bytes()).decode()
        parts.append(f'<h2>{told}</h2><img alt="{told}" src="data:image/png;base64,{data}">')
    parts.append(f"<h2>Settings</h2><pre>{html.escape(study)}</pre>")
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'
