"""A language model with its pauses, for anyone who uses transformers:

generator = PausedGenerator.from_pretrained("runs/run/model")
generator.generate(["전제: 비가 온다. 가설: 날이 맑다. 관계:"], max_new_tokens=8)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from finetune.scoring import spelled, write_batch
from finetune.setup import inference_placement
from kozero.data.marks import MARKERS, token_marks
from kozero.errors import require
from kozero.pause import PLACEMENTS, Pauses, begins_inside, filler_id
from models.language_model import WEIGHTS, check_gpt2, load_tokenizer, pause_settings_of
from models.loading import load_any_config, load_checked
from models.tokenizer import keep_out_of_text


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a text.

    gap: what stands between the two: nothing where it goes on within a word. prompt: (T,) ids that the model read;
    ids: those that it wrote, with the end of the text if it ended it.
    """

    text: str
    gap: str
    prompt: np.ndarray
    ids: list[int]
    has_ended: bool


@dataclass(frozen=True)
class PausedGenerator:
    """`generate` of a causal language model, with pauses in every prompt. What the model would say at a pause is
    ignored, but for the last one, and no pause is ever written (the exported generation_config suppresses it)."""

    lm: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    pauses: Pauses

    @classmethod
    def from_pretrained(
        cls, folder: str, num_pauses: int | None = None, placement: str | None = None, device: str | None = None
    ) -> "PausedGenerator":
        """A folder as training leaves it, or any causal model.

        Args: num_pauses, placement: those that config.json names by default; device: "cuda" where there is one.

        Raises: UserError for a folder without a model, an unknown placement, pauses of a model without a pause token.
        """
        config = load_any_config(folder := str(folder), "model")
        if config.model_type == "gpt2":
            check_gpt2(config, f"model {folder}: config.json")
        settings = pause_settings_of(config, folder)
        lm = load_checked(AutoModelForCausalLM, config, folder, "model", is_ours=WEIGHTS.match).eval()
        placement = placement or inference_placement(settings)
        num = settings.get("num_inference_pauses", 0) if num_pauses is None else num_pauses
        require(placement in PLACEMENTS, f"placement {placement}: one of {', '.join(PLACEMENTS)}")
        tokenizer = load_tokenizer(folder)
        token_id = filler_id(tokenizer) if placement == "filler" else tokenizer.get_vocab().get(settings.get("token"))
        require(type(num) is int and num >= 0, f"num_pauses {num!r}: must be a whole number, 0 or more")
        require(num == 0 or token_id is not None, f"{folder}: its config.json names no pause; num_pauses must be 0")
        if placement != "filler" and token_id is not None:
            keep_out_of_text(tokenizer, [token_id])
        lm = lm.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(lm, tokenizer, Pauses(token_id or 0, num, placement, begins_inside(tokenizer)))

    def prompt(self, text: str, most: int | None = None) -> np.ndarray:
        """(T,) ids of a text with its pauses. Of one that is too long for `most` tokens the last whole characters stay.

        Raises: UserError when not even a character stays beside the pauses.
        """
        ids, offsets = self.encode(text)
        cut = max(0, len(ids) + self.pauses.num - most) if most is not None else 0
        cut += int(np.argmin(self.pauses.inside[np.append(ids[cut:], ids[:1])])) if cut else 0
        told = f"num_pauses {self.pauses.num}: leave no room for a prompt in {most} tokens; choose fewer"
        require(cut == 0 or cut < len(ids), told)
        return self.pauses.prompt(ids[cut:], self.marks(text, ids[cut:], offsets[cut:]))

    def marks(self, text: str, ids: np.ndarray, offsets: np.ndarray) -> np.ndarray | None:
        """Places that the placement asks for."""
        if self.pauses.placement in MARKERS:
            return token_marks(self.pauses.placement, text, offsets)
        if self.pauses.placement == "least_confident" and 1 < len(ids) <= self.lm.config.n_positions:
            with torch.no_grad():
                logits = self.lm(torch.from_numpy(ids[None]).to(self.lm.device)).logits[0, :-1].float()
            following = torch.from_numpy(ids[1:]).to(logits.device)
            losses = torch.nn.functional.cross_entropy(logits, following, reduction="none")
            return np.argsort(-losses.cpu().numpy(), kind="stable") + 1
        return None

    def generate(self, texts: Sequence[str], batch_size: int = 8, cut: bool = False, **generation: Any) -> list[str]:
        """What the model writes after each text, without special tokens.

        Args: batch_size: texts of any lengths that are padded on the left together; cut: of a text that is too long for
            the model the last tokens stay; generation: the arguments of transformers' generate, e.g. max_new_tokens,
            do_sample.

        Raises: UserError for a text that does not fit, unless it may be cut.
        """
        return [found.text for found in self.continue_texts(texts, batch_size, cut, **generation)]

    def continue_texts(
        self, texts: Sequence[str], batch_size: int = 8, cut: bool = False, **generation: Any
    ) -> list["Continuation"]:
        """What the model writes after each text; see `generate`."""
        require(not isinstance(texts, str), "texts: give a list of texts, not one text")
        room = self.lm.config.n_positions - generation.get("max_new_tokens", 0)
        prompts = [self.prompt(text, room if cut else None) for text in texts]
        longest = max(map(len, prompts), default=0)
        told = f"a prompt has {longest} tokens with its pauses; at most {room} leave room for max_new_tokens"
        require(longest <= room, told)
        require(all(len(prompt) for prompt in prompts), "a prompt is empty; give at least a word")
        written: list[list[int]] = []
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            written += write_batch(self.lm, self.tokenizer, part, self.pauses, self.lm.device, generation)
        return [self.continuation(*found) for found in zip(texts, prompts, written, strict=True)]

    def continuation(self, text: str, prompt: np.ndarray, ids: list[int]) -> "Continuation":
        """What was written after a text; whether it goes on within a word shows only beside the text."""
        before, both = (spelled(self.tokenizer, [*self.ids(text), *more]) for more in ([], ids))
        written, rest = spelled(self.tokenizer, ids), both[len(before) :]
        gap = rest[: len(rest) - len(rest.lstrip())]
        # WordPiece decodes a part of a word that no word stands before with its mark.
        text = written if both.endswith(written) else rest
        return Continuation(text, gap, prompt, ids, self.tokenizer.eos_token_id in ids)

    @torch.no_grad()
    def losses(self, found: "Continuation") -> torch.Tensor:
        """(N,) nats of each id that was written, given what the model read."""
        ids = torch.tensor([[*found.prompt.tolist(), *found.ids]], device=self.lm.device)
        logits = self.lm(ids).logits[0, len(found.prompt) - 1 : -1].float()
        return torch.nn.functional.cross_entropy(logits, ids[0, len(found.prompt) :], reduction="none")

    def ids(self, text: str) -> list[int]:
        """Tokens of a text as it is written."""
        return self.encode(text)[0].tolist()

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """(T,) tokens of a text as it is written, and (T, 2) the characters [start, end) of each."""
        found = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        return np.asarray(found["input_ids"], dtype=np.int64), np.asarray(found["offset_mapping"]).reshape(-1, 2)
