"""Which examples share a row: packing and length groups, and the cut of what does not fit."""

from dataclasses import dataclass

import numpy as np

from kozero.data.store import TokenStore

WINDOW = 4096  # examples that are packed together; larger windows waste less and mix less


@dataclass(frozen=True)
class Fit:
    """How the examples of a store fit into rows of `capacity` tokens with `num_pauses` pauses each.

    `cut` is an (N, 2) array: the part of each context that is kept. `length` (N,) counts tokens after the cut, 0 for
    an example that is left out because prompt, pauses and target alone are longer than a row.
    """

    cut: np.ndarray
    length: np.ndarray
    num_cut: int
    num_left_out: int

    @property
    def used(self) -> np.ndarray:
        """Numbers of the examples that are used."""
        return np.flatnonzero(self.length)


def fit(store: TokenStore, capacity: int, num_pauses: int, inside: np.ndarray | None = None) -> Fit:
    """Cut each example to `capacity` tokens: from the context alone, its head is kept, unless a span must survive:
    then the kept part is moved just far enough to hold it, with the span in its middle. It is whole characters where
    `inside` is given, (V,) True for tokens that begin within a character."""
    context, prompt, target = store.lengths.T
    num_pauses = min(num_pauses, capacity + 1)
    room = capacity - prompt - target - num_pauses
    kept = np.clip(room, 0, context)
    span_start, span_end = np.asarray(store.rows[:, 4]), np.asarray(store.rows[:, 5])
    moved = (span_end > kept) & (span_start >= 0)
    middle = (span_start + span_end - kept) // 2
    first = np.where(moved, np.clip(middle, 0, context - kept), 0)
    lost = moved & (span_end - span_start > kept)  # the context cannot hold its answer
    usable = (room >= 0) & ~lost
    last, start = first + kept, np.asarray(store.rows[:, 0])
    if inside is not None:
        bound = np.where(last < context, np.maximum(first, span_end), last)
        last = off_characters(store.tokens, start + last, inside, -1, start + bound) - start
        bound = np.where(span_start < 0, last, span_start) * (first > 0)
        first = off_characters(store.tokens, start + first, inside, 1, start + bound) - start
        kept = last - first
    length = np.where(usable, kept + prompt + num_pauses + target, 0)
    return Fit(np.stack([first, last], axis=1), length, int((usable & (kept < context)).sum()), int((~usable).sum()))


def off_characters(
    tokens: np.ndarray, places: np.ndarray, inside: np.ndarray, step: int, bound: np.ndarray
) -> np.ndarray:
    """(N,) places, those before a token that begins within a character moved by `step` (1 or -1) until they are before
    one that does not, or at `bound`. A character has four tokens at most."""
    for _ in range(3 if len(tokens) else 0):
        within = inside[tokens[np.minimum(places, len(tokens) - 1)]]
        places = places + step * (within & (step * (bound - places) > 0))
    return places


def pieces(places: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a store of texts without context or prompt, cut so that each holds `capacity` tokens at most, and (P,)
    the number of the text that each is a piece of.

    Every token but the first of the store is predicted once: the last token of a piece is the prompt of the next one,
    and the end of a text that of the next text, as documents begin in pre-training.

    Args: places: (N, 8), see TokenStore.
    """
    begin, end = np.maximum(places[:, 0] - 1, 0), places[:, 3]
    number = np.maximum(1, -(-(end - begin - 1) // (capacity - 1)))
    text = np.repeat(np.arange(len(places)), number)
    nth = np.arange(len(text)) - np.repeat(np.cumsum(number) - number, number)
    start = begin[text] + nth * (capacity - 1)
    found = places[text].copy()
    found[:, 0], found[:, 1], found[:, 2] = start, start, start + 1
    found[:, 3] = np.minimum(start + capacity, end[text])
    found[:, 4:6], found[:, 7] = -1, found[:, 6]
    return found, text


def pack(length: np.ndarray, examples: np.ndarray, capacity: int, seed: int) -> list[np.ndarray]:
    """Rows of examples whose lengths add up to `capacity` at most: best fit, longest first, in shuffled windows. Each
    of the numbers `examples` lands in exactly one row; `length` (N,) has the tokens of every example."""
    shuffled = np.random.default_rng([seed, 1]).permutation(examples)
    rows: list[np.ndarray] = []
    for start in range(0, len(shuffled), WINDOW):
        rows.extend(pack_window(length, shuffled[start : start + WINDOW], capacity))
    return rows


def pack_window(length: np.ndarray, window: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Best fit decreasing. `open_rows[r]` holds the rows with r tokens free, and bit r of `open_bits` tells that there
    are any, so that the tightest fit is the lowest bit from an example's length on."""
    order = window[np.argsort(-length[window], kind="stable")]
    rows: list[list[int]] = []
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]
    open_bits = 0
    for example, need in zip(order.tolist(), length[order].tolist(), strict=True):
        if fitting := open_bits >> need:
            free = need + (fitting & -fitting).bit_length() - 1
            row = open_rows[free].pop()
            if not open_rows[free]:
                open_bits ^= 1 << free
        else:
            row, free = len(rows), capacity
            rows.append([])
        rows[row].append(example)
        open_rows[free - need].append(row)
        open_bits |= 1 << (free - need)
    return [np.asarray(row) for row in rows]


def epoch_order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order of rows in an epoch: a pure function of its arguments."""
    return np.random.default_rng([seed, 2, epoch]).permutation(num_rows)


def grouped_order(length: np.ndarray, seed: int, epoch: int, group: int) -> np.ndarray:
    """An order in which each run of `group` rows has about the same length: shuffled windows of 50 groups are sorted
    by length, then the groups change places. A pure function of its arguments."""
    rng = np.random.default_rng([seed, 3, epoch])
    order = rng.permutation(len(length))
    window = 50 * group
    windows = [order[k : k + window] for k in range(0, len(order), window)]
    by_length = np.concatenate([w[np.argsort(-length[w], kind="stable")] for w in windows])
    num_whole = len(by_length) // group
    groups = by_length[: num_whole * group].reshape(num_whole, group)
    return np.concatenate([rng.permutation(groups).ravel(), by_length[num_whole * group :]])
