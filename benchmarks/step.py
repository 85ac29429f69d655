"""The training step of this project beside what the device can do: real tokens per second, milliseconds of an update,
arithmetic by PaLM's count as a share of the rate of a large matrix product, peak memory beside the plan's.

    python benchmarks/step.py --config_file models/kogpt2_config.json --bf16 --micro_batch 16,32,64
    python benchmarks/step.py --config_file models/ko_gpt_trinity_config.json --bf16 --freeze wte,wpe,h.0-11 --profile

Rows are made, dealt out and trained on as a run does it, with random tokens and weights, on one process. Speed is real
tokens (no padding) in the time of a block of updates, batches included; the first block warms up. The limit is measured
here, by a product of matrices that have nothing to wait for; MFU is the share of what the maker of a GPU says. On a CPU
the peak is what the process holds above what it held before the model was there.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from contest import Reported, report, table
from limit import flops_a_token, product_rate, specified, wait
from operators import profiled

from finetune.planned import PlannedModel
from finetune.ways import way
from kozero import distributed
from kozero.config import BatchSizes, TrainingArguments, arg, at_least, parse_arguments
from kozero.data.ahead import Ahead
from kozero.data.batches import TrainingRows
from kozero.data.store import TokenStore
from kozero.engines import build_engine, prepare_engine
from kozero.engines.base import Engine, StepStats
from kozero.engines.units import compile_layers
from kozero.errors import require, run_main
from kozero.freeze import apply_plan, compile_plan
from kozero.memory import rank_memory
from kozero.pause import Pauses
from models.causal_lm import CausalLM, build
from models.language_model import DROPOUTS, checkpoint_activations, read_config

GIB = 2**30
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PROFILED = 3  # updates
LEAST_ROWS = 512  # of packed texts: of few rows the last one, half empty, would count
HEADER = (
    "micro batch", "real tokens/s", "ms of an update", "least to most", "of them batches", "TFLOP/s", "of the limit",
    "MFU", "tokens/s at the limit", "times to gain", "peak GiB", "planned GiB",
)  # fmt: skip


@dataclass
class StepArguments(Reported):
    """What to run."""

    config_file: str = arg("models/kogpt2_config.json", "model JSON")
    length: int = arg(0, "tokens of a row; 0: 1,024 on a GPU, 128 on a CPU")
    micro_batch: str = arg("8", "rows of one forward pass; several numbers with commas: a row of the table for each")
    accumulation: int = arg(1, "forward passes of an update")
    packed: float = arg(0.0, "mean tokens of the texts that share a row, of geometric lengths; 0: one text fills it")
    targets: float = arg(1.0, "share of a text's tokens that something is predicted at, its last ones")
    freeze: str | None = arg(None, "as in finetune/train.py")
    dropout: float = arg(0.0, "all three dropout rates of the model")
    bf16: bool = arg(False, "compute in bfloat16")
    fp16: bool = arg(False, "compute in float16 with a dynamic loss scale")
    gradient_checkpointing: bool = arg(False, "recompute activations in the backward pass")
    deepspeed_config: str | None = arg(None, "DeepSpeed JSON; without it: plain PyTorch")
    updates: int = arg(10, "updates of a block")
    rounds: int = arg(5, "blocks that count; one more before them warms up")
    torch_compile: bool = arg(False, "compile the layers, however few updates; see finetune/train.py")
    profile: bool = arg(False, "tell what operators take the time of an update")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "accumulation", "updates", "rounds")
        at_least(0, self, "length", "packed")
        numbers = self.micro_batch.split(",")
        right = all(number.strip().isdecimal() and 0 < int(number) < 2**20 for number in numbers)
        require(right, f"--micro_batch {self.micro_batch}: must be whole numbers from 1 on with commas between them")
        require(0 < self.targets <= 1, f"--targets {self.targets}: must be above 0 and at most 1")
        require(0 <= self.dropout < 1, f"--dropout {self.dropout}: must be in [0, 1)")
        require(self.packed == 0 or self.packed >= 2, f"--packed {self.packed:g}: must be 0, or 2 tokens or more")

    @property
    def micro_batches(self) -> list[int]:
        """Those to measure."""
        return [int(number) for number in self.micro_batch.split(",")]

    def training(self, micro: int) -> TrainingArguments:
        """The run as the command line of finetune/train.py would say it."""
        return TrainingArguments(
            deepspeed_config=self.deepspeed_config, per_device_train_batch_size=micro,
            gradient_accumulation_steps=self.accumulation, bf16=self.bf16, fp16=self.fp16, learning_rate=1e-4,
            gradient_checkpointing=self.gradient_checkpointing, torch_compile=self.torch_compile,
        )  # fmt: skip


def main() -> None:
    """Measure one micro batch after the other, print a Markdown table."""
    (arguments,) = parse_arguments(StepArguments, prog="benchmarks/step.py", description=__doc__)
    config = read_config(Path(arguments.config_file))
    config.update(dict.fromkeys(DROPOUTS, arguments.dropout))
    arguments.length = arguments.length or min(1024 if torch.cuda.is_available() else 128, config.n_positions)
    require(2 <= arguments.length <= config.n_positions,
            f"--length {arguments.length}: must be from 2 to the model's {config.n_positions} positions")  # fmt: skip
    compile_plan(arguments.freeze, config.n_layer, has_pause=False)
    distributed.setup()
    require(distributed.world_size() == 1, "benchmarks/step.py measures one process; start it without a launcher")
    for micro in arguments.micro_batches:
        prepare_engine(arguments.training(micro), BatchSizes(micro, arguments.accumulation, 1))
    planned = planned_model(arguments, config)
    limit = product_rate(DTYPES[planned.dtype])
    print(f"{device_name()}, {planned.dtype}: matrix products at {limit / 1e12:,.2f} TFLOP/s; "
          f"{planned.counts['total']:,} parameters, {planned.counts['trainable']:,} train", flush=True)  # fmt: skip
    rows = [measured(arguments, planned, micro, limit) for micro in arguments.micro_batches]
    print(table(HEADER, [cells(row) for row in rows]))
    for row in rows:
        if skipped := sum(block["skipped"] for block in row.get("blocks", [])[1:]):
            print(f"micro batch {row['micro_batch']}: {skipped} of the updates that count were skipped (overflows)")
        if "profile" in row:
            print(f"\nmicro batch {row['micro_batch']}:\n\n{profile_table(row['profile'])}")
    report(arguments, rows)


def device_name() -> str:
    """For the first line."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def planned_model(arguments: StepArguments, config: Any) -> PlannedModel:
    """What the step will hold, before there is one."""
    return PlannedModel(
        config, arguments.freeze, False, arguments.training(1).dtype, arguments.length, arguments.targets,
        torch.cuda.is_available(),
    )  # fmt: skip


