"""Pause tokens: which token, how many, where they go, which positions carry loss.

Goyal et al., "Think before you speak: training language models with pause tokens", arXiv 2310.02226. Fine-tuning
appends M_ft pauses to the prefix and pays loss on the target alone, whose first token is predicted from the last
pause. Inference appends M_inf pauses and ignores all outputs before the last one's. Pre-training inserts pauses at
random places; a position whose next token is a pause carries no loss.

All placements obey one law: what a token had to predict is predicted by the last position before the next real token,
and the sequence without its pauses is the sequence that was there before.
"""

import codecs
import re
import unicodedata
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from kozero.config import arg, at_least
from kozero.errors import require

IGNORE = -100  # a position that predicts nothing; the ignore_index of torch's cross entropy
BY_TEXT = ("before_prefix", "after_prefix", "before_xpn", "after_xpn", "sentence", "paragraph")  # see data/marks.py
PLACEMENTS = ("append", "prepend", "filler", "random", *BY_TEXT, "least_confident")
SCHEDULES = ("fixed", "sampled", "curriculum")
FILLER = "."


WHERE = (
    "where they go: behind what the model reads, before it, behind it as full stops (filler), at random places, before "
    "or after Korean prefixes (by their syllables, or xpn: as kiwipiepy finds them), at the beginnings of sentences "
    "(kiwipiepy) or paragraphs, or before the tokens that the model expects least"
)


@dataclass
class InferencePauseArguments:
    """Pauses of a model that is used."""

    num_inference_pauses: int = arg(-1, "pause tokens of a text in evaluation and generation (M_inf); -1: as trained")
    pause_token: str = arg("<unused0>", "token that pauses; a model that lacks it gets <pause> as a new token")
    pause_placement: str | None = arg(None, f"{WHERE}; default: as trained", choices=list(PLACEMENTS))

    def __post_init__(self) -> None:
        at_least(-1, self, "num_inference_pauses")


@dataclass
class PauseArguments(InferencePauseArguments):
    """Pauses of a run."""

    num_pauses: int = arg(0, "pause tokens of a text in training (M_ft)")
    pause_placement: str = arg("append", WHERE, choices=list(PLACEMENTS))
    pause_schedule: str = arg(
        "fixed",
        "how many in training: always all, from 0 to all by chance in each step, or growing from 0 to all over the "
        "first half of the run",
        choices=list(SCHEDULES),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, self, "num_pauses")
        message = f"--pause_schedule {self.pause_schedule}: nothing to vary; set --num_pauses"
        require(self.pause_schedule == "fixed" or self.num_pauses > 0, message)

    @property
    def at_inference(self) -> int:
        """M_inf."""
        return self.num_pauses if self.num_inference_pauses < 0 else self.num_inference_pauses

    @property
    def needs_token(self) -> bool:
        """Whether training meets the pause token."""
        return self.num_pauses > 0 and self.pause_placement != "filler"


