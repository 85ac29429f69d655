"""Checkpoints of a run: names, which are kept, what is refused. That a resumed run goes on exactly is in
test_engines.py."""

import errno
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kozero import checkpoint, distributed, files, runlog
from kozero.checkpoint import Checkpoints, RunState, content_damage, random_state, restore_random_state
from kozero.config import BatchSizes, TrainingArguments
from kozero.data.batches import TrainingRows
from kozero.engines.base import StepStats
from kozero.errors import Diverged, SaveFailed, Stopped, UserError
from kozero.files import fingerprint, write_file
from kozero.loop import Trainer
from kozero.pause import Pauses
from kozero.runlog import RunLog, keep_until, peak_memory_gib
from kozero.seal import read_sealed, sealed, write_seal
from kozero.stop import AGAIN_SECONDS, Stop
from models.dropout import drop
from tests.helpers import numbered_store, refused
from tests.ranks import run_ranks

pytestmark = pytest.mark.usefixtures("one_rank")

RUN = {"seed": 1, "freeze": "wte"}


class Steps:
    """An engine that only counts its steps, and skips the ones it is told to."""

    def __init__(self, skipped: tuple[int, ...] = ()) -> None:
        self.done, self.skipped, self.rates = 0, skipped, []

    def train_step(self, micro_batches, lr: float) -> StepStats:
        self.done += 1
        self.rates.append(lr)
        return StepStats((1.0,), 1.0, self.done - 1 not in self.skipped, 1.0)

    def snapshot(self) -> dict:
        return {"steps.json": self.done} if distributed.is_main() else {}

    def load(self, folder: Path) -> None:
        self.done = int((folder / "steps.json").read_text())


@pytest.fixture
def checkpoints(tmp_path):
    return Checkpoints(tmp_path, limit=2)


def save(checkpoints: Checkpoints, *numbers: int, best: int = -1) -> None:
    for step in numbers:
        checkpoints.save(Steps(), RunState(step=step, best_step=best if 0 < best <= step else 0), RUN, step == best)


def names(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name for path in checkpoints.folder.iterdir())


# Names and what is kept ---------------------------------------------------------------------------------------------


def test_the_newest_are_kept_up_to_the_limit(checkpoints):
    save(checkpoints, 10, 20, 30, 40)
    assert names(checkpoints) == ["latest", "step-000030", "step-000040"]


def test_the_best_is_kept_beside_the_newest(checkpoints):
    save(checkpoints, 10, 20, 30, 40, best=10)
    assert names(checkpoints) == ["best", "latest", "step-000010", "step-000030", "step-000040"]


def test_an_earlier_best_goes_when_there_is_a_better_one(checkpoints):
    save(checkpoints, 10, best=10)
    save(checkpoints, 20, 30, 40, best=30)
    assert names(checkpoints) == ["best", "latest", "step-000020", "step-000030", "step-000040"]
    save(checkpoints, 50, best=30)
    assert names(checkpoints) == ["best", "latest", "step-000030", "step-000040", "step-000050"]


def test_latest_and_best_name_their_checkpoints(checkpoints):
    save(checkpoints, 10, 20, 30, best=20)
    assert checkpoints.named("latest").name == "step-000030"
    assert checkpoints.named("best").name == "step-000020"


def test_a_pointer_to_a_folder_that_is_gone_or_elsewhere_is_none(checkpoints, tmp_path):
    assert checkpoints.named("best") is None
    save(checkpoints, 10)
    for text in ("step-000099", "../step-000010", "", "step-000010.incomplete"):
        (checkpoints.folder / "best").write_text(text)
        assert checkpoints.named("best") is None


def test_steps_beyond_a_million_are_in_their_order(checkpoints):
    save(checkpoints, 999_999, 1_000_000)
    assert checkpoints.newest().name == "step-1000000"


def test_a_checkpoint_of_the_same_step_is_replaced(checkpoints):
    checkpoints.save(Steps(), RunState(step=10, consumed_rows=1), RUN, False)
    checkpoints.save(Steps(), RunState(step=10, consumed_rows=2), RUN, False)
    assert checkpoints.load(checkpoints.newest(), Steps(), RUN).consumed_rows == 2


# Half-written ones --------------------------------------------------------------------------------------------------


def test_a_folder_without_its_last_file_is_no_checkpoint(checkpoints):
    save(checkpoints, 10, 20)
    (checkpoints.folder / "step-000020" / "state.json").unlink()
    assert checkpoints.newest().name == "step-000010"
    assert checkpoints.named("latest") is None


