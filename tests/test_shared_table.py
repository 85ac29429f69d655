"""The embedding and the head that share a table and its gradient: against transformers' own model."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from models import causal_lm
from models.causal_lm import CausalLM, shareable
from tests.helpers import toy_gpt2
from tests.ranks import run_ranks
from tests.toys import PAUSE, VOCAB, arguments, deal, engine_for, steps, toy

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
        torch.testing.assert_close(ours.lm.get_parameter(name).grad, wanted, rtol=1e-4, atol=1e-5)


def test_gradients_of_several_passes_add_up():
    ours, (first, second) = module(), IDS.split(1)
    for ids in (first, second):
        loss(ours, ids).backward()
    wanted = [transformers_gradients(ids)["transformer.wte.weight"] for ids in (first, second)]
    torch.testing.assert_close(ours.lm.transformer.wte.weight.grad, wanted[0] + wanted[1], rtol=1e-4, atol=1e-5)


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


def test_weights_of_16_bit_have_gradients_of_16_bit():
    """As DeepSpeed holds them."""
    ours = module().bfloat16()
    loss(ours).backward()
    found, wanted = ours.lm.transformer.wte.weight.grad, transformers_gradients()["transformer.wte.weight"]
    assert found.dtype == torch.bfloat16 and (found.float() - wanted).norm() < 0.03 * wanted.norm()


def test_a_row_that_pauses_by_itself_keeps_its_own_gradient():
    """Beside a frozen table: what the table would get there from the embedding, without the head."""
    ours, ids = module(pause_id=PAUSE), IDS.clone()
    ids[0, 2] = PAUSE
    ours.separate_pause_row()
    ours.lm.transformer.wte.weight.requires_grad_(False)
    loss(ours, ids).backward()
    untied = toy_gpt2(2, VOCAB).eval()
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight.detach().clone())
    logits = untied(ids).logits[:, :-1]
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
    wanted = untied.transformer.wte.weight.grad[PAUSE]
    torch.testing.assert_close(ours.lm.transformer.wte.pause_row.grad[0], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("why", ["frozen", "a row apart", "gathered for its module alone", "nothing is learnt"])
def test_an_embedding_stays_as_it_is_where(why):
    ours = module(pause_id=PAUSE)
    if why == "a row apart":
        ours.separate_pause_row()
    embedding = ours.lm.transformer.wte
    if why == "frozen":
        embedding.weight.requires_grad_(False)
    if why == "gathered for its module alone":
        embedding.weight.ds_id = 0  # as DeepSpeed's ZeRO-3 marks what it shards
    with torch.set_grad_enabled(why != "nothing is learnt"):
        assert not shareable(embedding)


def external_parameters() -> list[str]:
    """What ZeRO-3 holds for a module beside its own, after a step in which every parameter is sharded."""
    said = arguments("zero3")
    values = json.loads(Path(said.deepspeed_config).read_text(encoding="utf-8"))
    values["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "zero3.json"
        path.write_text(json.dumps(values), encoding="utf-8")
        engine, sizes = engine_for("zero3", toy(), replace(said, deepspeed_config=str(path)))
    engine.train_step(deal(steps(1)[0], sizes), 0.1)
    held = [name for name, part in engine.module.named_modules() if getattr(part, "_external_params", None)]
    engine.close()
    return held


def test_zero_3_need_not_keep_the_table_for_the_whole_model():
    """It does, from the forward pass to the backward one, once somebody reads the weight outside of its module."""
    assert run_ranks(external_parameters) == [[], []]
