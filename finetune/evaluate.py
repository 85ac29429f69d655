"""Score a model on a task: one process, several ranks, or sharded by ZeRO-3.

python finetune/evaluate.py --model_name_or_path runs/run/model --task nsmc --validation_file ratings_test.txt
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

from finetune.arguments import DataArguments, ModelArguments
from finetune.data import evaluation_set, sources
from finetune.scoring import Scores, score
from finetune.setup import inference_pauses, load_model, row_capacity
from finetune.tasks import TASKS, Example
from kozero import distributed
from kozero.config import TrainingArguments, arg, at_least, batch_sizes, parse_arguments, require
from kozero.engines import build_engine, prepare_engine
from kozero.errors import run_main
from kozero.folder import writable_folder, write_text
from kozero.pause import PauseArguments


@dataclass
class EvaluationArguments:
    """How to score."""

    deepspeed_config: str | None = arg(None, "DeepSpeed JSON of stage 3, for a model larger than one GPU")
    per_device_eval_batch_size: int = arg(8, "rows of one forward pass on one rank", aliases=["--eval_batch_size"])
    bf16: bool = arg(False, "compute in bfloat16")
    fp16: bool = arg(False, "compute in float16")
    output_file: str | None = arg(None, "JSON for the scores; predictions go beside it as .predictions.jsonl")
    timeout_seconds: float = arg(600.0, "seconds that a rank waits for the others before the run ends")
    local_rank: int = arg(-1, "set by the deepspeed launcher; leave it alone")

    def __post_init__(self) -> None:
        at_least(1, self, "per_device_eval_batch_size")
        require(self.timeout_seconds > 0, f"--timeout_seconds {self.timeout_seconds}: must be above 0")

    def as_training(self) -> TrainingArguments:
        """The part of a run's arguments that an engine needs; nothing is trained."""
        return TrainingArguments(
            deepspeed_config=self.deepspeed_config,
            per_device_train_batch_size=self.per_device_eval_batch_size,
            bf16=self.bf16,
            fp16=self.fp16,
        )


def main() -> None:
    """Load, score, print."""
    arguments, model_arguments, data_arguments, pause_arguments = parse_arguments(
        EvaluationArguments, ModelArguments, DataArguments, PauseArguments,
        prog="finetune/evaluate.py", description="Score a model on a task.",
    )  # fmt: skip
    distributed.setup(arguments.timeout_seconds)
    if arguments.output_file:
        writable_folder("--output_file", Path(arguments.output_file).parent)
    training = arguments.as_training()
    settings = prepare_engine(training, batch_sizes(training, distributed.world_size()))
    task = TASKS[data_arguments.task]
    model = load_model(model_arguments, pause_arguments, with_pauses=False, seed=0)
    pauses = inference_pauses(model, pause_arguments)
    capacity = row_capacity(data_arguments.max_seq_length, task.max_seq_length, model.config.n_positions)
    source = sources(data_arguments, task)[1]
    data = evaluation_set(source, task, data_arguments, model.tokenizer)
    engine = build_engine(model.module, training, settings)
    started = time.perf_counter()
    micro = arguments.per_device_eval_batch_size
    result = score(engine, data, pauses, capacity, micro, model.tokenizer)
    seconds = time.perf_counter() - started
    for note in result.notes:
        distributed.say(note)
    distributed.say(f"{task.name}: {len(data.examples):,} examples of {source}, {pauses.num} pauses, {seconds:.1f} s")
    for name, value in result.values.items():
        distributed.say(f"{name:>24} {value:.4f}")
    if arguments.output_file and distributed.is_main():
        save(Path(arguments.output_file), result, data.examples, pauses.num, str(source))
    engine.close()
    distributed.shutdown()


def save(path: Path, result: Scores, examples: list[Example], num_pauses: int, source: str) -> None:
    """Scores as JSON, predictions as JSON lines beside it."""
    found = {"data": source, "num_pauses": num_pauses, "scores": result.values}
    write_text(path, json.dumps(found, indent=2, ensure_ascii=False))
    rows = (
        json.dumps({"id": example.id, "prediction": prediction}, ensure_ascii=False) + "\n"
        for example, prediction in zip(examples, result.predictions, strict=True)
    )
    write_text(path.with_suffix(".predictions.jsonl"), "".join(rows))


if __name__ == "__main__":
    run_main(main)
