"""Losses and peak memory of every DeepSpeed stage, side by side, beside the formula for parameters, gradients and
optimizer states.

    python benchmarks/engines.py --config_file models/kogpt2_config.json --ranks 2 --output_file engines.json

Every row is some runs of finetune/train.py under the deepspeed launcher, on the sample data, with one seed and no
dropout; rows take turns. All must have the same losses and gradient norms. On a CPU the peak is of the whole process
(Python, libraries, activations and states), so the rows differ by what the stages save, not by the formula's absolute
figure.
"""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path

from transformers import GPT2Config

from kozero.config import arg, parse_arguments
from kozero.errors import run_main
from kozero.json_files import read_json_object
from kozero.plan import ModelShape, state_bytes
from runs import ROOT, RunArguments, check, flags, in_turn, measured, show

STAGES = {"zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3, "zero2_offload": 2, "zero3_offload": 3}


@dataclass
class BenchmarkArguments(RunArguments):
    """What to run."""

    known = tuple(STAGES)
    config_file: str = arg("models/small_config.json", "model JSON")
    task: str = arg("nsmc", "task of the sample data")
    dtype: str = arg("fp32", "precision", choices=["fp32", "bf16", "fp16"])
    freeze: str | None = arg(None, "as in finetune/train.py")


def main() -> None:
    """Run all, print a Markdown table, check."""
    (arguments,) = parse_arguments(BenchmarkArguments, prog="benchmarks/engines.py", description=__doc__)
    rows = in_turn(arguments.chosen, lambda name: run(name, arguments), arguments.rounds)
    show(rows, arguments)
    check(rows, arguments.dtype)


def run(name: str, arguments: BenchmarkArguments) -> dict:
    """One run of a stage."""
    with tempfile.TemporaryDirectory(prefix="kozero-engines-") as folder:
        told = flags({
            "deepspeed_config": f"ds_configs/{name}.json",
            "config_file": arguments.config_file,
            "task": arguments.task,
            "num_pauses": 2,
            "dropout": 0,
            "learning_rate": 1e-3,
            "max_steps": arguments.steps,
            "eval_steps": arguments.steps,
            "max_eval_samples": 2,
            "logging_steps": 1,
            "per_device_train_batch_size": arguments.micro_batch,
            "gradient_accumulation_steps": 2,
            "freeze": arguments.freeze,
            arguments.dtype: arguments.dtype != "fp32",
            "output_dir": f"{folder}/run",
            "cache_dir": f"{folder}/cache",
        })  # fmt: skip
        command = ["deepspeed", "--num_gpus", str(arguments.ranks), "finetune/train.py", *told]
        row = measured(name, command, Path(folder) / "run")
        trained = json.loads((Path(folder) / "run/run.json").read_text(encoding="utf-8"))["parameters"]
    total = ModelShape.of(GPT2Config(**read_json_object(ROOT / arguments.config_file))).parameters
    states = state_bytes(total, trained["trainable"], STAGES[name], arguments.ranks, arguments.dtype)
    return row | {"formula_gib": states / 2**30}


if __name__ == "__main__":
    run_main(main)
