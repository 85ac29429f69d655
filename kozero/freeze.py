"""Which parts of a language model train: a plan compiled before the engine is built."""

import hashlib
import re
from dataclasses import dataclass

import torch
from torch import nn

from kozero.errors import UserError, nearest
from kozero.plan import ModelShape

PAUSE = "pause"  # the pause row alone, a part of its own when the embedding is frozen


@dataclass(frozen=True)
class FreezePlan:
    """Parts that train and parts that do not: wte, wpe, h.0 ... h.{L-1}, ln_f, and `pause` where there are pauses."""

    trainable: frozenset[str]
    frozen: frozenset[str]

    @property
    def separate_pause(self) -> bool:
        """The pause row trains while its embedding does not, so it must be a parameter of its own."""
        return PAUSE in self.trainable and "wte" in self.frozen


def compile_plan(text: str | None, num_layers: int, has_pause: bool) -> FreezePlan:
    """Read `--freeze`.

    `wte,wpe,h.0-5` freezes what it names; `all_but:h.6-11,ln_f` trains what it names. `lm_head` is the same
    parameter as `wte`. The pause row belongs to `wte` as long as that trains.

    Raises: UserError for a part that does not exist, a plan that trains nothing, or one that contradicts itself.
    """
    parts = {"wte", "wpe", "ln_f", *(f"h.{n}" for n in range(num_layers))} | ({PAUSE} if has_pause else set())
    text = (text or "").strip()
    inverse = text.startswith("all_but:")
    names = expand(text.removeprefix("all_but:"), parts, num_layers, has_pause)
    if "lm_head" in names and "wte" not in names:
        kind, other = ("train", "freeze") if inverse else ("freeze", "train")
        raise UserError(
            f"--freeze {text}: lm_head and wte are one tied parameter, the plan would {kind} the one and {other} the "
            "other; name both or neither"
        )
    named = names - {"lm_head"}
    trainable = named if inverse else parts - named
    if inverse and "wte" in named:
        trainable = trainable | ({PAUSE} & parts)
    frozen = parts - trainable
    if PAUSE in frozen and "wte" in trainable:
        raise UserError(f"--freeze {text}: the pause row is a row of wte, which trains; freeze wte too")
    if not trainable:
        raise UserError(f"--freeze {text}: nothing is left to train; the parts are {describe_parts(num_layers)}")
    return FreezePlan(frozenset(trainable), frozenset(frozen))


def expand(text: str, parts: set[str], num_layers: int, has_pause: bool) -> set[str]:
    """Names of a comma-separated list with ranges written out."""
    names: set[str] = set()
    for item in filter(None, (item.strip() for item in text.split(","))):
        layers = re.fullmatch(r"h\.(\d+)(?:-(\d+))?", item)
        if layers:
            first, last = int(layers[1]), int(layers[2] or layers[1])
            if first > last:
                raise UserError(f"--freeze {item}: runs backwards; write h.{last}-{first}")
            if last >= num_layers:
                raise UserError(f"--freeze {item}: the model has {num_layers} layers, h.0 to h.{num_layers - 1}")
            names |= {f"h.{n}" for n in range(first, last + 1)}
        elif item == PAUSE and not has_pause:
            raise UserError(f"--freeze {item}: this run has no pauses; set --num_pauses")
        elif item in parts | {"lm_head"}:
            names.add(item)
        else:
            known = sorted(parts | {"lm_head", "h.0-1"})
            message = f"--freeze {item}: no such part{nearest(item, known)}; the parts are {describe_parts(num_layers)}"
            raise UserError(message)
    return names


def describe_parts(num_layers: int) -> str:
    """The parts that `--freeze` knows, for a message."""
    return f"wte, wpe, h.0-{num_layers - 1}, ln_f, lm_head (= wte), pause"


