"""ZeRO-2 and ZeRO-3 by PyTorch's fully_shard (FSDP2), on CPU with gloo and on GPUs with NCCL.

Gradients are reduced with every micro batch: whole ones would have to be kept until the last otherwise, and not
keeping them is what these stages are for. ZeRO-2 has its parameters whole from the first forward pass of a step to
the last backward pass, so they travel once a step. The root stays whole from forward to backward at stage 3 as well:
it is used last and first. Without auto_wrap it is all there is, and stage 3 takes as much memory as stage 2.

Precision is autocast's: parameters are gathered and gradients reduced in 32 bit, and the first loss is the plain
engine's bit for bit. Under MixedPrecisionPolicy(param_dtype=bfloat16) it is as far off as that of bf16 from fp32
(6e-3 and 4e-3 on a toy), since sums of residuals are in 16 bit too; beside 32-bit sums the 16-bit weights of a
LayerNorm are an error on a CPU. The price: twice the bytes, and autocast's own copies, 2 bytes for each parameter of a
matrix, live from forward to backward, also at stage 3. With --gradient_checkpointing they live for one layer.

Traps of fully_shard (torch 2.11 to 2.13), found in its source:

- The first unit that runs declares itself the root. Writing text calls a part of the module, not the module; its first
  layer would be a root, and the next call of the real one fails. `_lazy_init` before anything else settles it.
- A call to a part does not pass the root's hooks either, so its weights would be shards: `gathered` unshards them.
- In backward a unit gathers ahead what ran before it according to a list that forward passes of evaluations extend as
  well. Where ranks have evaluated differently often, some gather and others do not, and they hang. ZeRO-2 needs
  nothing gathered in backward and is told so; ZeRO-3 evaluates in lockstep.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from kozero import distributed
from kozero.config import TrainingArguments
from kozero.engines.pieces import Piece
from kozero.engines.torch_engine import TorchEngine
from kozero.engines.units import layers
from kozero.optim import build_optimizer, parameter_groups


class FSDPEngine(TorchEngine):
    """Gradients and optimizer states in shards (stage 2), and parameters too (stage 3)."""

    def __init__(self, module: nn.Module, arguments: TrainingArguments, stage: int, auto_wrap: bool) -> None:
        super().__init__(arguments)
        self.module = self.wrapped = module
        self.stage = stage
        parts = [getattr(members, name) for members, name in layers(module)] if auto_wrap else []
        self.units = [*parts, module]  # the root last: it takes what is left
        self.lockstep = stage == 3 and len(self.units) > 1
        mesh = init_device_mesh(self.device.type, (distributed.world_size(),))
        for unit in self.units:
            fully_shard(unit, mesh=mesh, reshard_after_forward=stage == 3 and unit is not module)
            if stage == 2:
                unit.set_modules_to_backward_prefetch([unit])
        module._get_fsdp_state()._lazy_init()
        self.optimizer = build_optimizer(parameter_groups(module, arguments.weight_decay), arguments)

    @contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Gradients travel now; parameters of stage 2 stay whole until the step."""
        self.module.set_reshard_after_backward(last or self.stage == 3)
        yield

    def gradients(self) -> list[torch.Tensor]:
        """This rank's shards."""
        return [gradient.to_local() for gradient in super().gradients()]

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """All weights at stage 2, those of the root at stage 3: its layers gather theirs whenever they run."""
        units = self.units if self.stage == 2 else [self.module]
        for unit in units:
            unit.unshard()
        yield
        for unit in units:
            unit.reshard()

    def piece(self, name: str, weight: nn.Parameter) -> Piece:
        """A shard: the rows that torch.chunk gives to this rank."""
        rows, numbers = weight.shape[0], weight.numel()
        first = min(distributed.rank() * -(-rows // distributed.world_size()), rows)
        return Piece(name, numbers, weight, first * numbers // rows, weight.to_local().numel())

    def whole(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Of shards."""
        return weight.full_tensor()
