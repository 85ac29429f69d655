"""Speed of the Mix LM: its mixed convolution beside one large kernel whose weight is masked in every forward pass, and
the whole encoder beside a BERT of the same width, depth and feed-forward.

    python benchmarks/mix_lm.py --batch_size 4 --length 128 --bf16 --output_file mix_lm.json

Each figure is forward + backward. Two versions take turns, so that a busy machine slows both. The masked version gets
the same weights and must give the same outputs and gradients before any time is taken.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from contest import Reported, report, table
from torch import nn
from transformers import BertConfig, BertModel

from kozero.config import arg, at_least, parse_arguments
from kozero.errors import require, run_main
from kozero.json_files import check_keys, read_json_object
from models.mix_lm import MixedConvolution, MixFeedForward, MixLmConfig, MixLmEncoder

TOLERANCE = 1e-4  # of outputs and gradients in 32 bit, relative to the largest value


@dataclass
class BenchmarkArguments(Reported):
    """What to measure."""

    config_file: str = arg("models/mix_lm_config.json", "model JSON")
    batch_size: int = arg(4, "texts")
    length: int = arg(128, "tokens of a text")
    repeats: int = arg(15, "timed passes of each version")
    bf16: bool = arg(False, "autocast to bfloat16")
    encoder: bool = arg(False, "measure the whole encoder beside BERT too")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "batch_size", "length", "repeats")


class MaskedConvolution(nn.Module):
    """What `MixedConvolution` replaces: one grouped convolution of the largest kernel for each dilation, the taps that
    a small kernel lacks multiplied by zero in every forward pass."""

    def __init__(self, mix: MixedConvolution, config: MixLmConfig) -> None:
        super().__init__()
        num_sizes = len(config.kernel_sizes)
        self.groups, self.causal = num_sizes, config.causal
        parts = [mix.convolutions[k : k + num_sizes] for k in range(0, len(mix.convolutions), num_sizes)]
        self.dilations = [part[0].dilation[0] for part in parts]
        self.weights = nn.ParameterList(self.widened([c.weight.detach() for c in part], config) for part in parts)
        self.biases = nn.ParameterList(torch.cat([c.bias.detach() for c in part]) for part in parts)
        kernels = [torch.ones_like(c.weight) for c in parts[0]]
        self.register_buffer("mask", self.widened(kernels, config))

    @staticmethod
    def widened(weights: list[torch.Tensor], config: MixLmConfig) -> torch.Tensor:
        """Kernels (F', H', k) in the middle of zeros, at the end if causal: (sum of F', H', kernel_size)."""
        missing = [config.kernel_size - weight.shape[-1] for weight in weights]
        ends = [(gap, 0) if config.causal else (gap // 2, gap // 2) for gap in missing]
        return torch.cat([F.pad(weight, end) for weight, end in zip(weights, ends, strict=True)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, H, T) to (B, F, T)."""
        length, outputs = hidden.shape[-1], []
        for part, weight, bias, dilation in zip(
            hidden.chunk(len(self.dilations), dim=1), self.weights, self.biases, self.dilations, strict=True
        ):
            padding = (weight.shape[-1] - 1) * dilation // (1 if self.causal else 2)
            masked = weight * self.mask
            out = F.conv1d(part, masked, bias, padding=padding, dilation=dilation, groups=self.groups)
            outputs.append(out[..., :length])
        return torch.cat(outputs, dim=1)


def main() -> None:
    """Measure, print a Markdown table."""
    (arguments,) = parse_arguments(BenchmarkArguments, prog="benchmarks/mix_lm.py", description=__doc__)
    values = read_json_object(arguments.config_file)
    check_keys(values, {"model_type", *(field.name for field in fields(MixLmConfig))}, arguments.config_file)
    config = MixLmConfig(**values | {"dropout_prob": 0.0})
    limit = config.max_position_embeddings
    require(arguments.length <= limit, f"--length {arguments.length}: max_position_embeddings is {limit}")
    rows = convolution_rows(config, arguments) + (encoder_rows(config, arguments) if arguments.encoder else [])
    print(table(
        ("forward + backward", "parameters", "median ms", "quartiles ms", "times as fast"),
        [(row["name"], f"{row['parameters']:,}", f"{row['median_ms']:.1f}",
          "{:.1f} - {:.1f}".format(*row["quartiles_ms"]), f"{row['ratio']:.2f}") for row in rows],
    ))  # fmt: skip
    report(arguments, rows)


