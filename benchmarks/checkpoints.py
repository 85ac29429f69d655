"""What a checkpoint costs the training: this project's, written at once and in the background, beside `torch.save` of
the same state and DeepSpeed's save_checkpoint (ZeRO-1), each on one rank with the same weights, batch and rate.

    python benchmarks/checkpoints.py --config_file models/kogpt2_config.json --output_file checkpoints.json

A block is some steps without a checkpoint, then as many with one after the first of them. "Call" is the call that
saves; a peer's leaves its files in the memory of the system, and what brings them to the disk (fsync of each file and
folder) follows before the next step. "On the disk" is the time from the beginning of the call to the end of that;
training waits for it except in the background. "Lost" is what the second half of a block takes longer than the first.
The disk is that of temporary files (TMPDIR); the limit is the rate at which as many bytes are written and brought to it
with nothing else to do, in turn with the sides. Before anything is measured every side loads what it has saved into an
engine of other weights: weights, moments and counts must be equal bit by bit. The losses of all sides must agree.
"""

import gc
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from contest import Block, Contender, Reported, compete, paired, report, table, timed

from kozero import distributed
from kozero.checkpoint import Checkpoints, RunState
from kozero.config import BatchSizes, TrainingArguments, arg, at_least, parse_arguments
from kozero.data.batches import Batch, Text, collate
from kozero.engines import build_engine, prepare_engine
from kozero.engines.base import Engine
from kozero.errors import require, run_main
from kozero.memory import trim_heap
from kozero.plan import ModelShape
from models.causal_lm import CausalLM, build
from models.language_model import read_config, set_dropout
from runs import ROOT

RATE = 1e-5
TOLERANCE = 1e-3  # of the sides' losses, relative
ALONE = "bytes alone"
TIMES = ("call", "disk", "without", "lost")  # of a block, in seconds


@dataclass
class BenchmarkArguments(Reported):
    """What to run."""

    config_file: str = arg("models/kogpt2_config.json", "model JSON")
    steps: int = arg(6, "optimizer updates of half a block")
    tokens: int = arg(64, "tokens of a step")
    rounds: int = arg(3, "blocks of each side that count; one more before them warms up")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "steps", "tokens", "rounds")


@dataclass
class Way:
    """How an engine is saved to a folder.

    save: the call, which begins to fill the folder; settle: waits until all of it is on the disk; load: reads it into
    another engine; waits: training stands still until it is settled.
    """

    save: Callable[[], Any]
    settle: Callable[[], Any]
    load: Callable[[Engine], Any]
    waits: bool = True


def main() -> None:
    """Measure, check, print a Markdown table."""
    (arguments,) = parse_arguments(BenchmarkArguments, prog="benchmarks/checkpoints.py", description=__doc__)
    positions = read_config(Path(arguments.config_file)).n_positions
    require(arguments.tokens <= positions, f"--tokens {arguments.tokens}: the model has {positions} positions")
    with tempfile.TemporaryDirectory(prefix="kozero-checkpoints-") as folder:
        places = {name: Path(folder) / str(number) for number, name in enumerate(SIDES)}
        sides = [Contender(name, measured, (name, arguments, place)) for name, place in places.items()]
        alone = Contender(ALONE, bytes_alone, (arguments, Path(folder) / "bytes"))
        blocks = compete([*sides, alone], arguments.rounds)
    limits = [block["mb_per_s"] for block in blocks.pop(ALONE)[1:]]
    rows = [figures(name, found) for name, found in blocks.items()]
    for row in rows:
        row["share"] = paired(row["speeds"], limits)
    print(f"bytes alone: {median(limits):.0f} MB/s ({min(limits):.0f} to {max(limits):.0f})")
    print(f"{arguments.steps} steps of {arguments.tokens} tokens, medians of {arguments.rounds} blocks (least to most)")
    print(table(
        ("checkpoint", "GiB", "MB/s", "of the limit", "call, s", "on the disk, s", "steps without, s", "lost, s"),
        [(row["name"], f"{row['gib']:.2f}", f"{row['mb_per_s']:.0f}", f"{row['share']:.0%}",
          *("{:.2f} ({:.2f} to {:.2f})".format(*row[name]) for name in TIMES)) for row in rows],
    ))  # fmt: skip
    report(arguments, rows, disk_mb_per_s=limits)
    for row in rows:
        require(not row["unequal"], f"{row['name']}: loaded with other numbers: {', '.join(row['unequal'][:3])}")
        near = np.allclose(row["losses"], rows[0]["losses"], rtol=TOLERANCE)
        require(near, f"{row['name']}: losses {row['losses']}, the first side's are {rows[0]['losses']}")


