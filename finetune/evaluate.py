"""Score a model on a task: one process, several ranks, or sharded by ZeRO-3.

python finetune/evaluate.py --model_name_or_path runs/run/model --task nsmc --validation_file ratings_test.txt
"""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from finetune.arguments import DataArguments, ModelArguments, ReadingArguments
from finetune.data import EvaluationSet, evaluation_set, sources
from finetune.encoder import Found, load
from finetune.questions import QuestionSet, question_set
from finetune.scoring import Scores, score
from finetune.setup import inference_pauses, load_model, make_pauses, no_pauses, row_capacity
from finetune.sweep import beside, save_sweep, settings_of, sweep, warnings
from finetune.tasks import ENCODER_TASKS, TASKS, Example, Task
from finetune.train_encoder import ENCODER_TRAINING, encoder_capacity
from kozero import distributed
from kozero.config import TrainingArguments, arg, at_least, batch_sizes, check_timeout, parse_arguments
from kozero.data.framing import Framing
from kozero.engines import EngineSettings, build_engine, prepare_engine
from kozero.errors import require, run_main
from kozero.folder import new_file, write_text
from kozero.pause import InferencePauseArguments

Result = TypeVar("Result", Scores, Found)


@dataclass
class EvaluationArguments:
    """How to score."""

    deepspeed_config: str | None = arg(None, "DeepSpeed JSON of stage 3, for a model larger than one GPU")
    per_device_eval_batch_size: int = arg(8, "rows of one forward pass on one rank", aliases=["--eval_batch_size"])
    bf16: bool = arg(False, "compute in bfloat16")
    fp16: bool = arg(False, "compute in float16")
    output_file: str | None = arg(
        None,
        "JSON for the scores; predictions go beside it as .predictions.jsonl (mrc: .predictions.json, .nbest.json)",
    )
    sweep_pauses: str | None = arg(
        None, "score with each of these numbers of pauses, e.g. 0,1,2,5,10,20,50; JSON, CSV and plot: --output_file"
    )
    sweep_placement: str | None = arg(None, "placements of --sweep_pauses, e.g. append,prepend,filler; default: append")
    timeout_seconds: float = arg(600.0, "seconds that a rank waits for the others before the run ends")
    local_rank: int = arg(-1, "set by the deepspeed launcher; leave it alone")

    def __post_init__(self) -> None:
        at_least(1, self, "per_device_eval_batch_size")
        check_timeout(self.timeout_seconds)
        message = f"{self.sweep_placement}: of what? give --sweep_pauses too, e.g. --sweep_pauses 0,5,10"
        require(self.sweep_placement is None or self.sweep_pauses is not None, f"--sweep_placement {message}")
        self.sweep_placement = self.sweep_placement or "append"
        if self.sweep_pauses:
            settings_of(self.sweep_pauses, self.sweep_placement)

    def as_training(self) -> TrainingArguments:
        """The part of a run's arguments that an engine needs; nothing is trained."""
        return TrainingArguments(
            deepspeed_config=self.deepspeed_config,
            per_device_train_batch_size=self.per_device_eval_batch_size,
            bf16=self.bf16,
            fp16=self.fp16,
        )

    def engine_settings(self) -> EngineSettings:
        """Checked before a model is loaded."""
        training = self.as_training()
        return prepare_engine(training, batch_sizes(training, distributed.world_size()))


ARGUMENTS = (EvaluationArguments, ModelArguments, DataArguments, ReadingArguments, InferencePauseArguments)


def main() -> None:
    """Load, score, print."""
    arguments, model_arguments, data_arguments, reading_arguments, pause_arguments = parse_arguments(
        *ARGUMENTS, prog="finetune/evaluate.py", description="Score a model on a task."
    )
    distributed.setup(arguments.timeout_seconds)
    if arguments.sweep_pauses:
        arguments.output_file = arguments.output_file or f"sweep-{data_arguments.task}.json"
    if arguments.output_file:
        path = Path(arguments.output_file)
        others = beside(path) if arguments.sweep_pauses else files(path, data_arguments.task)
        new_file("--output_file", path, *others, reads=(arguments, model_arguments, data_arguments))
    if data_arguments.task in TASKS:
        run = sweep_language_model if arguments.sweep_pauses else score_language_model
        run(arguments, model_arguments, data_arguments, pause_arguments)
    else:
        message = f"--sweep_pauses {arguments.sweep_pauses}: --task {data_arguments.task} has no pauses"
        require(not arguments.sweep_pauses, message)
        score_encoder(arguments, model_arguments, data_arguments, reading_arguments)
    distributed.shutdown()


def score_language_model(
    arguments: EvaluationArguments, model_arguments: ModelArguments, data: DataArguments, pause: InferencePauseArguments
) -> None:
    """A GPT-2."""
    settings = arguments.engine_settings()
    task = TASKS[data.task]
    no_pauses(task, "--num_inference_pauses", pause.num_inference_pauses)
    source = sources(data, task)[1]
    model = load_model(model_arguments, pause, with_pauses=False, seed=0)
    pauses = make_pauses(model, 0, "append") if task.whole_texts else inference_pauses(model, pause)
    capacity = row_capacity(data.max_seq_length, task.max_seq_length, model.config.n_positions)
    questions = evaluation_set(source, task, data, model.tokenizer, pauses.placement)
    engine = build_engine(model.module, arguments.as_training(), settings)
    micro, what = arguments.per_device_eval_batch_size, f"examples of {source}, {pauses.num} pauses"
    work = partial(score, engine, questions, pauses, capacity, micro, model.tokenizer)
    result = told_score(task, questions, what, work)
    if arguments.output_file:
        told = {"data": str(source), "num_pauses": pauses.num, "scores": result.values}
        save(Path(arguments.output_file), task.name, told, [predictions(result, questions.examples)])
    engine.close()


