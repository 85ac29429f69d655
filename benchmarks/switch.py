"""Forward and backward time of the Switch layer: grouped and batched products beside a loop over experts and beside
transformers' SwitchTransformersSparseMLP, with the same weights on the same tokens.

    python benchmarks/switch.py --dtype bf16 --output_file switch.json

The layers take turns in every round, so that a busy machine slows all of them. A ratio is the median over the rounds
of a layer's time through that of our layer as it runs here. Before the clock starts, the outputs are compared, dropped
tokens included. transformers counts capacity per row, so it gets all tokens as one row; it computes no router losses.

On a CPU, glibc maps memory anew for every tensor above 32 MiB, which stacked weights and their gradients soon are and
single experts are not; MALLOC_MMAP_THRESHOLD_=2000000000 MALLOC_TRIM_THRESHOLD_=8000000000 takes that out.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from contest import Reported, report, table
from torch import nn
from transformers import SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from kozero.config import arg, at_least, parse_arguments
from kozero.errors import require, run_main
from models.transformer import SwitchFeedForward, TransformerConfig, has_grouped_product, router_losses

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCES = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 4e-3}  # of the largest output


@dataclass
class BenchmarkArguments(Reported):
    """What to measure."""

    batch_size: int = arg(8, "rows")
    seq_length: int = arg(128, "tokens of a row")
    hidden_size: int = arg(768, "width of a token")
    ff_dim: int = arg(3072, "inner width of an expert")
    n_experts: int = arg(4, "experts")
    capacity_factor: float = arg(1.0, "places of an expert, in even shares of the tokens")
    dtype: str = arg("fp32", "precision; bf16 and fp16 by autocast", choices=list(DTYPES))
    rounds: int = arg(7, "timed passes of each layer")
    seed: int = arg(0, "seed of weights and tokens")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "batch_size", "seq_length", "rounds")


class BatchedSwitch(SwitchFeedForward):
    """Ours where there is no grouped product."""

    grouped = SwitchFeedForward.batched


class LoopSwitch(SwitchFeedForward):
    """The same layer, expert by expert."""

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """As SwitchFeedForward, without padding."""
        flat = hidden.flatten(0, 1)
        logits = self.router(flat)
        gate, choice = logits.softmax(-1).max(-1)
        capacity = self.capacity(len(flat))
        outputs, kept = torch.zeros_like(flat), 0
        for expert, (w_in, w_out) in enumerate(zip(self.w_in, self.w_out, strict=True)):
            places = (choice == expert).nonzero().squeeze(1)[:capacity]
            y = self.act_fn(flat[places] @ w_in) @ w_out
            outputs[places] = (y * gate[places].unsqueeze(1)).to(outputs.dtype)
            kept += len(places)
        load = choice.bincount(minlength=len(self.w_in)) / len(flat)
        return outputs.view_as(hidden), router_losses(logits, load), load, torch.tensor(1 - kept / len(flat))


class LibrarySwitch(nn.Module):
    """transformers' layer with the weights of ours."""

    def __init__(self, ours: SwitchFeedForward, arguments: BenchmarkArguments) -> None:
        super().__init__()
        num_experts, num_tokens = arguments.n_experts, arguments.batch_size * arguments.seq_length
        config = SwitchTransformersConfig(
            d_model=arguments.hidden_size,
            d_ff=arguments.ff_dim,
            num_experts=num_experts,
            expert_capacity=math.ceil(arguments.capacity_factor * num_tokens / num_experts),
            dense_act_fn="gelu",
            dropout_rate=0.0,
            router_jitter_noise=0.0,  # it would change the layer's input in place
        )
        self.layer = SwitchTransformersSparseMLP(config)
        with torch.no_grad():
            self.layer.router.classifier.weight.copy_(ours.router.weight)
            for expert in range(num_experts):
                dense = self.layer.experts[f"expert_{expert}"]
                dense.wi.weight.copy_(ours.w_in[expert].T)
                dense.wo.weight.copy_(ours.w_out[expert].T)

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor]:
        """(B, T, H) to (B, T, H)."""
        return (self.layer(hidden.flatten(0, 1).unsqueeze(0)).view_as(hidden),)


