"""A DeepSpeed JSON and the command line as one: "auto" is filled in, a contradiction is refused with both values."""

import copy
from typing import Any

from kozero.config import BatchSizes, TrainingArguments
from kozero.errors import UserError, require
from kozero.json_files import check_keys, read_json_object

AUTO = "auto"
# DeepSpeed itself accepts a misspelt key at the top in silence (0.19.8), so the ones it reads are listed here.
KNOWN = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer", "scheduler", "fp16", "bf16", "zero_optimization", "data_types",
    "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "prescale_gradients",
    "gradient_predivide_factor", "sparse_gradients", "communication_data_type",
    "seq_parallel_communication_data_type", "disable_allgather", "activation_checkpointing", "checkpoint", "aio",
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger", "flops_profiler",
    "tensorboard", "wandb", "comet", "csv_monitor", "compile", "graph_harvesting", "use_node_local_storage",
    "timers",
}  # fmt: skip
ELSEWHERE = {  # keys that would say something else than the command line
    "scheduler": "the rate comes from --lr_scheduler_type and --warmup_steps",
    "torch_autocast": "the precision comes from --bf16 and --fp16",
    "load_universal_checkpoint": "--resume finds out what a checkpoint is",
}
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
OPTIMIZERS = {"adam": "adamw", "adamw": "adamw", "sgd": "sgd"}


def resolve(arguments: TrainingArguments, sizes: BatchSizes, trains: bool = True) -> dict[str, Any]:
    """The JSON of --deepspeed_config with every value in place; its optimizer block is compared and taken out, since
    the engine is given an optimizer. Where nothing is trained (`trains`) what the JSON says of batches and clipping
    means nothing.

    Raises: UserError for unknown keys, a stage that does not exist, a schedule, and all contradictions at once.
    """
    path = arguments.deepspeed_config
    config = copy.deepcopy(read_json_object(path))
    for name, why in ELSEWHERE.items():
        require(name not in config, f"{path}: {name!r} is set here; remove it, {why}")
    check_keys(config, KNOWN, path)
    for name in () if trains else (*BATCH_KEYS, "gradient_clipping", "optimizer"):
        config.pop(name, None)
    for name in ("zero_optimization", "optimizer", "fp16", "bf16"):
        message = f"{path}: {name!r} must be an object, found {config.get(name)!r}"
        require(isinstance(config.get(name, {}), dict), message)
    zero = config.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", 0)
    require(type(stage) is int and 0 <= stage <= 3, f"{path}: zero_optimization.stage {stage!r}: must be 0, 1, 2 or 3")
    mismatches = [
        text for place, flag, value in from_command_line(arguments, sizes) if (text := fill(config, place, flag, value))
    ]
    mismatches += optimizer_mismatches(config.pop("optimizer", {}), arguments, path)
    require(not mismatches, f'{path} and the command line disagree: {"; ".join(mismatches)}. Use "auto" in the JSON')
    config["zero_optimization"] = {name: value for name, value in zero.items() if value != AUTO}  # DeepSpeed's defaults
    refuse_auto(config, path)
    return config


def from_command_line(arguments: TrainingArguments, sizes: BatchSizes) -> list[tuple[tuple[str, ...], str, Any]]:
    """(place in the JSON, what says so on the command line, value) of everything that the command line decides."""
    ranks = f"{sizes.micro} x {sizes.accumulation} x {sizes.world_size} ranks"
    return [
        (("train_micro_batch_size_per_gpu",), "--per_device_train_batch_size", sizes.micro),
        (("gradient_accumulation_steps",), "--gradient_accumulation_steps", sizes.accumulation),
        (("train_batch_size",), f"micro batch x accumulation x ranks = {ranks} =", sizes.global_batch),
        (("gradient_clipping",), "--max_grad_norm", arguments.max_grad_norm),
        (("fp16", "enabled"), "--fp16", arguments.fp16),
        (("bf16", "enabled"), "--bf16", arguments.bf16),
    ]


def fill(config: dict[str, Any], place: tuple[str, ...], flag: str, value: Any) -> str | None:
    """Put `value` where the JSON says "auto" or nothing; the contradiction in words when it says something else."""
    for name in place[:-1]:
        config = config.setdefault(name, {})
    said = config.get(place[-1], AUTO)
    if said != AUTO and (said != value or isinstance(said, bool) != isinstance(value, bool)):
        return f"{'.'.join(place)} {said!r}, {flag} {value!r}"
    config[place[-1]] = value
    return None


def optimizer_mismatches(optimizer: dict[str, Any], arguments: TrainingArguments, path: str) -> list[str]:
    """What an optimizer block says against --optim and its flags."""
    if not optimizer:
        return []
    check_keys(optimizer, {"type", "params", "legacy_fusion"}, f"{path} optimizer")
    kind = optimizer.get("type", AUTO)
    if kind != AUTO and OPTIMIZERS.get(str(kind).lower()) != arguments.optim:
        return [f"optimizer.type {kind!r}, --optim {arguments.optim!r}"]
    params = optimizer.get("params", {})
    if not isinstance(params, dict):
        raise UserError(f"{path}: optimizer.params must be an object, found {params!r}")
    wanted = {
        "lr": ("--learning_rate", arguments.learning_rate),
        "betas": ("--adam_beta1, --adam_beta2", [arguments.adam_beta1, arguments.adam_beta2]),
        "eps": ("--adam_epsilon", arguments.adam_epsilon),
        "weight_decay": ("--weight_decay", arguments.weight_decay),
        "torch_adam": ("(always)", True),
        "adam_w_mode": ("(always)", True),
    }
    check_keys(params, wanted, f"{path} optimizer.params")
    return [
        f"optimizer.params.{name} {said!r}, {wanted[name][0]} {wanted[name][1]!r}"
        for name, said in params.items()
        if said not in (AUTO, wanted[name][1])
    ]


def refuse_auto(value: Any, path: str, place: str = "") -> None:
    """An "auto" that nothing fills would reach DeepSpeed as text."""
    if value == AUTO:
        raise UserError(f'{path}: {place} "auto" is not known to the command line; write a value')
    if isinstance(value, dict):
        for name, part in value.items():
            refuse_auto(part, path, f"{place}.{name}".lstrip("."))
