"""ZeRO-1, 2 and 3 beside accelerate + DeepSpeed with the same JSON, and all stages beside a loop of one's own over
PyTorch's DistributedDataParallel: tokens per second of the same updates from the same weights.

    python benchmarks/zero.py --config_file models/kogpt2_config.json --bf16 --output_file zero.json

All sides learn the same full rows of random tokens in every update, and predict all of them, so a peer has nothing to
pad and nothing to leave out. What differs is the engine, and beside it attention and the head, which here has no whole
logits. Matrices decay and vectors do not, as with transformers' Trainer. What distributed.setup says to the system
(memory, oneDNN) holds for all. Losses must fall, and agree. "Of the limit" is the share of what large matrix products
reach in turn with the sides.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import limit
import numpy as np
import torch
from contest import Block, Contender, Reported, compete, paired, report, speeds, table
from torch.nn.parallel import DistributedDataParallel

from kozero import distributed
from kozero.config import BatchSizes, TrainingArguments, arg, at_least, parse_arguments
from kozero.data.batches import Text, collate
from kozero.engines import build_engine, prepare_engine
from kozero.errors import require, run_main
from kozero.optim import parameter_groups
from models.causal_lm import CausalLM, build
from models.language_model import read_config, set_dropout


@dataclass
class BenchmarkArguments(Reported):
    """What to run."""

    config_file: str = arg("models/kogpt2_config.json", "model JSON")
    stages: str = arg("0,1,2,3", "ZeRO stages, by comma")
    ranks: int = arg(2, "processes of a side")
    micro_batch: int = arg(2, "rows of one forward pass on one rank")
    accumulation: int = arg(2, "forward passes of an update")
    length: int = arg(128, "tokens of a row")
    updates: int = arg(3, "updates of a block, 2 or more")
    rounds: int = arg(3, "blocks of each side that count; one more before them warms up")
    bf16: bool = arg(False, "compute in bfloat16")
    learning_rate: float = arg(1e-4, "rate of every update")
    tolerance: float = arg(0.002, "of the losses of the first block, relative; they must fall by five times as much")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "ranks", "micro_batch", "accumulation", "rounds")
        at_least(2, self, "length", "updates")
        known = {"0", "1", "2", "3"}
        require(set(self.stages.split(",")) <= known, f"--stages {self.stages}: must be numbers from 0 to 3, by comma")


def main() -> None:
    """Measure a stage after the other, check, print a Markdown table."""
    (arguments,) = parse_arguments(BenchmarkArguments, prog="benchmarks/zero.py", description=__doc__)
    config = read_config(Path(arguments.config_file))
    told = f"--length {arguments.length}: the model has {config.n_positions} positions"
    require(arguments.length <= config.n_positions, told)
    rows, limits = [], {}
    for stage in map(int, arguments.stages.split(",")):
        found, limits[stage] = beside(arguments, stage, config)
        rows += found
    print(table(
        ("ZeRO", "side", "tokens/s", "least to most", "times ours", "of the limit", "losses"),
        [(row["stage"], row["name"], f"{row['speed']:.0f}", "{:.0f} to {:.0f}".format(*row["spread"]),
          f"{row['ratio']:.2f}", f"{row['share']:.0%}", " ".join(f"{loss:.4f}" for loss in row["losses"]))
         for row in rows],
    ))  # fmt: skip
    report(arguments, rows, limits=limits)
    first = {row["stage"]: row for row in reversed(rows)}  # ours of each
    for row in rows:
        check(first[row["stage"]], row, arguments.tolerance)


def beside(arguments: BenchmarkArguments, stage: int, config: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the sides of a stage, ours first, and what their limit is."""
    sides = [Contender("kozero", ours, (arguments, stage), arguments.ranks)]
    if stage:
        sides.append(Contender("accelerate + DeepSpeed", accelerated, (arguments, stage), arguments.ranks))
    sides.append(Contender("own loop + DDP", own_loop, (arguments,), arguments.ranks))
    blocks = compete([*sides, limit.contender(arguments.bf16, arguments.ranks)], arguments.rounds)
    products = blocks.pop(limit.NAME)
    rows = [figures(stage, name, found) for name, found in blocks.items()]
    for row in rows:
        row["ratio"] = paired(row["speeds"], rows[0]["speeds"])
    tokens = arguments.length - 1
    return rows, limit.shared(rows, products, limit.flops_a_token(config, np.array([tokens]), tokens))


def check(row: dict[str, Any], peer: dict[str, Any], tolerance: float) -> None:
    """Both have learnt the same. Losses that hardly move are equal whatever the sides do, and are refused."""
    name, losses, others = f"ZeRO-{row['stage']}", row["losses"], peer["losses"]
    fell = 1 - losses[-1] / losses[0]
    told = f"{name}: losses {losses} hardly fall, so they show nothing; raise --learning_rate or --updates"
    require(fell > 5 * tolerance, told)
    require(np.allclose(losses, others, rtol=tolerance), f"{name}: losses {losses} and {others} differ")