class RandomTexts(TokenStore):
    """Texts of random tokens, as many as fill some rows; of each the last tokens are learnt."""

    def __init__(self, arguments: StepArguments, num_rows: int, vocab_size: int) -> None:
        rng, length = np.random.default_rng(0), arguments.length
        lengths = np.full(num_rows, length)
        if arguments.packed:
            num = math.ceil(max(num_rows, LEAST_ROWS) * length / arguments.packed)
            lengths = np.clip(rng.geometric(1 / arguments.packed, num), 2, length)
        learnt = np.clip(np.rint(arguments.targets * lengths).astype(int), 1, lengths - 1)
        ends = np.cumsum(lengths)
        starts, nothing, marks = ends - lengths, np.full_like(ends, -1), np.zeros_like(ends)
        self.tokens = rng.integers(0, vocab_size, ends[-1])
        self.rows = np.stack([starts, starts, ends - learnt, ends, nothing, nothing, marks, marks], axis=1)
        self.all_marks = marks[:0]


class Run:
    """An engine and its stream of rows."""

    def __init__(self, arguments: StepArguments, config: Any, micro: int) -> None:
        self.sizes = BatchSizes(micro, arguments.accumulation, 1)
        store = RandomTexts(arguments, self.sizes.global_batch * arguments.updates, config.vocab_size)
        self.rows = TrainingRows(store, Pauses(0, 0), arguments.length, "packed", seed=0)
        self.consumed, self.ahead = 0, Ahead(self.rows, self.sizes, 0)
        self.engine = engine_of(arguments, config, micro, self.sizes)

    def update(self) -> tuple[StepStats, float, int]:
        """One of them; the seconds of waiting for its batches, and its real tokens."""
        begin = time.perf_counter()
        batches, tokens = self.ahead.step(self.consumed)
        seconds = time.perf_counter() - begin
        self.consumed += self.sizes.global_batch
        return self.engine.train_step(batches, 1e-4), seconds, tokens

    def block(self, updates: int) -> dict[str, Any]:
        """Some of them."""
        wait()
        begin = time.perf_counter()
        stats, batching, tokens = zip(*(self.update() for _ in range(updates)), strict=True)
        wait()
        return {
            "seconds": time.perf_counter() - begin,
            "batching": sum(batching),
            "tokens": sum(tokens),
            "losses": [one.loss for one in stats],
            "skipped": sum(not one.applied for one in stats),
        }

    def flops(self, arguments: StepArguments, config: Any) -> float:
        """Operations a token."""
        length, (_, _, learnt) = self.rows.fit.length, self.rows.store.lengths.T
        return flops_a_token(config, length, int(learnt.sum()), arguments.freeze)


