"""What a run is told: argument dataclasses, their command line and JSON form, and the arithmetic of a batch."""

import dataclasses
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

from transformers import HfArgumentParser

from kozero.errors import UserError, nearest, require
from kozero.json_files import check_keys, has_lone_surrogate, read_json_object

LIBRARIES = (
    "torch", "deepspeed", "fairscale", "transformers", "datasets", "tokenizers", "safetensors", "tensorboard",
    "bm25s", "kiwipiepy",
)  # fmt: skip
LARGE = 2**53  # whole numbers below it are exact in any computation


def arg(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with a line of `--help`."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class TrainingArguments:
    """How a run trains. Names and meanings are those of transformers' TrainingArguments wherever both have one."""

    output_dir: str = arg("runs/run", "folder for checkpoints, curves and the exported model")
    deepspeed_config: str | None = arg(
        None, "DeepSpeed JSON, e.g. ds_configs/zero2.json; without it: plain PyTorch (DDP for several ranks)"
    )
    per_device_train_batch_size: int = arg(
        8, "rows of one forward pass on one rank (micro batch)", aliases=["--train_batch_size"]
    )
    per_device_eval_batch_size: int = arg(
        0, "rows of one forward pass in evaluation on one rank; 0: as in training", aliases=["--eval_batch_size"]
    )
    gradient_accumulation_steps: int = arg(1, "forward passes that are summed into one optimizer update")
    num_train_epochs: float = arg(3.0, "passes over the training rows, rounded up to whole steps; see --max_steps")
    max_steps: int = arg(0, "optimizer updates in all; 0: as many as --num_train_epochs takes")
    learning_rate: float = arg(5e-5, "peak learning rate")
    scheduler_num_steps: int = arg(0, "updates after which the rate is 0, at least those of the run; 0: as many")
    lr_scheduler_type: str = arg("linear", "rate after the warm-up", choices=["linear", "cosine", "constant"])
    warmup_steps: float = arg(0.0, "optimizer updates of linear warm-up; below 1: that share of all updates")
    optim: str = arg("adamw", "optimizer", choices=["adamw", "sgd"])
    weight_decay: float = arg(0.01, "decoupled weight decay of matrices; biases and norms have none")
    adam_beta1: float = arg(0.9, "decay of AdamW's first moment")
    adam_beta2: float = arg(0.999, "decay of AdamW's second moment")
    adam_epsilon: float = arg(1e-8, "AdamW's epsilon")
    max_grad_norm: float = arg(1.0, "gradients are clipped to this norm; 0: no clipping")
    bf16: bool = arg(False, "compute in bfloat16, keep 32-bit master weights")
    fp16: bool = arg(False, "compute in float16 with a dynamic loss scale, keep 32-bit master weights")
    gradient_checkpointing: bool = arg(False, "recompute activations in the backward pass: less memory, more time")
    torch_compile: bool = arg(
        False, "compile the layers: stage 0, runs of 2,000 updates or more; takes a C++ compiler and a minute or more"
    )
    seed: int = arg(42, "seed of weights, data order and dropout")
    logging_steps: int = arg(10, "optimizer updates between two points of the curves")
    eval_steps: int = arg(0, "optimizer updates between two evaluations; 0: at every tenth of the run")
    save_steps: int = arg(0, "optimizer updates between two checkpoints; 0: at every evaluation")
    save_total_limit: int = arg(2, "checkpoints to keep; the best one is kept beside them")
    async_save: bool = arg(False, "write checkpoints while the run goes on, from a copy in the machine's memory")
    nonfinite: str = arg(
        "skip", "loss or gradient that is not finite: skip the update, or stop the run", choices=["skip", "stop"]
    )
    max_nonfinite: int = arg(50, "steps in a row that are not finite, after which the run stops")
    spike_sigmas: float = arg(
        6.0, "tell of a loss so many standard deviations above the mean of the 128 before; 0: never"
    )
    early_stopping_patience: int = arg(0, "stop after so many evaluations without a better score; 0: never")
    resume: str | None = arg(None, "go on from a checkpoint: 'auto' (the newest in --output_dir, if any) or its folder")
    timeout_seconds: float = arg(600.0, "seconds that a rank waits for the others before the run ends")
    local_rank: int = arg(-1, "set by the deepspeed launcher; leave it alone")
    least_batch: ClassVar[int] = 1  # 0 where an entry looks for the batch itself

    def __post_init__(self) -> None:
        at_least(self.least_batch, self, "per_device_train_batch_size")
        at_least(1, self, "gradient_accumulation_steps", "logging_steps", "save_total_limit", "max_nonfinite")
        at_least(
            0, self, "per_device_eval_batch_size", "max_steps", "warmup_steps", "weight_decay", "max_grad_norm",
            "scheduler_num_steps", "eval_steps", "save_steps", "early_stopping_patience", "learning_rate",
            "spike_sigmas",
        )  # fmt: skip
        check_schedule(self, self.max_steps)
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, f"--{name} {getattr(self, name)}: must be in [0, 1)")
        epochs = self.num_train_epochs  # None where an entry lets the task decide
        require(epochs is None or 0 < epochs <= 1e6, f"--num_train_epochs {epochs}: must be above 0 and at most 1e6")
        check_timeout(self.timeout_seconds)
        require(self.adam_epsilon > 0, f"--adam_epsilon {self.adam_epsilon}: must be above 0")
        check_seed(self.seed)
        require(not (self.fp16 and self.bf16), "--fp16 and --bf16: choose one of the two")
        require(
            not (self.torch_compile and self.gradient_checkpointing),
            "--torch_compile and --gradient_checkpointing: layers that are computed twice stay uncompiled; choose one",
        )

    @property
    def dtype(self) -> str:
        """`fp32`, `bf16` or `fp16`."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else "fp32"


@dataclass(frozen=True)
class BatchSizes:
    """The one place where rows of a step are counted: global = micro x accumulation x ranks."""

    micro: int
    accumulation: int
    world_size: int

    @property
    def global_batch(self) -> int:
        """Rows of one optimizer update over all ranks."""
        return self.micro * self.accumulation * self.world_size


def batch_sizes(arguments: TrainingArguments, world_size: int) -> BatchSizes:
    """The batch of a run on `world_size` ranks."""
    return BatchSizes(arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps, world_size)


def check_schedule(arguments: TrainingArguments, total_steps: int) -> None:
    """A run of so many steps must not go on after its rate is 0."""
    end, idle = arguments.scheduler_num_steps, total_steps - arguments.scheduler_num_steps
    message = f"must be the run's {total_steps} steps or more; the rate would be 0 in {idle} of them"
    fits = end == 0 or idle <= 0 or arguments.lr_scheduler_type == "constant"
    require(fits, f"--scheduler_num_steps {end}: {message}")


def check_seed(seed: int) -> None:
    """A seed that torch and numpy take alike."""
    require(0 <= seed < 2**32, f"--seed {seed}: must be from 0 to {2**32 - 1:,}")


def check_timeout(seconds: float) -> None:
    """A time that a process group takes."""
    require(0 < seconds <= 1e7, f"--timeout_seconds {seconds}: must be above 0 and at most 1e7")


def at_least(minimum: int, arguments: Any, *names: str, most: float = math.inf) -> None:
    """Refuse the first of the named arguments that is below `minimum`, or above `most`."""
    limits = f"{minimum} or more" if most == math.inf else f"from {minimum} to {most:,}"
    for name in names:
        value = getattr(arguments, name)
        require(minimum <= value <= most, f"--{name} {value}: must be {limits}")


class Parser(HfArgumentParser):
    """HfArgumentParser that takes no abbreviations and answers a wrong flag with the nearest right one."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}; --help lists all arguments")


