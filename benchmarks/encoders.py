"""The encoders in pre-training: tokens per second of whole updates (forward, backward, clipping, fused AdamW) of masked
language modelling on full rows of random tokens.

    python benchmarks/encoders.py --output_file encoders.json
    python benchmarks/encoders.py --config_files models/mix_lm_config.json --layers 2 --bf16

Beside each encoder stand the same encoder with the layer that it is about replaced, and transformers' BertForMaskedLM.

- transformer: the Switch layer as a loop over experts in Python, as products over padded places of each expert, and as
  transformers' own layer, which loops too. Its capacity is that of a row, so it gets all tokens as one row.
- mix_lm: in place of kernels of their own size one large grouped kernel for each dilation, masked in every pass.
- BERT is of equal vocabulary, width, depth, feed-forward (one expert's: what a token meets), positions and heads; a
  mix_lm has one small attention, its BERT a head for every 64 columns. It computes logits at all positions, the
  encoders here where a token is hidden; for a small model that is most of the work, so BERT is measured that way too.

Sides with the same weights must have the same losses and gradient norms in their first updates.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from contest import Block, Contender, Reported, compete, paired, report, speeds, table, timed
from torch import nn
from transformers import BertConfig, BertForMaskedLM, PreTrainedConfig, SwitchTransformersConfig
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersSparseMLP

from kozero import distributed
from kozero.config import TrainingArguments, arg, at_least, parse_arguments
from kozero.data.batch import Batch
from kozero.engines import EngineSettings, build_engine
from kozero.errors import require, run_main
from kozero.json_files import check_keys, read_json_object
from kozero.pause import IGNORE
from models.encoders import ENCODERS, build_encoder, name_in_config
from models.heads import ROUTER
from models.mix_lm import MixedConvolution, MixLmConfig
from models.transformer import SwitchFeedForward, TransformerConfig, router_losses
from pretrain.objectives import EncoderPretraining

MASKED = 0.15  # share of the tokens that are predicted
RATE = 1e-4
TOLERANCE = 1e-3  # of losses and gradient norms, relative
BERT = "BertForMaskedLM"


@dataclass
class BenchmarkArguments(Reported):
    """What to measure."""

    config_files: str = arg(
        "models/transformer_config.json,models/mix_lm_config.json", "model JSONs of encoders, by comma"
    )
    layers: int = arg(4, "layers of every side; 0: those of the JSON")
    rows: int = arg(8, "rows of an update")
    length: int = arg(128, "tokens of a row")
    updates: int = arg(2, "updates of a block")
    rounds: int = arg(5, "blocks of each side that count; one more before them warms up")
    bf16: bool = arg(False, "compute in bfloat16")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "rows", "length", "updates", "rounds")
        at_least(0, self, "layers")
        for path in self.config_files.split(","):
            config = config_of(self, path)
            limit = config.max_position_embeddings
            require(self.length <= limit, f"--length {self.length}: {path} has {limit} positions")
            blocks = len(config.kernel_sizes) * config.n_experts if isinstance(config, MixLmConfig) else 1
            even = config.hidden_size % blocks == config.ff_dim % blocks == 0  # for a grouped kernel
            require(even, f"{path}: hidden_size and ff_dim must be multiples of {blocks}: kernel sizes x n_experts")


def config_of(arguments: BenchmarkArguments, path: str) -> PreTrainedConfig:
    """An encoder's config without dropout."""
    kind = ENCODERS[name_in_config(Path(path))][0]
    values = read_json_object(path)
    check_keys(values, set(kind().to_dict()) | set(kind.attribute_map), path)
    layers = {"num_hidden_layers": arguments.layers} if arguments.layers else {}
    return kind(**values | layers | {"dropout_prob": 0.0})


def main() -> None:
    """Measure one encoder after the other, check, print a Markdown table."""
    (arguments,) = parse_arguments(BenchmarkArguments, prog="benchmarks/encoders.py", description=__doc__)
    rows = []
    for path in arguments.config_files.split(","):
        name = Path(path).stem.removesuffix("_config")
        sides = [Contender(f"{name}: {side}", measured, (arguments, path, side)) for side in sides_of(path)]
        found = [figures(name, blocks) for name, blocks in compete(sides, arguments.rounds).items()]
        rows += [row | {"ratio": paired(row["speeds"], found[0]["speeds"])} for row in found]
    print(table(
        ("encoder", "parameters", "tokens/s", "least to most", "times ours", "loss", "gradient norm"),
        [(row["name"], f"{row['parameters']:,}", f"{row['speed']:,.0f}", "{:,.0f} to {:,.0f}".format(*row["spread"]),
          f"{row['ratio']:.2f}", f"{row['losses'][-1]:.5f}", f"{row['norms'][-1]:.5f}") for row in rows],
    ))  # fmt: skip
    report(arguments, rows)
    check(rows)


