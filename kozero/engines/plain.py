"""The engine without sharding: PyTorch alone, DistributedDataParallel when there are several ranks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kozero import distributed
from kozero.config import TrainingArguments
from kozero.data.batch import Batch
from kozero.engines.base import Engine, StepStats, count_targets, cpu_copy
from kozero.errors import UserError
from kozero.optim import build_optimizer, parameter_groups, settings_kept

AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class PlainEngine(Engine):
    """Weights in 32 bit on every rank; --bf16 and --fp16 compute under autocast."""

    def __init__(self, module: nn.Module, arguments: TrainingArguments) -> None:
        self.device = distributed.device()
        self.module = module.to(self.device)
        self.wrapped = module
        if distributed.world_size() > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.wrapped = DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)
        self.optimizer = build_optimizer(parameter_groups(module, arguments.weight_decay), arguments)
        self.max_grad_norm = arguments.max_grad_norm or float("inf")
        self.dtype = AUTOCAST[arguments.dtype]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=arguments.fp16)

    def autocast(self) -> torch.autocast | nullcontext:
        """The precision of forward passes."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext()

    def train_step(self, micro_batches: Sequence[Batch], lr: float) -> StepStats:
        """One update; gradients travel once, with the last micro batch."""
        self.module.train()
        num_targets = count_targets(micro_batches)
        total = torch.zeros_like(num_targets)
        for k, batch in enumerate(micro_batches):
            last = k == len(micro_batches) - 1
            with self.no_sync(not last), self.autocast():
                losses = self.wrapped(**batch.to(self.device)) / num_targets
                # DDP averages over ranks, the step's loss is a sum over them.
                self.scaler.scale(losses.sum() * distributed.world_size()).backward()
            total += losses.detach()
        return self.update(distributed.all_reduce(total), lr)

    def no_sync(self, wanted: bool) -> nullcontext:
        """Keep gradients on this rank, or send them round."""
        return self.wrapped.no_sync() if wanted and self.wrapped is not self.module else nullcontext()

    def update(self, losses: torch.Tensor, lr: float) -> StepStats:
        """Clip and step, unless a gradient is not finite; all ranks hold the same gradients and decide alike."""
        scale = self.scaler.get_scale()
        self.scaler.unscale_(self.optimizer)
        trainable = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_(trainable, self.max_grad_norm)
        applied = bool(torch.isfinite(norm))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if applied or self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return StepStats(tuple(losses.tolist()), norm.item(), applied, scale)

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The unwrapped module: every rank holds all of it and may call it as often as it likes."""
        self.module.eval()
        with torch.no_grad(), self.autocast():
            yield self.module
        self.module.train()

    def save(self, folder: Path) -> None:
        """Rank 0 writes weights and optimizer; they are the same everywhere."""
        if distributed.is_main():
            save_file(self.weights(), folder / "weights.safetensors")
            state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
            torch.save(state, folder / "optimizer.pt")

    def load(self, folder: Path) -> None:
        """Every rank reads the files of rank 0, however many they are."""
        if not (folder / "weights.safetensors").exists():
            raise UserError(f"{folder}: saved under DeepSpeed; resume with the same --deepspeed_config")
        with torch.no_grad():
            saved = load_file(folder / "weights.safetensors")
            for name, parameter in self.module.named_parameters():
                parameter.copy_(saved[name])
        state = torch.load(folder / "optimizer.pt", map_location=self.device, weights_only=True)
        with settings_kept(self.optimizer):
            self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])

    def weights(self) -> dict[str, torch.Tensor]:
        """Parameters by name, tied ones once."""
        return {name: parameter.detach().contiguous() for name, parameter in self.module.named_parameters()}

    def full_state_dict(self) -> dict[str, torch.Tensor] | None:
        """All weights on rank 0."""
        return cpu_copy(self.weights()) if distributed.is_main() else None
