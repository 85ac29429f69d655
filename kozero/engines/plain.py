"""The engine without sharding: PyTorch alone, DistributedDataParallel when there are several ranks."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kozero import distributed
from kozero.config import TrainingArguments
from kozero.engines.base import cpu_copy
from kozero.engines.torch_engine import TorchEngine
from kozero.errors import UserError
from kozero.optim import build_optimizer, parameter_groups, settings_kept

WEIGHTS = "weights.safetensors"  # parameters by name, tied ones once


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

    def snapshot(self, folder: Path) -> dict[str, Any]:
        """Rank 0 writes weights and optimizer; they are the same everywhere."""
        if not distributed.is_main():
            return {}
        state = {"optimizer": self.optimizer.state_dict(), "scaler": self.loss_scale.state_dict()}
        return {WEIGHTS: self.weights(), "optimizer.pt": state}

    def load(self, folder: Path) -> None:
        """Every rank reads the files of rank 0, however many they are."""
        if not (folder / "optimizer.pt").exists():
            raise UserError(f"{folder}: saved by another engine; resume with the one that saved it")
        self.load_weights(folder)
        state = torch.load(folder / "optimizer.pt", map_location=self.device, weights_only=True)
        with settings_kept(self.optimizer):
            self.optimizer.load_state_dict(state["optimizer"])
        self.loss_scale.load_state_dict(state["scaler"])

    def load_weights(self, folder: Path) -> None:
        """Weights by name, into the parameters that are there."""
        saved = load_file(folder / WEIGHTS)
        for name, weight in self.weights().items():
            weight.copy_(saved[name])

    def full_state_dict(self) -> dict[str, torch.Tensor] | None:
        """All weights on rank 0."""
        return cpu_copy(self.weights()) if distributed.is_main() else None
