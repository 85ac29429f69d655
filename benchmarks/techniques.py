"""What each technique of the training step brings: the step with it and without it, two processes in turn.

    python benchmarks/techniques.py --bf16 --output_file techniques.json
    python benchmarks/techniques.py --bf16 --techniques "AdamW in one kernel,compiled layers"

Rows are random tokens in texts of geometric lengths, the weights random, as in benchmarks/step.py. Times are the median
over rounds of the speed with it to that without it, in real tokens. Where both sides compute the same, the losses of
their first updates must agree within --tolerance. Without --bf16 nothing but "bf16" computes in 16 bit, and attention
by plain products brings nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from contest import Block, Contender, Reported, compete, paired, report, speeds, table
from step import Run, StepArguments

from kozero import distributed
from kozero.config import BatchSizes, arg, at_least, parse_arguments
from kozero.data.ahead import Ahead
from kozero.data.batches import TrainingRows
from kozero.engines import plain
from kozero.errors import require, run_main
from models import attention, causal_lm, dropout
from models.language_model import DROPOUTS, read_config

HALF = "the lower half of the layers"


@dataclass
class BenchmarkArguments(Reported):
    """What to run."""

    config_file: str = arg("models/kogpt2_config.json", "model JSON")
    length: int = arg(128, "tokens of a row")
    rows: int = arg(4, "rows of an update")
    packed: float = arg(17.0, "mean tokens of a text")
    bf16: bool = arg(False, "compute in bfloat16")
    updates: int = arg(2, "updates of a block")
    rounds: int = arg(10, "blocks of each side that count; one more before them warms up")
    tolerance: float = arg(0.01, "of the losses of the first updates, relative")
    techniques: str | None = arg(None, "which, by comma; default: all but compiled layers")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "rows", "updates", "rounds")
        require(2 <= self.packed <= self.length, f"--packed {self.packed:g}: must be from 2 to --length {self.length}")
        most = read_config(Path(self.config_file)).n_positions
        for name in self.chosen:
            require(name in TECHNIQUES, f"--techniques {name!r}: is none of {', '.join(TECHNIQUES)}")
            longer, passes = TECHNIQUES[name].longer, TECHNIQUES[name].passes
            told = f"--length {self.length}: {name!r} measures rows of {self.length * longer:g} tokens"
            require(self.length * max(1, longer) <= most, f"{told}, the model has {most} positions; choose less")
            require(self.packed <= self.length * longer, f"{told}, a text has --packed {self.packed:g}; choose more")
            even = (self.rows / longer / passes).is_integer()
            require(even, f"--rows {self.rows}: {name!r} needs a multiple of {longer * passes:g}")

    @property
    def chosen(self) -> list[str]:
        """Techniques by name."""
        return self.techniques.split(",") if self.techniques else [name for name in TECHNIQUES if name != COMPILED]


class MadeNow:
    """In the place of Ahead: batches are made when they are asked for."""

    def __init__(self, ahead: Ahead) -> None:
        self.make = ahead.make

    def step(self, consumed: int) -> tuple[list, int]:
        """As Ahead's."""
        return self.make(consumed)


def one_text_a_row(run: Run) -> None:
    """As many texts of about the same length as the packed rows held on average, each in a row of its own."""
    texts = round(len(run.rows.store.rows) * run.sizes.micro / len(run.rows))
    run.sizes = BatchSizes(texts, 1, 1)
    run.rows = TrainingRows(run.rows.store, run.rows.pauses, run.rows.capacity, "grouped", seed=0)
    run.ahead = Ahead(run.rows, run.sizes, 0)


def made_now(run: Run) -> None:
    """Batches without a thread."""
    run.ahead = MadeNow(run.ahead)


def foreach_adamw(groups: list[dict], arguments: Any) -> torch.optim.Optimizer:
    """PyTorch's other kernels."""
    return torch.optim.AdamW(groups, lr=arguments.learning_rate, foreach=True)


@dataclass(frozen=True)
class Technique:
    """How a step is made without it.

    Args: told: settings of both sides; without: those of the side that lacks it; config: of its model; put: attributes
    (owner, name, value) that it has; change: what is done to its run; longer: times the length of its rows, of which
    there are as many fewer; passes: of its updates; same: both compute the same.
    """

    told: dict[str, Any] = field(default_factory=dict)
    without: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    put: tuple[tuple[Any, str, Any], ...] = ()
    change: Callable[[Run], None] | None = None
    longer: float = 1
    passes: int = 1
    same: bool = True


