"""Token ids of a data set on disk: tokenised once, under a lock, read by memory map.

A store is a folder with `tokens.bin` (16 or 32 bit ids, one text after the other), `rows.npy` (where the parts of
each row lie), `marks.npy` (where pauses may stand, for placements that follow the text) and `meta.json`. Its name is
the hash of everything that went into it, so a changed file, tokenizer or setting never meets an old store. It is built
in a folder of its own and renamed when it is whole.
"""

import copy
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from kozero.errors import UserError

FORMAT = 4  # counts up when the layout or the meaning of a store changes
ENCODE_ROWS = 2048  # texts handed to the tokenizer at once; larger batches are not faster
COLUMNS = ("start", "context_end", "prompt_end", "target_end", "span_start", "span_end", "marks_start", "marks_end")

Marker = Callable[[str, np.ndarray], np.ndarray]  # a text and (T, 2) characters of its tokens to (K,) places among them


@dataclass(frozen=True)
class TextRow:
    """One row before tokenisation: context and prompt are read, target is written. `span` are characters of the
    context that must survive a cut."""

    context: str
    prompt: str
    target: str
    span: tuple[int, int] | None = None


class TokenStore:
    """Rows of token ids.

    `rows` is an (N, 8) int64 array: start, context_end, prompt_end, target_end are places in `tokens`; span_start and
    span_end are places in the context, -1 where a row has no span; marks_start and marks_end are places in `all_marks`,
    which are places in context and prompt, counted from the row's start.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = json.loads((folder / "meta.json").read_text())
        self.rows = np.load(folder / "rows.npy", mmap_mode="r")
        self.all_marks = np.load(folder / "marks.npy", mmap_mode="r")
        empty = self.meta["num_tokens"] == 0
        dtype = np.dtype(self.meta["dtype"])
        self.tokens = np.zeros(0, dtype) if empty else np.memmap(folder / "tokens.bin", dtype, mode="r")

    def __len__(self) -> int:
        return len(self.rows)

    def with_rows(self, rows: np.ndarray) -> "TokenStore":
        """The same tokens in other rows."""
        other = copy.copy(self)
        other.rows = rows
        return other

    def marks(self, number: int) -> np.ndarray:
        """(K,) places in context and prompt of a row where pauses may stand, ascending."""
        return self.all_marks[self.rows[number, 6] : self.rows[number, 7]]

    @property
    def lengths(self) -> np.ndarray:
        """(N, 3) tokens of context, prompt and target."""
        return np.diff(self.rows[:, :4], axis=1)


def key_of(*parts: Any) -> str:
    """A short hash of anything that JSON can hold."""
    return hashlib.sha256(json.dumps([FORMAT, *parts], ensure_ascii=False).encode()).hexdigest()[:24]


def tokenizer_hash(tokenizer: Any) -> str:
    """Hash of a fast tokenizer's whole state: special tokens, normaliser, vocabulary, merges. Truncation and padding,
    which the state begins with, are not in it: every call sets them anew."""
    state = tokenizer.backend_tokenizer.to_str().split('"added_tokens"', 1)[-1]
    return hashlib.sha256(state.encode()).hexdigest()


def open_or_build(
    cache: Path,
    key: str,
    build: Callable[[], Iterable[TextRow]],
    tokenizer: Any,
    notes: Callable[[], list[str]] = list,
    marker: Marker | None = None,
) -> TokenStore:
    """The store `key` below `cache`, built first when it is not there or not whole. Safe with many processes.

    Args:
        notes: asked after the last row, kept in the store's meta: what a reader has to know about its rows.
        marker: finds the marks of a context or prompt; None: there are none.
    """
    write = partial(write_store, rows=build, tokenizer=tokenizer, notes=notes, marker=marker)
    return TokenStore(build_once(cache, key, is_sealed, write))


def build_once(cache: Path, key: str, is_whole: Callable[[Path], bool], write: Callable[[Path], None]) -> Path:
    """The folder `key` below `cache`; `write` fills it when it is not there or not whole. Safe with many processes: one
    writes, the others wait; a folder has its name only when it is whole.

    Raises: UserError when the cache cannot be written.
    """
    folder, building = cache / key, cache / f"{key}.incomplete"  # that of the one process that holds the lock
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{key}.lock"):
            if not is_whole(folder):
                shutil.rmtree(building, ignore_errors=True)
                shutil.rmtree(folder, ignore_errors=True)
                building.mkdir()
                try:
                    write(building)
                    building.rename(folder)
                finally:
                    shutil.rmtree(building, ignore_errors=True)
    except OSError as error:
        raise UserError(f"--cache_dir {cache}: cannot be written ({error.strerror or error})") from None
    return folder


def seal(folder: Path, **meta: Any) -> None:
    """Write `meta.json` behind all other files of a folder, which are on the disk then: their sizes, and what a reader
    has to know."""
    sizes = {path.name: to_disk(path) for path in folder.iterdir()}
    (folder / "meta.json").write_text(json.dumps(meta | {"sizes": sizes}))
    to_disk(folder / "meta.json")


def to_disk(path: Path) -> int:
    """Wait until a file is on the disk; its bytes."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        return file.seek(0, os.SEEK_END)


