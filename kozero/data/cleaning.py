"""Korean text as it is found, made fit to train on: normal form, no control characters, no boilerplate; what is too
short, too long or not Korean is left out and counted."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from kozero.data.readers import Located

# Never of a text's meaning: control characters but line feed and tab, zero-width marks, byte order marks, soft hyphens,
# private use areas, what stands for a byte that was no character.
UNWANTED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\uffff\ue000-\uf8ff\ud800-\udfff]"
)
BROKEN = "\ufffd"
SPACES = re.compile(r"[^\S\n]+")
EMPTY_LINES = re.compile(r"\n{2,}")
HANGUL = re.compile("[가-힣]")
LETTER = re.compile(r"[^\W\d_]")
# Lines that belong to a page and not to its text: rights, addresses, buttons. The whole line goes.
BOILERPLATE = re.compile(
    r"^\s*(https?://|www\.)\S+\s*$|^\s*[^\s@]+@[^\s@]+\.\w+\s*$"
    r"|^\s*(더\s*보기|목록|이전\s*글|다음\s*글|공유하기|댓글\s*\d*|추천\s*\d*|조회(\s*수)?\s*\d+)\s*$",
    re.IGNORECASE,
)
# A note of rights by its form; a sentence that speaks of them is text.
SIGN = r"(?:ⓒ|©|\(\s*c\s*\))"
NO_COPIES = r"(?:무단\s*(?:전재|복제|배포|도용|사용)[^.?!]*|재배포\s*)금지(?:합니다|됩니다|함)?\W*$"
RIGHTS = re.compile(
    rf"^\W*(?:(?:사진|글|그림|자료|출처|이미지)\W*)?(?:저작권자?\W*|copyrights?\W*)?{SIGN}(?![ⓐ-ⓩ]|[은는이가을를의]\s)"
    rf"(?:(?!.*[다요까]\W*$)|.*{NO_COPIES})"
    r"|^\W*copyrights?\s+(?:\d{4}|by)\b|^\W*저작권자\s*[:：]|\ball\s+rights\s+reserved\W*$"
    rf"|^\W*(?:(?:본|이|해당|모든)\s[^.?!]{{1,30}}\s|[^.?!]{{1,40}}[,|/]\s*)?{NO_COPIES}",
    re.IGNORECASE,
)
LONGEST_RIGHTS = 80  # characters of such a line
BREAKS = re.compile("[\r\v\f\x1c-\x1e\x85\u2028\u2029]")  # all that ends a line somewhere


@dataclass
class Cleaner:
    """Cleans and filters, and counts what it did in `counts`.

    min_chars, max_chars: of a text after cleaning, 0: no upper limit; min_hangul: share of Hangul syllables among the
    letters.
    """

    min_chars: int
    max_chars: int
    min_hangul: float
    counts: Counter = field(default_factory=Counter)

    def texts(self, found: Iterable[Located]) -> Iterator[tuple[str, str]]:
        """(where, clean text) of what stays of the rows' `text`."""
        for where, row in found:
            self.counts["documents read"] += 1
            text = self.cleaned(row["text"])
            if reason := self.reason_against(text):
                self.counts[f"left out: {reason}"] += 1
            else:
                yield where, text

    def cleaned(self, text: str) -> str:
        """NFC, single spaces, at most one empty line, without unwanted characters and boilerplate lines."""
        text = BREAKS.sub("\n", text.replace("\r\n", "\n"))
        bare, num = UNWANTED.subn(lambda match: BROKEN if match[0] == BROKEN else "", text)
        self.counts["unwanted characters removed"] += num - bare.count(BROKEN)
        self.counts["not in normal form NFC"] += not unicodedata.is_normalized("NFC", bare)
        lines = [SPACES.sub(" ", line).strip() for line in unicodedata.normalize("NFC", bare).split("\n")]
        kept = [line for line in lines if not is_boilerplate(line)]
        self.counts["boilerplate lines removed"] += len(lines) - len(kept)
        return EMPTY_LINES.sub("\n\n", "\n".join(kept)).strip()

    def reason_against(self, text: str) -> str:
        """Why a clean text is left out; empty if it stays."""
        if BROKEN in text:
            return "broken encoding"
        if len(text) < self.min_chars:
            return f"below {self.min_chars} characters"
        if self.max_chars and len(text) > self.max_chars:
            return f"above {self.max_chars} characters"
        letters = len(LETTER.findall(text))
        if len(HANGUL.findall(text)) < self.min_hangul * max(1, letters):
            return f"below {self.min_hangul:.0%} Hangul"
        return ""


def is_boilerplate(line: str) -> bool:
    """Whether a line belongs to a page and not to its text."""
    return bool(BOILERPLATE.search(line) or (len(line) <= LONGEST_RIGHTS and RIGHTS.search(line)))
