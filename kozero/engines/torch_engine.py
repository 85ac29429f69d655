"""The training step of the engines that run PyTorch's own backward pass and optimizer."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn

from kozero import distributed
from kozero.config import TrainingArguments
from kozero.data.batch import Batch
from kozero.engines.base import LEAST_SCALE, Engine, StepStats, count_targets, known_losses
from kozero.engines.pieces import Piece, States
from kozero.optim import divide_gradients

ROW = 1024
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class LossScale:
    """The dynamic loss scale of fp16 (Micikevicius et al. 2018, arXiv 1710.03740) with the numbers of
    torch.amp.GradScaler, and always 1 in other precisions.

    It is told whether an update was applied. GradScaler looks at the gradients that its rank holds, which under
    sharding are a part of them; the norm that clipping needs is over all of them and the same on every rank.
    """

    INITIAL, INTERVAL = 2.0**16, 2000  # updates in a row after which the scale doubles

    def __init__(self, enabled: bool) -> None:
        self.enabled, self.value, self.applied = enabled, self.INITIAL if enabled else 1.0, 0

    def update(self, applied: bool) -> None:
        """Halve after an overflow, double after many updates without one."""
        if not self.enabled:
            return
        self.applied = self.applied + 1 if applied else 0
        if not applied:
            self.value = max(self.value / 2, LEAST_SCALE)
        elif self.applied == self.INTERVAL:
            self.value, self.applied = self.value * 2, 0


class TorchEngine(Engine):
    """Parameters in 32 bit; --bf16 and --fp16 compute under autocast. An engine of this kind wraps the module so that
    its gradients are averaged over ranks, and says whether a rank then holds them all."""

    sharded = True  # the gradients of a rank are its share of them
    wrapped: nn.Module  # what is called in training
    optimizer: torch.optim.Optimizer

    def __init__(self, arguments: TrainingArguments) -> None:
        self.device = distributed.device()
        self.max_grad_norm = arguments.max_grad_norm or float("inf")
        self.dtype = AUTOCAST[arguments.dtype]
        self.loss_scale = LossScale(arguments.fp16)

    def autocast(self, keep_casts: bool) -> AbstractContextManager:
        """The precision of forward passes. `keep_casts` casts a weight once for all its uses."""
        return torch.autocast(self.device.type, self.dtype, cache_enabled=keep_casts) if self.dtype else nullcontext()

    def train_step(self, micro_batches: Sequence[Batch], lr: float) -> StepStats:
        """One update from the sum of the micro batches' gradients."""
        self.module.train()
        num_targets = count_targets(micro_batches)
        total = torch.zeros_like(num_targets)
        for k, batch in enumerate(micro_batches):
            with self.micro_batch(last=k == len(micro_batches) - 1):
                # The gradients of a weight that several layers use would be summed in 16 bit if it were cast once.
                with self.autocast(keep_casts=False):
                    losses = self.wrapped(**batch.to(self.device)) / num_targets.clamp(min=1)
                # Gradients are averaged over ranks, the step's loss is a sum over them.
                (losses.sum() * (distributed.world_size() * self.loss_scale.value)).backward()
            total += losses.detach()
        return self.update(total, num_targets, lr)

    def update(self, own: torch.Tensor, num_targets: torch.Tensor, lr: float) -> StepStats:
        """Clip and step, unless a gradient or loss is not finite: both are the same on all ranks, they decide alike.

        The host waits for the device once, at the end of the step.
        """
        scale = self.loss_scale.value
        norm = self.grad_norm() / scale
        losses = distributed.all_reduce(own.clone())
        finite = torch.isfinite(norm) & torch.isfinite(losses).all()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        clipping = torch.clamp(self.max_grad_norm / (norm + 1e-6), max=1.0)
        if divide_gradients(self.own_optimizer(), scale / clipping, finite):
            self.optimizer.step()
        self.zero_grad()
        *values, grad_norm, applied = torch.cat([losses, num_targets, norm.view(1), finite.float().view(1)]).tolist()
        self.loss_scale.update(bool(applied))
        return StepStats(known_losses(values[: len(own)], values[len(own) :]), grad_norm, bool(applied), scale, own)

    def own_optimizer(self) -> torch.optim.Optimizer:
        """The one that updates what this rank does."""
        return self.optimizer

    def optimizer_states(self) -> States:
        """By parameter."""
        return self.own_optimizer().state

    def loss_scale_state(self) -> dict[str, float]:
        """Of fp16."""
        return {"scale": self.loss_scale.value, "applied": self.loss_scale.applied} if self.loss_scale.enabled else {}

    def set_loss_scale_state(self, state: dict[str, float]) -> None:
        """Of fp16."""
        self.loss_scale.value, self.loss_scale.applied = state["scale"], int(state["applied"])

    def trainable(self) -> list[nn.Parameter]:
        """Parameters that this rank updates."""
        return [p for group in self.own_optimizer().param_groups for p in group["params"]]

    def gradients(self) -> list[torch.Tensor]:
        """Gradients that this rank holds."""
        return [p.grad for p in self.trainable() if p.grad is not None]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def micro_batch(self, last: bool) -> AbstractContextManager:
        """Around forward and backward of a micro batch: where gradients travel, and when."""
        return nullcontext()

    def grad_norm(self) -> torch.Tensor:
        """Of the gradients of all ranks, scaled as they are."""
        norm = total_norm(self.gradients()).to(self.device)
        return distributed.all_reduce(norm.square()).sqrt() if self.sharded else norm

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The unwrapped module with its weights at hand."""
        self.module.eval()
        # In lockstep weights come and go; kept copies of them would stay.
        with torch.no_grad(), self.autocast(keep_casts=not self.lockstep), self.gathered():
            yield self.module
        self.module.train()

    def gathered(self) -> AbstractContextManager:
        """The weights in reach of any call to the module or a part of it."""
        return nullcontext()

    def weights(self) -> dict[str, nn.Parameter]:
        """What this rank holds of the parameters, by name, tied ones once."""
        return dict(self.module.named_parameters())

    def pieces(self) -> list[Piece]:
        """Those of the weights that train."""
        return [self.piece(name, weight) for name, weight in self.weights().items() if weight.requires_grad]

    @abstractmethod
    def piece(self, name: str, weight: nn.Parameter) -> Piece:
        """What this rank holds of a parameter."""

    def full_state_dict(self) -> dict[str, torch.Tensor] | None:
        """Gathered one parameter at a time."""
        state = {}
        for name, weight in self.weights().items():
            whole = self.whole(name, weight.detach())
            if distributed.is_main():
                state[name] = whole.to("cpu", torch.float32)
        return state if distributed.is_main() else None

    def whole(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A parameter of which this rank holds `weight`. Collective."""
        return weight


def total_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The norm of some gradients together, on a CPU in rows of `ROW` numbers: torch's norm adds up in 32 bit there one
    after the other, and is 6e-4 too small for 2 million numbers, 3e-3 for KoGPT2's embedding."""
    if gradients and gradients[0].is_cuda:
        return torch.nn.utils.get_total_norm(gradients)
    parts = [torch.zeros(1)] if not gradients else []
    for flat in map(torch.flatten, gradients):
        end = flat.numel() // ROW * ROW
        parts += [torch.linalg.vector_norm(flat[:end].view(-1, ROW), dim=1), flat[end:]]
    return torch.linalg.vector_norm(torch.cat(parts))
