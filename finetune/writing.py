"""Long texts from a model that loses the thread: short pieces, each going on from the last sentences of what is there.

The recipe of a team that wrote essays with ko-gpt-trinity: a piece is cut at its last whole sentence, and the next one
reads whole sentences alone."""

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from finetune.paused import Continuation, PausedGenerator

SENTENCE_END = re.compile(r"[.!?…。]+[\"'”’」』)\]]*(?=\s|$)")


@dataclass
class Written:
    """A prompt, what follows it, and the pieces that it was written in."""

    prompt: str
    text: str = ""
    pieces: list[Continuation] = field(default_factory=list)

    @property
    def whole(self) -> str:
        """Prompt and text as one."""
        return f"{self.prompt}{self.gap}{self.text}".strip()

    @property
    def gap(self) -> str:
        """What stands between them."""
        return self.pieces[0].gap if self.pieces else ""

    def add(self, piece: Continuation, text: str) -> None:
        """Go on with the part of a piece that is kept."""
        gap = piece.gap if self.pieces else ""
        self.pieces.append(piece)
        self.text = f"{self.text}{gap}{text.strip()}" if text.strip() else self.text


def write_long(
    generator: PausedGenerator, prompts: Sequence[str], length: int, tail: int, batch_size: int, **generation: Any
) -> list[Written]:
    """What follows each prompt: about `length` tokens, or fewer where the model ends the text.

    Args: tail: tokens of the text that the next piece reads at most; generation: see PausedGenerator.generate;
        max_new_tokens is that of a piece.
    """
    found, missing = [Written(prompt) for prompt in prompts], dict.fromkeys(range(len(prompts)), length)
    longest = generation.pop("max_new_tokens")
    while missing:
        asked = [last_sentences(generator, found[k].whole, tail) for k in missing]
        most = min(longest, max(missing.values()))
        pieces = generator.continue_texts(asked, batch_size, max_new_tokens=most, **generation)
        for k, piece in zip(list(missing), pieces, strict=True):
            kept = piece.text if piece.has_ended else whole_sentences(piece.text)
            found[k].add(piece, kept)
            missing[k] -= len(generator.ids(kept))
            if piece.has_ended or not kept.strip() or missing[k] <= 0:
                del missing[k]
    return found


def whole_sentences(text: str) -> str:
    """A text up to the end of its last whole sentence; all of it when it has none."""
    ends = [found.end() for found in SENTENCE_END.finditer(text)]
    return text[: ends[-1]].strip() if ends else text.strip()


def last_sentences(generator: PausedGenerator, text: str, tail: int) -> str:
    """The last sentences of a text that fit into `tail` tokens; of a longer sentence the last whole characters, one of
    them also where it takes more tokens."""
    starts = [0, *(found.end() for found in SENTENCE_END.finditer(text))]
    sentences = [part for start in starts[-tail - 1 :] if (part := text[start:].strip())]  # each takes a token at least
    first = bisect_left(sentences, -tail, key=lambda part: -len(generator.ids(part)))
    if first < len(sentences):
        return sentences[first]
    ids, offsets = generator.encode(sentences[-1])
    begins = np.unique(offsets[~generator.pauses.inside[ids], 0])[-tail:]
    parts = [part for start in begins if (part := sentences[-1][start:].strip())]
    return next((part for part in parts if len(generator.ids(part)) <= tail), parts[-1])
