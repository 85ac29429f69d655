"""Dropout for which a CPU draws 16 random bits an element, where PyTorch draws a number each."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

STEPS = 1 << 16  # rates are multiples of 1 / STEPS


class Dropout(nn.Dropout):
    """`nn.Dropout` by `drop`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Any shape."""
        return drop(x, self.p, self.training)


class DropoutByBits(torch.autograd.Function):
    """A mask of one byte an element stays for the backward pass, as with CUDA's kernel."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dropped: int) -> torch.Tensor:
        """dropped: of STEPS equally likely values, those that drop an element."""
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)  # PyTorch's own generator
        numbers = bits.view(torch.int16)[: x.numel()].view(x.shape)
        # Not of bool: with one, comparisons, products and casts take 3 to 15 times as long (torch 2.13).
        kept = torch.ge(numbers, dropped - STEPS // 2, out=torch.empty(x.shape, dtype=torch.int8))
        ctx.save_for_backward(kept)
        ctx.scale = STEPS / (STEPS - dropped)
        return kept.to(x.dtype).mul_(x).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        """The same elements by the same scale."""
        return ctx.saved_tensors[0].to(grad.dtype).mul_(grad).mul_(ctx.scale), None


def drop(x: torch.Tensor, rate: float, training: bool = True) -> torch.Tensor:
    """Elements are zero with probability `rate`, the others 1 / (1 - rate) of what they were (Srivastava et al. 2014).

    On a CPU the rate is the nearest multiple of 2 ** -16, and the scale is that rate's; what would then be 0 or 1 is
    left to PyTorch.
    """
    dropped = round(rate * STEPS)
    if not training or not 0 < dropped < STEPS or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, rate, training)
    return DropoutByBits.apply(x, dropped)


def use_fast_dropout(module: nn.Module) -> None:
    """Put Dropout in the place of every `nn.Dropout` of a model that another library built."""
    for parent in list(module.modules()):
        for name, part in parent.named_children():
            if type(part) is nn.Dropout:
                setattr(parent, name, Dropout(part.p).train(part.training))
