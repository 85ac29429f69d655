"""What the frozen layers at the bottom of a model make of each text: computed once, read by memory map.

A store is a folder of shards. A shard is a sealed folder (see store.py) with the vectors of some texts one after the
other in `vectors.bin`, so ranks make different ones at the same time, and what an ended run has made is not made again.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from kozero.data.store import META, build_once, seal
from kozero.seal import damage

SHARD = 2**16  # tokens: 100 MB of KoGPT2's vectors in 16 bit, which are in memory while they are made

Vectors = Callable[[np.ndarray], Iterable[tuple[int, torch.Tensor]]]  # of some texts, by number: (T, H)


class HiddenStore:
    """(T, H) vectors of each text.

    Args: folder: named by the hash of all that the vectors depend on; length: (N,) tokens of each text, 0 for one that
        is left out; width: H; dtype: in which they are kept.
    """

    def __init__(self, folder: Path, length: np.ndarray, width: int, dtype: torch.dtype) -> None:
        self.folder, self.length, self.width, self.dtype = folder, length, width, dtype
        self.first = np.cumsum(length) - length  # where each text begins among all
        self.shard = self.first // SHARD
        self.maps: dict[int, torch.Tensor] = {}

    def of(self, number: int) -> torch.Tensor:
        """(T, H) vectors of a text."""
        shard = int(self.shard[number])
        if shard not in self.maps:
            self.maps[shard] = self.open(shard)
        place = self.first[number] - self.begin(shard)
        return self.maps[shard][place : place + self.length[number]]

    def open(self, shard: int) -> torch.Tensor:
        """(T, H) vectors of a shard. torch's map holds no open file, of which a process may have a thousand."""
        num = self.num_tokens(shard) * self.width
        path = self.folder / name(shard) / "vectors.bin"
        return torch.from_file(str(path), shared=False, size=num, dtype=self.dtype).view(-1, self.width)

    def texts(self, shard: int) -> np.ndarray:
        """Numbers of the texts that begin in a shard, those that are left out among them."""
        return np.arange(*np.searchsorted(self.shard, [shard, shard + 1]))

    def begin(self, shard: int) -> int:
        """Where a shard begins among all tokens."""
        return int(self.first[np.searchsorted(self.shard, shard)])

    def num_tokens(self, shard: int) -> int:
        """Tokens of a shard."""
        return int(self.length[self.texts(shard)].sum())

    def shards(self) -> list[int]:
        """All of them."""
        return np.unique(self.shard[self.length > 0]).tolist()

    def missing(self, first: int = 0, every: int = 1) -> list[int]:
        """Those that are not there or do not hold what was written, of every so many shards; reads them."""
        return [shard for shard in self.shards()[first::every] if damage(self.folder / name(shard), META)]

    def num_bytes(self, shards: Iterable[int]) -> int:
        """Of some shards on the disk."""
        return sum(map(self.num_tokens, shards)) * self.width * self.dtype.itemsize

    def make(self, shard: int, vectors: Vectors) -> None:
        """Write a shard unless another process has. See build_once."""
        build_once(self.folder, name(shard), partial(self.write, shard=shard, vectors=vectors))

    def write(self, folder: Path, shard: int, vectors: Vectors) -> None:
        """Fill the folder of a shard."""
        texts, begin = self.texts(shard), self.begin(shard)
        found = torch.empty(self.num_tokens(shard), self.width, dtype=self.dtype)
        for number, rows in vectors(texts[self.length[texts] > 0]):
            place = self.first[number] - begin
            found[place : place + len(rows)] = rows
        found.view(torch.uint8).numpy().tofile(folder / "vectors.bin")
        seal(folder)


def name(shard: int) -> str:
    """The folder of a shard."""
    return f"{shard:05d}"
