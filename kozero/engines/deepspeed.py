"""ZeRO by DeepSpeed: stages 1 to 3, offload, fp16 with dynamic loss scale, bf16, fp32; CPU with gloo, GPUs with NCCL.

Stage 0 shards nothing and is the plain engine's: DeepSpeed 0.19.8 has no gradient norm and no guard against NaN there
in 32 bit, and its stage-0 optimizer for fp16 and bf16 (FP16_UnfusedOptimizer) leaves the other stages' losses at the
second step: DeepSpeed scales the loss for ZeRO optimizers alone, the stage-0 one still divides by the scale, and it
takes a step with zero gradients when it is built.

In bf16, stage 1 adds up the gradients of the micro batches in 16 bit (losses within 2e-3 of the other engines' in the
tests). Its `grad_accum_dtype: fp32` would change that, but selects another optimizer at stage 1, without a skip of
gradients that are not finite.
"""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from kozero import distributed
from kozero.config import TrainingArguments
from kozero.data.batch import Batch
from kozero.engines.base import Engine, StepStats, count_targets, known_losses
from kozero.engines.pieces import WEIGHT, Piece, Saved, States
from kozero.errors import UserError
from kozero.footprint import ZeroSizes
from kozero.json_files import check_keys
from kozero.optim import build_optimizer, parameter_groups

DEVICE = {"DS_ACCELERATOR": "cuda" if torch.cuda.is_available() else "cpu"}
with patch.dict(os.environ, DEVICE | os.environ):  # read at import, which warns without it
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )
    from deepspeed.utils import safe_get_full_fp32_param