DAMAGE = {
    "a file cut short": ("steps.json", "", "steps.json is damaged: 0 bytes, 1 were written"),
    "a file with another content": ("steps.json", "7", "steps.json is damaged: its SHA-256 is not that"),
    "a file that is gone": ("rng-rank0.json", None, "rng-rank0.json is damaged: no bytes"),
    "a state cut short": ("state.json", '{"state": {"st', "state.json is damaged"),
    "an empty state": ("state.json", "", "state.json is damaged"),
    "a state of another form": ("state.json", "[]", "state.json is damaged"),
    "a state without its run": ("state.json", '{"state": {}}', "state.json is damaged"),
    "a step that is text": ("state.json", {"step": "20"}, "step is '20'"),
    "a score that is text": ("state.json", {"best_scores": {"f1": "high"}}, "best_scores is"),
    "a field of another version": ("state.json", {"steps": 3}, "state.json is damaged"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_passed_over(checkpoints, capsys, case):
    name, content, message = DAMAGE[case]
    save(checkpoints, 10, 20)
    folder = checkpoints.folder / "step-000020"
    if isinstance(content, dict):
        saved = read_sealed(folder / name)
        content = sealed(saved | {"state": saved["state"] | content})
    (folder / name).unlink() if content is None else (folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        checkpoints.to_resume(str(folder))
    assert checkpoints.to_resume("auto").name == "step-000010"
    assert message in capsys.readouterr().out
    if "SHA" not in message:
        assert checkpoints.named("latest") is None


def test_a_folder_of_damaged_checkpoints_alone_does_not_take_a_new_run(checkpoints):
    save(checkpoints, 10)
    (checkpoints.folder / "step-000010" / "state.json").unlink()
    told = f"--output_dir {checkpoints.folder.parent}: holds checkpoints of an earlier run"
    with refused(told, "--resume auto", untouched=checkpoints.folder):
        checkpoints.to_resume(None)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew_in_silence(checkpoints):
    save(checkpoints, 10)
    (checkpoints.folder / "step-000010" / "steps.json").write_text("7")
    told = (f"--resume auto: every checkpoint in {checkpoints.folder} is damaged", "begin anew in another --output_dir")
    with refused(*told, untouched=checkpoints.folder):
        checkpoints.to_resume("auto")


def test_an_engine_that_fails_while_saving_leaves_the_older_checkpoint(checkpoints, monkeypatch):
    save(checkpoints, 10)
    monkeypatch.setattr(Steps, "snapshot", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save(checkpoints, 20)
    assert checkpoints.newest().name == "step-000010"
    assert names(checkpoints) == ["latest", "step-000010"]


def test_what_killed_runs_left_half_done_goes_with_the_next_save(checkpoints):
    for name in ("step-000020.incomplete", "step-000005.removed"):
        (checkpoints.folder / name).mkdir(parents=True)
        (checkpoints.folder / name / "file").touch()
    save(checkpoints, 10)
    assert names(checkpoints) == ["latest", "step-000010"]


def test_a_removal_that_is_broken_off_leaves_no_damaged_checkpoint(checkpoints, monkeypatch):
    """Killed before the first file is gone, and after the last but one."""
    save(checkpoints, 10, 20)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path, **told: None)
    save(checkpoints, 30)
    assert [path.name for path in checkpoints.all()] == ["step-000020", "step-000030"]
    assert "step-000010.removed" in names(checkpoints)


def test_what_a_killed_save_left_is_written_over(checkpoints):
    leftover = checkpoints.folder / "step-000020.incomplete"
    leftover.mkdir(parents=True)
    (leftover / "old").touch()
    save(checkpoints, 20)
    assert names(checkpoints) == ["latest", "step-000020"]
    assert not (checkpoints.folder / "step-000020" / "old").exists()


# Resuming -----------------------------------------------------------------------------------------------------------


def test_auto_without_checkpoints_begins_at_the_beginning_and_says_so(checkpoints, capsys):
    assert checkpoints.to_resume("auto") is None
    told = f"--resume auto: no whole checkpoint in {checkpoints.folder}, the run begins anew\n"
    assert capsys.readouterr().out == told
    save(checkpoints, 10)
    checkpoints.to_resume("auto")
    assert capsys.readouterr().out == ""


def test_auto_is_the_newest_whole_one(checkpoints):
    save(checkpoints, 10, 20, best=10)
    (checkpoints.folder / "step-000030.incomplete").mkdir()
    assert checkpoints.to_resume("auto").name == "step-000020"


def test_a_new_run_does_not_mix_with_an_old_one(checkpoints):
    assert checkpoints.to_resume(None) is None
    save(checkpoints, 10)
    with pytest.raises(UserError, match=r"--output_dir .*holds checkpoints of an earlier run.*--resume auto"):
        checkpoints.to_resume(None)


def test_a_named_folder_must_be_a_whole_checkpoint(checkpoints, tmp_path):
    save(checkpoints, 10, 20)
    folder = checkpoints.folder / "step-000010"
    assert checkpoints.to_resume(str(folder)) == folder
    with pytest.raises(UserError, match=r"--resume .*nowhere: not a whole checkpoint"):
        checkpoints.to_resume(str(tmp_path / "nowhere"))


def test_a_changed_setting_is_refused_by_name_with_both_values(checkpoints):
    save(checkpoints, 10)
    engine = Steps()
    with pytest.raises(UserError, match="saved with freeze 'wte', this run has 'wpe'"):
        checkpoints.load(checkpoints.newest(), engine, RUN | {"freeze": "wpe"})
    assert engine.done == 0  # nothing was loaded


def test_a_setting_that_the_checkpoint_does_not_know_is_refused(checkpoints):
    save(checkpoints, 10)
    engine, told = Steps(), f"{checkpoints.of(10)}: saved with colour None, this run has 'red'"
    with refused(told, "give the same", untouched=checkpoints.folder):
        checkpoints.load(checkpoints.newest(), engine, RUN | {"colour": "red"})
    assert engine.done == 0


def test_the_state_of_the_run_comes_back(checkpoints):
    state = RunState(7, 56, 2, 999, 0.5, 4, {"accuracy": 0.5}, 3, 6, [1.5, 2.0])
    checkpoints.save(Steps(), state, RUN, True)
    assert checkpoints.load(checkpoints.newest(), Steps(), RUN) == state


def test_every_random_generator_comes_back():
    np.random.standard_normal()  # leaves a second one in store
    state = json.loads(json.dumps(random_state()))

    def draw():
        return random.random(), random.gauss(0, 1), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()

    first = draw()
    assert draw() != first
    restore_random_state(state)
    assert draw() == first


# The loop -----------------------------------------------------------------------------------------------------------


def trainer(folder: Path, engine: Steps, scores: list[float], **other) -> Trainer:
    """A run of 6 steps that is evaluated and saved after each."""
    folder.mkdir(exist_ok=True)
    values = {"max_steps": 6, "logging_steps": 1, "eval_steps": 1, "save_steps": 1, "learning_rate": 1.0}
    said = TrainingArguments(output_dir=str(folder), **values | other)
    rows = TrainingRows(numbered_store(20), Pauses(7, 1), 16, "grouped", seed=0)
    given = iter(scores)
    sizes = BatchSizes(micro=2, accumulation=1, world_size=1)
    return Trainer(engine, rows, said, sizes, lambda log, step: {"score": next(given)}, "score", RUN)


def test_on_other_ranks_a_run_goes_on_with_streams_of_its_own(checkpoints):
    """Not with that of its seed, from which its first steps drew, nor with that of another checkpoint."""
    distributed.seed_everything(3)
    first = torch.rand(1000)
    save(checkpoints, 10, 20)
    found = []
    for folder in checkpoints.all():
        (folder / "rng-rank1.json").write_bytes((folder / "rng-rank0.json").read_bytes())
        for _ in range(2):
            distributed.seed_everything(3)
            checkpoints.load(folder, Steps(), RUN)
            found.append(torch.rand(1000))
    assert torch.equal(found[0], found[1]) and torch.equal(found[2], found[3])
    assert not set(found[0].tolist()) & set(found[2].tolist()) and not set(first.tolist()) & set(found[0].tolist())


@pytest.mark.parametrize("begin", ["anew", "from as many ranks", "from one rank"])
def test_ranks_draw_different_dropout_masks_from_one_seed(checkpoints, monkeypatch, begin):
    """PyTorch's, the one of models/dropout.py, and numbers of Python and NumPy."""
    if begin != "anew":
        save(checkpoints, 10)
        for rank in range(3 if begin == "from as many ranks" else 0):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            distributed.seed_everything(3)
            write_file(checkpoints.of(10) / f"rng-rank{rank}.json", random_state())
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    found = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        distributed.seed_everything(3)
        if begin != "anew":
            checkpoints.load(checkpoints.of(10), Steps(), RUN)
        ones = torch.ones(64)
        masks = torch.nn.functional.dropout(ones, 0.5), drop(ones, 0.5)
        found.append([*(tuple(mask.tolist()) for mask in masks), random.random(), np.random.random()])
    assert [len(set(drawn)) for drawn in zip(*found, strict=True)] == [3, 3, 3, 3]


def test_the_best_checkpoint_is_that_of_the_highest_score_and_its_weights_can_come_back(tmp_path):
    engine = Steps()
    run = trainer(tmp_path, engine, [0.1, 0.4, 0.3, 0.4, 0.2, 0.1])
    state = run.fit()
    assert (state.step, state.best_step, state.best_scores) == (6, 2, {"score": 0.4})
    assert run.checkpoints.named("best").name == "step-000002"
    run.load_best()
    assert engine.done == 2


def test_going_on_from_an_older_checkpoint_sets_the_later_ones_aside(tmp_path):
    trainer(tmp_path, Steps(), [0.6, 0.5, 0.4, 0.3, 0.2, 0.1], save_total_limit=9).fit()
    again = trainer(tmp_path, Steps(), [0.4, 0.3, 0.2, 0.1], save_total_limit=9)
    again.resume(again.checkpoints.folder / "step-000002")
    assert [path.name for path in again.checkpoints.all()] == ["step-000001", "step-000002"]
    assert again.checkpoints.newest().name == "step-000002"
    assert (again.state.best_score, again.state.best_step) == (0.6, 1)
    again.fit()
    assert again.checkpoints.named("latest").name == "step-000006"


def test_a_best_score_from_after_the_checkpoint_is_forgotten(tmp_path):
    trainer(tmp_path, Steps(), [0.1, 0.2, 0.3, 0.9, 0.2, 0.1], save_total_limit=9).fit()
    again = trainer(tmp_path, Steps(), [0.3, 0.2, 0.4, 0.1], save_total_limit=9)
    again.resume(again.checkpoints.folder / "step-000002")
    state = again.fit()
    assert (state.best_score, state.best_step) == (0.4, 5)
    assert again.checkpoints.named("best").name == "step-000005"


def test_a_best_score_whose_checkpoint_is_gone_is_forgotten_with_its_patience(tmp_path):
    assert trainer(tmp_path, Steps(), [0.9, 0.1, 0.2, 0.3, 0.2, 0.1]).fit().evaluations_since_best == 5
    shutil.rmtree(tmp_path / "checkpoints/step-000001")
    again = trainer(tmp_path, Steps(), [])
    again.resume(again.checkpoints.of(6))
    state = again.state
    assert (state.best_score, state.best_scores, state.best_step, state.evaluations_since_best) == (None, {}, 6, 0)


def test_a_skipped_update_does_not_advance_the_rate_but_takes_its_rows(tmp_path):
    engine = Steps(skipped=(1, 2))
    state = trainer(tmp_path, engine, [0.0] * 6).fit()
    assert engine.rates == pytest.approx([1, 5 / 6, 5 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert (state.step, state.skipped_steps, state.consumed_rows) == (6, 2, 16)


class Told(Steps):
    """An engine in whose fifth step a signal comes."""

    def __init__(self, number: int, skipped: tuple[int, ...] = ()) -> None:
        super().__init__(skipped)
        self.number = number

    def train_step(self, micro_batches, lr: float) -> StepStats:
        if self.done == 4:
            send(self.number)
        return super().train_step(micro_batches, lr)


def send(number: int) -> None:
    """A signal to this process; the thread that waits for them has noted it when this returns."""
    noted, note = threading.Event(), Stop.note
    with mock.patch.object(Stop, "note", lambda stop, told: (note(stop, told), noted.set())):
        os.kill(os.getpid(), number)
        assert noted.wait(60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
@pytest.mark.parametrize("every", [9, 5])
def test_a_signal_ends_a_run_after_its_step_and_a_checkpoint(tmp_path, capsys, number, every):
    before = signal.getsignal(number)
    run = trainer(tmp_path, Told(number), [], eval_steps=9, save_steps=every)
    with pytest.raises(Stopped) as stopped:
        run.fit()
    assert stopped.value.number == number and signal.getsignal(number) == before
    assert [path.name for path in run.checkpoints.all()] == ["step-000005"]
    told = f"{number.name}: saved at step 5; go on with --resume auto"
    assert told in capsys.readouterr().out.splitlines()
    again = trainer(tmp_path, Steps(), [0.0], eval_steps=9)
    again.resume(again.checkpoints.to_resume("auto"))
    assert again.fit().step == 6


def test_a_hangup_that_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            send(signal.SIGUSR1)
            assert list(stop.first) == [signal.SIGUSR1] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_in_a_skipped_update_loses_no_step(tmp_path):
    run = trainer(tmp_path, Told(signal.SIGTERM, skipped=(4, 5, 6)), [], eval_steps=9, save_steps=9)
    with pytest.raises(Stopped):
        run.fit()
    state = run.checkpoints.load(run.checkpoints.newest(), Steps(), RUN)
    assert (state.step, state.skipped_steps, state.consumed_rows) == (4, 1, 10)


def test_a_signal_during_an_evaluation_ends_it_and_the_resumed_run_makes_up_for_it(tmp_path):
    scores = [0.1, 0.4, 0.3, 0.4, 0.2, 0.1]
    straight = trainer(tmp_path / "straight", Steps(), scores).fit()
    run = trainer(tmp_path / "told", Steps(), scores)
    evaluate = run.evaluate
    run.evaluate = lambda log, step: send(signal.SIGTERM) if step == 4 else evaluate(log, step)
    with pytest.raises(Stopped):
        run.fit()
    assert run.checkpoints.newest().name == "step-000004"
    again = trainer(tmp_path / "told", Steps(), scores[3:])
    again.resume(again.checkpoints.to_resume("auto"))
    assert again.fit() == straight
    points = [json.loads(line) for line in (tmp_path / "told/metrics.jsonl").read_text().splitlines()]
    assert [point["step"] for point in points if "eval/score" in point] == [1, 2, 3, 4, 5, 6]


def test_a_signal_during_an_evaluation_that_no_checkpoint_precedes_waits_for_it(tmp_path):
    run = trainer(tmp_path, Steps(), [], eval_steps=2, save_steps=9)
    run.evaluate = lambda log, step: send(signal.SIGTERM) or {"score": float(step)}
    with pytest.raises(Stopped):
        run.fit()
    state = run.checkpoints.load(run.checkpoints.newest(), Steps(), RUN)
    assert (state.step, state.best_scores) == (3, {"score": 2.0})


class Uneven(Steps):
    """An engine with two objectives whose losses differ from step to step, one of them a spike, beside two skipped
    updates. A signal comes in the steps that are named."""

    def __init__(self, *told: int) -> None:
        super().__init__(skipped=(20, 42))
        self.told = told

    def train_step(self, micro_batches, lr: float) -> StepStats:
        if self.done in self.told:
            send(signal.SIGTERM)
        losses = (3.0 + math.sin(self.done) + 50.0 * (self.done == 41), 0.1 * self.done)
        return replace(super().train_step(micro_batches, lr), losses=losses)


def curve(folder: Path) -> list[dict]:
    """All that is logged but the time."""
    clocks = ("time", "train/tokens_per_second", "train/step_time_seconds", "train/peak_memory_gib")
    points = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in point.items() if name not in clocks} for point in points]


def divided_run(folder: str) -> tuple[list[dict], list[dict], int]:
    """The curves of a run, and of one that signals end inside three windows of its curves, once in a skipped update."""
    flags = {"max_steps": 60, "logging_steps": 7, "eval_steps": 99, "save_steps": 99}
    whole, parts, ends = Path(folder) / "whole", Path(folder) / "parts", 0
    for path, told in ((whole, ()), (parts, (4, 20, 42))):
        while True:
            run = trainer(path, Uneven(*told), [0.5], **flags)
            run.objectives = ("first", "second")
            if ends:
                run.resume(run.checkpoints.to_resume("auto"))
            try:
                run.fit()
                break
            except Stopped:
                told, ends = told[1:], ends + 1
    return curve(whole), curve(parts), ends


def test_a_run_that_signals_divide_logs_what_the_whole_run_does(tmp_path):
    whole, parts, ends = divided_run(str(tmp_path))
    assert ends == 3 and parts == whole
    spikes = [point["train/spike_score"] for point in whole if "train/loss" in point]
    assert max(spikes) > 6 and spikes.count(0.0) == 4  # fewer than 32 losses before: nothing to compare with


@pytest.mark.slow
def test_ranks_that_a_signal_ends_log_what_the_whole_run_does(tmp_path):
    for whole, parts, ends in run_ranks(divided_run, str(tmp_path)):
        assert ends == 3 and parts == whole


def test_a_point_of_the_curves_is_the_mean_of_all_its_steps(tmp_path):
    """By hand, over a window that a signal divides after its fifth step."""

    class Given(Told):
        def train_step(self, micro_batches, lr: float) -> StepStats:
            return replace(
                super().train_step(micro_batches, lr), losses=((1.0, 2.0, 3.0, 6.0, 5.0, 7.0)[self.done - 1],)
            )

    flags = {"logging_steps": 6, "eval_steps": 9, "save_steps": 9}
    with pytest.raises(Stopped):
        trainer(tmp_path, Given(signal.SIGTERM), [], **flags).fit()
    again = trainer(tmp_path, Given(signal.SIGTERM), [0.5], **flags)
    again.resume(again.checkpoints.to_resume("auto"))
    again.fit()
    assert [point["train/loss"] for point in curve(tmp_path) if "train/loss" in point] == [24 / 6]


def test_the_point_of_an_objective_is_over_the_steps_that_had_targets_of_it(tmp_path):
    """By hand, over a window that a signal divides after its fifth step; the last window has none of the second."""

    class Given(Told):
        def train_step(self, micro_batches, lr: float) -> StepStats:
            pairs = [
                (1.0, None),
                (2.0, 8.0),
                (3.0, None),
                (6.0, None),
                (5.0, None),
                (7.0, 4.0),
                (3.0, None),
                (1.0, None),
            ]
            return replace(super().train_step(micro_batches, lr), losses=pairs[self.done - 1])

    flags = {"logging_steps": 6, "eval_steps": 9, "save_steps": 9, "max_steps": 8}
    broken_off, again = (trainer(tmp_path, Given(signal.SIGTERM), [0.5], **flags) for _ in range(2))
    broken_off.objectives = again.objectives = ("mlm", "sop")
    with pytest.raises(Stopped):
        broken_off.fit()
    again.resume(again.checkpoints.to_resume("auto"))
    again.fit()
    first, last = (point for point in curve(tmp_path) if "train/loss" in point)
    assert [first[f"train/{name}loss"] for name in ("mlm_", "sop_", "")] == [24 / 6, 12 / 2, 24 / 6 + 12 / 2]
    assert (last["train/mlm_loss"], last["train/loss"]) == (4 / 2, 4 / 2) and "train/sop_loss" not in last


@pytest.mark.parametrize("lower_is_better", [False, True])
def test_no_score_is_never_the_best(tmp_path, lower_is_better):
    """Neither one that is absent nor one that is no number; without any the last checkpoint counts as the best."""
    run = trainer(tmp_path, Steps(), [])
    run.lower_is_better = lower_is_better
    for step, scores in enumerate(
        [{}, {"score": math.nan}, {"score": 5.0}, {}, {"other": 9.0}, {"score": math.nan}], 1
    ):
        run.state.step = step
        run.note_scores({run.best_score if name == "score" else name: value for name, value in scores.items()})
        assert run.state.best_step == min(step, 3)
    assert (run.state.best_score, run.state.evaluations_since_best) == (5.0, 3)


def test_a_checkpoint_of_before_the_window_was_kept_goes_on(checkpoints, tmp_path):
    save(checkpoints, 10)
    path = checkpoints.newest() / "state.json"
    saved = read_sealed(path)
    known = {name: value for name, value in saved["state"].items() if not name.startswith(("window_", "bad_"))}
    write_seal(path, saved | {"state": known})
    assert checkpoints.load(checkpoints.to_resume("auto"), Steps(), RUN) == RunState(step=10)
    run = trainer(tmp_path, Steps(), [], max_steps=12)
    run.resume(checkpoints.newest())  # nor had it the settings
    assert [entry["step"] for entry in run.history] == [10]


def insist() -> None:
    """Signals until this process ends: those that come soon after the first do not end it."""
    while True:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(AGAIN_SECONDS / 4)


class Hanging(Steps):
    """An engine whose second step waits where no Python runs, as for a rank that does not answer."""

    def train_step(self, micro_batches, lr: float) -> StepStats:
        if self.done == 1:
            threading.Thread(target=insist, daemon=True).start()
            torch.distributed.HashStore().get("an answer")
        return super().train_step(micro_batches, lr)


def hang(folder: str) -> None:
    distributed.setup()
    trainer(Path(folder), Hanging(), [0.0]).fit()


def test_a_second_signal_ends_a_process_that_hangs(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=hang, args=(str(tmp_path),))
    process.start()
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("flags", "highest"),
    [
        ({"warmup_steps": 5}, None),
        (
            {"warmup_steps": 6},
            "--warmup_steps 6 is no shorter than the run of 6 steps; the rate gets no higher than 8.33e-01",
        ),
        ({"warmup_steps": 50}, "no higher than 1.00e-01 of 1"),
        ({"warmup_steps": 0.5, "scheduler_num_steps": 10}, None),
        ({"warmup_steps": 0.5, "scheduler_num_steps": 20}, "--warmup_steps 0.5 is no shorter than the run of 6 steps"),
        ({"warmup_steps": 50, "learning_rate": 0.0}, None),
    ],
)
def test_a_warm_up_that_does_not_end_is_told_with_the_highest_rate(tmp_path, capsys, flags, highest):
    engine = Steps()
    run = trainer(tmp_path, engine, [0.0] * 6, **flags)
    told = capsys.readouterr().out
    assert (highest in told and told.count("\n") == 1) if highest else told == ""
    run.fit()
    if highest:
        assert f"no higher than {max(engine.rates):.2e}" in told
    else:
        assert max(engine.rates) == run.arguments.learning_rate


def test_a_schedule_that_ends_before_the_epochs_is_refused(tmp_path):
    """80 steps, however they are told."""
    epochs = {"max_steps": 0, "num_train_epochs": 8.0}
    with pytest.raises(UserError, match=r"--scheduler_num_steps 5: must be the run's 80 steps .* 0 in 75 of them"):
        trainer(tmp_path, Steps(), [], **epochs, scheduler_num_steps=5)
    with pytest.raises(UserError, match="0 in 1 of them"):
        trainer(tmp_path, Steps(), [], **epochs, scheduler_num_steps=79)
    for flags in ({"scheduler_num_steps": 80}, {"scheduler_num_steps": 5, "lr_scheduler_type": "constant"}):
        run = trainer(tmp_path, Steps(), [], **epochs, **flags)
        assert run.total_steps == 80 and all(run.lr_at(step) > 0 for step in range(80))


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"eval_steps": 7}, "--eval_steps 7: the run has 6 steps, so it counts at the end alone"),
        ({"save_steps": 99}, "--save_steps 99: the run has 6 steps, so it counts at the end alone"),
        ({"early_stopping_patience": 5}, "--early_stopping_patience 5: the run is scored 6 times and so never stops"),
        ({"early_stopping_patience": 1, "eval_steps": 6}, "is scored 1 times and so never stops early"),
        (
            {"optim": "sgd", "adam_beta2": 0.9, "adam_epsilon": 0.1},
            "--adam_beta2, --adam_epsilon: --optim sgd has none",
        ),
        ({"early_stopping_patience": 4, "eval_steps": 1, "save_steps": 6, "adam_beta2": 0.9}, None),
    ],
)
def test_a_setting_that_does_nothing_in_a_run_is_told(tmp_path, capsys, flags, line):
    run = trainer(tmp_path, Steps(), [0.5, 0.4, 0.3, 0.2, 0.1, 0.0], **flags)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == bool(line) and (not line or line in told[0])
    if "patience" in (line or "patience"):
        assert (run.fit().step == 6) == bool(line)


