"""Pause tokens: which token, how many, where they go, which positions carry loss.

Goyal et al., "Think before you speak: training language models with pause tokens", arXiv 2310.02226. Fine-tuning
appends M_ft pauses to the prefix and pays loss on the target alone, whose first token is predicted from the last
pause. Inference appends M_inf pauses and ignores all outputs before the last one's.
"""

from dataclasses import dataclass

import numpy as np

from kozero.config import arg, at_least

IGNORE = -100  # a position that predicts nothing; the ignore_index of torch's cross entropy


@dataclass
class PauseArguments:
    """Pauses of a run."""

    num_pauses: int = arg(0, "pause tokens after the prefix in training (M_ft)")
    num_inference_pauses: int = arg(-1, "pause tokens after the prefix in evaluation and generation (M_inf); -1: M_ft")
    pause_token: str = arg("<unused0>", "token that pauses; a model that lacks it gets <pause> as a new token")

    def __post_init__(self) -> None:
        at_least(0, self, "num_pauses")
        at_least(-1, self, "num_inference_pauses")

    @property
    def at_inference(self) -> int:
        """M_inf."""
        return self.num_pauses if self.num_inference_pauses < 0 else self.num_inference_pauses


@dataclass(frozen=True)
class Pauses:
    """A number of pauses of one token, appended to the prefix."""

    token_id: int
    num: int

    def prompt(self, prefix: np.ndarray) -> np.ndarray:
        """The (P,) prefix with its pauses behind it: what a model is given before it answers. (P + num,)"""
        return np.concatenate([prefix, np.full(self.num, self.token_id, dtype=prefix.dtype)])

    def sequence(self, prefix: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Prefix, pauses and target as one sequence, and what each of its positions must predict.

        Returns: ids (P + num + T,) and next tokens of the same shape: the next id where that is a token of the
        target, IGNORE elsewhere. Without prefix and pauses the first target token is predicted by nothing.
        """
        ids = np.concatenate([self.prompt(prefix), target])
        predicts = np.full(len(ids), IGNORE, dtype=np.int64)
        first = max(len(ids) - len(target), 1)
        predicts[first - 1 : -1] = ids[first:]
        return ids, predicts
