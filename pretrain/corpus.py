"""A corpus as token ids on disk: documents of sentences, tokenised once, read by memory map.

A text file is worked off in pieces of some megabytes that end where a document ends (at a blank line). Each piece
becomes a store of its own, named by the hash of its content, so a build that is interrupted goes on at the piece where
it stopped, and a corpus larger than memory needs no more of it than a small one.
"""

import hashlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import accumulate, chain, groupby, islice, takewhile
from os import SEEK_END
from pathlib import Path
from typing import Any

import numpy as np

from kozero.data.readers import LINE_END, check_line, load_hub, raw_lines
from kozero.data.store import META, build_once, encodings, key_of, seal, tokenizer_hash, unknown_id
from kozero.errors import UserError, require
from kozero.json_files import not_utf8, reading
from kozero.seal import read_sealed

PIECE_BYTES = 16 * 2**20
LINE_BYTES = 2**20  # a longer line is no text
ENCODE_SENTENCES = 4096  # handed to the tokenizer at once

Document = list[str]  # its lines
Splitter = Callable[[Document], Iterable[str]]  # lines to sentences


@dataclass(frozen=True)
class Piece:
    """Bytes [start, end) of a text file: whole documents."""

    path: Path
    start: int
    end: int

    def content(self) -> bytes:
        """Read the bytes of this part of the file."""
        with reading(self.path) as file:
            file.seek(self.start)
            return file.read(self.end - self.start)

    def documents(self) -> Iterator[Document]:
        """Documents as their lines without the empty ones."""
        for has_text, lines in groupby(self.lines(), key=bool):
            if has_text:
                yield list(lines)

    def lines(self) -> Iterator[str]:
        """Lines without the spaces around them and without byte order marks (a file may be several put together).

        Raises: UserError naming the line that is not UTF-8 or too long.
        """
        content = self.content()
        for number, line in enumerate(content.splitlines()):
            if len(line) > LINE_BYTES:
                check_line(place_of_line(self.path, self.start, number), line, LINE_BYTES)
            try:
                text = line.decode("utf-8-sig")
            except UnicodeDecodeError:
                where = place_of_line(self.path, self.start, number)
                raise UserError(f"{where}: {not_utf8()}") from None
            yield text.strip()


@dataclass(frozen=True)
class HubPiece:
    """Rows [start, end) of a data set's text column: each a document."""

    rows: Any  # datasets.Dataset
    column: str
    start: int
    end: int

    def content(self) -> bytes:
        """What names the piece."""
        return f"{self.rows._fingerprint} {self.column} {self.start} {self.end}".encode()

    def documents(self) -> Iterator[Document]:
        """Rows as their lines without the empty ones; rows without text are passed over."""
        for number, row in enumerate(self.rows.select(range(self.start, self.end)), start=self.start + 1):
            lines = [line.strip() for line in LINE_END.split(row[self.column] or "") if line.strip()]
            if longest := max(lines, key=len, default=""):
                check_line(f"--text_column {self.column}: row {number}", longest.encode(errors="replace"), LINE_BYTES)
                yield lines


def place_of_line(path: Path, place: int, number: int) -> str:
    """File and number of the line `number` lines after that at byte `place`. Counts lines with a block in memory."""
    with reading(path) as file:
        ends = takewhile(lambda end: end <= place, accumulate(map(len, raw_lines(file))))
        return f"{path}:{sum(1 for _ in ends) + number + 1}"


def pieces_of(path: Path) -> Iterator[Piece]:
    """A file cut at the first blank line after every PIECE_BYTES; at the end of a line where a document is longer."""
    with reading(path) as file:
        size, start = file.seek(0, SEEK_END), 0
        while start < size:
            place = file.seek(min(start + PIECE_BYTES, size) - 1)
            for number, line in enumerate(raw_lines(file, LINE_BYTES)):
                if len(line) > LINE_BYTES:
                    check_line(place_of_line(path, place, 0), line, LINE_BYTES)
                place += len(line)
                if number and (not line.strip() or place > start + 2 * PIECE_BYTES):  # 0 is the rest of a line
                    break
            yield Piece(path, start, place)
            start = place