KEPT = {"versions": {"torch": "2"}, "deepspeed": {}}


def test_settings_that_a_resumed_run_changes_are_told_and_both_are_kept(tmp_path, capsys):
    straight = Steps()
    trainer(tmp_path / "straight", straight, [0.0] * 6).fit()
    run = trainer(tmp_path / "run", Steps(), [0.0] * 6, save_total_limit=20)
    run.begin(None, KEPT | {"arguments": {"dropout": 0.1, "resume": None}})
    run.fit()
    told = {"max_steps": 12, "learning_rate": 3.0, "max_grad_norm": 0.5, "save_total_limit": 20, "resume": "auto"}
    engine = Steps()
    again = trainer(tmp_path / "run", engine, [0.0] * 9, **told)
    capsys.readouterr()
    again.begin(run.checkpoints.of(3), KEPT | {"arguments": {"dropout": 0.0, "resume": "auto"}})
    lines = capsys.readouterr().out.splitlines()
    again.fit()
    assert set(lines[1:]) == {
        "max_steps: 6 -> 12", "learning_rate: 1.0 -> 3.0", "max_grad_norm: 1.0 -> 0.5", "total_steps: 6 -> 12",
        "dropout: 0.1 -> 0.0", f"rate of update 4: {straight.rates[3]} -> {engine.rates[0]}",
    }  # fmt: skip
    history = json.loads((tmp_path / "run/run.json").read_text())["history"]
    assert [entry["step"] for entry in history] == [0, 3]
    assert [entry["settings"]["learning_rate"] for entry in history] == [1.0, 3.0]
    assert [entry["settings"]["dropout"] for entry in history] == [0.1, 0.0]
    for folder, begun in ((run.checkpoints.of(12), [0, 3]), (run.checkpoints.of(2), [0, 2])):
        once_more = trainer(tmp_path / "run", Steps(), [], **told)
        capsys.readouterr()
        once_more.begin(folder, KEPT | {"arguments": {"dropout": 0.0, "resume": "auto"}})
        assert [entry["step"] for entry in once_more.history] == begun
        assert len(capsys.readouterr().out.splitlines()) == (1 if begun == [0, 3] else 7)


