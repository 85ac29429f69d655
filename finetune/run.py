"""What every fine-tuning run does around its model and its rows: the checks before, the loop, the export after."""

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from finetune.arguments import DataArguments, ReadingArguments
from finetune.tasks import Task
from kozero import distributed
from kozero.checkpoint import Checkpoints, RunState
from kozero.config import BatchSizes, TrainingArguments, batch_sizes
from kozero.engines import EngineSettings, prepare_engine
from kozero.engines.base import Engine
from kozero.errors import require
from kozero.folder import write_text
from kozero.loop import Trainer
from kozero.seal import whole_folder

# What a changed value of a resume key comes from.
DATA, LENGTH = "data (files, --max_train_samples, --bad_rows, tokenizer)", "row length (--max_seq_length)"

Export = Callable[[Path, dict[str, torch.Tensor] | None, RunState], None]  # fills a folder; None: without weights


@dataclass(frozen=True)
class Setting:
    """What is settled before there is a model. `checkpoint` is the one to go on from."""

    training: TrainingArguments
    output_dir: Path
    sizes: BatchSizes
    engine: EngineSettings
    checkpoint: Path | None

    @classmethod
    def of(cls, training: TrainingArguments, task: Task, base: str | None, output_dir: Path) -> "Setting":
        """Refuse what cannot run before anything long begins. Epochs that were not said are the task's; `base` is the
        model that the run starts from."""
        message = f"--model_name_or_path {base}: --output_dir would write over it; choose another --output_dir"
        require(base is None or Path(base).resolve() != (output_dir / "model").resolve(), message)
        if training.max_steps and training.num_train_epochs:
            distributed.say(f"--max_steps {training.max_steps} decides, not --num_train_epochs")
        training.num_train_epochs = training.num_train_epochs or task.num_train_epochs
        sizes = batch_sizes(training, distributed.world_size())
        engine = prepare_engine(training, sizes)
        checkpoint = Checkpoints(output_dir, training.save_total_limit).to_resume(training.resume, training.max_steps)
        return cls(training, output_dir, sizes, engine, checkpoint)

    @property
    def eval_rows(self) -> int:
        """Rows of one forward pass in evaluation on one rank."""
        return self.training.per_device_eval_batch_size or self.training.per_device_train_batch_size

    def __str__(self) -> str:
        return (
            f"{self.sizes.global_batch} rows a step on {self.sizes.world_size} ranks ({distributed.device().type}, "
            f"{self.training.dtype}, ZeRO-{self.engine.stage})"
        )


def run_to_end(setting: Setting, trainer: Trainer, run: dict[str, Any], rows: str, validation: str) -> RunState:
    """Train from where the run stands to its end, and put the best weights back. `run` is kept in run.json, `rows` and
    `validation` are what it trains and validates on, in words."""
    trainer.begin(setting.checkpoint, run | {"deepspeed": setting.engine.resolved})
    distributed.say(f"{rows}, {setting}, {trainer.total_steps:,} steps; {validation}")
    state = trainer.fit()
    trainer.load_best()
    return state


def finish(engine: Engine, output_dir: Path, state: RunState, export: Export) -> None:
    """Export the best weights, keep their scores, and let the engine go."""
    weights = engine.full_state_dict()
    if distributed.is_main():
        with whole_folder(output_dir / "model") as folder:
            export(folder, weights, state)
        scores = {"step": state.best_step, "scores": state.best_scores}
        write_text(output_dir / "scores.json", json.dumps(scores, indent=2, ensure_ascii=False))
        shown = " ".join(f"{name} {value:.4f}" for name, value in state.best_scores.items())
        print(f"best scores (step {state.best_step}): {shown}")
    engine.close()
    distributed.shutdown()


def tell_next(output_dir: Path, told: dict[str, Any], named: Sequence[str], then: str) -> None:
    """The commands to go on with; the last line is the folder of the model alone.

    Args: told: the run's arguments, of which those that are `named` matter to its scores; then: one more line, in which
        {model}, {output_dir} and {flags} stand for the folders and those arguments.
    """
    if not distributed.is_main():
        return
    folder = output_dir / "model"
    shared = ("task", "train_file", "validation_file", "validation_fraction", "bad_rows", "max_seq_length")
    defaults = asdict(DataArguments()) | asdict(ReadingArguments()) | {"task": None}
    said = [name for name in (*shared, *named) if told[name] != defaults[name]]
    flags = [word for name in said for word in (f"--{name}", str(told[name]))] + ["--from_hub"] * told["from_hub"]
    model, folder_of_run, flags = shlex.quote(str(folder)), shlex.quote(str(output_dir)), shlex.join(flags)
    print(f"curves:   tensorboard --logdir {folder_of_run}")
    print(f"score:    python finetune/evaluate.py --model_name_or_path {model} {flags}")
    print(then.format(model=model, output_dir=folder_of_run, flags=flags))
    print(folder, flush=True)