def figures(name: str, blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """A side's row: (median, least, most) of each time in seconds; its first block warmed up."""
    found = {key: [block[key] for block in blocks[1:]] for key in TIMES}
    speeds = [block["bytes"] / 1e6 / block["disk"] for block in blocks[1:]]
    return {
        "name": name, "gib": blocks[-1]["bytes"] / 2**30,
        **{key: (median(times), min(times), max(times)) for key, times in found.items()},
        "mb_per_s": median(speeds), "speeds": speeds,
        "unequal": blocks[0]["unequal"], "losses": blocks[0]["losses"],
    }  # fmt: skip


def measured(name: str, arguments: BenchmarkArguments, folder: Path) -> Block:
    """A side in its process: what it saves is looked at, then its blocks."""
    distributed.setup()
    config = read_config(Path(arguments.config_file))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, arguments.tokens + 1)
    batch = collate([[Text(ids[:-1], ids[1:], 0)]])
    ds_config, way_of = SIDES[name]
    engine = engine_of(arguments, ds_config, seed=0)
    engine.train_step([batch], RATE)  # the optimizer's states are there then
    way = way_of(engine, folder)
    way.save()
    way.settle()
    unequal = unequal_after_loading(engine, way, engine_of(arguments, ds_config, seed=1))
    shutil.rmtree(folder)
    gc.collect()
    trim_heap()  # of what the other engine held

    def block() -> dict[str, Any]:
        without, _ = timed_steps(engine, batch, arguments.steps)
        found = saving_steps(engine, way, batch, arguments.steps)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        shutil.rmtree(folder)
        lost = found.pop("seconds") - without
        return found | {"without": without, "lost": lost, "bytes": size, "unequal": unequal}

    return block


def bytes_alone(arguments: BenchmarkArguments, path: Path) -> Block:
    """As many bytes as weights and moments have, by plain writes of 16 MiB of random ones, then fsync."""
    piece = os.urandom(2**24)
    pieces = -(-12 * ModelShape.of(read_config(Path(arguments.config_file))).parameters // len(piece))

    def write() -> None:
        with path.open("wb", buffering=0) as file:
            for _ in range(pieces):
                file.write(piece)
            os.fsync(file.fileno())

    def block() -> dict[str, Any]:
        seconds, _ = timed(write)
        path.unlink()
        return {"mb_per_s": pieces * len(piece) / 1e6 / seconds}

    return block


def timed_steps(engine: Engine, batch: Batch, number: int) -> tuple[float, list[float]]:
    """Seconds of some steps, and their losses."""
    begin = time.perf_counter()
    losses = [engine.train_step([batch], RATE).loss for _ in range(number)]
    return time.perf_counter() - begin, losses


def saving_steps(engine: Engine, way: Way, batch: Batch, number: int) -> dict[str, Any]:
    """The same with a checkpoint after the first, and to the end of its writing."""

    def settled() -> float:
        way.settle()
        return time.perf_counter()

    with ThreadPoolExecutor(1) as watcher:
        begin = time.perf_counter()
        first = engine.train_step([batch], RATE).loss
        saving = time.perf_counter()
        way.save()
        called = time.perf_counter()
        writing = watcher.submit(settled)
        if way.waits:
            writing.result()
        _, losses = timed_steps(engine, batch, number - 1)
        disk = writing.result()
        end = time.perf_counter()
    return {"call": called - saving, "disk": disk - saving, "seconds": end - begin, "losses": [first, *losses]}


def unequal_after_loading(engine: Engine, way: Way, twin: Engine) -> list[str]:
    """Names of the tensors that are not the same in another engine, which loads what this one has saved."""
    way.load(twin)
    (own,), (loaded,) = ([v for k, v in e.snapshot().items() if k.endswith(".safetensors")] for e in (engine, twin))
    return sorted(own.keys() ^ loaded.keys()) or [name for name in own if not torch.equal(own[name], loaded[name])]


def engine_of(arguments: BenchmarkArguments, ds_config: str | None, seed: int) -> Engine:
    """Random weights under a DeepSpeed JSON, or under PyTorch alone."""
    training = TrainingArguments(deepspeed_config=ds_config, per_device_train_batch_size=1)
    lm = build(read_config(Path(arguments.config_file)), seed)
    set_dropout(lm, 0.0)
    return build_engine(CausalLM(lm, []), training, prepare_engine(training, BatchSizes(1, 1, 1)))


def ours(in_background: bool, engine: Engine, folder: Path) -> Way:
    """This project's checkpoint."""
    checkpoints = Checkpoints(folder, 1, in_background)
    return Way(
        save=lambda: checkpoints.save(engine, RunState(step=1), {}, best=False),
        settle=checkpoints.finish,
        load=lambda twin: checkpoints.load(checkpoints.newest(), twin, {}),
        waits=not in_background,
    )


def torch_save(engine: Engine, folder: Path) -> Way:
    """What a loop of one's own does."""
    path = folder / "checkpoint.pt"

    def save() -> None:
        folder.mkdir()
        torch.save({"model": engine.module.state_dict(), "optimizer": engine.optimizer.state_dict()}, path)

    def load(twin: Engine) -> None:
        saved = torch.load(path)
        twin.module.load_state_dict(saved["model"])
        twin.optimizer.load_state_dict(saved["optimizer"])

    return Way(save, lambda: to_disk(folder), load)


def deepspeed(engine: Engine, folder: Path) -> Way:
    """DeepSpeed's own."""
    return Way(
        save=lambda: engine.engine.save_checkpoint(str(folder)),
        settle=lambda: to_disk(folder),
        load=lambda twin: twin.engine.load_checkpoint(str(folder)),
    )


def to_disk(folder: Path) -> None:
    """Wait until a folder and all that is in it are on the disk."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


SIDES = {  # name: (DeepSpeed JSON, way to save)
    "kozero, at once": (None, partial(ours, False)),
    "kozero, in the background (--async_save)": (None, partial(ours, True)),
    "torch.save, then fsync": (None, torch_save),
    "DeepSpeed save_checkpoint, then fsync": (str(ROOT / "ds_configs/zero1.json"), deepspeed),
}

if __name__ == "__main__":
    run_main(main)
