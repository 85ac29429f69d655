"""One update of AdamW with clipping, from gradients that are there: this project's, PyTorch's with each of its kernels,
and, with --deepspeed, DeepSpeed's for a CPU, which is compiled first and takes a C++ compiler.

    python benchmarks/optimizer.py --config_file models/kogpt2_config.json --output_file optimizer.json

The parameters are those of a model, in 32 bit, the gradients random numbers. The limit is PyTorch's fused kernel with
nothing clipped: to clip, all gradients have to be read once more before. All sides that clip must have found the same
moments, which show how a gradient was clipped, where weights would not.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
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
TOLERANCE = 5e-3  # of the moments' norms, relative: torch's norm of a large gradient on a CPU is 3e-3 too small
MOMENTS = ("exp_avg", "exp_avg_sq")
FREE = "AdamW(fused=True), nothing clipped"


@dataclass
class BenchmarkArguments(Reported):
    """What to run."""

    config_file: str = arg("models/kogpt2_config.json", "model JSON")
    updates: int = arg(5, "updates of a block")
    rounds: int = arg(5, "blocks of each side that count; one more before them warms up")
    deepspeed: bool = arg(False, "DeepSpeedCPUAdam too")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "updates", "rounds")
        require(
            not (self.deepspeed and torch.cuda.is_available()), "--deepspeed: its kernel is for a CPU; leave it out"
        )


def main() -> None:
    """Measure, check, print a Markdown table."""
    (arguments,) = parse_arguments(BenchmarkArguments, prog="benchmarks/optimizer.py", description=__doc__)
    sides: dict[str, Callable] = {
        "this project": ours, "AdamW(fused=True)": fused, "AdamW(foreach=True)": foreach,
        "AdamW(foreach=False)": single, FREE: free,
    }  # fmt: skip
    if arguments.deepspeed:
        sides["DeepSpeedCPUAdam"] = deepspeed_cpu
    found = compete([Contender(name, build, (arguments,)) for name, build in sides.items()], arguments.rounds)
    rows = [figures(name, blocks, arguments.updates) for name, blocks in found.items()]
    alone = next(row for row in rows if row["name"] == FREE)
    for row in rows:
        row["ratio"] = paired(rows[0]["seconds"], row["seconds"])
        row["share"] = paired(alone["seconds"], row["seconds"])
    print(table(
        ("side", "ms of an update", "least to most", "times as fast as ours", "of the limit"),
        [(row["name"], f"{row['ms']:.1f}", "{:.1f} to {:.1f}".format(*row["spread"]), f"{row['ratio']:.2f}",
          f"{row['share']:.0%}") for row in rows],
    ))  # fmt: skip
    report(arguments, rows)
    for row in rows[1:]:
        same = np.allclose(row["moments"], rows[0]["moments"], rtol=TOLERANCE, atol=0)
        require(same or row["name"] == FREE, f"{row['name']}: moments {row['moments']}, not {rows[0]['moments']}")


def figures(name: str, blocks: list[dict[str, Any]], updates: int) -> dict[str, Any]:
    """A side's row; its first block warmed up."""
    seconds = [block["seconds"] / updates for block in blocks[1:]]
    ms = [1e3 * one for one in seconds]
    spread = min(ms), max(ms)
    return {"name": name, "seconds": seconds, "ms": median(ms), "spread": spread, "moments": blocks[0]["moments"]}


def wait() -> None:
    """Until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def module_of(arguments: BenchmarkArguments) -> CausalLM:
    """The same weights on every side."""
    distributed.setup()
    return CausalLM(build(read_config(Path(arguments.config_file)), seed=0), []).to(distributed.device())


def blocks_of(arguments: BenchmarkArguments, optimizer: torch.optim.Optimizer, update: Callable[[], Any]) -> Block:
    """Blocks of `update()`, before each of which the parameters get their gradients, other ones each time."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    torch.manual_seed(1)
    gradients = [torch.randn_like(parameter) for parameter in parameters]

    def block() -> dict[str, Any]:
        seconds = 0.0
        for number in range(arguments.updates):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.roll(number)
            wait()
            begin = time.perf_counter()
            update()
            wait()
            seconds += time.perf_counter() - begin
        states = [optimizer.state[parameter] for parameter in parameters]
        moments = [sum(float(state[kind].double().square().sum()) for state in states) ** 0.5 for kind in MOMENTS]
        return {"seconds": seconds, "moments": moments}

    return block


def ours(arguments: BenchmarkArguments) -> Block:
    """The end of a step at stage 0: norm, clipping, update, gradients forgotten."""
    module = module_of(arguments)
    training = TrainingArguments(learning_rate=RATE, weight_decay=DECAY, max_grad_norm=MOST)
    engine = build_engine(module, training, EngineSettings())
    loss = torch.zeros(1, device=distributed.device())
    return blocks_of(arguments, engine.optimizer, lambda: engine.update(loss, loss + 1, RATE))


def clipped(arguments: BenchmarkArguments, kind: Callable, **told: Any) -> Block:
    """PyTorch's clipping and then an optimizer."""
    module = module_of(arguments)
    optimizer = kind(parameter_groups(module, DECAY), lr=RATE, **told)

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(module.parameters(), MOST)
        optimizer.step()
        optimizer.zero_grad()

    return blocks_of(arguments, optimizer, update)


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
    """The fused kernel alone, without clipping."""
    module = module_of(arguments)
    optimizer = torch.optim.AdamW(parameter_groups(module, DECAY), lr=RATE, fused=True)
    return blocks_of(arguments, optimizer, optimizer.step)


def deepspeed_cpu(arguments: BenchmarkArguments) -> Block:
    """DeepSpeed's kernel for optimizers that were offloaded, compiled where it is first used."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    return clipped(arguments, DeepSpeedCPUAdam, adamw_mode=True)


if __name__ == "__main__":
    run_main(main)
