"""Passages in overlapping windows, each beside its question, as the rows of an encoder (Devlin et al. 2018, the SQuAD
part of BERT's released code).

A row is [CLS] question [SEP] window [SEP]. The next window of a passage begins `stride` tokens after the last, until
one reaches the end, so every token of the passage is in a window.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from finetune.questions import QuestionStore
from kozero.data.batch import Batch, padded
from kozero.data.framing import Framing
from kozero.data.order import Order, OrderedRows

SPECIAL = 3  # [CLS], [SEP], [SEP]


@dataclass(frozen=True)
class WindowSize:
    """How long windows are.

    capacity: tokens of a row at most. stride: tokens between the beginnings of two windows, at most what fits beside
    the longest question. max_query_length: tokens of a question; what is longer is cut.
    """

    capacity: int
    stride: int
    max_query_length: int


@dataclass
class Windows:
    """The windows of some questions, in their order: window w holds the tokens [first, last) of the passage of question
    `question[w]`, all of them (W,)."""

    store: QuestionStore
    size: WindowSize
    numbers: np.ndarray  # (N,) questions of the store
    question: np.ndarray = field(init=False)
    first: np.ndarray = field(init=False)
    last: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        length = self.store.passage_lengths[self.store.answers[self.numbers, 0]]  # (N,)
        room = self.size.capacity - SPECIAL - self.query_lengths(self.numbers)
        beyond = np.maximum(length - room, 0)
        num = 1 + -(-beyond // self.size.stride)
        self.question = np.repeat(self.numbers, num)
        place = np.arange(num.sum()) - np.repeat(np.cumsum(num) - num, num)
        self.first = place * self.size.stride
        self.last = np.minimum(self.first + np.repeat(room, num), np.repeat(length, num))

    def __len__(self) -> int:
        return len(self.question)

    def query_lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens of questions after the cut."""
        return np.minimum(self.store.question_lengths[numbers], self.size.max_query_length)

    @cached_property
    def begins(self) -> np.ndarray:
        """(W,) position in the row where the window begins."""
        return SPECIAL - 1 + self.query_lengths(self.question)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(W,) tokens of the rows."""
        return SPECIAL + self.query_lengths(self.question) + self.last - self.first

    @cached_property
    def targets(self) -> np.ndarray:
        """(W, 2) positions in the row of the answer's first and last token; 0, [CLS], where it is not whole in the
        window."""
        first, last = self.store.answers[self.question, 1], self.store.answers[self.question, 2]
        inside = (first >= self.first) & (last <= self.last)
        places = np.stack([first, last - 1], axis=1) - self.first[:, None] + self.begins[:, None]
        return np.where(inside[:, None], places, 0)

    def row(self, number: int, framing: Framing) -> tuple[np.ndarray, np.ndarray]:
        """(T,) ids and (T,) token types of a window's row."""
        question = int(self.question[number])
        query = self.store.question(question)[: self.size.max_query_length]
        passage = self.store.passage(int(self.store.answers[question, 0]))
        return framing(query, passage[self.first[number] : self.last[number]])

    def inputs(self, numbers: Sequence[int], framing: Framing) -> dict[str, torch.Tensor]:
        """What the encoder reads of some windows: ids, mask and types (B, T), and (B, 2) positions [begin, end) of each
        window in its row."""
        rows = [self.row(number, framing) for number in numbers]
        ids, mask = padded([ids for ids, _ in rows], self.size.capacity)
        types, _ = padded([types for _, types in rows], self.size.capacity)
        begins = self.begins[numbers]
        window = np.stack([begins, begins + self.last[numbers] - self.first[numbers]], axis=1)
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": types, "window": window}
        return {name: torch.from_numpy(value) for name, value in inputs.items()}


@dataclass
class WindowRows(OrderedRows):
    """The rows of windows.

    routes: the module has the two router losses of a Switch transformer, counted over real tokens.
    """

    windows: Windows
    framing: Framing
    order: Order
    routes: bool

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Real tokens of windows."""
        return self.windows.lengths[numbers]

    def batch(self, places: Sequence[int]) -> Batch:
        """One forward pass over the windows at some places."""
        numbers = self.numbers(places)
        inputs = self.windows.inputs(numbers, self.framing)
        inputs["answer"] = torch.from_numpy(self.windows.targets[numbers])
        num_tokens = int(inputs["attention_mask"].sum())
        counts = (len(numbers), *((num_tokens, num_tokens) if self.routes else ()))
        return Batch(inputs, counts, num_tokens)
