"""Runs of sentences that fill a row, and blocks of a stream of documents: a corpus cut up without losing its tail."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from kozero.data.store import build_once, seal
from pretrain.corpus import Shard

SLICE = 2**18  # rows whose lengths are read at once


@dataclass(frozen=True)
class Chunks:
    """A shard cut into chunks of at most `room` tokens.

    A chunk is a run of units of one document; a unit is a sentence, or a part of one that is longer than `room`.
    `units` (U + 1,) places in the shard's tokens; `chunks` (C + 1,) numbers of the units where chunks begin; chunks
    from `num_train` on belong to held-out documents.
    """

    shard: Shard
    units: np.ndarray
    chunks: np.ndarray
    num_train: int

    def __len__(self) -> int:
        return len(self.chunks) - 1

    def __getitem__(self, number: int) -> list[np.ndarray]:
        """The ids of each unit of a chunk."""
        first, last = int(self.chunks[number]), int(self.chunks[number + 1])
        places = self.units[first : last + 1].tolist()
        tokens = self.shard.tokens[places[0] : places[-1]].astype(np.int64)
        return [tokens[a - places[0] : b - places[0]] for a, b in pairwise(places)]

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens of chunks."""
        return self.units[self.chunks[numbers + 1]] - self.units[self.chunks[numbers]]


def held_out_documents(counts: Sequence[int], fraction: float | None) -> list[int]:
    """How many documents at the end of each shard validate, given how many it has: `fraction` of all, rounded up and
    spread evenly over the corpus; the first document of a corpus never does.

    Args: fraction: None: 0.01, or what 16 documents are where that is more, 0.1 at most: scores on one or two mean
        nothing.
    """
    ends = np.concatenate([[0], np.cumsum(counts)])
    if fraction is None:
        fraction = min(0.1, max(0.01, 16 / max(ends[-1], 1)))
    so_far = np.minimum(np.ceil(fraction * ends), np.maximum(ends - 1, 0)).astype(int)
    return np.diff(so_far).tolist()


def cut(shard: Shard, room: int, held_out: int) -> Chunks:
    """The chunks of a shard, cut once and kept beside it; its last `held_out` documents validate."""
    return open_cut(cut_once(shard, room), shard, held_out)


def cut_once(shard: Shard, room: int) -> Path:
    """The folder of a shard's chunks, which are cut unless they are there."""
    key = f"{shard.folder.name}-{room}"
    return build_once(shard.folder.parent, key, partial(write_cut, shard=shard, room=room))


def open_cut(folder: Path, shard: Shard, held_out: int) -> Chunks:
    """The chunks in a folder."""
    units, chunks, documents = (np.load(folder / name, mmap_mode="r") for name in CUT_FILES)
    return Chunks(shard, units, chunks, int(documents[shard.num_documents - held_out]))


CUT_FILES = ("units.npy", "chunks.npy", "chunk_of_document.npy")


def write_cut(folder: Path, shard: Shard, room: int) -> None:
    """Cut greedily: a chunk takes sentences of its document while they fit."""
    units, unit_of_sentence = split_long(np.asarray(shard.sentences), room)
    ends = unit_of_sentence[np.asarray(shard.documents)]  # (D + 1,) units where documents begin
    chunks = [0]
    if len(units) > 1:
        fits = np.searchsorted(units, units[:-1] + room, side="right") - 1
        inside = np.repeat(ends[1:], np.diff(ends))
        following = np.minimum(fits, inside).tolist()
        while chunks[-1] < len(following):
            chunks.append(following[chunks[-1]])
    starts = np.asarray(chunks, dtype=np.int64)
    for name, values in zip(CUT_FILES, (units, starts, np.searchsorted(starts, ends)), strict=True):
        np.save(folder / name, values)
    seal(folder)


