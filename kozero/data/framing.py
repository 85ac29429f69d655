"""The special tokens of an encoder around the segments of a row."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from kozero.errors import require


@dataclass(frozen=True)
class Framing:
    """[CLS] A [SEP] (B [SEP]), by the ids of the two."""

    cls: int
    sep: int

    @classmethod
    def of(cls, tokenizer: Any) -> "Framing":
        """Ids by role. A tokenizer without [CLS] and [SEP] lends its first text token and its end of text.

        Raises: UserError when it has neither.
        """
        first = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.bos_token_id
        last = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
        lacks = "neither [CLS] and [SEP] nor <s> and </s>, which frame a row"
        advice = "give another tokenizer (scripts/train_tokenizer.py makes one)"
        message = f"--tokenizer_name_or_path {tokenizer.name_or_path}: {lacks}; {advice}"
        require(first is not None and last is not None, message)
        return cls(first, last)

    def __call__(self, *segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(T,) ids of the row, and (T,) the number of each position's segment; [CLS] is of the first."""
        ids = [np.array([self.cls]), *(part for segment in segments for part in (segment, np.array([self.sep])))]
        types = [np.full(len(segment) + 1, k) for k, segment in enumerate(segments)]
        return np.concatenate(ids).astype(np.int64), np.concatenate([[0], *types])
