"""--cache_frozen: what the frozen layers at the bottom of a model make of each training text, computed once before the
first step and read in all of them."""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from kozero import distributed
from kozero.data.batches import Prefixes, TrainingRows, collate
from kozero.data.hidden import HiddenStore
from kozero.data.rows import pack
from kozero.data.store import key_of
from kozero.engines.base import Engine
from kozero.errors import require
from kozero.freeze import PAUSE, FreezePlan, full_hash, skipped_layers, trained_below
from kozero.pause import PauseArguments
from models.causal_lm import CausalLM, below
from models.language_model import own_values

GIB = 2**30
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class FrozenLayers:
    """The layers below block `entry`, of which none trains. `version`: their weights, and what else decides their
    outputs, in 32 bit or rounded to `dtype`."""

    entry: int
    dtype: str
    version: tuple

    @classmethod
    def of(cls, module: CausalLM, plan: FreezePlan, engine: str, dtype: str) -> "FrozenLayers":
        """Those of a module, which takes their outputs from now on. Before an engine casts their weights."""
        config = module.lm.config
        module.entry = skipped_layers(plan, config.n_layer)
        weights = distributed.once_a_machine(lambda: full_hash(below(module.lm.transformer, module.entry)))
        return cls(module.entry, dtype, (module.entry, weights, own_values(config), engine, dtype))

    def outputs(self, engine: Engine, rows: TrainingRows, micro: int) -> HiddenStore:
        """What the layers make of the texts of `rows`, beside their tokens in the cache; the ranks of a machine share
        what is not there. Collective.

        Args: micro: rows of a forward pass.

        Raises: UserError when the disk is too small, or a number too large for 16 bit.
        """
        width = engine.module.lm.config.n_embd
        folder = rows.store.folder.with_name(key_of(*self.version, *version(rows)))
        store = HiddenStore(folder, rows.fit.length, width, DTYPES[self.dtype])
        rank, num_ranks = distributed.local_rank(), distributed.local_world_size()
        mine = store.missing(rank, num_ranks)
        first = distributed.rank() - rank  # of this machine
        found = distributed.gather(mine, distributed.patient)
        missing = [shard for part in found[first : first + num_ranks] for shard in part]
        distributed.together(lambda: check_room(store, missing))
        distributed.say(
            f"outputs of the lowest {self.entry} layers for {len(rows.fit.used):,} texts, without dropout: "
            f"{store.num_bytes(store.shards()) / GIB:.3g} GiB in {folder}, "
            + (f"{store.num_bytes(missing) / GIB:.3g} GiB to compute" if missing else "all there")
        )
        distributed.together(lambda: make(store, mine, engine, rows, micro))
        return store


def check_cacheable(freeze: str, plan: FreezePlan, num_layers: int, pauses: PauseArguments, stage: int) -> None:
    """Refuse --cache_frozen where layers cannot be computed apart, or give something else in another epoch. `freeze` is
    the text of the plan, `stage` that of ZeRO."""
    require(
        skipped_layers(plan, num_layers) > 0,
        f"--cache_frozen: --freeze {freeze} leaves no layer below all that trains ({', '.join(trained_below(plan))}); "
        f"freeze wte,wpe,h.0{',pause' * (PAUSE in plan.trainable)} at least",
    )
    message = "--pause_placement random, which draws other places in each epoch: choose one of the two"
    is_random = pauses.num_pauses > 0 and pauses.pause_placement == "random"
    require(not is_random, f"--cache_frozen and {message}")
    message = f"--pause_schedule {pauses.pause_schedule}, which changes the number of pauses: choose one of the two"
    require(pauses.pause_schedule == "fixed", f"--cache_frozen and {message}")
    require(stage < 3, f"--cache_frozen: under ZeRO-{stage} no rank has a whole layer; choose a stage from 0 to 2")


def version(rows: TrainingRows) -> list:
    """What decides the texts of some rows: their tokens, cuts and pauses."""
    arrays = [rows.store.rows, rows.fit.cut, rows.fit.length] + ([] if rows.ranked is None else [rows.ranked])
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array))
    pauses = rows.pauses
    return [rows.store.folder.name, digest.hexdigest(), pauses.token_id, pauses.num, pauses.placement]


def check_room(store: HiddenStore, missing: list[int]) -> None:
    """Refuse to make some shards where the disk is too small."""
    cache = store.folder.parent
    needed, free = store.num_bytes(missing), shutil.disk_usage(cache).free
    found = f"needs {needed / GIB:.3g} GiB in --cache_dir {cache}, where {free / GIB:.3g} GiB are free"
    require(needed <= free, f"--cache_frozen: {found}; make room, choose another folder, or leave it out")


def make(store: HiddenStore, mine: list[int], engine: Engine, rows: TrainingRows, micro: int) -> None:
    """This rank's share of the shards, of which another run may make some meanwhile."""
    for shard in tqdm(mine, desc="frozen layers", unit="shard", disable=None if distributed.is_main() else True):
        store.make(shard, lambda numbers: vectors(engine, rows, numbers, micro, store.dtype))


def vectors(
    engine: Engine, rows: TrainingRows, numbers: np.ndarray, micro: int, dtype: torch.dtype
) -> Iterator[tuple[int, torch.Tensor]]:
    """Number and (T, H) outputs of each of some texts, computed in packed rows."""
    packed = pack(rows.fit.length, numbers, rows.capacity, seed=0)
    prefixes = Prefixes(rows.store, rows.fit.cut, rows.ranked)
    with engine.evaluating():
        for start in range(0, len(packed), micro):
            texts = [[prefixes.text(int(n), rows.pauses) for n in row] for row in packed[start : start + micro]]
            inputs = collate(texts, most=rows.capacity).to(distributed.device())
            hidden = engine.module.lower(inputs["input_ids"], inputs["position_ids"]).to(dtype).cpu()
            require(
                bool(torch.isfinite(hidden).all()),
                f"--cache_frozen: the layers give numbers that are not finite as {dtype}; choose another precision",
            )
            for row, laid in zip(texts, hidden, strict=True):
                sizes = [len(text.ids) for text in row]
                parts = laid[: sum(sizes)].split(sizes)
                yield from zip((text.number for text in row), parts, strict=True)
