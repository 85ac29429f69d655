"""A toy language model, its training rows, and the engines that train it: what the tests of engines share."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2LMHeadModel

from kozero import distributed
from kozero.config import BatchSizes, TrainingArguments
from kozero.data.batches import Batch, Text, TrainingRows, collate
from kozero.engines import EngineSettings, Sharding, build_engine, prepare_engine
from kozero.engines.base import Engine
from kozero.files import write_file
from kozero.freeze import apply_plan, compile_plan
from kozero.pause import IGNORE, Pauses
from models.causal_lm import CausalLM
from models.language_model import set_dropout
from tests.helpers import ROOT, MemoryStore, toy_gpt2

STAGES = ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]  # names in ds_configs/
SHARDINGS = {
    "plain": Sharding(),
    "oss": Sharding("oss", 1),
    "fsdp2": Sharding("fsdp", 2),
    "fsdp2_wrap": Sharding("fsdp", 2, auto_wrap=True),
    "fsdp3": Sharding("fsdp", 3),
    "fsdp3_wrap": Sharding("fsdp", 3, auto_wrap=True),
    "fairscale_fsdp2": Sharding("fairscale_fsdp", 2),
    "fairscale_fsdp2_wrap": Sharding("fairscale_fsdp", 2, auto_wrap=True),
    "fairscale_fsdp3_wrap": Sharding("fairscale_fsdp", 3, auto_wrap=True),  # without: its root stays whole, stage 2
}
ENGINES = [*SHARDINGS, *STAGES]
SELDOM = {"fsdp2", "fsdp3", "fairscale_fsdp2", "zero2_offload", "zero3_offload"}  # near another one: for slow tests
PAUSE, NUM_PAUSES, CAPACITY = 7, 2, 32
LAYERS, VOCAB = 2, 96
GLOBAL_BATCH = 8
FOUR_BY_TWO, EIGHT_BY_ONE = (2, 2), (1, 4)  # micro batch and accumulation on 2 ranks: 4 x 2 and 8 x 1 rows
CLIP = 0.5  # below every norm of these runs
RATES = {"sgd": 0.5, "adamw": 0.01}
SHAPE = [1.0, 0.5, 0.0, 0.75]  # the rate of each step, in peaks: an engine that keeps its own rate is found out

Row = Sequence[Text]


def toy(freeze: str | None = None, dropout: float = 0.0) -> CausalLM:
    """The same weights every time."""
    module = CausalLM(toy_gpt2(LAYERS, VOCAB), [PAUSE], PAUSE)
    set_dropout(module.lm, dropout)
    plan = compile_plan(freeze, LAYERS, has_pause=True)
    if plan.separate_pause:
        module.separate_pause_row()
    apply_plan(plan, module)
    return module


def random_ids(rng: np.random.Generator, num: int) -> np.ndarray:
    """Ids of words: no pause, which is never predicted."""
    return rng.integers(PAUSE + 1, VOCAB, num)


def training_rows() -> TrainingRows:
    """Packed texts with pauses, 1 to 8 targets a text."""
    rng = np.random.default_rng(3)
    store = MemoryStore(
        [([], random_ids(rng, rng.integers(1, 6)), random_ids(rng, rng.integers(1, 9))) for _ in range(160)]
    )
    return TrainingRows(store, Pauses(PAUSE, NUM_PAUSES), CAPACITY, "packed", seed=5)


def steps(num: int = len(SHAPE)) -> list[list[Row]]:
    """The rows of each step."""
    rows = training_rows()
    places = range(num * GLOBAL_BATCH)
    flat = [rows.texts(rows.row_at(place, GLOBAL_BATCH)) for place in places]
    return [flat[k : k + GLOBAL_BATCH] for k in places[::GLOBAL_BATCH]]


def deal(rows: Sequence[Row], sizes: BatchSizes) -> list[Batch]:
    """This rank's micro batches."""
    starts = range(distributed.rank() * sizes.micro, len(rows), sizes.micro * sizes.world_size)
    return [collate(rows[k : k + sizes.micro]) for k in starts]


def arguments(name: str, shape: tuple[int, int] = FOUR_BY_TWO, **other: Any) -> TrainingArguments:
    """What the command line says for an engine. The rate is wrong on purpose: steps bring their own."""
    values = {
        "deepspeed_config": str(ROOT / "ds_configs" / f"{name}.json") if name in STAGES else None,
        "per_device_train_batch_size": shape[0],
        "gradient_accumulation_steps": shape[1],
        "learning_rate": 3.0,
        "weight_decay": 0.1,
        "max_grad_norm": CLIP,
    }
    return TrainingArguments(**values | other)


