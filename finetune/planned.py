"""A GPT-2 as it would train, without its memory: what a rank will hold, and the largest micro batch that fits."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config

from kozero.data.packing import Packing
from kozero.footprint import Footprint, Setting, ZeroSizes, footprint
from kozero.freeze import apply_plan, compile_plan, count_parameters, skipped_layers
from kozero.trace import Traced, trace
from models.causal_lm import CausalLM
from models.language_model import checkpoint_activations

HALF = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(eq=False)
class PlannedModel:
    """What decides the memory of a step, whatever the sharding.

    Args:
        config: sizes, activation function and dropout rates.
        freeze: as --freeze; has_pause: the run trains with pauses.
        dtype: "fp32", "bf16" or "fp16".
        length: tokens of a row; predicted: the share of them that something is predicted at.
        on_gpu: dropout in one kernel, that of attention inside attention's, as CUDA has them; else as on a CPU.
    """

    config: GPT2Config
    freeze: str | None
    has_pause: bool
    dtype: str
    length: int
    predicted: float = 1.0
    on_gpu: bool = True
    moments: int = 8  # see kozero.footprint.Setting
    known: dict[tuple, Traced] = field(default_factory=dict, init=False)  # a trace takes about a second

    def module(self, dtype: torch.dtype = torch.float32, checkpointing: bool = False) -> CausalLM:
        """The module on whatever device is current."""
        lm = AutoModelForCausalLM.from_config(self.config, dtype=dtype)
        module = CausalLM(lm, [0] if self.has_pause else [], 0 if self.has_pause else None)
        plan = compile_plan(self.freeze, self.config.n_layer, self.has_pause)
        if plan.separate_pause:
            module.separate_pause_row()
        apply_plan(plan, module)
        if self.on_gpu:
            use_kernels(lm)
        if checkpointing:
            checkpoint_activations(lm)
        return module

    @cached_property
    def counts(self) -> dict[str, int]:
        """Parameters: see Setting."""
        with torch.device("meta"):
            module = self.module()
        block = sum(p.numel() for p in module.lm.transformer.h[0].parameters())
        plan = compile_plan(self.freeze, self.config.n_layer, self.has_pause)
        found = count_parameters(module)
        below = skipped_layers(plan, self.config.n_layer) * block
        largest = max(p.numel() for p in module.parameters())
        return found | {"crossed": found["total"] - below, "largest": largest}

    @cached_property
    def num_tensors(self) -> int:
        """Parameters as tensors."""
        with torch.device("meta"):
            return sum(1 for p in self.module().parameters() if p.requires_grad)

    def traced(self, micro: int, cast: bool, share: float, checkpointing: bool) -> Traced:
        """One micro batch. cast: the weights are in 16 bit, as under DeepSpeed; else autocast computes in it."""
        key = (micro, cast, share, checkpointing)
        if key not in self.known:
            self.known[key] = self.trace(*key)
        return self.known[key]

    def trace(self, micro: int, cast: bool, share: float, checkpointing: bool) -> Traced:
        """See `traced`."""
        half = HALF[self.dtype]
        rows = (micro, self.length)
        places = max(1, int(micro * self.length * self.predicted))

        def inputs() -> dict[str, Any]:
            names = {"input_ids": rows, "position_ids": rows, "target_index": places, "target_ids": places}
            found = {name: torch.zeros(size, dtype=torch.long) for name, size in names.items()}
            return found | ({"packing": two_texts(*rows)} if self.on_gpu else {})

        return trace(
            lambda: self.module(half if half and cast else torch.float32, checkpointing), inputs,
            autocast=None if cast else half, gradient_share=share, width=self.config.vocab_size,
        )  # fmt: skip

    def footprint(
        self, micro: int, accumulation: int, world_size: int, stage: int, zero: ZeroSizes | None, checkpointing: bool
    ) -> Footprint:
        """What a rank holds at its peak. zero: see Setting."""
        if zero and not self.on_gpu:
            zero = replace(zero, pinned=False)
        setting = Setting(
            **self.counts, stage=stage, world_size=world_size, dtype=self.dtype, accumulation=accumulation, zero=zero,
            moments=self.moments,
        )  # fmt: skip
        return footprint(setting, self.traced(micro, stage > 0, setting.gradient_share, checkpointing))


def two_texts(num_rows: int, length: int) -> Packing:
    """A packing of two texts a row: attention keeps copies of its inputs, which one text a row does without."""
    half, some = -(-length // 2), torch.zeros(num_rows * length, dtype=torch.long)
    return Packing(((2 * num_rows, half),), torch.zeros(2 * num_rows * half, dtype=torch.long), some, some[:0])


class KernelDropout(nn.Dropout):
    """Dropout as one CUDA kernel does it: a mask of one byte an element stays for backward, and no bits are drawn."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.native_dropout(x, self.p, self.training)[0]


def use_kernels(lm: nn.Module) -> None:
    """Dropouts as CUDA does them; attention draws its own anew in backward and keeps nothing."""
    for module in list(lm.modules()):
        for name, part in module.named_children():
            if isinstance(part, nn.Dropout):
                setattr(module, name, KernelDropout(0.0 if name == "attn_dropout" else part.p))
