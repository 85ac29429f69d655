"""A BERT-like encoder whose feed-forward is a Switch layer (Fedus et al. 2021, arXiv 2101.03961) and whose attention
scores go on from layer to layer (RealFormer, He et al. 2020, arXiv 2012.11747).

Importing this module registers both classes, so that AutoConfig and AutoModel know "kozero_transformer".
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer

from kozero.errors import UserError
from models.dropout import Dropout
from models.encoder_config import ACTIVATIONS, COUNT, POST_NORM, PRE_NORM, EncoderConfig, EncoderOutput, is_whole
from models.heads import Float32Linear

ABOVE_0 = math.ulp(0.0)  # the smallest float that is


class TransformerConfig(EncoderConfig):
    """Shape and behaviour of a TransformerEncoder."""

    model_type = "kozero_transformer"
    attribute_map: ClassVar = {"max_position_embedding": "max_position_embeddings", "num_attention_heads": "num_heads"}
    label = "transformer"
    ranges = (
        ("capacity_factor", ABOVE_0, 1e3, "above 0 and below 1000"),
        ("initializer_range", ABOVE_0, 10, "above 0 and below 10"),
        ("LN_eps", ABOVE_0, 1, "above 0 and below 1"),
        ("dropout_prob", 0, 1, "in [0, 1)"),
    )

    vocab_size: int = 32000
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_heads: int = 12
    ff_dim: int = 3072  # inner width of one expert
    n_experts: int = 4
    capacity_factor: float = 1.25  # places of an expert in training, in even shares of the batch's tokens
    act_fn: str = "gelu"  # gelu, relu or swish
    dropout_prob: float = 0.1  # of embeddings, attention weights and what a sublayer adds
    initializer_range: float = 0.02  # standard deviation of initial matrices
    # So many consecutive layers share one feed-forward; num_hidden_layers: all share all their parameters (ALBERT).
    layer_group: int = 1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    LN_eps: float = 1e-5
    ln_pos: int = POST_NORM  # 0: norm before each sublayer, 1: after it
    causal: bool = False
    embedding_size: int | None = None  # width of the embedding tables where it is not hidden_size (ALBERT)
    pad_token_id: int | None = 0
    tie_word_embeddings: bool = True  # transformers ties nothing without it, shared feed-forwards neither

    @property
    def embedding_width(self) -> int:
        """Columns of the embedding tables, and so the input width of a tied head."""
        return self.embedding_size or self.hidden_size

    def check(self) -> None:
        """Refuse the first value that is out of range."""
        super().check()
        width, heads, pad = self.embedding_size, self.num_heads, self.pad_token_id
        self.require("embedding_size", width is None or is_whole(width, 1), f"{COUNT}, or null for none")
        tied = self.tie_word_embeddings is True
        self.require("tie_word_embeddings", tied, "must be true: heads are tied to the embedding")
        self.require("num_heads", self.hidden_size % heads == 0, f"must be a divisor of hidden_size {self.hidden_size}")
        known = pad is None or (is_whole(pad) and pad < self.vocab_size)
        self.require("pad_token_id", known, f"must be a token below vocab_size {self.vocab_size}, or null for none")


@dataclass
class Routing:
    """Which expert each of N tokens goes to, sorted by expert and within it by place in the batch.

    order: (N,) the token at each sorted place.
    expert: (N,) its expert.
    ends: (E,) int32, where each expert's tokens end.
    position: (N,) place among the tokens of its expert.
    kept: (N,) whether that place is within the capacity.
    gate: (N,) fp32, probability of its expert.
    """

    order: torch.Tensor
    expert: torch.Tensor
    ends: torch.Tensor
    position: torch.Tensor
    kept: torch.Tensor
    gate: torch.Tensor

    @property
    def sizes(self) -> torch.Tensor:
        """(E,) tokens that chose each expert."""
        return self.ends.diff(prepend=self.ends.new_zeros(1))


def route(logits: torch.Tensor, capacity: int) -> Routing:
    """Top-1 routing of (N, E) fp32 logits, first come first served. No value is read back from the device."""
    gate, expert = logits.softmax(-1).max(-1)
    expert, order = expert.sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(logits.shape[1], device=logits.device), right=True)  # (E,)
    starts = F.pad(ends[:-1], (1, 0))
    position = torch.arange(len(expert), device=logits.device) - starts[expert]
    return Routing(order, expert, ends.int(), position, position < capacity, gate.index_select(0, order))


def router_losses(logits: torch.Tensor, load: torch.Tensor) -> torch.Tensor:
    """(2,): the load-balance loss of Fedus et al. (eq. 4 to 6, without alpha; 1 when even) and the router z-loss of
    Zoph et al. (ST-MoE, arXiv 2202.08906, eq. 5).

    Args: logits: (N, E) fp32. load: (E,) share of the N tokens that chose each expert.
    """
    num_tokens = max(len(logits), 1)
    probability = logits.softmax(-1).sum(0) / num_tokens  # (E,)
    balance = logits.shape[1] * (load * probability).sum()
    z_loss = logits.logsumexp(-1).square().sum() / num_tokens
    return torch.stack([balance, z_loss])


def has_grouped_product(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether `F.grouped_mm` multiplies (N, H) by (E, H, F) here: rows of both products must fill whole 16 bytes. On
    CUDA it wants bf16 and compute capability 8; other precisions have a slow loop there that waits for the device."""
    aligned = all(size * x.element_size() % 16 == 0 for size in weight.shape[1:])
    if x.device.type == "cuda":
        return aligned and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return aligned and x.device.type == "cpu"