def is_sealed(folder: Path) -> bool:
    """Whether a sealed folder's files have the sizes that its meta names."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        return bool(meta["sizes"]) and all((folder / k).stat().st_size == size for k, size in meta["sizes"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def write_store(
    folder: Path,
    rows: Callable[[], Iterable[TextRow]],
    tokenizer: Any,
    notes: Callable[[], list[str]] = list,
    marker: Marker | None = None,
) -> None:
    """Tokenise `rows()` into `folder`, one batch in memory at a time; every target ends in the tokenizer's eos."""
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    index, all_marks, position = [], array("i"), 0
    with (folder / "tokens.bin").open("wb") as file:
        for ids, places, marks in encode(rows(), tokenizer, marker):
            file.write(np.asarray(ids, dtype=dtype).tobytes())
            index.extend(places_at(places, position, len(all_marks)))
            all_marks.extend(marks)
            position += len(ids)
    np.save(folder / "rows.npy", np.asarray(index, dtype=np.int64).reshape(-1, len(COLUMNS)))
    np.save(folder / "marks.npy", np.asarray(all_marks, dtype=np.int32))
    meta = {"dtype": dtype.name, "num_rows": len(index), "num_tokens": position, "columns": COLUMNS}
    seal(folder, **meta, notes=notes())


def places_at(places: list[list[int]], position: int, num_marks: int) -> Iterator[list[int]]:
    """Row places of a batch moved to where the batch and its marks begin; spans are relative to their context."""
    for row in places:
        yield [place + position for place in row[:4]] + row[4:6] + [place + num_marks for place in row[6:]]


def encode(
    rows: Iterable[TextRow], tokenizer: Any, marker: Marker | None = None
) -> Iterator[tuple[list[int], list[list[int]], list[int]]]:
    """Batches of (ids of all rows in turn, eight places a row, marks of all rows in turn)."""
    rows, end = iter(rows), [tokenizer.eos_token_id]
    while batch := list(islice(rows, ENCODE_ROWS)):
        contexts = encode_distinct([row.context for row in batch], tokenizer, "input_ids", "offset_mapping")
        prompts = encode_texts([(row.prompt, bool(row.context)) for row in batch], tokenizer)
        targets = encode_texts([(row.target, bool(row.context or row.prompt)) for row in batch], tokenizer)
        ids: list[int] = []
        places, marks = [], []
        for row, (context, offsets), prompt, target in zip(batch, contexts, prompts, targets, strict=True):
            start, num_marks = len(ids), len(marks)
            ids += context + prompt + target + end
            ends = [start + len(context), start + len(context) + len(prompt), len(ids)]
            marks += marks_of(row, offsets, tokenizer, marker) if marker else []
            places.append([start, *ends, *token_span(offsets, row.span), num_marks, len(marks)])
        yield ids, places, marks


def marks_of(row: TextRow, offsets: list[tuple[int, int]], tokenizer: Any, marker: Marker) -> list[int]:
    """Marks of a row's context, whose tokens have `offsets`, and prompt as one text, ascending."""
    prompt = spaced(row.prompt, bool(row.context))
    found = tokenizer(prompt, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    behind = [(start + len(row.context), end + len(row.context)) for start, end in found["offset_mapping"]]
    places = np.asarray([*offsets, *behind], dtype=np.int64).reshape(-1, 2)
    return marker(row.context + prompt, places).tolist() if len(places) else []


def encode_texts(texts: list[tuple[str, bool]], tokenizer: Any) -> list[list[int]]:
    """Ids of (text, whether it follows other text). One that follows is encoded with the space before it, so that the
    pieces' ids equal those of the joined text."""
    joined = [spaced(text, follows) for text, follows in texts]
    return [ids for (ids,) in encode_distinct(joined, tokenizer, "input_ids")]


def encode_distinct(texts: list[str], tokenizer: Any, *names: str) -> list[tuple]:
    """What the tokenizer calls `names` of each text. Equal texts (labels, the passage of several questions) are encoded
    once. Empty texts have no ids; a text that spells a special token is text."""
    distinct = list(dict.fromkeys(texts))
    found = tokenizer(
        distinct, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False,
        return_token_type_ids=False, return_offsets_mapping="offset_mapping" in names, verbose=False,
    )  # fmt: skip
    known = dict(zip(distinct, zip(*(found[name] for name in names), strict=True), strict=True))
    return [known[text] for text in texts]


def spaced(text: str, follows: bool) -> str:
    """A text with the space before it where it follows another."""
    return f" {text}" if text and follows else text


def token_span(offsets: list[tuple[int, int]], span: tuple[int, int] | None) -> tuple[int, int]:
    """First and one past the last token that touch the characters of `span`; (-1, -1) without one."""
    if span is None:
        return -1, -1
    touching = [k for k, (start, end) in enumerate(offsets) if start < span[1] and end > span[0]]
    return (touching[0], touching[-1] + 1) if touching else (-1, -1)
