"""What a task is: how its published data read, and how an example becomes context, prompt and target."""

import hashlib
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kozero.data.readers import BadRow, LeftOut, Located, read_hub
from kozero.errors import UserError, require
from kozero.json_files import regular


@dataclass(frozen=True)
class Example:
    """One row of a task, as text.

    The model reads `context` (which may be cut when it does not fit) and `prompt` (which may not), then the pauses,
    and has to write one of `targets`: `targets[label]` for a choice, `targets[0]` in training, any of them counts
    as right for a generated answer. `answer_span` is where the answer stands in the context (characters), so that a
    cut in training can keep it. Examples of one `group` never fall on both sides of a validation split.
    """

    id: str
    group: str
    context: str
    prompt: str
    targets: tuple[str, ...]
    label: int = 0
    answer_span: tuple[int, int] | None = None


class Task(ABC):
    """Base of the tasks. A subclass names its files and fields; everything else is shared."""

    name: str
    hub: tuple[str, str | None, str, str]  # data set, config, train split, validation split
    sample_files: tuple[str, str]  # below sample_data/: train, validation
    readers: dict[str, Callable[[Path], Iterator[Located | BadRow]]]  # of the rows of published files, by suffix
    max_seq_length: int  # default row length, tokens
    num_train_epochs: float = 3.0
    max_new_tokens: int = 64  # generated at most when text is asked for
    labels: tuple[str, ...] = ()  # what a choice can be; empty: answers are generated
    whole_texts: bool = False  # texts without a prompt, of any length, scored by their likelihood
    best_score: str  # the score that decides which checkpoint is the best
    lower_is_better: bool = False

    @abstractmethod
    def examples_of_row(self, where: str, row: dict) -> Iterator[Example]:
        """Examples of one row; raises BadRow (see readers) and EmptyText."""

    def choices(self, example: Example) -> list[tuple[str, str]]:
        """(prompt, target) for each label; the most likely target given its prompt wins."""
        return [(example.prompt, label) for label in self.labels]

    def training_pair(self, example: Example) -> tuple[str, str]:
        """The (prompt, target) that is trained on."""
        return self.choices(example)[example.label] if self.labels else (example.prompt, example.targets[0])

    def examples(self, source: "Source", left_out: LeftOut) -> Iterator[Example]:
        """Examples of a source, in its order. Rows without text, and bad rows when they may be skipped, are counted
        in `left_out`; otherwise a bad row ends the run."""
        if source.path:
            suffix = regular(source.path).suffix.lower()
            require(suffix in self.readers, f"{source.path}: this task reads {', '.join(self.readers)}")
        for item in self.readers[suffix](source.path) if source.path else read_hub(*source.hub):
            try:
                if isinstance(item, BadRow):
                    raise item
                for example in self.examples_of_row(*item):
                    if source.takes(example.group):
                        yield example
            except EmptyText as empty:
                left_out.add("empty text", str(empty))
            except BadRow as bad:
                if not source.skip_bad_rows:
                    raise UserError(f"{bad}. Mend it, or leave such rows out with --bad_rows skip") from None
                left_out.add("bad row", str(bad))


class EmptyText(Exception):
    """A row whose text is empty: it is left out and counted, since published sets hold a few."""


def filled(where: str, text: str) -> str:
    """`text`, unless it is empty."""
    if not text:
        raise EmptyText(where)
    return text


@dataclass(frozen=True)
class Source:
    """Where examples come from: a file or a hub split, all of it or one side of a validation split."""

    path: Path | None = None
    hub: tuple[str, str | None, str] | None = None
    skip_bad_rows: bool = False
    side: str = "all"  # all | train | validation
    validation_fraction: float = 0.0

    def __str__(self) -> str:
        name = str(self.path) if self.path else ":".join(part for part in self.hub if part)
        if self.side == "all":
            return name
        share = self.validation_fraction if self.side == "validation" else 1 - self.validation_fraction
        return f"{name} ({self.side} side, {share:.0%} by group)"

    def takes(self, group: str) -> bool:
        """Whether examples of `group` belong to this side. A pure function of the group's name in NFC: no seed, no
        order."""
        if self.side == "all":
            return True
        name = unicodedata.normalize("NFC", group).encode("utf-8", "surrogatepass")
        draw = int.from_bytes(hashlib.sha256(name).digest()[:8], "big") / 2**64
        return (draw < self.validation_fraction) == (self.side == "validation")


def check_label(where: str, label: object, names: tuple[str, ...]) -> int:
    """A label given as its number or its name, as a number; a BadRow when it is neither."""
    text = unicodedata.normalize("NFC", str(label).strip())
    if text in names:
        return names.index(text)
    if isinstance(label, bool) or not text.isdecimal() or len(text) > 9 or int(text) >= len(names):
        known = ", ".join(f"{k} ({name})" for k, name in enumerate(names))
        raise BadRow(f"{where}: label {label!r:.60} is out of range; known: {known}")
    return int(text)