@pytest.mark.parametrize(("samples", "best"), [(5, (0.9, 2)), (9, (0.4, 5))])
def test_a_best_score_counts_only_among_scores_of_the_same_examples(tmp_path, samples, best):
    run = trainer(tmp_path, Steps(), [0.1, 0.9, 0.2, 0.3, 0.2, 0.1], save_total_limit=9)
    run.begin(None, KEPT | {"arguments": {"max_eval_samples": 5}})
    run.fit()
    again = trainer(tmp_path, Steps(), [0.3, 0.4, 0.1], save_total_limit=9)
    again.begin(run.checkpoints.of(3), KEPT | {"arguments": {"max_eval_samples": samples}})
    state = again.fit()
    assert (state.best_score, state.best_step) == best


def test_a_run_of_fewer_steps_than_its_checkpoint_has_done_is_refused(tmp_path):
    run = trainer(tmp_path, Steps(), [0.0] * 6)
    run.fit()
    before = names(run.checkpoints)
    again = trainer(tmp_path, Steps(), [], max_steps=5)
    with pytest.raises(UserError, match=r"--resume .*step-000006: has done 6 steps and this run has 5; give more with"):
        again.resume(run.checkpoints.newest())
    with pytest.raises(UserError, match="has done 6 steps and this run has 5"):  # before there is a model
        again.checkpoints.to_resume("auto", 5)
    assert again.checkpoints.to_resume("auto", 6) == again.checkpoints.to_resume("auto") == run.checkpoints.newest()
    assert names(run.checkpoints) == before


