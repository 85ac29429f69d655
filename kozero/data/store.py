"""Token ids of a data set on disk: tokenised once, under a lock, read by memory map.

A store is a folder with `tokens.bin` (16 or 32 bit ids, one text after the other), `rows.npy` (where the parts of
each row lie), `marks.npy` (where pauses may stand, for placements that follow the text) and `meta.json`. Its name is
the hash of everything that went into it, so a changed file, tokenizer or setting never meets an old store. It is built
in a folder of its own and renamed when it is whole.
"""

import copy
import gc
import hashlib
import json
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tokenizers import Encoding

from kozero.errors import UserError, first_line, no_panic
from kozero.seal import damage, fingerprints, read_sealed, whole_folder, write_seal

META = "meta.json"  # seals a store
FORMAT = 6  # counts up when the layout or the meaning of a store changes
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


Build, Notes = Callable[[], Iterable[TextRow]], Callable[[], list[str]]  # what makes rows, and notes about them


class TokenStore:
    """Rows of token ids.

    `rows` is an (N, 8) int64 array: start, context_end, prompt_end, target_end are places in `tokens`; span_start and
    span_end are places in the context, -1 where a row has no span; marks_start and marks_end are places in `all_marks`,
    which are places in context and prompt, counted from the row's start.
    """

    unk_id = -1  # see unknown_id

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.meta = read_sealed(folder / META)
        self.unk_id = self.meta["unk_id"]
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

    def unknown_targets(self) -> int:
        """Rows with an unknown token in their target."""
        begins, ends = np.searchsorted(np.flatnonzero(self.tokens == self.unk_id), self.rows[:, 2:4]).T
        return int((begins < ends).sum())

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
    cache: Path, key: str, build: Build, tokenizer: Any, notes: Notes = list, marker: Marker | None = None
) -> TokenStore:
    """The store `key` below `cache`, built first when it is not there or not whole. Safe with many processes.

    Args: notes: asked after the last row, kept in the store's meta: what a reader has to know about its rows; marker:
        finds the marks of a context or prompt; None: there are none.
    """
    write = partial(write_store, rows=build, tokenizer=tokenizer, notes=notes, marker=marker)
    return TokenStore(build_once(cache, key, write))


def build_once(cache: Path, key: str, write: Callable[[Path], None]) -> Path:
    """The folder `key` below `cache`; `write` fills and seals it when it is not there or does not hold what was
    written, which is told. Safe with many processes: one writes, the others wait; a folder has its name only when it is
    whole. All of it is read, at about 1.5 GB/s: once in a run, by one process a machine.

    Raises: UserError when the cache cannot be written.
    """
    folder = cache / key
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(cache / f"{key}.lock"):
            if found := damage(folder, META):
                if folder.exists():
                    print(f"warning: {folder}: {found}; it is built anew", flush=True)
                shutil.rmtree(folder, ignore_errors=True)  # first: there may be no room for two
                with whole_folder(folder) as building:
                    write(building)
    except OSError as error:
        raise UserError(f"--cache_dir {cache}: cannot be written ({error.strerror or error})") from None
    return folder


def seal(folder: Path, **meta: Any) -> None:
    """Write `meta.json` behind all other files of a folder, which are on the disk then: what they must hold, and what
    a reader has to know."""
    write_seal(folder / META, meta | {"files": fingerprints(folder)})


def write_store(folder: Path, rows: Build, tokenizer: Any, notes: Notes, marker: Marker | None) -> None:
    """Tokenise `rows()` into `folder`, one batch in memory at a time; every target ends in the tokenizer's eos."""
    dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.uint32)
    index, all_marks, position = [np.zeros((0, len(COLUMNS)), np.int64)], array("i"), 0
    with collecting_what_is_new(), (folder / "tokens.bin").open("wb") as file:
        for ids, places, marks in encode(rows(), tokenizer, marker):
            file.write(np.asarray(ids, dtype=dtype).tobytes())
            begins = [position] * 4 + [0] * 2 + [len(all_marks)] * 2  # spans are relative to their context
            index.append(np.asarray(places, dtype=np.int64) + begins)
            all_marks.extend(marks)
            position += len(ids)
    places = np.concatenate(index)
    np.save(folder / "rows.npy", places)
    np.save(folder / "marks.npy", np.asarray(all_marks, dtype=np.int32))
    meta = {"dtype": dtype.name, "num_rows": len(places), "num_tokens": position, "columns": COLUMNS}
    seal(folder, **meta, unk_id=unknown_id(tokenizer), notes=notes())


