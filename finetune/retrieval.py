"""--task ict: an encoder turns questions and passages into vectors, apart from each other, so that the passage of a
question has the highest product with it (Karpukhin et al. 2020, DPR, arXiv 2004.04906, with the pooling and the scale
of the inverse cloze task in pre-training)."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from finetune.arguments import ReadingArguments
from finetune.encoder import EncoderTask, Found
from finetune.questions import QuestionSet, QuestionStore
from kozero import distributed
from kozero.config import BatchSizes
from kozero.contrast import check_negatives, in_batch_logits
from kozero.data.batch import Batch, padded, shares
from kozero.data.framing import Framing
from kozero.data.order import Order, OrderedRows
from kozero.engines.base import Engine
from kozero.errors import SaveFailed, require
from kozero.metrics import RECALL_AT, retrieval
from models.heads import PositionPool, router_sums

SPECIAL = 2  # [CLS], [SEP]
LENGTHS = 64  # tokens by which passages of a batch may differ: questions of one passage would else always meet there
CHUNK_BYTES = 2**26  # of vectors that a search has in memory at once
QUERIES = 1024  # of one matrix product in a search


class Retriever(nn.Module):
    """An encoder whose vectors are pooled over positions by learned weights."""

    def __init__(self, encoder: PreTrainedModel) -> None:
        super().__init__()
        self.encoder = encoder
        self.pool = PositionPool(encoder.config.max_position_embeddings)

    def forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        passage_ids: torch.Tensor | None = None,
        passage_mask: torch.Tensor | None = None,
        passage: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Losses of questions, or vectors of texts where no passages are given.

        Args: ids, mask: (B, T); passage_ids, passage_mask: (B, S), the passage of each question; passage: (B,) its
            number.

        Returns: (K,) sum over the questions of the loss in nats, against the passages of all ranks, and sums over
        tokens of the router losses where there are any; or (B, H).
        """
        queries, query_routing = self.encode(ids, mask)
        if passage_ids is None:
            return queries
        passages, passage_routing = self.encode(passage_ids, passage_mask)
        # Another row with the same passage is no negative: several questions share one.
        logits, own = in_batch_logits(queries, passages, passage)
        loss = F.cross_entropy(logits, own, reduction="sum")
        routing = [sum(parts) for parts in zip(query_routing, passage_routing, strict=True)]
        return torch.stack([loss, *routing])

    def encode(self, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(B, T) texts to (B, H) vectors, and the router losses."""
        out = self.encoder(input_ids=ids, attention_mask=mask, token_type_ids=torch.zeros_like(ids))
        return self.pool(out.last_hidden_state, mask), router_sums(out, mask)


@dataclass
class PairRows(OrderedRows):
    """The rows of questions, each with its passage."""

    store: QuestionStore
    framing: Framing
    order: Order
    capacity: int
    max_query_length: int
    routes: bool

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Real tokens of questions and their passages."""
        return pair_lengths(self.store, self.capacity, self.max_query_length, numbers)

    def batch(self, places: Sequence[int]) -> Batch:
        """One forward pass over the questions at some places."""
        numbers = self.numbers(places)
        passages = self.store.answers[numbers, 0]
        questions = [self.store.question(number)[: self.max_query_length] for number in numbers]
        ids, mask = framed(questions, self.framing, self.max_query_length + SPECIAL)
        passage_ids, passage_mask = framed([self.store.passage(n) for n in passages], self.framing, self.capacity)
        inputs = {"ids": ids, "mask": mask, "passage_ids": passage_ids, "passage_mask": passage_mask}
        inputs["passage"] = torch.from_numpy(np.array(passages))
        num_tokens = int(mask.sum() + passage_mask.sum())
        counts = (len(numbers), *((num_tokens, num_tokens) if self.routes else ()))
        return Batch(inputs, counts, num_tokens)


def pair_lengths(store: QuestionStore, capacity: int, max_query_length: int, numbers: np.ndarray) -> np.ndarray:
    """(N,) tokens of questions and their passages, cut and framed."""
    query = np.minimum(store.question_lengths[numbers], max_query_length) + SPECIAL
    return query + np.minimum(store.passage_lengths[store.answers[numbers, 0]] + SPECIAL, capacity)


def framed(texts: Sequence[np.ndarray], framing: Framing, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T) ids of texts between their special tokens, cut to `most` tokens with them, and (B, T) 1 where they are."""
    ids, mask = padded([framing(text[: most - SPECIAL])[0] for text in texts], most)
    return torch.from_numpy(ids), torch.from_numpy(mask)


class Retrieval(EncoderTask):
    """Finding the passage of a question.

    Raises: UserError when a row has no room for a text.
    """

    head = Retriever
    objective = "ict"
    row_arguments = ("max_query_length",)
    needs_head = False  # equal weights pool as well

    def __init__(self, arguments: ReadingArguments, framing: Framing, capacity: int) -> None:
        require(capacity > SPECIAL, f"--max_seq_length {capacity}: {SPECIAL} special tokens leave no room; raise it")
        self.framing, self.capacity = framing, capacity
        self.max_query_length = min(arguments.max_query_length, capacity - SPECIAL)

    def rows(self, store: QuestionStore, sizes: BatchSizes, seed: int, routes: bool) -> PairRows:
        """Every question with its passage, which is cut where it does not fit."""
        check_negatives(sizes)

        def lengths(numbers: np.ndarray) -> np.ndarray:
            return np.minimum(store.passage_lengths[store.answers[numbers, 0]], self.capacity) // LENGTHS

        num = store.num_questions
        order = Order(num, num, sizes.global_batch, seed, lengths)
        distributed.say(f"{num:,} questions on {store.num_passages:,} passages; {self.cut_note(store)}")
        return PairRows(store, self.framing, order, self.capacity, self.max_query_length, routes)

    def cut_note(self, store: QuestionStore) -> str:
        """How much of the passages is not seen."""
        num_cut = int((store.passage_lengths > self.capacity - SPECIAL).sum())
        return f"{num_cut:,} passages are cut to {self.capacity} tokens"

    def score(self, engine: Engine, questions: QuestionSet, micro: int) -> Found:
        """Recall and reciprocal rank of the questions among all passages of their store."""
        store = questions.store
        passages = self.vectors(engine, [store.passage(k) for k in range(store.num_passages)], micro)
        found = self.search(engine, questions, passages, micro)
        values = retrieval(found, store.answers[questions.numbers, 0])
        return Found(values, notes=[self.cut_note(store)])

    def search(self, engine: Engine, questions: QuestionSet, passages: np.ndarray, micro: int) -> np.ndarray:
        """(Q, K) rows of the (P, H) `passages` for each question, the best first. Collective."""
        texts = [questions.store.question(k)[: self.max_query_length] for k in questions.numbers]
        return shared_search(self.vectors(engine, texts, micro), passages, max(RECALL_AT))

    def vectors(self, engine: Engine, texts: Sequence[np.ndarray], micro: int) -> np.ndarray:
        """(N, H) fp32 vectors of texts, on every rank. Collective."""
        out = np.zeros((len(texts), engine.module.encoder.config.hidden_size), dtype=np.float32)
        self.encode(engine, texts, micro, out)
        return distributed.all_reduce(torch.from_numpy(out).to(distributed.device())).cpu().numpy()

    def write_vectors(self, engine: Engine, texts: Sequence[np.ndarray], micro: int, path: Path) -> np.ndarray:
        """(N, H) fp32 vectors of texts in a file that is mapped into memory, in numpy's format. Each rank writes its
        rows. Collective.

        Raises: SaveFailed when there is no room for the file.
        """
        shape = (len(texts), engine.module.encoder.config.hidden_size)
        message = reserve(path, shape) if distributed.is_main() else None
        if message := distributed.broadcast(message):
            raise SaveFailed(message)
        out = np.lib.format.open_memmap(path, "r+")
        self.encode(engine, texts, micro, out)
        out.flush()
        distributed.barrier()
        return np.load(path, mmap_mode="r")

    def encode(self, engine: Engine, texts: Sequence[np.ndarray], micro: int, out: np.ndarray) -> None:
        """Vectors of texts: each rank fills its rows of `out`, (N, H). Texts of about the same length share a batch,
        and all ranks make the same number of forward passes. Collective."""
        device = distributed.device()
        with engine.evaluating() as module:
            for mine, numbers in shares([len(text) for text in texts], micro):
                ids, mask = framed([texts[k] for k in numbers], self.framing, self.capacity)
                vectors = module(ids=ids.to(device), mask=mask.to(device))
                out[mine] = vectors[: len(mine)].float().cpu().numpy()


def reserve(path: Path, shape: tuple[int, int]) -> str | None:
    """Make a file for an fp32 array, its room taken: writing to a map of a file that has none ends the process. Returns
    what went wrong, and then leaves nothing."""
    try:
        np.lib.format.open_memmap(path, "w+", np.float32, shape).flush()
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        path.unlink(missing_ok=True)
        return f"{path}: {4 * shape[0] * shape[1] / 2**20:,.1f} MiB of vectors cannot be written ({error.strerror})"
    return None


def shared_search(queries: np.ndarray, vectors: np.ndarray, k: int) -> np.ndarray:
    """`search`, the queries divided over the ranks; the numbers alone. Collective."""
    k = min(k, len(vectors))
    found = torch.zeros(len(queries), k, dtype=torch.int64)
    mine = slice(distributed.rank(), None, distributed.world_size())
    found[mine] = search(torch.from_numpy(queries[mine]), vectors, k)[1]
    return distributed.all_reduce(found.to(distributed.device())).cpu().numpy()


def search(queries: torch.Tensor, vectors: np.ndarray, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k vectors with the highest product with each query: exact, reading `vectors` once from beginning to end.

    Args: queries: (Q, H); vectors: (N, H), may be mapped from a file larger than memory; k: at most N.

    Returns: (Q, k) products, the highest first, and (Q, k) numbers of the vectors.
    """
    device = distributed.device()
    rows = max(1, CHUNK_BYTES // (4 * vectors.shape[1]))
    best = torch.full((len(queries), k), -torch.inf)
    numbers = torch.zeros(len(queries), k, dtype=torch.int64)
    for start in range(0, len(vectors), rows):
        chunk = torch.from_numpy(np.array(vectors[start : start + rows])).to(device)
        for first in range(0, len(queries), QUERIES):
            part = slice(first, first + QUERIES)
            products, new = (queries[part].to(device) @ chunk.T).topk(min(k, len(chunk)), dim=1)
            best[part], places = torch.cat([best[part], products.cpu()], dim=1).topk(k, dim=1)
            numbers[part] = torch.cat([numbers[part], start + new.cpu()], dim=1).gather(1, places)
    return best, numbers
