"""Causal attention over packed rows, in the place that transformers has for one's own (its AttentionInterface)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kozero.data.packing import Packing
from models.dropout import drop

NAME = "packed"
# Texts up to which a CPU is faster in 16 bit by plain products: in the backward pass of its flash attention each head
# is a product of its own (torch 2.13; 26 ms against 4 for 4 x 128 tokens of KoGPT2 on two cores, even at 600 tokens).
MOST_BY_PRODUCTS = 512


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: Packing | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, None]:
    """(B, heads, T, d) queries, keys and values to (B, T, heads, d), as transformers calls it. With a packing the mask
    is not looked at."""
    if packing is not None:
        return attend_by_text(query, key, value, dropout, scaling, packing), None
    if by_products(query, key, dropout):
        return attend_by_products(query, key, value, attention_mask, dropout, scaling).transpose(1, 2), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **rest)


@torch.compiler.disable  # its shapes are those of a batch's texts: each batch would be compiled anew
def attend_by_text(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, scaling: float | None, packing: Packing
) -> torch.Tensor:
    """Each text alone, texts of about the same length together: the kernels of causal attention without a mask. Shapes
    as `attend`."""
    rows = [x.transpose(1, 2) for x in (query, key, value)]  # (B, T, heads, d)
    if not packing.shapes:
        found = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scaling)
        return found.transpose(1, 2)
    sizes = [n * length for n, length in packing.shapes]
    moved = [Moved.apply(x.flatten(0, 1), packing.places, packing.back, None).split(sizes) for x in rows]
    outputs = []
    for shape, *texts in zip(packing.shapes, *moved, strict=True):
        q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in texts)  # (n, heads, L, d)
        found = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, scale=scaling)
        outputs.append(found.transpose(1, 2).flatten(0, 1))
    found = Moved.apply(torch.cat(outputs), packing.back, packing.places, packing.blanks)
    return found.view_as(rows[0])


class Moved(torch.autograd.Function):
    """Rows (N, ...) in another order, x[places]. Its gradient is an order as well, grad[back], where indexing alone
    would add up; rows of x that `blanks` names are used by nobody and get none."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, places: torch.Tensor, back: torch.Tensor, blanks: torch.Tensor | None
    ) -> torch.Tensor:
        """(N, ...) to (len(places), ...)."""
        ctx.back, ctx.blanks = back, blanks
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """The reverse."""
        found = grad.index_select(0, ctx.back)
        return found if ctx.blanks is None else found.index_fill_(0, ctx.blanks, 0), None, None, None


def by_products(query: torch.Tensor, key: torch.Tensor, dropout: float) -> bool:
    """Whether plain products are faster: see MOST_BY_PRODUCTS. Forward alone flash attention is; it knows no dropout,
    and what torch computes then are products too, with a mask that takes longer to draw."""
    if query.device.type != "cpu" or query.shape[2] != key.shape[2]:
        return False
    half = query.dtype in (torch.bfloat16, torch.float16)
    return dropout > 0 or (half and query.requires_grad and query.shape[2] <= MOST_BY_PRODUCTS)


def attend_by_products(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, dropout: float,
    scaling: float | None,
) -> torch.Tensor:  # fmt: skip
    """Scores, softmax, sum: shapes as `scaled_dot_product_attention` has them; mask (B, 1, T, T), True where seen."""
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    hidden = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    scores = torch.add(hidden, query @ key.mT, alpha=query.shape[-1] ** -0.5 if scaling is None else scaling)
    return drop(scores.softmax(-1), dropout) @ value


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
