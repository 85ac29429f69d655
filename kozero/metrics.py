"""Scores: classification by label, KorQuAD's exact match and character F1, and ranks of what was searched for. Of
nothing there is no score: {}."""

import math
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

# Marks that the official KorQuAD 1.0 script turns into spaces before it drops ASCII punctuation.
KORQUAD_MARKS = str.maketrans(dict.fromkeys("'\"《》<>〈〉()‘’", " "))
ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)

RECALL_AT = (1, 5, 20, 100)


def normalize_answer(text: str) -> str:
    """An answer as KorQuAD 1.0 compares it: marks to spaces, lower case, no ASCII punctuation, single spaces; and in
    NFC, as its answers are, so that a decomposed answer is no other one."""
    text = unicodedata.normalize("NFC", text).translate(KORQUAD_MARKS).lower()
    return " ".join(text.translate(ASCII_PUNCTUATION).split())


def exact_match(prediction: str, answer: str) -> float:
    """1.0 when both are the same after normalisation, else 0.0."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def character_f1(prediction: str, answer: str) -> float:
    """F1 over the bags of characters (spaces apart) of the normalised texts, in [0, 1]."""
    predicted = Counter(normalize_answer(prediction).replace(" ", ""))
    wanted = Counter(normalize_answer(answer).replace(" ", ""))
    common = (predicted & wanted).total()
    if not common:
        return 0.0
    precision, recall = common / predicted.total(), common / wanted.total()
    return 2 * precision * recall / (precision + recall)


def question_answering(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """KorQuAD 1.0 scores in percent: for each question the best over its answers, then the mean over questions."""
    pairs = list(zip(predictions, answers, strict=True))
    if not (num := len(pairs)):
        return {}
    return {
        "exact_match": 100.0 * sum(max(exact_match(p, a) for a in golds) for p, golds in pairs) / num,
        "f1": 100.0 * sum(max(character_f1(p, a) for a in golds) for p, golds in pairs) / num,
    }


def classification(predictions: Sequence[int], labels: Sequence[int], names: Sequence[str]) -> dict[str, float]:
    """Accuracy, macro F1 over all classes (a class that never occurs nor is predicted counts 0), the accuracy
    of always answering the most frequent label, and the share of rows predicted as each label."""
    if not (num := len(labels)):
        return {}
    hits, predicted, wanted = Counter(), Counter(predictions), Counter(labels)
    for prediction, label in zip(predictions, labels, strict=True):
        hits[label] += prediction == label
    f1 = [2 * hits[k] / max(1, predicted[k] + wanted[k]) for k in range(len(names))]
    scores = {"accuracy": sum(hits.values()) / num, "macro_f1": sum(f1) / len(names)}
    scores["majority"] = max(wanted.values()) / num
    return scores | {f"predicted_{name}": predicted[k] / num for k, name in enumerate(names)}


def perplexity(losses: Sequence[float], num_tokens: Sequence[float], num_characters: Sequence[int]) -> dict[str, float]:
    """Of all texts together: mean loss of a token (nats), its exponential, and nats a character, which may be compared
    between tokenizers that lack none of the characters. Given are the sums of each text over its tokens."""
    if not sum(num_tokens):
        return {}
    loss = sum(losses) / sum(num_tokens)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "nats_per_character": sum(losses) / max(1, sum(num_characters)),
    }


def retrieval(found: np.ndarray, wanted: np.ndarray) -> dict[str, float]:
    """Recall at some depths and the mean reciprocal rank, all in [0, 1].

    Args: found: (Q, K) numbers, the best first, K the largest of RECALL_AT or all there are; wanted: (Q,) the right
    ones. One that is not found has the reciprocal rank 0 (MRR@K, as MS MARCO's).
    """
    if not len(wanted):
        return {}
    hits = found == wanted[:, None]
    first = np.where(hits.any(axis=1), hits.argmax(axis=1) + 1.0, np.inf)
    recall = {f"recall@{depth}": float((first <= depth).mean()) for depth in RECALL_AT}
    return recall | {f"mrr@{RECALL_AT[-1]}": float((1 / first).mean())}


def bootstrap_interval(
    values: Sequence[float] | np.ndarray,
    groups: Sequence[int],
    draws: int = 10_000,
    seed: int = 0,
    weights: Sequence[float] = (),
    statistic: Callable[[np.ndarray], np.ndarray] = np.ravel,
) -> tuple[float, float]:
    """Efron's percentile bootstrap: the 2.5th and 97.5th percentile of a statistic over samples drawn with replacement.
    Groups are drawn, with all their values: those of one group are not independent.

    Args:
        values: (N,) or (N, K), which are drawn together.
        groups: of each value, numbered from 0.
        weights: (N,) of the values in a mean; empty: equal ones.
        statistic: of (D, K) means, (D,); the mean itself where K is 1.
    """
    rng = np.random.default_rng(seed)
    weights = np.asarray(weights if len(weights) else np.ones(len(values)))
    columns = np.reshape(values, (len(values), -1))
    sizes = np.bincount(groups, weights=weights)  # (G,)
    sums = np.stack([np.bincount(groups, weights=weights * column) for column in columns.T], axis=1)  # (G, K)
    even, found = np.full(len(sizes), 1 / len(sizes)), []
    for _ in range(0, draws, 100):  # (100, G) counts at once
        drawn = rng.multinomial(len(sizes), even, size=100)
        found.append(statistic(drawn @ sums / (drawn @ sizes)[:, None]))
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    return float(low), float(high)
