"""The Switch encoder against references that loop over tokens, experts and heads, and against its promises."""

import dataclasses
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, AutoModel

from kozero import distributed
from kozero.engines.units import layers as units
from kozero.errors import UserError
from models import transformer
from models.transformer import (
    POST_NORM,
    PRE_NORM,
    ResidualAttention,
    SwitchFeedForward,
    TransformerConfig,
    TransformerEncoder,
    route,
    router_losses,
)
from tests.helpers import ROOT
from tests.ranks import run_ranks

TINY = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_heads": 2, "ff_dim": 24, "n_experts": 3,
    "capacity_factor": 0.8, "dropout_prob": 0.0, "initializer_range": 0.3, "max_position_embeddings": 12,
}  # fmt: skip
ACTIVATIONS = {"gelu": nn.GELU(), "relu": nn.ReLU(), "swish": nn.SiLU()}
SWITCH = ["router.weight", "w_in", "w_out"]


def tiny(**changes) -> TransformerConfig:
    return TransformerConfig(**TINY | changes)


def encoder(seed: int = 0, **changes) -> TransformerEncoder:
    torch.manual_seed(seed)
    model = TransformerEncoder(tiny(**changes))
    for name, p in model.named_parameters():  # so that no norm or bias is a unit that hides a mistake
        if p.dim() == 1:
            nn.init.normal_(p, mean=float(name.endswith("weight")), std=0.2)
    return model


def switch(seed: int = 0, **changes) -> SwitchFeedForward:
    return encoder(seed, num_hidden_layers=1, **changes).layers[0].feed_forward


