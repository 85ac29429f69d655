"""Fine-tune a Korean GPT-2 on a task, with or without pause tokens.

    deepspeed finetune/train.py --deepspeed_config ds_configs/zero2.json --task nsmc --num_pauses 10 ...
    torchrun --nproc_per_node 2 finetune/train.py ...        several ranks, with or without DeepSpeed
    python finetune/train.py ...                             one process

Reads top to bottom: arguments, model, data, engine, loop, export.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from finetune.arguments import DataArguments, ModelArguments
from finetune.card import model_card
from finetune.data import EvaluationSet, cached_store, evaluation_set, sources
from finetune.scoring import score, write
from finetune.setup import load_model, row_capacity
from finetune.tasks import TASKS, Source, Task
from kozero import distributed, plan
from kozero.checkpoint import Checkpoints, RunState
from kozero.config import BatchSizes, TrainingArguments, arg, batch_sizes, describe_run, parse_arguments, require
from kozero.data.batches import TrainingRows, prefix_and_target
from kozero.data.rows import fit
from kozero.engines import build_engine, prepare_engine
from kozero.engines.base import Engine
from kozero.errors import UserError, run_main
from kozero.folder import claim_output, save_run, write_text
from kozero.freeze import FreezePlan, apply_plan, compile_plan, count_parameters, report
from kozero.loop import Trainer
from kozero.pause import PauseArguments, Pauses
from kozero.runlog import RunLog
from models.language_model import LanguageModel, export

TINY = Path(__file__).parent.parent / "models" / "tiny_config.json"
NUM_SAMPLES, SAMPLE_TOKENS = 2, 32  # texts written at each evaluation, and their length


@dataclass
class FreezeArguments:
    """What trains."""

    freeze: str | None = arg(
        None, "parts that do not train: wte, wpe, h.0-5, ln_f, pause, or all_but:h.6-11,ln_f for those that do"
    )


def main() -> None:
    """The whole run."""
    training, model_arguments, data_arguments, pause_arguments, freeze_arguments = parse_arguments(
        TrainingArguments, ModelArguments, DataArguments, PauseArguments, FreezeArguments,
        prog="finetune/train.py", description="Fine-tune a Korean GPT-2 with pause tokens under ZeRO.",
    )  # fmt: skip
    distributed.setup(training.timeout_seconds)
    with claim_output(training.output_dir) as output_dir:
        train(training, model_arguments, data_arguments, pause_arguments, freeze_arguments, output_dir)


def train(
    training: TrainingArguments,
    model_arguments: ModelArguments,
    data_arguments: DataArguments,
    pause_arguments: PauseArguments,
    freeze_arguments: FreezeArguments,
    output_dir: Path,
) -> None:
    """Model, data, engine, loop, export."""
    sizes = batch_sizes(training, distributed.world_size())
    engine_settings = prepare_engine(training, sizes)  # before the model: a wrong JSON ends the run at once
    task = TASKS[data_arguments.task]
    checkpoint = Checkpoints(output_dir, training.save_total_limit).to_resume(training.resume)
    train_source, validation_source = sources(data_arguments, task)
    if train_source.path is None and train_source.hub is None:
        raise UserError("--validation_file alone trains nothing; give --train_file too")

    if not (model_arguments.model_name_or_path or model_arguments.config_file):
        model_arguments.config_file = str(TINY)
        distributed.say(f"no --model_name_or_path and no --config_file: random weights of models/{TINY.name}")
    distributed.seed_everything(training.seed)
    model = load_model(model_arguments, pause_arguments, pause_arguments.num_pauses > 0, training.seed)
    capacity = row_capacity(data_arguments.max_seq_length, task.max_seq_length, model.config.n_positions)
    freeze_plan = freeze(model, freeze_arguments.freeze, pause_arguments.num_pauses > 0)
    counts = count_parameters(model.module)
    saved_bytes = [
        plan.state_bytes(counts["total"], number, engine_settings.stage, sizes.world_size, training.dtype)
        for number in (counts["total"], counts["trainable"])
    ]
    shape = plan.ModelShape.of(model.config)
    for line in report(freeze_plan, counts, shape, capacity, saved_bytes[0] - saved_bytes[1]):
        distributed.say(line)

    rows = training_rows(train_source, task, data_arguments, training, model, pause_arguments, capacity)
    validation = evaluation_set(validation_source, task, data_arguments, model.tokenizer)
    inference = Pauses(model.pause_id or 0, pause_arguments.at_inference)
    micro = training.per_device_eval_batch_size or training.per_device_train_batch_size

    if training.gradient_checkpointing:
        model.module.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    engine = build_engine(model.module, training, engine_settings)

    def evaluate(log: RunLog, step: int) -> dict[str, float]:
        result = score(engine, validation, inference, capacity, micro, model.tokenizer)
        for note in result.notes:
            log.say(note)
        log.text(step, "eval/sample", sample_text(engine, validation, inference, capacity, model))
        return result.values

    run = describe_run(training, model_arguments, data_arguments, pause_arguments, freeze_arguments)
    same = resume_key(run, rows, sizes, engine_settings.stage, shape)
    trainer = Trainer(engine, rows, training, sizes, evaluate, task.best_score, same)
    if checkpoint:
        trainer.resume(checkpoint)
        distributed.say(f"resumed from {checkpoint} at step {trainer.state.step}")
    save_run(output_dir, run | {"deepspeed": engine_settings.resolved, "parameters": counts})
    distributed.say(
        f"{task.name}: {len(rows):,} rows of {capacity} tokens ({rows.length.sum() / len(rows) / capacity:.1%} real), "
        f"{sizes.global_batch} rows a step on {sizes.world_size} ranks ({distributed.device().type}, {training.dtype}, "
        f"ZeRO-{engine_settings.stage}), {trainer.total_steps:,} steps; {len(validation.examples):,} validate"
    )
    state = trainer.fit()
    trainer.load_best()
    pause = pause_settings(model, pause_arguments)
    data = (str(train_source), str(validation_source))
    card = model_card(task.name, run, data, state.best_scores, state.best_step, pause)
    finish(engine, model, output_dir, pause, card, state)
    tell_next(output_dir / "model", run["arguments"], output_dir)


def freeze(model: LanguageModel, text: str | None, has_pause: bool) -> FreezePlan:
    """Compile and apply the plan; the pause row becomes its own parameter where it trains without its embedding."""
    freeze_plan = compile_plan(text, model.config.n_layer, has_pause)
    if freeze_plan.separate_pause:
        model.module.separate_pause_row(model.pause_id)
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
) -> TrainingRows:
    """Tokenised, cut and packed rows; tells how many contexts were cut and how many examples do not fit."""
    store = cached_store(source, task, "train", data.max_train_samples, model.tokenizer, data.cache_dir)
    pauses = Pauses(model.pause_id or 0, pause.num_pauses)
    rows = TrainingRows(store, pauses, capacity, data.batching, training.seed)
    if rows.fit.num_cut:
        distributed.say(f"{rows.fit.num_cut:,} of {len(store):,} training contexts were cut to fit {capacity} tokens")
    if rows.fit.num_left_out:
        distributed.say(
            f"{rows.fit.num_left_out:,} of {len(store):,} training examples are left out: question, pauses and "
            f"answer alone are longer than {capacity} tokens"
        )
    require(len(rows) > 0, f"{source}: no example fits {capacity} tokens; raise --max_seq_length")
    return rows


def sample_text(engine: Engine, data: EvaluationSet, pauses: Pauses, capacity: int, model: LanguageModel) -> str:
    """What the model writes after the first prompts of the validation set."""
    new_tokens = min(SAMPLE_TOKENS, data.task.max_new_tokens)
    fitted = fit(data.store, max(1, capacity - new_tokens), pauses.num)
    prefixes = [prefix_and_target(data.store, fitted.cut, k)[0] for k in fitted.used[:8].tolist()]
    prefixes = list({prefix.tobytes(): prefix for prefix in prefixes}.values())[:NUM_SAMPLES]  # choices share a prompt
    prompts = [pauses.prompt(prefix) for prefix in prefixes]
    texts = write(engine, model.tokenizer, prompts, 1, max_new_tokens=new_tokens, do_sample=False) if prompts else []
    heads = [model.tokenizer.decode(prefix.tolist())[-60:] for prefix in prefixes]
    return " | ".join(f"{head} → {text.strip()}" for head, text in zip(heads, texts, strict=True))


def resume_key(run: dict, rows: TrainingRows, sizes: BatchSizes, stage: int, shape: plan.ModelShape) -> dict:
    """What must not change between a run and its resumption: the rows, their order, the batch, the weights."""
    named = ("seed", "task", "batching", "freeze", "num_pauses", "optim", "gradient_accumulation_steps")
    return {name: run["arguments"][name] for name in named} | {
        "rows": rows.store.folder.name,
        "capacity": rows.capacity,
        "global_batch": sizes.global_batch,
        "world_size": sizes.world_size,
        "model": asdict(shape),
        "zero_stage": stage,
        "dtype": "bf16" if run["arguments"]["bf16"] else "fp16" if run["arguments"]["fp16"] else "fp32",
    }


def pause_settings(model: LanguageModel, arguments: PauseArguments) -> dict:
    """What config.json of the exported model says about its pauses; empty for a model without."""
    if not arguments.num_pauses:
        return model.pause_settings
    return {
        "token": model.tokenizer.convert_ids_to_tokens(model.pause_id),
        "token_id": model.pause_id,
        "placement": "append",
        "num_pauses": arguments.num_pauses,
        "num_inference_pauses": arguments.at_inference,
    }


def finish(engine: Engine, model: LanguageModel, output_dir: Path, pause: dict, card: str, state: RunState) -> None:
    """Export the best weights, keep their scores, and let the engine go."""
    weights = engine.full_state_dict()
    if distributed.is_main():
        export(output_dir / "model", model, weights, pause, card)
        scores = {"step": state.best_step, "scores": state.best_scores}
        write_text(output_dir / "scores.json", json.dumps(scores, indent=2, ensure_ascii=False))
        shown = " ".join(f"{name} {value:.4f}" for name, value in state.best_scores.items())
        print(f"best scores (step {state.best_step}): {shown}")
    engine.close()
    distributed.shutdown()


def tell_next(folder: Path, arguments: dict, output_dir: Path) -> None:
    """The commands to go on with; the last line is the folder alone."""
    if not distributed.is_main():
        return
    named = ("task", "train_file", "validation_file", "validation_fraction", "bad_rows", "max_seq_length")
    defaults = asdict(DataArguments())
    flags = [f"--{name} {arguments[name]}" for name in named if name == "task" or arguments[name] != defaults[name]]
    flags += ["--from_hub"] if arguments["from_hub"] else []
    print(f"curves:   tensorboard --logdir {output_dir}")
    print(f"score:    python finetune/evaluate.py --model_name_or_path {folder} {' '.join(flags)}")
    print(f"generate: python finetune/generate.py --model_name_or_path {folder} --prompt ...")
    print(folder, flush=True)


if __name__ == "__main__":
    run_main(main)