class DeepSpeedEngine(Engine):
    """A module under deepspeed.initialize, which builds wrapper and sharded optimizer in one."""

    def __init__(self, module: nn.Module, arguments: TrainingArguments, config: dict[str, Any]) -> None:
        prepare()
        self.device = distributed.device()
        # DeepSpeed casts frozen weights to 16 bit in place and keeps no master of them; export wants what came in.
        half = arguments.dtype != "fp32" and distributed.is_main()
        self.frozen = {
            name: p.detach().to("cpu", copy=True)
            for name, p in module.named_parameters()
            if half and not p.requires_grad
        }
        optimizer = build_optimizer(parameter_groups(module, arguments.weight_decay), arguments)
        try:
            self.engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=complete(config))
        except (ImportError, AssertionError, ValueError, TypeError, KeyError) as error:  # of settings, not of memory
            raise UserError(f"{arguments.deepspeed_config}: DeepSpeed refuses it: {one_line(error)}") from None
        self.module = self.engine.module
        self.engine.optimizer.loss_scaler.raise_error_at_min_scale = False  # the loop tells, see kozero/watch.py
        self.stage = self.engine.zero_optimization_stage()
        self.lockstep = self.stage == 3

    def train_step(self, micro_batches: Sequence[Batch], lr: float) -> StepStats:
        """One update. DeepSpeed divides by the number of micro batches and averages over ranks, so both are put back
        in front of the step's own divisor, its targets."""
        self.engine.train()
        num_targets = count_targets(micro_batches)
        scale = self.loss_scale()
        divisor = num_targets.clamp(min=1)
        factor = distributed.world_size() * len(micro_batches) / divisor
        total = torch.zeros_like(num_targets)
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        for batch in micro_batches:
            sums = self.engine(**batch.to(self.device))
            self.engine.backward((sums * factor).sum())
            total += sums.detach()
            self.engine.step()
        losses = distributed.all_reduce(total.clone()) / divisor
        norm = float(self.engine.get_global_grad_norm())
        known = known_losses(losses.tolist(), num_targets.tolist())
        return StepStats(known, norm, self.engine.was_step_applied(), scale, total / divisor)

    def loss_scale(self) -> float:
        """The dynamic scale of fp16, 1 otherwise."""
        return float(self.engine.optimizer.cur_scale) if self.engine.fp16_enabled() else 1.0

    @contextmanager
    def evaluating(self) -> Iterator[nn.Module]:
        """The wrapped module: at stage 3 its hooks gather the weights that a forward pass needs."""
        self.engine.eval()
        with torch.no_grad():
            yield self.engine
        self.engine.train()

    def pieces(self) -> list[Piece]:
        """Parts of the vectors that hold the 32-bit masters of many parameters."""
        trained = [(name, weight) for name, weight in self.module.named_parameters() if weight.requires_grad]
        piece = self.piece_of_stage_3 if self.stage == 3 else self.piece_of_stages_1_and_2
        return [found for name, weight in trained if (found := piece(name, weight))]

    def piece_of_stages_1_and_2(self, name: str, weight: nn.Parameter) -> Piece | None:
        """Where a parameter reaches into this rank's share of its group, if it does."""
        if (mapping := weight._hp_mapping) is None:
            return None
        owner = self.engine.optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Piece(name, weight.numel(), owner, here.start, here.numel, there.start)

    def piece_of_stage_3(self, name: str, weight: nn.Parameter) -> Piece:
        """Equal parts of each parameter, the last ones padded."""
        optimizer = self.engine.optimizer
        group, start, numbers = optimizer.grad_position[optimizer.get_param_id(weight)]
        first = numbers * distributed.rank()
        num = max(0, min(numbers, weight.ds_numel - first))
        return Piece(name, weight.ds_numel, optimizer.fp32_partitioned_groups_flat[group], first, num, start)

    def optimizer_states(self) -> States:
        """By those vectors."""
        return self.engine.optimizer.optimizer.state

    def loss_scale_state(self) -> dict[str, float]:
        """Of fp16, with DeepSpeed's patience with overflows."""
        scaler = self.engine.optimizer.loss_scaler
        if not scaler.dynamic:
            return {}
        applied = scaler.cur_iter - scaler.last_overflow_iter - 1
        return {"scale": scaler.cur_scale, "applied": applied, "hysteresis": scaler.cur_hysteresis}

    def set_loss_scale_state(self, state: dict[str, float]) -> None:
        """Of fp16."""
        scaler = self.engine.optimizer.loss_scaler
        scaler.cur_scale, scaler.cur_iter = state["scale"], int(state["applied"])
        scaler.last_overflow_iter = -1
        scaler.cur_hysteresis = int(state.get("hysteresis", scaler.delayed_shift))

    def load(self, folder: Path) -> Saved:
        """The masters and their states, and the weights that passes see, in the run's precision."""
        saved = super().load(folder)
        for name, weight in self.module.named_parameters():
            if weight.requires_grad:
                # What is written into a gathered weight is kept.
                with deepspeed.zero.GatheredParameters([weight], modifier_rank=0) if self.stage == 3 else nullcontext():
                    value = torch.empty(weight.numel(), dtype=torch.float32)
                    saved.fill(Piece(name, value.numel(), value, 0, value.numel()), WEIGHT, value)
                    weight.data.copy_(value.view(weight.shape))
        return saved

    def full_state_dict(self) -> dict[str, torch.Tensor] | None:
        """The 32-bit master weights, gathered one parameter at a time, so that rank 0 never holds a second copy."""
        state = {}
        for name, parameter in self.module.named_parameters():
            tensor = self.full_parameter(parameter)
            if distributed.is_main():
                state[name] = tensor.detach().to("cpu", torch.float32, copy=True)
        return state | self.frozen if distributed.is_main() else None

    def close(self) -> None:
        """Take down hooks and streams; without it a process may abort at exit."""
        self.engine.destroy()

    def full_parameter(self, parameter: nn.Parameter) -> torch.Tensor:
        """One whole parameter: the 32-bit master of a trained one, a frozen one as it is."""
        if parameter.requires_grad:
            return safe_get_full_fp32_param(parameter)
        if self.stage == 3:
            with deepspeed.zero.GatheredParameters([parameter]):
                return parameter.data.clone()
        return parameter.data


