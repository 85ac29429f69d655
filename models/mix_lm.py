"""Mix LM: an encoder of gMLP blocks with a tiny attention, whose feed-forward mixes positions by convolutions of
several kernel sizes and dilations. All of it but the config's base is in this file.

Shapes: B texts, T positions, V words, E embedding_size, H hidden_size, F ff_dim, P max_position_embeddings.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from kozero.errors import require
from models.dropout import Dropout
from models.encoder_config import ACTIVATIONS, COUNTS, EncoderConfig, EncoderOutput, is_whole

HEAD_SIZE = 64  # of the tiny attention, as in the paper, whatever the hidden size


class MixLmConfig(EncoderConfig):
    """Sizes and choices of a Mix LM. `max_position_embedding` is another spelling of `max_position_embeddings`."""

    model_type = label = "kozero_mix_lm"
    attribute_map: ClassVar[dict[str, str]] = {"max_position_embedding": "max_position_embeddings"}
    counts = (*COUNTS, "embedding_size", "kernel_size")
    ranges = (
        ("dropout_prob", 0, 1, "from 0 to below 1"),
        ("initializer_range", 1e-9, 10, "from 1e-09 to below 10"),
        ("LN_eps", 1e-20, 1, "from 1e-20 to below 1"),
    )

    vocab_size: int = 51200
    embedding_size: int = 128  # the vocabulary's vectors; a linear map widens them to hidden_size
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_heads: int = 1  # of 64 channels each, in the tiny attention
    kernel_size: int = 7  # the largest kernel; the others are 3, 5, ... below it
    n_experts: int = 4  # parts of the channels, with dilations 1, 2, ...
    ff_dim: int = 3072
    act_fn: str = "gelu"
    dropout_prob: float = 0.1
    initializer_range: float = 0.02
    # So many consecutive layers share one feed-forward; num_hidden_layers: all share all their parameters (ALBERT).
    layer_group: int = 1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    LN_eps: float = 1e-12
    ln_pos: int = 0  # LayerNorm before (0) or after (1) a sublayer
    causal: bool = False
    pad_token_id: int = 3

    def __post_init__(self, **kwargs) -> None:
        found = kwargs.get("model_type", self.model_type)
        require(found == self.model_type, f"model_type {found!r}: a Mix LM needs {self.model_type!r}")
        super().__post_init__(**kwargs)

    def check(self) -> None:
        """Refuse the first value that is out of range. Each part of the channels has one for each kernel size."""
        super().check()
        self.require("kernel_size", self.kernel_size % 2 == 1 and self.kernel_size >= 3, "must be odd and 3 or more")
        inside = is_whole(self.pad_token_id) and self.pad_token_id < self.vocab_size
        self.require("pad_token_id", inside, f"must be a row of the vocabulary, 0 to {self.vocab_size - 1}")
        for key in ("hidden_size", "ff_dim"):
            channels, parts, num = getattr(self, key), self.n_experts, len(self.kernel_sizes)
            self.require("n_experts", channels % parts == 0, f"must divide {key} {channels}")
            few = f"{parts} parts of {channels // parts} channels for {num} kernel sizes; raise it"
            self.require(key, channels // parts >= num, f"{few} or lower n_experts or kernel_size")

    @property
    def kernel_sizes(self) -> range:
        """3, 5, ... up to kernel_size."""
        return range(3, self.kernel_size + 1, 2)


class FactorisedEmbedding(nn.Module):
    """Words, positions and token types in E dimensions, widened to H (ALBERT, Lan et al., arXiv 1909.11942, 3.1)."""

    def __init__(self, config: MixLmConfig) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.embedding_size, padding_idx=config.pad_token_id)
        self.positions = nn.Embedding(config.max_position_embeddings, config.embedding_size)
        self.token_types = nn.Embedding(config.type_vocab_size, config.embedding_size)
        self.norm = nn.LayerNorm(config.embedding_size, eps=config.LN_eps)
        self.widen = nn.Linear(config.embedding_size, config.hidden_size)
        self.dropout = Dropout(config.dropout_prob)

    def forward(self, input_ids: torch.Tensor, token_type_ids: torch.Tensor) -> torch.Tensor:
        """Two (B, T) of ids to (B, T, H)."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        vectors = self.words(input_ids) + self.positions(places) + self.token_types(token_type_ids)
        hidden = self.widen(self.norm(vectors)).to(vectors.dtype)  # else autocast keeps all residual sums in 16 bit
        return self.dropout(hidden)


