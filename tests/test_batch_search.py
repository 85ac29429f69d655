"""The largest batch that fits: the search on curves that are known, what a system says of memory, ranks that agree, and
that a run which looked for its batch is the run that was given it."""

import json
import math
import re
import shlex
import sys
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from kozero import batch_search, distributed, memory
from kozero.batch_search import MARGIN, Probe, Prober, Room, beyond, largest_micro_batch, search
from kozero.config import BatchSizes
from kozero.engines.base import StepStats
from kozero.errors import UserError
from kozero.memory import ProcessMemory, cgroup_free, rank_memory
from pretrain import run as pretraining
from pretrain.data import full_rows, make_rows, open_shards
from tests.helpers import ROOT
from tests.ranks import run_ranks
from tests.scripts import run_script

GIB = 2**30


@dataclass
class Curve:
    """The memory of a step in GiB: what is held, and above it gradients or activations."""

    held: float
    once: float
    row: float
    gradients: float = 0.0

    def forward(self, rows: int) -> float:
        return self.held + self.once + self.row * rows

    def peak(self, rows: int) -> float:
        return max(self.held + self.gradients, self.forward(rows))


def searched(curve: Curve, limit: float, most: int = 10**6) -> tuple[int, list[int]]:
    """The rows that are found, and those that were tried on the way."""
    tried = []

    def measure(rows: int) -> Probe:
        tried.append(rows)
        return Probe(rows, curve.peak(rows) * GIB, (curve.forward(rows) - curve.held) * GIB)

    found = search(measure, Room(curve.held * GIB, limit * GIB), most)
    assert len(set(tried)) == len(tried) and curve.peak(found) <= limit * (1 - MARGIN)
    return found, tried


# The search ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [3.0, 3.6, 11.0, 80.0, 900.0])
@pytest.mark.parametrize(
    "curve",
    [
        Curve(2, 0, 0.09), Curve(2, 0.3, 0.09), Curve(0.5, 0, 0.4), Curve(2, 0.02, 0.03, gradients=0.45),
        Curve(1.6, 0, 0.08, gradients=0.8),
    ],
)  # fmt: skip
def test_almost_all_that_fits_is_found_and_no_probe_is_over_the_limit(curve, limit):
    found, tried = searched(curve, limit)
    assert tried[0] == 1 and curve.peak(max(tried)) <= limit
    assert curve.peak(math.ceil(found * batch_search.ENOUGH) + 1) > limit * (1 - MARGIN)


def test_gradients_that_hide_what_a_row_takes_lead_to_no_probe_over_the_limit():
    """The peak of one and of eight rows is the same; a line through them would allow any number."""
    curve = Curve(1, 0, 0.1, gradients=1.0)
    found, tried = searched(curve, 4)
    assert 25 <= found <= 26 and curve.peak(max(tried)) <= 4


def test_a_large_model_beside_which_few_rows_find_room_is_no_reason_to_stay_at_one():
    """1.2 billion parameters in 32 bit on 24 GiB: a second row might take as much as the gradients, as far as the peak
    of one row tells."""
    found, _ = searched(Curve(14.4, 0, 0.2, gradients=4.8), 24)
    assert 34 <= found <= 36


def test_a_jump_above_the_line_lowers_the_batch(capsys):
    class Jump(Curve):
        def peak(self, rows):
            return super().peak(rows) + (4 if rows > 60 else 0)

    found, tried = searched(Jump(1, 0, 0.1), 10)
    assert found <= 60 < max(tried)
    assert "too much" in capsys.readouterr().out


def test_running_out_of_memory_lowers_the_batch():
    class Wall(Curve):
        def peak(self, rows):
            return super().peak(rows) if rows <= 40 else math.inf

    found, tried = searched(Wall(1, 0, 0.1), 10)
    assert 35 <= found <= 40 < max(tried)


def test_memory_that_grows_faster_than_the_rows_is_not_overrun():
    class Square(Curve):
        def forward(self, rows):
            return super().forward(rows) + 0.001 * rows**2

    assert 85 <= searched(Square(1, 0, 0.1), 20)[0] <= 89  # 89 rows take 17.8 GiB, 90 are over 18


def test_no_more_rows_than_there_are():
    assert searched(Curve(1, 0, 0.001), 100, most=7)[0] == 7
    assert searched(Curve(1, 0, 0.001), 100, most=1)[0] == 1


def test_noise_alone_does_not_lead_far_at_once():
    """Where nothing seems to grow, the next batch is a few times as large and not a million."""
    _, tried = searched(Curve(1, 0, 0), 100, most=10**4)
    assert all(b <= batch_search.GROWTH * a for a, b in pairwise(tried))


