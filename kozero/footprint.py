"""Memory of a rank before there is one: what DeepSpeed 0.19.8 and DDP hold by formula, activations by a trace.

Theirs is more than the paper's formula (kozero.plan): 32-bit weights in fp32 too, gradients that are copied before an
update, buckets, gathered weights.
"""

import math
from dataclasses import dataclass

from kozero.trace import Traced


@dataclass(frozen=True)
class ZeroSizes:
    """What of a DeepSpeed JSON decides memory, in elements; `buckets`: gradients that travel lie in so many."""

    reduce_bucket: int
    buckets: int
    max_live: int
    prefetch: int
    offload_optimizer: bool
    offload_param: bool
    pinned: bool = False


@dataclass(frozen=True)
class Setting:
    """How a model is spread, and what the command line says.

    Numbers of parameters: in all, those that train, those that the backward pass crosses, those of the largest tensor.
    """

    total: int
    trainable: int
    crossed: int
    largest: int
    stage: int
    world_size: int
    dtype: str
    accumulation: int
    zero: ZeroSizes | None = None  # None at stage 0, which is PyTorch's
    moments: int = 8  # bytes of an optimizer's states a trained parameter: AdamW's two in 32 bit, 0 of SGD

    @property
    def width(self) -> int:
        """Bytes of a weight and of a gradient. PyTorch's autocast keeps both in 32 bit, DeepSpeed does not."""
        return 4 if self.dtype == "fp32" or self.stage == 0 else 2

    @property
    def own(self) -> float:
        """Trained parameters whose states are this rank's."""
        return self.trainable / (self.world_size if self.stage else 1)

    @property
    def gradient_share(self) -> float:
        """What stays of a gradient that backward has made, where it has no place yet (see `gradients_before`)."""
        if self.gradients_before() or (self.zero and self.zero.offload_optimizer):
            return 0.0
        return 1 / self.world_size if self.stage == 2 else 1.0

    def gradients_before(self) -> float:
        """Bytes of gradients that are there when the largest backward pass begins: those of earlier micro batches,
        DDP's buckets, and the buffer of ZeRO-3."""
        if self.stage == 3:
            return self.width * self.own
        copies = self.accumulation > 1
        if self.stage == 0 and self.world_size > 1:  # earlier micro batches' gradients lie beside the buckets
            copies += 1
        return copies * self.width * (self.own if self.stage == 2 else self.trainable)


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank at its peak, by what they are; those that lie in the memory of the machine instead; and frozen
    weights that rank 0 alone keeps there as they came in, for the export. loading: what is there before training."""

    device: dict[str, float]
    host: float
    kept: float
    loading: float

    @property
    def peak(self) -> float:
        """All of the device."""
        return sum(self.device.values())


def footprint(setting: Setting, step: Traced) -> Footprint:
    """The peak of a step: in backward, or in the update that follows when the activations are gone. `step` is traced of
    one micro batch with the setting's gradient_share."""
    zero = setting.zero
    weights = setting.width * setting.total / (setting.world_size if setting.stage == 3 else 1)
    # DeepSpeed keeps 32-bit weights of its own, in fp32 too.
    states = (setting.moments + (4 if setting.stage else 0)) * setting.own
    before = setting.gradients_before()
    kept = 4.0 * (setting.total - setting.trainable) if setting.width == 2 else 0.0
    host = 0.0
    if zero and zero.offload_param:
        weights, host = 0.0, host + weights
    if zero and zero.offload_optimizer:
        states, before, host = 0.0, 0.0, host + offloaded(setting)
    backward = {
        "weights": weights, "optimizer": states, "gradients": before + step.gradients,
        "activations": step.activations, "logits": step.logits, "buffers": buffers(setting, step.logits),
    }  # fmt: skip
    update = {"weights": weights, "optimizer": states, "gradients": update_gradients(setting)}
    largest = max(backward, update, key=lambda parts: sum(parts.values()))
    return Footprint(largest, host, kept, loading=4.0 * setting.total)


def offloaded(setting: Setting) -> float:
    """Bytes of the machine's memory for 32-bit weights, moments and gradients, and for gradients and weights on their
    way; at stage 2 also for the sums of micro batches and the largest tensor. PyTorch rounds what is pinned up to a
    power of two (CachingHostAllocator.h); moments are not."""

    def taken(size: float) -> float:
        return 2.0 ** math.ceil(math.log2(size)) if setting.zero.pinned and size else size

    two, own, width = setting.stage == 2, setting.own, setting.width
    sums = two and setting.accumulation > 1
    largest = taken(width * setting.largest) if two else 0.0
    return 2 * taken(4 * own) + setting.moments * own + taken(width * own) * (1 + sums) + largest


def buffers(setting: Setting, logits: float) -> float:
    """Bytes that DeepSpeed holds in backward: buckets of gradients on their way, and at stage 3 gathered weights.

    Those arrive in one piece, which lies beside their copies until it is dealt out: once the logits are gone.
    """
    zero = setting.zero
    if zero is None:
        return 0.0
    if setting.stage < 3:
        on_its_way = setting.largest if zero.offload_optimizer else 0
        return setting.width * (zero.reduce_bucket * zero.buckets + on_its_way)
    if setting.world_size == 1 and not zero.offload_param:
        return setting.width * zero.reduce_bucket
    gathered, arriving = min(setting.crossed, zero.max_live), min(setting.crossed, zero.prefetch)
    kept = setting.largest  # the tied embedding is the last weight of one pass and the first of the next
    return setting.width * (zero.reduce_bucket + gathered + kept) + max(0.0, setting.width * arriving - logits)


def update_gradients(setting: Setting) -> float:
    """Bytes of gradients in an update. DeepSpeed 0.19.8 copies its share of them into one tensor, in 16 bit into
    another one in 32 bit besides; at stage 2 sums of several micro batches are copied once more before."""
    zero = setting.zero
    if zero is None:
        return setting.gradients_before() or 4 * setting.trainable
    if zero.offload_optimizer:
        return 0.0
    copies = 2 * setting.width + (4 if setting.width == 2 else 0)
    if setting.stage == 2 and setting.accumulation > 1:
        copies = max(copies, 3 * setting.width)
    return copies * setting.own
