"""Pre-training from a corpus: what train.py, train_zero_one.py and train_zero_two.py have in common, which is all but
the engine. Reads top to bottom: arguments, tokenizer, corpus, model, engine, loop, export."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from kozero import distributed
from kozero.batch_search import Prober, largest_micro_batch
from kozero.checkpoint import Checkpoints, RunState, random_state, restore_random_state, saved_run
from kozero.config import BatchSizes, batch_sizes, describe_run, parse_arguments
from kozero.contrast import check_negatives
from kozero.data.batch import Rows, deal
from kozero.data.order import ABSENT, OrderedRows
from kozero.data.store import key_of
from kozero.ds_config import resolve
from kozero.engines import EngineSettings, Sharding, build_engine, prepare_engine
from kozero.engines.base import Engine
from kozero.errors import require, run_main
from kozero.folder import claim_output
from kozero.loop import ROWS, Trainer, resume_key
from kozero.memory import rank_memory
from kozero.runlog import RunLog
from kozero.seal import rehearse, whole_folder
from models.language_model import values_of_model
from pretrain.arguments import CorpusArguments, PretrainingArguments, ShardingArguments, ZeroArguments
from pretrain.data import check_corpus, full_rows, held_out_sizes, make_rows, open_shards
from pretrain.launch import check_nproc, run_ranks
from pretrain.model import build_module, card, export, load_tokenizer
from pretrain.objectives import EncoderPretraining

# What a changed value of a resume key comes from.
CORPUS = "corpus (text, tokenizer, --sentences)"
# Arguments that must not change when a run goes on.
NAMED = (
    "model", "max_seq_length", "whole_word_mask", "mask_share", "validation_fraction", "max_steps_per_epoch",
    "pause_fraction", "pause_placement", "pause_token",
)  # fmt: skip


def start(entry: str, description: str) -> None:
    """Run an entry point: refuse wrong arguments before any process is started, start the ranks, train.

    Args: entry: the file's name without its ending; description: what --help says of it.
    """

    def check_then_start() -> None:
        training, _, _ = arguments(entry, description)
        check_nproc(training.nproc)
        run_ranks(partial(main, entry), training.nproc)

    run_main(check_then_start)


def arguments(entry: str, description: str = "") -> tuple[PretrainingArguments, CorpusArguments, ShardingArguments]:
    """The command line of an entry; only train_zero_two.py has arguments about sharding."""
    classes = [PretrainingArguments if entry == "train" else ZeroArguments, CorpusArguments]
    classes += [ShardingArguments] if entry == "train_zero_two" else []
    filled = parse_arguments(*classes, prog=f"pretrain/{entry}.py", description=description)
    return filled if len(filled) == 3 else (*filled, ShardingArguments())


def sharding_of(entry: str, wanted: ShardingArguments) -> Sharding | None:
    """The engine of an entry; None leaves the choice to --deepspeed_config."""
    if entry == "train":
        return None
    if entry == "train_zero_one":
        return Sharding("oss", 1)
    name = "fsdp" if wanted.sharding == "torch" else "fairscale_fsdp"
    return Sharding(name, 3 if wanted.zero3 else 2, wanted.auto_wrap)


def main(entry: str) -> None:
    """One rank of a run."""
    training, corpus, wanted = arguments(entry)
    distributed.setup(training.timeout_seconds)
    training.output_dir = str(Path(training.output_dir) / training.model_name)
    with claim_output(training.output_dir, (training, corpus)) as output_dir:
        pretrain(training, corpus, wanted, sharding_of(entry, wanted), output_dir)


def pretrain(
    training: PretrainingArguments, corpus: CorpusArguments, wanted: ShardingArguments, sharding: Sharding | None,
    output_dir: Path,
) -> None:  # fmt: skip
    """Tokenizer, corpus, model, engine, loop, export."""
    checkpoint = Checkpoints(output_dir, training.save_total_limit).to_resume(training.resume, training.max_steps)
    if checkpoint and not training.per_device_train_batch_size:
        training.per_device_train_batch_size = micro_batch_of(checkpoint, training.gradient_accumulation_steps)
    sizes = batch_sizes(training, distributed.world_size())
    if corpus.task == "mlm_ict":
        check_negatives(sizes)
        check_negatives(held_out_sizes(training, sizes.world_size))
    settings = check_engine(training, sizes, sharding)
    distributed.seed_everything(training.seed)
    tokenizer = load_tokenizer(corpus)
    check_corpus(corpus)
    module = build_module(training, corpus, tokenizer)

    def save_model(folder: Path, weights: dict | None, state: RunState) -> None:
        text = card(training.model_name, describe_run(training, corpus, wanted), state)
        export(module, corpus, tokenizer, folder, weights, text)

    rehearse(output_dir, partial(save_model, state=RunState()))
    shards = open_shards(corpus, tokenizer)
    config = module.lm.config if corpus.task == "clm" else module.encoder.config
    router = hasattr(config, "capacity_factor")
    if not sizes.micro:
        build = partial(build_module, training, corpus, tokenizer)
        module = find_batch(module, build, full_rows(shards, corpus, tokenizer, router), training, settings)
        sizes = batch_sizes(training, distributed.world_size())
        if corpus.task == "mlm_ict":
            check_negatives(sizes)
        settings = prepare_engine(training, sizes, sharding)
    data = make_rows(shards, corpus, training, sizes, tokenizer, router, getattr(module, "pause_id", None))
    engine = build_engine(module, training, settings)

    def evaluate(log: RunLog, step: int) -> dict[str, float]:
        eval_sizes = held_out_sizes(training, sizes.world_size)
        return held_out_scores(engine, data.validation, corpus.max_eval_samples, eval_sizes, data.objectives)

    run = describe_run(training, corpus, wanted)
    own = {CORPUS: key_of([shard.folder.name for shard in shards]), **values_of_model(config)}
    trainer = Trainer(
        engine, data.training, training, sizes, evaluate, "loss" if data.validation else "",
        resume_key(training, sizes, run["arguments"], NAMED, own),
        data.objectives, partial(router_statistics, module), lower_is_better=True,
    )  # fmt: skip
    trainer.begin(checkpoint, run | {"deepspeed": settings.resolved})
    distributed.say(
        f"{corpus.task}: {len(data.training):,} rows an epoch, {sizes.global_batch} a step on {sizes.world_size} ranks "
        f"({distributed.device().type}, {training.dtype}, {settings.engine}, ZeRO-{settings.stage}), "
        f"{trainer.total_steps:,} steps; {data.num_validation(corpus.max_eval_samples):,} held-out rows"
    )
    state = trainer.fit()
    trainer.load_best()
    weights = engine.full_state_dict()
    if distributed.is_main():
        with whole_folder(output_dir / "model") as folder:
            save_model(folder, weights, state)
    engine.close()
    distributed.shutdown()
    distributed.say(f"curves:   tensorboard --logdir {output_dir}")
    distributed.say(str(output_dir / "model"))


def micro_batch_of(checkpoint: Path, accumulation: int) -> int:
    """The micro batch with which a run goes on from a checkpoint: it does not look for another."""
    rows, ranks = saved_run(checkpoint).get(ROWS), distributed.world_size()
    require(isinstance(rows, int) and rows > 0, f"{checkpoint}: does not tell its batch; give --train_batch_size")
    micro, rest = divmod(rows, accumulation * ranks)
    sharers = f"{ranks} ranks with --gradient_accumulation_steps {accumulation}"
    told = f"saved with {rows} rows a step, which {sharers} cannot share; change one of the two"
    require(rest == 0, f"{checkpoint}: {told}")
    return micro


def check_engine(training: PretrainingArguments, sizes: BatchSizes, sharding: Sharding | None) -> EngineSettings:
    """Check what can be known of the engine, also while the micro batch is not: then no DeepSpeed JSON may tell it."""
    if not sizes.micro:
        rank_memory()
        if training.deepspeed_config and not sharding:
            resolve(training, sizes)
        sizes = replace(sizes, micro=1)
    return prepare_engine(training, sizes, sharding)


def find_batch(
    module: nn.Module, build: Callable[[], nn.Module], rows: Rows, training: PretrainingArguments,
    settings: EngineSettings,
) -> nn.Module:  # fmt: skip
    """Put the largest micro batch that fits into `training`, by steps over `rows`, and return what `build` makes: the
    probes use `module` up. Random generators stand afterwards where they stood before. Collective."""
    once = BatchSizes(1, training.gradient_accumulation_steps, distributed.world_size())
    state, modules = random_state(), [module]
    prober = Prober(
        lambda: build_engine(modules.pop() if modules else build(), training, settings),
        lambda micro: rows.step(0, replace(once, micro=micro), distributed.rank()),
        rank_memory(),
    )
    training.per_device_train_batch_size = largest_micro_batch(prober, max(1, len(rows) // once.global_batch))
    module = build()
    restore_random_state(state)
    return module


def held_out_scores(
    engine: Engine, rows: OrderedRows | None, limit: int, sizes: BatchSizes, objectives: tuple[str, ...]
) -> dict[str, float]:
    """Losses in nats and shares of right answers on held-out rows, each counted once; none of an objective that no row
    has targets of. Collective."""
    num = min(limit or len(rows), len(rows)) if rows else 0
    num -= "ict" in objectives and num % sizes.global_batch == 1  # a passage alone is told apart from nothing
    if num == 0:
        return {}
    sizes = replace(sizes, micro=min(sizes.micro, num))
    asked = {"score": True} if isinstance(engine.module, EncoderPretraining) else {}
    total = torch.zeros(3, len(objectives), dtype=torch.float64)
    with engine.evaluating() as module:
        for start in range(0, num, sizes.global_batch):
            (places,) = deal(start, sizes, distributed.rank())
            batch = rows.batch([place if place < num else ABSENT for place in places])
            inputs = batch.to(distributed.device())
            found = module(**inputs, **asked).double().cpu().view(-1, len(objectives))
            total[: len(found)] += found
            total[2] += torch.tensor(batch.num_targets, dtype=torch.float64)
    sums, right, counts = distributed.all_reduce(total.to(distributed.device())).cpu()
    known = [k for k, count in enumerate(counts.tolist()) if count]
    losses, shares = (sums / counts).tolist(), (right / counts).tolist()
    scores = {"loss": sum(losses[k] for k in known)} if known else {}
    for k in known:
        scores |= {f"{objectives[k]}_loss": losses[k]}
        scores |= {f"{objectives[k]}_accuracy": shares[k]} if objectives[k] in ("mlm", "sop", "ict") else {}
        scores |= {"perplexity": math.exp(min(losses[k], 80.0))} if objectives[k] == "clm" else {}
    return scores


def router_statistics(module: nn.Module) -> dict[str, float]:
    """How a Switch transformer's tokens were spread in the last forward pass; empty for other models."""
    found = getattr(module, "statistics", None)
    if not found:
        return {}
    even = found["expert_load"] * found["expert_load"].shape[-1]  # 1: an even share
    loads = {"router/largest_load": even.max().item(), "router/smallest_load": even.min().item()}
    return {"router/dropped_share": found["dropped"].mean().item()} | loads
