"""What the configs of both encoders refuse, and what both encoders return."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig
from transformers.utils import ModelOutput

from kozero.errors import nearest, require

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "swish": F.silu}
PRE_NORM, POST_NORM = 0, 1
COUNTS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "ff_dim", "n_experts", "layer_group",
    "max_position_embeddings", "type_vocab_size",
)  # fmt: skip
COUNT = "must be a whole number of 1 or more"


class EncoderConfig(PreTrainedConfig):
    """The base of both configs.

    Raises: UserError, one line, for a value that no model can have.
    """

    label = ""  # of the architecture, in messages
    counts = COUNTS
    ranges = ()  # (key, least, below, in words) of numbers

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """Refuse the first value that is out of range."""
        for key in self.counts:
            self.require(key, is_whole(getattr(self, key), 1), COUNT)
        for key, least, below, words in self.ranges:
            value = getattr(self, key)
            self.require(key, type(value) in (int, float) and least <= value < below, f"must be a number {words}")
        known = list(ACTIVATIONS)
        which = f"must be one of {', '.join(known)}{nearest(str(self.act_fn), known)}"
        self.require("act_fn", self.act_fn in known, which)
        self.require("ln_pos", is_whole(self.ln_pos) and self.ln_pos <= 1, "must be 0 (pre-norm) or 1 (post-norm)")
        self.require("causal", isinstance(self.causal, bool), "must be true or false")
        most = self.num_hidden_layers
        all_share = f"must be at most num_hidden_layers {most}, where all layers share"
        self.require("layer_group", self.layer_group <= most, all_share)

    def require(self, key: str, condition: bool, what: str) -> None:
        """Raise a UserError that says what is wrong with `key`, unless `condition` holds."""
        require(condition, f"{self.label} config: {key} {getattr(self, key)!r}: {what}")


def is_whole(value: Any, minimum: int = 0) -> bool:
    """An integer of at least `minimum`; True is none."""
    return type(value) is int and value >= minimum


@dataclass
class EncoderOutput(ModelOutput):
    """What an encoder returns. Padding counts in none of the statistics, which are None without routed experts.

    last_hidden_state: (B, T, H).
    router_losses: (2,) load-balance loss and router z-loss, means over the layers, unweighted; with gradient.
    expert_load: (layers, experts) share of the tokens that chose each expert, dropped ones included; sums to 1.
    dropped: (layers,) share of the tokens that found their expert full; 0 in evaluation.
    """

    last_hidden_state: torch.Tensor | None = None
    router_losses: torch.Tensor | None = None
    expert_load: torch.Tensor | None = None
    dropped: torch.Tensor | None = None
