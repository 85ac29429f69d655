"""What the processes of the engine tests do and bring back, and the references that it is compared with."""

import copy
import gc
import importlib
import math
import shutil
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from finetune.data import EvaluationSet
from finetune.scoring import score_choices, write
from kozero import distributed
from kozero.config import TrainingArguments
from kozero.data.batch import Batch
from kozero.data.batches import collate
from kozero.engines.base import Engine
from kozero.loop import Trainer
from kozero.pause import Pauses
from kozero.runlog import RunLog
from models.causal_lm import CausalLM
from models.language_model import LanguageModel, export
from tests.helpers import MemoryStore, toy_gpt2, word_tokenizer
from tests.streams import streams_that_do_nothing
from tests.toys import (
    CAPACITY,
    EIGHT_BY_ONE,
    FOUR_BY_TWO,
    GLOBAL_BATCH,
    LAYERS,
    NUM_PAUSES,
    PAUSE,
    RATES,
    SHAPE,
    SHARDINGS,
    VOCAB,
    Row,
    Spelling,
    arguments,
    deal,
    engine_for,
    random_ids,
    reference,
    save,
    steps,
    toy,
    training_rows,
)
from tests.two_tasks import Late, deal_examples, examples, two_tasks

DTYPES = ["fp32", "bf16", "fp16"]
PARTS = "h.0,wte,wpe,pause"  # a freeze plan
CASES = {  # of training: optimizer, (micro batch, accumulation), freeze plan
    "sgd": ("sgd", FOUR_BY_TWO, None),
    "adamw": ("adamw", FOUR_BY_TWO, None),
    "adamw, 8 x 1": ("adamw", EIGHT_BY_ONE, None),
    "sgd, parts frozen": ("sgd", FOUR_BY_TWO, PARTS),
    "adamw, parts frozen": ("adamw", FOUR_BY_TWO, PARTS),
    "sgd, pause alone": ("sgd", FOUR_BY_TWO, "all_but:pause"),
}
HALF_CASES = {"bf16, parts frozen": PARTS, "fp16, pause alone": "all_but:pause"}  # with AdamW: freeze plan
RESUME_FREEZE, RESUME_STEPS, RESUME_AT = "h.0,wte", 5, 2
SEED = 11
END = 43  # ends three of the five texts, one rank's sooner than the other's


# What the processes do ---------------------------------------------------------------------------------------------


