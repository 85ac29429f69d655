"""Where a model is least sure of what it reads: the places of the least_confident placement (after "Token insertion at
low-confidence positions", arXiv 2506.03616)."""

import numpy as np
import torch

from kozero import distributed
from kozero.data.batches import Prefixes, Text, collate
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
        for first in range(0, len(rows), world_size):
            mine = [int(n) for row in rows[first + rank : first + rank + 1] for n in row]
            read = [(n, prefixes.parts(n)[0]) for n in mine]
            # Each token but the first of each prefix is to be predicted.
            batch = collate([[Text(ids, np.append(ids[1:], IGNORE), n) for n, ids in read]], capacity)
            losses = model(**batch.to(distributed.device()), reduction="none").float().cpu().numpy()
            texts = batch.texts.numpy()
            for number in np.unique(texts):
                places = np.argsort(-losses[texts == number], kind="stable")[:num]
                ranked[number, : len(places)] = places + 2  # the first token is expected by nothing
    return distributed.all_reduce(torch.from_numpy(ranked).to(distributed.device())).cpu().numpy() - 1
