"""The engines by what the command line asks for. A library is imported only by the engine that uses it."""

from dataclasses import dataclass, field

from torch import nn

from kozero.config import BatchSizes, TrainingArguments
from kozero.ds_config import resolve
from kozero.engines.base import Engine
from kozero.errors import require

# What a DeepSpeed JSON may say at stage 0, where the plain engine runs: what the command line decides anyway.
STAGE_ZERO = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "fp16", "bf16", "zero_optimization",
}  # fmt: skip


@dataclass(frozen=True)
class EngineSettings:
    """A checked choice of engine. `resolved` is the DeepSpeed JSON with every "auto" filled in, empty without one."""

    stage: int = 0
    resolved: dict = field(default_factory=dict)


def prepare_engine(arguments: TrainingArguments, sizes: BatchSizes, trains: bool = True) -> EngineSettings:
    """Check everything about the engine that can be known before a model exists; see `resolve` for `trains`."""
    if not arguments.deepspeed_config:
        return EngineSettings()
    resolved = resolve(arguments, sizes, trains)
    stage = resolved["zero_optimization"]["stage"]
    if stage == 0:
        extra = sorted(set(resolved) - STAGE_ZERO) + sorted(set(resolved["zero_optimization"]) - {"stage"})
        require(
            not extra,
            f"{arguments.deepspeed_config}: stage 0 shards nothing and runs on PyTorch's DDP, which has no "
            f"{', '.join(map(repr, extra))}; remove it or choose a stage from 1 to 3",
        )
    else:
        from kozero.engines.deepspeed import check_config

        check_config(resolved, arguments.deepspeed_config)
    return EngineSettings(stage, resolved)


def build_engine(module: nn.Module, arguments: TrainingArguments, settings: EngineSettings) -> Engine:
    """Wrap a module. Freezing comes before this, loading a checkpoint after it."""
    if settings.stage:
        from kozero.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(module, arguments, settings.resolved)
    from kozero.engines.plain import PlainEngine

    return PlainEngine(module, arguments)
