"""Memory of a run by formula: parameters, gradients and optimizer states under each ZeRO stage."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a GPT-2 that decide its cost."""

    num_layers: int
    hidden: int
    inner: int
    vocab_size: int
    positions: int

    @classmethod
    def of(cls, config: Any) -> "ModelShape":
        """The shape of a transformers GPT2Config."""
        inner = config.n_inner or 4 * config.n_embd
        return cls(config.n_layer, config.n_embd, inner, config.vocab_size, config.n_positions)

    @property
    def block_parameters(self) -> int:
        """Weights and biases of one layer: attention 4 H^2 + 4 H, feed-forward 2 H F + H + F, two norms 4 H."""
        hidden, inner = self.hidden, self.inner
        return 4 * hidden * hidden + 4 * hidden + 2 * hidden * inner + hidden + inner + 4 * hidden

    @property
    def parameters(self) -> int:
        """All parameters; the head is tied to the embedding."""
        embeddings = (self.vocab_size + self.positions) * self.hidden
        return embeddings + self.num_layers * self.block_parameters + 2 * self.hidden


def state_bytes(total: int, trainable: int, stage: int, world_size: int, dtype: str = "fp32") -> float:
    """Bytes of parameters, gradients and AdamW states on one rank.

    Rajbhandari et al., "ZeRO", arXiv 1910.02054, section 3: with mixed precision 2 bytes a parameter and gradient and
    K = 12 bytes of 32-bit parameter and two moments; in fp32 4 + 4 + 8. Gradients and states exist for trainable
    parameters alone. Stage 1 divides the states by the ranks, stage 2 the gradients too, stage 3 the parameters too.
    """
    parameter, gradient, states = (4, 4, 8) if dtype == "fp32" else (2, 2, 12)
    share = [1 / world_size if stage >= needed else 1.0 for needed in (3, 2, 1)]
    return parameter * total * share[0] + gradient * trainable * share[1] + states * trainable * share[2]
