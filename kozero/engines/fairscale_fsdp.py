"""ZeRO-2 and ZeRO-3 by fairscale's FullyShardedDataParallel, on GPUs: it needs CUDA's streams. The tests run it on a
CPU with streams that do nothing.

Gradients are reduced with every micro batch: whole ones would have to be kept until the last otherwise, and not
keeping them is what these stages are for. Each unit gathers its parameters for every micro batch, and at stage 3 once
more in backward; the root does not, it is used last and first. Without auto_wrap the root is all there is, and stage 3
is stage 2.

Precision is autocast's, as in the plain engine: parameters are gathered and gradients reduced in 32 bit. Its copies of
weights live from forward to backward, 2 bytes for each parameter of a matrix, with --gradient_checkpointing for one
layer.

Traps of fairscale 0.4.13, found in its source:

- With flatten_parameters=True (the default) matrices and vectors, trained and frozen ones become one vector, which has
  one weight decay and one requires_grad; mixed ones fail. Without it each parameter is gathered by itself, and
  gradients still share buckets. The parameters keep their identity, so names and groups are taken before wrapping:
  afterwards every one of them is a vector.
- The end of a backward pass passes the root over, so its frozen parameters stay whole; and at stage 2 a forward pass
  without a backward pass leaves all of them whole, and the next pass takes them for current, also when a checkpoint has
  been loaded since. `reshard` puts the shards back after both.
- Before backward a unit gathers its weights when the first gradient reaches one of its outputs. An output that the unit
  itself goes on to use gets its gradient when some weights are done and freed, and an assertion fails: `pass_on`.
- Activation checkpointing ends a recomputation by an exception once it has what it needs. Inside a unit that the layer
  was handed, the unit then believes itself in a forward pass for ever: `Unit`.
- summon_full_params, the public way to whole weights, forbids calls to a unit inside it, with an AssertionError of the
  wrapper that flattens nothing here, and fails itself where a frozen parameter is whole already.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from fairscale.internal.containers import apply_to_tensors
from fairscale.nn import FullyShardedDataParallel
from torch import nn

from kozero import distributed
from kozero.config import TrainingArguments
from kozero.engines.pieces import Piece
from kozero.engines.torch_engine import TorchEngine
from kozero.engines.units import layers
from kozero.optim import build_optimizer, parameter_groups


class Unit(FullyShardedDataParallel):
    """Parameters that are gathered together."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's; one that is broken off leaves no trace."""
        state = self.training_state
        try:
            return super().forward(*args, **kwargs)
        except Exception:
            self.training_state = state
            raise


class FairscaleFSDPEngine(TorchEngine):
    """Gradients and optimizer states in shards (stage 2), and parameters too (stage 3)."""

    wrapped: Unit

    def __init__(self, module: nn.Module, arguments: TrainingArguments, stage: int, auto_wrap: bool) -> None:
        # What fairscale calls: storages by their type, and collectives by private names.
        warnings.filterwarnings("ignore", message="TypedStorage is deprecated")
        warnings.filterwarnings("ignore", message=r".*_base` is a private function", category=FutureWarning)
        super().__init__(arguments)
        self.module = module
        self.stage = stage
        self.parameters_by_name = dict(module.named_parameters())
        self.sizes = {name: parameter.shape for name, parameter in self.parameters_by_name.items()}
        groups = parameter_groups(module, arguments.weight_decay)
        self.units = []
        for members, name in layers(module) if auto_wrap else []:
            self.units.append(self.shard(getattr(members, name)))
            setattr(members, name, self.units[-1])
        self.lockstep = stage == 3 and bool(self.units)
        self.wrapped = self.shard(module)
        self.units.append(self.wrapped)
        for unit in reversed(self.units):  # the first to do so is the root
            unit._lazy_init()
        self.optimizer = build_optimizer(groups, arguments)

    def shard(self, part: nn.Module) -> Unit:
        """One unit."""
        part.register_forward_hook(pass_on)
        return Unit(
            part.to(self.device),
            process_group=dist.group.WORLD,
            reshard_after_forward=self.stage == 3,
            flatten_parameters=False,
            compute_device=self.device,
        )

    def grad_norm(self) -> torch.Tensor:
        """Of shards."""
        self.reshard()
        return super().grad_norm()

    def reshard(self) -> None:
        """Free what passes have left whole."""
        for unit in self.units:
            unit._free_full_params()
            unit._use_fp32_param_shard()

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """All weights at stage 2, those of the root at stage 3: its layers gather theirs whenever they run."""
        self.wrapped._lazy_init()  # gathering waits for the optimizer
        for unit in self.units if self.stage == 2 else [self.wrapped]:
            unit._rebuild_full_params()
        yield
        self.reshard()

    def weights(self) -> dict[str, nn.Parameter]:
        """Shards: vectors, padded at the end to the same size on all ranks."""
        return self.parameters_by_name

    def piece(self, name: str, weight: nn.Parameter) -> Piece:
        """Shards are equal parts of the vector, the last ones padded; without what pads them."""
        size, first = self.sizes[name].numel(), distributed.rank() * weight.numel()
        return Piece(name, size, weight, first, max(0, min(weight.numel(), size - first)))

    def whole(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Of shards."""
        parts = [torch.empty_like(weight) for _ in range(distributed.world_size())]
        dist.all_gather(parts, weight)
        return torch.cat([part.flatten() for part in parts])[: self.sizes[name].numel()].view(self.sizes[name])


def pass_on(module: nn.Module, args: tuple, output: Any) -> Any:
    """A forward hook whose outputs nothing inside the unit has used."""
    return apply_to_tensors(lambda tensor: tensor.view_as(tensor), output)
