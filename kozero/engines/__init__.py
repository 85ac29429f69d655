"""The engines by what the command line asks for. A library is imported only by the engine that uses it."""

from dataclasses import dataclass, field

from torch import nn

from kozero.config import BatchSizes, TrainingArguments
from kozero.ds_config import resolve
from kozero.engines.base import Engine


@dataclass(frozen=True)
class EngineSettings:
    """A checked choice of engine. `resolved` is the DeepSpeed JSON with every "auto" filled in, empty without one."""

    stage: int = 0
    resolved: dict = field(default_factory=dict)


def prepare_engine(arguments: TrainingArguments, sizes: BatchSizes) -> EngineSettings:
    """Check everything about the engine that can be known before a model exists."""
    if not arguments.deepspeed_config:
        return EngineSettings()
    resolved = resolve(arguments, sizes)
    return EngineSettings(resolved["zero_optimization"]["stage"], resolved)


def build_engine(module: nn.Module, arguments: TrainingArguments, settings: EngineSettings) -> Engine:
    """Wrap a module. Freezing comes before this, loading a checkpoint after it."""
    if settings.resolved:
        from kozero.engines.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(module, arguments, settings.resolved)
    from kozero.engines.plain import PlainEngine

    return PlainEngine(module, arguments)
