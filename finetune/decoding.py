"""How the next token is chosen: the settings of transformers' generate that are worth a flag."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)

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
    num_beams: int = arg(1, "texts followed at once, 64 at most, the likeliest of which is taken; with --temperature 0")
    seed: int = arg(42, "seed of the choices")

    def __post_init__(self) -> None:
        at_least(1, self, "max_new_tokens")
        at_least(1, self, "num_beams", most=64)
        at_least(0, self, "top_k", "no_repeat_ngram_size")
        check_seed(self.seed)
        require(
            self.temperature == 0 or 0.01 <= self.temperature <= 100,  # beyond, 32 bit leave no probabilities
            f"--temperature {self.temperature}: must be 0, or from 0.01 to 100",
        )
        require(0 < self.top_p <= 1, f"--top_p {self.top_p}: must be above 0 and at most 1")
        penalty = self.repetition_penalty
        require(0.01 <= penalty <= 100, f"--repetition_penalty {penalty}: must be from 0.01 to 100")
        message = f"--num_beams {self.num_beams}: beams look for the most likely text; give --temperature 0 too"
        require(self.num_beams == 1 or self.temperature == 0, message)

    def settings(self) -> dict[str, Any]:
        """The arguments of transformers' generate."""
        names = ["max_new_tokens", "repetition_penalty", "no_repeat_ngram_size", "num_beams"]
        names += ["temperature", "top_k", "top_p"] if self.temperature > 0 else []
        return {name: getattr(self, name) for name in names} | {"do_sample": self.temperature > 0}


# Of each setting: the value that turns it off, and the processor of transformers for a value and a (1, P) prompt. They
# act in this order.
AGAINST_REPETITION = {
    "encoder_repetition_penalty": (1.0, EncoderRepetitionPenaltyLogitsProcessor),
    "repetition_penalty": (1.0, lambda value, _: RepetitionPenaltyLogitsProcessor(value)),
    "no_repeat_ngram_size": (0, lambda value, _: NoRepeatNGramLogitsProcessor(value)),
    "encoder_no_repeat_ngram_size": (0, EncoderNoRepeatNGramLogitsProcessor),
}


class Repetitions(LogitsProcessor):
    """Transformers' processors against repetition, each text by itself and without its pauses and its padding: those
    are no words of it, but a processor would count them (a full stop as a pause, the end of text as padding).

    Args: prompts: (P,) ids of each; length: tokens of a prompt with pauses and padding; settings: those that are on.
    """

    def __init__(self, prompts: Sequence[torch.Tensor], length: int, settings: Mapping[str, Any]) -> None:
        self.prompts, self.length = prompts, length
        kinds = {name: AGAINST_REPETITION[name][1] for name in AGAINST_REPETITION if name in settings}
        self.each = [[kind(settings[name], ids[None]) for name, kind in kinds.items()] for ids in prompts]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """(B, T) ids and (B, V) logits to (B, V); the beams of a prompt follow one another."""
        beams, found = len(input_ids) // len(self.prompts), []
        for row, (written, logits) in enumerate(zip(input_ids[:, self.length :], scores.split(1), strict=True)):
            text = torch.cat([self.prompts[row // beams], written])[None]
            for one in self.each[row // beams]:
                logits = one(text, logits)
            found.append(logits)
        return torch.cat(found)


def ignoring_pauses(
    prompts: Sequence[torch.Tensor], length: int, config: GenerationConfig, generation: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of transformers' generate with its settings against repetition, those of the model's folder too, as
    Repetitions."""
    config = generation.get("generation_config") or config
    said = {name: generation.get(name, getattr(config, name, None)) for name in AGAINST_REPETITION}
    off = {name: value for name, (value, _) in AGAINST_REPETITION.items()}
    on = {name: type(off[name])(value) for name, value in said.items() if value not in (None, off[name])}
    if not on:
        return dict(generation)
    others = generation.get("logits_processor") or []
    return {**generation, **off, "logits_processor": LogitsProcessorList([Repetitions(prompts, length, on), *others])}
