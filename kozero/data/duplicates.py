"""Near duplicates: texts that share most of their character 5-grams, by MinHash (Broder, "On the resemblance and
containment of documents", 1997; datasketch) and banding (Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets",
section 3.4). Signatures lie on disk: a million texts take 512 MB there and a tenth of that in memory."""

import re
from collections.abc import Iterable
from pathlib import Path
from zlib import crc32

import numpy as np

GRAM = 5  # characters of a shingle
NUM_HASHES = 128
IGNORED = re.compile(r"[\W_]+")  # spaces and marks do not make a text another one
BATCH = 10_000  # texts whose signatures are compared at once


def shingles(text: str) -> set[bytes]:
    """The 5-grams of a text's letters and digits; a shorter text is one as a whole."""
    bare = IGNORED.sub("", text.lower())
    return {bare[k : k + GRAM].encode() for k in range(max(1, len(bare) - GRAM + 1))}


def duplicates(texts: Iterable[str], similarity: float, scratch: Path) -> np.ndarray:
    """(N,) the number of an earlier text that is as good as this one, -1 for a text that is the first of its kind.

    In a band each text is compared with the first of those that share it, so that time grows with N alone; of three
    such texts the last two may be duplicates and escape in this band.

    Args: similarity: Jaccard index of the shingles from which two texts are one, in (0, 1], to the accuracy of 128
        hashes (standard error 0.035 at 0.8); scratch: a folder for the signatures.
    """
    signatures = write_signatures(texts, scratch / "signatures.bin")
    found = np.full(len(signatures), -1, dtype=np.int64)
    rows = rows_of_a_band(similarity)
    for start in range(0, NUM_HASHES - rows + 1, rows):
        band = np.ascontiguousarray(signatures[:, start : start + rows]).view(f"V{4 * rows}").ravel()
        _, first, bucket = np.unique(band, return_index=True, return_inverse=True)
        earlier = first[bucket]
        for begin in range(0, len(found), BATCH):
            part = np.arange(begin, min(begin + BATCH, len(found)))
            part = part[(earlier[part] != part) & (found[part] < 0)]
            same = (signatures[part] == signatures[earlier[part]]).mean(axis=1) >= similarity
            found[part[same]] = earlier[part[same]]
    return found


def rows_of_a_band(similarity: float) -> int:
    """The most rows with which at most one pair in a hundred of just this similarity shares no band: 1 - s^r for each
    of the 128 / r bands."""
    missed = {rows: (1 - similarity**rows) ** (NUM_HASHES // rows) for rows in range(1, NUM_HASHES + 1)}
    return max((rows for rows, share in missed.items() if share <= 0.01), default=1)


def write_signatures(texts: Iterable[str], path: Path) -> np.ndarray:
    """(N, 128) MinHash signatures, 32 bit, in a file."""
    from datasketch import MinHash  # imported here: only a selection needs it

    hashed = MinHash(num_perm=NUM_HASHES, seed=1, hashfunc=crc32)
    with path.open("wb") as file:
        for text in texts:
            hashed.clear()
            hashed.update_batch(shingles(text))
            file.write(hashed.hashvalues.astype(np.uint32).tobytes())
    if not path.stat().st_size:
        return np.zeros((0, NUM_HASHES), dtype=np.uint32)
    return np.memmap(path, dtype=np.uint32, mode="r").reshape(-1, NUM_HASHES)