def prepare() -> None:
    """Let DeepSpeed join the process group that is there, and make a CPU enough: no compiler, and float16."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # its warnings are about settings that we make on purpose
    warnings.filterwarnings("ignore", message=r".*is deprecated\. Please use", category=FutureWarning)  # collectives
    if get_accelerator().device_name() == "cpu":
        relax_cpu()
    deepspeed.init_distributed(torch.distributed.get_backend(), verbose=False)


def relax_cpu() -> None:
    """Lift what training on a CPU does not need."""
    # DeepSpeed compiles a shared-memory extension when it initialises on a CPU (34 s, needs g++ and ninja). Only its
    # inference_all_reduce uses it; the collectives of training are gloo's either way.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Stage 3 counts the devices in every backward pass, by starting numactl (0.1 s) where the launcher was not its own.
    os.environ.setdefault("LOCAL_SIZE", str(distributed.local_world_size()))
    # It also refuses float16 on a CPU without AVX512-FP16, although torch computes it there.
    get_accelerator().is_fp16_supported = lambda: True


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """What the engine itself has to say to DeepSpeed; it changes no result."""
    return config | {
        "zero_allow_untested_optimizer": True,  # SGD
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW is as fast as DeepSpeed's and needs no compiler
        "steps_per_print": 2**31,
    }


def one_line(error: Exception) -> str:
    """What a library's error says, without the name of a class that pydantic puts in front."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[1:3] or lines or [type(error).__name__])[:300]


SECTIONS = {  # of the JSON, with DeepSpeed's own description of each
    "zero_optimization": DeepSpeedZeroConfig,
    "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
    "fp16": DeepSpeedFP16Config,
    "bf16": DeepSpeedBF16Config,
}


def check_sections(config: dict[str, Any], path: str) -> None:
    """Refuse an unknown key inside a section, with the nearest known one."""
    for place, kind in SECTIONS.items():
        section = config
        for name in place.split("."):
            section = section.get(name) or {}
        known = set(kind.model_fields) | {f.alias for f in kind.model_fields.values() if f.alias}
        check_keys(section if isinstance(section, dict) else {}, known, f"{path} {place}")


def zero_sizes(config: dict[str, Any], path: str) -> ZeroSizes:
    """What the section `zero_optimization` of a JSON says of memory, with DeepSpeed's own defaults.

    Raises: UserError for what DeepSpeed would refuse.
    """
    check_sections(config, path)
    try:
        zero = DeepSpeedZeroConfig(**config["zero_optimization"])
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: DeepSpeed refuses it: {one_line(error)}") from None
    parts = (zero.offload_optimizer, zero.offload_param)
    optimizer, weights = (part if part and part.device != "none" else None for part in parts)
    contiguous = zero.contiguous_gradients or optimizer  # DeepSpeed insists on it there
    return ZeroSizes(
        reduce_bucket=zero.reduce_bucket_size,
        buckets=(2 if zero.overlap_comm else 1) if contiguous else 0,
        max_live=zero.max_live_parameters,
        prefetch=zero.prefetch_bucket_size,
        offload_optimizer=optimizer is not None,
        offload_param=weights is not None,
        pinned=bool(optimizer and optimizer.pin_memory),
    )


def check_config(config: dict[str, Any], path: str) -> None:
    """Let DeepSpeed read the JSON before a model is loaded; its complaint becomes one line."""
    check_sections(config, path)
    prepare()
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        DeepSpeedConfig(complete(config))
    except Exception as error:  # pydantic's and DeepSpeed's own, which share no base
        raise UserError(f"{path}: DeepSpeed refuses it: {one_line(error)}") from None
    finally:
        logging.disable(level)
    for part in ("offload_optimizer", "offload_param"):
        offload = config["zero_optimization"].get(part) or {}
        if offload.get("device") == "nvme":
            raise UserError(
                f"{path}: zero_optimization.{part}.device 'nvme': checkpoints here hold what lies in memory; use 'cpu'"
            )