def test_one_row_that_does_not_fit_is_named_with_its_size():
    with pytest.raises(UserError) as caught:
        searched(Curve(9, 0, 0.5), 10)
    message = str(caught.value)
    assert "one row on a rank takes 9.5 GiB, 9 GiB of 10 GiB" in message and "\n" not in message


# Ranks ---------------------------------------------------------------------------------------------------------------


class Steps(nn.Module):
    """An engine that notes the rows of its steps, and is the memory that they take: 1 GiB and 0.1 a row, or what is
    held and the gradients."""

    def __init__(
        self,
        limit: float,
        fails_above: int = 10**9,
        skipped: int = 0,
        row: float = 0.1,
        held: float = 1.0,
        gradients: float = 0.0,
    ) -> None:
        super().__init__()
        self.bytes_of_limit, self.fails_above, self.skipped = limit * GIB, fails_above, skipped
        self.rows, self.closed, self.row, self.held, self.highest = [], 0, row * GIB, int(held * GIB), 0.0
        self.gradients = gradients * GIB

    @property
    def module(self) -> nn.Module:
        return self

    def forward(self, rows: int) -> None:
        self.highest = max(self.highest, self.held + self.row * rows)

    def train_step(self, batches, lr) -> StepStats:
        assert lr == 0.0
        if batches > self.fails_above:
            raise torch.cuda.OutOfMemoryError
        self.rows.append(batches)
        self(batches)
        self.highest = max(self.highest, self.held + self.gradients)
        return StepStats((1.0,), 1.0, len(self.rows) > self.skipped, 1.0)

    def close(self) -> None:
        self.closed += 1

    def reset(self) -> float:
        self.highest = self.held
        return self.held

    def peak(self) -> float:
        return self.highest

    def limit(self) -> float:
        return self.bytes_of_limit


def found_by(steps: Steps) -> int:
    return largest_micro_batch(Prober(lambda: steps, lambda rows: rows, steps), 1000)


UNLIKE = {  # of two ranks: what is told of each, and the rows that fit both
    "limits": ({"limit": 11}, {"limit": 5}, range(33, 36)),  # 35 rows take 4.5 GiB, 90% of 5
    "rows": ({"limit": 5}, {"limit": 5, "row": 0.2}, range(16, 18)),  # 17 rows take 4.4 GiB
    "rows behind gradients": (
        {"limit": 5, "gradients": 1.5},
        {"limit": 5, "gradients": 1.5, "row": 0.2},
        range(16, 18),
    ),
    "what is held": ({"limit": 5, "held": 3.0}, {"limit": 5}, range(14, 16)),
}


def on_rank() -> dict[str, tuple[int, list[int]]]:
    """What two ranks that are not alike take, and the rows that they tried."""
    found = {}
    for name, told in UNLIKE.items():
        steps = Steps(**told[distributed.rank()])
        found[name] = found_by(steps), steps.rows
    return found


def test_two_ranks_take_the_same_size_which_fits_both():
    here, there = run_ranks(on_rank)
    assert here == there
    for name, (*_, fitting) in UNLIKE.items():
        assert here[name][0] in fitting


def test_updates_that_fp16_skips_are_not_what_is_measured(one_rank):
    """Optimizer states are there only after an update that was applied."""
    steps = Steps(limit=5, skipped=6)
    found_by(steps)
    assert steps.rows[:9] == [1] * 9 and steps.rows[9] > 1


def test_after_running_out_of_memory_a_new_engine_goes_on(one_rank):
    steps = Steps(limit=9, fails_above=50)
    assert 45 <= found_by(steps) <= 50 and steps.closed > 1