def texts(*lengths: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids (B, T) of texts of these lengths, with words at the padding too, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 40, (len(lengths), max(lengths)), generator=generator)
    return ids, (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


# References


def reference_switch(layer: SwitchFeedForward, tokens: torch.Tensor, act_fn: str, capacity: float):
    """(N, H) real tokens one after the other: outputs, the choice of each, and which were dropped."""
    taken = [0] * len(layer.w_in)
    outputs, choices, dropped = [], [], []
    for x in tokens:
        probabilities = (layer.router.weight @ x).softmax(0)
        expert = int(probabilities.argmax())
        choices.append(expert)
        dropped.append(taken[expert] >= capacity)
        taken[expert] += not dropped[-1]
        y = ACTIVATIONS[act_fn](x @ layer.w_in[expert]) @ layer.w_out[expert]
        outputs.append(x * 0 if dropped[-1] else y * probabilities[expert])
    return torch.stack(outputs), choices, dropped


def reference_losses(layer: SwitchFeedForward, tokens: torch.Tensor, choices: list[int]) -> list[float]:
    """Load-balance loss and router z-loss, token by token."""
    logits = [(layer.router.weight @ x).tolist() for x in tokens]
    sums = [sum(map(math.exp, row)) for row in logits]
    experts = range(len(layer.w_in))
    mean = [sum(math.exp(row[e]) / total for row, total in zip(logits, sums, strict=True)) / len(sums) for e in experts]
    balance = len(experts) * sum(choices.count(e) / len(sums) * mean[e] for e in experts)
    return [balance, sum(math.log(total) ** 2 for total in sums) / len(sums)]


def test_scores_go_on_in_32_bit_from_a_layer_in_16_bit():
    """A sum of as many terms as there are layers: beside 100, bf16 would keep steps of 0.5 only."""
    torch.manual_seed(0)
    attention = ResidualAttention(tiny()).bfloat16().eval()
    hidden = torch.randn(2, 5, tiny().hidden_size).bfloat16()
    previous = torch.full((2, tiny().num_heads, 5, 5), 100.0)
    _, own = attention(hidden, None, None)
    _, summed = attention(hidden, previous, None)
    assert own.dtype == summed.dtype == torch.float32
    assert torch.equal(summed, previous + own) and own.unique().numel() > 10


def reference_attention(layer: ResidualAttention, x: torch.Tensor, previous: list[torch.Tensor], seen: torch.Tensor):
    """(T, H) of one text, head by head; `seen` (T, T) says which keys each query sees."""
    size = x.shape[1] // layer.num_heads
    q, k, v = layer.query_key_value(x).chunk(3, dim=1)
    contexts, scores = [], []
    for head in range(layer.num_heads):
        columns = slice(head * size, (head + 1) * size)
        score = q[:, columns] @ k[:, columns].T / math.sqrt(size) + previous[head]
        weights = score.masked_fill(~seen, -torch.inf).softmax(1)
        contexts.append(weights @ v[:, columns])
        scores.append(score)
    return layer.output(torch.cat(contexts, dim=1)), scores


def norm(x: torch.Tensor, layer: nn.LayerNorm) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt() * layer.weight + layer.bias


def reference_encoder(model: TransformerEncoder, ids: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
    """(T,) ids of one text alone, without capacity: (T, H)."""
    config, tables = model.config, model.embeddings
    x = norm(tables.tokens.weight[ids] + tables.positions.weight[: len(ids)] + tables.types.weight[types], tables.norm)
    x = tables.projection(x)
    seen = torch.ones(len(ids), len(ids), dtype=torch.bool)
    seen = seen.tril() if config.causal else seen
    scores = [torch.zeros(len(ids), len(ids))] * config.num_heads
    for layer in model.layers:
        if config.ln_pos == PRE_NORM:
            added, scores = reference_attention(layer.attention, norm(x, layer.attention_norm), scores, seen)
            x = x + added
            tokens = norm(x, layer.feed_forward_norm)
            x = x + reference_switch(layer.feed_forward, tokens, config.act_fn, math.inf)[0]
        else:
            added, scores = reference_attention(layer.attention, x, scores, seen)
            x = norm(x + added, layer.attention_norm)
            x = norm(x + reference_switch(layer.feed_forward, x, config.act_fn, math.inf)[0], layer.feed_forward_norm)
    return norm(x, model.norm) if config.ln_pos == PRE_NORM else x


# The Switch layer


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize(("act_fn", "training"), [("gelu", True), ("relu", True), ("swish", False)])
def test_switch_layer_equals_a_loop_over_tokens(monkeypatch, grouped, act_fn, training):
    if not grouped:
        monkeypatch.setattr(transformer, "has_grouped_product", lambda x, weight: False)
    layer = switch(act_fn=act_fn).train(training)
    torch.manual_seed(2)
    hidden = torch.randn(2, 9, 16, requires_grad=True)
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4]).bool()
    outputs, losses, load, dropped = layer(hidden, mask.flatten().nonzero().squeeze(1))

    capacity = math.ceil(0.8 * 14 / 3) if training else math.inf
    expected, choices, drops = reference_switch(layer, hidden[mask], act_fn, capacity)
    assert any(drops) == training
    torch.testing.assert_close(outputs[mask], expected)
    assert not outputs[~mask].any()
    assert not outputs[mask][torch.tensor(drops)].any()
    assert load.tolist() == pytest.approx([choices.count(e) / 14 for e in range(3)])
    assert dropped.item() == pytest.approx(sum(drops) / 14)
    assert losses.tolist() == pytest.approx(reference_losses(layer, hidden[mask], choices))

    parameters = [hidden, *layer.parameters()]
    direction = torch.randn(14, 16)
    gradients = torch.autograd.grad((outputs[mask] * direction).sum(), parameters, retain_graph=True)
    of_reference = torch.autograd.grad((expected * direction).sum(), parameters)
    torch.testing.assert_close(gradients, of_reference)
    assert not gradients[0][~mask].any()


def test_capacity_counts_real_tokens_and_the_last_of_the_batch_are_dropped():
    layer = switch(n_experts=2, capacity_factor=0.8)
    nn.init.zeros_(layer.router.weight)
    layer.router.weight.data[0] = 1.0  # a positive token goes to expert 0
    hidden = torch.rand(2, 8, 16)
    real = torch.tensor([0, 1, 2, 3, 8, 9, 10, 11, 12, 13])  # 10 tokens: ceil(0.8 * 10 / 2) = 4 places
    outputs, _, load, dropped = layer.train()(hidden, real)
    assert outputs.abs().sum(-1).nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [0, 3]]
    assert (load.tolist(), dropped.item()) == ([1.0, 0.0], pytest.approx(0.6))
    assert layer.eval()(hidden, real)[3] == 0


