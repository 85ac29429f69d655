"""The one seam between training and the libraries that shard it."""

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kozero import distributed
from kozero.data.batch import Batch
from kozero.engines.pieces import Piece, Saved, States, collect
from kozero.errors import UserError

SCALE = "loss_scale.json"
LEAST_SCALE = 1.0  # of fp16: a loss that overflows unscaled needs another precision


@dataclass(frozen=True)
class StepStats:
    """What one training step did.

    `losses` are the means over all targets of the step, in nats, one an objective, None for one without targets;
    `grad_norm` is taken before clipping; `applied` is False when the update was skipped because a gradient was not
    finite; `loss_scale` is the one that this step used; `own` (K,) this rank's part of the losses.
    """

    losses: tuple[float | None, ...]
    grad_norm: float
    applied: bool
    loss_scale: float
    own: torch.Tensor | None = None

    @property
    def loss(self) -> float:
        """What the step made smaller."""
        return sum(loss for loss in self.losses if loss is not None)


class Engine(ABC):
    """One model with its optimizer, sharded one way. It is given a module that is on no device and wraps it in the
    order that its library demands; from then on it owns both. Every method is collective.

    The module's forward takes the `inputs` of a Batch and returns the sums of the losses of its objectives.
    """

    module: nn.Module  # unwrapped, for generation and export
    lockstep = False  # True when a forward pass needs all ranks: parameters are gathered from them

    @abstractmethod
    def train_step(self, micro_batches: Sequence[Batch], lr: float) -> StepStats:
        """Exactly one optimizer update at rate `lr`. The loss of an objective is the sum over all targets of all micro
        batches and ranks, divided by their number, however they are spread."""

    @contextmanager
    @abstractmethod
    def evaluating(self) -> Iterator[nn.Module]:
        """The module to call for evaluation: no dropout, no gradients, the run's precision."""

    @abstractmethod
    def pieces(self) -> list[Piece]:
        """What this rank holds of the trained parameters in 32 bit."""

    @abstractmethod
    def optimizer_states(self) -> States:
        """Of this rank's pieces."""

    @abstractmethod
    def loss_scale_state(self) -> dict[str, float]:
        """How the dynamic loss scale of fp16 goes on: `scale`, and `applied`, the updates since it last changed or one
        was skipped. Empty in other precisions."""

    @abstractmethod
    def set_loss_scale_state(self, state: dict[str, float]) -> None:
        """The reverse."""

    def snapshot(self) -> dict[str, Any]:
        """What `load` needs to go on exactly: tensors and plain values, by name of the file that this rank writes them
        to (see kozero.files.write_file). The tensors are those of the engine, which a next step changes."""
        mine = collect(self.pieces(), self.optimizer_states())
        files = {f"rank{distributed.rank()}.safetensors": mine} if mine else {}
        return files | ({SCALE: self.loss_scale_state()} if distributed.is_main() else {})

    def load(self, folder: Path) -> Saved:
        """Go on from the files of a snapshot, whatever engine and however many ranks wrote them.

        Raises: UserError when they are of another model.
        """
        saved, pieces = Saved(sorted(folder.glob("rank*.safetensors"))), self.pieces()
        known = set().union(*distributed.gather({piece.name for piece in pieces}))
        if more := sorted(saved.kinds.keys() - known):
            raise UserError(f"a checkpoint of another model: it holds {more[0]}, which this one lacks")
        saved.restore(pieces, self.optimizer_states())
        if scale := json.loads((folder / SCALE).read_text(encoding="utf-8")):
            self.set_loss_scale_state(scale)
        return saved

    @abstractmethod
    def full_state_dict(self) -> dict[str, torch.Tensor] | None:
        """All parameters in 32 bit on the CPU of rank 0, None on the other ranks."""

    def close(self) -> None:
        """Let go of what the library holds. The last call."""
        return


def count_targets(micro_batches: Sequence[Batch]) -> torch.Tensor:
    """(K,) targets of the step over all micro batches and ranks, on the device, so that the host waits for nothing."""
    mine = torch.tensor([batch.num_targets for batch in micro_batches], dtype=torch.float32).sum(0)
    return distributed.all_reduce(mine.to(distributed.device(), non_blocking=True))


def known_losses(losses: Sequence[float], num_targets: Sequence[float]) -> tuple[float | None, ...]:
    """Mean losses of the objectives of a step; None for one that had no targets."""
    return tuple(loss if num else None for loss, num in zip(losses, num_targets, strict=True))
