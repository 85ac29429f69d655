"""Rows of random text that take as much memory as any of a corpus can, to measure what a batch takes.

A row is as long as the longest, has the second objective, and of a passage and its query both are that long: real
batches are padded to the longest of each.
"""

from dataclasses import replace

import numpy as np

from kozero.data.batches import Text
from pretrain.rows import BlockRows, EncoderRows, Masking, Sample

PLACES = range(2**62)  # every place of the stream has a row of its own


class FullEncoderRows(EncoderRows):
    """The Rows of an encoder: `num` of them, of `length` tokens without special ones."""

    def __init__(self, num: int, length: int, masking: Masking, task: str, router: bool, max_seq_length: int) -> None:
        # A row may have one target more than its share by rounding, and of whole words a few.
        more = (4 if masking.whole_words else 1) / length
        most = replace(masking, share=min(1.0, masking.share + more), whole_words=False)
        super().__init__(PLACES, PLACES, most, task, router, max_seq_length)
        self.num, self.length = num, length

    def __len__(self) -> int:
        return self.num

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        """Tokens without special ones."""
        return np.full(len(numbers), self.length)

    def name_of(self, number: int) -> int:
        """No two rows are alike."""
        return number

    def sample(self, place: int) -> Sample:
        """A row of ordinary tokens."""
        tokens, rng = self.masking.tokens, np.random.default_rng(place)
        ids = rng.choice(np.flatnonzero(~tokens.special), self.length)
        if self.task == "mlm_sop" and self.length > 1:
            half = self.length // 2
            return self.framed([[ids[:half]], [ids[half:]]], rng, swapped=0)
        query = tokens.framing(ids)[0] if self.task == "mlm_ict" else None
        return self.framed([[ids]], rng, query=query)


class FullBlockRows(BlockRows):
    """The Rows of a causal language model: `num` of them, of two texts each, which takes a mask of (T, T)."""

    def __init__(self, num: int, num_tokens: int, size: int) -> None:
        super().__init__(PLACES, PLACES, size)
        self.num, self.vocabulary = num, num_tokens

    def __len__(self) -> int:
        return self.num

    def texts(self, row: int, place: int = 0) -> list[Text]:
        """Halves of a block."""
        ids = np.random.default_rng(row).integers(0, self.vocabulary, self.size)
        return [Text(half, half, row) for half in np.array_split(ids, 2)]