def test_a_rank_of_several_that_runs_out_of_memory_ends_the_run(one_rank, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(
        UserError, match=r"^--train_batch_size 0: out of GPU memory in a probe of \d+ rows; give a smaller number"
    ):
        found_by(Steps(limit=9, fails_above=50))


# What a system says --------------------------------------------------------------------------------------------------


def group(folder, version: int, limit, used: int, files: int) -> None:
    """A cgroup as the kernel shows it."""
    folder.mkdir(parents=True, exist_ok=True)
    limit_file, used_file, names = memory.V2 if version == 2 else memory.V1
    (folder / limit_file).write_text(f"{limit}\n")
    (folder / used_file).write_text(f"{used}\n")
    (folder / "memory.stat").write_text("".join(f"{name} {files // 2}\n" for name in names) + "anon 5\n")


def test_the_tightest_limit_of_cgroups_v2_counts_and_pages_of_files_do_not(tmp_path):
    group(tmp_path / "a/b", 2, "max", 50, 10)
    group(tmp_path / "a", 2, 1000, 300, 100)
    assert cgroup_free("0::/a/b\n", tmp_path) == 800
    group(tmp_path / "a/b", 2, 400, 50, 10)
    assert cgroup_free("0::/a/b\n", tmp_path) == 360


def test_the_limit_of_cgroups_v1_counts(tmp_path):
    group(tmp_path / "memory/docker/x", 1, 2**63 - 4096, 50, 10)
    group(tmp_path / "memory/docker", 1, 2000, 500, 200)
    assert cgroup_free("9:cpu,cpuacct:/y\n4:memory:/docker/x\n0::/\n", tmp_path) == 1700


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_that_sees_its_own_group_at_the_top_is_limited_by_it(tmp_path, version):
    group(tmp_path if version == 2 else tmp_path / "memory", version, 700, 100, 0)
    line = "0::/../outside\n" if version == 2 else "4:memory:/docker/outside\n"
    assert cgroup_free(line, tmp_path) == 600


def test_without_a_limit_there_is_none(tmp_path):
    assert cgroup_free("0::/a\n", tmp_path) == math.inf
    group(tmp_path / "a", 2, "max", 50, 10)
    assert cgroup_free("0::/a\n", tmp_path) == math.inf and cgroup_free("", tmp_path) == math.inf


needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")


@needs_proc
def test_the_peak_of_a_process_is_that_since_the_last_reset():
    rank, size = ProcessMemory(), 256 * 2**20
    before = rank.reset()
    block = torch.ones(size // 4)
    del block
    grown = rank.peak() - before
    assert size * 0.9 < grown
    assert rank.peak() - rank.reset() > size * 0.9 > rank.peak() - before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_peak_of_a_gpu_is_that_since_the_last_reset():
    rank, size = rank_memory(), 256 * 2**20
    before = rank.reset()
    block = torch.ones(size // 4, device="cuda")
    del block
    assert rank.peak() - before >= size and rank.limit() > rank.peak()
    rank.reset()
    assert rank.peak() - before < size


@needs_proc
def test_the_free_memory_of_a_machine_is_shared_by_its_ranks(monkeypatch):
    rank = ProcessMemory()
    monkeypatch.setattr(memory, "cgroup_free", lambda *_: 800.0)
    held = rank.reset()
    monkeypatch.setattr(rank, "now", lambda _: held)
    monkeypatch.setattr(distributed, "local_world_size", lambda: 4)
    assert rank.limit() == held + 200


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU tells its memory")
def test_a_system_that_tells_no_peak_is_refused_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "PROC", tmp_path)
    with pytest.raises(UserError, match=r"^--train_batch_size 0: this system does not tell .*; give a number of rows$"):
        rank_memory()


# Runs ----------------------------------------------------------------------------------------------------------------

SIZES = (
    "--num_steps", 4, "--warmup_steps", 1, "--scheduler_num_steps", 8, "--max_seq_length", 64, "--logging_steps", 1,
    "--eval_steps", 2, "--max_eval_samples", 8, "--learning_rate", 0.003, "--gradient_accumulation_steps", 2,
)  # fmt: skip
ENTRIES = {
    "plain": ("train", ()),
    "oss": ("train_zero_one", ()),
    "fsdp": ("train_zero_two", ("--zero3", "--auto_wrap", "--task", "mlm_ict")),
}


def pretrain(monkeypatch, folder, *flags, entry="train"):
    """A run of the tiny transformer that looks for at most 5 rows."""
    config = ROOT / "models/transformer_tiny_config.json"
    told = ["--model_name", "hong", "--config_file", config, *SIZES, "--output_dir", folder]
    told += ["--cache_dir", folder.parent / "cache", *flags]
    monkeypatch.setattr(batch_search, "MOST_ROWS", 5)
    monkeypatch.setattr(sys, "argv", ["prog", *map(str, told)])
    pretraining.main(entry)
    return folder / "hong"


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


@needs_proc
@pytest.mark.parametrize("name", ENTRIES)
def test_a_run_that_found_its_batch_is_the_run_that_was_given_it(one_rank, monkeypatch, tmp_path, capsys, name):
    entry, flags = ENTRIES[name]
    found = pretrain(monkeypatch, tmp_path / "found", *flags, entry=entry)
    assert "batch: taking 5 rows a rank, more are not tried" in capsys.readouterr().out
    told = pretrain(monkeypatch, tmp_path / "told", "--train_batch_size", 5, *flags, entry=entry)
    assert "batch:" not in capsys.readouterr().out
    assert losses(found) == losses(told) and len(losses(found)) == 4
    assert json.loads((found / "run.json").read_text())["arguments"]["per_device_train_batch_size"] == 5


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_two_ranks_under_deepspeed_find_a_batch_and_train_as_if_given_it(tmp_path, stage):
    """Two engines in one process, and the found size in the JSON of the second. 30 rows keep the batch small."""
    (tmp_path / "corpus.txt").write_text("\n\n".join(["나무가 자란다.\n숲이 푸르다."] * 31))

    def run(name: str, size: int) -> str:
        told = ["--model_name", "hong", "--config_file", "models/transformer_tiny_config.json", "--nproc", 2, *SIZES]
        told += ["--corpus_path", tmp_path / "corpus.txt", "--deepspeed_config", f"ds_configs/{stage}.json"]
        told += ["--output_dir", tmp_path / name, "--cache_dir", tmp_path / "cache", "--train_batch_size", size]
        done = run_script(shlex.join(["pretrain/train.py", *map(str, told)]))
        assert done.returncode == 0, done.stderr
        return done.stdout

    found = int(re.search(r"taking (\d+) row", run("found", 0))[1])
    run("told", found)
    ours, theirs = losses(tmp_path / "found/hong"), losses(tmp_path / "told/hong")
    assert ours == theirs and len(ours) == 4


@needs_proc
def test_a_resumed_run_keeps_its_batch_and_does_not_look_again(one_rank, monkeypatch, tmp_path, capsys):
    whole = pretrain(monkeypatch, tmp_path / "whole", "--train_batch_size", 5)
    pretrain(monkeypatch, tmp_path / "parts", "--num_steps", 2, "--resume", "auto")
    assert "batch: taking 5 rows" in capsys.readouterr().out
    parts = pretrain(monkeypatch, tmp_path / "parts", "--resume", "auto")
    assert "batch:" not in capsys.readouterr().out
    assert losses(parts) == losses(whole)


def test_the_batch_is_looked_for_unless_it_is_given(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prog", "--model_name", "hong"])
    assert pretraining.arguments("train")[0].per_device_train_batch_size == 0
    monkeypatch.setattr(sys, "argv", ["prog", "--model_name", "hong", "--train_batch_size", "-1"])
    with pytest.raises(UserError, match="--per_device_train_batch_size -1: must be 0 or more"):
        pretraining.arguments("train")


def test_a_deepspeed_json_that_names_a_batch_is_refused(one_rank, monkeypatch, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1}}')
    with pytest.raises(UserError) as caught:
        pretrain(monkeypatch, tmp_path / "runs", "--deepspeed_config", path)
    assert "train_micro_batch_size_per_gpu 4, --per_device_train_batch_size 0" in str(caught.value)


@pytest.mark.parametrize("flags", ["mlm", "mlm_sop", "mlm_ict", "clm", "mlm --whole_word_mask"])
def test_no_batch_of_a_corpus_is_larger_than_what_is_measured(one_rank, monkeypatch, tmp_path, flags):
    told = f"prog --model_name a --cache_dir {tmp_path} --max_seq_length 64 --train_batch_size 4 --task {flags}"
    model = "causal_lm" if flags == "clm" else "transformer"
    monkeypatch.setattr(sys, "argv", [*told.split(), "--model", model])
    training, corpus, _ = pretraining.arguments("train")
    tokenizer, sizes = pretraining.load_tokenizer(corpus), BatchSizes(4, 1, 1)
    shards = open_shards(corpus, tokenizer)
    real = make_rows(shards, corpus, training, sizes, tokenizer, router=False).training
    full = full_rows(shards, corpus, tokenizer, router=False)
    (largest,) = full.step(0, sizes, 0)
    if flags == "clm":  # rows of several texts, which take a mask of (T, T)
        assert ((largest.inputs["position_ids"] == 0).sum(1) == 2).all()
    assert len(full) == len(real) and len(largest.num_targets) == len(corpus.task.split("_"))
    for consumed in range(0, len(real), sizes.global_batch):
        (batch,) = real.step(consumed, sizes, 0)
        assert set(batch.inputs) == set(largest.inputs)
        for name, tensor in batch.inputs.items():
            assert np.all(np.array(tensor.shape) <= np.array(largest.inputs[name].shape)), name


@pytest.mark.parametrize(
    "probe, rows",
    [
        (Probe(2, 40.0, 1000.0), 4),  # all that is held grows with the rows: 2 * 95 / 40 = 4.75
        (Probe(2, 80.0, 4.0), 5),  # twice what a forward pass adds comes on top: 2 + 2 * 15 / 8 = 5.75
    ],
)
def test_the_second_probe_takes_at_most_half_of_the_margin_where_one_measurement_is_the_whole_truth(probe, rows):
    """By hand: of 100 bytes 90 are usable, so 95 are the utmost. Nothing is held between two steps."""
    assert beyond([probe], Room(held=0.0, limit=100.0)) == rows
