"""Fine-tune a Korean GPT-2 on a task, with or without pause tokens; or an encoder (--task mrc, ict).

    deepspeed finetune/train.py --deepspeed_config ds_configs/zero2.json --task nsmc --num_pauses 10 ...
    torchrun --nproc_per_node 2 finetune/train.py ...        several ranks, with or without DeepSpeed
    python finetune/train.py ...                             one process

Reads top to bottom: arguments, model, data, engine, loop, export.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from finetune.arguments import (
    DataArguments,
    FinetuningArguments,
    ModelArguments,
    ReadingArguments,
    TrainingDataArguments,
)
from finetune.card import model_card
from finetune.confidence import least_confident
from finetune.data import EvaluationSet, cached_store, evaluation_set, training_sources
from finetune.frozen import FrozenLayers, check_cacheable
from finetune.passages import encode_passages
from finetune.run import DATA, LENGTH, Setting, finish, run_to_end, tell_next
from finetune.scoring import fitted_prefixes, score, spelled, write
from finetune.setup import load_model, make_pauses, no_pauses, row_capacity
from finetune.tasks import TASKS, Source, Task
from finetune.train_encoder import train_encoder
from kozero import distributed, plan
from kozero.checkpoint import RunState
from kozero.config import BatchSizes, TrainingArguments, arg, batch_sizes, describe_run, parse_arguments
from kozero.data.batches import Prefixes, TrainingRows
from kozero.data.rows import fit, pieces
from kozero.engines import build_engine, prepare_engine
from kozero.engines.base import Engine
from kozero.errors import require, run_main
from kozero.folder import claim_output
from kozero.freeze import FreezePlan, apply_plan, compile_plan, count_parameters, frozen_weights, report
from kozero.loop import Trainer, resume_key, total_steps
from kozero.pause import PauseArguments, Pauses, schedule
from kozero.runlog import RunLog
from kozero.seal import rehearse
from models.language_model import LanguageModel, checkpoint_activations, export, values_of_model

TINY = Path(__file__).parent.parent / "models" / "tiny_config.json"
SAME = ("batching", "freeze", "num_pauses", "pause_placement", "pause_schedule")  # in a resumed run
RANKED_BY = ("model_name_or_path",)  # where its confidence decides the places of pauses
NUM_SAMPLES, SAMPLE_TOKENS = 2, 32  # texts written at each evaluation, and their length


@dataclass
class FreezeArguments:
    """What trains."""

    freeze: str | None = arg(
        None, "parts that do not train: wte, wpe, h.0-5, ln_f, pause, or all_but:h.6-11,ln_f for those that do"
    )
    cache_frozen: bool = arg(
        False,
        "compute the frozen layers below all that trains once for each training text, without dropout, and read their "
        "outputs from --cache_dir in every step",
    )

    def __post_init__(self) -> None:
        message = "--cache_frozen: nothing is frozen; say what with --freeze, e.g. --freeze wte,wpe,h.0-5"
        require(bool(self.freeze) or not self.cache_frozen, message)


ARGUMENTS = (
    FinetuningArguments, ModelArguments, TrainingDataArguments, ReadingArguments, PauseArguments, FreezeArguments,
)  # fmt: skip


def main() -> None:
    """Parse the arguments, and train a language model or an encoder."""
    training, model_arguments, data, reading, pauses, freezing = parse_arguments(
        *ARGUMENTS, prog="finetune/train.py", description="Fine-tune a Korean language model or encoder under ZeRO."
    )
    distributed.setup(training.timeout_seconds)
    prepare_engine(training, batch_sizes(training, distributed.world_size()))  # a wrong JSON leaves no folder behind
    with claim_output(training.output_dir, (training, model_arguments, data)) as output_dir:
        if data.task in TASKS:
            train(training, model_arguments, data, pauses, freezing, output_dir)
            return
        require(not pauses.num_pauses, f"--num_pauses {pauses.num_pauses}: --task {data.task} has no pauses")
        require(not freezing.freeze, f"--freeze {freezing.freeze}: names parts of a GPT-2; leave it out here")
        run = encode_passages if data.train_mode == "encoder" else train_encoder
        run(training, model_arguments, data, reading, output_dir)


def train(
    training: FinetuningArguments,
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    pause_arguments: PauseArguments,
    freeze_arguments: FreezeArguments,
    output_dir: Path,
) -> None:
    """Model, data, engine, loop, export."""
    task = TASKS[data_arguments.task]
    setting = Setting.of(training, task, model_arguments.model_name_or_path, output_dir)
    train_source, validation_source = training_sources(data_arguments, task)

    no_pauses(task, "--num_pauses", pause_arguments.num_pauses)
    no_pauses(task, "--num_inference_pauses", pause_arguments.at_inference)
    if not (model_arguments.model_name_or_path or model_arguments.config_file):
        model_arguments.config_file = str(TINY)
        distributed.say(f"no --model_name_or_path and no --config_file: random weights of models/{TINY.name}")
    distributed.seed_everything(training.seed)
    model = load_model(model_arguments, pause_arguments, pause_arguments.needs_token, training.seed)
    capacity = row_capacity(data_arguments.max_seq_length, task.max_seq_length, model.config.n_positions)
    freeze_plan = freeze(model, freeze_arguments.freeze, pause_arguments.needs_token)
    cached, stage = freeze_arguments.cache_frozen, setting.engine.stage
    if cached:
        check_cacheable(freeze_arguments.freeze, freeze_plan, model.config.n_layer, pause_arguments, stage)
        layers = FrozenLayers.of(model.module, freeze_plan, setting.engine.engine, training.dtype)
    counts = count_parameters(model.module)
    saved_bytes = [
        plan.state_bytes(counts["total"], number, stage, setting.sizes.world_size, training.dtype)
        for number in (counts["total"], counts["trainable"])
    ]
    shape = plan.ModelShape.of(model.config)
    for line in report(freeze_plan, counts, shape, capacity, saved_bytes[0] - saved_bytes[1], cached):
        distributed.say(line)

    run = describe_run(training, model_arguments, data_arguments, pause_arguments, freeze_arguments)
    pause = pause_settings(model, pause_arguments)
    names = (str(train_source), str(validation_source))

    def save_model(folder: Path, weights: dict | None, state: RunState) -> None:
        card = model_card(task.name, run, names, state.best_scores, state.best_step, pause)
        export(folder, model, weights, pause, card)

    rehearse(output_dir, partial(save_model, state=RunState()))
    rows = training_rows(train_source, task, data_arguments, training, model, pause_arguments, capacity, setting.sizes)
    placement = pause_arguments.pause_placement
    validation = evaluation_set(validation_source, task, data_arguments, model.tokenizer, placement)
    inference = make_pauses(model, pause_arguments.at_inference, placement)

    require_room(validation, inference, capacity)

    if training.gradient_checkpointing:
        checkpoint_activations(model.module.lm)
    frozen = frozen_weights(model.module)
    engine = build_engine(model.module, training, setting.engine)
    if placement == "least_confident" and rows.pauses.num:
        rows.ranked = least_confident(engine, Prefixes(rows.store, rows.fit.cut), rows.fit, rows.pauses.num, capacity)
    if cached:
        rows.hidden = layers.outputs(engine, rows, setting.eval_rows)

    def evaluate(log: RunLog, step: int) -> dict[str, float]:
        result = score(engine, validation, inference, capacity, setting.eval_rows, model.tokenizer)
        for note in result.notes:
            log.say(note)
        log.text(step, "eval/sample", sample_text(engine, validation, inference, capacity, model))
        return result.values

    same = resume_key(
        training, setting.sizes, run["arguments"], SAME + RANKED_BY * (placement == "least_confident"),
        {
            DATA: rows.store.folder.name, LENGTH: capacity, **values_of_model(model.config),
            "pause token id (--pause_token)": model.pause_id if pause_arguments.needs_token else None,
            "frozen weights (--model_name_or_path)": frozen, "--cache_frozen": cached or None,
        },
    )  # fmt: skip
    packed = data_arguments.batching == "packed"
    filled = f"{rows.length.sum() / len(rows) / capacity:.1%} filled" if packed else "at most"
    trainer = Trainer(
        engine, rows, training, setting.sizes, evaluate, task.best_score, same, lower_is_better=task.lower_is_better
    )
    state = run_to_end(
        setting, trainer, run | {"parameters": counts},
        f"{task.name}: {len(rows):,} rows of {capacity} tokens ({filled})",
        f"{len(validation.examples):,} validate",
    )  # fmt: skip
    finish(engine, output_dir, state, save_model)
    generate = "generate: python finetune/generate.py --model_name_or_path {model} --prompt ..."
    tell_next(output_dir, run["arguments"], (), generate)


def freeze(model: LanguageModel, text: str | None, has_pause: bool) -> FreezePlan:
    """Compile and apply the plan; the pause row becomes its own parameter where it trains without its embedding."""
    freeze_plan = compile_plan(text, model.config.n_layer, has_pause)
    if freeze_plan.separate_pause:
        model.module.separate_pause_row()
    apply_plan(freeze_plan, model.module)
    return freeze_plan


def training_rows(
    source: Source,
    task: Task,
    data: DataArguments,
    training: TrainingArguments,
    model: LanguageModel,
    pause: PauseArguments,
    capacity: int,
    sizes: BatchSizes,
) -> TrainingRows:
    """Tokenised, cut and packed rows; tells how many contexts were cut and how many examples do not fit."""
    limit, placement = data.max_train_samples, pause.pause_placement
    store = cached_store(source, task, "train", limit, model.tokenizer, data.cache_dir, placement)
    if task.whole_texts:
        store = store.with_rows(pieces(store.rows, capacity)[0])
    pauses = make_pauses(model, pause.num_pauses, placement, training.seed)
    rows = TrainingRows(store, pauses, capacity, data.batching, training.seed)
    total_rows = total_steps(training, len(rows), sizes) * sizes.global_batch  # refuses a schedule that ends before
    if pause.pause_schedule != "fixed":
        rows.schedule = schedule(pause.pause_schedule, pause.num_pauses, training.seed, total_rows)
    if rows.fit.num_cut:
        distributed.say(f"{rows.fit.num_cut:,} of {len(store):,} training contexts were cut to fit {capacity} tokens")
    if rows.fit.num_left_out:
        distributed.say(
            f"{rows.fit.num_left_out:,} of {len(store):,} training examples are left out: question, pauses and "
            f"answer alone are longer than {capacity} tokens"
        )
    require(len(rows) > 0, f"{source}: no example fits {capacity} tokens; raise --max_seq_length")
    return rows


def require_room(data: EvaluationSet, pauses: Pauses, capacity: int) -> None:
    """Something of the validation set must fit, or its score would be known only after training."""
    if data.task.whole_texts:
        return
    new_tokens = 0 if data.task.labels else data.task.max_new_tokens
    fitted = fit(data.store, capacity - new_tokens, pauses.num)
    kept = f" beside {pauses.num} pauses" + (f" and {new_tokens} tokens for the answer" if new_tokens else "")
    require(len(fitted.used) > 0, f"no validation example fits {capacity} tokens{kept}; raise --max_seq_length")


def sample_text(engine: Engine, data: EvaluationSet, pauses: Pauses, capacity: int, model: LanguageModel) -> str:
    """What the model writes after the first prompts of the validation set."""
    new_tokens = min(SAMPLE_TOKENS, data.task.max_new_tokens)
    if data.task.whole_texts:
        data = data.heads(pauses.inside)
    texts, fitted = fitted_prefixes(engine, data, pauses, max(1, capacity - new_tokens), most=8)
    found = {texts.parts(k)[0].tobytes(): k for k in reversed(fitted.used.tolist())}  # choices share a prompt
    numbers = sorted(found.values())[:NUM_SAMPLES]
    prefixes = [texts.parts(k)[0] for k in numbers]
    prompts = [texts.prompt(k, pauses) for k in numbers]
    answers = write(engine, model.tokenizer, prompts, pauses, 1, max_new_tokens=new_tokens, do_sample=False)
    heads = [spelled(model.tokenizer, prefix.tolist())[-60:] for prefix in prefixes]
    return " | ".join(f"{head} → {answer.strip()}" for head, answer in zip(heads, answers, strict=True))


def pause_settings(model: LanguageModel, arguments: PauseArguments) -> dict:
    """What config.json of the exported model says about its pauses; empty for a model without. Full stops that pause
    are no token of their own."""
    if not (arguments.num_pauses or arguments.at_inference):
        return model.pause_settings
    own = {}
    if arguments.pause_placement != "filler":
        own = {"token": model.tokenizer.convert_ids_to_tokens(model.pause_id), "token_id": model.pause_id}
    return own | {
        "placement": arguments.pause_placement,
        "num_pauses": arguments.num_pauses,
        "num_inference_pauses": arguments.at_inference,
    }


if __name__ == "__main__":
    run_main(main)