def parse_arguments(*classes: type, prog: str, description: str, argv: list[str] | None = None) -> tuple[Any, ...]:
    """Fill dataclasses from the command line. A bare argument that ends in .json is a file of the same arguments;
    flags win over the file. Each part has the file's name as `arguments_file`, see kozero.folder.new_file.

    Raises: UserError for unknown flags and keys, wrong types and contradictions.
    """
    usage = f"{prog} [arguments.json] [--flag value ...]"
    parser = Parser(classes, prog=prog, description=description, usage=usage, allow_abbrev=False)
    argv, file = list(sys.argv[1:] if argv is None else argv), None
    for k, word in enumerate(argv):  # the deepspeed launcher puts --local_rank=0 before it
        bare = k == 0 or not argv[k - 1].startswith("--") or "=" in argv[k - 1]
        if bare and word.endswith(".json") and not word.startswith("-"):
            flags = flags_of_file(word, parser)
            try:
                parser.parse_args(flags)
            except UserError as error:
                raise UserError(f"{word}: {error}") from None
            argv, file = flags + argv[:k] + argv[k + 1 :], word
            break
    *filled, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
    flags = [option for action in parser._actions for option in action.option_strings]
    if unknown:
        name = unknown[0].split("=")[0]
        raise UserError(f"unknown argument {unknown[0]!r}{nearest(name, flags)}; --help lists all arguments")
    for part in filled:
        tidy(part)
        part.arguments_file = file
    return tuple(filled)


def tidy(arguments: Any) -> None:
    """Refuse values that no argument can have, and put the home folder in the place of `~`."""
    for f in dataclasses.fields(arguments):
        value = getattr(arguments, f.name)
        require(not isinstance(value, float) or math.isfinite(value), f"--{f.name} {value}: must be finite")
        large = isinstance(value, int) and abs(value) >= LARGE
        require(not large, f"--{f.name} {value}: must be less than {LARGE:,} in size")
        if isinstance(value, str):
            require("\0" not in value, f"--{f.name} {value}: holds a zero character")
            require(value != "", f"--{f.name}: is empty; give a value or leave it out")
            require(not has_lone_surrogate(value), f"--{f.name} {value!a}: is not UTF-8")
            if value.startswith("~/") and value != f.default:  # a default is looked for where it is used
                path = os.path.expanduser(value)  # unchanged where there is none
                told = f"--{f.name} {value}: this user has no home folder; give the whole path, or set HOME"
                require(path != value, told)
                setattr(arguments, f.name, path)


def flags_of_file(path: str, parser: ArgumentParser) -> list[str]:
    """The arguments of a JSON file as command-line flags, so that both are checked by the same parser."""
    known = {option.removeprefix("--"): action for action in parser._actions for option in action.option_strings}
    del known["help"], known["-h"]
    values = read_json_object(path)
    check_keys(values, known, path)
    flags = []
    for key, value in values.items():
        require(not isinstance(value, dict | list), f"{path}: {key!r} must be one value, found {value!r}")
        is_text = known[key].type is not str or not isinstance(value, bool)
        require(is_text, f"{path}: {key!r} must be text, found {json.dumps(value)}; put it in quotes, or leave it out")
        if value is not None:
            flags.append(f"--{key}={value}")
    return flags


def describe_run(*arguments: Any) -> dict[str, Any]:
    """Everything that is needed to make a run again: arguments, command line, versions, git commit."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    merged = {name: value for part in arguments for name, value in dataclasses.asdict(part).items()}
    merged.pop("local_rank", None)
    return {
        "arguments": merged,
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "git_commit": git_commit(),
        "versions": versions,
    }


def git_commit() -> str | None:
    """Commit of this source tree, with `-dirty` when files differ from it; None outside a checkout."""
    root = Path(__file__).parent.parent
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
