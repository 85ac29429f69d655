"""The ways to spread a fine-tuning run over a machine: which fit, and which of those is the fastest."""

import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.planned import PlannedModel
from kozero.config import BatchSizes, TrainingArguments
from kozero.ds_config import resolve
from kozero.footprint import Footprint, ZeroSizes

ROOT = Path(__file__).parent.parent
SHIPPED = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")  # in ds_configs/
# What ranks the ways: orders of magnitude of a GPU and its links, no prediction of time.
FLOPS, MEMORY, LINK, CPU = 5e13, 1e12, 2e10, 1e10  # operations, bytes of GPU memory, of a link, of the CPU's, a second
BUSY_TOKENS = 1024  # a micro batch of so many keeps a GPU busy for half of the time: it waits for launches
HOOK_SECONDS = 2e-4  # of a parameter in backward, where Python sends its gradient away


@dataclass(frozen=True)
class Way:
    """A DeepSpeed JSON on a number of ranks, and whether activations are made anew in backward."""

    path: str
    ranks: int
    checkpointing: bool
    stage: int
    zero: ZeroSizes | None

    @property
    def name(self) -> str:
        """The JSON's name, and whether activations are recomputed; as shown in tables."""
        return Path(self.path).stem + (" + checkpointing" if self.checkpointing else "")


def way(path: str | Path, checkpointing: bool, arguments: TrainingArguments, sizes: BatchSizes) -> Way:
    """A checked JSON.

    Raises: UserError for what train.py would refuse.
    """
    path = str(Path(path).resolve())
    resolved = resolve(replace(arguments, deepspeed_config=path), sizes)
    stage, zero = resolved["zero_optimization"]["stage"], None
    if stage:
        from kozero.engines.deepspeed import zero_sizes  # it takes seconds to import

        zero = zero_sizes(resolved, path)
    return Way(path, sizes.world_size, checkpointing, stage, zero)


@dataclass(frozen=True)
class Choice:
    """A way with its micro batch."""

    way: Way
    micro: int
    accumulation: int
    footprint: Footprint

    @property
    def host(self) -> float:
        """Bytes of the machine's memory with all ranks on it: what lies there, or what loading takes if that is
        more."""
        found = self.footprint
        return max(found.host * self.way.ranks + found.kept, found.loading * self.way.ranks)


@dataclass
class Planner:
    """Footprints of one model on one machine.

    Args: room, host: bytes of a GPU and of the machine; global_batch: rows of an update, over all ranks.
    """

    model: PlannedModel
    room: float
    host: float
    global_batch: int

    def choice(self, way: Way, micro: int, accumulation: int = 0) -> Choice:
        """A micro batch, summed until an update has its rows."""
        accumulation = accumulation or math.ceil(self.global_batch / (micro * way.ranks))
        found = self.model.footprint(micro, accumulation, way.ranks, way.stage, way.zero, way.checkpointing)
        return Choice(way, micro, accumulation, found)

    def fits(self, choice: Choice) -> bool:
        """Whether there is room on the GPU and in the machine."""
        return choice.footprint.peak <= self.room and choice.host <= self.host

    def largest(self, way: Way) -> Choice | None:
        """The largest micro batch that fits, of those that an update can fill; one that divides its rows."""
        share = max(1, self.global_batch // way.ranks)
        micros = [micro for micro in range(share, 0, -1) if share % micro == 0]
        found = [micros[0], *micros[1:][bisect_left(micros[1:], True, key=lambda m: self.fits(self.choice(way, m))) :]]
        # The first sums no gradients, so it alone may take less than a smaller one.
        return next(filter(self.fits, (self.choice(way, micro) for micro in found)), None)

    def seconds(self, choice: Choice) -> float:
        """What ranks the ways: an update by orders of magnitude."""
        way, counts = choice.way, self.model.counts
        total, trained = counts["total"], counts["trainable"]
        tokens, width = choice.micro * self.model.length, 4 if self.model.dtype == "fp32" or not way.stage else 2
        arithmetic = (8 if way.checkpointing else 6) * total * tokens * choice.accumulation / FLOPS
        found = arithmetic * (tokens + BUSY_TOKENS) / tokens
        if not way.stage and self.model.dtype != "fp32":  # autocast makes 16-bit weights in every pass
            found += choice.accumulation * 12 * total / MEMORY
        found += (choice.accumulation - 1) * 3 * width * trained / MEMORY
        others = (way.ranks - 1) / way.ranks
        sent = {0: 2 * width * trained, 1: 2 * width * trained}.get(way.stage, width * trained)
        if way.stage >= 2:  # gradients travel after every micro batch, and at stage 3 the weights do twice
            sent += choice.accumulation * width * (trained + (2 * total if way.stage == 3 else 0))
            found += choice.accumulation * HOOK_SECONDS * self.model.num_tensors
        found += others * sent / LINK
        if way.zero and way.zero.offload_optimizer:
            found += 28 * trained / way.ranks / CPU + 2 * width * trained / way.ranks / LINK
        if way.zero and way.zero.offload_param:
            found += choice.accumulation * 2 * width * total / LINK
        return found


def ways(ranks: int, arguments: TrainingArguments, sizes: BatchSizes) -> list[Way]:
    """The shipped JSONs, each with and without checkpoints of activations; on one rank those that shard alone are
    left out but one, since all stages are the same there."""
    names = [name for name in SHIPPED if ranks > 1 or name not in ("zero2", "zero3")]
    return [way(ROOT / f"ds_configs/{name}.json", again, arguments, sizes) for name in names for again in (False, True)]
