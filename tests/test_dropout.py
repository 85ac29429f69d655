"""models.dropout: against the definition, by counting."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.causal_lm import CausalLM
from models.dropout import STEPS, Dropout, drop
from tests.toys import toy_gpt2

RATES = (0.1, 0.25, 0.5, 0.9)


def kept(rate, *size, seed=0):
    torch.manual_seed(seed)
    return drop(torch.ones(*size), rate) != 0


@pytest.mark.parametrize("rate", RATES)
def test_of_all_values_of_the_bits_the_rate_drops_its_share(monkeypatch, rate):
    every = torch.arange(-STEPS // 2, STEPS // 2).to(torch.int16)
    monkeypatch.setattr(torch.Tensor, "random_", lambda bits, *limits: bits.copy_(every.view(torch.int64)))
    found = drop(torch.ones(STEPS), rate)
    assert int((found == 0).sum()) == round(rate * STEPS)
    assert found.double().mean().item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elements_are_zero_or_scaled(rate, dtype):
    x = torch.randn(257, 129, dtype=dtype)
    found = drop(x, rate)
    torch.testing.assert_close(found[found != 0], (x / (1 - rate))[found != 0], rtol=1e-2, atol=0)
    deviation = (rate * (1 - rate) / x.numel()) ** 0.5
    assert abs((found == 0).double().mean().item() - rate) < 5 * deviation


@pytest.mark.parametrize("apart", [1, 2, 3, 4, 8, 768])
def test_elements_are_dropped_independently(apart):
    """Of pairs, all lanes of the 64 bit of one draw among them, both stay as often as two coins say."""
    mask = kept(0.5, 1 << 20)
    both = (mask[:-apart] & mask[apart:]).double().mean().item()
    assert abs(both - 0.25) < 5 * (0.25 * 0.75 / len(mask)) ** 0.5 * 2  # neighbouring pairs share an element


def test_masks_follow_the_seed_and_differ_between_calls():
    assert torch.equal(kept(0.3, 99), kept(0.3, 99)) and not torch.equal(kept(0.3, 99), kept(0.3, 99, seed=1))
    torch.manual_seed(0)
    first, second = (drop(torch.ones(99), 0.3) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("size", [(0,), (1,), (3,), (5, 7), (2, 3, 4)])
def test_gradients_are_those_of_differences(size):
    def seeded(x):
        torch.manual_seed(3)
        return drop(x, 0.4)

    x = torch.randn(*size, dtype=torch.float64, requires_grad=True)
    assert seeded(x).shape == size and (not x.numel() or torch.autograd.gradcheck(seeded, x))


def test_a_transposed_input_keeps_its_places():
    x = torch.arange(1.0, 13).view(3, 4).T
    found = drop(x, 0.5)
    assert torch.equal(found[found != 0], 2 * x[found != 0])


def test_recomputed_activations_draw_the_same_mask():
    x = torch.ones(64, requires_grad=True)
    found = checkpoint(lambda x: drop(x * 3, 0.5), x, use_reentrant=False)
    (grad,) = torch.autograd.grad(found.sum(), x)
    assert torch.equal(grad, found.detach()) and 0 < int((grad == 0).sum()) < 64


@pytest.mark.parametrize(("rate", "training"), [(0.0, True), (0.5, False)])
def test_nothing_is_dropped_at_rate_0_or_outside_of_training(rate, training):
    layer, x = Dropout(rate).train(training), torch.ones(8)
    state = torch.get_rng_state()
    assert torch.equal(layer(x), x) and torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("rate", [1 - 1e-9, 1.0])
def test_a_rate_of_1_or_next_to_it_leaves_nothing_and_no_infinity(rate):
    assert torch.equal(drop(torch.ones(1000), rate), torch.zeros(1000))


def test_a_gpt2_has_no_other_dropout_and_keeps_its_rates():
    gpt2 = toy_gpt2()
    wanted = [(name, m.p) for name, m in gpt2.named_modules() if isinstance(m, nn.Dropout)]
    replaced = {name: m for name, m in CausalLM(gpt2.eval(), []).lm.named_modules() if type(m) is Dropout}
    assert [(name, m.p) for name, m in replaced.items()] == wanted and wanted
    assert not any(m.training for m in replaced.values())
