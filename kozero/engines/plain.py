"""The engine without sharding: PyTorch alone, DistributedDataParallel when there are several ranks."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kozero import distributed
from kozero.config import TrainingArguments
from kozero.engines.base import cpu_copy
from kozero.engines.torch_engine import TorchEngine
from kozero.errors import UserError
from kozero.optim import build_optimizer, parameter_groups, settings_kept


class PlainEngine(TorchEngine):
    """All weights, gradients and optimizer states on every rank."""

    sharded = False

    def __init__(self, module: nn.Module, arguments: TrainingArguments) -> None:
        super().__init__(arguments)
        self.module = module.to(self.device)
        self.wrap(parameter_groups(module, arguments.weight_decay), arguments)

    def wrap(self, groups: list[dict], arguments: TrainingArguments) -> None:
        """The wrapper, if any, and the optimizer."""
        self.wrapped = self.module
        if distributed.world_size() > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(self.module, device_ids=ids, gradient_as_bucket_view=True)
        self.optimizer = build_optimizer(groups, arguments)

    def micro_batch(self, last: bool) -> AbstractContextManager:
        """Gradients travel once, with the last micro batch."""
        return nullcontext() if last or self.wrapped is self.module else self.wrapped.no_sync()

    def save(self, folder: Path) -> None:
        """Rank 0 writes weights and optimizer; they are the same everywhere."""
        if distributed.is_main():
            self.save_weights(folder)
            state = {"optimizer": self.optimizer.state_dict(), "scaler": self.loss_scale.state_dict()}
            torch.save(state, folder / "optimizer.pt")

    def load(self, folder: Path) -> None:
        """Every rank reads the files of rank 0, however many they are."""
        if not (folder / "optimizer.pt").exists():
            raise UserError(f"{folder}: saved by another engine; resume with the one that saved it")
        self.load_weights(folder)
        state = torch.load(folder / "optimizer.pt", map_location=self.device, weights_only=True)
        with settings_kept(self.optimizer):
            self.optimizer.load_state_dict(state["optimizer"])
        self.loss_scale.load_state_dict(state["scaler"])

    def save_weights(self, folder: Path) -> None:
        """Parameters by name, tied ones once."""
        save_file({name: w.contiguous() for name, w in self.weights().items()}, folder / "weights.safetensors")

    def load_weights(self, folder: Path) -> None:
        """What `save_weights` wrote, into the parameters that are there."""
        saved = load_file(folder / "weights.safetensors")
        for name, weight in self.weights().items():
            weight.copy_(saved[name])

    def full_state_dict(self) -> dict[str, torch.Tensor] | None:
        """All weights on rank 0."""
        return cpu_copy(self.weights()) if distributed.is_main() else None
