"""Fine-tune an encoder to read (--task mrc) or to find (--task ict) passages. Called by train.py; reads top to bottom:
model, data, engine, loop, export."""

import json
from functools import partial
from pathlib import Path

from finetune.arguments import DataArguments, FinetuningArguments, ModelArguments, ReadingArguments
from finetune.card import encoder_card
from finetune.data import training_sources
from finetune.encoder import EncoderModel, EncoderTask, Found, load
from finetune.questions import open_questions, question_set
from finetune.reading import Reading
from finetune.retrieval import Retrieval
from finetune.run import DATA, LENGTH, Setting, finish, run_to_end, tell_next
from finetune.setup import row_capacity
from finetune.tasks import ENCODER_TASKS, Task
from kozero import distributed
from kozero.checkpoint import RunState
from kozero.config import describe_run
from kozero.data.framing import Framing
from kozero.engines import build_engine
from kozero.folder import write_text
from kozero.loop import Trainer, resume_key
from kozero.runlog import RunLog
from kozero.seal import rehearse
from models.heads import ROUTER
from models.language_model import checkpoint_activations, values_of_model

ENCODER_TRAINING: dict[str, type[EncoderTask]] = {"mrc": Reading, "ict": Retrieval}
NEXT = {
    "mrc": "answers:  {output_dir}/predictions.json, {output_dir}/nbest.json",
    "ict": "search:   python finetune/train.py --train_mode encoder --model_name_or_path {model} {flags} "
    "--output_dir {output_dir}",
}


def train_encoder(
    training: FinetuningArguments,
    model_arguments: ModelArguments,
    data: DataArguments,
    reading: ReadingArguments,
    output_dir: Path,
) -> None:
    """Model, data, engine, loop, export."""
    task, kind = ENCODER_TASKS[data.task], ENCODER_TRAINING[data.task]
    setting = Setting.of(training, task, model_arguments.model_name_or_path, output_dir)
    train_source, validation_source = training_sources(data, task)

    distributed.seed_everything(training.seed)
    model = load(model_arguments, kind.head, training.seed)
    learner = kind(reading, Framing.of(model.tokenizer), encoder_capacity(model, data, task))
    run = describe_run(training, model_arguments, data, reading)
    names = (str(train_source), str(validation_source))

    def save_model(folder: Path, weights: dict | None, state: RunState) -> None:
        model.export(folder, weights, encoder_card(task.name, run, names, state.best_scores, state.best_step))

    rehearse(output_dir, partial(save_model, state=RunState()))
    store = open_questions(train_source, task, data.max_train_samples, model.tokenizer, data.cache_dir)
    rows = learner.rows(store, setting.sizes, training.seed, model.routes)
    validation = question_set(validation_source, task, data.max_eval_samples, model.tokenizer, data.cache_dir)

    if training.gradient_checkpointing:
        checkpoint_activations(model.encoder)
    engine = build_engine(model.module, training, setting.engine)
    scored: dict[int, Found] = {}  # the last evaluation, by its step

    def evaluate(log: RunLog, step: int) -> dict[str, float]:
        scored.clear()
        found = scored[step] = learner.score(engine, validation, setting.eval_rows)
        if found.sample:
            log.text(step, "eval/sample", found.sample)
        return found.values

    same = resume_key(
        training, setting.sizes, run["arguments"], kind.row_arguments,
        {DATA: store.folder.name, LENGTH: learner.capacity, **values_of_model(model.encoder.config)},
    )  # fmt: skip
    objectives = (kind.objective, *(ROUTER if model.routes else ()))
    trainer = Trainer(engine, rows, training, setting.sizes, evaluate, task.best_score, same, objectives)
    state = run_to_end(
        setting, trainer, run, f"{task.name}: {len(rows):,} rows of {learner.capacity} tokens at most",
        f"{len(validation.examples):,} questions validate",
    )  # fmt: skip
    best = scored.get(state.best_step) or learner.score(engine, validation, setting.eval_rows)
    write_files(best, output_dir)
    finish(engine, output_dir, state, save_model)
    tell_next(output_dir, run["arguments"], (*kind.row_arguments, *kind.score_arguments), NEXT[task.name])


def encoder_capacity(model: EncoderModel, data: DataArguments, task: Task) -> int:
    """Tokens of a row at most."""
    return row_capacity(data.max_seq_length, task.max_seq_length, model.encoder.config.max_position_embeddings)


def write_files(found: Found, folder: Path) -> None:
    """What a score leaves beside it, as JSON files."""
    if distributed.is_main():
        for name, value in found.files.items():
            write_text(folder / f"{name}.json", json.dumps(value, indent=2, ensure_ascii=False))