class TinyAttention(nn.Module):
    """The small self-attention that aMLP adds to the gate (Liu et al., arXiv 2105.08050): 64 channels a head."""

    def __init__(self, config: MixLmConfig) -> None:
        super().__init__()
        width = config.num_heads * HEAD_SIZE
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * width)
        self.out = nn.Linear(width, config.hidden_size)

    def forward(self, hidden: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
        """(B, T, H) to the same; `visible` (B or 1, 1, T, T) is True where a query sees a key."""
        query, key, value = self.qkv(hidden).unflatten(-1, (3, self.num_heads, HEAD_SIZE)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=visible)  # (B, heads, T, 64)
        return self.out(seen.transpose(1, 2).flatten(2))


class SpatialGating(nn.Module):
    """s(Z) = Z1 * (W Z2 + b), a linear map over positions as a gate (arXiv 2105.08050, section 2.1), plus the tiny
    attention. The gate begins near one: b is one, and W so small that W Z2 is about initializer_range at full length.
    """

    def __init__(self, config: MixLmConfig) -> None:
        super().__init__()
        self.causal = config.causal
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.LN_eps)
        self.weight = nn.Parameter(torch.empty(config.max_position_embeddings, config.max_position_embeddings))
        self.bias = nn.Parameter(torch.empty(config.max_position_embeddings))
        self.weight_std = config.initializer_range / config.max_position_embeddings**0.5

    def forward(
        self, content: torch.Tensor, gate: torch.Tensor, attended: torch.Tensor, padding: torch.Tensor | None
    ) -> torch.Tensor:
        """(B, T, H) times a gate made of two others. A padded column of W meets zeros, as one beyond T would."""
        length = gate.shape[1]
        weight = self.weight[:length, :length]
        weight = weight.tril() if self.causal else weight
        gate = zero_padding(self.norm(gate), padding).transpose(1, 2)  # (B, H, T)
        # The bias is no part of the product, whose 16-bit sum would keep little of W Z2 beside a one.
        gate = F.linear(gate, weight).transpose(1, 2) + self.bias[:length, None]
        return content * (gate + attended)


class GatedMlp(nn.Module):
    """The gMLP block without its norm and shortcut. Both halves of the inner width are H wide, so the block has
    3 H^2 weights in place of the 4 H^2 of an attention, and ff_dim belongs to the feed-forward alone."""

    def __init__(self, config: MixLmConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.act_fn]
        self.expand = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.attention = TinyAttention(config)
        self.gating = SpatialGating(config)
        self.project = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: torch.Tensor, padding: torch.Tensor | None, visible: torch.Tensor | None) -> torch.Tensor:
        """(B, T, H) to the same."""
        content, gate = self.activation(self.expand(hidden)).chunk(2, dim=-1)
        return self.project(self.gating(content, gate, self.attention(hidden, visible), padding))


