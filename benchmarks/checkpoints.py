"""What a checkpoint costs the training, written at once and in the background.

    python benchmarks/checkpoints.py --config_file models/kogpt2_config.json --output_file checkpoints.json

One rank without sharding, random tokens. A round is a block of steps without a checkpoint, one with a checkpoint after
its first step, and one with it in the background; rounds follow each other, figures are medians over rounds. "Stall" is
the call that saves, "lost" what the block takes longer than that without, the end of the writing included.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from contest import Reported, report, table

from kozero import distributed
from kozero.checkpoint import Checkpoints, RunState, file_sizes
from kozero.config import TrainingArguments, arg, at_least, parse_arguments
from kozero.data.batches import Batch, Text, collate
from kozero.engines import EngineSettings, build_engine
from kozero.engines.base import Engine
from kozero.errors import run_main
from models.causal_lm import CausalLM
from models.language_model import random_weights, read_config


@dataclass
class BenchmarkArguments(Reported):
    """What to run."""

    config_file: str = arg("models/kogpt2_config.json", "model JSON")
    rounds: int = arg(3, "times that each way is measured")
    steps: int = arg(12, "optimizer updates of a block")
    tokens: int = arg(64, "tokens of a step")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "rounds", "steps", "tokens")


def main() -> None:
    """Measure, print a Markdown table."""
    (arguments,) = parse_arguments(BenchmarkArguments, prog="benchmarks/checkpoints.py", description=__doc__)
    distributed.setup()
    config = read_config(Path(arguments.config_file))
    module = CausalLM(random_weights(config, 0, arguments.config_file), [], None)
    engine = build_engine(module, TrainingArguments(), EngineSettings())
    ids = np.random.default_rng(0).integers(0, config.vocab_size, arguments.tokens + 1)
    batch = collate([[Text(ids[:-1], ids[1:], 0)]])
    engine.train_step([batch], 1e-5)  # the optimizer's states are there then
    with tempfile.TemporaryDirectory(prefix="kozero-checkpoints-") as folder:
        ways = {None: None} | {
            mode: Checkpoints(Path(folder) / name, 1, mode) for mode, name in ((False, "once"), (True, "background"))
        }
        found = {mode: [] for mode in ways}
        for _ in range(arguments.rounds):
            for mode, checkpoints in ways.items():
                found[mode].append(block(engine, batch, arguments.steps, checkpoints))
        size = sum(file_sizes(ways[False].newest()).values())
    rows = summary(found)
    print(
        f"checkpoint of {size / 2**30:.2f} GiB, {arguments.steps} steps a block, medians of {arguments.rounds} rounds"
    )
    columns = ("block", "stall", "lost")
    cells = [(row["name"], *(f"{row[name]:.2f}" for name in columns)) for row in rows]
    print(table(("", *(f"{name}, s" for name in columns)), cells))
    report(arguments, rows, bytes=size)


def block(engine: Engine, batch: Batch, steps: int, checkpoints: Checkpoints | None) -> tuple[float, float]:
    """Seconds of some steps with a checkpoint after the first, and of the call that saves."""
    began, stall = time.perf_counter(), 0.0
    for step in range(steps):
        engine.train_step([batch], 1e-5)
        if step == 0 and checkpoints:
            saving = time.perf_counter()
            checkpoints.save(engine, RunState(step=1), {}, best=False)
            stall = time.perf_counter() - saving
    if checkpoints:
        checkpoints.finish()
    return time.perf_counter() - began, stall


def summary(found: dict[bool | None, list[tuple[float, float]]]) -> list[dict]:
    """A row a way."""
    names = {None: "no checkpoint", False: "written at once", True: "in the background (--async_save)"}
    blocks = {mode: statistics.median(seconds for seconds, _ in times) for mode, times in found.items()}
    return [
        {
            "name": names[mode],
            "block": blocks[mode],
            "stall": statistics.median(stall for _, stall in times),
            "lost": blocks[mode] - blocks[None],
        }
        for mode, times in found.items()
    ]


if __name__ == "__main__":
    run_main(main)
