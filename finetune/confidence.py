"""Where a model is least sure of what it reads: the places of the least_confident placement (after "Token insertion at
low-confidence positions", arXiv 2506.03616)."""

import numpy as np
import torch

from kozero import distributed
from kozero.data.batches import PackedBatch, Prefixes, Text, collate
from kozero.data.rows import Fit, pack
from kozero.engines.base import Engine
from kozero.pause import IGNORE


def least_confident(engine: Engine, prefixes: Prefixes, fitted: Fit, num: int, capacity: int) -> np.ndarray:
    """(N, num) int32 places in each prefix, before the tokens with the lowest probability given those before them, the
    lowest first; -1 where a prefix has fewer. One pass without gradient over all prefixes. Collective.

    A pass holds the logits of one packed row, (capacity, V), as every token is asked for.
    """
    ranked = np.zeros((len(fitted.length), num), dtype=np.int32)  # 1 more than the place: 0 where there is none
    rows = pack(fitted.length, fitted.used, capacity, seed=0)
    rank, world_size = distributed.rank(), distributed.world_size()
    with engine.evaluating() as model:
        for k in range(-(-len(rows) // world_size)):
            mine = rows[k * world_size + rank] if k * world_size + rank < len(rows) else []
            batch = reading_batch(prefixes, [int(n) for n in mine], capacity)
            losses = model(**batch.to(distributed.device()), reduction="none").float().cpu().numpy()
            texts = batch.texts.numpy()
            for number in np.unique(texts):
                places = np.argsort(-losses[texts == number], kind="stable")[:num]
                ranked[number, : len(places)] = places + 2  # the first token is expected by nothing
    return distributed.all_reduce(torch.from_numpy(ranked).to(distributed.device())).cpu().numpy() - 1


def reading_batch(prefixes: Prefixes, numbers: list[int], capacity: int) -> PackedBatch:
    """Some prefixes side by side in one row, each token but the first of each to be predicted."""
    texts = []
    for number in numbers:
        ids, _ = prefixes.parts(number)
        texts.append(Text(ids, np.append(ids[1:], IGNORE), number))
    return collate([texts], capacity)
