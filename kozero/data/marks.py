"""Places of a text that pauses may stand at: Korean prefixes, sentences, paragraphs; from characters to tokens."""

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import numpy as np

Span = tuple[int, int]  # characters [start, end)
Marker = Callable[[str], Iterable[Span]]

# Syllables that Korean prefixes consist of or begin with, native and Sino-Korean. Most also begin words without a
# prefix; the morphological placements, which know the difference, are there to be compared with.
PREFIX_SYLLABLES = frozenset(
    "가강개객건겉겹경고골공과구군귀극급기날남내냉노농늦다단당대덧도돌동되뒤드들등떡막말맏맞맨메명몰무미민반밭범복본부불비빗새샛생서선설성소속쇠수숫시신실싯쌍아악알암애약양얼엇여역연열영"
    "옥온올옹왕왜외요우웃원유윗이잔잡장재저적전정제조종주준줄중지진짓짝찰참처청초최총치친탈토통특평폐풋피핫항해햇헛허호홀홑환훗휘한"
)
WORD = re.compile(r"[가-힣]{2,}")
PARAGRAPH = re.compile(r"(?:\A|[\r\n])[^\S\r\n]*+(?=\S)")
VOWEL_OR_FINAL = re.compile("[\u1161-\u1175\u11a8-\u11c2]")  # jamo that go on with a syllable


def prefixes_by_syllable(text: str) -> Iterator[Span]:
    """The first syllable of every Hangul word of two or more that begins with one of PREFIX_SYLLABLES."""
    for word in WORD.finditer(text):
        if word[0][0] in PREFIX_SYLLABLES:
            yield word.start(), word.start() + 1


def prefixes_by_morpheme(text: str) -> Iterator[Span]:
    """What kiwipiepy tags as a prefix (XPN), as in 헛/XPN 수고."""
    for token in kiwi().tokenize(text):
        if token.tag == "XPN":
            yield token.start, token.end


def sentences(text: str) -> Iterator[Span]:
    """Sentences as kiwipiepy finds them."""
    for sentence in kiwi().split_into_sents(text):
        yield sentence.start, sentence.end


def paragraphs(text: str) -> Iterator[Span]:
    """The first character of the text and of every line that is not empty."""
    for match in PARAGRAPH.finditer(text):
        yield match.end(), match.end() + 1


@lru_cache(1)
def kiwi() -> Any:
    """One analyser a process: it loads a model of 100 MB."""
    from kiwipiepy import Kiwi  # imported here: only two placements need it

    return Kiwi(num_workers=1)


BEFORE, AFTER = 0, 1
MARKERS: dict[str, tuple[Marker, int]] = {
    "before_prefix": (prefixes_by_syllable, BEFORE),
    "after_prefix": (prefixes_by_syllable, AFTER),
    "before_xpn": (prefixes_by_morpheme, BEFORE),
    "after_xpn": (prefixes_by_morpheme, AFTER),
    "sentence": (sentences, BEFORE),
    "paragraph": (paragraphs, BEFORE),
}


def in_nfc(text: str) -> tuple[str, Sequence[int]]:
    """A text in NFC, and the places in `text` at which each of its characters begins and the last one ends."""
    if unicodedata.is_normalized("NFC", text):
        return text, range(len(text) + 1)
    joins = (unicodedata.category(c).startswith("M") or VOWEL_OR_FINAL.match(c) for c in text)
    starts = [k for k, joined in enumerate(joins) if not k or not joined]
    parts = [unicodedata.normalize("NFC", text[a:b]) for a, b in pairwise([*starts, len(text)])]
    return "".join(parts), [*(k for k, part in zip(starts, parts, strict=True) for _ in part), len(text)]


def token_marks(placement: str, text: str, offsets: np.ndarray) -> np.ndarray:
    """(K,) places in the tokens of a text, ascending: before the token that holds the first character of a span, or
    behind the one that holds its last. No token is split, so the text keeps its tokens. Spans are searched in NFC, for
    decomposed Hangul has no syllables; the text itself stays as it is.

    Args: offsets: (T, 2) characters [start, end) of each token; tokens without characters hold none.
    """
    marker, side = MARKERS[placement]
    ends = np.maximum.accumulate(offsets[:, 1]) if len(offsets) else np.zeros(0, dtype=np.int64)
    composed, begins = in_nfc(text)
    spans = ((begins[start], max(begins[end] - 1, begins[end - 1])) for start, end in marker(composed))
    places = [int(np.searchsorted(ends, span[side], side="right")) for span in spans]
    return np.unique(np.asarray(places, dtype=np.int64) + side)


def marker_version(placement: str) -> tuple[str, ...]:
    """What the marks of a placement depend on beside the text; empty where it has none."""
    if placement not in MARKERS:
        return ()
    by_kiwi = MARKERS[placement][0] in (sentences, prefixes_by_morpheme)
    return (placement, version("kiwipiepy")) if by_kiwi else (placement,)