def hub_pieces(name: str, split: str, column: str, rows: int = 10_000) -> list[HubPiece]:
    """A hub data set (or a local folder that `datasets` loads) in pieces of `rows` rows."""
    data = load_hub(f"--corpus_hub {name}", "Give files with --corpus_path", name, None, split)
    known = ", ".join(data.column_names)
    require(column in data.column_names, f"--text_column {column}: {name} has the columns {known}")
    kind = getattr(data.features[column], "dtype", "list")
    require(kind in ("string", "large_string"), f"--text_column {column}: {name} has no text there but {kind}")
    return [HubPiece(data, column, k, min(k + rows, len(data))) for k in range(0, len(data), rows)]


@dataclass(frozen=True)
class Shard:
    """A tokenised piece.

    `tokens` (N,) ids; `sentences` (S + 1,) places in `tokens` where sentences begin, the last is N; `documents`
    (D + 1,) numbers of the sentences where documents begin, the last is S.
    """

    folder: Path
    tokens: np.ndarray
    sentences: np.ndarray
    documents: np.ndarray
    num_unk: int = 0

    @classmethod
    def open(cls, folder: Path) -> "Shard":
        """Map a shard's files."""
        meta = read_sealed(folder / META)
        tokens = np.memmap(folder / "tokens.bin", np.dtype(meta["dtype"]), mode="r")
        names = ("sentences.npy", "documents.npy")
        return cls(folder, tokens, *(np.load(folder / name, mmap_mode="r") for name in names), meta["num_unk"])

    @property
    def num_documents(self) -> int:
        """Number of documents in the shard."""
        return len(self.documents) - 1


def reading_key(tokenizer: Any, sentences: str) -> str:
    """What turns the content of a piece into its shard: the tokenizer, and the splitter with its version."""
    splitter = f"kiwi {version('kiwipiepy')}" if sentences == "kiwi" else sentences
    return key_of(tokenizer_hash(tokenizer), splitter)


def build_shard(piece: Piece | HubPiece, tokenizer: Any, split: Splitter, reading: str, cache: Path) -> Path:
    """The folder of a piece's shard, tokenised unless it is there.

    Args: reading: the reading_key of the tokenizer and the splitter.
    """
    key = "corpus-" + key_of(hashlib.sha256(piece.content()).hexdigest(), reading)
    return build_once(cache, key, partial(write_shard, piece=piece, tokenizer=tokenizer, split=split))


def write_shard(folder: Path, piece: Piece | HubPiece, tokenizer: Any, split: Splitter) -> None:
    """Tokenise a piece into `folder`, one batch of sentences in memory at a time."""
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    lengths, documents = array("I"), array("Q", [0])
    sentences = numbered_sentences(piece.documents(), split, documents)
    unk_id, num_unk = unknown_id(tokenizer), 0
    with (folder / "tokens.bin").open("wb") as file:
        while batch := list(islice(sentences, ENCODE_SENTENCES)):
            encoded = [sentence.ids for sentence in encodings(batch, tokenizer)]
            lengths.extend(map(len, encoded))
            tokens = np.fromiter(chain.from_iterable(encoded), dtype)
            file.write(tokens.tobytes())
            num_unk += int((tokens == unk_id).sum())
    ends = np.concatenate([[0], np.cumsum(np.frombuffer(lengths, dtype=np.uint32), dtype=np.int64)])
    if ends[-1] == 0:
        (folder / "tokens.bin").write_bytes(dtype.type(0).tobytes())  # an empty file cannot be mapped
    places = np.unique(ends)  # without the sentences, and below the documents, that have no tokens
    np.save(folder / "sentences.npy", places)
    np.save(folder / "documents.npy", np.unique(np.searchsorted(places, ends[np.asarray(documents)])))
    seal(folder, dtype=dtype.name, num_unk=num_unk)


def numbered_sentences(documents: Iterable[Document], split: Splitter, ends: array) -> Iterator[str]:
    """All sentences in their order; the number of those so far is added to `ends` after each document."""
    count = 0
    for document in documents:
        for sentence in split(document):
            count += 1
            yield sentence
        ends.append(count)


def by_line(document: Document) -> Document:
    """Every line is a sentence."""
    return document


def by_kiwi() -> Splitter:
    """Sentences inside lines by kiwipiepy, whose Korean model finds ends that have no punctuation (0.1 MB/s a core)."""
    from kiwipiepy import Kiwi  # imported here: it loads its model, and lines do not need it

    kiwi = Kiwi(num_workers=1)

    def split(document: Document) -> Iterator[str]:
        for line in kiwi.split_into_sents(document):
            yield from (sentence.text for sentence in line)

    return split


SPLITTERS: dict[str, Callable[[], Splitter]] = {"line": lambda: by_line, "kiwi": by_kiwi}