def test_speed_is_that_of_training_alone(tmp_path, monkeypatch):
    """By a clock of its own: a step takes 2 seconds, an evaluation 100."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("kozero.loop.time", SimpleNamespace(perf_counter=lambda: clock.now))

    def passes(seconds: float, work: Callable) -> Callable:
        def timed(*told):
            clock.now += seconds
            return work(*told)

        return timed

    run = trainer(tmp_path, Steps(), [0.0] * 6)
    run.evaluate, run.engine.train_step = passes(100, run.evaluate), passes(2, run.engine.train_step)
    run.fit()
    points = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    seconds = [point["train/step_time_seconds"] for point in points if "train/loss" in point]
    assert seconds[1:] == [2.0] * 5  # the first begins by the real clock


def test_patience_ends_a_run_early_and_outlives_a_resume(tmp_path):
    scores = [0.5, 0.4, 0.3, 0.2, 0.1, 0.0]
    state = trainer(tmp_path / "straight", Steps(), scores, early_stopping_patience=3).fit()
    assert state.step == 4
    first = trainer(tmp_path / "first", Steps(), scores, early_stopping_patience=3)
    first.total_steps = 2
    first.fit()
    again = trainer(tmp_path / "first", Steps(), scores[2:], early_stopping_patience=3)
    again.resume(again.checkpoints.to_resume("auto"))
    assert again.fit() == state


# What is written, and when -------------------------------------------------------------------------------------------


class Weights(Steps):
    """An engine with a tensor that every step changes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.zeros(3)

    def snapshot(self) -> dict:
        return {"weights.safetensors": {"weight": self.weight}, "more.json": {"step": self.done}}

    def load(self, folder: Path) -> None:
        self.weight = load_file(folder / "weights.safetensors")["weight"]
        assert json.loads((folder / "more.json").read_text()) == {"step": self.done}


