"""Batches of packed texts: what a rank computes in a step, as a pure function of the rows consumed so far."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from kozero.config import BatchSizes
from kozero.data.batch import PAD_MULTIPLE, Batch, deal
from kozero.data.hidden import HiddenStore
from kozero.data.packing import Packing, packing_of
from kozero.data.rows import Fit, epoch_order, fit, grouped_order, pack
from kozero.data.store import TokenStore
from kozero.pause import IGNORE, Pauses, Schedule


@dataclass
class PackedBatch(Batch):
    """B rows of T tokens, N positions that predict something.

    `inputs`: input_ids (B, T), position_ids (B, T) that restart at every text of a row, target_index (N,) places in
    the flattened (B * T) positions, target_ids (N,) what they must predict, and where frozen layers are not computed
    anew, hidden (B, T, H), what they give. `texts` (N,) tells for each target the number of its text.
    """

    texts: torch.Tensor
    packing: Packing

    def to(self, device: torch.device) -> dict[str, Any]:
        """On a GPU with the packing; on a CPU masks of rows are faster where rows are short."""
        inputs = super().to(device)
        return inputs | {"packing": self.packing.to(device, non_blocking=True)} if device.type == "cuda" else inputs

    def pin_memory(self) -> None:
        """The packing too."""
        super().pin_memory()
        self.packing = self.packing.pin_memory()


@dataclass
class Text:
    """One text of a row: its ids, what each position predicts, its number, how many of its ids are pauses, and if known
    the (T, H) outputs of frozen layers."""

    ids: np.ndarray
    predicts: np.ndarray
    number: int
    num_pauses: int = 0
    hidden: torch.Tensor | None = None


def collate(rows: Sequence[Sequence[Text]], length: int = 0, most: int = 2**31) -> PackedBatch:
    """Lay texts side by side in rows and pad at the end, to `length`, or to the longest row rounded up, `most` at most.
    A row without texts is all padding and predicts nothing."""
    longest = max((sum(len(text.ids) for text in row) for row in rows), default=0)
    length = length or min(most, max(PAD_MULTIPLE, -(-longest // PAD_MULTIPLE) * PAD_MULTIPLE))
    ids = np.zeros((len(rows), length), dtype=np.int64)
    positions = np.tile(np.arange(length), (len(rows), 1))
    predicts = np.full((len(rows), length), IGNORE, dtype=np.int64)
    numbers = np.zeros((len(rows), length), dtype=np.int64)
    num_tokens = 0
    for r, row in enumerate(rows):
        if not row:
            continue
        lengths = np.array([len(text.ids) for text in row])
        used, starts = lengths.sum(), np.cumsum(lengths) - lengths
        ids[r, :used] = np.concatenate([text.ids for text in row])
        predicts[r, :used] = np.concatenate([text.predicts for text in row])
        numbers[r, :used] = np.repeat([text.number for text in row], lengths)
        # Padding continues the last text: causal attention hides it, and a row of one text needs no mask matrix.
        lengths[-1] += length - used
        positions[r] -= np.repeat(starts, lengths)
        num_tokens += int(used) - sum(text.num_pauses for text in row)
    index = np.flatnonzero(predicts != IGNORE)
    inputs = {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(positions),
        "target_index": torch.from_numpy(index),
        "target_ids": torch.from_numpy(predicts.ravel()[index]),
    } | lay_hidden(rows, length)
    texts = torch.from_numpy(numbers.ravel()[index])
    return PackedBatch(inputs, (len(index),), num_tokens, texts, packing_of(positions))


def lay_hidden(rows: Sequence[Sequence[Text]], length: int) -> dict[str, torch.Tensor]:
    """`hidden` (B, T, H) of texts that know it, 0 behind the last one of a row."""
    known = [[text.hidden for text in row if text.hidden is not None] for row in rows]
    some = next((vectors for row in known for vectors in row), None)
    if some is None:
        return {}
    hidden = some.new_zeros(len(rows), length, some.shape[1])
    for laid, row in zip(hidden, known, strict=True):
        if row:
            torch.cat(row, out=laid[: sum(map(len, row))])
    return {"hidden": hidden}


@dataclass
class TrainingRows:
    """The Rows (see batch.py) of a token store, one or more examples a row."""

    store: TokenStore
    pauses: Pauses
    capacity: int
    batching: str  # packed | grouped
    seed: int
    schedule: Schedule | None = None  # None: always all
    ranked: np.ndarray | None = None  # see Prefixes
    hidden: HiddenStore | None = None  # of frozen layers that are not computed anew
    rows: list[np.ndarray] = field(init=False)
    length: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.fit = fit(self.store, self.capacity, self.pauses.num, self.pauses.inside)
        used = self.fit.used
        if self.batching == "packed":
            self.rows = pack(self.fit.length, used, self.capacity, self.seed)
        else:
            self.rows = list(used[:, None])
        self.length = np.array([self.fit.length[row].sum() for row in self.rows], dtype=np.int64)
        self._orders: dict[tuple[int, int], np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def order(self, epoch: int, group: int) -> np.ndarray:
        """Row numbers of an epoch in their order."""
        known = self._orders  # another thread may put others in its place
        if (epoch, group) not in known:
            if self.batching == "packed":
                order = epoch_order(len(self.rows), self.seed, epoch)
            else:
                order = grouped_order(self.length, self.seed, epoch, group)
            recent = {k: v for k, v in known.items() if k[0] >= epoch - 1}  # a step spans two at most
            self._orders = known = recent | {(epoch, group): order}
        return known[epoch, group]

    def step(self, consumed: int, sizes: BatchSizes, rank: int) -> list[PackedBatch]:
        """The micro batches of one rank in the step that begins after `consumed` rows.

        The global batch is dealt out in micro batches, first to rank 0, 1, ..., then again; which rows belong to a
        step does not depend on how they are dealt.
        """
        micros = self.micro_batches(consumed, sizes, rank)
        least = self.capacity if self.batching == "packed" else 0
        pauses = replace(self.pauses, num=self.schedule(consumed)) if self.schedule else self.pauses
        epoch = consumed // len(self.rows)
        return [collate([self.texts(n, pauses, epoch) for n in micro], least, self.capacity) for micro in micros]

    def micro_batches(self, consumed: int, sizes: BatchSizes, rank: int) -> list[list[int]]:
        """Row numbers of a rank's micro batches in a step."""
        return [[self.row_at(place, sizes.global_batch) for place in places] for places in deal(consumed, sizes, rank)]

    def examples(self, consumed: int, sizes: BatchSizes, rank: int) -> list[int]:
        """Numbers of the examples, of which a row holds several."""
        rows = (row for micro in self.micro_batches(consumed, sizes, rank) for row in micro)
        return [int(number) for row in rows for number in self.rows[row]]

    def num_tokens(self, consumed: int, group: int) -> int:
        """Counted from row lengths, so that nothing travels between ranks for it."""
        rows = [self.row_at(place, group) for place in range(consumed, consumed + group)]
        return int(sum(self.length[row] - self.pauses.num * len(self.rows[row]) for row in rows))

    def row_at(self, place: int, group: int) -> int:
        """Number of the row at a place of the stream."""
        epoch, offset = divmod(place, len(self.rows))
        return int(self.order(epoch, group)[offset])

    def texts(self, row: int, pauses: Pauses | None = None, epoch: int = 0) -> list[Text]:
        """The texts of a row."""
        prefixes = Prefixes(self.store, self.fit.cut, self.ranked)
        texts = [prefixes.text(int(number), pauses or self.pauses, epoch) for number in self.rows[row]]
        for text in texts if self.hidden else ():
            text.hidden = self.hidden.of(text.number)
        return texts


