"""A random order of any number of rows that is computed where it is needed and held nowhere, and rows in that order."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from kozero.config import BatchSizes
from kozero.data.batch import Batch, deal

ROUNDS = 10  # of the Feistel network, as in FF1 (NIST SP 800-38G); four shuffle a dozen rows unevenly
GROUPS = 50  # of rows that are sorted by length together
MIX = np.array([0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53], dtype=np.uint64)  # multipliers of MurmurHash3's finaliser


def permute(places: np.ndarray, num: int, key: Sequence[int]) -> np.ndarray:
    """Where a random permutation of range(num) sends (N,) places. O(N) time and memory, whatever `num`.

    A balanced Feistel network permutes the next power of four; a value that falls outside range(num) is sent on until
    it falls inside (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). `key` names the
    permutation, e.g. (seed, epoch).
    """
    half = np.uint64(max(1, -(-(num - 1).bit_length() // 2)))
    keys = np.random.default_rng(list(key)).integers(0, 2**63, ROUNDS, dtype=np.uint64)
    values = feistel(places.astype(np.uint64), half, keys)
    while len(outside := np.flatnonzero(values >= num)):
        values[outside] = feistel(values[outside], half, keys)
    return values.astype(np.int64)


def feistel(values: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    """One pass over numbers of 2 * half bits."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (mixed(right + key) & mask)
    return (left << half) | right


def mixed(values: np.ndarray) -> np.ndarray:
    """64 bits of which each depends on all."""
    for factor in MIX:
        values = (values ^ (values >> np.uint64(33))) * factor
    return values ^ (values >> np.uint64(33))


@dataclass
class Order:
    """Which row stands at a place of an endless stream of epochs.

    An epoch is `epoch_rows` rows drawn without repetition from `num`, in an order that depends on (seed, epoch) alone
    and is computed a window at a time. The rows of a group (one step) have about the same length: windows of GROUPS
    groups are sorted by length, then their groups change places.
    """

    num: int
    epoch_rows: int
    group: int
    seed: int
    lengths: Callable[[np.ndarray], np.ndarray]
    windows: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)

    def __getitem__(self, place: int) -> int:
        epoch, offset = divmod(place, self.epoch_rows)
        window, k = divmod(offset, GROUPS * self.group)
        known = self.windows  # another thread may put others in its place
        if (epoch, window) not in known:
            recent = list(known)[-1:]  # a step touches two windows, or some short epochs one after the other
            self.windows = known = {key: known[key] for key in recent} | {(epoch, window): self.window(epoch, window)}
        return int(known[epoch, window][k])

    def window(self, epoch: int, window: int) -> np.ndarray:
        """The rows of a window."""
        start = window * GROUPS * self.group
        places = np.arange(start, min(start + GROUPS * self.group, self.epoch_rows))
        rows = permute(places, self.num, (self.seed, 3, epoch))
        rows = rows[np.argsort(-self.lengths(rows), kind="stable")]
        whole = len(rows) // self.group * self.group
        groups = rows[:whole].reshape(-1, self.group)
        moved = np.random.default_rng([self.seed, 4, epoch, window]).permutation(groups)
        return np.concatenate([moved.ravel(), rows[whole:]])


ABSENT = -1  # the place of no row: fills the last batch of an evaluation


class OrderedRows(ABC):
    """The Rows (see kozero/data/batch.py) that an Order picks from numbered ones."""

    order: Order

    def __len__(self) -> int:
        return self.order.epoch_rows

    def step(self, consumed: int, sizes: BatchSizes, rank: int) -> list[Batch]:
        """The micro batches of one rank in the step that begins after `consumed` rows."""
        return [self.batch(places) for places in deal(consumed, sizes, rank)]

    def examples(self, consumed: int, sizes: BatchSizes, rank: int) -> list[int]:
        """Numbers of the rows that one rank reads in a step."""
        return [number for places in deal(consumed, sizes, rank) for number in self.numbers(places).tolist()]

    def num_tokens(self, consumed: int, group: int) -> int:
        """Tokens of the `group` rows that begin after `consumed`."""
        return int(self.lengths(self.numbers(range(consumed, consumed + group))).sum())

    def numbers(self, places: Sequence[int]) -> np.ndarray:
        """(N,) numbers of the rows at some places of the stream, -1 at ABSENT ones."""
        return np.array([self.order[place] if place != ABSENT else -1 for place in places], dtype=np.int64)

    @abstractmethod
    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """(N,) tokens of some rows, as Batch.num_tokens counts them."""

    @abstractmethod
    def batch(self, places: Sequence[int]) -> Batch:
        """One forward pass over the rows at some places."""
