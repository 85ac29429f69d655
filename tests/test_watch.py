"""Losses and gradients that are not finite, and losses far above the ones before."""

import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

from kozero import distributed
from kozero.config import BatchSizes, TrainingArguments
from kozero.data.batches import TrainingRows
from kozero.engines.base import StepStats
from kozero.errors import Diverged
from kozero.loop import Trainer
from kozero.pause import Pauses
from tests.helpers import numbered_store
from tests.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("one_rank")
GOOD = (1.0, 1.0, True)


class Told:
    """An engine whose steps do what they are told: (loss, gradient norm, applied) each, good ones at the end."""

    def __init__(self, *steps: tuple[float, float, bool], scale: float = 1.0) -> None:
        self.steps, self.scale, self.done = list(steps), scale, 0

    def train_step(self, micro_batches, lr: float) -> StepStats:
        loss, norm, applied = self.steps[self.done] if self.done < len(self.steps) else GOOD
        self.done += 1
        own = torch.tensor([math.nan if distributed.rank() == 1 and not math.isfinite(loss) else 0.0])
        return StepStats((loss,), norm, applied, self.scale, own)

    def snapshot(self) -> dict:
        return {"steps.json": self.done} if distributed.is_main() else {}

    def load(self, folder: Path) -> None:
        self.done = int((folder / "steps.json").read_text())


def trainer(folder: Path, engine: Told, **other) -> Trainer:
    folder.mkdir(exist_ok=True)
    values = {"max_steps": 6, "logging_steps": 1, "eval_steps": 999, "save_steps": 999}
    said = TrainingArguments(output_dir=str(folder), **values | other)
    rows = TrainingRows(numbered_store(20), Pauses(7, 1), 16, "grouped", seed=0)
    sizes = BatchSizes(micro=2, accumulation=1, world_size=distributed.world_size())
    return Trainer(engine, rows, said, sizes, lambda log, step: {}, "", {})


NAN = (math.nan, math.nan, False)
OVERFLOW = (1.0, math.inf, False)


def test_a_step_that_is_not_finite_is_told_and_skipped(tmp_path, capsys):
    state = trainer(tmp_path, Told(GOOD, NAN)).fit()
    assert (state.step, state.skipped_steps) == (6, 1)
    assert "step 2: loss nan, not finite: no update" in capsys.readouterr().out


def test_stop_ends_the_run_at_the_first_and_names_its_examples(tmp_path):
    run = trainer(tmp_path, Told(GOOD, GOOD, NAN), nonfinite="stop")
    with pytest.raises(Diverged) as told:
        run.fit()
    batch = [run.rows.rows[run.rows.row_at(place, 2)] for place in (4, 5)]  # two rows a step, in the third step
    numbers = ", ".join(str(n) for n in np.concatenate(batch))
    assert str(told.value).startswith("step 3: not finite (--nonfinite stop): loss nan, gradient norm nan; training")
    assert f"training examples {numbers} (counted from 0)" in str(told.value)


def test_so_many_in_a_row_end_the_run_and_others_do_not(tmp_path):
    state = trainer(tmp_path / "apart", Told(NAN, NAN, GOOD, NAN, NAN), max_nonfinite=3).fit()
    assert (state.step, state.skipped_steps) == (6, 4)
    engine = Told(GOOD, *[OVERFLOW] * 9)
    with pytest.raises(Diverged, match=r"step 2: 3 steps in a row were not finite: loss 1.0, gradient norm inf"):
        trainer(tmp_path / "row", engine, max_nonfinite=3).fit()
    assert engine.done == 4


def test_an_infinite_loss_counts_even_if_its_update_was_made(tmp_path):
    engine = Told(*[(math.inf, 1.0, True)] * 99)
    with pytest.raises(Diverged, match=r"^step 5: 5 steps in a row were not finite: loss inf, gradient norm 1.0; "):
        trainer(tmp_path, engine, max_nonfinite=5, max_steps=99).fit()
    assert engine.done == 5


