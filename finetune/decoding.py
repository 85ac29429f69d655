"""How the next token is chosen: the settings of transformers' generate that are worth a flag."""

from dataclasses import dataclass
from typing import Any

from kozero.config import arg, at_least, check_seed
from kozero.errors import require


@dataclass
class DecodingArguments:
    """How tokens are chosen. (Contrastive search is no part of transformers 5: it runs code from the hub.)"""

    max_new_tokens: int = arg(64, "tokens to write at most; of a long text (--length): in one piece")
    temperature: float = arg(1.0, "above 1 flattens the choice, below 1 sharpens it; 0: always the most likely token")
    top_k: int = arg(30, "choose among so many most likely tokens; 0: all")
    top_p: float = arg(0.95, "choose among the most likely tokens that make up this probability")
    repetition_penalty: float = arg(1.0, "above 1 makes tokens that are already there less likely")
    no_repeat_ngram_size: int = arg(0, "no sequence of so many tokens comes twice; 0: may")
    num_beams: int = arg(1, "texts that are followed at once, the likeliest of which is taken; with --temperature 0")
    seed: int = arg(42, "seed of the choices")

    def __post_init__(self) -> None:
        at_least(1, self, "max_new_tokens", "num_beams")
        at_least(0, self, "top_k", "no_repeat_ngram_size")
        check_seed(self.seed)
        require(
            self.temperature == 0 or 0.01 <= self.temperature <= 100,  # beyond, 32 bit leave no probabilities
            f"--temperature {self.temperature}: must be 0, or from 0.01 to 100",
        )
        require(0 < self.top_p <= 1, f"--top_p {self.top_p}: must be above 0 and at most 1")
        penalty = self.repetition_penalty
        require(0.01 <= penalty <= 100, f"--repetition_penalty {penalty}: must be from 0.01 to 100")
        require(
            self.num_beams == 1 or self.temperature == 0,
            f"--num_beams {self.num_beams}: beams look for the most likely text; give --temperature 0 too",
        )

    def settings(self) -> dict[str, Any]:
        """The arguments of transformers' generate."""
        shared = {
            "max_new_tokens": self.max_new_tokens,
            "repetition_penalty": self.repetition_penalty,
            "no_repeat_ngram_size": self.no_repeat_ngram_size,
            "num_beams": self.num_beams,
        }
        if self.temperature == 0:
            return shared | {"do_sample": False}
        return shared | {"do_sample": True, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