def test_an_expert_without_tokens_has_zero_gradients():
    layer = switch(n_experts=2)
    nn.init.zeros_(layer.router.weight)
    layer.router.weight.data[0] = 1.0
    for product in (True, False):
        layer.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transformer, "has_grouped_product", lambda x, weight, product=product: product)
            layer(torch.rand(1, 6, 16))[0].sum().backward()
        assert layer.w_in.grad[0].any() and layer.w_out.grad[0].any()
        assert not layer.w_in.grad[1].any() and not layer.w_out.grad[1].any()


@pytest.mark.parametrize("grouped", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_no_real_token_at_all(monkeypatch, grouped, training):
    monkeypatch.setattr(transformer, "has_grouped_product", lambda x, weight: grouped)
    layer = switch().train(training)
    outputs, losses, load, dropped = layer(torch.rand(1, 4, 16), torch.zeros(0, dtype=torch.long))
    (outputs.sum() + losses.sum()).backward()
    assert not any(value.any() for value in (outputs, losses, load, dropped))
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


def test_router_losses_by_hand():
    three = math.log(3.0)  # probabilities 3/4 and 1/4, sum of exponentials 4
    even = torch.tensor([[three, 0.0], [0.0, three]])
    assert router_losses(even, torch.tensor([0.5, 0.5])).tolist() == pytest.approx([1.0, math.log(4) ** 2])
    skewed = torch.tensor([[three, 0.0], [three, 0.0]])  # 2 * (1 * 3/4 + 0 * 1/4)
    assert router_losses(skewed, torch.tensor([1.0, 0.0])).tolist() == pytest.approx([1.5, math.log(4) ** 2])
    mixed = torch.tensor([[three, 0.0], [0.0, 0.0]])  # 2 * (1 * 5/8); (log 4)^2 and (log 2)^2
    expected = [1.25, (math.log(4) ** 2 + math.log(2) ** 2) / 2]
    assert router_losses(mixed, torch.tensor([1.0, 0.0])).tolist() == pytest.approx(expected)


def test_routing_is_sorted_by_expert_and_place():
    choices = torch.tensor([2, 0, 2, 2, 0])
    routing = route(F.one_hot(choices, 4).float() * 5, capacity=2)
    assert routing.order.tolist() == [1, 4, 0, 2, 3]
    assert routing.expert.tolist() == [0, 0, 2, 2, 2]
    assert (routing.ends.tolist(), routing.sizes.tolist()) == ([2, 2, 5, 5], [2, 0, 3, 0])
    assert routing.position.tolist() == [0, 1, 0, 1, 2]
    assert routing.kept.tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_routes_alike_and_stays_near(monkeypatch, dtype):
    layer = switch()
    hidden = torch.randn(2, 9, 16)
    exact = layer(hidden)
    outputs = {}
    for grouped in (True, False):
        monkeypatch.setattr(transformer, "has_grouped_product", lambda x, weight, grouped=grouped: grouped)
        with torch.autocast("cpu", dtype):
            outputs[grouped], losses, load, dropped = layer(hidden)
        assert outputs[grouped].dtype == dtype and losses.dtype == torch.float32
        torch.testing.assert_close((losses, load, dropped), exact[1:])
        torch.testing.assert_close(outputs[grouped].float(), exact[0], rtol=0.05, atol=0.05)
    torch.testing.assert_close(outputs[True], outputs[False])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_router_of_low_precision_weights_computes_in_32_bit(dtype):
    layer, hidden = switch().to(dtype), torch.randn(1, 9, 16).to(dtype)
    losses = layer(hidden)[1]
    expected = router_losses(hidden[0].float() @ layer.router.weight.float().T, layer(hidden)[2])
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_encoder_trains_in_lower_precision(dtype, autocast):
    model = encoder(initializer_range=0.02)
    ids, mask = texts(9, 4)
    exact = model.eval()(ids, mask).last_hidden_state
    model = model if autocast else model.to(dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        near = model(ids, mask).last_hidden_state
        output = model.train()(ids, mask)
    assert near.dtype == (torch.float32 if autocast else dtype) and output.router_losses.dtype == torch.float32
    torch.testing.assert_close(near.float()[mask.bool()], exact[mask.bool()], rtol=0.05, atol=0.05)
    (output.last_hidden_state.sum() + output.router_losses.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_widths_that_the_grouped_product_cannot_take():
    layer = switch(hidden_size=10, ff_dim=7)
    hidden = torch.randn(1, 6, 10)
    torch.testing.assert_close(layer.eval()(hidden)[0][0], reference_switch(layer, hidden[0], "gelu", math.inf)[0])


# Attention and the encoder


def test_attention_adds_the_scores_of_the_layer_below_before_the_mask():
    layers = [encoder(seed).layers[0].attention for seed in range(3)]
    x = torch.randn(1, 5, 16)
    seen = torch.ones(5, 5).bool().tril()
    scores, expected = None, [torch.zeros(5, 5)] * 2
    for layer in layers:
        y, scores = layer(x, scores, ~seen[None, None])
        by_hand, expected = reference_attention(layer, x[0], expected, seen)
        torch.testing.assert_close(y[0], by_hand)
        torch.testing.assert_close(scores[0], torch.stack(expected))


@pytest.mark.parametrize(
    "changes",
    [
        {"ln_pos": PRE_NORM},
        {"ln_pos": POST_NORM},
        {"ln_pos": PRE_NORM, "causal": True, "act_fn": "relu", "embedding_size": 8, "num_hidden_layers": 4},
        {"ln_pos": POST_NORM, "causal": True, "act_fn": "swish", "embedding_size": 16, "layer_group": 2},
        {"ln_pos": POST_NORM, "num_hidden_layers": 5, "layer_group": 2},
    ],
)
def test_encoder_equals_the_reference_text_by_text(changes):
    model = encoder(**changes).eval()
    ids, mask = texts(11, 6, 1)
    types = (torch.arange(11) > 3).long().expand_as(ids)
    hidden = model(ids, mask, types).last_hidden_state
    for row, length in enumerate(mask.sum(1)):
        expected = reference_encoder(model, ids[row, :length], types[row, :length])
        torch.testing.assert_close(hidden[row, :length], expected, rtol=1e-4, atol=1e-5)


def test_segments_and_mask_are_optional():
    model = encoder().eval()
    ids, _ = texts(7, 7)
    plain = model(ids)
    full = model(ids, torch.ones_like(ids), torch.zeros_like(ids))
    torch.testing.assert_close(dict(plain), dict(full))


@pytest.mark.parametrize("causal", [False, True])
def test_the_vectors_of_a_text_do_not_depend_on_its_batch(causal):
    model = encoder(causal=causal, capacity_factor=0.1).eval()
    ids, mask = texts(12, 5, 0, 9)
    output = model(ids, mask)
    assert output.last_hidden_state.isfinite().all() and not output.dropped.any()
    for row, length in enumerate(mask.sum(1).tolist()):
        alone = model(ids[row : row + 1, :length]).last_hidden_state[0] if length else torch.zeros(0, 16)
        torch.testing.assert_close(output.last_hidden_state[row, :length], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_padding_changes_nothing(training):
    model = encoder().train(training)
    ids, mask = texts(8, 3)
    wide = [F.pad(part, (0, 4), value=value) for part, value in ((ids, 5), (mask, 0))]
    narrow, wide = model(ids, mask), model(*wide)
    real = mask.bool()
    torch.testing.assert_close(wide.last_hidden_state[:, :8][real], narrow.last_hidden_state[real])
    for name in ("router_losses", "expert_load", "dropped"):
        torch.testing.assert_close(wide[name], narrow[name])


@pytest.mark.parametrize("causal", [False, True])
def test_no_token_sees_what_stands_at_padding(causal):
    model = encoder(causal=causal).train()
    ids, mask = texts(9, 4)
    ids, mask = ids.flip(1), mask.flip(1)  # to the left, where causal tokens look
    other = torch.where(mask.bool(), ids, ids % 39 + 1)
    before, after = (model(x, mask).last_hidden_state[mask.bool()] for x in (ids, other))
    assert torch.equal(before, after)


def test_a_later_token_changes_nothing_earlier_when_causal():
    ids, _ = texts(10)
    changed = ids.clone()
    changed[0, 6] = ids[0, 6] % 39 + 1
    for causal in (True, False):
        model = encoder(causal=causal).eval()
        before, after = (model(x).last_hidden_state[0] for x in (ids, changed))
        assert torch.equal(before[:6], after[:6]) == causal
        assert not torch.allclose(before[6:], after[6:])


def test_statistics_of_the_layers():
    model = encoder(num_hidden_layers=3).train()
    ids, mask = texts(9, 5)
    seen = []
    for layer in model.layers:
        layer.feed_forward.register_forward_hook(lambda _, __, outputs: seen.append(outputs[1:]))
    output = model(ids, mask)
    losses, load, dropped = (torch.stack(values) for values in zip(*seen, strict=True))
    torch.testing.assert_close(output.router_losses, losses.mean(0))
    assert torch.equal(output.expert_load, load) and load.shape == (3, 3) and not load.requires_grad
    assert torch.equal(output.dropped, dropped) and dropped.shape == (3,) and dropped.max() > 0
    torch.testing.assert_close(load.sum(1), torch.ones(3))


@pytest.mark.parametrize("group", [1, 2, 3])
def test_layers_of_a_group_share_their_feed_forward(group):
    model = encoder(num_hidden_layers=5, layer_group=group)
    for k, layer in enumerate(model.layers):
        assert layer.feed_forward is model.layers[k - k % group].feed_forward
        assert layer.attention is not model.layers[k - 1].attention
    experts = {id(layer.feed_forward) for layer in model.layers}
    assert len(experts) == math.ceil(5 / group)
    per_group = sum(p.numel() for p in model.layers[0].feed_forward.parameters())
    whole = sum(p.numel() for p in encoder(num_hidden_layers=5).parameters())
    assert sum(p.numel() for p in model.parameters()) == whole - (5 - len(experts)) * per_group


def test_one_group_of_all_layers_has_the_parameters_of_one_layer():
    """ALBERT (Lan et al. 2019, section 3.1): attention and norms are shared too."""
    model = encoder(num_hidden_layers=5, layer_group=5)
    assert {id(layer) for layer in model.layers} == {id(model.layers[0])} and len(model.layers) == 5
    assert model.num_parameters() == encoder(num_hidden_layers=1).num_parameters()
    assert not list(units(model)), "a layer that runs several times is gathered with the root"


@pytest.mark.parametrize(
    "changes", [{}, {"layer_group": 2, "embedding_size": 8, "ln_pos": PRE_NORM}, {"layer_group": 3, "causal": True}]
)
def test_every_parameter_has_a_gradient_and_checkpointing_changes_none(changes):
    model = encoder(num_hidden_layers=3, **changes).train()
    ids, mask = texts(9, 5)
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
        output = model(ids, mask)
        (output.last_hidden_state.square().sum() + output.router_losses.sum()).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1])


def test_every_norm_has_the_epsilon_of_the_config():
    norms = [part for part in encoder(LN_eps=0.125, ln_pos=0).modules() if isinstance(part, nn.LayerNorm)]
    assert len(norms) > 4 and {norm.eps for norm in norms} == {0.125}


@pytest.mark.parametrize("place", ["embeddings.dropout", "layers.0.attention.dropout", "layers.0.dropout"])
def test_dropout_works_in_training_only(place):
    model = encoder(capacity_factor=3.0)
    ids, _ = texts(8)
    assert torch.equal(model.train()(ids).last_hidden_state, model(ids).last_hidden_state)
    model.get_submodule(place).p = 0.5
    assert not torch.equal(model(ids).last_hidden_state, model(ids).last_hidden_state)
    assert torch.equal(model.eval()(ids).last_hidden_state, model(ids).last_hidden_state)
    assert all(m.p == 0.3 for m in encoder(dropout_prob=0.3).modules() if isinstance(m, nn.Dropout))


def test_initial_weights():
    torch.manual_seed(0)
    model = TransformerEncoder(tiny(hidden_size=64, ff_dim=64, initializer_range=0.05, embedding_size=32, ln_pos=0))
    for name, p in model.named_parameters():
        if p.dim() > 1:
            tolerance = 4 * 0.05 / math.sqrt(2 * p.numel())  # four standard errors
            p = p[1:] if name == "embeddings.tokens.weight" else p  # padding begins as zero
            assert p.std().item() == pytest.approx(0.05, abs=tolerance), name
        else:
            assert p.unique().item() == float(name.endswith("weight")), name
    assert not model.embeddings.tokens.weight[0].any()


def test_input_embeddings_are_what_a_tied_head_needs():
    model = encoder(embedding_size=8)
    assert model.config.embedding_width == 8 and encoder().config.embedding_width == 16
    assert model.get_input_embeddings().weight.shape == (40, 8)
    model.resize_token_embeddings(48)
    assert model.get_input_embeddings().weight.shape == (48, 8) and model.config.vocab_size == 48
    assert model.eval()(torch.tensor([[47, 3]])).last_hidden_state.shape == (1, 2, 16)


@pytest.mark.parametrize("group", [1, 3, 5])
def test_saved_and_loaded_again(tmp_path, group):
    model = encoder(num_hidden_layers=5, layer_group=group, embedding_size=8, causal=True).eval()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())  # shared ones once
    assert sum(name.endswith("w_in") for name in names) == math.ceil(5 / group)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert type(again) is TransformerEncoder and again.config.to_diff_dict() == model.config.to_diff_dict()
    assert again.layers[4].feed_forward is again.layers[4 - 4 % group].feed_forward
    ids, mask = texts(9, 5)
    assert torch.equal(again(ids, mask).last_hidden_state, model(ids, mask).last_hidden_state)


# The config


def test_shipped_config():
    values = json.loads((ROOT / "models" / "transformer_config.json").read_text(encoding="utf-8"))
    known = {f.name for f in dataclasses.fields(TransformerConfig)}
    assert values.pop("model_type") == "kozero_transformer" and set(values) <= known
    config = AutoConfig.for_model("kozero_transformer", **values)
    assert type(config) is TransformerConfig
    assert {key: getattr(TransformerConfig(), key) for key in values} == values
    with torch.device("meta"):
        assert 250e6 < TransformerEncoder(config).num_parameters() < 300e6


def test_the_other_spelling_of_positions(tmp_path):
    config = TransformerConfig(max_position_embedding=77)
    assert config.max_position_embeddings == config.max_position_embedding == 77
    config.save_pretrained(tmp_path)
    assert "max_position_embedding" not in json.loads((tmp_path / "config.json").read_text())
    assert AutoConfig.from_pretrained(tmp_path).max_position_embeddings == 77


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "num_heads 3: must be a divisor of hidden_size 16"),
        ({"num_heads": 0}, "num_heads 0: must be a whole number of 1 or more"),
        ({"hidden_size": -16}, "hidden_size -16: must be a whole number of 1 or more"),
        ({"hidden_size": "16"}, "hidden_size '16': must be a whole number of 1 or more"),
        ({"vocab_size": 1.5}, "vocab_size 1.5: must be a whole number of 1 or more"),
        ({"n_experts": True}, "n_experts True: must be a whole number of 1 or more"),
        ({"layer_group": 0}, "layer_group 0: must be a whole number of 1 or more"),
        ({"layer_group": -1}, "layer_group -1: must be a whole number of 1 or more"),
        ({"layer_group": 3}, "layer_group 3: must be at most num_hidden_layers 2, where all layers share"),
        ({"ff_dim": None}, "ff_dim None: must be a whole number of 1 or more"),
        ({"max_position_embedding": 0}, "max_position_embeddings 0: must be a whole number of 1 or more"),
        ({"act_fn": "gelo"}, "act_fn 'gelo': must be one of gelu, relu, swish, did you mean 'gelu'?"),
        ({"act_fn": ["gelu"]}, "act_fn ['gelu']: must be one of gelu, relu, swish"),
        ({"capacity_factor": 0}, "capacity_factor 0: must be a number above 0"),
        ({"LN_eps": math.inf}, "LN_eps inf: must be a number above 0"),
        ({"initializer_range": "0.02"}, "initializer_range '0.02': must be a number above 0"),
        ({"dropout_prob": 1.0}, "dropout_prob 1.0: must be a number in [0, 1)"),
        ({"ln_pos": 2}, "ln_pos 2: must be 0 (pre-norm) or 1 (post-norm)"),
        ({"causal": 1}, "causal 1: must be true or false"),
        ({"embedding_size": 0}, "embedding_size 0: must be a whole number of 1 or more, or null for none"),
        ({"pad_token_id": 40}, "pad_token_id 40: must be a token below vocab_size 40, or null for none"),
        ({"pad_token_id": -1}, "pad_token_id -1: must be a token below vocab_size 40, or null for none"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings False: must be true: heads are tied to the embedding"),
    ],
)
def test_a_value_out_of_range_is_one_line(changes, message):
    with pytest.raises(UserError) as caught:
        tiny(**changes)
    assert str(caught.value).startswith(f"transformer config: {message}")
    assert "\n" not in str(caught.value)


