"""GPT-2 language models (KoGPT2, ko-gpt-trinity, and smaller ones of the same shape) as the trainer sees them."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

from kozero.data.packing import Packing
from models import attention
from models.dropout import use_fast_dropout

CHUNK = 2048  # predicted positions whose logits are there at once: 0.4 GB in 32 bit for 51,200 tokens
MULTIPLE = 16  # positions of a chunk are rounded up to this: a CPU prepares its products anew for every new number
NO_MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool)


class PauseEmbedding(nn.Embedding):
    """Token embedding whose pause row is a parameter of its own, so that it can train while the rest is frozen."""

    def __init__(self, embedding: nn.Embedding, pause_id: int) -> None:
        super().__init__(*embedding.weight.shape, _weight=embedding.weight)
        self.weight = embedding.weight  # the very parameter, still tied to the head
        self.pause_id = pause_id
        self.pause_row = nn.Parameter(embedding.weight.detach()[pause_id : pause_id + 1].clone())  # (1, H)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, T) ids to (B, T, H) vectors."""
        rows = super().forward(input_ids)
        return torch.where((input_ids == self.pause_id).unsqueeze(-1), self.pause_row.to(rows.dtype), rows)


class SharedTable(torch.autograd.Function):
    """The rows of an embedding table, and the table again for the head that is tied to it. Both give one gradient: the
    rows' is added to the head's where it lies, while autograd makes a second one of the table's size, mostly zeros, and
    adds that (for 51,200 x 768 numbers 26 ms of two cores; a sparse one it adds into a third)."""

    @staticmethod
    def forward(ctx: Any, table: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(V, H), (B, T) to (B, T, H) and (V, H)."""
        ctx.save_for_backward(ids)
        return F.embedding(ids, table), table.view_as(table)

    @staticmethod
    def backward(ctx: Any, grad_rows: torch.Tensor, grad_table: torch.Tensor) -> tuple[torch.Tensor, None]:
        """(B, T, H), (V, H) to (V, H). Nobody else holds the head's gradient, which a product or a cast has made."""
        (ids,) = ctx.saved_tensors
        return grad_table.index_add_(0, ids.flatten(), grad_rows.flatten(0, 1)), None


class Head(nn.Linear):
    """A head without bias that gives some tokens a logit of minus infinity. As the bias of the matrix product the
    mask costs no extra pass over the (N, V) logits."""

    def __init__(self, head: nn.Linear, silent_ids: list[int]) -> None:
        super().__init__(head.in_features, head.out_features, bias=False, device="meta")
        self.weight = head.weight  # the very parameter, still tied to the embedding
        mask = torch.zeros(head.out_features)
        mask[silent_ids] = -torch.inf
        self.register_buffer("mask", mask if silent_ids else None, persistent=False)

    def forward(
        self,
        hidden: torch.Tensor,
        target_ids: torch.Tensor | None = None,
        reduction: str = "sum",
        table: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(..., H) to (..., V) logits. With (N,) targets of (N, H): cross entropies in 32 bit, their sum, or without a
        gradient all (N,). They are made here and not outside, so that a sharded weight is gathered once for all chunks.

        Args: table: (V, H) in place of the weight, see SharedTable.
        """
        weight = self.weight if table is None else table
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        if target_ids is None or dtype == torch.float16:
            logits = F.linear(hidden, weight, None if self.mask is None else self.mask.to(dtype))
            return logits if target_ids is None else F.cross_entropy(logits.float(), target_ids, reduction=reduction)
        learns = torch.is_grad_enabled() and reduction == "sum"
        with torch.autocast(kind, enabled=False):
            losses = ChunkedLosses.apply(hidden, weight, self.mask, target_ids, dtype, learns)
        return losses.sum() if reduction == "sum" else losses


class ChunkedLosses(torch.autograd.Function):
    """The cross entropy of a linear layer, whose (N, V) logits are there for CHUNK positions at once: each chunk's part
    of the gradients is made beside its losses, as in Liger's fused_linear_cross_entropy (Hsu et al. 2024, arXiv
    2410.10989), and scaled in the backward pass, which is that of the losses' sum.

    Not for float16, where a gradient needs the loss scale from the beginning.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        mask: torch.Tensor | None,
        target_ids: torch.Tensor,
        dtype: torch.dtype,
        learns: bool,
    ) -> torch.Tensor:
        """(N, H), (V, H), (V,), (N,) to (N,) losses in 32 bit; products are computed in `dtype`."""
        number = len(hidden)
        inputs, target_ids = padded(hidden.to(dtype)), padded(target_ids)
        table, bias = weight.to(dtype), None if mask is None else mask.to(dtype)
        for_hidden, for_weight = (needed and learns for needed in ctx.needs_input_grad[:2])
        losses = hidden.new_empty(len(inputs), dtype=torch.float32)
        grad_hidden = torch.empty_like(inputs) if for_hidden else None
        grad_weight = None
        for start in range(0, max(1, number), CHUNK):
            chunk, wanted = inputs[start : start + CHUNK], target_ids[start : start + CHUNK, None]
            log_probs = log_softmax(F.linear(chunk, table, bias))
            losses[start : start + CHUNK] = -log_probs.gather(1, wanted).squeeze(1)
            if not (for_hidden or for_weight):
                continue
            softmax = log_probs.exp_()
            gradient = softmax.scatter_add_(1, wanted, softmax.new_full(wanted.shape, -1.0)).to(dtype)
            if for_hidden:
                grad_hidden[start : start + CHUNK] = gradient @ table
            if for_weight:
                part = gradient.T @ chunk
                grad_weight = part.float() if grad_weight is None else grad_weight.add_(part)
        losses = losses[:number]
        ctx.parts = [grad_hidden if grad_hidden is None else grad_hidden[:number], grad_weight]
        ctx.dtypes = [hidden.dtype, weight.dtype]
        if not learns:
            ctx.mark_non_differentiable(losses)
        return losses

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple:
        """The parts times the gradient of the sum, which is that of each loss."""
        grad = grad[:1].sum()  # 0 where there is no loss
        parts, ctx.parts = ctx.parts, None  # nobody else holds them: autograd takes them over and makes no copy
        found = (
            part if part is None else part.mul_(grad).to(kind) for part, kind in zip(parts, ctx.dtypes, strict=True)
        )
        return *found, None, None, None, None


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """(N, V) in any type to (N, V) in 32 bit, in the place of their copy: there is no second tensor of this size."""
    logits = logits.float()
    return torch.log_softmax(logits, 1, out=logits)


