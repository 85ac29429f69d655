"""A model of lm-evaluation-harness with pauses in every prompt: `kozero_pause`.

Needs lm-eval, which is in requirements-dev.txt; see finetune/harness.py for its command.
"""

from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from tqdm import tqdm

from finetune.paused import PausedGenerator
from kozero.errors import UserError, require


@register_model("kozero_pause")
class PausedLM(HFLM):
    """The harness's own transformers model, but for the prompts: they have the pauses that the folder or the arguments
    name. Likelihoods are of the continuation alone; nothing is asked of a pause but the last.

    Args: pretrained: folder of the model; num_pauses, placement: default: what config.json names; append_eos: count the
        end of the text to every choice, as training here does (tasks of others do not).
    """

    def __init__(
        self,
        pretrained: str,
        num_pauses: int | None = None,
        placement: str | None = None,
        append_eos: bool = False,
        device: str | None = None,
        **others: Any,
    ) -> None:
        require(type(append_eos) is bool, f"append_eos {append_eos!r}: must be True or False")
        self.paused = PausedGenerator.from_pretrained(pretrained, num_pauses, placement, usable(device))
        self.append_eos = append_eos
        lm = self.paused.lm
        super().__init__(lm, backend="causal", tokenizer=self.paused.tokenizer, device=str(lm.device), **others)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """(prompt with its pauses, continuation), ids. A space between the two belongs to the continuation."""
        bare = context.rstrip()
        ids = self.tok_encode(context[len(bare) :] + continuation, add_special_tokens=False)
        ids += [self.eot_token_id] * self.append_eos
        return self.paused.prompt(bare, self.max_length - len(ids)).tolist(), ids

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of a whole text: it has no prompt that pauses could stand in."""
        if self.paused.pauses.num:
            raise UserError("num_pauses: a task that scores whole texts has no prompt for pauses; use num_pauses=0")
        return super().loglikelihood_rolling(requests, disable_tqdm)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What is written after each prompt, to the first stop sequence. Prompts of about one length share a batch."""
        written: dict[int, str] = {}
        order = sorted(range(len(requests)), key=lambda k: -len(requests[k].args[0]))
        with tqdm(total=len(requests), disable=disable_tqdm or self.rank != 0, desc="generate_until") as bar:
            while order:
                settings = requests[order[0]].args[1]
                batch = [k for k in order if requests[k].args[1] == settings][: int(self.batch_size)]
                order = [k for k in order if k not in batch]
                generation = normalize_gen_kwargs(settings, self.max_gen_toks)
                until = handle_stop_sequences(generation.pop("until", None), eos=None)
                generation["max_new_tokens"] = generation.pop("max_gen_toks")
                contexts = [requests[k].args[0] for k in batch]
                texts = self.paused.generate(contexts, len(batch), cut=True, **generation)
                for k, text in zip(batch, texts, strict=True):
                    written[k] = postprocess_generated_text(text, until, None)
                    self.cache_hook.add_partial("generate_until", requests[k].args, written[k])
                bar.update(len(batch))
        return [written[k] for k in range(len(requests))]


def usable(device: str | None) -> str | None:
    """A device that this machine has: the harness asks for cuda:0 where none is named."""
    import torch

    return "cpu" if device and device.startswith("cuda") and not torch.cuda.is_available() else device