@dataclass(frozen=True)
class Pauses:
    """A number of pauses of one token, put into the prefix of a text.

    Args:
        token_id: the token that pauses.
        num: pauses of a text.
        placement: one of PLACEMENTS. Those of BY_TEXT and least_confident are told the places that count.
        inside: (V,) True for tokens that begin within a character; no pause stands before one.
        seed: of random places.
    """

    token_id: int
    num: int
    placement: str = "append"
    inside: np.ndarray | None = None
    seed: int = 0

    def gaps(self, prefix: np.ndarray, marks: np.ndarray | None = None, epoch: int = 0) -> np.ndarray:
        """(P + 1,) pauses before each token of the (P,) prefix, and behind it.

        Args:
            marks: places in the prefix: all that count in their order, or for least_confident the least confident
                first. Without any, pauses are appended.
            epoch: random places are drawn anew in each.
        """
        length = len(prefix)
        if self.appends(marks):
            return counted(np.full(self.num, length), length)
        if self.placement == "prepend":
            return counted(np.zeros(self.num, dtype=np.int64), length)
        if self.placement == "random":
            # Drawn by content: a prefix has the same places whatever the batch, the rank or the number of its row.
            rng = np.random.default_rng([self.seed, 6, epoch, zlib.crc32(prefix.astype(np.int64).tobytes())])
            return self.off_characters(prefix, random_gaps(length, self.num, rng))
        ranked = self.placement == "least_confident"
        return self.off_characters(prefix, counted(spread(marks, self.num, ranked), length))

    def appends(self, marks: np.ndarray | None) -> bool:
        """Whether all pauses stand behind the prefix."""
        if not self.num or self.placement in ("append", "filler"):
            return True
        return self.placement not in ("prepend", "random") and (marks is None or not len(marks))

    def off_characters(self, ids: np.ndarray, gaps: np.ndarray) -> np.ndarray:
        """Pauses before tokens that begin within a character go before that character."""
        if self.inside is None:
            return gaps
        begins = np.append(~self.inside[ids], True)
        place = np.maximum.accumulate(np.where(begins, np.arange(len(gaps)), 0))
        return np.bincount(place, weights=gaps, minlength=len(gaps)).astype(np.int64)

    def prompt(self, prefix: np.ndarray, marks: np.ndarray | None = None) -> np.ndarray:
        """The (P,) prefix with its pauses: what a model is given before it answers. (P + num,)"""
        nothing = np.full(len(prefix), IGNORE)
        return insert(prefix, nothing, self.gaps(prefix, marks), self.token_id)[0]

    def without(self, prompt: np.ndarray) -> np.ndarray:
        """(P,) prefix of a (P + num,) prompt. Full stops that pause stand behind it; those in it are its own."""
        if self.placement == "filler":
            return prompt[: len(prompt) - self.num]
        return prompt[prompt != self.token_id] if self.num else prompt

    def sequence(
        self, prefix: np.ndarray, target: np.ndarray, marks: np.ndarray | None = None, epoch: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Prefix with pauses and target as one sequence, and what each of its positions must predict.

        Returns: ids (P + num + T,) and next tokens of the same shape: the next id where that is a token of the
        target, IGNORE elsewhere. Without prefix and pauses the first target token is predicted by nothing.
        """
        if self.appends(marks):  # as inserting them does, in a third of the time
            return followed(np.concatenate([prefix, np.full(self.num, self.token_id)]), target)
        ids, predicts = followed(prefix, target)
        gaps = np.concatenate([self.gaps(prefix, marks, epoch), np.zeros(len(target), dtype=np.int64)])
        return insert(ids, predicts, gaps, self.token_id, IGNORE if len(prefix) else int(target[0]))


Schedule = Callable[[int], int]  # rows consumed before a step to the number of pauses of its texts


def schedule(name: str, num: int, seed: int, total_rows: int) -> Schedule:
    """One of SCHEDULES; a pure function of the rows consumed, so that a resumed run goes on with the same numbers. The
    whole run has `total_rows`."""
    if name == "sampled":
        return lambda consumed: int(np.random.default_rng([seed, 7, consumed]).integers(0, num + 1))
    if name == "curriculum":
        return lambda consumed: min(num, (num + 1) * 2 * consumed // max(1, total_rows))
    return lambda consumed: num


def followed(prefix: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(P + T,) ids of (P,) and (T,) tokens, and the next id where that is one of the target, IGNORE elsewhere."""
    ids = np.concatenate([prefix, target])
    predicts = np.full(len(ids), IGNORE, dtype=np.int64)
    first = max(len(prefix), 1)
    predicts[first - 1 : -1] = ids[first:]
    return ids, predicts


def insert(
    ids: np.ndarray, predicts: np.ndarray, gaps: np.ndarray, token_id: int, first: int = IGNORE
) -> tuple[np.ndarray, np.ndarray]:
    """Put pauses into a sequence. What a token predicts moves to the last pause behind it.

    Args:
        ids, predicts: (N,) tokens, and what each must predict or IGNORE.
        gaps: (N + 1,) pauses before each token, and at the end.
        first: what a pause before the first token must predict: that token, or IGNORE.

    Returns: ids and predicts, (N + gaps.sum(),) each.
    """
    places = np.arange(len(ids)) + np.cumsum(gaps)[:-1]  # where each token goes
    out = np.full(len(ids) + int(gaps.sum()), token_id, dtype=np.int64)
    out[places] = ids
    moved = np.full(len(out), IGNORE, dtype=np.int64)
    moved[np.append(places[1:], len(out))[: len(ids)] - 1] = predicts
    if gaps[0] and first != IGNORE:
        moved[gaps[0] - 1] = first
    return out, moved


def random_gaps(length: int, num: int, rng: np.random.Generator) -> np.ndarray:
    """(length + 1,) pauses before each token and at the end, when `num` of length + num places are pauses, all choices
    being equally likely (section 3.1 of the paper)."""
    places = np.sort(rng.choice(length + num, num, replace=False))
    return counted(places - np.arange(num), length)


def counted(gaps: np.ndarray, length: int) -> np.ndarray:
    """(length + 1,) how often each place occurs."""
    return np.bincount(gaps, minlength=length + 1)


def spread(marks: np.ndarray, num: int, ranked: bool) -> np.ndarray:
    """`num` places out of some: evenly spaced ones, or the first ones where they are `ranked`; where there are fewer,
    each takes its share and the first ones take what is left."""
    if num < len(marks):
        return marks[:num] if ranked else marks[np.arange(num) * len(marks) // num]
    return np.repeat(marks, num // len(marks) + (np.arange(len(marks)) < num % len(marks)))


def begins_inside(tokenizer: Any) -> np.ndarray:
    """(V,) True for tokens that begin within a character: bytes that go on with one (byte-level BPE, byte fallback), a
    Korean vowel or final of a syllable that is spelt in parts, or another combining mark."""
    return np.array([goes_on(spelt) for spelt in token_bytes(tokenizer, list(range(len(tokenizer))))])


def goes_on(spelt: bytes) -> bool:
    """Whether a token begins within a character."""
    text = spelt.decode(errors="replace")[:1]
    return b"\x80" <= spelt[:1] < b"\xc0" or "\u1160" <= text <= "\u11ff" or bool(text and unicodedata.combining(text))


def begun(tokenizer: Any, ids: list[int]) -> int:
    """How many bytes at the end only begin a character of UTF-8, which has four at most."""
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    utf8.decode(b"".join(token_bytes(tokenizer, ids[-4:])))
    return len(utf8.getstate()[0])


def token_bytes(tokenizer: Any, ids: list[int]) -> list[bytes]:
    """UTF-8 that each token stands for. Of marks for spaces and parts of words these are the marks'."""
    byte_level = "ByteLevel" in f"{tokenizer.backend_tokenizer.decoder} {tokenizer.backend_tokenizer.pre_tokenizer}"
    to_byte = byte_characters() if byte_level else {}
    prefix = getattr(tokenizer.backend_tokenizer.model, "continuing_subword_prefix", None) or ""
    return [bytes_of((name or "").removeprefix(prefix), to_byte) for name in tokenizer.convert_ids_to_tokens(ids)]


def bytes_of(name: str, to_byte: dict[str, int]) -> bytes:
    """UTF-8 of the name of a token, which may spell bytes."""
    if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", name):
        return bytes.fromhex(byte[1])
    spelt = [to_byte.get(char) for char in name]
    return name.encode() if None in spelt else bytes(spelt)


@cache
def byte_characters() -> dict[str, int]:
    """The byte that each printable character spells in byte-level BPE (Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + k): byte for k, byte in enumerate(others)}


def filler_id(tokenizer: Any) -> int:
    """The token of a full stop."""
    found = tokenizer.get_vocab().get(FILLER)
    if found is None:
        found = tokenizer.encode(FILLER, add_special_tokens=False)[-1]
    require(found != tokenizer.unk_token_id, f"--pause_placement filler: the tokenizer has no {FILLER!r}")
    return found
