"""The optimizer and its learning rate."""

import math
from collections.abc import Callable

import torch
from torch import nn

from kozero.config import TrainingArguments


def schedule(arguments: TrainingArguments, total_steps: int) -> Callable[[int], float]:
    """`lr_at(step)`: the rate of update number `step`, counted from 0, as a pure function.

    The warm-up rises linearly from 0 and reaches the peak at step `warmup`; linear and cosine then fall to 0 at
    `total_steps`. The same curves as transformers' get_{linear,cosine,constant}_schedule_with_warmup.
    """
    warmup = arguments.warmup_steps
    warmup = math.ceil(warmup * total_steps) if warmup < 1 else int(warmup)
    peak, kind = arguments.learning_rate, arguments.lr_scheduler_type

    def lr_at(step: int) -> float:
        if step < warmup:
            return peak * step / max(1, warmup)
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        if kind == "linear":
            return peak * (1.0 - progress)
        if kind == "cosine":
            return peak * 0.5 * (1.0 + math.cos(math.pi * progress))
        return peak

    return lr_at


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters in two groups: matrices decay, vectors (biases, norms) do not. Empty groups are left out."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def divide_gradients(optimizer: torch.optim.Optimizer, divisor: torch.Tensor, finite: torch.Tensor) -> bool:
    """Divide the gradients of the next update, which changes nothing where they are not `finite` (both scalars); False
    when there is to be none.

    AdamW's kernel divides while it reads them and skips by itself, so that nobody waits for the device. SGD is told by
    the host: DTensor (fully_shard) has no fused one in torch 2.13.
    """
    if optimizer.defaults["fused"]:
        optimizer.grad_scale, optimizer.found_inf = divisor, (~finite).float()
        return True
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if finite and gradients:  # a rank may hold none
        torch._foreach_div_(gradients, divisor)
    return bool(finite)


def build_optimizer(groups: list[dict], arguments: TrainingArguments) -> torch.optim.Optimizer:
    """AdamW (fused: one kernel over all parameters, on CPU too) or SGD without momentum."""
    if arguments.optim == "sgd":
        return torch.optim.SGD(groups, lr=arguments.learning_rate)
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    return torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=betas, eps=arguments.adam_epsilon, fused=True)
