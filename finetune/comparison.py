"""What a model writes after a prompt without pauses, beside what it writes with M of them: as it is written, by one
thread for everyone who asks, and no longer than someone wants to read it."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field, fields, replace
from threading import Event
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from finetune.decoding import DecodingArguments
from finetune.generate import GenerationArguments, Writer
from finetune.paused import PausedGenerator
from finetune.setup import inference_pauses
from kozero import distributed
from kozero.errors import UserError, require
from kozero.pause import InferencePauseArguments
from models.language_model import LanguageModel

REFRESH_SECONDS = 0.1  # a page that is told more often than it can draw falls behind, also when it is to stop
T = TypeVar("T")


class Stream(BaseStreamer, StoppingCriteria):
    """Between the thread that writes and the one that reads: tokens go one way, the wish to stop the other."""

    def __init__(self) -> None:
        self.ids: list[int] | None = None  # None until the prompt is there, which comes first
        self.stopped = Event()

    def put(self, value: torch.Tensor) -> None:
        """The prompt, then a token at a time."""
        self.ids = [] if self.ids is None else [*self.ids, *value.tolist()]

    def end(self) -> None:
        """Nothing to do: the thread's own end is waited for."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """(B,) whether each text ends here."""
        return torch.full((len(input_ids),), self.stopped.is_set(), device=input_ids.device)


@dataclass
class Comparison:
    """A model that writes for one reader at a time, with no pauses and with some: `pause_arguments` by default."""

    model: LanguageModel
    pause_arguments: InferencePauseArguments
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))

    def __post_init__(self) -> None:
        self.lm = self.model.module.lm.to(distributed.device()).eval()
        self.num_pauses = inference_pauses(self.model, self.pause_arguments).num

    @property
    def can_pause(self) -> bool:
        """Whether the model has a token that pauses."""
        try:
            inference_pauses(self.model, replace(self.pause_arguments, num_inference_pauses=1))
        except UserError:
            return False
        return True

    def write(
        self, prompt: str, pause_arguments: InferencePauseArguments, decoding: DecodingArguments
    ) -> Iterator[tuple[str, str]]:
        """The texts without and with pauses so far, whenever there is more; the last ones are those of
        finetune/generate.py. Each begins with the same seed. There is no second text where the pauses are none.

        Raises: UserError before anything is written.
        """
        none = replace(pause_arguments, num_inference_pauses=0)
        writers = [self.writer(arguments, decoding) for arguments in (none, pause_arguments)]
        for writer in reversed(writers):  # with pauses there is less room
            writer.check(prompt)
        written = ["", ""]
        for k, writer in enumerate(writers):
            if k == 0 or writer.generator.pauses.num:
                for text in self.stream(writer, prompt):
                    written[k] = text
                    yield written[0], written[1]

    def writer(self, pause_arguments: InferencePauseArguments, decoding: DecodingArguments) -> Writer:
        """One that puts such pauses into a prompt."""
        pauses = inference_pauses(self.model, pause_arguments)
        generator = PausedGenerator(self.lm, self.model.tokenizer, pauses)
        return Writer(generator, GenerationArguments(), decoding, self.model.config.n_positions)

    def stream(self, writer: Writer, prompt: str) -> Iterator[str]:
        """The text so far, again and again. Whoever stops reading stops the writing at the next token."""
        stream = Stream()
        done = self.thread.submit(self.work, writer, prompt, stream)
        try:
            while not wait([done], REFRESH_SECONDS).done:
                yield writer.generator.continuation(prompt, np.array([]), stream.ids or []).text.strip()
            yield done.result()
        finally:
            stream.stopped.set()
            done.cancel()

    def work(self, writer: Writer, prompt: str, stream: Stream) -> str:
        """Write a text, as finetune/generate.py does."""
        distributed.seed_everything(writer.decoding.seed)
        (found,) = writer.write([prompt], streamer=stream, stopping_criteria=StoppingCriteriaList([stream]))
        return found.text


def filled(arguments: T, values: Mapping[str, float | None]) -> T:
    """Arguments with other numbers in them, checked as those of a command line are."""
    kinds = {f.name: f.type for f in fields(arguments)}
    for name, value in values.items():
        require(value is not None, f"--{name}: is empty; give a number")
        require(kinds[name] is float or float(value).is_integer(), f"--{name} {value}: must be a whole number")
    return replace(arguments, **{name: kinds[name](value) for name, value in values.items()})