def figures(name: str, blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """A side's row; its first block warmed up."""
    told = {key: blocks[0][key] for key in ("parameters", "losses", "norms")}
    return {"name": name} | speeds(blocks) | told


def check(rows: list[dict[str, Any]]) -> None:
    """Sides with the same weights have learnt the same."""
    first: dict[tuple[str, bool], dict[str, Any]] = {}
    for row in rows:
        name, side = row["name"].split(": ")
        expected = first.setdefault((name, side.startswith(BERT)), row)
        for kind in ("losses", "norms"):
            same = np.allclose(row[kind], expected[kind], rtol=TOLERANCE)
            require(same, f"{row['name']}: {kind} {row[kind]}, of {expected['name']}: {expected[kind]}")


def sides_of(path: str) -> dict[str, Callable[[PreTrainedConfig], nn.Module]]:
    """What is measured of the encoder that a config describes."""
    return SIDES[name_in_config(Path(path))]


def measured(arguments: BenchmarkArguments, path: str, side: str) -> Block:
    """A side in its process."""
    distributed.setup()
    config = config_of(arguments, path)
    training = TrainingArguments(bf16=arguments.bf16)
    engine = build_engine(sides_of(path)[side](config), training, EngineSettings())
    routed = isinstance(config, TransformerConfig) and not side.startswith(BERT)
    stream = batches(arguments, config.vocab_size, len(ROUTER) * routed)
    parameters = sum(p.numel() for p in engine.module.parameters())

    def block() -> dict[str, Any]:
        micro_batches = [[next(stream)] for _ in range(arguments.updates)]
        seconds, stats = timed(lambda: [engine.train_step(batch, RATE) for batch in micro_batches])
        return {
            "seconds": seconds, "tokens": arguments.updates * arguments.rows * arguments.length,
            "parameters": parameters, "losses": [step.losses[0] for step in stats],
            "norms": [step.grad_norm for step in stats],
        }  # fmt: skip

    return block


def batches(arguments: BenchmarkArguments, vocab_size: int, num_routed: int) -> Iterator[Batch]:
    """Full rows of random tokens, the same for every side; the last token of the vocabulary stands for a hidden one.

    Args: num_routed: objectives that are counted over all tokens.
    """
    rng, shape = np.random.default_rng(0), (arguments.rows, arguments.length)
    while True:
        ids = torch.from_numpy(rng.integers(0, vocab_size, shape))
        index = torch.from_numpy(np.sort(rng.permutation(ids.numel())[: math.ceil(MASKED * ids.numel())]))
        inputs = {
            "input_ids": ids.flatten().index_fill(0, index, vocab_size - 1).view(shape),
            "attention_mask": torch.ones_like(ids),
            "token_type_ids": torch.zeros_like(ids),
            "target_index": index,
            "target_ids": ids.flatten()[index],
        }
        yield Batch(inputs, (len(index), *[ids.numel()] * num_routed), ids.numel())


def ours(config: PreTrainedConfig) -> nn.Module:
    """An encoder of this project as it is pre-trained."""
    encoder = build_encoder(config, seed=0)
    torch.manual_seed(0)  # of its head
    return EncoderPretraining(encoder, "mlm")


def replaced(kind: type[nn.Module], make: Callable[[Any, Any], nn.Module], config: PreTrainedConfig) -> nn.Module:
    """The same with other layers of the same weights in the place of those of a kind; a shared one stays shared."""
    module, made = ours(config), {}
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, kind):
                if layer not in made:
                    made[layer] = make(layer, config)
                setattr(parent, name, made[layer])
    return module