def test_a_save_in_the_background_holds_what_was_there_when_it_began(tmp_path, monkeypatch):
    """The next step changes the weights before the first file is written."""
    checkpoints, engine, go = Checkpoints(tmp_path, 2, in_background=True), Weights(), threading.Event()
    monkeypatch.setattr(checkpoint, "write_file", lambda *told: go.wait(60) and write_file(*told))
    checkpoints.save(engine, RunState(step=10), RUN, False)
    assert checkpoints.newest() is None
    engine.weight += 1
    go.set()
    checkpoints.finish()
    checkpoints.load(checkpoints.newest(), engine, RUN)
    assert engine.weight.tolist() == [0.0, 0.0, 0.0]


def test_a_run_that_saves_in_the_background_ends_with_all_its_checkpoints(tmp_path):
    run = trainer(tmp_path, Weights(), [0.1, 0.4, 0.3, 0.2, 0.2, 0.1], async_save=True)
    run.fit()
    assert names(run.checkpoints) == ["best", "latest", "step-000002", "step-000005", "step-000006"]


def test_a_run_that_diverges_keeps_the_checkpoint_that_is_being_written(tmp_path, monkeypatch):
    slow = lambda *told: time.sleep(0.2) or write_file(*told)  # noqa: E731
    monkeypatch.setattr(checkpoint, "write_file", slow)
    flags = {"async_save": True, "save_steps": 2, "eval_steps": 9, "max_nonfinite": 1}
    run = trainer(tmp_path, Steps(skipped=(2,)), [], **flags)
    with pytest.raises(Diverged):
        run.fit()
    assert run.checkpoints.newest().name == "step-000002"