class SwitchFeedForward(nn.Module):
    """A feed-forward of which each token uses one of `n_experts` (Switch layer). As in the paper's own, experts have no
    biases. Expert weights are stacked, so one without tokens has a gradient too: zero."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.capacity_factor = config.capacity_factor
        self.act_fn = ACTIVATIONS[config.act_fn]
        # "selective precision", section 2.4
        self.router = Float32Linear(config.hidden_size, config.n_experts, bias=False)
        self.w_in = nn.Parameter(torch.empty(config.n_experts, config.hidden_size, config.ff_dim))  # (E, H, F)
        self.w_out = nn.Parameter(torch.empty(config.n_experts, config.ff_dim, config.hidden_size))  # (E, F, H)

    def forward(
        self, hidden: torch.Tensor, real: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Send each token through its expert.

        Args:
            hidden: (B, T, H).
            real: (N,) places of the tokens in the flattened (B * T) positions; None: all of them.

        Returns: (B, T, H), zero for padding and for dropped tokens; router losses (2,); load (E,); dropped share ().
        """
        flat = hidden.flatten(0, 1)
        logits = self.router(flat if real is None else flat.index_select(0, real))
        num_tokens = len(logits)
        routing = route(logits, self.capacity(num_tokens))
        places = routing.order if real is None else real[routing.order]
        outputs = self.experts(flat.index_select(0, places), routing)
        outputs = outputs * (routing.gate * routing.kept).to(outputs.dtype).unsqueeze(-1)
        outputs = outputs.new_zeros(flat.shape).index_copy(0, places, outputs)
        load = routing.sizes / max(num_tokens, 1)
        dropped = (~routing.kept).sum() / max(num_tokens, 1)
        return outputs.view_as(hidden), router_losses(logits, load), load, dropped

    def capacity(self, num_tokens: int) -> int:
        """Places of each expert (eq. 3). In evaluation enough for all: the vector of a text must not depend on the
        other texts of its batch."""
        places = math.ceil(self.capacity_factor * num_tokens / self.w_in.shape[0])
        return min(places, num_tokens) if self.training else num_tokens

    def experts(self, tokens: torch.Tensor, routing: Routing) -> torch.Tensor:
        """(N, H) sorted tokens through their experts, (N, H), not yet scaled. Rows of dropped tokens mean nothing."""
        device = tokens.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.w_in.dtype
        tokens, w_in, w_out = tokens.to(dtype), self.w_in.to(dtype), self.w_out.to(dtype)  # grouped_mm has no autocast
        multiply = self.grouped if has_grouped_product(tokens, w_in) else self.batched
        return multiply(tokens, w_in, w_out, routing)

    def grouped(self, tokens: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Grouped products over the tokens as they lie. Dropped tokens are computed too, which costs less than taking
        them out: their number is known on the device only."""
        inner = self.act_fn(F.grouped_mm(tokens, w_in, offs=routing.ends))  # (N, F)
        return F.grouped_mm(inner, w_out, offs=routing.ends)

    def batched(self, tokens: torch.Tensor, w_in: torch.Tensor, w_out: torch.Tensor, routing: Routing) -> torch.Tensor:
        """Batched products over (E, C, H), C places of each expert, some of them empty."""
        num_experts, hidden_size = w_in.shape[:2]
        # In evaluation the fullest expert decides, which waits for the device.
        places = self.capacity(len(tokens)) if self.training else int(routing.sizes.max())
        spare = num_experts * places  # one row more, which takes what is dropped
        slots = torch.where(routing.kept, routing.expert * places + routing.position, spare)
        rows = tokens.new_zeros(spare + 1, hidden_size).index_copy(0, slots, tokens)[:-1]
        inner = self.act_fn(torch.bmm(rows.view(num_experts, places, hidden_size), w_in))  # (E, C, F)
        return torch.bmm(inner, w_out).flatten(0, 1).index_select(0, slots.clamp(max=spare - 1))


class ResidualAttention(nn.Module):
    """Self-attention that adds the scores of the layer below to its own (He et al., section 3)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = Dropout(config.dropout_prob)

    def forward(
        self, hidden: torch.Tensor, previous: torch.Tensor | None, unseen: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """softmax(QK' / sqrt(d) + previous) V, the mask after the sum.

        Args:
            hidden: (B, T, H).
            previous: (B, heads, T, T) scores of the layer below; None in the first.
            unseen: True where a query must not see a key; broadcasts to (B, heads, T, T).

        Returns: (B, T, H), and (B, heads, T, T) scores for the layer above, before mask and softmax, in fp32: a sum of
        as many terms as there are layers.
        """
        heads = self.query_key_value(hidden).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # (B, heads, T, d) each
        scores = (query * query.shape[-1] ** -0.5 @ key.mT).float()
        scores = scores if previous is None else scores + previous
        # Not minus infinity: a text without a single real token would be all NaN.
        masked = scores if unseen is None else scores.masked_fill(unseen, torch.finfo(scores.dtype).min)
        context = self.dropout(masked.softmax(-1)).to(value.dtype) @ value
        return self.output(context.transpose(1, 2).flatten(2)), scores


class TransformerLayer(GradientCheckpointingLayer):
    """Residual attention and a Switch feed-forward, which other layers may share."""

    def __init__(self, config: TransformerConfig, feed_forward: SwitchFeedForward) -> None:
        super().__init__()
        self.pre_norm = config.ln_pos == PRE_NORM
        self.attention = ResidualAttention(config)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.LN_eps)
        self.feed_forward = feed_forward
        self.feed_forward_norm = nn.LayerNorm(config.hidden_size, eps=config.LN_eps)
        self.dropout = Dropout(config.dropout_prob)

    def forward(
        self, hidden: torch.Tensor, scores: torch.Tensor | None, unseen: torch.Tensor | None, real: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """Shapes as in the two sublayers. Returns: hidden, scores, router losses, load, dropped share."""
        x = self.attention_norm(hidden) if self.pre_norm else hidden
        attended, scores = self.attention(x, scores, unseen)
        hidden = self.add(hidden, attended, self.attention_norm)
        x = self.feed_forward_norm(hidden) if self.pre_norm else hidden
        transformed, *statistics = self.feed_forward(x, real)
        return self.add(hidden, transformed, self.feed_forward_norm), scores, *statistics

    def add(self, hidden: torch.Tensor, update: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
        """The residual stream after a sublayer, normalised if post-norm."""
        hidden = hidden + self.dropout(update)
        return hidden if self.pre_norm else norm(hidden)


class Embeddings(nn.Module):
    """Token, position and segment vectors, summed and normalised; projected to the hidden size where they are of
    another (Lan et al. 2019, ALBERT, arXiv 1909.11942, section 3.1)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.embedding_width
        self.tokens = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.positions = nn.Embedding(config.max_position_embeddings, width)
        self.types = nn.Embedding(config.type_vocab_size, width)
        self.norm = nn.LayerNorm(width, eps=config.LN_eps)
        self.dropout = Dropout(config.dropout_prob)
        factorised = width != config.hidden_size
        self.projection = nn.Linear(width, config.hidden_size) if factorised else nn.Identity()

    def forward(self, input_ids: torch.Tensor, token_type_ids: torch.Tensor | None) -> torch.Tensor:
        """(B, T) ids to (B, T, H) vectors."""
        length, longest = input_ids.shape[1], self.positions.num_embeddings
        if length > longest:
            raise UserError(
                f"max_position_embeddings {longest}: too few for a text of {length} tokens; give shorter rows "
                "(max_seq_length) or train a model with more positions"
            )
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        positions = torch.arange(length, device=input_ids.device)
        total = self.tokens(input_ids) + self.positions(positions) + self.types(types)
        # Autocast gives a projection in 16 bit, in which all residual sums would be computed.
        return self.projection(self.dropout(self.norm(total))).to(total.dtype)


class TransformerEncoder(PreTrainedModel):
    """The encoder without a head. Pre-norm ends with one more norm; post-norm needs none."""

    config_class = TransformerConfig
    base_model_prefix = "encoder"
    _input_embed_layer = "tokens"  # of embeddings, (V, embedding_width): what a head is tied to
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["TransformerLayer"]

    def __init__(self, config: TransformerConfig) -> None:
        config.check()  # values that were changed after the config was made
        super().__init__(config)
        group, num = config.layer_group, config.num_hidden_layers
        feed_forwards = [SwitchFeedForward(config) for _ in range(0, num, group)]
        self.embeddings = Embeddings(config)
        layers = [TransformerLayer(config, feed_forwards[k // group]) for k in range(1 if group == num else num)]
        self.layers = nn.ModuleList(layers * (num // len(layers)))
        self.norm = nn.LayerNorm(config.hidden_size, config.LN_eps) if config.ln_pos == PRE_NORM else nn.Identity()
        shared = "" if group == num else r"feed_forward\."
        self._tied_weights_keys = {
            rf"layers\.{k}\.{shared}": rf"layers\.{k - k % group}\.{shared}" for k in range(num) if k % group
        }
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> EncoderOutput:
        """Encode texts.

        Args:
            input_ids: (B, T).
            attention_mask: (B, T), 0 for padding; None: every token is real. What stands at padding is undefined.
            token_type_ids: (B, T) segments; None: all 0.

        Raises: UserError when T is above max_position_embeddings.
        """
        hidden = self.embeddings(input_ids, token_type_ids)
        is_real = None if attention_mask is None else attention_mask.bool()
        unseen = self.unseen(input_ids, is_real)
        # Waits for the device, once in a forward pass: every layer's shapes follow from the number of tokens.
        real = None if is_real is None else is_real.flatten().nonzero(as_tuple=True)[0]  # (N,)
        scores, statistics = None, []
        for layer in self.layers:
            hidden, scores, *of_layer = layer(hidden, scores, unseen, real)
            statistics.append(of_layer)
        losses, load, dropped = (torch.stack(values) for values in zip(*statistics, strict=True))
        return EncoderOutput(self.norm(hidden), losses.mean(0), load, dropped)

    def unseen(self, input_ids: torch.Tensor, is_real: torch.Tensor | None) -> torch.Tensor | None:
        """True where a query must not see a key: (B, 1, 1, T), (1, 1, T, T), (B, 1, T, T), or None."""
        padding = None if is_real is None else ~is_real[:, None, None, :]
        if not self.config.causal:
            return padding
        length = input_ids.shape[1]
        future = torch.ones(1, 1, length, length, dtype=torch.bool, device=input_ids.device).triu(1)
        return future if padding is None else future | padding

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # Linear, Embedding and LayerNorm
        if isinstance(module, SwitchFeedForward):
            init.normal_(module.w_in, std=self.config.initializer_range)
            init.normal_(module.w_out, std=self.config.initializer_range)


AutoConfig.register(TransformerConfig.model_type, TransformerConfig)
AutoModel.register(TransformerConfig, TransformerEncoder)