def unknown_id(tokenizer: Any) -> int:
    """The token for characters that a tokenizer lacks, of which nothing is learned and no score made; -1 where there is
    none, or where it has another role too: then no text has it (see keep_out_of_text)."""
    roles = [token for role, token in tokenizer.special_tokens_map.items() if role != "unk_token"]
    return -1 if tokenizer.unk_token is None or tokenizer.unk_token in roles else tokenizer.unk_token_id


def unknown_note(num_unk: int, num_tokens: int, tokenizer: Any, more: str = "") -> list[str]:
    """A line about the share of unknown tokens, and what follows of it, if there are any."""
    about = f"are {tokenizer.unk_token}, which stands for characters that the tokenizer lacks{more}"
    return [f"{num_unk / num_tokens:.2%} of the tokens {about}"] if num_unk else []


@contextmanager
def collecting_what_is_new() -> Iterator[None]:
    """Python's garbage collector leaves alone what is there already (libraries, a model), which it would search again
    and again while texts come and go: a tenth of the time of tokenising."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def encode(
    rows: Iterable[TextRow], tokenizer: Any, marker: Marker | None = None
) -> Iterator[tuple[list[int], list[tuple[int, ...]], list[int]]]:
    """Batches of (ids of all rows in turn, eight places a row, marks of all rows in turn)."""
    rows, end = iter(rows), [tokenizer.eos_token_id]
    while batch := list(islice(rows, ENCODE_ROWS)):
        contexts = encode_distinct([row.context for row in batch], tokenizer, with_offsets=True)
        prompts = encode_distinct([spaced(row.prompt, bool(row.context)) for row in batch], tokenizer)
        targets = encode_distinct([spaced(row.target, bool(row.context or row.prompt)) for row in batch], tokenizer)
        ids: list[int] = []
        places, marks = [], []
        for row, (context, offsets), (prompt, _), (target, _) in zip(batch, contexts, prompts, targets, strict=True):
            start, num_marks = len(ids), len(marks)
            context_end = start + len(context)
            prompt_end = context_end + len(prompt)
            ids += context + prompt + target + end
            marks += marks_of(row, offsets, tokenizer, marker) if marker else []
            span = token_span(offsets, row.span)
            places.append((start, context_end, prompt_end, len(ids), *span, num_marks, len(marks)))
        yield ids, places, marks


def marks_of(row: TextRow, offsets: list[tuple[int, int]], tokenizer: Any, marker: Marker) -> list[int]:
    """Marks of a row's context, whose tokens have `offsets`, and prompt as one text, ascending."""
    prompt = spaced(row.prompt, bool(row.context))
    (found,) = encodings([prompt], tokenizer, with_offsets=True)
    behind = [(start + len(row.context), end + len(row.context)) for start, end in found.offsets]
    places = np.asarray([*offsets, *behind], dtype=np.int64).reshape(-1, 2)
    return marker(row.context + prompt, places).tolist() if len(places) else []


def encode_distinct(texts: list[str], tokenizer: Any, with_offsets: bool = False) -> list[tuple[list[int], list]]:
    """Ids of each text, and characters of its tokens if wanted. Equal texts (labels, the passage of several questions)
    are encoded once."""
    distinct = list(dict.fromkeys(texts))
    found = encodings(distinct, tokenizer, with_offsets)
    known = {text: (one.ids, one.offsets if with_offsets else []) for text, one in zip(distinct, found, strict=True)}
    return [known[text] for text in texts]


def encodings(texts: list[str], tokenizer: Any, with_offsets: bool = False) -> list[Encoding]:
    """What the tokenizers library finds in each text, without special tokens around it; a text that spells one is text.

    A transformers tokenizer, when it is called, asks the same library and makes a dictionary of lists of it, which
    takes about as long again.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    encode_batch = backend.encode_batch if with_offsets else backend.encode_batch_fast
    what = f"tokenizer {tokenizer.name_or_path}"
    try:
        with no_panic(what):
            return encode_batch(texts, add_special_tokens=False)
    except UserError:
        raise
    except Exception as error:  # the library's own bare Exception: a model without a token for unknown characters
        raise UserError(f"{what}: cannot encode a text ({first_line(error)})") from None


def spaced(text: str, follows: bool) -> str:
    """A text with the space before it where it follows another."""
    return f" {text}" if text and follows else text


def token_span(offsets: list[tuple[int, int]], span: tuple[int, int] | None) -> tuple[int, int]:
    """First and one past the last token that touch the characters of `span`; (-1, -1) without one."""
    if span is None:
        return -1, -1
    touching = [k for k, (start, end) in enumerate(offsets) if start < span[1] and end > span[0]]
    return (touching[0], touching[-1] + 1) if touching else (-1, -1)