def figures(stage: int, name: str, blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """A side's row; its first block warmed up."""
    return {"stage": stage, "name": name} | speeds(blocks) | {"losses": blocks[0]["losses"]}


def updates(arguments: BenchmarkArguments, vocab_size: int) -> Iterator[list[np.ndarray]]:
    """The (rows, length) ids of this rank's micro batches, update after update."""
    shape = (arguments.ranks, arguments.accumulation, arguments.micro_batch, arguments.length)
    ids = np.random.default_rng(0).integers(0, vocab_size, shape)[distributed.rank()]
    while True:
        yield list(ids)


def blocks_of(arguments: BenchmarkArguments, update: Any, vocab_size: int) -> Block:
    """A block of `update(micro batches)`, which returns its loss."""
    stream = updates(arguments, vocab_size)

    def block() -> dict[str, Any]:
        begin = time.perf_counter()
        losses = [update(next(stream)) for _ in range(arguments.updates)]
        seconds = time.perf_counter() - begin
        rows = arguments.micro_batch * arguments.accumulation * arguments.ranks
        return {"seconds": seconds, "tokens": arguments.updates * rows * (arguments.length - 1), "losses": losses}

    return block


def model_of(arguments: BenchmarkArguments) -> Any:
    """The same weights on every side."""
    lm = build(read_config(Path(arguments.config_file)), seed=0)
    set_dropout(lm, 0.0)
    return lm


def told(arguments: BenchmarkArguments, stage: int) -> TrainingArguments:
    """The run as the command line would say it."""
    return TrainingArguments(
        deepspeed_config=f"ds_configs/zero{stage}.json", bf16=arguments.bf16, learning_rate=arguments.learning_rate,
        per_device_train_batch_size=arguments.micro_batch, gradient_accumulation_steps=arguments.accumulation,
    )  # fmt: skip


def ours(arguments: BenchmarkArguments, stage: int) -> Block:
    """This project."""
    distributed.setup()
    lm, training = model_of(arguments), told(arguments, stage)
    sizes = BatchSizes(arguments.micro_batch, arguments.accumulation, arguments.ranks)
    engine = build_engine(CausalLM(lm, []), training, prepare_engine(training, sizes))

    def update(micro_batches: list[np.ndarray]) -> float:
        batches = [collate([[Text(row[:-1], row[1:], 0)] for row in rows], rows.shape[1] - 1) for rows in micro_batches]
        return engine.train_step(batches, training.learning_rate).loss

    return blocks_of(arguments, update, lm.config.vocab_size)


def accelerated(arguments: BenchmarkArguments, stage: int) -> Block:
    """accelerate's loop with the JSON that our side runs, its "auto" filled in."""
    distributed.setup()
    lm, training = model_of(arguments), told(arguments, stage)
    sizes = BatchSizes(arguments.micro_batch, arguments.accumulation, arguments.ranks)
    resolved = prepare_engine(training, sizes).resolved
    from accelerate import Accelerator, DistributedType
    from accelerate.utils import DeepSpeedPlugin

    if not torch.cuda.is_available():  # told by cpu=True, accelerate (1.15) leaves DeepSpeed out without a word
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    accelerator = Accelerator(
        deepspeed_plugin=DeepSpeedPlugin(resolved), gradient_accumulation_steps=arguments.accumulation
    )
    require(accelerator.distributed_type == DistributedType.DEEPSPEED, f"{accelerator.distributed_type}: no DeepSpeed")
    optimizer = torch.optim.AdamW(parameter_groups(lm, 0.01), lr=training.learning_rate, fused=True)
    engine, optimizer = accelerator.prepare(lm, optimizer)

    def update(micro_batches: list[np.ndarray]) -> float:
        total = torch.zeros((), device=accelerator.device)
        for rows in micro_batches:
            with accelerator.accumulate(engine):
                loss = engine(**peer_inputs(rows, accelerator.device)).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.detach()
        return distributed.all_reduce(total).item() / len(micro_batches) / arguments.ranks

    return blocks_of(arguments, update, lm.config.vocab_size)


def peer_inputs(rows: np.ndarray, device: torch.device) -> dict[str, torch.Tensor]:
    """What the transformers model takes: as many positions as ours, each with its label."""
    ids = torch.from_numpy(rows).to(device)
    labels = ids[:, 1:].contiguous()
    return {"input_ids": ids[:, :-1], "labels": labels, "shift_labels": labels, "use_cache": False}


def own_loop(arguments: BenchmarkArguments) -> Block:
    """DistributedDataParallel as its tutorial has it, with autocast, no_sync and clipping."""
    distributed.setup()
    lm = model_of(arguments).to(distributed.device())
    ddp = DistributedDataParallel(lm)
    optimizer = torch.optim.AdamW(parameter_groups(lm, 0.01), lr=arguments.learning_rate, fused=True)
    device, dtype = distributed.device(), torch.bfloat16 if arguments.bf16 else torch.float32

    def update(micro_batches: list[np.ndarray]) -> float:
        total = torch.zeros((), device=device)
        for k, rows in enumerate(micro_batches):
            ddp.require_backward_grad_sync = k == len(micro_batches) - 1  # what no_sync does
            with torch.autocast(device.type, dtype, enabled=arguments.bf16):
                loss = ddp(**peer_inputs(rows, device)).loss / len(micro_batches)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return distributed.all_reduce(total).item() / arguments.ranks

    return blocks_of(arguments, update, lm.config.vocab_size)


if __name__ == "__main__":
    run_main(main)
