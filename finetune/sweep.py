"""Score one model over numbers and placements of pauses: a table as CSV and JSON, and a plot."""

import csv
import io
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from finetune.data import EvaluationSet
from finetune.scoring import score
from finetune.setup import make_pauses
from finetune.tasks import LOWER_IS_BETTER
from kozero import distributed
from kozero.data.rows import fit
from kozero.engines.base import Engine
from kozero.errors import UserError, nearest, require
from kozero.folder import write_text
from kozero.pause import PLACEMENTS, Pauses
from kozero.plots import save_figure, whole_numbers
from models.language_model import LanguageModel

COLLAPSE = 0.5  # of the best score: what is below it has collapsed; where lower is better, the best of what has
NO_PAUSES = "none"
Questions = Callable[..., EvaluationSet]  # those for a placement; `max_eval_samples` of them at most
MARKS = ("o-", "s--", "^-.", "D:", "v-", "P--", "X-.")  # lines that lie on each other are told apart by them


@dataclass(frozen=True)
class Cell:
    """One setting and what came out: `value` is the task's main score, `each` that of each example; tokens are those of
    prompts, pauses and answers, seconds are wall time over all ranks, both for an example; rows whose context was cut,
    and that did not fit; weights of the examples in their mean, empty for equal ones."""

    placement: str
    num_pauses: int
    score: str
    value: float
    seconds_per_example: float
    tokens_per_example: float
    num_cut: int
    num_left_out: int
    scores: dict[str, float]
    each: list[float]
    weights: list[float] = field(default_factory=list)


def settings_of(numbers: str, placements: str) -> list[tuple[str, int]]:
    """(placement, number) of each cell: 0 pauses once, whatever the placement.

    Args: numbers: "0,1,2"; placements: "append,prepend".

    Raises: UserError for what is no number or no placement.
    """
    names = [name.strip() for name in placements.strip(" ,").split(",")]
    for name in names:
        require(name in PLACEMENTS, f"--sweep_placement {name}: no such placement{nearest(name, PLACEMENTS)}")
    try:
        found = sorted({int(number) for number in numbers.split(",")})
    except ValueError:
        raise UserError(f"--sweep_pauses {numbers}: write numbers with commas, e.g. 0,1,2,5,10") from None
    require(found[0] >= 0, f"--sweep_pauses {found[0]}: must be 0 or more")
    none = [(NO_PAUSES, 0)] if found[0] == 0 else []
    return none + [(name, number) for name in dict.fromkeys(names) for number in found if number]


def sweep(
    engine: Engine, model: LanguageModel, questions: Questions, cells: list[tuple[str, int]], capacity: int, micro: int
) -> tuple[list[Cell], list[int]]:
    """Score every setting and tell each score as it is known. Collective.

    Returns: the cells, and the number of the group (article, premise) of each example.

    Raises: UserError for a number of pauses beside which some row does not fit: its scores would be of other examples.
    """
    every = questions("append")
    require_room(every, cells, capacity)
    few = questions("append", max_eval_samples=8)  # a process's first pass is slower: not on the first cell's account
    measure(engine, model, few, make_pauses(model, 0, "append"), capacity, micro)
    found = []
    for placement, number in cells:
        pauses = make_pauses(model, number, "append" if placement == NO_PAUSES else placement)
        cell = measure(engine, model, questions(pauses.placement), pauses, capacity, micro)
        cell = cell if number else replace(cell, placement=NO_PAUSES)
        found.append(cell)
        distributed.say(
            f"{cell.placement:>16} {cell.num_pauses:>4} pauses: {cell.score} {cell.value:.4f}, "
            f"{cell.seconds_per_example * 1e3:.1f} ms and {cell.tokens_per_example:.1f} tokens an example"
            + (f", {cell.num_cut:,} contexts cut" if cell.num_cut else "")
        )
    numbers: dict[str, int] = {}
    return found, [numbers.setdefault(example.group, len(numbers)) for example in every.examples]