def test_overflows_of_fp16_are_no_reason_to_stop_until_the_scale_can_go_no_lower(tmp_path, capsys):
    steps = [OVERFLOW, OVERFLOW, GOOD]
    state = trainer(tmp_path / "high", Told(*steps, scale=2.0), fp16=True, nonfinite="stop").fit()
    assert state.skipped_steps == 2 and "finite" not in capsys.readouterr().out
    with pytest.raises(Diverged, match=r"step 1: gradients overflow at the lowest loss scale, 1: .*loss scale 1"):
        trainer(tmp_path / "low", Told(*steps), fp16=True).fit()


def noisy(num: int) -> list[tuple[float, float, bool]]:
    return [(2.0 + 0.1 * (k % 5), 1.0, True) for k in range(num)]


def test_a_loss_far_above_the_ones_before_is_told_with_its_score(tmp_path, capsys):
    before = noisy(40)
    losses = [loss for loss, *_ in before]
    run = trainer(tmp_path, Told(*before, (9.0, 1.0, True)), max_steps=42)
    run.fit()
    score = (9.0 - statistics.mean(losses)) / statistics.pstdev(losses)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "standard deviations" in line]
    assert line.startswith(f"step 41: loss 9.0000 is {score:.1f} standard deviations above the mean 2.2000 of the 40")
    assert "training examples " in line


@pytest.mark.parametrize(
    ("sigmas", "first", "score", "told"),
    [
        (6, 40, 6.1, True),
        (6, 40, 5.9, False),
        (5.8, 40, 5.9, True),
        (0, 40, 50, False),
        (6, 32, 9, True),
        (6, 31, 9, False),
    ],
)
def test_a_spike_is_told_from_the_score_that_was_asked_for_and_from_32_losses_on(
    tmp_path, capsys, sigmas, first, score, told
):
    losses = [loss for loss, *_ in noisy(first)]
    spike = statistics.mean(losses) + score * statistics.pstdev(losses)
    trainer(tmp_path, Told(*noisy(first), (spike, 1.0, True)), max_steps=42, spike_sigmas=sigmas).fit()
    assert (f"is {score:.1f} standard deviations above" in capsys.readouterr().out) == told


def test_a_loss_is_compared_with_the_128_before_it(tmp_path, capsys):
    """Those before them were far above."""
    steps = [(50.0, 1.0, True), *noisy(128), (9.0, 1.0, True)]
    run = trainer(tmp_path, Told(*steps), max_steps=130)
    run.fit()
    assert "step 130: loss 9.0000" in capsys.readouterr().out and len(run.state.recent_losses) == 128


def test_what_losses_were_outlives_a_resume(tmp_path, capsys):
    steps = [*noisy(40), (9.0, 1.0, True)]
    trainer(tmp_path, Told(*steps), max_steps=40).fit()
    again = trainer(tmp_path, Told(*steps), max_steps=41)
    again.resume(again.checkpoints.to_resume("auto"))
    assert len(again.state.recent_losses) == 40
    again.fit()
    assert "step 41: loss 9.0000 is" in capsys.readouterr().out


def test_patience_without_scores_is_told(tmp_path, capsys):
    trainer(tmp_path, Told(), early_stopping_patience=3, eval_steps=1)
    assert "--early_stopping_patience 3: the run is scored 0 times and so never stops early" in capsys.readouterr().out


def test_steps_that_are_not_finite_are_counted_on_after_a_resume(tmp_path):
    steps = [GOOD, *[OVERFLOW] * 9]
    run = trainer(tmp_path, Told(*steps), max_nonfinite=3)
    run.end_if_asked = lambda stop: run.save() or 1 / 0 if run.state.skipped_steps == 2 else None
    with pytest.raises(ZeroDivisionError):
        run.fit()
    engine = Told(*steps)
    again = trainer(tmp_path, engine, max_nonfinite=3)
    again.resume(again.checkpoints.to_resume("auto"))
    with pytest.raises(Diverged, match="step 2: 3 steps in a row were not finite"):
        again.fit()
    assert engine.done == 4


def both_ranks(folder: str) -> str:
    with pytest.raises(Diverged) as told:
        trainer(Path(folder), Told(NAN), nonfinite="stop").fit()
    return str(told.value)


def test_the_rank_whose_loss_it_was_is_named_on_all(tmp_path):
    first, second = run_ranks(both_ranks, str(tmp_path))
    assert first == second and "; rank 1, training examples " in first