@dataclass(frozen=True)
class Prefixes:
    """What a model reads and must write of each example of a store, its context cut.

    `cut` is the (N, 2) part of each context that is kept. `ranked` (N, K) are places in the prefix after the cut,
    those where pauses are due first in front, -1 behind the last; they stand in for the marks of the store.
    """

    store: TokenStore
    cut: np.ndarray
    ranked: np.ndarray | None = None

    def parts(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(P,) what the model reads, context cut and prompt whole, and (T,) what it must write."""
        start, context_end, prompt_end, target_end = self.store.rows[number, :4].tolist()
        first, last = self.cut[number].tolist()
        tokens = self.store.tokens
        prefix = [tokens[start + first : start + last], tokens[context_end:prompt_end]]
        return np.concatenate(prefix).astype(np.int64), tokens[prompt_end:target_end].astype(np.int64)

    def marks(self, number: int) -> np.ndarray:
        """(K,) places of the prefix where pauses may stand."""
        if self.ranked is not None:
            return self.ranked[number][self.ranked[number] >= 0]
        marks, (start, context_end) = self.store.marks(number), self.store.rows[number, :2]
        (first, last), length = self.cut[number], context_end - start
        if last - first == length:
            return marks
        inside = marks[(marks >= first) & (marks < last)] - first
        return np.concatenate([inside, marks[marks >= length] - length + last - first])

    def prompt(self, number: int, pauses: Pauses) -> np.ndarray:
        """The prefix with its pauses."""
        return pauses.prompt(self.parts(number)[0], self.marks(number))

    def text(self, number: int, pauses: Pauses, epoch: int = 0) -> Text:
        """Prefix, pauses and target, and what each position must predict: all of the target but unknown tokens."""
        ids, predicts = pauses.sequence(*self.parts(number), self.marks(number), epoch)
        predicts[predicts == self.store.unk_id] = IGNORE
        return Text(ids, predicts, number, pauses.num)


def evaluation_batches(
    prefixes: Prefixes, fitted: Fit, pauses: Pauses, capacity: int, micro: int, rank: int, world_size: int
) -> Iterator[PackedBatch]:
    """Packed batches over a whole store, each example that fits once, the same number of batches on every rank (a
    sharded model needs all ranks in every forward pass), of `micro` rows or as many as there are; the last ones of a
    rank may be empty."""
    rows = pack(fitted.length, fitted.used, capacity, seed=0)
    micro = max(1, min(micro, len(rows)))
    for k in range(-(-len(rows) // (micro * world_size))):
        start = (k * world_size + rank) * micro
        texts = [[prefixes.text(int(n), pauses) for n in row] for row in rows[start : start + micro]]
        yield collate(texts + [[]] * (micro - len(texts)), capacity)
