"""Memory of a training step without its machine: forward and backward on tensors that have a size and no data."""

import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ACTIVATIONS, LOGITS, GRADIENTS = "activations", "logits", "gradients"


@dataclass(frozen=True)
class Traced:
    """Bytes that a step holds beside weights and inputs, at its peak, by what they are."""

    activations: float
    logits: float
    gradients: float

    @property
    def peak(self) -> float:
        """All of them."""
        return self.activations + self.logits + self.gradients


class Live(TorchDispatchMode):
    """Counts the bytes of every storage from the operation that makes it until nobody holds it: what an allocator is
    asked for, without the scratch space inside an operation."""

    def __init__(self, known: list[torch.Tensor], width: int, gradient_share: float) -> None:
        super().__init__()
        self.width, self.gradient_share = width, gradient_share
        self.held = {tensor.untyped_storage()._cdata: ("", 0.0) for tensor in known}
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.held:
                self.hold(tensor)
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()
        return out

    def hold(self, tensor: torch.Tensor) -> None:
        """A new storage."""
        storage = tensor.untyped_storage()
        kind = LOGITS if tensor.dim() and tensor.shape[-1] == self.width else ACTIVATIONS
        self.count(storage._cdata, kind, storage.nbytes())
        weakref.finalize(storage, self.drop, storage._cdata)

    def count(self, key: int, kind: str, size: float) -> None:
        self.held[key] = (kind, size)
        self.now[kind] += size

    def drop(self, key: int) -> None:
        """A storage that is gone."""
        kind, size = self.held.pop(key)
        self.now[kind] -= size

    def keep_gradient(self, parameter: nn.Parameter) -> None:
        """From here on a share of it stays, as the gradient of this rank."""
        storage = parameter.grad.untyped_storage()
        self.drop(storage._cdata)
        self.count(storage._cdata, GRADIENTS, storage.nbytes() * self.gradient_share)


def trace(
    build: Callable[[], nn.Module],
    inputs: Callable[[], Mapping[str, Any]],
    *,
    autocast: torch.dtype | None,
    gradient_share: float,
    width: int,
) -> Traced:
    """One forward and backward pass of a module in training.

    Args:
        build: makes the module as it trains: precision, frozen parts, checkpoints of activations. No memory is taken.
        inputs: makes what its forward takes.
        autocast: the type that the forward pass computes in; None: that of the module.
        gradient_share: of a gradient, once it is whole, so much stays on the rank: 1, or 1 / ranks where it is
            sharded, or 0 where its place is counted elsewhere.
        width: size of a vocabulary; tensors of that last dimension are logits.
    """
    with FakeTensorMode():
        module, batch = build().train(), inputs()
        given = [value for value in batch.values() if isinstance(value, torch.Tensor)]
        live = Live([*module.parameters(), *module.buffers(), *given], width, gradient_share)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(live.keep_gradient)
        computing = torch.autocast("cpu", autocast, cache_enabled=False) if autocast else nullcontext()
        with live:
            with computing:
                loss = module(**batch).sum()
            loss.backward()
    return Traced(*(live.peak[kind] for kind in (ACTIVATIONS, LOGITS, GRADIENTS)))
