"""What a rank computes in one forward pass, and the stream of rows that it is cut from, whatever the objective."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from kozero import distributed
from kozero.config import BatchSizes

PAD_MULTIPLE = 8  # rows are padded to the longest of their batch, rounded up to this


@dataclass
class Batch:
    """One forward pass of a module with K objectives, of which most have one.

    `inputs` are the arguments of the module, which returns the sum of the losses of each objective: (K,), or a scalar
    for one. `num_targets` are the K numbers of targets that the sums run over.
    """

    inputs: dict[str, torch.Tensor]
    num_targets: tuple[int, ...]
    num_tokens: int  # tokens of texts: no padding, no pauses, and of an encoder's rows no special tokens

    def to(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The module's arguments on a device."""
        return {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}

    def pin_memory(self) -> None:
        """Move the arguments to memory that a GPU copies from while others go on."""
        self.inputs = {name: tensor.pin_memory() for name, tensor in self.inputs.items()}


class Rows(Protocol):
    """The stream of rows of a run: epoch after epoch, in an order that depends on (seed, epoch) alone, so that a place
    in it is one number, whatever the number of ranks."""

    def __len__(self) -> int:
        """Rows of an epoch."""

    def step(self, consumed: int, sizes: BatchSizes, rank: int) -> list[Batch]:
        """The micro batches of one rank in the step that begins after `consumed` rows."""

    def examples(self, consumed: int, sizes: BatchSizes, rank: int) -> list[int]:
        """Numbers of the training examples that one rank reads in the step that begins after `consumed` rows."""

    def num_tokens(self, consumed: int, group: int) -> int:
        """Sum of the batches' num_tokens over all ranks in the `group` rows that begin after `consumed`."""


def deal(consumed: int, sizes: BatchSizes, rank: int) -> list[list[int]]:
    """Places of a rank's micro batches: the global batch is dealt out to rank 0, 1, ..., then again."""
    starts = range(rank * sizes.micro, sizes.global_batch, sizes.micro * sizes.world_size)
    return [list(range(consumed + start, consumed + start + sizes.micro)) for start in starts]


def shares(lengths: Sequence[int] | np.ndarray, micro: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Numbers of this rank's rows, `micro` at once, the longest first, and of those that it computes: the longest row
    where none are left, as all ranks make the same number of forward passes."""
    order = np.argsort(-np.asarray(lengths), kind="stable")
    for start in range(0, len(order), micro * distributed.world_size()):
        first = start + distributed.rank() * micro
        mine = order[first : first + micro]
        yield mine, mine if len(mine) else order[:1]


def padded(rows: Sequence[np.ndarray], most: int, value: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths as (B, T) int64 with `value` behind them, and (B, T) 1 where they are. T is that of the
    longest rounded up, `most` at most."""
    length = min(most, -(-max(map(len, rows)) // PAD_MULTIPLE) * PAD_MULTIPLE)
    filled = np.full((len(rows), length), value, dtype=np.int64)
    mask = np.zeros((len(rows), length), dtype=np.int64)
    for k, row in enumerate(rows):
        filled[k, : len(row)], mask[k, : len(row)] = row, 1
    return filled, mask