def engine_of(arguments: StepArguments, config: Any, micro: int, sizes: BatchSizes) -> Engine:
    """As finetune/train.py makes it."""
    training = arguments.training(micro)
    settings = prepare_engine(training, sizes)
    module = CausalLM(build(config, seed=0), [])
    apply_plan(compile_plan(arguments.freeze, config.n_layer, has_pause=False), module)
    if arguments.gradient_checkpointing:
        checkpoint_activations(module.lm)
    engine = build_engine(module, training, settings)
    if arguments.torch_compile:
        compile_layers(engine.module)
    return engine


def measured(arguments: StepArguments, planned: PlannedModel, micro: int, limit: float) -> dict[str, Any]:
    """The figures of a micro batch."""
    memory = rank_memory()
    before = memory.reset()
    row = {"micro_batch": micro, "device": device_name(), "product_flops": limit}
    row["planned_bytes"] = planned_bytes(arguments, planned, micro)
    try:
        run = Run(arguments, planned.config, micro)
        blocks = [run.block(arguments.updates) for _ in range(arguments.rounds + 1)]
    except torch.cuda.OutOfMemoryError:
        return row | {"speed": None}
    on_gpu = torch.cuda.is_available()
    row["peak_bytes"] = torch.cuda.max_memory_allocated() if on_gpu else memory.peak() - before
    row |= figures(blocks[1:], arguments.updates, run.flops(arguments, planned.config), limit) | {"blocks": blocks}
    promised = specified(DTYPES[planned.dtype])
    row["mfu"] = row["flops"] / promised if promised else None
    if arguments.profile:
        row["profile"] = profiled(run.update, PROFILED)
    run.engine.close()
    return row


def planned_bytes(arguments: StepArguments, planned: PlannedModel, micro: int) -> float:
    """Of the plan for this step; on a CPU device and machine are the same memory."""
    path = arguments.deepspeed_config
    sizes = BatchSizes(micro, arguments.accumulation, 1)
    told = way(path, arguments.gradient_checkpointing, arguments.training(micro), sizes) if path else None
    stage, zero = (told.stage, told.zero) if told else (0, None)
    found = planned.footprint(micro, arguments.accumulation, 1, stage, zero, arguments.gradient_checkpointing)
    return found.peak if planned.on_gpu else found.peak + found.host + found.kept


def figures(blocks: list[dict[str, Any]], updates: int, flops: float, limit: float) -> dict[str, Any]:
    """Medians over blocks, of which those that warmed up are gone.

    Args: flops: operations a token; limit: operations a second.
    """
    speed = median([block["tokens"] / block["seconds"] for block in blocks])
    ms = [block["seconds"] / updates * 1e3 for block in blocks]
    return {
        "speed": speed,
        "ms": median(ms),
        "spread_ms": (min(ms), max(ms)),
        "batching_ms": median([block["batching"] / updates * 1e3 for block in blocks]),
        "flops_a_token": flops,
        "flops": flops * speed,
        "share": flops * speed / limit,
        "limit_speed": limit / flops,
    }


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """A row of the table."""
    planned = f"{row['planned_bytes'] / GIB:.2f}"
    if row["speed"] is None:
        return (row["micro_batch"], "out of memory", *[""] * (len(HEADER) - 3), planned)
    return (
        row["micro_batch"], f"{row['speed']:,.0f}", f"{row['ms']:.1f}", "{:.1f} to {:.1f}".format(*row["spread_ms"]),
        f"{row['batching_ms']:.1f}", f"{row['flops'] / 1e12:.4g}", f"{row['share']:.1%}",
        "" if row["mfu"] is None else f"{row['mfu']:.1%}", f"{row['limit_speed']:,.0f}",
        f"{1 / row['share']:.2f}", f"{row['peak_bytes'] / GIB:.2f}", planned,
    )  # fmt: skip


def profile_table(found: dict[str, Any]) -> str:
    """Where the time goes, and the largest operators."""
    total = sum(found["categories"].values())
    where = [(name, f"{ms:.2f}", f"{ms / total:.1%}") for name, ms in found["categories"].items()]
    largest = [(f"`{name}`", f"{calls:.0f}", f"{ms:.2f}") for name, calls, ms in found["largest"]]
    return "\n\n".join([
        table(("operators", "ms of an update", "share"), where),
        table(("largest operators", "calls", "ms of an update"), largest),
    ])  # fmt: skip


if __name__ == "__main__":
    run_main(main)