def padded(rows: torch.Tensor) -> torch.Tensor:
    """(N, ...) with zeros behind, to a multiple of MULTIPLE. Rows of zeros add nothing to a gradient of the weights."""
    missing = -len(rows) % MULTIPLE
    return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])]) if missing else rows


class CausalLM(nn.Module):
    """A GPT-2 whose head is computed only where something is predicted.

    Args:
        lm: the transformers model; its head must be tied to its embedding.
        silent_ids: tokens that are never predicted (pauses, rows that only pad the vocabulary). Their logits are
            minus infinity in training, scoring and generation alike.
        pause_id: the token that pauses; None where the vocabulary has none.
    """

    def __init__(self, lm: GPT2LMHeadModel, silent_ids: list[int], pause_id: int | None = None) -> None:
        super().__init__()
        self.lm, self.pause_id = lm, pause_id
        self.entry = 0  # the block whose inputs are given as `hidden`, where they are
        lm.lm_head = Head(lm.lm_head, silent_ids)
        lm.config._attn_implementation = attention.NAME
        use_fast_dropout(lm)

    def separate_pause_row(self) -> None:
        """Give the pause its own (1, H) parameter `lm.transformer.wte.pause_row`."""
        self.lm.transformer.wte = PauseEmbedding(self.lm.transformer.wte, self.pause_id)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        target_index: torch.Tensor,
        target_ids: torch.Tensor,
        reduction: str = "sum",
        packing: Packing | None = None,
        hidden: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Cross entropy of the predicted positions, in nats.

        Args:
            input_ids, position_ids: (B, T). Positions that restart begin a new text, which sees none of the others:
                transformers builds that mask only without attention_mask and without cache.
            target_index: (N,) places in the flattened (B * T) positions.
            target_ids: (N,) the token that follows each.
            packing: of these positions, on a GPU: attention needs no mask then, and none is built.
            hidden: (B, T, H) what `lower` gives for these ids; only the blocks from `entry` on are computed then.

        Returns: their sum, or all (N,) of them with reduction="none".
        """
        model, given, table = self.lm.transformer, {"input_ids": input_ids}, None
        if hidden is None and shareable(model.wte):
            rows, table = SharedTable.apply(model.wte.weight, input_ids)
            given = {"inputs_embeds": rows}
        if hidden is not None:
            model, given = above(model, self.entry), {"inputs_embeds": hidden.to(model.ln_f.weight.dtype)}
        if packing is not None:
            # A mask of four dimensions is taken as it is. To make one, transformers waits for the device's positions.
            given |= {"packing": packing, "attention_mask": NO_MASK}
        hidden = model(**given, position_ids=position_ids, use_cache=False).last_hidden_state
        return self.lm.lm_head(hidden.flatten(0, 1)[target_index], target_ids, reduction, table)

    def lower(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """(B, T) to (B, T, H): what the block `entry` is given."""
        model = below(self.lm.transformer, self.entry)
        return model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state

    def plain_state(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A state dict of this module as one of the transformers model: its names, tied weights once, and the pause
        row back in the embedding."""
        state = {name.removeprefix("lm."): tensor for name, tensor in state.items()}
        state.pop("lm_head.weight", None)
        row = state.pop("transformer.wte.pause_row", None)
        if row is not None:
            table = state["transformer.wte.weight"].clone()
            table[self.lm.transformer.wte.pause_id] = row[0].to(table.dtype)
            state["transformer.wte.weight"] = table
        return state