def split_long(sentences: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Break sentences of more than `room` tokens into parts of about one length.

    Returns: (U + 1,) places of the units, (S + 1,) the unit in which each sentence begins.
    """
    lengths = np.diff(sentences)
    parts = np.maximum(1, -(-lengths // room))
    begins = np.concatenate([[0], np.cumsum(parts)])
    number = np.arange(begins[-1]) - np.repeat(begins[:-1], parts)
    places = np.repeat(sentences[:-1], parts) + number * np.repeat(lengths, parts) // np.repeat(parts, parts)
    return np.append(places, sentences[-1]), begins


@dataclass(frozen=True)
class Blocks:
    """A shard as a stream of documents with `separator` before each, cut every `size` tokens. The separator begins a
    document and is what its last token must predict, so every token is predicted once, and all of them predict.

    Blocks [0, num_train) are those of the training documents, the rest those of the held-out ones; the last block of
    either part is as long as what is left.
    """

    shard: Shard
    size: int
    separator: int
    held_out: int  # documents at the end that validate
    bounds: tuple[int, int, int] = field(init=False)  # places of the first token, the first held-out one, the end

    def __post_init__(self) -> None:
        documents = self.shard.num_documents
        object.__setattr__(self, "bounds", (0, self.place(documents - self.held_out), self.place(documents)))

    def place(self, document: int) -> int:
        """Where a document begins in the stream; read from the map, as every document held in memory costs 8 bytes."""
        return int(self.shard.sentences[self.shard.documents[document]]) + document

    @property
    def num_train(self) -> int:
        """Blocks of training documents."""
        return -(-self.bounds[1] // self.size)

    def __len__(self) -> int:
        return self.num_train + -(-(self.bounds[2] - self.bounds[1]) // self.size)

    def span(self, number: int) -> tuple[int, int]:
        """Places [start, end) of a block in the stream."""
        part = int(number >= self.num_train)
        start = self.bounds[part] + (number - part * self.num_train) * self.size
        return start, min(start + self.size, self.bounds[part + 1])

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens of blocks."""
        return np.array([end - start for start, end in map(self.span, numbers.tolist())], dtype=np.int64)

    def __getitem__(self, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, next ids) of each part of a document in a block."""
        start, end = self.span(number)
        document = bisect_right(range(self.shard.num_documents), start, key=self.place) - 1
        parts = []
        while start < end:
            stop = min(end, self.place(document + 1))
            ids = self.stream(document, start, stop + 1)
            parts.append((ids[:-1], ids[1:]))
            start, document = stop, document + 1
        return parts

    def stream(self, document: int, start: int, end: int) -> np.ndarray:
        """Places [start, end) of the stream from within a document to the separator behind it at most."""
        first, behind = self.place(document), self.place(document + 1)
        shift = document + 1  # separators up to a token of this document
        tokens = self.shard.tokens[max(start, first + 1) - shift : min(end, behind) - shift].astype(np.int64)
        before, after = [self.separator] * (start == first), [self.separator] * (end > behind)
        return np.concatenate([before, tokens, after]).astype(np.int64)


class Numbered:
    """The rows of several shards under one number."""

    def __init__(self, parts: Sequence[Chunks | Blocks], held_out: bool) -> None:
        self.parts = parts
        self.first = [part.num_train if held_out else 0 for part in parts]
        counts = [(len(part) if held_out else part.num_train) - f for part, f in zip(parts, self.first, strict=True)]
        self.begins = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def __len__(self) -> int:
        return int(self.begins[-1])

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, row in it) of rows."""
        parts = np.searchsorted(self.begins, numbers, side="right") - 1
        return parts, numbers - self.begins[parts] + np.asarray(self.first)[parts]

    def __getitem__(self, number: int) -> list:
        """What the shard holds there."""
        (part,), (row,) = self.locate(np.array([number]))
        return self.parts[part][int(row)]

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """(N,) tokens of rows."""
        parts, rows = self.locate(numbers)
        found = np.zeros(len(numbers), dtype=np.int64)
        for part in np.unique(parts):
            found[parts == part] = self.parts[part].lengths(rows[parts == part])
        return found

    def num_divisible(self) -> int:
        """Chunks of two units or more: there is something to learn in them beside hidden tokens."""
        kinds = zip(self.parts, self.first, np.diff(self.begins), strict=True)
        return sum(int((np.diff(part.chunks[first : first + num + 1]) > 1).sum()) for part, first, num in kinds)

    def longest(self, most: int) -> int:
        """Tokens of the longest row; looks no further once one has `most`."""
        found = 0
        for start in range(0, len(self), SLICE):
            found = max(found, int(self.lengths(np.arange(start, min(start + SLICE, len(self)))).max()))
            if found >= most:
                break
        return found