class LoopSwitch(nn.Module):
    """The Switch layer expert by expert, each with weights of its own. For full rows."""

    def __init__(self, layer: SwitchFeedForward, config: TransformerConfig) -> None:
        super().__init__()
        self.router, self.act_fn, self.capacity_factor = layer.router, layer.act_fn, config.capacity_factor
        self.w_in = nn.ParameterList(weight.clone() for weight in layer.w_in.detach())
        self.w_out = nn.ParameterList(weight.clone() for weight in layer.w_out.detach())

    def forward(self, hidden: torch.Tensor, real: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """As SwitchFeedForward."""
        flat = hidden.flatten(0, 1)
        logits = self.router(flat)
        gate, choice = logits.softmax(-1).max(-1)
        capacity = math.ceil(self.capacity_factor * len(flat) / len(self.w_in))
        outputs = torch.zeros_like(flat)
        for expert, (w_in, w_out) in enumerate(zip(self.w_in, self.w_out, strict=True)):
            places = (choice == expert).nonzero().squeeze(1)[:capacity]
            found = self.act_fn(flat[places] @ w_in) @ w_out
            outputs[places] = (found * gate[places].unsqueeze(1)).to(outputs.dtype)
        load = choice.bincount(minlength=len(self.w_in)) / len(flat)
        return outputs.view_as(hidden), router_losses(logits, load), load, (load * 0).sum()


class LibrarySwitch(nn.Module):
    """transformers' layer with the weights of ours, and its losses of the router, which the library computes outside of
    the layer. For full rows."""

    def __init__(self, layer: SwitchFeedForward, config: TransformerConfig) -> None:
        super().__init__()
        self.capacity_factor, self.num_experts = config.capacity_factor, config.n_experts
        self.layer = SwitchTransformersSparseMLP(
            SwitchTransformersConfig(
                d_model=config.hidden_size,
                d_ff=config.ff_dim,
                num_experts=config.n_experts,
                dense_act_fn={"swish": "silu"}.get(config.act_fn, config.act_fn),
                dropout_rate=0.0,
                router_jitter_noise=0.0,  # it would change the layer's input in place
            )
        )
        self.layer.router.register_forward_hook(self.keep_logits)
        with torch.no_grad():
            self.layer.router.classifier.weight.copy_(layer.router.weight)
            for expert, dense in enumerate(self.layer.experts.values()):
                dense.wi.weight.copy_(layer.w_in[expert].T)
                dense.wo.weight.copy_(layer.w_out[expert].T)

    def keep_logits(self, router: nn.Module, inputs: tuple, outputs: tuple[torch.Tensor, ...]) -> None:
        """(1, N, E) of the tokens as one row."""
        self.logits = outputs[2].squeeze(0).float()

    def forward(self, hidden: torch.Tensor, real: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """As SwitchFeedForward."""
        row = hidden.flatten(0, 1).unsqueeze(0)
        self.layer.router.expert_capacity = math.ceil(self.capacity_factor * row.shape[1] / self.num_experts)
        outputs = self.layer(row).view_as(hidden)
        load = self.logits.argmax(-1).bincount(minlength=self.num_experts) / row.shape[1]
        return outputs, router_losses(self.logits, load), load, (load * 0).sum()


def batched(layer: SwitchFeedForward, config: TransformerConfig) -> SwitchFeedForward:
    """Ours as it computes where there is no grouped product."""
    layer.grouped = layer.batched
    return layer


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
        self.register_buffer("mask", self.widened(kernels, config).detach())

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


class BertLosses(nn.Module):
    """BertForMaskedLM, called as an encoder of this project in pre-training.

    Args: everywhere: with its own losses, a mean over labels that are not -100; else its head at hidden tokens alone.
    """

    def __init__(self, everywhere: bool, config: PreTrainedConfig) -> None:
        super().__init__()
        self.everywhere = everywhere
        heads = config.num_heads if isinstance(config, TransformerConfig) else max(1, config.hidden_size // 64)
        torch.manual_seed(0)
        self.lm = BertForMaskedLM(BertConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, num_attention_heads=heads,
            num_hidden_layers=config.num_hidden_layers, intermediate_size=config.ff_dim,
            max_position_embeddings=config.max_position_embeddings, type_vocab_size=config.type_vocab_size,
            pad_token_id=config.pad_token_id, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        ))  # fmt: skip

    def forward(self, target_index: torch.Tensor, target_ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """The sum of the losses."""
        if not self.everywhere:
            hidden = self.lm.bert(**inputs).last_hidden_state.flatten(0, 1)[target_index]
            return F.cross_entropy(self.lm.cls(hidden).float(), target_ids, reduction="sum")
        labels = torch.full_like(inputs["input_ids"], IGNORE)
        labels.view(-1)[target_index] = target_ids
        return self.lm(**inputs, labels=labels).loss * len(target_ids)


SIDES: dict[str, dict[str, Callable[[PreTrainedConfig], nn.Module]]] = {
    "transformer": {
        "this project": ours,
        "loop over experts": partial(replaced, SwitchFeedForward, LoopSwitch),
        "batched products": partial(replaced, SwitchFeedForward, batched),
        "transformers' Switch layer": partial(replaced, SwitchFeedForward, LibrarySwitch),
        BERT: partial(BertLosses, True),
        f"{BERT}, head at hidden tokens": partial(BertLosses, False),
    },
    "mix_lm": {
        "this project": ours,
        "masked large kernel": partial(replaced, MixedConvolution, MaskedConvolution),
        BERT: partial(BertLosses, True),
        f"{BERT}, head at hidden tokens": partial(BertLosses, False),
    },
}

if __name__ == "__main__":
    run_main(main)
