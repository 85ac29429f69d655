"""The learning rate against transformers' schedulers, and the parameter groups."""

import pytest
import torch
from torch import nn
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from kozero.config import TrainingArguments
from kozero.engines.torch_engine import total_norm
from kozero.optim import build_optimizer, parameter_groups, schedule
from models.causal_lm import CausalLM
from tests.helpers import toy_gpt2

TOTAL, PEAK = 40, 3e-4
REFERENCE = {
    "linear": lambda optimizer, warmup: get_linear_schedule_with_warmup(optimizer, warmup, TOTAL),
    "cosine": lambda optimizer, warmup: get_cosine_schedule_with_warmup(optimizer, warmup, TOTAL),
    "constant": lambda optimizer, warmup: get_constant_schedule_with_warmup(optimizer, warmup),
}


def rates(kind: str, warmup: float, total: int = TOTAL) -> list[float]:
    lr_at = schedule(TrainingArguments(lr_scheduler_type=kind, warmup_steps=warmup, learning_rate=PEAK), total)
    return [lr_at(step) for step in range(total)]


@pytest.mark.parametrize("kind", REFERENCE)
@pytest.mark.parametrize("warmup", [0, 1, 7, 40])
def test_rates_are_those_of_transformers_at_every_step(kind, warmup):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = REFERENCE[kind](optimizer, warmup)
    expected = []
    for _step in range(TOTAL):
        expected.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates(kind, warmup) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("share", "steps"), [(0.1, 4), (0.11, 5), (0.5, 20), (0.001, 1)])
def test_a_warm_up_below_one_is_a_share_of_all_steps_rounded_up(share, steps):
    assert rates("linear", share) == rates("linear", steps)


def test_the_peak_is_reached_after_the_warm_up_and_the_end_is_not_negative():
    assert rates("linear", 4)[4] == PEAK
    lr_at = schedule(TrainingArguments(learning_rate=PEAK), TOTAL)
    assert lr_at(TOTAL) == lr_at(TOTAL + 5) == 0.0


def test_a_warm_up_longer_than_the_run_only_rises():
    rising = rates("cosine", 100)
    assert rising == sorted(rising)
    assert rising[-1] < PEAK


def test_matrices_decay_and_vectors_do_not():
    model = CausalLM(toy_gpt2(), [])
    decayed, plain = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[id(p)].endswith("weight") for p in decayed["params"])
    assert all(names[id(p)].endswith("bias") or ".ln_" in names[id(p)] for p in plain["params"])


def test_every_trainable_parameter_is_in_one_group_tied_weights_once():
    model = CausalLM(toy_gpt2(), [])
    model.lm.transformer.wpe.weight.requires_grad_(False)
    grouped = [p for group in parameter_groups(model, 0.1) for p in group["params"]]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sorted(map(id, grouped)) == sorted(map(id, trainable))
    assert len(set(map(id, grouped))) == len(grouped)


def test_empty_groups_are_left_out():
    module = nn.Linear(3, 2, bias=False)
    assert len(parameter_groups(module, 0.1)) == 1


def test_adamw_steps_as_torch_does():
    """One update by hand: with bias correction the first step is lr times the sign, plus decoupled decay."""
    parameter = nn.Parameter(torch.tensor([[1.0, -2.0]]))
    arguments = TrainingArguments(learning_rate=0.01, adam_epsilon=1e-30)
    optimizer = build_optimizer([{"params": [parameter], "weight_decay": 0.1}], arguments)
    parameter.grad = torch.tensor([[0.5, -0.3]])
    optimizer.step()
    expected = torch.tensor([[1.0 * (1 - 0.001) - 0.01, -2.0 * (1 - 0.001) + 0.01]])
    torch.testing.assert_close(parameter.detach(), expected)


def test_adamw_is_one_kernel_over_all_parameters():
    parameters = [nn.Parameter(torch.ones(3)) for _ in range(5)]
    optimizer = build_optimizer([{"params": parameters}], TrainingArguments())
    for parameter in parameters:
        parameter.grad = torch.ones(3)
    with torch.profiler.profile() as seen:
        optimizer.step()
    calls = {event.key: event.count for event in seen.key_averages()}
    assert calls.get("aten::_fused_adamw_") == 1


def test_betas_and_epsilon_come_from_the_arguments():
    arguments = TrainingArguments(adam_beta1=0.8, adam_beta2=0.95, adam_epsilon=1e-6)
    optimizer = build_optimizer([{"params": [nn.Parameter(torch.zeros(1))]}], arguments)
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.8, 0.95), 1e-6)


def test_sgd_has_no_momentum():
    parameter = nn.Parameter(torch.tensor([1.0]))
    optimizer = build_optimizer([{"params": [parameter]}], TrainingArguments(optim="sgd", learning_rate=0.1))
    for _step in range(2):
        parameter.grad = torch.tensor([1.0])
        optimizer.step()
    assert parameter.item() == pytest.approx(0.8)


def test_the_norm_of_large_gradients_is_that_of_64_bit():
    """torch's own is 6e-4 too small here."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(shape, generator=generator) for shape in ((8192, 256), (256,), ())]
    exact = torch.cat([gradient.flatten() for gradient in gradients]).double().norm()
    assert total_norm(gradients).item() == pytest.approx(exact.item(), rel=1e-6)
    assert total_norm([]).item() == 0.0
