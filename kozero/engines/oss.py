"""ZeRO-1 by fairscale: optimizer states in shards (OSS), gradients reduced to the rank that updates them
(ShardedDataParallel).

Traps of fairscale 0.4.13 on torch 2, found in its source:

- ShardedDataParallel gives small gradients to buckets, of which `.grad` is a view. `optimizer.zero_grad()`, which since
  torch 2.0 sets them to None, cuts that tie without an error, and the buckets that travel hold zeros from then on. Its
  own `zero_grad` keeps them.
- Its `clip_grad_norm` remembers at the first call which parameters had a gradient, and leaves all others out of every
  later norm; the one of TorchEngine is used.
- ShardedGradScaler switches itself off without CUDA and asks all ranks for overflows once more; LossScale takes the
  answer from the norm, which OSS has summed over all ranks.
- A rank updates whole parameters, so a large embedding makes shards uneven, and a run that trains one parameter has
  ranks whose optimizer holds none.
"""

import torch
from fairscale.nn.data_parallel import ShardedDataParallel
from fairscale.optim import OSS

from kozero.config import TrainingArguments
from kozero.engines.pieces import Piece
from kozero.engines.plain import PlainEngine
from kozero.optim import build_optimizer


class OSSEngine(PlainEngine):
    """Every rank holds all weights, and the optimizer states of its share of them."""

    sharded = True
    optimizer: OSS

    def wrap(self, groups: list[dict], arguments: TrainingArguments) -> None:
        """OSS first: it decides which rank a gradient goes to."""
        self.optimizer = OSS(groups, optim=lambda share: build_optimizer(share, arguments))
        # Buffers are constants here, and no other engine sends them round.
        self.wrapped = ShardedDataParallel(self.module, self.optimizer, broadcast_buffers=False)

    def own_optimizer(self) -> torch.optim.Optimizer:
        """Inside the one that sends what it has updated. Gradients of other parameters are left over from the
        reduction."""
        return self.optimizer.optim

    def zero_grad(self) -> None:
        """Through the wrapper, whose buckets must keep their gradients."""
        self.wrapped.zero_grad()

    def piece(self, name: str, weight: torch.nn.Parameter) -> Piece:
        """Every rank holds all weights and writes those that it updates."""
        is_mine = weight in set(self.trainable())
        return Piece(name, weight.numel(), weight, 0, weight.numel(), writes=is_mine, updates=is_mine)
