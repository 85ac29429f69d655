"""Where the texts of packed rows lie: each attends to itself alone, without a mask of (B, T, T)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Packing:
    """The texts of B rows of T tokens laid out anew, in groups of (n, L) texts of about the same length.

    `places` (S,) are the positions among all B * T that the groups hold one after the other, `shapes` their (n, L),
    `back` (B * T,) the place of each position in the groups, `blanks` the places behind the end of a text, which repeat
    its last position. Without groups every row is one text.
    """

    shapes: tuple[tuple[int, int], ...] = ()
    places: torch.Tensor | None = None
    back: torch.Tensor | None = None
    blanks: torch.Tensor | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> "Packing":
        """On a device."""
        return self.moved(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Packing":
        """In memory that a GPU copies from by itself."""
        return self.moved(torch.Tensor.pin_memory)

    def moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "Packing":
        """Each tensor elsewhere."""
        return Packing(self.shapes, *map(move, (self.places, self.back, self.blanks))) if self.shapes else self


def packing_of(positions: np.ndarray) -> Packing:
    """Of (B, T) positions that restart at every text. A group holds lengths up to a power of 2 from half of it on, so
    that less than half of its places are blank."""
    starts = np.flatnonzero(positions.ravel() == 0)
    if len(starts) == len(positions):
        return Packing()
    lengths = np.diff(np.append(starts, positions.size))
    groups = np.ceil(np.log2(lengths)).astype(int)
    shapes, places, filled = [], [], []
    for group in np.unique(groups):
        first, length = starts[groups == group, None], lengths[groups == group, None]
        offsets = np.arange(length.max())
        shapes.append((len(first), len(offsets)))
        places.append((first + np.minimum(offsets, length - 1)).ravel())
        filled.append((offsets < length).ravel())
    place, full = np.concatenate(places), np.concatenate(filled)
    back = np.empty(positions.size, dtype=np.int64)
    back[place[full]] = np.flatnonzero(full)
    return Packing(tuple(shapes), *map(torch.from_numpy, (place, back, np.flatnonzero(~full))))