def apply_plan(plan: FreezePlan, module: nn.Module) -> None:
    """Set requires_grad of every parameter of a CausalLM. Engines come after this."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(part_of(name) in plan.trainable)


def part_of(name: str) -> str:
    """The part that a parameter belongs to: `lm.transformer.h.3.attn.c_attn.weight` is of `h.3`."""
    if name.endswith("pause_row"):
        return PAUSE
    match = re.search(r"transformer\.(h\.\d+|\w+)\.", name)
    return match[1] if match else "wte"  # lm_head.weight is the tied wte


def skipped_layers(plan: FreezePlan, num_layers: int) -> int:
    """Blocks at the bottom that no gradient has to cross: all frozen, and nothing trainable below them.

    Autograd skips them by itself (their inputs need no gradient), so they keep no activations either.
    """
    if plan.trainable & {"wte", "wpe", PAUSE}:
        return 0
    return next((n for n in range(num_layers) if f"h.{n}" in plan.trainable), num_layers)


def trained_below(plan: FreezePlan) -> list[str]:
    """What keeps `skipped_layers` at 0."""
    return [part for part in ("wte", "wpe", PAUSE) if part in plan.trainable] or ["h.0"]


def speedup(plan: FreezePlan, shape: ModelShape, length: int, cached: bool = False) -> float:
    """Floating-point operations of a full training step over those of this plan, at rows of `length` tokens, where
    skipped layers are computed in each step or `cached`."""
    everything = FreezePlan(plan.trainable | plan.frozen, frozenset())
    return step_flops(everything, shape, length) / step_flops(plan, shape, length, cached=cached)


def step_flops(
    plan: FreezePlan, shape: ModelShape, length: float, predicted: float = 1.0, cached: bool = False
) -> float:
    """Floating-point operations of a training step a token, in texts of `length` tokens.

    Forward 1, gradients of activations 1, gradients of weights 1: PaLM's count (Chowdhery et al. 2022, arXiv
    2204.02311, appendix B) of 2 operations a weight and token, plus 4 T H a layer for attention, which has no weights
    and is counted whole although its mask is causal. Where all train that is 6 N + 12 L H T.

    Args: predicted: share of the tokens that the head is computed for; cached: skipped layers are not computed.
    """
    blocks = shape.block_parameters
    attention = 2 * length * shape.hidden  # in units of 2 operations, as the weights are
    head = predicted * shape.vocab_size * shape.hidden
    skipped = skipped_layers(plan, shape.num_layers)
    trained = sum(f"h.{n}" in plan.trainable for n in range(shape.num_layers))
    crossed = shape.num_layers - skipped
    forward = (crossed if cached else shape.num_layers) * (blocks + attention) + head
    through_activations = crossed * (blocks + 2 * attention) + head  # attention: both its inputs are activations
    weights = trained * blocks + (head if "wte" in plan.trainable else 0)
    return 2 * (forward + through_activations + weights)


def count_parameters(module: nn.Module) -> dict[str, int]:
    """Parameters by total and trainable, tied ones once. Before an engine shards them."""
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return {"total": sum(size for size, _ in sizes), "trainable": sum(size for size, trains in sizes if trains)}


def frozen_weights(module: nn.Module) -> str | None:
    """A hash by which a resumed run knows whether it has the frozen weights of the one before, which checkpoints leave
    out: of the first thousand numbers of each. None without any. Before an engine shards or casts them."""
    frozen = [p.detach().flatten()[:1000] for p in module.parameters() if not p.requires_grad]
    return hashlib.sha256(torch.cat(frozen).float().numpy().tobytes()).hexdigest()[:16] if frozen else None


def full_hash(module: nn.Module) -> str:
    """A hash of all parameters of a module in 32 bit on the CPU. About 1.5 GB/s."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().contiguous().numpy())
    return digest.hexdigest()


def report(
    plan: FreezePlan, counts: dict[str, int], shape: ModelShape, length: int, saved_bytes: float, cached: bool = False
) -> list[str]:
    """Lines that tell what trains, what freezing saves, and what it does not save. For `cached` see speedup."""
    total, trainable = counts["total"], counts["trainable"]
    lines = [f"parameters: {total:,} in all, {trainable:,} train, {total - trainable:,} frozen"]
    if not plan.frozen:
        return lines
    factor = speedup(plan, shape, length, cached)
    skipped = skipped_layers(plan, shape.num_layers)
    lines.append(f"freezing saves {saved_bytes / 2**20:,.1f} MiB of gradients and optimizer states on each rank")
    if skipped:
        where = f"a step begins at h.{skipped}" if cached else f"backward stops above h.{skipped - 1}"
        lines.append(f"{where}: {factor:.2f} times less arithmetic than training all")
    else:
        below = ", ".join(trained_below(plan))
        lines.append(
            f"backward crosses all layers, because {below} below them trains: {factor:.2f} times less arithmetic than "
            "training all"
        )
    return lines