def test_a_best_checkpoint_that_is_damaged_is_not_exported(tmp_path):
    engine = Steps()
    run = trainer(tmp_path, engine, [0.1, 0.4, 0.3, 0.2, 0.2, 0.1])
    run.fit()
    (tmp_path / "checkpoints/step-000002/steps.json").write_text("9")
    with pytest.raises(UserError, match=r"step-000002: the best checkpoint, steps.json is damaged: its SHA-256"):
        run.load_best()
    assert engine.done == 6


def test_the_best_is_known_from_the_state_where_its_pointer_was_not_written(tmp_path):
    trainer(tmp_path, Steps(), [0.1, 0.4, 0.3, 0.2, 0.2, 0.1]).fit()
    (tmp_path / "checkpoints/best").unlink()
    again = trainer(tmp_path, Steps(), [])
    again.resume(again.checkpoints.to_resume("auto"))
    assert again.fit().best_step == 2 and again.checkpoints.named("best").name == "step-000002"


@pytest.mark.parametrize("length", range(1, 9))
def test_tensors_begin_at_a_multiple_of_8_bytes_in_their_file(tmp_path, length):
    """As the format of safetensors asks for, whatever the length of the header."""
    tensors = {"x" * length: torch.arange(3.0), "y": torch.tensor([True])}
    write_file(tmp_path / "a.safetensors", tensors)
    assert int.from_bytes((tmp_path / "a.safetensors").read_bytes()[:8], "little") % 8 == 0
    assert all(torch.equal(load_file(tmp_path / "a.safetensors")[name], value) for name, value in tensors.items())


def test_the_time_that_is_left_is_that_of_the_steps_of_this_process(tmp_path, monkeypatch, capsys):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(runlog, "time", SimpleNamespace(perf_counter=lambda: clock.now, time=time.time))
    log = RunLog(tmp_path, 30, first_step=10)
    clock.now = 150.0
    log.progress(5)
    assert capsys.readouterr().out == ""
    log.progress(0, loss="0.5", lr="1e-3")
    log.close()
    assert capsys.readouterr().out == "step 15/30: loss 0.5, lr 1e-3, 02:30 left\n"


def test_a_number_that_is_not_finite_is_a_text_of_the_curves(tmp_path):
    """JSON has none, and Python's NaN is refused by other readers."""
    log = RunLog(tmp_path, 3)
    log.scalars(1, {"train/loss": math.nan, "train/grad_norm": -math.inf, "train/learning_rate": 0.5})
    log.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    point = json.loads(line, parse_constant=pytest.fail)
    assert (point["train/loss"], point["train/grad_norm"], point["train/learning_rate"]) == ("nan", "-inf", 0.5)


def test_the_peak_of_memory_is_that_of_the_process_in_gibibytes():
    if torch.cuda.is_available():
        pytest.skip("of a GPU it is PyTorch's own")
    told = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(told["VmHWM"].split()[0]) / 2**20  # kB
    assert 0.98 * peak <= peak_memory_gib() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


@pytest.mark.parametrize(("scored", "kept"), [(True, ["1", "1 eval", "2", "2 eval"]), (False, ["1", "1 eval", "2"])])
def test_a_run_that_goes_on_at_a_step_keeps_its_points_up_to_there(tmp_path, scored, kept):
    """The evaluation of that step goes where it is done again; a line that was torn goes anyway."""
    points = [{"step": step, name: 0.5} for step in (1, 2, 3) for name in ("train/loss", "eval/score")]
    lines = [json.dumps(point) for point in points]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, lines[0][:9]]), encoding="utf-8")
    keep_until(tmp_path / "metrics.jsonl", 2, scored)
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [f"{point['step']}" + " eval" * ("eval/score" in point) for point in found] == kept


def test_a_kill_between_an_evaluation_and_its_checkpoint_leaves_one_point(tmp_path, monkeypatch):
    scores = [0.1, 0.4, 0.3, 0.4, 0.2, 0.1]
    run = trainer(tmp_path, Steps(), scores)
    monkeypatch.setattr(run.checkpoints, "amend", lambda state, best: 1 / 0 if state.step == 3 else None)
    with pytest.raises(ZeroDivisionError):
        run.fit()
    again = trainer(tmp_path, Steps(), scores[2:])
    again.resume(again.checkpoints.to_resume("auto"))
    again.fit()
    points = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [point["step"] for point in points if "eval/score" in point] == [1, 2, 3, 4, 5, 6]


