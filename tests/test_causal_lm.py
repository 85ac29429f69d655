"""The head that makes losses in chunks, against torch's cross entropy of whole logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import causal_lm
from models.causal_lm import Head

VOCAB, WIDTH, SILENT = 37, 8, [0, 36]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(causal_lm, "CHUNK", 4)
    monkeypatch.setattr(causal_lm, "MULTIPLE", 4)


def head(silent=SILENT, dtype=torch.float32):
    torch.manual_seed(0)
    return Head(nn.Linear(WIDTH, VOCAB, bias=False), silent).to(dtype)


def inputs(num: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(num)
    hidden = torch.randn(num, WIDTH, generator=generator).to(dtype).requires_grad_()
    return hidden, torch.randint(1, VOCAB - 1, (num,), generator=generator)


def whole(layer, hidden, targets, reduction="sum"):
    """The definition, in the type that it is given."""
    logits = F.linear(hidden, layer.weight)
    logits[:, SILENT] = -torch.inf
    return F.cross_entropy(logits.float(), targets, reduction=reduction)


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors, allow_unused=True)


@pytest.mark.parametrize("num", [1, 4, 5, 11])
def test_losses_and_gradients_are_those_of_whole_logits(num):
    layer, (hidden, targets) = head(), inputs(num)
    ours, theirs = layer(hidden, targets) * 3, whole(layer, hidden, targets) * 3
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for found, wanted in zip(*(gradients(loss, hidden, layer.weight) for loss in (ours, theirs)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_all_losses_have_no_gradient_and_are_torchs():
    layer, (hidden, targets) = head(), inputs(11)
    ours = layer(hidden, targets, "none")
    assert not ours.requires_grad
    torch.testing.assert_close(ours, whole(layer, hidden, targets, "none"))


def test_without_targets_the_sum_is_zero_and_so_are_the_gradients():
    layer, (hidden, targets) = head(), inputs(0)
    loss = layer(hidden, targets)
    found = gradients(loss, hidden, layer.weight)
    assert loss.item() == 0 and found[0].shape == (0, WIDTH) and torch.equal(found[1], torch.zeros_like(layer.weight))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_what_is_frozen_costs_no_product(frozen):
    layer, (hidden, targets) = head(), inputs(9)
    hidden.requires_grad_(frozen == "weight")
    layer.weight.requires_grad_(frozen == "hidden")
    with torch.profiler.profile() as seen:
        loss = layer(hidden, targets)
    products = sum(event.count for event in seen.key_averages() if event.key in ("aten::mm", "aten::addmm"))
    assert products == 3 * (1 if frozen == "both" else 2)  # three chunks
    assert loss.requires_grad == (frozen != "both")


def test_under_no_grad_nothing_is_made_for_a_backward_pass():
    layer, (hidden, targets) = head(), inputs(9)
    with torch.no_grad(), torch.profiler.profile() as seen:
        layer(hidden, targets)
    assert sum(event.count for event in seen.key_averages() if event.key in ("aten::mm", "aten::addmm")) == 3


def exact_gradients(layer, hidden, targets):
    """In 64 bit, of the values that bfloat16 holds."""
    rounded = [part.detach().bfloat16().double().requires_grad_() for part in (hidden, layer.weight)]
    logits = F.linear(*rounded)
    logits[:, SILENT] = -torch.inf
    return gradients(F.cross_entropy(logits, targets, reduction="sum"), *rounded)


@pytest.mark.parametrize("num", [11, 300])  # 3 chunks and 75
@pytest.mark.parametrize("autocast", [True, False])
def test_in_bfloat16_gradients_are_as_near_to_exact_ones_as_those_of_whole_logits(autocast, num):
    """Sums over chunks are in 32 bit: in 16 bit the error would grow with their number."""
    dtype = torch.float32 if autocast else torch.bfloat16
    layer, (hidden, targets) = head(dtype=dtype), inputs(num, dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, theirs = layer(hidden, targets), whole(layer, hidden, targets)
    assert ours.dtype == torch.float32
    found, wanted = (gradients(loss, hidden, layer.weight) for loss in (ours, theirs))
    assert [part.dtype for part in found] == [dtype, dtype]
    for part, other, exact in zip(found, wanted, exact_gradients(layer, hidden, targets), strict=True):
        off, other_off = ((gradient - exact).norm().item() for gradient in (part, other))
        assert off <= 1.5 * other_off < 0.005 * exact.norm().item()


def test_in_float16_a_loss_scale_reaches_the_gradients_unspoilt():
    """A probability of 1e-7 is nothing in float16, unless it is scaled first."""
    layer, scale = head([]).half(), 2.0**12
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[5, 0] = 1.0
    hidden = torch.zeros(1, WIDTH, dtype=torch.float16)
    hidden[0, 0] = 18.0
    loss = layer(hidden, torch.tensor([5])) * scale
    (found,) = gradients(loss, layer.weight)
    small = torch.softmax(torch.tensor([18.0] + [0.0] * (VOCAB - 1)), 0)[1].item()
    assert found[7, 0].item() / scale == pytest.approx(18 * small, rel=0.1)


def test_positions_are_padded_by_zeros_to_a_multiple():
    """A CPU prepares its products anew for every number of rows."""
    assert causal_lm.padded(torch.ones(5, 2)).tolist() == [[1, 1]] * 5 + [[0, 0]] * 3
    assert [len(causal_lm.padded(torch.ones(num))) for num in (0, 1, 4, 8)] == [0, 4, 4, 8]


def test_no_tensor_has_all_logits():
    """11 positions, 4 at once."""
    layer, (hidden, targets) = head(), inputs(11)
    sizes = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor))
            return out

    with Seen():
        layer(hidden, targets).backward()
    assert max(sizes) == VOCAB * WIDTH  # the weight's gradient; four rows of logits are less