def convolution_rows(config: MixLmConfig, arguments: BenchmarkArguments) -> list[dict]:
    """The convolution alone, and inside its feed-forward, each beside the masked version of equal weights."""
    num_sizes, share = len(config.kernel_sizes), config.hidden_size // config.n_experts
    even = share % num_sizes == 0 and config.ff_dim // config.n_experts % num_sizes == 0
    require(even, f"{arguments.config_file}: hidden_size and ff_dim must divide by n_experts * {num_sizes} kernels")
    torch.manual_seed(0)
    ours = MixFeedForward(config)
    masked = MixFeedForward(config)
    masked.load_state_dict(ours.state_dict())
    masked.mix = MaskedConvolution(ours.mix, config)
    hidden = torch.randn(arguments.batch_size, arguments.length, config.hidden_size)
    check_equal(lambda x: ours(x, None), lambda x: masked(x, None), hidden)
    channels = hidden.mT.contiguous()
    pairs = {
        "convolution": (ours.mix, masked.mix, channels, ()),
        "feed-forward": (ours, masked, hidden, (None,)),
    }
    rows = []
    for name, (fast, slow, x, rest) in pairs.items():
        versions = {"masked large kernel": (slow, x, rest), "kernels of their own size": (fast, x, rest)}
        rows += compare({f"{name}, {version}": what for version, what in versions.items()}, arguments)
    return rows


def encoder_rows(config: MixLmConfig, arguments: BenchmarkArguments) -> list[dict]:
    """The encoder beside BERT."""
    bert = BertConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=max(1, config.hidden_size // 64), intermediate_size=config.ff_dim,
        max_position_embeddings=config.max_position_embeddings, pad_token_id=config.pad_token_id,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    ids = torch.randint(config.vocab_size, (arguments.batch_size, arguments.length))
    models = {"encoder, BERT": BertModel(bert, add_pooling_layer=False), "encoder, Mix LM": MixLmEncoder(config)}
    return compare({name: (model, ids, ()) for name, model in models.items()}, arguments)


def check_equal(ours: Callable, reference: Callable, hidden: torch.Tensor) -> None:
    """Same outputs and same gradients of the input."""
    results = []
    for version in (ours, reference):
        x = hidden.clone().requires_grad_()
        out = version(x)
        results.append((out.detach(), *torch.autograd.grad(out.pow(2).sum(), x)))
    for a, b in zip(*results, strict=True):
        error = ((a - b).abs().max() / b.abs().max()).item()
        require(error < TOLERANCE, f"the two versions differ by {error:.2e} of the largest value")


def compare(versions: dict[str, tuple], arguments: BenchmarkArguments) -> list[dict]:
    """Time (module, input, other arguments) in turns; the first is what the others are compared with."""
    times: dict[str, list[float]] = {name: [] for name in versions}
    for turn in range(arguments.repeats + 1):
        for name, version in versions.items():
            seconds = timed(*version, arguments.bf16)
            if turn:  # the first pass warms up
                times[name].append(seconds * 1000)
    first = statistics.median(next(iter(times.values())))
    return [
        {
            "name": name,
            "parameters": sum(p.numel() for p in versions[name][0].parameters()),
            "median_ms": statistics.median(values),
            "quartiles_ms": [statistics.quantiles(values, n=4)[k] if len(values) > 1 else values[0] for k in (0, 2)],
            "ratio": first / statistics.median(values),
        }
        for name, values in times.items()
    ]


def timed(module: nn.Module, x: torch.Tensor, rest: tuple, bf16: bool) -> float:
    """Seconds of one forward and backward pass."""
    module.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_(x.is_floating_point())
    start = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = module(x, *rest)
    out = out if isinstance(out, torch.Tensor) else out.last_hidden_state
    out.float().sum().backward()
    return time.perf_counter() - start


if __name__ == "__main__":
    run_main(main)