def main() -> None:
    """Check, measure, print a Markdown table."""
    (arguments,) = parse_arguments(BenchmarkArguments, prog="benchmarks/switch.py", description=__doc__)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layers = build(arguments, device)
    hidden = torch.randn(arguments.batch_size, arguments.seq_length, arguments.hidden_size, device=device)
    dropped = check(layers, hidden, arguments.dtype)
    seconds = measure(layers, hidden, arguments)
    rows = [summary(name, times, seconds["ours"]) for name, times in seconds.items()]
    print(table(
        ("layer", "forward + backward, ms", "middle half, ms", "time through ours"),
        [(row["name"], f"{row['median_ms']:.1f}", "{:.1f} to {:.1f}".format(*row["quartiles_ms"]),
          f"{row['ratio']:.2f}") for row in rows],
    ))  # fmt: skip
    product = "grouped" if has_grouped_product(hidden.to(DTYPES[arguments.dtype]), layers["ours"].w_in) else "batched"
    print(f"\nOurs multiplies by {product} products here; {dropped:.1%} of the tokens were dropped.")
    report(arguments, rows, product=product, dropped=dropped)


def build(arguments: BenchmarkArguments, device: str) -> dict[str, nn.Module]:
    """The layers by name, all of the same weights."""
    torch.manual_seed(arguments.seed)
    shape = {name: getattr(arguments, name) for name in ("hidden_size", "ff_dim", "n_experts", "capacity_factor")}
    config = TransformerConfig(**shape, num_heads=1)
    ours = SwitchFeedForward(config)
    for weight in ours.parameters():
        nn.init.normal_(weight, std=weight.shape[-2] ** -0.5 if weight.dim() == 3 else config.initializer_range)
    layers = {"ours": ours, "ours, batched products": BatchedSwitch(config), "loop over experts": LoopSwitch(config)}
    for layer in layers.values():
        layer.load_state_dict(ours.state_dict())
    layers["transformers"] = LibrarySwitch(ours, arguments)
    return {name: layer.to(device) for name, layer in layers.items()}


def check(layers: dict[str, nn.Module], hidden: torch.Tensor, dtype: str) -> float:
    """Compare outputs in training and return the share of dropped tokens. Under autocast transformers' router is not
    fp32 and sends some tokens elsewhere, so it is compared in fp32."""
    with torch.no_grad(), torch.autocast(hidden.device.type, DTYPES[dtype], enabled=dtype != "fp32"):
        found = {name: layer.train()(hidden)[0].float() for name, layer in layers.items()}
    expected = found["loop over experts"]
    for name, output in found.items():
        difference = ((output - expected).abs().max() / expected.abs().max()).item()
        alike = difference < TOLERANCES[dtype] or (name == "transformers" and dtype != "fp32")
        require(alike, f"{name}: output differs from the loop's by {difference:.1e}")
    return layers["ours"].train()(hidden)[3].item()


def measure(
    layers: dict[str, nn.Module], hidden: torch.Tensor, arguments: BenchmarkArguments
) -> dict[str, list[float]]:
    """Seconds of each layer's training passes, one by one; the first round warms up and is not counted."""
    hidden.requires_grad_()
    gradient = torch.randn_like(hidden)
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for _ in range(arguments.rounds + 1):
        for name, layer in layers.items():
            seconds[name].append(timed(lambda layer=layer: step(layer, hidden, gradient, arguments.dtype)))
    return {name: times[1:] for name, times in seconds.items()}


def step(layer: nn.Module, hidden: torch.Tensor, gradient: torch.Tensor, dtype: str) -> None:
    """Forward and backward, the router losses too where a layer has them."""
    layer.zero_grad()
    hidden.grad = None
    with torch.autocast(hidden.device.type, DTYPES[dtype], enabled=dtype != "fp32"):
        output, *losses = layer(hidden)[:2]
    torch.autograd.backward([output, *losses], [gradient.to(output.dtype), *(torch.ones_like(x) for x in losses)])


def timed(function: Callable[[], None]) -> float:
    """Seconds, the device's work included."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def summary(name: str, times: list[float], ours: list[float]) -> dict:
    """Median, quartiles and ratio of one layer's seconds."""
    low, _, high = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else times * 3
    return {
        "name": name,
        "median_ms": statistics.median(times) * 1e3,
        "quartiles_ms": [low * 1e3, high * 1e3],
        "ratio": statistics.median(time / base for time, base in zip(times, ours, strict=True)),
    }


if __name__ == "__main__":
    run_main(main)
