"""Long texts from a model that loses the thread: short pieces, each going on from the last sentences of what is there.

The recipe of a team that wrote essays with ko-gpt-trinity: a piece is cut at its last whole sentence, and the next one
reads whole sentences alone."""

import re
from collections.abc import Sequence
from typing import Any

from finetune.paused import PausedGenerator

SENTENCE_END = re.compile(r"[.!?…。]+[\"'”’」』)\]]*(?=\s|$)")


def write_long(
    generator: PausedGenerator, prompts: Sequence[str], length: int, tail: int, batch_size: int, **generation: Any
) -> list[str]:
    """What follows each prompt: about `length` tokens, or fewer where the model ends the text.

    Args: tail: tokens of the text that the next piece reads at most; generation: see PausedGenerator.generate;
        max_new_tokens is that of a piece.
    """
    texts, missing = ["" for _ in prompts], dict.fromkeys(range(len(prompts)), length)
    while missing:
        asked = [last_sentences(generator, f"{prompts[k]} {texts[k]}".strip(), tail) for k in missing]
        pieces = generator.continue_texts(asked, batch_size, **generation)
        for k, (piece, has_ended) in zip(list(missing), pieces, strict=True):
            whole = piece if has_ended else whole_sentences(piece)
            texts[k] = f"{texts[k]} {whole}".strip()
            missing[k] -= len(generator.ids(whole))
            if has_ended or not whole or missing[k] <= 0:
                del missing[k]
    return texts


def whole_sentences(text: str) -> str:
    """A text up to the end of its last whole sentence; all of it when it has none."""
    ends = [found.end() for found in SENTENCE_END.finditer(text)]
    return text[: ends[-1]].strip() if ends else text.strip()


def last_sentences(generator: PausedGenerator, text: str, tail: int) -> str:
    """The last sentences of a text that fit into `tail` tokens; of a longer sentence the last tokens."""
    starts = [0, *(found.end() for found in SENTENCE_END.finditer(text))]
    for start in starts:
        part = text[start:].strip()
        if part and len(generator.ids(part)) <= tail:
            return part
    last = text[starts[-1] :].strip() or text[starts[-2] :].strip()
    return generator.tokenizer.decode(generator.ids(last)[-tail:]).strip()
