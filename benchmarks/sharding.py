"""Losses and peak memory of the pre-training entries side by side: PyTorch alone, ZeRO-1, ZeRO-2, ZeRO-3, beside the
formula for parameters, gradients and optimizer states.

    python benchmarks/sharding.py --model causal_lm --config_file models/kogpt2_config.json --output_file sharding.json

Every row is some runs of an entry point on the sample corpus, with one seed and no dropout; rows take turns. All must
have the same losses and gradient norms. Parameters, gradients and both moments are in 32 bit: 16 bytes a parameter. On
a CPU the peak is of the whole process (Python, libraries, activations and states), so the rows differ by what the
stages save, not by the formula's absolute figure.
"""

import tempfile
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import safe_open

from kozero.config import arg, parse_arguments
from kozero.errors import run_main
from kozero.plan import state_bytes
from pretrain.arguments import MODELS
from runs import RunArguments, check, flags, in_turn, measured, python, show

ROWS = {  # name: (ZeRO stage, entry, its flags)
    "train": (0, "pretrain/train.py", []),
    "train_zero_one": (1, "pretrain/train_zero_one.py", []),
    "train_zero_two": (2, "pretrain/train_zero_two.py", []),
    "train_zero_two --auto_wrap": (2, "pretrain/train_zero_two.py", ["--auto_wrap"]),
    "train_zero_two --zero3": (3, "pretrain/train_zero_two.py", ["--zero3"]),
    "train_zero_two --zero3 --auto_wrap": (3, "pretrain/train_zero_two.py", ["--zero3", "--auto_wrap"]),
}


@dataclass
class BenchmarkArguments(RunArguments):
    """What to run."""

    known = tuple(ROWS)
    model: str = arg("causal_lm", "architecture", choices=list(MODELS))
    task: str | None = arg(None, "as in pretrain/train.py")
    config_file: str | None = arg(None, "model JSON; default: that of the architecture")
    max_seq_length: int = arg(64, "tokens of a row")


def main() -> None:
    """Run all, print a Markdown table, check."""
    (arguments,) = parse_arguments(BenchmarkArguments, prog="benchmarks/sharding.py", description=__doc__)
    rows = in_turn(arguments.chosen, lambda name: run(name, arguments), arguments.rounds)
    show(rows, arguments)
    check(rows, "fp32")


def run(name: str, arguments: BenchmarkArguments) -> dict:
    """One run of an entry."""
    stage, entry, own = ROWS[name]
    with tempfile.TemporaryDirectory(prefix="kozero-sharding-") as folder:
        told = flags({
            "model_name": "run",
            "model": arguments.model,
            "task": arguments.task,
            "config_file": arguments.config_file,
            "nproc": arguments.ranks,
            "dropout": 0,
            "learning_rate": 1e-3,
            "warmup_steps": 0,
            "num_steps": arguments.steps,
            "eval_steps": arguments.steps,
            "max_eval_samples": 2,
            "logging_steps": 1,
            "train_batch_size": arguments.micro_batch,
            "max_seq_length": arguments.max_seq_length,
            "output_dir": folder,
            "cache_dir": f"{folder}/cache",
        })  # fmt: skip
        row = measured(name, [*python(entry), *told, *own], Path(folder) / "run")
        total = num_parameters(Path(folder) / "run/model")
    return row | {"formula_gib": state_bytes(total, total, stage, arguments.ranks) / 2**30}


def num_parameters(folder: Path) -> int:
    """Numbers in an exported model and its heads."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no dict)
    return total


if __name__ == "__main__":
    run_main(main)
