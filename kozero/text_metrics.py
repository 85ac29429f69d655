"""How varied written texts are. Words are what spaces part."""

import warnings
from collections.abc import Sequence

DISTINCT = (1, 2, 3)
MOST_TEXTS = 200
REPEATED = 4  # words of a sequence that should not come twice in a text


def ngrams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """All sequences of n words."""
    return [tuple(words[k : k + n]) for k in range(len(words) - n + 1)]


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams of all texts among all their n-grams (Li et al., NAACL 2016)."""
    found = [gram for text in texts for gram in ngrams(text.split(), n)]
    return len(set(found)) / max(1, len(found))


def repetition(texts: Sequence[str], n: int = REPEATED) -> float:
    """The mean over texts of the share of n-grams that the text has had before (seq-rep-n of Welleck et al., ICLR
    2020). A text without an n-gram repeats none."""
    grams = [ngrams(text.split(), n) for text in texts]
    return sum(1 - len(set(found)) / len(found) for found in grams if found) / max(1, len(grams))


def self_bleu(texts: Sequence[str]) -> float:
    """The mean BLEU, 0 to 100, of each text with all others as its references (Zhu et al., SIGIR 2018): high where
    texts are alike. By sacrebleu over characters, smoothed; of many texts among `MOST_TEXTS` of them, evenly spaced,
    since time grows with the square: 200 texts of 60 characters take 4 s."""
    from sacrebleu.metrics import BLEU  # imported here: few need it

    texts = [texts[k * len(texts) // MOST_TEXTS] for k in range(MOST_TEXTS)] if len(texts) > MOST_TEXTS else texts
    bleu = BLEU(tokenize="char", effective_order=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scores = [
            bleu.sentence_score(text, [other for k, other in enumerate(texts) if k != number]).score
            for number, text in enumerate(texts)
        ]
    return sum(scores) / len(scores)


def variety(texts: Sequence[str]) -> dict[str, float]:
    """All of them by name; of one text without self-BLEU."""
    found = {f"distinct_{n}": distinct(texts, n) for n in DISTINCT}
    found[f"repetition_{REPEATED}"] = repetition(texts)
    return found | ({"self_bleu": self_bleu(texts)} if len(texts) > 1 else {})