def told(name: str, shape: tuple[int, int] = FOUR_BY_TWO, **other: Any) -> TrainingArguments:
    """What the command line says, with the same rows in a step on one rank as on two."""
    return arguments(name, (shape[0], shape[1] * 2 // distributed.world_size()), **other)


def logits_of(engine: Engine) -> torch.Tensor:
    """(2, 10, V) by a part of the module, on the CPU."""
    ids = ids_to_compare().to(distributed.device())
    return engine.module.lm(input_ids=ids).logits.detach().to("cpu", copy=True)


def on_last_rank() -> bool:
    """Where a loss is spoiled: on one rank of several."""
    return distributed.rank() == distributed.world_size() - 1


def train(engine: Engine, sizes: Any, rows_of_steps: list[list[Row]], optim: str, first: int = 0) -> list:
    """Losses and norms of steps, whose rates go on from step `first`."""
    done = []
    for k, rows in enumerate(rows_of_steps, first):
        stats = engine.train_step(deal(rows, sizes), RATES[optim] * SHAPE[k % len(SHAPE)])
        done.append(stats)
    return done


def curve(done: list) -> dict[str, list]:
    """Steps as plain lists."""
    return {name: [getattr(stats, name) for stats in done] for name in ("loss", "grad_norm", "applied", "loss_scale")}


def case(name: str, optim: str, shape: tuple[int, int], freeze: str | None, rows: list, **other: Any) -> dict:
    """One training."""
    engine, sizes = engine_for(name, toy(freeze), told(name, shape, optim=optim, **other))
    done = curve(train(engine, sizes, rows, optim)) | {"state": engine.full_state_dict()}
    done["devices"] = {p.device.type for p in engine.module.parameters()}
    if name in SHARDINGS:
        done["held"] = held(engine)
    engine.close()
    return done


def held(engine: Engine) -> dict[str, int]:
    """Numbers that this rank holds between steps, of parameters and of optimizer states."""
    optimizer = getattr(engine.optimizer, "optim", engine.optimizer)  # OSS has one for its share
    states = [tensor for values in optimizer.state.values() for tensor in values.values() if tensor.dim()]
    tensors = {"parameters": list(engine.module.parameters()), "states": states}
    return {what: sum(getattr(t, "_local_tensor", t).numel() for t in some) for what, some in tensors.items()}


def without_targets() -> list[list[Row]]:
    """Steps in which rank 1 has no text at all in its second micro batch, then in neither."""
    one, two = steps(2)
    return [one[:6] + [[], []], two[:2] + [[], []] + two[4:6] + [[], []]]


def skips(name: str, dtype: str) -> dict:
    """A good step, three with an infinite loss in the first micro batch of the last rank alone, and two good ones."""
    said = told(name, optim="adamw", bf16=dtype == "bf16", fp16=dtype == "fp16")
    module = toy()
    module.poison = 1.0
    module.register_forward_hook(poisoned)
    engine, sizes = engine_for(name, module, said)
    good = steps(3)
    done = train(engine, sizes, good[:1], "adamw")
    before, mine = copy.deepcopy(engine.full_state_dict()), shards(module)
    for _ in range(3):
        module.poison = math.inf if on_last_rank() else 1.0
        done += train(engine, sizes, good[1:2], "adamw", first=1)
    after, mine_after = copy.deepcopy(engine.full_state_dict()), shards(module)
    done += train(engine, sizes, good[1:], "adamw", first=1)
    engine.close()
    kept = all(torch.equal(a, b) for a, b in zip(mine, mine_after, strict=True))
    return curve(done) | {"before": before, "after": after, "mine kept": kept}


def poisoned(module: CausalLM, args: tuple, loss: torch.Tensor) -> torch.Tensor:
    """A forward hook that spoils one loss."""
    factor, module.poison = module.poison, 1.0
    return loss * factor


def shards(module: torch.nn.Module) -> list[torch.Tensor]:
    """What this rank holds of every parameter: at DeepSpeed's stage 3 beside it, under fully_shard inside it."""
    held = [getattr(p, "ds_tensor", p).detach() for p in module.parameters()]
    return [getattr(p, "_local_tensor", p).clone() for p in held]


def masters(engine: Engine) -> dict[str, torch.Tensor]:
    """The trained weights as the ranks write them into a checkpoint, each number at its place."""
    files = [file for name, file in engine.snapshot().items() if name.endswith(".safetensors")]
    parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for place, tensor in (part for held in distributed.gather(files) for file in held for part in file.items()):
        name, first, kind = place.rsplit("/", 2)
        if kind == "weight":
            parts.setdefault(name, []).append((int(first), tensor.cpu()))
    return {name: laid(found) for name, found in parts.items()}


def laid(parts: list[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """(N,) numbers, not a number where no part lies."""
    found = torch.full((sum(len(part) for _, part in parts),), torch.nan)
    for first, part in parts:
        found[first : first + len(part)] = part
    return found


def half_step(name: str, dtype: str) -> dict:
    """An unclipped step of SGD in 16 bit: the weights before and after it as they are exported, the trained ones as a
    checkpoint holds them, and the norm that was told."""
    engine, sizes = engine_for(name, toy(), told(name, optim="sgd", max_grad_norm=1e3, **{dtype: True}))
    before = copy.deepcopy(engine.full_state_dict())
    (stats,) = train(engine, sizes, steps(1), "sgd")
    after = engine.full_state_dict()
    done = {"before": before, "after": after, "masters": masters(engine), "grad_norm": stats.grad_norm}
    engine.close()
    return done


def evaluation(name: str) -> dict:
    """Two steps, texts and choices, two steps."""
    engine, sizes = engine_for(name, toy(), told(name, optim="sgd"))
    rows = steps()
    done = train(engine, sizes, rows[:2], "sgd")
    texts = write(engine, Spelling(END), prompts(), Pauses(PAUSE, NUM_PAUSES), 1, max_new_tokens=8, do_sample=False)
    in_pairs = write(engine, Spelling(END), prompts(), Pauses(PAUSE, NUM_PAUSES), 2, max_new_tokens=8, do_sample=False)
    scores = score_choices(engine, choices(), Pauses(PAUSE, NUM_PAUSES), CAPACITY, micro=2)
    done += train(engine, sizes, rows[2:], "sgd", first=2)
    engine.close()
    return curve(done) | {"texts": texts, "in pairs": in_pairs, "scores": scores.values, "chosen": scores.predictions}


def exported(name: str, freeze: str | None, folder: Path) -> dict:
    """Train, export, and the logits of the live model."""
    engine, sizes = engine_for(name, toy(freeze), told(name, optim="sgd"))
    train(engine, sizes, steps(3), "sgd")
    state = engine.full_state_dict()
    if distributed.is_main():
        pause = {"token": "w4", "token_id": PAUSE, "placement": "append", "num_pauses": 2, "num_inference_pauses": 2}
        export(folder, LanguageModel(engine.module, word_tokenizer(VOCAB - 3), {}), state, pause, "# card")
    with engine.evaluating():
        logits = logits_of(engine)
    engine.close()
    return {"logits": logits}


def recomputed(name: str) -> dict:
    """A training whose activations are computed once more in the backward pass."""
    module = toy()
    module.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    engine, sizes = engine_for(name, module, told(name, optim="sgd"))
    done = curve(train(engine, sizes, steps(), "sgd"))
    engine.close()
    return done


def evaluated_first(name: str) -> dict:
    """Parts of the module are called before anything has trained, and between steps: once more on rank 0 than on the
    others, where ranks may evaluate on their own."""
    engine, sizes = engine_for(name, toy(), told(name, (4, 1), optim="sgd"))
    calls = 1 if engine.lockstep or distributed.is_main() else 0
    done, logits = [], []
    for k, rows in enumerate(steps()):
        with engine.evaluating():
            logits += [logits_of(engine) for _ in range(calls)]
        done += train(engine, sizes, [rows], "sgd", first=k)
    engine.close()
    return curve(done) | {"logits": logits[:1]}


def reloaded(name: str, folder: Path) -> dict:
    """Two steps, a checkpoint, two steps, back to the checkpoint and the same two steps once more; the logits at the
    checkpoint, before and after going back to it."""
    engine, sizes = engine_for(name, toy(RESUME_FREEZE), told(name, optim="adamw"))

    def logits() -> torch.Tensor:
        with engine.evaluating():
            return logits_of(engine)

    rows = steps()
    done = train(engine, sizes, rows[:2], "adamw")
    save(engine, folder)
    seen = [logits()]
    done += train(engine, sizes, rows[2:], "adamw", first=2)
    seen.append(logits())
    engine.load(folder)
    seen.append(logits())
    done += train(engine, sizes, rows[2:], "adamw", first=2)
    engine.close()
    return curve(done) | {"logits": seen}


def two_objectives(name: str, optim: str) -> dict:
    """A training with two objectives, in which the experts of rank 1 have no tokens; with SGD activations are computed
    twice."""
    engine, sizes = engine_for(name, two_tasks(recompute=optim == "sgd"), told(name, optim=optim))
    done = []
    for k, some in enumerate(examples()):
        done.append(engine.train_step(deal_examples(some, sizes), RATES[optim] * SHAPE[k]))
    found = curve(done) | {"losses": [stats.losses for stats in done], "state": engine.full_state_dict()}
    found["masters"] = masters(engine)
    engine.close()
    return found


def late_gradient(name: str) -> list[float]:
    """Gradient norms of two steps, the first of which leaves a parameter without a gradient."""
    engine, _ = engine_for(name, Late(), arguments(name, (1, 1), optim="sgd"))
    batches = [Batch({"x": torch.ones(3), "use": torch.tensor(use)}, (1,), 1) for use in (False, True)]
    return [engine.train_step([batch], 0.0).grad_norm for batch in batches]


def resume_arguments(name: str, dtype: str, folder: Path) -> TrainingArguments:
    """A run with dropout (see `toy`), accumulation and freezing, with a checkpoint in its middle."""
    return told(
        name,
        output_dir=str(folder),
        optim="adamw",
        learning_rate=0.01,
        warmup_steps=1,
        max_steps=RESUME_STEPS,
        logging_steps=1,
        eval_steps=1,
        save_steps=RESUME_AT,
        save_total_limit=3,
        bf16=dtype == "bf16",
        fp16=dtype == "fp16",
    )


def trainer_for(engine: Engine, sizes: Any, said: TrainingArguments) -> Trainer:
    """The training loop, with an evaluation in each step whose score falls, so that none of them asks to be saved."""
    held_out = collate(steps(1)[0])

    def evaluate(log: RunLog, step: int) -> dict[str, float]:
        with engine.evaluating() as model:
            loss = model(**held_out.to(distributed.device())).item()
        return {"loss": loss, "score": float(-step)}

    return Trainer(engine, training_rows(), said, sizes, evaluate, "score", run={"seed": SEED})


def fit(
    name: str, dtype: str, folder: Path, checkpoint: Path | None = None, seed: int = SEED, save_steps: int = RESUME_AT
) -> dict:
    """Train to the end, from a checkpoint in a copy of its run if given. Two updates before it overflow in fp16."""
    distributed.seed_everything(seed)
    said = resume_arguments(name, dtype, folder)
    said.save_steps = save_steps
    module = toy(RESUME_FREEZE, dropout=0.1)
    if dtype == "fp16" and checkpoint is None:
        module.poison, calls = 1.0, []

        def spoil(module: CausalLM, args: tuple) -> None:
            calls.extend([module.training] * module.training)
            module.poison = math.inf if on_last_rank() and len(calls) in (3, 5) else 1.0

        module.register_forward_pre_hook(spoil)
        module.register_forward_hook(poisoned)
    engine, sizes = engine_for(name, module, said)
    folder.mkdir(parents=True, exist_ok=True)
    trainer = trainer_for(engine, sizes, said)
    if checkpoint:
        if distributed.is_main():
            shutil.copytree(checkpoint.parents[1], folder, dirs_exist_ok=True)
        distributed.barrier()
        trainer.resume(folder / "checkpoints" / checkpoint.name)
    state = trainer.fit()
    done = {"weights": engine.full_state_dict(), "state": copy.deepcopy(vars(state))}
    engine.close()
    return done


def forgetful(name: str, checkpoint: Path) -> list[float]:
    """Losses after a checkpoint when the random state is not restored."""
    distributed.seed_everything(SEED + 1)
    engine, sizes = engine_for(name, toy(RESUME_FREEZE, dropout=0.1), resume_arguments(name, "fp32", checkpoint))
    engine.load(checkpoint)
    trainer = trainer_for(engine, sizes, resume_arguments(name, "fp32", checkpoint))
    losses = []
    for step in range(RESUME_AT, RESUME_STEPS):
        batches = trainer.rows.step(step * GLOBAL_BATCH, sizes, distributed.rank())
        losses.append(engine.train_step(batches, trainer.lr_at(step)).loss)
    engine.close()
    return losses


def attempt(work: Callable, *args: Any, **kwargs: Any) -> Any:
    """What `work` returns, or its traceback: one failure must not take all tests with it."""
    try:
        with streams_that_do_nothing() if args[0].startswith("fairscale_fsdp") else nullcontext():
            return work(*args, **kwargs)
    except Exception:
        return traceback.format_exc()


def settle() -> None:
    """Take what the libraries made when they were imported out of garbage collection, which DeepSpeed's stage 3 runs
    for every engine (0.6 s each)."""
    importlib.import_module("kozero.engines.deepspeed")
    gc.freeze()


def measure(names: list[str], folder: Path) -> dict[tuple[str, str], Any]:
    """Everything by (engine, what)."""
    settle()
    found = {}
    rows = steps()
    for name in names:
        for what, (optim, shape, freeze) in CASES.items():
            found[name, what] = attempt(case, name, optim, shape, freeze, rows)
        found[name, "no targets"] = attempt(case, name, "sgd", FOUR_BY_TWO, None, without_targets())
        for dtype in ("bf16", "fp16"):
            half = {dtype: True}
            found[name, dtype] = attempt(case, name, "sgd", FOUR_BY_TWO, None, rows, **half)
            found[name, f"step {dtype}"] = attempt(half_step, name, dtype)
        for what, freeze in HALF_CASES.items():
            half = {what[:4]: True}
            found[name, what] = attempt(case, name, "adamw", FOUR_BY_TWO, freeze, rows, **half)
        for dtype in DTYPES:
            found[name, f"skips {dtype}"] = attempt(skips, name, dtype)
            found[name, f"run {dtype}"] = attempt(fit, name, dtype, folder / f"{name}-{dtype}")
        found[name, "unsaved"] = attempt(fit, name, "fp32", folder / f"{name}-unsaved", save_steps=RESUME_STEPS)
        found[name, "evaluation"] = attempt(evaluation, name)
        found[name, "evaluated first"] = attempt(evaluated_first, name)
        found[name, "reloaded"] = attempt(reloaded, name, folder / f"{name}-reloaded")
        found[name, "recomputed"] = attempt(recomputed, name)
        for optim in RATES:
            found[name, f"two objectives, {optim}"] = attempt(two_objectives, name, optim)
        found[name, "export"] = attempt(exported, name, None, folder / f"{name}-model")
        found[name, "export, pause alone"] = attempt(exported, name, "all_but:pause", folder / f"{name}-pause")
    return found


def checkpoint_of(folder: Path, name: str, dtype: str) -> Path:
    """The checkpoint in the middle of a run."""
    return folder / f"{name}-{dtype}" / "checkpoints" / f"step-{RESUME_AT:06d}"


def measure_resumed(names: list[str], folder: Path) -> dict[tuple[str, str], Any]:
    """The same runs from their checkpoints, by (engine, dtype)."""
    settle()
    found = {}
    for name in names:
        for dtype in DTYPES:
            again = folder / f"{name}-{dtype}-resumed"
            found[name, dtype] = attempt(fit, name, dtype, again, checkpoint_of(folder, name, dtype), seed=SEED + 1)
        found[name, "forgetful"] = attempt(forgetful, name, checkpoint_of(folder, name, "fp32"))
    return found


def measure_alone(names: list[str]) -> dict[tuple[str, str], Any]:
    """One process, where a rank has the micro batches of both."""
    settle()
    torch.set_num_threads(1)  # a second one only gets in the way of other processes
    found = {}
    for name in names:
        found[name, "sgd"] = attempt(case, name, "sgd", FOUR_BY_TWO, None, steps())
        found[name, "evaluation"] = attempt(evaluation, name)
        found[name, "late gradient"] = attempt(late_gradient, name)
    return found


# What is expected --------------------------------------------------------------------------------------------------


@cache
def expected(optim: str, freeze: str | None = None, num_steps: int = len(SHAPE)) -> tuple:
    """The reference."""
    return reference(steps(num_steps), optim, freeze)


@cache
def trained_lm():
    """The reference's model after two steps."""
    lm = toy_gpt2(LAYERS, VOCAB)
    lm.load_state_dict(expected("sgd", None, 2)[2], strict=False)
    return lm.eval()


@cache
def prompts() -> list[np.ndarray]:
    """Five prompts of different lengths with their pauses: one rank has one more than the other."""
    rng = np.random.default_rng(8)
    return [Pauses(PAUSE, NUM_PAUSES).prompt(random_ids(rng, num)) for num in (3, 9, 1, 6, 5)]


@cache
def choices() -> EvaluationSet:
    """Seven examples with three choices each; the last does not fit."""
    rng = np.random.default_rng(9)
    store, examples = [], []
    for k in range(7):
        prompt = random_ids(rng, CAPACITY if k == 6 else 2 + k)
        store += [([], prompt, random_ids(rng, num)) for num in (2, 2, 2)]
        examples.append(SimpleNamespace(label=k % 3))
    return EvaluationSet(SimpleNamespace(labels=("a", "b", "c")), examples, MemoryStore(store))


def ids_to_compare() -> torch.Tensor:
    """(2, 10) ids with a pause in them."""
    ids = torch.from_numpy(random_ids(np.random.default_rng(4), 20)).view(2, 10)
    ids[:, 4:6] = PAUSE
    return ids
