"""The rows of pre-training: what is hidden, which segments are paired, which sentence is the query.

Every draw is a pure function of (seed, place in the stream), so a resumed run meets the same rows, and neither the
number of ranks nor that of micro batches changes them. (transformers' DataCollatorForLanguageModeling draws from one
generator for a whole batch, which a resumed run could not go on with.)
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any
from zlib import crc32

import numpy as np
import torch

from kozero.data.batch import Batch, padded
from kozero.data.batches import PackedBatch, Text, collate
from kozero.data.framing import Framing
from kozero.data.order import ABSENT, Order, OrderedRows
from kozero.data.store import unknown_id
from kozero.errors import require
from kozero.pause import IGNORE, Pauses, insert
from pretrain.chunks import Numbered

KEEP_QUERY = 0.1  # share of the passages that keep their query (Lee et al. 2019, arXiv 1906.00300, section 4)


@dataclass(frozen=True)
class Tokens:
    """What the rows have to know of a tokenizer."""

    framing: Framing
    mask: int
    size: int
    special: np.ndarray  # (size,) True for tokens that are never drawn as a random replacement
    continues: np.ndarray  # (size,) True for tokens that go on with a word (eojeol)
    unk: int = -1  # see unknown_id

    @classmethod
    def of(cls, tokenizer: Any) -> "Tokens":
        """Ids by role.

        Raises: UserError when there is no mask token, or nothing to frame a row with.
        """
        named = f"--tokenizer_name_or_path {tokenizer.name_or_path}: no mask token, which an encoder's --task needs"
        advice = "give another tokenizer (scripts/train_tokenizer.py makes one)"
        require(tokenizer.mask_token_id is not None, f"{named}; {advice}")
        names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        special = np.array([name.startswith(("<unused", "[unused")) for name in names])
        special[[number for number, token in tokenizer.added_tokens_decoder.items() if token.special]] = True
        prefix = getattr(tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None)
        words, unk = continuing(names, prefix), unknown_id(tokenizer)
        return cls(Framing.of(tokenizer), tokenizer.mask_token_id, len(names), special, words, unk)


def continuing(names: Sequence[str], prefix: str | None) -> np.ndarray:
    """Which tokens go on with a word: those with WordPiece's prefix, or those without the mark of a space before them;
    none where no token has such a mark. WordPiece does not say where spaces were, so there a mark of punctuation is a
    word of its own, and what follows it another."""
    if prefix:
        return np.array([name.startswith(prefix) for name in names])
    begins = np.array([name.startswith(("▁", "Ġ")) for name in names])
    return ~begins & begins.any()


@dataclass(frozen=True)
class Masking:
    """Masked language modelling: Devlin et al. 2018, arXiv 1810.04805, section 3.1 (15%; of them 80% become the mask,
    10% a random token, 10% stay), drawn by token or by word."""

    tokens: Tokens
    share: float = 0.15
    whole_words: bool = False

    def __call__(self, units: Sequence[np.ndarray], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Units of a row, without special tokens, to (T,) ids with some hidden, and (T,) what each must predict or
        IGNORE, as for every unknown token. No word goes on in the next unit."""
        ids = np.concatenate(units)
        words = np.arange(len(ids))
        if self.whole_words:
            starts = ~self.tokens.continues[ids]
            starts[np.cumsum([0, *map(len, units[:-1])])] = True
            words = np.cumsum(starts) - 1
        hidden = self.draw(words, rng)
        targets = np.where(hidden & (ids != self.tokens.unk), ids, IGNORE)
        kind = rng.random(len(ids))
        ordinary = np.flatnonzero(~self.tokens.special)
        replaced = ordinary[rng.integers(0, len(ordinary), len(ids))]
        shown = np.where(kind < 0.8, self.tokens.mask, np.where(kind < 0.9, replaced, ids))
        return np.where(hidden, shown, ids), targets

    def draw(self, words: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Which of (T,) tokens are hidden, given the number of each one's word. A systematic sample: each word is taken
        with the share as its probability, whatever its length. They are taken at equal distances in the order of their
        lengths, so the tokens of a row are about the share too. At least one word is hidden."""
        sizes = np.bincount(words)
        order = np.argsort(sizes + rng.random(len(sizes)))  # words of one length at random
        taken = np.empty(len(sizes), dtype=bool)
        taken[order] = np.diff(np.floor(self.share * np.arange(len(sizes) + 1) + rng.random())) > 0
        if not taken.any():
            taken[rng.integers(len(sizes))] = True
        return taken[words]


def num_special(task: str) -> int:
    """Special tokens of an encoder's row."""
    return 3 if task == "mlm_sop" else 2


@dataclass(frozen=True)
class Sample:
    """One row of an encoder: segments with their special tokens, what is predicted, and the second objective's part."""

    ids: np.ndarray
    types: np.ndarray
    predicts: np.ndarray
    swapped: int = IGNORE  # SOP: 1 when the segments changed places
    query: np.ndarray | None = None  # ICT


class EncoderRows(OrderedRows):
    """The rows of an encoder: MLM, alone or with SOP or ICT.

    SOP: are two neighbouring segments in their order (Lan et al. 2020, arXiv 1909.11942, section 3.1). ICT: which
    passage is a sentence taken from (Lee et al. 2019). A chunk of one sentence has no second objective.

    Args:
        router: the module has the two router losses of a Switch transformer, counted over real tokens.
        max_seq_length: tokens of a row with its special ones, at most.
    """

    def __init__(
        self, chunks: Numbered, order: Order, masking: Masking, task: str, router: bool, max_seq_length: int
    ) -> None:
        self.chunks, self.order, self.masking, self.task, self.router = chunks, order, masking, task, router
        self.max_seq_length = max_seq_length

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens of the corpus: without special tokens; a query that stays in its passage too counts once."""
        return self.chunks.lengths(numbers)

    def batch(self, places: Sequence[int]) -> Batch:
        """One forward pass over the rows at some places."""
        samples = [self.sample(place) if place != ABSENT else self.nothing() for place in places]
        numbers, most = self.numbers(places), self.max_seq_length
        ids, mask = padded([sample.ids for sample in samples], most)
        predicts, _ = padded([sample.predicts for sample in samples], most, IGNORE)
        index = np.flatnonzero(predicts != IGNORE)
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "token_type_ids": padded([sample.types for sample in samples], most)[0],
            "target_index": index,
            "target_ids": predicts.ravel()[index],
        }
        counts = [len(index)]
        if self.task == "mlm_sop":
            inputs["swapped"] = np.array([sample.swapped for sample in samples])
            counts.append(int((inputs["swapped"] != IGNORE).sum()))
        if self.task == "mlm_ict":
            queries = [self.nothing().ids if sample.query is None else sample.query for sample in samples]
            inputs["query_ids"], inputs["query_mask"] = padded(queries, most)
            inputs["passage"] = np.array([self.name_of(number) for number in numbers.tolist()])
            inputs["has_query"] = np.array([sample.query is not None for sample in samples])
            counts.append(int(inputs["has_query"].sum()))
        routed = int(mask.sum() + inputs.get("query_mask", mask[:0]).sum())
        counts += [routed] * 2 if self.router else []
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        return Batch(tensors, tuple(counts), int(self.lengths(numbers[numbers >= 0]).sum()))

    def name_of(self, number: int) -> int:
        """A number for the text of a row, -1 for none: copies of a text are one passage."""
        return crc32(np.concatenate(self.chunks[number]).tobytes()) if number >= 0 else -1

    def nothing(self) -> Sample:
        """A row without text, of which nothing is learned."""
        ids, types = self.masking.tokens.framing(np.array([], dtype=np.int64))
        return Sample(ids, types, np.full(len(ids), IGNORE))

    def sample(self, place: int) -> Sample:
        """The row at a place of the stream."""
        rng = np.random.default_rng([self.order.seed, 5, place])
        units = self.chunks[self.order[place]]
        if self.task == "mlm_sop" and len(units) > 1:
            at = int(rng.integers(1, len(units)))
            segments = [units[:at], units[at:]]
            swapped = int(rng.random() < 0.5)
            return self.framed(segments[::-1] if swapped else segments, rng, swapped=swapped)
        if self.task == "mlm_ict" and len(units) > 1:
            taken = int(rng.integers(len(units)))
            keep = rng.random() < KEEP_QUERY
            passage = [unit for k, unit in enumerate(units) if keep or k != taken]
            return self.framed([passage], rng, query=self.masking.tokens.framing(units[taken])[0])
        return self.framed([units], rng)

    def framed(self, segments: Sequence[Sequence[np.ndarray]], rng: np.random.Generator, **other: Any) -> Sample:
        """Segments, each of some units, with tokens hidden and special tokens around them."""
        ends = np.cumsum([sum(map(len, units)) for units in segments])[:-1]
        shown, targets = (np.split(part, ends) for part in self.masking([u for units in segments for u in units], rng))
        ids, types = self.masking.tokens.framing(*shown)
        ignored = np.array([IGNORE])
        predicts = np.concatenate([ignored, *(part for segment in targets for part in (segment, ignored))])
        return Sample(ids, types, predicts, **other)


class BlockRows(OrderedRows):
    """The rows of a causal language model: blocks of the stream of documents, which do not see each other.

    With pauses a row is a shorter block and pauses at random places of it (Goyal et al. 2023, section 3.1, who insert
    them into a full row and trim its end; so no token is lost).

    Args:
        size: tokens of a row with its pauses.
        pauses: of a full row, at "random" places; None: no row has any.
        unk_id: of the token that is not predicted, see unknown_id.
    """

    def __init__(
        self, blocks: Numbered, order: Order, size: int, pauses: Pauses | None = None, unk_id: int = -1
    ) -> None:
        self.blocks, self.order, self.size, self.pauses, self.unk_id = blocks, order, size, pauses, unk_id

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens of blocks."""
        return self.blocks.lengths(numbers)

    def batch(self, places: Sequence[int]) -> PackedBatch:
        """One forward pass over the rows at some places."""
        numbers = self.numbers(places).tolist()
        rows = [self.texts(row, place) if row >= 0 else [] for row, place in zip(numbers, places, strict=True)]
        return collate(rows, self.size)

    def texts(self, row: int, place: int = 0) -> list[Text]:
        """The documents' parts of a block, at a place of the stream."""
        wanted = [(ids, np.where(following == self.unk_id, IGNORE, following)) for ids, following in self.blocks[row]]
        texts = [Text(ids, following, row) for ids, following in wanted]
        return self.paused(texts, place) if self.pauses else texts

    def paused(self, texts: list[Text], place: int) -> list[Text]:
        """A row with its pauses, as many of a shorter last block as its share. Those before a document belong to the
        one before it, whose last token predicts it; those at the head of the row predict nothing, as the first token
        is predicted by the row before. So the same tokens are predicted as without pauses."""
        ids = np.concatenate([text.ids for text in texts])
        num = round(len(ids) * self.pauses.num / (self.size - self.pauses.num))
        gaps = replace(self.pauses, num=num).gaps(ids, epoch=place)
        found, start = [], 0
        for text in texts:
            end = start + len(text.ids)
            own = gaps[start : end + 1].copy()
            own[0] *= start == 0
            parts = insert(text.ids, text.predicts, own, self.pauses.token_id)
            found.append(Text(*parts, text.number, int(own.sum())))
            start = end
        return found
