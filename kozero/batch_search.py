"""The largest micro batch that fits into the memory of a rank, found by real steps.

The peak of a step of m rows is held + max(g, a + b m): what lies there between two steps (weights, optimizer states),
and above it either all gradients, or activations that grow with m. The first does not grow, so a line through two small
batches may be far too flat: with BERT's base size, rows of 128 tokens overtake the gradients after about four. What is
sure, as nothing begins below zero: for m' > m

    peak(m') - held <= (peak(m) - held) m' / m                        and
    peak(m') - peak(m) <= 2 added(m) (m' - m) / m

where `added` is what the first forward pass adds, when no gradients are there yet; a backward pass takes no more beside
what it frees than a forward pass made (2). Every probe is at most as large as the better of the two says, and as the
line through the last two says if that is less; the last probe is the check.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from kozero import distributed
from kozero.data.batch import Batch
from kozero.engines.base import Engine
from kozero.errors import UserError
from kozero.memory import Memory

MARGIN = 0.1  # share of the limit that is kept free: fragments, evaluation, checkpoints, other processes
MOST_ROWS = 4096  # of a micro batch: more makes a step longer and nothing faster
GROWTH = 8  # from one probe to the next at most: small batches measure little more than noise
ENOUGH = 1.05  # a probe that would be larger by less is not worth its time
MAX_PROBES = 12
MAX_SKIPPED = 40  # updates until fp16 has a loss scale that takes one: it halves from 2**16
GIB = 2**30
ADVICE = "shorten the rows, give --gradient_checkpointing or a smaller model, or shard more (ZeRO-3, more ranks)"


@dataclass(frozen=True)
class Probe:
    """Bytes at the peak of a step, and those that its first forward pass added: the largest of all ranks, infinity
    where it ran out of memory."""

    rows: int
    peak: float
    added: float


@dataclass(frozen=True)
class Room:
    """Bytes of a rank, the least of all: `held` between two steps, the `limit`."""

    held: float
    limit: float

    @property
    def usable(self) -> float:
        """What a batch may take."""
        return self.limit * (1 - MARGIN)


class Prober:
    """Measures steps on an engine that is thrown away. Every rank does the same and gets the same answers.

    Args: build: a new engine with fresh weights; batches: the micro batches of one step of this rank, of so many of the
        largest rows each.
    """

    def __init__(self, build: Callable[[], Engine], batches: Callable[[int], Sequence[Batch]], memory: Memory) -> None:
        self.build, self.batches, self.memory = build, batches, memory
        self.engine: Engine | None = None

    def warm_up(self) -> Room:
        """Build the engine and take an update of one row: afterwards optimizer states and buffers are there."""
        self.engine = self.build()
        for _ in range(MAX_SKIPPED):
            if self.engine.train_step(self.batches(1), 0.0).applied:
                break
        return Room(-agreed_largest(-self.memory.reset()), -agreed_largest(-self.memory.limit()))

    def measure(self, rows: int) -> Probe:
        """Two updates, the second with what the first left in the allocator.

        Raises: UserError when a rank of several runs out of memory: the others may wait inside a collective that it
            has not reached, and nothing but its end ends that.
        """
        if self.engine is None:
            self.warm_up()
        self.memory.reset()
        before, after = [], []  # each forward pass; what an engine gathers for all of it is there before
        hooks = [
            self.engine.module.register_forward_pre_hook(lambda *_: before.append(self.memory.peak())),
            self.engine.module.register_forward_hook(lambda *_: after.append(self.memory.peak())),
        ]
        try:
            for _ in range(2):
                self.engine.train_step(self.batches(rows), 0.0)
        except torch.cuda.OutOfMemoryError:
            if distributed.world_size() > 1:
                raise UserError(
                    f"--train_batch_size 0: out of GPU memory in a probe of {rows} rows; give a smaller number of rows"
                ) from None
        else:
            return Probe(rows, agreed_largest(self.memory.peak()), agreed_largest(after[0] - before[0]))
        finally:
            for hook in hooks:
                hook.remove()
        self.close()  # outside the handler, whose traceback holds the activations
        return Probe(rows, math.inf, math.inf)

    def close(self) -> None:
        """Let go of everything."""
        if self.engine is not None:
            self.engine.close()
        self.engine = None
        self.memory.reset()


def agreed_largest(value: float) -> float:
    """The largest value of all ranks."""
    tensor = torch.tensor(value, dtype=torch.float64, device=distributed.device())
    return distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX).item()


def largest_micro_batch(prober: Prober, most: int) -> int:
    """Rows of the largest micro batch that leaves MARGIN of the memory free, `most` at most. Says what it does.

    Raises: UserError when one row is too much.
    """
    distributed.say("batch: looking for the largest that fits; --train_batch_size sets it")
    try:
        room = prober.warm_up()
        return search(prober.measure, room, min(most, MOST_ROWS))
    except torch.cuda.OutOfMemoryError:  # of one row: ranks that wait for this one end with it
        raise UserError("--train_batch_size 0: one row on a rank does not fit into GPU memory; " + ADVICE) from None
    finally:
        prober.close()


def search(measure: Callable[[int], Probe], room: Room, most: int) -> int:
    """Probe by probe to the largest number of rows that was measured to fit."""
    rows, fit, over = 1, [], None
    for _ in range(MAX_PROBES):
        probe = measure(rows)
        fits = probe.peak <= room.usable
        said = f"{probe.peak / GIB:.3g} GiB" if probe.peak < math.inf else "out of memory"
        distributed.say(f"batch: {amount(rows)} a rank, {said}{'' if fits else ': too much'}")
        if fits:
            fit.append(probe)
        else:
            over = probe
        if not fit:
            raise UserError(
                f"--train_batch_size 0: one row on a rank takes {said}, {room.usable / GIB:.3g} GiB of "
                f"{room.limit / GIB:.3g} GiB are to be used; {ADVICE}"
            )
        rows = min(most, between(fit[-1], over, room.usable) if over else beyond(fit, room))
        if rows < fit[-1].rows * ENOUGH:
            break
    found = fit[-1]
    end = ", more are not tried" if found.rows == most else ""
    limits = f"{found.peak / room.limit:.0%} of {room.limit / GIB:.3g} GiB, of which {MARGIN:.0%} are to stay free"
    distributed.say(f"batch: taking {amount(found.rows)} a rank{end}: {limits}")
    return found.rows


def amount(rows: int) -> str:
    """In words."""
    return f"{rows:,} rows" if rows != 1 else "1 row"


def beyond(fit: Sequence[Probe], room: Room) -> int:
    """The next rows to try above some that fit: what the line through the last two says, if that is sure."""
    last = fit[-1]
    utmost = (room.usable + room.limit) / 2  # where the line is wrong; half of the margin is still free then
    in_all = last.rows * ratio(utmost - room.held, last.peak - room.held)
    on_top = last.rows + last.rows * ratio(utmost - last.peak, 2 * last.added)
    line = math.inf
    if len(fit) > 1:
        before = fit[-2]
        line = last.rows + (last.rows - before.rows) * ratio(room.usable - last.peak, last.peak - before.peak)
    return int(min(max(in_all, on_top), line, last.rows * GROWTH))


def between(fit: Probe, over: Probe, usable: float) -> int:
    """Rows between some that fit and some that do not: on the line between them, which lies above the curve."""
    if over.peak == math.inf:
        return (fit.rows + over.rows) // 2
    return fit.rows + int((over.rows - fit.rows) * ratio(usable - fit.peak, over.peak - fit.peak))


def ratio(part: float, whole: float) -> float:
    """part / whole, infinity where nothing was measured to grow."""
    return part / whole if whole > 0 else math.inf
