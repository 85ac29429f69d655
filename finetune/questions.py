"""Questions and their passages as token ids with character offsets, on disk: tokenised once, read by memory map.

A store is a folder of six arrays and `meta.json`. A passage that several questions share is there once.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from finetune.data import evenly, identity, read
from finetune.tasks import Example, Source, Task
from kozero import distributed
from kozero.data.readers import LeftOut
from kozero.data.store import (
    ENCODE_ROWS,
    META,
    build_once,
    encodings,
    key_of,
    seal,
    token_span,
    tokenizer_hash,
    unknown_id,
    unknown_note,
)
from kozero.errors import require
from kozero.folder import cache_folder
from kozero.metrics import exact_match
from kozero.seal import read_sealed

ARRAYS = ("passage_tokens", "offsets", "passage_ends", "question_tokens", "question_ends", "answers")


class QuestionStore:
    """P passages and Q questions.

    `answers` is (Q, 3) int64: the passage, and the tokens of it that hold the answer, [first, last); -1 where none do.
    `spelled` is the share of the (first) answers that whole tokens match exactly, as KorQuAD compares them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        meta = read_sealed(folder / META)
        self.notes, self.spelled = meta["notes"], meta["spelled"]
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS]
        self.passage_tokens, self.offsets, self.passage_ends = arrays[:3]
        self.question_tokens, self.question_ends, self.answers = arrays[3:]

    @property
    def num_passages(self) -> int:
        """Number of different passages."""
        return len(self.passage_ends) - 1

    @property
    def num_questions(self) -> int:
        """Number of questions."""
        return len(self.question_ends) - 1

    @property
    def passage_lengths(self) -> np.ndarray:
        """(P,) number of tokens of each passage."""
        return np.diff(self.passage_ends)

    @property
    def question_lengths(self) -> np.ndarray:
        """(Q,) number of tokens of each question."""
        return np.diff(self.question_ends)

    def passage(self, number: int) -> np.ndarray:
        """(T,) ids, without special tokens."""
        return self.passage_tokens[self.passage_ends[number] : self.passage_ends[number + 1]]

    def question(self, number: int) -> np.ndarray:
        """(T,) ids, without special tokens."""
        return self.question_tokens[self.question_ends[number] : self.question_ends[number + 1]]

    def offsets_of(self, number: int) -> np.ndarray:
        """(T, 2) characters of the tokens of a passage, [start, end)."""
        return self.offsets[self.passage_ends[number] : self.passage_ends[number + 1]]


@dataclass(frozen=True)
class QuestionSet:
    """Questions to score: `examples[k]` is question `numbers[k]` of the store."""

    examples: list[Example]
    numbers: np.ndarray
    store: QuestionStore


def open_questions(source: Source, task: Task, limit: int, tokenizer: Any, cache_dir: str) -> QuestionStore:
    """The store of a source, at most `limit` questions of it. Built once a machine; the other ranks wait and read."""
    key = key_of("questions", *identity(source, limit), tokenizer_hash(tokenizer))
    left_out = LeftOut()
    write = partial(write_store, lambda: read(source, task, left_out, limit), tokenizer, left_out.lines)
    cache = cache_folder(cache_dir)
    store = QuestionStore(distributed.once_a_machine(lambda: build_once(cache, key, write)))
    for note in store.notes:
        distributed.say(f"{source}: {note}")
    return store


def question_set(source: Source, task: Task, limit: int, tokenizer: Any, cache_dir: str) -> QuestionSet:
    """The questions of a source, or `limit` of them, evenly spaced; the passages are all of them.

    Raises: UserError where two have one id, by which predictions.json and the official script know them.
    """
    store = open_questions(source, task, 0, tokenizer, cache_dir)
    examples = list(read(source, task, LeftOut()))
    (name, times), *_ = Counter(example.id for example in examples).most_common(1)
    require(times == 1, f"{source}: {times} questions have the id {name!r}; give each its own")
    chosen = evenly(len(examples), limit)
    return QuestionSet([examples[k] for k in chosen], np.asarray(chosen), store)


def write_store(
    examples: Callable[[], Iterable[Example]], tokenizer: Any, notes: Callable[[], list[str]], folder: Path
) -> None:
    """Tokenise into `folder`. The texts are held meanwhile, as the reader of a published file does anyway."""
    passages: dict[str, int] = {}
    questions, spans, targets = [], [], []
    for example in examples():
        spans.append((passages.setdefault(example.context, len(passages)), example.answer_span))
        questions.append(example.prompt)
        targets.append(example.targets[0])
    texts = list(passages)
    passage_ids, offsets = encode(texts, tokenizer)
    question_ids, _ = encode(questions, tokenizer)
    answers = [(number, *token_span(offsets[number].tolist(), span)) for number, span in spans]
    arrays = {
        "passage_tokens": np.concatenate(passage_ids),
        "offsets": np.concatenate(offsets),
        "passage_ends": ends(passage_ids),
        "question_tokens": np.concatenate(question_ids),
        "question_ends": ends(question_ids),
        "answers": np.asarray(answers, dtype=np.int64),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    spelled = sum(
        exact_match(text_of(texts[number], offsets[number], first, last), target)
        for (number, first, last), target in zip(answers, targets, strict=True)
    )
    tokens = np.concatenate([arrays["passage_tokens"], arrays["question_tokens"]])
    unknown = unknown_note(int((tokens == unknown_id(tokenizer)).sum()), len(tokens), tokenizer)
    seal(folder, notes=notes() + unknown, spelled=spelled / len(targets))


def encode(texts: list[str], tokenizer: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(T,) ids of each text, and (T, 2) the characters of each token."""
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    ids, offsets = [], []
    for start in range(0, len(texts), ENCODE_ROWS):
        found = encodings(texts[start : start + ENCODE_ROWS], tokenizer, with_offsets=True)
        ids += [np.asarray(one.ids, dtype=dtype) for one in found]
        offsets += [np.asarray(one.offsets, dtype=np.int32).reshape(-1, 2) for one in found]
    return ids, offsets


def ends(rows: Sequence[np.ndarray]) -> np.ndarray:
    """(N + 1,) places where rows begin when they lie side by side, and where the last one ends."""
    return np.cumsum([0, *map(len, rows)])


def text_of(text: str, offsets: np.ndarray, first: int, last: int) -> str:
    """What the tokens [first, last) spell, without the space that a token may begin with."""
    return text[offsets[first, 0] : offsets[last - 1, 1]].strip()