def test_a_value_changed_later_is_found_too():
    config = tiny()
    config.n_experts = 0
    with pytest.raises(UserError, match=r"^transformer config: n_experts 0: must be "):
        TransformerEncoder(config)


def test_a_text_that_is_too_long():
    with pytest.raises(UserError, match=r"max_position_embeddings 12: too few for a text of 13 tokens"):
        encoder()(torch.ones(1, 13, dtype=torch.long))


# Several ranks


def loss_of(model: nn.Module, rank: int) -> torch.Tensor:
    """A loss of rows that only this rank has."""
    ids, mask = texts(9, 5, seed=rank)
    output = model(ids, mask)
    return output.last_hidden_state.square().sum() + output.router_losses.sum()


def gradients_of_ranks(cases: list[tuple[str, dict]]) -> list[dict[str, torch.Tensor]]:
    """Mean gradients of the second step of each wrapper: in it DDP finds that a parameter had none in the first."""
    found = []
    for wrapper, changes in cases:
        model = encoder(**changes).train()
        wrapped = DistributedDataParallel(model) if wrapper == "ddp" else model
        for module in [*model.layers, model] if wrapper == "fsdp" else []:
            fully_shard(module)
        for _ in range(2):
            model.zero_grad()
            loss_of(wrapped, distributed.rank()).backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found.append({name: g.full_tensor() if wrapper == "fsdp" else g for name, g in gradients.items()})
    return found


@pytest.mark.slow
def test_two_ranks_have_the_mean_gradient():
    cases = [("ddp", {"layer_group": 2}), ("fsdp", {}), ("fsdp", {"ln_pos": PRE_NORM, "embedding_size": 8})]
    of_ranks = run_ranks(gradients_of_ranks, cases)
    for case, (_, changes) in enumerate(cases):
        model = encoder(**changes).train()
        for rank in range(2):
            (loss_of(model, rank) / 2).backward()
        expected = {name: p.grad for name, p in model.named_parameters()}
        for found in of_ranks:
            torch.testing.assert_close(found[case], expected, rtol=1e-4, atol=1e-5)
