"""A random order of any number of rows that is computed where it is needed and held nowhere."""

from collections.abc import Sequence

import numpy as np

ROUNDS = 10  # of the Feistel network, as in FF1 (NIST SP 800-38G); four shuffle a dozen rows unevenly
MIX = np.array([0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53], dtype=np.uint64)  # multipliers of MurmurHash3's finaliser


def permute(places: np.ndarray, num: int, key: Sequence[int]) -> np.ndarray:
    """Where a random permutation of range(num) sends (N,) places. O(N) time and memory, whatever `num`.

    A balanced Feistel network permutes the next power of four; a value that falls outside range(num) is sent on until
    it falls inside (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). `key` names the
    permutation, e.g. (seed, epoch).
    """
    half = np.uint64(max(1, -(-(num - 1).bit_length() // 2)))
    keys = np.random.default_rng(list(key)).integers(0, 2**63, ROUNDS, dtype=np.uint64)
    values = feistel(places.astype(np.uint64), half, keys)
    while len(outside := np.flatnonzero(values >= num)):
        values[outside] = feistel(values[outside], half, keys)
    return values.astype(np.int64)


def feistel(values: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    """One pass over numbers of 2 * half bits."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (mixed(right + key) & mask)
    return (left << half) | right


def mixed(values: np.ndarray) -> np.ndarray:
    """64 bits of which each depends on all."""
    for factor in MIX:
        values = (values ^ (values >> np.uint64(33))) * factor
    return values ^ (values >> np.uint64(33))
