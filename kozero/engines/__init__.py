"""The engines by what the command line asks for. A library is imported only by the engine that uses it."""

from dataclasses import dataclass, field

import torch
from torch import nn

from kozero import distributed
from kozero.config import BatchSizes, TrainingArguments
from kozero.ds_config import resolve
from kozero.engines.base import Engine
from kozero.errors import require
from kozero.freeze import count_parameters
from kozero.memory import rank_limit
from kozero.plan import state_bytes

# What a DeepSpeed JSON may say at stage 0, where the plain engine runs: what the command line decides anyway.
STAGE_ZERO = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "fp16", "bf16", "zero_optimization",
}  # fmt: skip


@dataclass(frozen=True)
class Sharding:
    """How a pre-training entry shards: "plain" (stage 0), "oss" (1), "fsdp" or "fairscale_fsdp" (2, 3).

    With `auto_wrap` the parameters of each layer are gathered by themselves, else all of them at once.
    """

    engine: str = "plain"
    stage: int = 0
    auto_wrap: bool = False


@dataclass(frozen=True)
class EngineSettings(Sharding):
    """A checked choice of engine, "deepspeed" among them. `resolved` is its JSON with every "auto" filled in."""

    resolved: dict = field(default_factory=dict)


def prepare_engine(
    arguments: TrainingArguments, sizes: BatchSizes, sharding: Sharding | None = None, trains: bool = True
) -> EngineSettings:
    """Check everything about the engine that can be known before a model exists.

    Args: sharding: what an entry that knows no DeepSpeed asks for; else --deepspeed_config decides; trains: see
        `resolve`.
    """
    settings = settings_of(arguments, sizes, sharding, trains)
    require(
        settings.engine == "plain" or not arguments.torch_compile,
        f"--torch_compile: ZeRO-{settings.stage} calls Python around every layer, which compiled layers gain nothing "
        "from; leave it out, or choose stage 0",
    )
    return settings


def settings_of(
    arguments: TrainingArguments, sizes: BatchSizes, sharding: Sharding | None, trains: bool
) -> EngineSettings:
    """The engine that was asked for."""
    if sharding:
        return prepare_sharding(arguments, sharding)
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
        return EngineSettings(resolved=resolved)
    from kozero.engines.deepspeed import check_config

    check_config(resolved, arguments.deepspeed_config)
    return EngineSettings("deepspeed", stage, resolved=resolved)


def prepare_sharding(arguments: TrainingArguments, sharding: Sharding) -> EngineSettings:
    """Refuse what the chosen library cannot do here."""
    require(
        not arguments.deepspeed_config,
        f"--deepspeed_config {arguments.deepspeed_config}: this entry shards without DeepSpeed; leave it out, or "
        "use pretrain/train.py for the stage of the JSON",
    )
    message = "fairscale's FullyShardedDataParallel needs a GPU and none is visible; --sharding torch runs on a CPU"
    require(sharding.engine != "fairscale_fsdp" or torch.cuda.is_available(), message)
    return EngineSettings(sharding.engine, sharding.stage, sharding.auto_wrap)


def build_engine(module: nn.Module, arguments: TrainingArguments, settings: EngineSettings) -> Engine:
    """Wrap a module. Freezing comes before this, loading a checkpoint after it."""
    if said := needless_stage(module, arguments, settings.stage):
        distributed.say(said)
    match settings.engine:
        case "deepspeed":
            from kozero.engines.deepspeed import DeepSpeedEngine

            return DeepSpeedEngine(module, arguments, settings.resolved)
        case "oss":
            from kozero.engines.oss import OSSEngine

            return OSSEngine(module, arguments)
        case "fsdp":
            from kozero.engines.fsdp import FSDPEngine

            return FSDPEngine(module, arguments, settings.stage, settings.auto_wrap)
        case "fairscale_fsdp":
            from kozero.engines.fairscale_fsdp import FairscaleFSDPEngine

            return FairscaleFSDPEngine(module, arguments, settings.stage, settings.auto_wrap)
        case "plain":
            from kozero.engines.plain import PlainEngine

            return PlainEngine(module, arguments)
    raise ValueError(f"no engine {settings.engine!r}")


def needless_stage(module: nn.Module, arguments: TrainingArguments, stage: int) -> str | None:
    """What to tell of a stage that only costs time, because a rank has twice the room that all states take."""
    counts = count_parameters(module)
    whole, limit = state_bytes(counts["total"], counts["trainable"], 0, 1, arguments.dtype), rank_limit()
    if stage == 0 or limit is None or 2 * whole > limit:
        return None
    return (
        f"note: ZeRO-{stage} saves memory and costs time; weights, gradients and optimizer states take "
        f"{whole / 2**30:.2f} GiB in all and this rank has {limit / 2**30:.1f}, so stage 0 is faster"
    )