def shareable(embedding: nn.Embedding) -> bool:
    """Whether SharedTable may stand in for it: it trains, on a CPU (CUDA adds rows in any order), and its weight is
    there in the forward pass of the whole model. fully_shard and fairscale have gathered it by then, with their root;
    DeepSpeed's ZeRO-3 gathers a weight for its module alone, and at once where anybody asks for `embedding.weight`."""
    if type(embedding) is not nn.Embedding or not torch.is_grad_enabled():
        return False
    weight = next(embedding.parameters(recurse=False), None)
    # A plan's FakeTensor is no Parameter by type: it counts two gradients, as a GPU has them.
    here = type(weight) is nn.Parameter and not hasattr(weight, "ds_id") and weight.device.type == "cpu"
    return here and weight.requires_grad


class NoPositions(nn.Module):
    """In the place of position embeddings that the vectors hold already."""

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        """(B, T) to a () zero."""
        return position_ids.new_zeros(())


def below(transformer: GPT2Model, block: int) -> GPT2Model:
    """Embeddings and blocks below one, the very modules; its output is what that block is given."""
    return with_parts(transformer, h=transformer.h[:block], ln_f=nn.Identity())


def above(transformer: GPT2Model, block: int) -> GPT2Model:
    """A block and those above it, the very modules; what the block is given comes as `inputs_embeds`."""
    return with_parts(transformer, h=transformer.h[block:], wpe=NoPositions(), drop=nn.Identity())


def with_parts(module: GPT2Model, **parts: nn.Module) -> GPT2Model:
    """A module beside one that shares all but some parts with it."""
    other = copy.copy(module)
    other._modules = module._modules | parts
    return other


def build(config: GPT2Config, seed: int) -> GPT2LMHeadModel:
    """A model of random weights, the same on every rank for one seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def resize_vocabulary(lm: GPT2LMHeadModel, num_tokens: int, multiple: int = 128) -> None:
    """Make room for `num_tokens`, rounded up: a vocabulary that is a multiple of 128 keeps matrix products fast."""
    lm.resize_token_embeddings(num_tokens, pad_to_multiple_of=multiple, mean_resizing=False)


def reset_row(lm: GPT2LMHeadModel, token_id: int, seed: int) -> None:
    """Draw the embedding of one token anew, as GPT-2 draws all of them: N(0, initializer_range)."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(lm.config.n_embd, generator=generator) * lm.config.initializer_range
    with torch.no_grad():
        lm.transformer.wte.weight[token_id] = row.to(lm.dtype)