COMPILED = "compiled layers"
TECHNIQUES = {
    "packed rows": Technique(change=one_text_a_row, same=False),
    "head where something is learnt (a tenth)": Technique({"targets": 0.1}, {"targets": 1.0}, same=False),
    "one gradient for embedding and head": Technique(put=((causal_lm, "shareable", lambda embedding: False),)),
    "GELU in one kernel": Technique(config={"activation_function": "gelu_new"}),
    "attention by plain products": Technique(put=((attention, "MOST_BY_PRODUCTS", 0),)),
    "dropout by bits (0.1)": Technique({"dropout": 0.1}, put=((dropout, "STEPS", 1),), same=False),  # left to PyTorch
    "AdamW in one kernel": Technique(put=((plain, "build_optimizer", foreach_adamw),)),
    "freed memory kept": Technique(put=((distributed, "keep_freed_memory", lambda: None),)),
    "batches made ahead": Technique(change=made_now),
    f"frozen: embeddings and {HALF}": Technique({"freeze": "half"}, {"freeze": None}, same=False),
    "bf16": Technique({"bf16": True}, {"bf16": False}, same=False),
    "rows not half as long": Technique(longer=0.5, same=False),
    "rows not twice as long": Technique(longer=2, same=False),
    "rows not four times as long": Technique(longer=4, same=False),
    "one pass instead of two": Technique(passes=2),
    "activations kept": Technique(without={"gradient_checkpointing": True}),
    COMPILED: Technique({"torch_compile": True}, {"torch_compile": False}),
}


def main() -> None:
    """Measure one after the other, check, print a Markdown table."""
    (arguments,) = parse_arguments(BenchmarkArguments, prog="benchmarks/techniques.py", description=__doc__)
    rows = [measured(name, arguments) for name in arguments.chosen]
    print(table(
        ("technique", "tokens/s without", "with", "least to most", "times"),
        [(row["name"], f"{row['without']['speed']:,.0f}", f"{row['with']['speed']:,.0f}",
          "{:.2f} to {:.2f}".format(*row["spread"]), f"{row['times']:.2f}") for row in rows],
    ))  # fmt: skip
    report(arguments, rows)
    for row in rows:
        off = row["off"]
        require(off is None or off <= arguments.tolerance, f"{row['name']}: losses with and without it differ by {off}")


def measured(name: str, arguments: BenchmarkArguments) -> dict[str, Any]:
    """The row of a technique."""
    print(f"{name}:", flush=True)
    sides = [Contender(side, blocks_of, (arguments, name, side)) for side in ("with", "without")]
    found = compete(sides, arguments.rounds)
    row = {"name": name} | {side: speeds(blocks) | {"blocks": blocks} for side, blocks in found.items()}
    row["times"] = paired(row["with"]["speeds"], row["without"]["speeds"])
    each = [one / other for one, other in zip(row["with"]["speeds"], row["without"]["speeds"], strict=True)]
    row["spread"] = min(each), max(each)
    if not TECHNIQUES[name].same:
        return row | {"off": None}
    first, second = (blocks[0]["losses"] for blocks in found.values())
    return row | {"off": max(abs(one / other - 1) for one, other in zip(first, second, strict=True))}


def blocks_of(arguments: BenchmarkArguments, name: str, side: str) -> Block:
    """Blocks of updates of a side."""
    technique = TECHNIQUES[name]
    lacks = side == "without"
    for owner, attribute, value in technique.put if lacks else ():
        setattr(owner, attribute, value)
    distributed.setup()
    config = read_config(Path(arguments.config_file))
    longer, passes = (technique.longer, technique.passes) if lacks else (1, 1)
    micro = int(arguments.rows / longer / passes)
    told = StepArguments(
        config_file=arguments.config_file, length=int(arguments.length * longer), packed=arguments.packed,
        micro_batch=str(micro), accumulation=passes, bf16=arguments.bf16, updates=arguments.updates,
        rounds=arguments.rounds,
    )  # fmt: skip
    told = replace(told, **technique.told | (technique.without if lacks else {}))
    if told.freeze == "half":
        told.freeze = f"wte,wpe,h.0-{max(0, config.n_layer // 2 - 1)}"
    config.update(dict.fromkeys(DROPOUTS, told.dropout) | (technique.config if lacks else {}))
    run = Run(told, config, micro)
    if technique.change and lacks:
        technique.change(run)
    return lambda: run.block(arguments.updates)


if __name__ == "__main__":
    run_main(main)