def sweep_language_model(
    arguments: EvaluationArguments, model_arguments: ModelArguments, data: DataArguments, pause: InferencePauseArguments
) -> None:
    """A GPT-2 over numbers and placements of pauses."""
    require(
        pause.num_inference_pauses < 0 and pause.pause_placement is None,
        "--sweep_pauses: names its own numbers and placements (--sweep_placement); leave --num_inference_pauses and "
        "--pause_placement out",
    )
    settings = arguments.engine_settings()
    task, cells = TASKS[data.task], settings_of(arguments.sweep_pauses, arguments.sweep_placement)
    no_pauses(task, "--sweep_pauses", max(num for _, num in cells))
    name = model_arguments.model_name_or_path or str(model_arguments.config_file)
    path = Path(arguments.output_file)
    require(path.suffix == ".json", f"--output_file {path}: must end in .json; the CSV and the plot go beside it")
    source = sources(data, task)[1]
    model = load_model(model_arguments, pause, with_pauses=False, seed=0)
    capacity = row_capacity(data.max_seq_length, task.max_seq_length, model.config.n_positions)
    for placement, number in cells:
        make_pauses(model, number, placement)  # refused before the first of them is scored
    engine = build_engine(model.module, arguments.as_training(), settings)

    def questions(placement: str, **fewer: int) -> EvaluationSet:
        return evaluation_set(source, task, replace(data, **fewer), model.tokenizer, placement)

    found, groups = sweep(engine, model, questions, cells, capacity, arguments.per_device_eval_batch_size)
    for warning in warnings(found):
        distributed.say(warning)
    if distributed.is_main():
        told = {"title": f"{task.name}, {name}", "data": str(source), "trained_with": model.pause_settings}
        for written in save_sweep(path, found, told | {"groups": groups}):
            print(written)
    engine.close()


def score_encoder(
    arguments: EvaluationArguments, model_arguments: ModelArguments, data: DataArguments, reading: ReadingArguments
) -> None:
    """An encoder with the head of its task."""
    settings = arguments.engine_settings()
    task, kind = ENCODER_TASKS[data.task], ENCODER_TRAINING[data.task]
    source = sources(data, task)[1]
    model = load(model_arguments, kind.head, seed=0)
    require(
        not (model.fresh and kind.needs_head),
        f"{model_arguments.model_name_or_path}: no head for --task {task.name}; fine-tune one with finetune/train.py",
    )
    learner = kind(reading, Framing.of(model.tokenizer), encoder_capacity(model, data, task))
    questions = question_set(source, task, data.max_eval_samples, model.tokenizer, data.cache_dir)
    engine = build_engine(model.module, arguments.as_training(), settings)
    micro = arguments.per_device_eval_batch_size
    found = told_score(task, questions, f"questions of {source}", partial(learner.score, engine, questions, micro))
    if arguments.output_file:
        told = {"data": str(source), "scores": found.values}
        texts = (json.dumps(found.files[name], indent=2, ensure_ascii=False) for name in kind.files)
        save(Path(arguments.output_file), task.name, told, texts)
    engine.close()


def told_score(task: Task, questions: EvaluationSet | QuestionSet, what: str, work: Callable[[], Result]) -> Result:
    """The result of `work`, printed: notes, then time and the scores, one a line."""
    started = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - started
    for note in result.notes:
        distributed.say(note)
    distributed.say(f"{task.name}: {len(questions.examples):,} {what}, {seconds:.1f} s")
    for name, value in result.values.items():
        distributed.say(f"{name:>24} {value:.4f}")
    return result


def files(path: Path, task: str) -> list[Path]:
    """What is written beside the scores at `path`."""
    if task in TASKS:
        return [path.with_suffix(".predictions.jsonl")]
    return [path.with_name(f"{path.stem}.{name}.json") for name in ENCODER_TRAINING[task].files]


def save(path: Path, task: str, told: dict[str, Any], texts: Iterable[str]) -> None:
    """Scores as JSON, after the texts of the files beside them: who finds the scores finds the rest."""
    if distributed.is_main():
        for file, text in zip(files(path, task), texts, strict=True):
            write_text(file, text)
        write_text(path, json.dumps(told, indent=2, ensure_ascii=False))


def predictions(result: Scores, examples: list[Example]) -> str:
    """What was predicted for each example and its score, as JSON lines."""
    rows = zip(examples, result.predictions, result.each, strict=True)
    return "".join(
        json.dumps({"id": example.id, "prediction": prediction, "score": score}, ensure_ascii=False) + "\n"
        for example, prediction, score in rows
    )


if __name__ == "__main__":
    run_main(main)
