"""The engine without sharding: PyTorch alone, DistributedDataParallel when there are several ranks."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kozero import distributed
from kozero.config import TrainingArguments
from kozero.engines.pieces import Piece
from kozero.engines.torch_engine import TorchEngine
from kozero.optim import build_optimizer, parameter_groups


class PlainEngine(TorchEngine):
    """All weights, gradients and optimizer states on every rank."""

    sharded = False

    def __init__(self, module: nn.Module, arguments: TrainingArguments) -> None:
        super().__init__(arguments)
        self.compiled = arguments.torch_compile
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

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """Without compiled layers, which every new length of a text would compile anew."""
        eager = torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()
        with eager, super().evaluating() as module:
            yield module

    def piece(self, name: str, weight: nn.Parameter) -> Piece:
        """Every rank holds everything, rank 0 writes it."""
        return Piece(name, weight.numel(), weight, 0, weight.numel(), writes=distributed.is_main())
