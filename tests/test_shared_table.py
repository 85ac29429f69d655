"""The embedding and the head that share a table and its gradient: against transformers' own model."""

import pytest
import torch
import torch.nn.functional as F

from models import causal_lm
from models.causal_lm import CausalLM, shareable
from tests.helpers import toy_gpt2
from tests.toys import PAUSE, VOCAB

IDS = torch.tensor([[3, 5, 3, 3, 9, 5, 0, 95], [9, 9, 1, 2, 3, 4, 5, 6]])  # some of them often
DENSE = "aten::embedding_dense_backward"


def module(**pause):
    found = CausalLM(toy_gpt2(2, VOCAB), [], **pause)
    return found.eval()


def loss(causal_lm, ids=IDS):
    """Of every token but the first of each row."""
    places = torch.arange(ids.numel()).view_as(ids)[:, :-1].flatten()
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return causal_lm(ids, positions, places, ids[:, 1:].flatten())


def transformers_gradients(ids=IDS):
    lm = toy_gpt2(2, VOCAB).eval()
    logits = lm(ids).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    return {name: parameter.grad for name, parameter in lm.named_parameters()}


def test_gradients_are_those_of_transformers():
    ours = module()
    assert shareable(ours.lm.transformer.wte)
    loss(ours).backward()
    for name, wanted in transformers_gradients().items():
        torch.testing.assert_close(ours.lm.get_parameter(name).grad, wanted, rtol=1e-4, atol=1e-6)


def test_gradients_of_several_passes_add_up():
    ours, (first, second) = module(), IDS.split(1)
    for ids in (first, second):
        loss(ours, ids).backward()
    wanted = [transformers_gradients(ids)["transformer.wte.weight"] for ids in (first, second)]
    torch.testing.assert_close(ours.lm.transformer.wte.weight.grad, wanted[0] + wanted[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_gradients_are_those_without_it(dtype):
    """In 16 bit the head's gradient reaches the table through a cast."""
    ours = module()
    with torch.autocast("cpu", dtype):
        total = loss(ours)
    total.backward()
    found, wanted = ours.lm.transformer.wte.weight.grad, transformers_gradients()["transformer.wte.weight"]
    assert found.dtype == torch.float32 and (found - wanted).norm() < 0.02 * wanted.norm()


@pytest.mark.parametrize("shared", [True, False])
def test_only_positions_get_a_gradient_of_the_size_of_their_table(monkeypatch, shared):
    ours = module()
    if not shared:
        monkeypatch.setattr(causal_lm, "shareable", lambda embedding: False)
    with torch.profiler.profile() as seen:
        loss(ours).backward()
    assert sum(event.count for event in seen.key_averages() if event.key == DENSE) == (1 if shared else 2)


def test_a_row_that_pauses_by_itself_gets_its_own_gradient():
    ours, ids = module(pause_id=PAUSE), IDS.clone()
    ids[0, 2] = PAUSE
    ours.separate_pause_row()
    assert not shareable(ours.lm.transformer.wte)
    loss(ours, ids).backward()
    row = ours.lm.transformer.wte.pause_row.grad[0]
    assert row.abs().max() > 0 and torch.isfinite(row).all()


@pytest.mark.parametrize("why", ["frozen", "not here", "a view of another tensor", "nothing is learnt"])
def test_an_embedding_stays_as_it_is_where(why):
    embedding = module().lm.transformer.wte
    if why == "frozen":
        embedding.weight.requires_grad_(False)
    if why == "not here":  # as DeepSpeed's ZeRO-3 has it between its calls
        embedding.weight.data = torch.empty(0)
    if why == "a view of another tensor":  # as fairscale has it
        weight = embedding.weight.data
        del embedding.weight
        embedding.weight = weight.view(-1).requires_grad_()[:].view_as(weight)
    with torch.set_grad_enabled(why != "nothing is learnt"):
        assert not shareable(embedding)


def test_frozen_tables_get_no_gradient():
    ours = module()
    ours.lm.transformer.wte.weight.requires_grad_(False)
    loss(ours).backward()
    assert ours.lm.transformer.wte.weight.grad is None and ours.lm.transformer.h[0].mlp.c_fc.weight.grad is not None