def test_a_run_goes_on_in_another_folder_also_where_an_evaluation_is_due(tmp_path):
    run = trainer(tmp_path / "first", Steps(), [0.5] * 6, eval_steps=6)
    run.evaluate = lambda log, step: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run.fit()
    again = trainer(tmp_path / "second", Steps(), [0.7])
    again.resume(run.checkpoints.newest())
    state = again.fit()
    assert (state.step, state.best_scores) == (6, {"score": 0.7})


def separate_disks(folder: str) -> str:
    """Two ranks that each have a folder of their own."""
    checkpoints = Checkpoints(Path(folder) / str(distributed.rank()), 2)
    checkpoints.folder.mkdir(parents=True)
    (checkpoints.folder / "step-000010.incomplete").mkdir()
    with pytest.raises(SaveFailed) as caught:
        checkpoints.save(Ranked(), RunState(step=10), RUN, False)
    return str(caught.value)


class Ranked(Steps):
    """An engine of which each rank writes a file."""

    def snapshot(self) -> dict:
        return {f"rank{distributed.rank()}.json": 1}


def test_ranks_without_a_common_disk_are_told_so(tmp_path):
    for told in run_ranks(separate_disks, str(tmp_path)):
        assert "--output_dir must be on a disk that all machines share" in told


def full_disk(folder: str) -> list[str]:
    """A checkpoint that both ranks write, then one that rank 1 has no room for."""
    checkpoints = Checkpoints(Path(folder), 2)
    save(checkpoints, 10)
    if distributed.rank() == 1:
        checkpoint.write_file = no_room
    with pytest.raises(SaveFailed) as caught:
        save(checkpoints, 20)
    distributed.barrier()
    told = re.sub(r"[\d,]+ MiB were free", "", str(caught.value))  # each rank looks, and others write meanwhile
    return [told, *names(checkpoints), str(content_damage(checkpoints.newest()))]


def no_memory(folder: str) -> str:
    """A checkpoint for which rank 1 has no memory left."""
    if distributed.rank() == 1:
        checkpoint.write_file = exhausted
    with pytest.raises(SaveFailed) as caught:
        save(Checkpoints(Path(folder), 2), 10)
    return str(caught.value)


def exhausted(path: Path, value: object) -> None:
    raise MemoryError("what is left is too little")


def test_whatever_ends_the_writing_on_one_rank_the_others_do_not_wait(tmp_path):
    for told in run_ranks(no_memory, str(tmp_path)):
        assert "step-000010.incomplete: cannot be written (MemoryError: what is left is too little" in told


def no_room(path: Path, value: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_one_rank_without_room_ends_the_save_of_all_and_leaves_the_checkpoint_before(tmp_path):
    first, second = run_ranks(full_disk, str(tmp_path))
    assert first == second and "step-000020.incomplete: cannot be written (OSError: [Errno 28]" in first[0]
    assert first[1:] == ["latest", "step-000010", "None"]


FULL = """
import errno
from kozero.errors import run_main

def main():
    raise OSError({number}, "what the system says", "run/metrics.jsonl")

run_main(main)
"""


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 5), (errno.EDQUOT, 5), (errno.EACCES, 1)])
def test_a_disk_that_is_full_for_any_other_file_is_one_line_too(number, code):
    done = subprocess.run([sys.executable, "-c", FULL.format(number=number)], capture_output=True, text=True)
    assert done.returncode == code
    then = "make room, or see to the disk, and start again, a training run with --resume auto"
    told = f"error: run/metrics.jsonl: {os.strerror(number)}; {then}\n"
    assert (done.stderr == told) == (code == 5)


@pytest.mark.parametrize("free", [11, 12])
def test_room_is_looked_at_before_the_first_checkpoint_too(checkpoints, monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    with nullcontext() if free == 12 else pytest.raises(SaveFailed, match="0 MiB are free and a checkpoint takes"):
        checkpoints.save(Weights(), RunState(step=10), RUN, False)
    assert names(checkpoints) == (["latest", "step-000010"] if free == 12 else [])


class Evil:
    """Makes a file when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("name", ["steps.json", "rng-rank0.json", "optimizer.pt"])
def test_a_pickle_in_a_checkpoint_does_nothing_even_where_its_hash_is_right(checkpoints, tmp_path, name):
    save(checkpoints, 10)
    folder, marker = checkpoints.newest(), tmp_path / "marker"
    evil = pickle.dumps(Evil(marker))
    (folder / name).write_bytes(evil)
    saved = read_sealed(folder / "state.json")
    saved["files"][name] = fingerprint(folder / name)
    write_seal(folder / "state.json", saved)
    assert checkpoints.to_resume("auto") == folder
    with nullcontext() if name == "optimizer.pt" else pytest.raises(UserError, match="damaged"):
        checkpoints.load(folder, Steps(), RUN)
    assert not marker.exists()
    pickle.loads(evil)
    assert marker.exists()  # it would have


def test_a_hash_is_that_of_another_program(tmp_path):
    file = tmp_path / "weights.safetensors"
    told = write_file(file, {"weight": torch.arange(5.0)})
    assert told["sha256"] == subprocess.check_output(["sha256sum", file], text=True).split()[0]
    assert told["bytes"] == file.stat().st_size


@pytest.mark.parametrize("piece", [7, 2**24])
def test_the_library_reads_what_is_written_by_pieces(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(files, "PIECE", piece)
    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]
    tensors = {str(kind): (torch.arange(15).view(3, 5) % 2).to(kind) for kind in kinds}
    tensors |= {"none": torch.zeros(0, 3), "scalar": torch.tensor(3.5), "view": torch.arange(12.0).view(3, 4).T}
    path = tmp_path / "tensors.safetensors"
    told = write_file(path, tensors)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert told == fingerprint(path)
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
