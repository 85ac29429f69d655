"""Attention over packed rows, against the textbook's formula on each text alone."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kozero.data.batches import collate
from kozero.data.packing import packing_of
from models import attention
from models.causal_lm import CausalLM
from tests.test_batches import packed_texts
from tests.toys import toy_gpt2

HEADS, WIDTH = 2, 4
ROWS = [[3, 5, 1, 7], [16], [2, 2, 2, 2, 2, 2, 2, 2], [9, 7]]  # lengths of texts, 16 tokens a row


def positions(rows=ROWS) -> np.ndarray:
    return np.array([np.concatenate([np.arange(length) for length in row]) for row in rows])


def spans(rows=ROWS):
    """Row, first and last position of each text."""
    for r, row in enumerate(rows):
        ends = np.cumsum(row)
        yield from ((r, int(end - length), int(end)) for length, end in zip(row, ends, strict=True))


def tensors(dtype=torch.float64, rows=ROWS):
    torch.manual_seed(0)
    return [torch.randn(len(rows), HEADS, sum(rows[0]), WIDTH, dtype=dtype, requires_grad=True) for _ in range(3)]


def textbook(query, key, value, rows=ROWS):
    """softmax(Q K' / sqrt(d)) V of each text, nothing of the future seen: (B, T, heads, d)."""
    out = torch.zeros_like(query)
    for r, first, last in spans(rows):
        q, k, v = (x[r, :, first:last] for x in (query, key, value))
        scores = q @ k.mT / WIDTH**0.5
        future = torch.ones(scores.shape[-2:]).triu(1).bool()
        out[r, :, first:last] = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
    return out.transpose(1, 2)


def mask_of(rows=ROWS) -> torch.Tensor:
    """(B, 1, T, T): True where a position sees another."""
    mask = torch.zeros(len(rows), 1, sum(rows[0]), sum(rows[0]), dtype=torch.bool)
    for r, first, last in spans(rows):
        mask[r, 0, first:last, first:last] = torch.ones(last - first, last - first).tril().bool()
    return mask


def gradients(out, parts):
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    return torch.autograd.grad((out.double() * weights).sum(), parts)


@pytest.mark.parametrize("rows", [ROWS, [[16], [16]], [[1] * 16]])
def test_by_text_outputs_and_gradients_are_the_textbooks(rows):
    parts = tensors(rows=rows)
    found, wanted = attention.attend_by_text(*parts, 0.0, None, packing_of(positions(rows))), textbook(*parts, rows)
    torch.testing.assert_close(found, wanted)
    for ours, theirs in zip(gradients(found, parts), gradients(wanted, parts), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_by_products_outputs_and_gradients_are_the_textbooks():
    parts = tensors()
    found, wanted = attention.attend_by_products(*parts, mask_of(), 0.0, None).transpose(1, 2), textbook(*parts)
    torch.testing.assert_close(found, wanted)
    for ours, theirs in zip(gradients(found, parts), gradients(wanted, parts), strict=True):
        torch.testing.assert_close(ours, theirs)
    causal = attention.attend_by_products(*parts, None, 0.0, 0.3)
    torch.testing.assert_close(causal, F.scaled_dot_product_attention(*parts, is_causal=True, scale=0.3))


def test_groups_hold_every_position_once_and_less_than_half_of_their_places_are_blank():
    packing = packing_of(positions())
    assert packing.places[packing.back].tolist() == list(range(4 * 16))
    filled = sorted(set(range(len(packing.places))) - set(packing.blanks.tolist()))
    assert filled == sorted(packing.back.tolist())
    assert sum(n * length for n, length in packing.shapes) == len(packing.places) < 2 * 4 * 16
    assert packing_of(positions([[16], [16]])).shapes == ()


def test_a_blank_place_gives_no_gradient_to_the_position_that_it_repeats():
    rows = [[3, 4]]  # one group of length 4: a blank behind the first text
    packing = packing_of(positions(rows))
    assert packing.shapes == ((2, 4),) and packing.blanks.tolist() == [3]
    parts = tensors(rows=rows)
    out = attention.attend_by_text(*parts, 0.0, None, packing)
    for ours, theirs in zip(gradients(out, parts), gradients(textbook(*parts, rows), parts), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("way", ["packing", "mask"])
def test_a_model_has_the_losses_and_gradients_of_transformers_own_attention(way):
    rows = packed_texts()
    theirs, ours = CausalLM(toy_gpt2(), []), CausalLM(toy_gpt2(), [])
    theirs.lm.config._attn_implementation = "eager"
    batch = collate(rows, 32)
    told = {"packing": batch.packing} if way == "packing" else {}
    wanted, found = theirs(**batch.inputs), ours(**batch.inputs, **told)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-6)
    wanted.backward(), found.backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("by_text", [True, False])
@pytest.mark.parametrize("rows", [ROWS, [[16], [16]]])
def test_dropout_falls_on_the_weights_of_texts_and_changes_no_mean(rows, by_text):
    """Over 100 draws, 6 standard errors."""
    parts, packing, mask = [x.detach() for x in tensors(rows=rows)], packing_of(positions(rows)), mask_of(rows)
    torch.manual_seed(1)
    draws = torch.stack([
        attention.attend_by_text(*parts, 0.5, None, packing) if by_text
        else attention.attend_by_products(*parts, mask, 0.5, None).transpose(1, 2)
        for _ in range(100)
    ])  # fmt: skip
    exact = textbook(*parts, rows)
    assert (draws[0] - exact).abs().max() > 0.5 and (draws.std(0) > 0).all()
    assert ((draws.mean(0) - exact).abs() < 6 * draws.std(0) / 10).all()


@pytest.mark.parametrize(
    ("dtype", "length", "dropout", "needs_gradient", "products"),
    [(torch.bfloat16, 512, 0.0, True, True), (torch.bfloat16, 513, 0.0, True, False),
     (torch.bfloat16, 8, 0.0, False, False), (torch.float32, 8, 0.0, True, False),
     (torch.float32, 513, 0.1, True, True), (torch.bfloat16, 513, 0.1, False, True)],
)  # fmt: skip
def test_products_are_for_dropout_and_short_rows_in_16_bit_that_learn(
    monkeypatch, dtype, length, dropout, needs_gradient, products
):
    asked = []
    monkeypatch.setattr(attention, "attend_by_products", lambda *args: asked.append(1) or args[0])
    query = torch.zeros(1, 1, length, 4, dtype=dtype, requires_grad=needs_gradient)
    module = nn.Module()
    module.is_causal = True
    out, _ = attention.attend(module, query, query, query, None, dropout)
    assert bool(asked) == products and out.shape == (1, length, 1, 4)


def test_a_batch_brings_its_packing_to_a_gpu_and_to_no_cpu(monkeypatch):
    batch = collate(packed_texts(), 32)
    assert set(batch.to(torch.device("cpu"))) == set(batch.inputs)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: tensor)
    assert batch.to(torch.device("cuda"))["packing"] == batch.packing.to(torch.device("cuda"))
