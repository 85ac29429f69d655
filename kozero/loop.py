"""The training loop that every entry point runs: steps, curves, evaluations, checkpoints, the end."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from kozero import distributed
from kozero.checkpoint import Checkpoints, RunState, check_steps, content_damage, damage, saved_run, step_of
from kozero.config import BatchSizes, TrainingArguments, check_schedule
from kozero.data.ahead import Ahead
from kozero.data.batch import Rows
from kozero.engines.base import Engine, StepStats
from kozero.engines.units import compile_layers
from kozero.errors import Diverged, Stopped, UserError, require
from kozero.folder import save_run
from kozero.optim import schedule
from kozero.runlog import RunLog, peak_memory_gib
from kozero.stop import Stop
from kozero.watch import Watch

MAX_EPOCHS_PER_STEP = 100  # a larger step is a slip of the keyboard
LEAST_COMPILED = 2000  # updates of a run that is worth compiling for: 70 s, earned back by 4 % of 1.3 s an update

# Settings of which scores are comparable only where they are the same.
SCORED_BY = {"validation_file", "max_eval_samples", "num_inference_pauses", "max_answer_length"}
ROWS = "rows of a step (micro batch x accumulation x ranks)"  # as a resume key


@dataclass
class Intervals:
    """Updates between two points, evaluations and checkpoints, with the zeros of the command line filled in."""

    logging: int
    eval: int
    save: int

    @classmethod
    def of(cls, arguments: TrainingArguments, total_steps: int) -> "Intervals":
        """`0` evaluates ten times in a run and saves whenever it evaluates."""
        evaluate = arguments.eval_steps or max(1, total_steps // 10)
        return cls(arguments.logging_steps, evaluate, arguments.save_steps or evaluate)


def total_steps(arguments: TrainingArguments, num_rows: int, sizes: BatchSizes) -> int:
    """Updates of the run: --max_steps, or the epochs rounded up to whole steps.

    Raises: UserError where the schedule of the rate ends before them.
    """
    found = arguments.max_steps or max(1, math.ceil(arguments.num_train_epochs * num_rows / sizes.global_batch))
    check_schedule(arguments, found)
    return found


def resume_key(
    training: TrainingArguments, sizes: BatchSizes, told: dict[str, Any], named: Sequence[str], own: dict[str, Any]
) -> dict[str, Any]:
    """What must not change between a run and its resumption: the rows, their order, the batch, the weights. Each by
    the words that tell a user what to change back. Ranks and ZeRO stage may change where the engine can follow.

    Args: told: the run's arguments, of which those that are `named` must not change; own: what else must not.
    """
    key = {f"--{name}": told[name] for name in ("seed", "task", "optim", *named)} | own
    return key | {ROWS: sizes.global_batch, "precision (--bf16, --fp16)": training.dtype}


@dataclass
class Meter:
    """What is summed between two points of the curves. The sums belong to the state, so that a resumed run goes on with
    them; `since` is when the seconds of the next step began."""

    state: RunState
    since: float = field(default_factory=time.perf_counter)

    def add(self, stats: StepStats, tokens: int) -> None:
        """Count a step, also one without an update."""
        state, now = self.state, time.perf_counter()
        sums = state.window_losses or [0.0] * len(stats.losses)
        counts = state.window_counts or [float(state.window_steps)] * len(stats.losses)
        state.window_losses = [total + (loss or 0.0) for total, loss in zip(sums, stats.losses, strict=True)]
        state.window_counts = [n + (loss is not None) for n, loss in zip(counts, stats.losses, strict=True)]
        state.window_steps += 1
        state.window_tokens += tokens
        state.window_seconds += now - self.since
        self.since = now

    def point(self, stats: StepStats, lr: float, epoch: float, objectives: tuple[str, ...]) -> dict[str, float]:
        """The scalars of a point, by their TensorBoard names; the next one begins from nothing. An objective that no
        step had targets of has none."""
        state, names = self.state, objectives or [""] * len(stats.losses)
        sums = zip(names, state.window_losses, state.window_counts, strict=True)
        means = {name: total / num for name, total, num in sums if num}  # one not finite shows
        found = {
            **({"train/loss": sum(means.values())} if means else {}),
            **{f"train/{name}_loss": mean for name, mean in means.items() if name},
            "train/learning_rate": lr,
            "train/grad_norm": stats.grad_norm,
            "train/loss_scale": stats.loss_scale,
            "train/skipped_steps": state.skipped_steps,
            "train/epoch": epoch,
            "train/tokens_per_second": state.window_tokens / state.window_seconds,
            "train/step_time_seconds": state.window_seconds / state.window_steps,
            "train/peak_memory_gib": peak_memory_gib(),
            "train/spike_score": state.window_spike,
        }
        state.window_steps, state.window_losses, state.window_counts, state.window_tokens = 0, [], [], 0
        state.window_seconds = state.window_spike = 0.0
        return found


class Trainer:
    """Runs an engine over rows until its steps are done.

    Args:
        evaluate: scores of the current weights by name (collective), e.g. {"accuracy": 0.8}.
        best_score: which of them decides the best checkpoint. Without any score the last one is the best.
        run: what must be the same when this run is resumed.
        objectives: names of the module's objectives, where it has several: each gets its own curve.
        extra: more scalars for a point of the curves, by name; asked on rank 0 alone.
    """

    def __init__(
        self,
        engine: Engine,
        rows: Rows,
        arguments: TrainingArguments,
        sizes: BatchSizes,
        evaluate: Callable[[RunLog, int], dict[str, float]],
        best_score: str,
        run: dict,
        objectives: tuple[str, ...] = (),
        extra: Callable[[], dict[str, float]] = dict,
        lower_is_better: bool = False,
    ) -> None:
        self.engine, self.rows, self.arguments, self.sizes = engine, rows, arguments, sizes
        self.evaluate, self.best_score, self.run = evaluate, best_score, run
        require(
            sizes.global_batch <= MAX_EPOCHS_PER_STEP * len(rows),
            f"a step of {sizes.global_batch:,} rows (micro batch x accumulation x ranks) is more than "
            f"{MAX_EPOCHS_PER_STEP} times all {len(rows):,} rows; lower --per_device_train_batch_size or "
            "--gradient_accumulation_steps",
        )
        self.objectives, self.extra, self.lower_is_better = objectives, extra, lower_is_better
        self.total_steps = total_steps(arguments, len(rows), sizes)
        self.lr_at = schedule(arguments, arguments.scheduler_num_steps or self.total_steps)
        if arguments.torch_compile:
            compile_long(engine.module, self.total_steps)
        self.every = Intervals.of(arguments, self.total_steps)
        for line in idle_settings(self):
            distributed.say(f"warning: {line}")
        self.output_dir = Path(arguments.output_dir)
        self.checkpoints = Checkpoints(self.output_dir, arguments.save_total_limit, arguments.async_save)
        self.state = RunState()
        said = {name: value for name, value in asdict(arguments).items() if name not in ("resume", "local_rank")}
        self.settings = said | {"total_steps": self.total_steps, "ranks": sizes.world_size}
        self.history = [{"step": 0, "settings": self.settings}]

    def begin(self, checkpoint: Path | None, run: dict) -> None:
        """Go on from a checkpoint if there is one, and keep in run.json what the run was told, now and before: `run` is
        that of describe_run, with the resolved DeepSpeed JSON as `deepspeed`."""
        told = run["arguments"] | run["versions"] | {f"deepspeed {name}": v for name, v in run["deepspeed"].items()}
        self.settings |= {name: value for name, value in told.items() if name != "resume"}
        if checkpoint:
            self.resume(checkpoint)
        save_run(self.output_dir, run | {"history": self.history})

    def resume(self, folder: Path) -> None:
        """Go on from a checkpoint. Later ones of the same folder are set aside, and a best score counts only while
        its checkpoint is here to be exported.

        Raises: UserError where it has done more steps than this run has, or another run than this one has written it.
        """
        check_steps(folder, self.total_steps)
        self.state = state = self.checkpoints.load(folder, self.engine, self.run)
        distributed.say(f"resumed from {folder} at step {state.step}")
        self.go_on_from(saved_run(folder).get("history", []))
        self.checkpoints.set_aside_after(state.step)
        if not (state.best_scores and self.checkpoints.point_to_best(state.best_step)):
            state.best_score, state.best_scores, state.best_step, state.evaluations_since_best = None, {}, state.step, 0

    def go_on_from(self, history: list[dict]) -> None:
        """Tell each setting that is not that of the checkpoint as `name: old -> new`, and what this does to the rate.
        `history` has the settings of the run so far, each with the step that it began at."""
        now, step = self.settings, self.state.step
        if not history:  # of a checkpoint of an earlier version
            self.history = [{"step": step, "settings": now}]
            return
        before = history[-1]["settings"]
        changed = {name: (before[name], now[name]) for name in now if before.get(name, now[name]) != now[name]}
        then = schedule(SimpleNamespace(**before), before["scheduler_num_steps"] or before["total_steps"])
        if then(step) != self.lr_at(step):
            changed[f"rate of update {step + 1}"] = (then(step), self.lr_at(step))
        for name, (old, new) in changed.items():
            distributed.say(f"{name}: {old!r} -> {new!r}")
        self.history = [*history, {"step": step, "settings": now}] if changed else history
        if changed.keys() & SCORED_BY:
            distributed.say("scores of before are not comparable: the best is looked for among the next ones")
            self.state.best_scores = {}

    def fit(self) -> RunState:
        """Train to the end and return where the run stands.

        Raises: Stopped after a signal, when the step that it came in is saved; Diverged; SaveFailed.
        """
        log = RunLog(self.output_dir, self.total_steps, self.state.step, scored=not self.unscored())
        with closing(log), Stop() as stop:
            self.guarded(log, stop)
        return self.state

    def guarded(self, log: RunLog, stop: Stop) -> None:
        """All that is left to do; a checkpoint that is being written is finished, however all ranks end alike."""
        try:
            if self.unscored():
                here = damage(self.checkpoints.of(self.state.step)) is None  # or it is of another folder
                self.score(log, stop, saved=distributed.broadcast(here))
            with Ahead(self.rows, self.sizes, distributed.rank()) as ahead:
                self.steps(log, stop, ahead)
            self.checkpoints.finish()
        except (Stopped, Diverged) as ended:
            self.checkpoints.finish()
            if isinstance(ended, Stopped):
                log.say(f"{ended}: saved at step {self.state.step}; go on with --resume auto")
            raise

    def steps(self, log: RunLog, stop: Stop, ahead: Ahead) -> None:
        """The loop itself."""
        state, meter = self.state, Meter(self.state)
        watch = Watch(self.arguments, self.rows, self.sizes, state)
        while state.step < self.total_steps and not self.patience_spent():
            lr = self.lr_at(state.step)
            batches, tokens = ahead.step(state.consumed_rows)
            stats = self.engine.train_step(batches, lr)
            if said := watch.look(stats):
                log.say(said)
            state.consumed_rows += self.sizes.global_batch
            state.real_tokens += tokens
            meter.add(stats, tokens)
            if not stats.applied:
                state.skipped_steps += 1
                self.end_if_asked(stop)
                continue
            state.step += 1
            log.progress(1)
            if state.step % self.every.logging == 0 or state.step == self.total_steps:
                point = meter.point(stats, lr, state.consumed_rows / len(self.rows), self.objectives)
                log.scalars(state.step, point | (self.extra() if distributed.is_main() else {}))
                rate = f"{point['train/tokens_per_second']:,.0f}"
                log.progress(0, loss=f"{point.get('train/loss', math.nan):.4f}", lr=f"{lr:.2e}", tokens_per_s=rate)
            self.finish_step(log, stop)
            meter.since = time.perf_counter()  # speed is that of training alone
        if state.step < self.total_steps:
            log.say(f"stopped early: no better {self.best_score} in {state.evaluations_since_best} evaluations")

    def patience_spent(self) -> bool:
        """Whether the run should stop early."""
        patience = self.arguments.early_stopping_patience
        return bool(patience) and self.state.evaluations_since_best >= patience

    def finish_step(self, log: RunLog, stop: Stop) -> None:
        """What is due after a step. A checkpoint comes before its evaluation, which a signal can then break off."""
        last = self.state.step >= self.total_steps
        saved = last or self.state.step % self.every.save == 0
        if saved:
            self.save()
        self.end_if_asked(stop)
        if last or self.state.step % self.every.eval == 0:
            self.score(log, stop, saved)

    def save(self, best: bool = False) -> None:
        """A checkpoint of where the run stands."""
        self.checkpoints.save(self.engine, self.state, self.run | {"history": self.history}, best)

    def end_if_asked(self, stop: Stop) -> None:
        """Save, unless this step has been, and raise Stopped if any rank was told to end."""
        if not (number := stop.agreed()):
            return
        self.checkpoints.finish()
        newest = distributed.broadcast(self.checkpoints.named("latest"))  # a shared disk may show others an older one
        if newest is None or step_of(newest) != self.state.step:
            self.save()
        raise Stopped(number)

    def unscored(self) -> bool:
        """Whether an evaluation of the checkpoint that the run goes on from is due: it was broken off, or its scores
        are gone and nothing is left to train."""
        state, last = self.state, self.state.step >= self.total_steps
        due = state.step > 0 and (last or state.step % self.every.eval == 0)
        return (due and state.evaluated_step < state.step) or (last and not state.best_scores)

    def score(self, log: RunLog, stop: Stop, saved: bool) -> None:
        """Evaluate, and keep the scores in the checkpoint of this step, or with a new one where they are the best."""
        state = self.state
        with stop.at_once() if saved else nullcontext():
            scores = self.evaluate(log, state.step)
        self.checkpoints.finish()
        log.scalars(state.step, {f"eval/{name}": value for name, value in scores.items()})
        if shown := " ".join(f"{name} {value:.4f}" for name, value in scores.items()):
            log.say(f"step {state.step}: {shown}")
        better = self.note_scores(scores)
        if saved:
            self.checkpoints.amend(state, better)
        elif better or self.patience_spent():
            self.save(better)

    def note_scores(self, scores: dict[str, float]) -> bool:
        """Remember scores; True when they are the best so far."""
        state, score = self.state, scores.get(self.best_score)
        state.evaluated_step = state.step
        score = score if score is not None and math.isfinite(score) else None
        signed = -1.0 if self.lower_is_better else 1.0
        if state.best_score is not None and not (score is not None and signed * score > signed * state.best_score):
            state.evaluations_since_best += 1
            return False
        state.best_score, state.best_step, state.evaluations_since_best = score, state.step, 0
        state.best_scores = dict(scores)
        return True

    def load_best(self) -> None:
        """Put the weights of the best checkpoint back into the engine, if another is the last."""
        if not self.state.best_scores or self.state.best_step == self.state.step:
            return
        best = self.checkpoints.of(self.state.best_step)
        if found := content_damage(best):
            raise UserError(
                f"{best}: the best checkpoint, {found}; take it away and start again with --resume auto, which scores "
                "and exports the last one"
            )
        self.engine.load(best)


def compile_long(module: nn.Module, total_steps: int) -> None:
    """Compile where the run is long enough, whatever is left of it: a resumed run computes as it began."""
    if total_steps >= LEAST_COMPILED:
        compile_layers(module)
        return
    why = f"it does not pay below {LEAST_COMPILED:,} updates, here {total_steps:,}"
    distributed.say(f"--torch_compile is left out: {why}")


def idle_settings(trainer: Trainer) -> Iterator[str]:
    """What was asked for and does nothing in a run of this length."""
    said, total, lr_at = trainer.arguments, trainer.total_steps, trainer.lr_at
    changed = [f.name for f in fields(said) if getattr(said, f.name) != f.default]
    if lr_at(total) > (highest := lr_at(total - 1)):
        yield (
            f"--warmup_steps {said.warmup_steps:g} is no shorter than the run of {total:,} steps; the rate gets no "
            f"higher than {highest:.2e} of {said.learning_rate:g}: give fewer"
        )
    for name in ("logging_steps", "eval_steps", "save_steps"):
        if name in changed and (steps := getattr(said, name)) > total:
            yield f"--{name} {steps}: the run has {total:,} steps, so it counts at the end alone"
    evaluations, patience = -(-total // trainer.every.eval) * bool(trainer.best_score), said.early_stopping_patience
    if patience and patience + 1 >= evaluations:
        yield f"--early_stopping_patience {patience}: the run is scored {evaluations} times and so never stops early"
    if said.optim == "sgd" and (names := [f"--{name}" for name in changed if name.startswith("adam_")]):
        yield f"{', '.join(names)}: --optim sgd has none"
