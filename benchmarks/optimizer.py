"""One update of AdamW with clipping, from gradients that are there: this project's, PyTorch's with each of its kernels,
and DeepSpeed's for a CPU, beside the rate at which the device copies memory.

    python benchmarks/optimizer.py --config_file models/kogpt2_config.json --output_file optimizer.json

The parameters are those of a model, in 32 bit, the gradients random numbers. An update reads weights, gradients and two
moments and writes all but the gradients: 28 bytes a parameter, which at the rate of a copy would take what the table
calls the limit; clipping has to read the gradients once more before. Without clipping torch's fused kernel is a row of
its own. All sides that clip must have moved the weights alike. DeepSpeed's needs a C++ compiler, and is left out
without one.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from contest import Block, Contender, Reported, compete, paired, report, table

from kozero import distributed
from kozero.config import TrainingArguments, arg, at_least, parse_arguments
from kozero.engines import EngineSettings, build_engine
from kozero.errors import require, run_main
from kozero.optim import parameter_groups
from models.causal_lm import CausalLM, build
from models.language_model import read_config

RATE, DECAY, MOST = 1e-4, 0.01, 1.0  # learning rate, weight decay, norm of gradients
BYTES = 28  # of an update, for each parameter
TOLERANCE = 1e-3  # of how far weights have moved, relative
FREE = "AdamW(fused=True), nothing clipped"


@dataclass
class BenchmarkArguments(Reported):
    """What to run."""

    config_file: str = arg("models/kogpt2_config.json", "model JSON")
    updates: int = arg(5, "updates of a block")
    rounds: int = arg(5, "blocks of each side that count; one more before them warms up")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "updates", "rounds")


def main() -> None:
    """Measure, check, print a Markdown table."""
    (arguments,) = parse_arguments(BenchmarkArguments, prog="benchmarks/optimizer.py", description=__doc__)
    sides: dict[str, Callable] = {
        "this project": ours, "AdamW(fused=True)": fused, "AdamW(foreach=True)": foreach,
        "AdamW(foreach=False)": single, FREE: free,
    }  # fmt: skip
    if not torch.cuda.is_available() and shutil.which("g++") and shutil.which("ninja"):
        sides["DeepSpeedCPUAdam"] = deepspeed_cpu
    found = compete([Contender(name, build, (arguments,)) for name, build in sides.items()], arguments.rounds)
    copying = max(block["copied_per_s"] for block in found["this project"])
    rows = [figures(name, blocks, copying, arguments.updates) for name, blocks in found.items()]
    for row in rows:
        row["ratio"] = paired(rows[0]["seconds"], row["seconds"])
    print(f"copies at {copying / 1e9:.1f} GB/s (read and written)")
    print(table(
        ("side", "ms of an update", "least to most", "times as fast as ours", "of the limit"),
        [(row["name"], f"{row['ms']:.1f}", "{:.1f} to {:.1f}".format(*row["spread"]), f"{row['ratio']:.2f}",
          f"{row['share']:.0%}") for row in rows],
    ))  # fmt: skip
    report(arguments, rows, copied_per_s=copying)
    for row in rows[1:]:
        same = abs(row["moved"] / rows[0]["moved"] - 1) < TOLERANCE
        require(same or row["name"] == FREE, f"{row['name']}: moved by {row['moved']}, not {rows[0]['moved']}")


def figures(name: str, blocks: list[dict[str, Any]], copying: float, updates: int) -> dict[str, Any]:
    """A side's row; its first block warmed up."""
    seconds = [block["seconds"] / updates for block in blocks[1:]]
    ms = [1e3 * one for one in seconds]
    limit = BYTES * blocks[0]["parameters"] / copying
    return {
        "name": name, "seconds": seconds, "ms": median(ms), "spread": (min(ms), max(ms)),
        "share": limit / median(seconds), "moved": blocks[0]["moved"],
    }  # fmt: skip


def copy_rate() -> float:
    """Bytes a second, read and written, of a tensor that no cache holds."""
    source = torch.ones(2**27, device=distributed.device())
    target = torch.empty_like(source)

    def seconds() -> float:
        begin = time.perf_counter()
        target.copy_(source)
        wait()
        return time.perf_counter() - begin

    return 2 * source.nbytes / min(seconds() for _ in range(5))


def wait() -> None:
    """Until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def module_of(arguments: BenchmarkArguments) -> CausalLM:
    """The same weights on every side."""
    distributed.setup()
    return CausalLM(build(read_config(Path(arguments.config_file)), seed=0), []).to(distributed.device())


def blocks_of(arguments: BenchmarkArguments, module: torch.nn.Module, update: Callable[[], Any]) -> Block:
    """Blocks of `update()`, before each of which the parameters have their gradients."""
    parameters = list(module.parameters())
    torch.manual_seed(1)
    gradients = [torch.randn_like(parameter) for parameter in parameters]
    before = [parameter.detach().clone() for parameter in parameters[:4]]

    def block() -> dict[str, Any]:
        seconds = 0.0
        for _ in range(arguments.updates):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            wait()
            begin = time.perf_counter()
            update()
            wait()
            seconds += time.perf_counter() - begin
        moved = [float((now.detach() - then).double().norm()) for now, then in zip(parameters, before, strict=False)]
        number = sum(parameter.numel() for parameter in parameters)
        return {"seconds": seconds, "moved": sum(moved), "parameters": number, "copied_per_s": copy_rate()}

    return block


def ours(arguments: BenchmarkArguments) -> Block:
    """The end of a step at stage 0: norm, clipping, update, gradients forgotten."""
    module = module_of(arguments)
    training = TrainingArguments(learning_rate=RATE, weight_decay=DECAY, max_grad_norm=MOST)
    engine = build_engine(module, training, EngineSettings())
    loss = torch.zeros(1, device=distributed.device())
    return blocks_of(arguments, module, lambda: engine.update(loss, RATE))


def clipped(arguments: BenchmarkArguments, kind: Callable, **told: Any) -> Block:
    """PyTorch's clipping and then an optimizer."""
    module = module_of(arguments)
    optimizer = kind(parameter_groups(module, DECAY), lr=RATE, **told)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(module.parameters(), MOST)
        optimizer.step()
        optimizer.zero_grad()

    return blocks_of(arguments, module, update)


def fused(arguments: BenchmarkArguments) -> Block:
    """One kernel a tensor."""
    return clipped(arguments, torch.optim.AdamW, fused=True)


def foreach(arguments: BenchmarkArguments) -> Block:
    """One operation after the other over all tensors."""
    return clipped(arguments, torch.optim.AdamW, foreach=True)


def single(arguments: BenchmarkArguments) -> Block:
    """One operation and one tensor after the other, what a CPU gets where nothing is said."""
    return clipped(arguments, torch.optim.AdamW, foreach=False)


def free(arguments: BenchmarkArguments) -> Block:
    """The kernel alone."""
    module = module_of(arguments)
    optimizer = torch.optim.AdamW(parameter_groups(module, DECAY), lr=RATE, fused=True)
    return blocks_of(arguments, module, optimizer.step)


def deepspeed_cpu(arguments: BenchmarkArguments) -> Block:
    """DeepSpeed's kernel for optimizers that were offloaded, compiled where it is first used."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return clipped(arguments, DeepSpeedCPUAdam, adamw_mode=True)


if __name__ == "__main__":
    run_main(main)
