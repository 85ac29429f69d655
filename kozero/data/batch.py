"""What a rank computes in one forward pass, and the stream of rows that it is cut from, whatever the objective."""

from dataclasses import dataclass
from typing import Protocol

import torch

from kozero.config import BatchSizes


@dataclass
class Batch:
    """One forward pass of a module with K objectives, of which most have one.

    `inputs` are the arguments of the module, which returns the sum of the losses of each objective: (K,), or a scalar
    for one. `num_targets` are the K numbers of targets that the sums run over.
    """

    inputs: dict[str, torch.Tensor]
    num_targets: tuple[int, ...]
    num_tokens: int  # tokens of texts: no padding, and of an encoder's rows no special tokens

    def to(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The module's arguments on a device."""
        return {name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()}


class Rows(Protocol):
    """The stream of rows of a run: epoch after epoch, in an order that depends on (seed, epoch) alone, so that a place
    in it is one number, whatever the number of ranks."""

    def __len__(self) -> int:
        """Rows of an epoch."""

    def step(self, consumed: int, sizes: BatchSizes, rank: int) -> list[Batch]:
        """The micro batches of one rank in the step that begins after `consumed` rows."""

    def num_tokens(self, consumed: int, group: int) -> int:
        """Sum of the batches' num_tokens over all ranks in the `group` rows that begin after `consumed`."""
