"""An encoder with the head of its task: from a folder or a config, and back into a folder; and what a task is to it."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from finetune.arguments import ModelArguments, ReadingArguments
from finetune.data import SAMPLE_TOKENIZER
from finetune.questions import QuestionSet, QuestionStore
from kozero import distributed
from kozero.config import BatchSizes
from kozero.data.batch import Rows
from kozero.data.framing import Framing
from kozero.engines.base import Engine
from kozero.errors import require
from models import encoders
from models.language_model import check_vocabulary, load_tokenizer, set_dropout

TINY = Path(__file__).parent.parent / "models" / "transformer_tiny_config.json"


@dataclass
class EncoderModel:
    """An encoder ready for an engine, and its tokenizer. The module has it as `encoder`; the rest of it is the head.

    fresh: names of the head's weights that were not beside the encoder.
    """

    module: nn.Module
    tokenizer: PreTrainedTokenizerFast
    fresh: list[str] = field(default_factory=list)

    @property
    def encoder(self) -> PreTrainedModel:
        """The encoder without a head."""
        return self.module.encoder

    @property
    def routes(self) -> bool:
        """Whether it is a Switch transformer, which has two losses of its own."""
        return hasattr(self.encoder.config, "capacity_factor")

    def export(self, folder: Path, state: dict[str, torch.Tensor], card: str) -> None:
        """Write the folder that `load` reads; `state` has all weights by the names of `module`."""
        encoders.export_encoder(folder, self.module, state, self.tokenizer, card)


@dataclass
class Found:
    """Scores by name, lines about what did not fit, and what is written beside the scores: JSON values by file name."""

    values: dict[str, float]
    notes: list[str] = field(default_factory=list)
    files: dict[str, Any] = field(default_factory=dict)
    sample: str = ""  # a few predictions, to look at


class EncoderTask(ABC):
    """How a task trains and scores an encoder, once its tokenizer and the length of its rows are known."""

    head: type[nn.Module]  # made of the encoder, has it as `encoder`
    objective: str  # name of its loss
    row_arguments: tuple[str, ...]  # those that change the training rows
    score_arguments: tuple[str, ...] = ()  # those that change the scores alone
    needs_head: ClassVar[bool] = True  # scores mean nothing with a head that was not trained
    files: ClassVar[tuple[str, ...]] = ()  # names of what is written beside the scores
    capacity: int  # tokens of a row at most

    @abstractmethod
    def __init__(self, arguments: ReadingArguments, framing: Framing, capacity: int) -> None:
        """Refuse lengths with which it cannot work."""

    @abstractmethod
    def rows(self, store: QuestionStore, sizes: BatchSizes, seed: int, routes: bool) -> Rows:
        """What it trains on."""

    @abstractmethod
    def score(self, engine: Engine, questions: QuestionSet, micro: int) -> Found:
        """Score every question, `micro` rows in a forward pass. Collective."""


def load(arguments: ModelArguments, head: Callable[[PreTrainedModel], nn.Module], seed: int) -> EncoderModel:
    """The encoder of a run with the head of its task, the same on every rank; a head that is not beside it is drawn.

    Raises: UserError when there is no encoder where one was named.
    """
    name, config_file = arguments.model_name_or_path, arguments.config_file
    require(not (name and config_file), "give either --model_name_or_path or --config_file")
    if not (name or config_file):
        config_file = arguments.config_file = str(TINY)
        distributed.say(f"no --model_name_or_path and no --config_file: random weights of models/{TINY.name}")
    tokenizer_name = arguments.tokenizer_name_or_path or name
    if not tokenizer_name:
        tokenizer_name = str(SAMPLE_TOKENIZER)
        distributed.say("no --tokenizer_name_or_path: using the sample tokenizer (4,096 tokens)")

    def read() -> EncoderModel:
        tokenizer = load_tokenizer(tokenizer_name, writes=False)
        encoder = encoders.load_encoder(name) if name else random_encoder(Path(config_file), tokenizer, seed)
        foreign = bool(name and arguments.tokenizer_name_or_path)
        check_vocabulary(len(tokenizer), encoder.config.vocab_size, foreign)
        if arguments.dropout is not None:
            set_dropout(encoder, arguments.dropout)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            module = head(encoder)
        return EncoderModel(module, tokenizer, encoders.load_heads(module, name) if name else [])

    model = distributed.machine_first(read)
    if model.fresh:
        distributed.say(f"{name}: no {', '.join(model.fresh)} beside the encoder; drawn anew")
    return model


def random_encoder(path: Path, tokenizer: PreTrainedTokenizerFast, seed: int) -> PreTrainedModel:
    """An encoder of a config file with random weights."""
    config = encoders.read_encoder_config(path, encoders.name_in_config(path), tokenizer, distributed.say)
    return encoders.build_encoder(config, seed)