def engine_for(name: str, module: nn.Module, said: TrainingArguments) -> tuple[Engine, BatchSizes]:
    """An engine and its batch, as an entry point makes them."""
    sizes = BatchSizes(said.per_device_train_batch_size, said.gradient_accumulation_steps, distributed.world_size())
    if name.startswith("fairscale_fsdp"):  # refused without a GPU
        sharding = SHARDINGS[name]
        settings = EngineSettings(sharding.engine, sharding.stage, sharding.auto_wrap)
    else:
        settings = prepare_engine(said, sizes, SHARDINGS.get(name))
    return build_engine(module, said, settings), sizes


def text_logits(lm: GPT2LMHeadModel, ids: np.ndarray) -> torch.Tensor:
    """(T, V) logits of one text alone; the pause is never predicted."""
    logits = lm(torch.from_numpy(ids)[None]).logits[0].clone()
    logits[:, PAUSE] = -torch.inf
    return logits


def reference(
    rows_of_steps: list[list[Row]], optim: str, freeze: str | None = None
) -> tuple[list[float], list[float], dict[str, torch.Tensor]]:
    """Losses, gradient norms and final weights by plain PyTorch on one process: text by text, nothing packed."""
    lm = toy_gpt2(LAYERS, VOCAB)
    plan = compile_plan(freeze, LAYERS, has_pause=True)
    table = lm.transformer.wte.weight
    trained = {
        name: p
        for name, p in lm.named_parameters()
        if any(f"transformer.{part}." in name for part in plan.trainable) or (plan.separate_pause and p is table)
    }
    decays = [p for p in trained.values() if p.dim() >= 2]
    rest = [p for p in trained.values() if p.dim() < 2]
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optim]
    optimizer = kind([group for group in groups if group["params"]], lr=1.0)
    losses, norms = [], []
    for step, rows in enumerate(rows_of_steps):
        texts = [text for row in rows for text in row]
        sums = []
        for text in texts:
            labels = torch.from_numpy(text.predicts)
            sums.append(F.cross_entropy(text_logits(lm, text.ids), labels, ignore_index=IGNORE, reduction="sum"))
        loss = torch.stack(sums).sum() / sum(int((text.predicts != IGNORE).sum()) for text in texts)
        optimizer.zero_grad()
        loss.backward()
        before = table.detach().clone()
        others = torch.arange(VOCAB) != PAUSE
        if plan.separate_pause:
            table.grad[others] = 0.0
        norms.append(torch.nn.utils.clip_grad_norm_(trained.values(), CLIP).item())
        for group in optimizer.param_groups:
            group["lr"] = RATES[optim] * SHAPE[step % len(SHAPE)]
        optimizer.step()
        if plan.separate_pause:
            with torch.no_grad():
                table[others] = before[others]
        losses.append(loss.item())
    return losses, norms, {name: p.detach().clone() for name, p in lm.named_parameters()}


def save(engine: Engine, folder: Path) -> None:
    """The files of a snapshot; those of all ranks are there when it returns."""
    if distributed.is_main():
        folder.mkdir(exist_ok=True)
    distributed.barrier()
    for name, value in engine.snapshot().items():
        write_file(folder / name, value)
    distributed.barrier()


class Spelling:
    """As much of a tokenizer as writing needs: ids become numbers, and one id ends a text."""

    pad_token_id = 0
    backend_tokenizer = SimpleNamespace(decoder=None, pre_tokenizer=None, model=None)

    def __init__(self, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        """Their numbers."""
        return list(map(str, ids))

    def decode(self, ids: list[int], **how: bool) -> str:
        """Ids up to the end of the text."""
        assert how["skip_special_tokens"]
        return " ".join(map(str, until(ids, self.eos_token_id)))


def until(ids: list[int], end: int) -> list[int]:
    """What stands before `end`."""
    return ids[: ids.index(end)] if end in ids else ids


def greedy(lm: GPT2LMHeadModel, prompt: np.ndarray, num: int) -> list[int]:
    """`num` tokens, each from the whole text before it."""
    ids = prompt
    with torch.no_grad():
        for _ in range(num):
            ids = np.append(ids, int(text_logits(lm, ids)[-1].argmax()))
    return ids[len(prompt) :].tolist()