def require_room(questions: EvaluationSet, cells: list[tuple[str, int]], capacity: int) -> None:
    """What fits without pauses must fit with the most of them."""
    room = capacity - (0 if questions.task.labels else questions.task.max_new_tokens)
    most = max(number for _, number in cells)
    worse = fit(questions.store, room, most).num_left_out - fit(questions.store, room, 0).num_left_out
    require(worse == 0, f"--sweep_pauses {most}: {worse:,} rows do not fit {capacity} tokens with them; give fewer")


def measure(
    engine: Engine, model: LanguageModel, questions: EvaluationSet, pauses: Pauses, capacity: int, micro: int
) -> Cell:
    """One cell."""
    started = time.perf_counter()
    result = score(engine, questions, pauses, capacity, micro, model.tokenizer)
    seconds, num, name = time.perf_counter() - started, len(questions.examples), questions.task.best_score
    return Cell(
        pauses.placement, pauses.num, name, result.values[name], seconds / num,
        result.num_tokens / num, result.num_cut, result.num_left_out, result.values, result.each, result.weights,
    )  # fmt: skip


def warnings(cells: list[Cell]) -> list[str]:
    """What a reader must not overlook: a model that fails without pauses, or that none help."""
    without = next((cell.value for cell in cells if cell.num_pauses == 0), None)
    others = [cell for cell in cells if cell.num_pauses]
    if without is None or not others:
        return []
    sign = -1 if others[0].score in LOWER_IS_BETTER else 1
    best, found = max(others, key=lambda cell: sign * cell.value), []
    smaller, larger = sorted((without, best.value))
    if sign * without < sign * best.value and smaller < COLLAPSE * larger:
        found.append(
            f"warning: without pauses {best.score} is {without:.4f}, with {best.num_pauses} ({best.placement}) "
            f"{best.value:.4f}: the model was trained to depend on them"
        )
    if sign * best.value <= sign * without:
        found.append(f"warning: no number of pauses beats none ({best.score} {without:.4f})")
    return found


def save_sweep(path: Path, cells: list[Cell], told: dict) -> list[Path]:
    """The cells as JSON, CSV and PNG beside each other. Returns the files that were written."""
    rows, (table, figure) = [asdict(cell) for cell in cells], beside(path)
    write_text(table, as_csv(cells))
    write_text(path, json.dumps(told | {"cells": rows, "warnings": warnings(cells)}, indent=2, ensure_ascii=False))
    title = str(told.get("title", ""))
    return [path, table] + [figure] * save_figure(figure, lambda drawn: draw(drawn, cells, title), (7, 6))


def beside(path: Path) -> tuple[Path, Path]:
    """The CSV and the PNG of a sweep whose JSON is at `path`."""
    return path.with_suffix(".csv"), path.with_suffix(".png")


def as_csv(cells: list[Cell]) -> str:
    """A line a cell, with all scores."""
    flat = [
        {k: v for k, v in asdict(cell).items() if k not in ("scores", "each", "weights")} | cell.scores
        for cell in cells
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def draw(figure: Any, cells: list[Cell], title: str) -> None:
    """The score over the number of pauses, a line a placement, and what an example costs below it."""
    scores, cost = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    none = [cell for cell in cells if cell.num_pauses == 0]
    for k, name in enumerate(dict.fromkeys(cell.placement for cell in cells if cell.num_pauses)):
        line = none + [cell for cell in cells if cell.placement == name]
        numbers, style = [cell.num_pauses for cell in line], MARKS[k % len(MARKS)]
        scores.plot(numbers, [cell.value for cell in line], style, label=name, alpha=0.8)
        cost.plot(numbers, [cell.tokens_per_example for cell in line], style, label=name, alpha=0.8)
    for cell in none:
        scores.axhline(cell.value, color="black", linestyle=":", label="no pauses")
    scores.set(title=title, ylabel=cells[0].score + " (lower is better)" * (cells[0].score in LOWER_IS_BETTER))
    cost.set(xlabel="pauses at inference", ylabel="tokens an example")
    whole_numbers(cost)
    scores.legend()