class MixedConvolution(nn.Module):
    """Convolutions of several kernel sizes and dilations side by side (MixConv, Tan and Le, arXiv 1907.09595).

    The H channels are n_experts parts, the e-th with dilation e. A part's channels are divided over the K kernel sizes
    3, 5, ..., and so are its share of the F outputs: each of the n_experts * K blocks is one dense convolution

        (B, H / n / K, T) -> (B, F / n / K, T)    kernel k, dilation e, reach (k - 1) * e + 1 positions

    where the first blocks of a part get what does not divide evenly. In all H F (K + 2) / (n K) weights.
    """

    def __init__(self, config: MixLmConfig) -> None:
        super().__init__()
        kinds = [(dilation, k) for dilation in range(1, config.n_experts + 1) for k in config.kernel_sizes]
        inner = divide(config.ff_dim // config.n_experts, len(config.kernel_sizes)) * config.n_experts
        self.widths = divide(config.hidden_size // config.n_experts, len(config.kernel_sizes)) * config.n_experts
        sides = 1 if config.causal else 2  # all of the reach on the left, or half of it on each side
        self.convolutions = nn.ModuleList(
            nn.Conv1d(channels, outputs, k, dilation=dilation, padding=(k - 1) * dilation // sides)
            for channels, outputs, (dilation, k) in zip(self.widths, inner, kinds, strict=True)
        )

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(B, H, T) to (B, F, T)."""
        length = hidden.shape[-1]
        blocks = zip(self.convolutions, hidden.split(self.widths, dim=1), strict=True)
        # Conv1d pads both ends alike; a causal one gives (k - 1) * dilation outputs too many, which see the future
        return torch.cat([convolution(block)[..., :length] for convolution, block in blocks], dim=1)


class MixFeedForward(nn.Module):
    """Mixed convolution into F channels, activation, dense projection back. Positions are mixed on the narrow side,
    where padding is zeroed once; the dense projection lets every channel see every kernel size and dilation."""

    def __init__(self, config: MixLmConfig) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.act_fn]
        self.mix = MixedConvolution(config)
        self.project = nn.Linear(config.ff_dim, config.hidden_size)

    def forward(self, hidden: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
        """(B, T, H) to the same."""
        inner = self.activation(self.mix(zero_padding(hidden, padding).transpose(1, 2)))
        return self.project(inner.transpose(1, 2))


class MixLmLayer(GradientCheckpointingLayer):
    """gMLP block and feed-forward, each with norm and shortcut. The feed-forward is handed in: layers share it."""

    def __init__(self, config: MixLmConfig) -> None:
        super().__init__()
        self.post_norm = config.ln_pos == 1
        self.gmlp = GatedMlp(config)
        self.gmlp_norm = nn.LayerNorm(config.hidden_size, eps=config.LN_eps)
        self.ff_norm = nn.LayerNorm(config.hidden_size, eps=config.LN_eps)
        self.dropout = Dropout(config.dropout_prob)

    def forward(
        self, hidden: torch.Tensor, feed_forward: MixFeedForward, padding: torch.Tensor | None,
        visible: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        """(B, T, H) to the same."""
        if self.post_norm:
            hidden = self.gmlp_norm(hidden + self.dropout(self.gmlp(hidden, padding, visible)))
            return self.ff_norm(hidden + self.dropout(feed_forward(hidden, padding)))
        hidden = hidden + self.dropout(self.gmlp(self.gmlp_norm(hidden), padding, visible))
        return hidden + self.dropout(feed_forward(self.ff_norm(hidden), padding))


class MixLmEncoder(PreTrainedModel):
    """The encoder without a head. A masked language model ties its head to the (V, E) `get_input_embeddings().weight`.

    Parameters that several layers share exist once: layer k uses `feed_forwards[k // layer_group]`, and where one group
    holds all layers they are one layer.
    """

    config_class = MixLmConfig
    base_model_prefix = "encoder"
    _input_embed_layer = "words"  # of embeddings, (V, E)
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["MixLmLayer", "MixFeedForward"]

    def __init__(self, config: MixLmConfig) -> None:
        super().__init__(config)
        num = config.num_hidden_layers
        num_groups = -(-num // config.layer_group)
        self.embeddings = FactorisedEmbedding(config)
        layers = [MixLmLayer(config) for _ in range(1 if num_groups == 1 else num)]
        self.layers = nn.ModuleList(layers * (num // len(layers)))
        self.feed_forwards = nn.ModuleList(MixFeedForward(config) for _ in range(num_groups))
        if num_groups == 1:
            self._tied_weights_keys = {rf"layers\.{k}\.": r"layers\.0\." for k in range(1, num)}
        # post-norm layers end in a norm of their own
        self.norm = nn.Identity() if config.ln_pos else nn.LayerNorm(config.hidden_size, eps=config.LN_eps)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # N(0, initializer_range), biases zero, norms one and zero
        if isinstance(module, SpatialGating):
            nn.init.normal_(module.weight, std=module.weight_std)
            nn.init.ones_(module.bias)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> EncoderOutput:
        """Vectors of a batch of texts.

        Args:
            input_ids: (B, T), T up to max_position_embeddings. Positions count from the left: pad on the right.
            attention_mask: (B, T), zero where padded; None: nothing is padded.
            token_type_ids: (B, T); None: all zero.

        Returns: last_hidden_state (B, T, H). At a padded position it is finite and means nothing.
        Raises: UserError when a text is longer than the positions.
        """
        length, limit = input_ids.shape[1], self.config.max_position_embeddings
        few = f"a text of {length} tokens: max_position_embeddings is {limit}; lower --max_seq_length to it"
        require(length <= limit, few)
        padding = None if attention_mask is None else (attention_mask == 0).unsqueeze(-1)  # (B, T, 1)
        visible = visible_keys(padding, length, self.config.causal, input_ids.device)
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        hidden = self.embeddings(input_ids, types)
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden, self.feed_forwards[number // self.config.layer_group], padding, visible)
        return EncoderOutput(last_hidden_state=self.norm(hidden))


def divide(total: int, num: int) -> list[int]:
    """`total` in `num` near-equal sizes, the larger ones first."""
    return [total // num + (k < total % num) for k in range(num)]


def zero_padding(hidden: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    """(B, T, H) with zeros where `padding` (B, T, 1) is True: what comes before every mixing over positions."""
    return hidden if padding is None else hidden.masked_fill(padding, 0)


def visible_keys(padding: torch.Tensor | None, length: int, causal: bool, device: torch.device) -> torch.Tensor | None:
    """(B or 1, 1, T, T), True where a query sees a key; None when all see all. Made once for all layers."""
    visible = None
    if padding is not None:
        visible = ~padding.mT.unsqueeze(1)  # (B, 1, 1, T)
    if causal:
        earlier = torch.ones(1, 1, length, length, dtype=torch.bool, device=device).tril()
        visible = earlier if visible is None else visible & earlier
    if padding is not None:  # a position always sees itself: kernels may give NaN for a query without any key
        visible = visible | torch.eye(length, dtype=torch.bool, device=device)
    return visible


AutoConfig.register(MixLmConfig.model_type, MixLmConfig, exist_ok=True)
AutoModel.register(MixLmConfig, MixLmEncoder, exist_ok=True)
