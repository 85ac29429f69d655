"""Losses and peak memory of every engine and stage, side by side, beside the formula for parameters, gradients and
optimizer states.

    python benchmarks/engines.py --config_file models/kogpt2_config.json --ranks 2 --output_file engines.json

Every row is one run of finetune/train.py under the deepspeed launcher, on the sample data, with one seed and no
dropout. On a CPU the peak is of the whole process (Python, libraries, activations and states), so the rows differ by
what the stages save, not by the formula's absolute figure.
"""

import json
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from transformers import GPT2Config

from kozero.config import arg, describe_run, parse_arguments
from kozero.errors import require, run_main
from kozero.json_files import read_json_object
from kozero.plan import ModelShape, state_bytes

ROOT = Path(__file__).parent.parent
STAGES = {"zero0": 0, "zero1": 1, "zero2": 2, "zero3": 3, "zero2_offload": 2, "zero3_offload": 3}


@dataclass
class BenchmarkArguments:
    """What to run."""

    config_file: str = arg("models/small_config.json", "model JSON")
    task: str = arg("nsmc", "task of the sample data")
    ranks: int = arg(2, "processes")
    steps: int = arg(5, "optimizer updates of each run")
    micro_batch: int = arg(1, "rows of one forward pass on one rank")
    dtype: str = arg("fp32", "precision", choices=["fp32", "bf16", "fp16"])
    freeze: str | None = arg(None, "as in finetune/train.py")
    output_file: str | None = arg(None, "JSON for machine, versions, settings and rows")


def main() -> None:
    """Run all, print a Markdown table."""
    (arguments,) = parse_arguments(BenchmarkArguments, prog="benchmarks/engines.py", description=__doc__)
    require(arguments.ranks >= 1 and arguments.steps >= 1, "--ranks and --steps: must be 1 or more")
    rows = [run(name, arguments) for name in STAGES]
    print("| engine | losses | gradient norms | peak GiB (rank 0) | states by formula, GiB | tokens/s |")
    print("|---|---|---|---|---|---|")
    for row in rows:
        losses, norms = (" ".join(f"{value:.6f}" for value in row[name]) for name in ("losses", "norms"))
        print(
            f"| {row['name']} | {losses} | {norms} | {row['peak_gib']:.2f} | "
            f"{row['formula_gib']:.2f} | {row['speed']:,.0f} |"
        )
    if arguments.output_file:
        machine = {"processor": platform.processor() or platform.machine(), "system": platform.platform()}
        text = json.dumps(describe_run(arguments) | {"machine": machine, "rows": rows}, indent=2)
        Path(arguments.output_file).write_text(text + "\n", encoding="utf-8")


def run(name: str, arguments: BenchmarkArguments) -> dict:
    """One engine: its losses, norms, peak and speed."""
    folder = Path(tempfile.mkdtemp(prefix="kozero-engines-"))
    flags = {
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
        "output_dir": folder / "run",
        "cache_dir": folder / "cache",
    }
    command = ["deepspeed", "--num_gpus", str(arguments.ranks), "finetune/train.py"]
    command += [f"--{key}={value}" for key, value in flags.items()]
    command += [f"--freeze={arguments.freeze}"] if arguments.freeze else []
    command += [f"--{arguments.dtype}"] if arguments.dtype != "fp32" else []
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        require(done.returncode == 0, f"{name} failed: {done.stderr.strip().splitlines()[-1] if done.stderr else ''}")
        lines = (folder / "run/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        trained = json.loads((folder / "run/run.json").read_text(encoding="utf-8"))["parameters"]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    points = [row for row in map(json.loads, lines) if "train/loss" in row]
    config = GPT2Config(**read_json_object(ROOT / arguments.config_file))
    total = ModelShape.of(config).parameters
    stage = STAGES[name]
    return {
        "name": name,
        "losses": [point["train/loss"] for point in points],
        "norms": [point["train/grad_norm"] for point in points],
        "peak_gib": points[-1]["train/peak_memory_gib"],
        "formula_gib": state_bytes(total, trained["trainable"], stage, arguments.ranks, arguments.dtype) / 2**30,
        "speed": sorted(point["train/tokens_per_second"] for point in points)[len(points) // 2],
    }


if __name__ == "__main__":
    run_main(main)
