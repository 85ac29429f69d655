"""The Mix LM encoder against equations written out by hand, a masked-kernel reference, and what padding must not do."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from kozero.errors import UserError
from models.dropout import Dropout
from models.mix_lm import (
    FactorisedEmbedding,
    GatedMlp,
    MixedConvolution,
    MixFeedForward,
    MixLmConfig,
    MixLmEncoder,
    SpatialGating,
    TinyAttention,
    visible_keys,
)
from tests.helpers import ROOT

SMALL = {
    "vocab_size": 40, "embedding_size": 6, "hidden_size": 16, "num_hidden_layers": 3, "num_heads": 2, "kernel_size": 5,
    "n_experts": 2, "ff_dim": 24, "dropout_prob": 0.0, "layer_group": 2, "max_position_embeddings": 24,
}  # fmt: skip
KINDS = [{"layer_group": 3}, {"causal": True}, {"ln_pos": 1}]
KINDS += [{"causal": True, "ln_pos": 1, "act_fn": "swish", "layer_group": 1}]


def config(**changes) -> MixLmConfig:
    return MixLmConfig(**(SMALL | changes))


def shaken(module, seed: int = 0):
    """The module in evaluation, all its weights and biases large and different, so that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
    return module.eval()


def encoder(**changes) -> MixLmEncoder:
    return shaken(MixLmEncoder(config(**changes)))


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def words(*lengths: int, seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts of these lengths, padded with id 3 to the longest: (B, T) ids and mask."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    ids = torch.randint(4, 40, mask.shape, generator=torch.Generator().manual_seed(seed))
    return ids.where(mask, 3), mask.long()


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# gMLP block --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_the_spatial_gate_is_the_papers_equation(causal):
    gating = shaken(SpatialGating(config(hidden_size=4, causal=causal)))
    content, gate, attended = noise(3, 2, 5, 4).unbind()
    expected = torch.zeros(2, 5, 4)
    for text in range(2):
        normed = [F.layer_norm(gate[text, t], (4,), gating.norm.weight, gating.norm.bias, 1e-12) for t in range(5)]
        for t in range(5):
            for channel in range(4):
                others = range(t + 1) if causal else range(5)
                mixed = gating.bias[t] + sum(gating.weight[t, s] * normed[s][channel] for s in others)
                expected[text, t, channel] = content[text, t, channel] * (mixed + attended[text, t, channel])
    close(gating(content, gate, attended, None), expected)


@torch.no_grad()
def test_the_tiny_attention_is_softmax_of_scaled_products():
    attention = shaken(TinyAttention(config()))
    hidden, visible = noise(1, 4, 16), torch.ones(1, 1, 4, 4).tril().bool()
    query, key, value = attention.qkv(hidden[0]).split(2 * 64, dim=-1)
    expected = torch.zeros(4, 2 * 64)
    for head in (slice(0, 64), slice(64, 128)):
        for t in range(4):
            scores = torch.stack([query[t, head] @ key[s, head] / math.sqrt(64) for s in range(t + 1)])
            expected[t, head] = scores.softmax(0) @ value[: t + 1, head]
    close(attention(hidden, visible)[0], attention.out(expected), 1e-4)


@pytest.mark.parametrize(
    ("act_fn", "by_hand"),
    [
        ("gelu", lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))),
        ("relu", lambda x: x.clamp(min=0)),
        ("swish", lambda x: x / (1 + torch.exp(-x))),
    ],
)
@torch.no_grad()
def test_both_sublayers_use_the_activation(act_fn, by_hand):
    block, feed_forward = (shaken(kind(config(act_fn=act_fn))) for kind in (GatedMlp, MixFeedForward))
    hidden = noise(2, 5, 16)
    inner = by_hand(block.expand(hidden))
    gated = block.gating(inner[..., :16], inner[..., 16:], block.attention(hidden, None), None)
    close(block(hidden, None, None), block.project(gated))
    inner = by_hand(feed_forward.mix(hidden.mT)).mT
    close(feed_forward(hidden, None), feed_forward.project(inner))


# Mixed convolution -------------------------------------------------------------------------------------------------


def masked_convolution(mix: MixedConvolution, made: MixLmConfig, hidden: torch.Tensor) -> torch.Tensor:
    """One kernel of the largest size for all H x F channels per dilation, zero wherever the layout has no weight."""
    largest, num_sizes = made.kernel_size, len(made.kernel_sizes)
    total = torch.zeros(hidden.shape[0], made.ff_dim, hidden.shape[2])
    first_in = first_out = 0
    for number, convolution in enumerate(mix.convolutions):
        dilation, k = 1 + number // num_sizes, 3 + 2 * (number % num_sizes)
        outputs, inputs = convolution.weight.shape[:2]
        big = torch.zeros(made.ff_dim, made.hidden_size, largest)
        start = largest - k if made.causal else (largest - k) // 2  # a causal kernel ends, another is centred, at t
        rows, columns = slice(first_out, first_out + outputs), slice(first_in, first_in + inputs)
        big[rows, columns, start : start + k] = convolution.weight
        reach = (largest - 1) * dilation
        padded = F.pad(hidden, (reach, 0) if made.causal else (reach // 2, reach // 2))
        part = F.conv1d(padded, big, dilation=dilation)
        part[:, rows] += convolution.bias.unsqueeze(-1)
        total, first_in, first_out = total + part, first_in + inputs, first_out + outputs
    assert (first_in, first_out) == (made.hidden_size, made.ff_dim)
    return total


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sizes", [(16, 24, 5, 2), (20, 28, 7, 2), (15, 18, 7, 3), (8, 8, 3, 4)])
def test_the_mixed_convolution_equals_one_masked_kernel(causal, sizes):
    hidden_size, ff_dim, kernel_size, n_experts = sizes
    made = config(hidden_size=hidden_size, ff_dim=ff_dim, kernel_size=kernel_size, n_experts=n_experts, causal=causal)
    mix = shaken(MixedConvolution(made))
    hidden = noise(2, hidden_size, 11).requires_grad_()
    weights = [hidden, *mix.parameters()]
    results = []
    for out in (mix(hidden), masked_convolution(mix, made, hidden)):
        results.append([out, *torch.autograd.grad((out * noise(*out.shape, seed=5)).sum(), weights)])
    for ours, reference in zip(*results, strict=True):
        close(ours, reference, 1e-4)


@pytest.mark.parametrize("causal", [False, True])
@torch.no_grad()
def test_an_impulse_shows_kernel_sizes_and_dilations(causal):
    mix = MixedConvolution(config(hidden_size=4, ff_dim=4, kernel_size=5, n_experts=2, causal=causal))
    for parameter in mix.parameters():  # every weight one, every bias zero
        parameter.fill_(parameter.ndim > 1)
    impulse = torch.zeros(1, 4, 21)
    impulse[..., 10] = 1
    places = [row.nonzero().flatten().tolist() for row in mix(impulse)[0]]
    if causal:
        assert places == [[10, 11, 12], [10, 11, 12, 13, 14], [10, 12, 14], [10, 12, 14, 16, 18]]
    else:
        assert places == [[9, 10, 11], [8, 9, 10, 11, 12], [8, 10, 12], [6, 8, 10, 12, 14]]


def test_channels_that_do_not_divide_evenly_go_to_the_smallest_kernels_of_each_dilation():
    mix = MixedConvolution(config(hidden_size=20, ff_dim=28, kernel_size=7, n_experts=2))
    assert [c.in_channels for c in mix.convolutions] == [4, 3, 3] * 2
    assert [c.out_channels for c in mix.convolutions] == [5, 5, 4] * 2


def test_there_is_one_call_for_each_dilation_and_kernel_and_no_spare_weight():
    made = config(hidden_size=48, ff_dim=96, kernel_size=7, n_experts=4)
    mix = MixedConvolution(made)
    assert [(c.dilation[0], c.kernel_size[0]) for c in mix.convolutions] == [
        (dilation, k) for dilation in (1, 2, 3, 4) for k in (3, 5, 7)
    ]
    weights = sum(c.weight.numel() for c in mix.convolutions)
    assert weights == 48 * 96 * (3 + 2) // (4 * 3)
    assert sum(p.numel() for p in mix.parameters()) == weights + 96


# Encoder -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_embeddings_are_factorised_sums():
    table = shaken(FactorisedEmbedding(config()))
    ids, types = torch.tensor([[5, 7, 5]]), torch.tensor([[0, 0, 1]])
    sums = table.words.weight[ids] + table.positions.weight[:3] + table.token_types.weight[types]
    normed = F.layer_norm(sums, (6,), table.norm.weight, table.norm.bias, 1e-12)
    close(table(ids, types), normed @ table.widen.weight.T + table.widen.bias)


@torch.no_grad()
def test_without_token_types_all_are_the_first():
    model, (ids, mask) = encoder(), words(6, 4)
    plain, first, second = (model(ids, mask, types).last_hidden_state for types in (None, ids * 0, ids * 0 + 1))
    assert torch.equal(plain, first)
    assert not torch.allclose(plain, second, atol=1e-2)


@pytest.mark.parametrize("ln_pos", [0, 1])
@torch.no_grad()
def test_norms_stand_before_or_after_each_sublayer(ln_pos):
    model, (ids, _) = encoder(ln_pos=ln_pos), words(7)

    def norm(module, x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / centred.pow(2).mean(-1, keepdim=True).sqrt() * module.weight + module.bias

    hidden = model.embeddings(ids, ids * 0)
    for layer, shared in zip(model.layers, [0, 0, 1], strict=True):
        feed_forward = model.feed_forwards[shared]
        if ln_pos:
            hidden = norm(layer.gmlp_norm, hidden + layer.gmlp(hidden, None, None))
            hidden = norm(layer.ff_norm, hidden + feed_forward(hidden, None))
        else:
            hidden = hidden + layer.gmlp(norm(layer.gmlp_norm, hidden), None, None)
            hidden = hidden + feed_forward(norm(layer.ff_norm, hidden), None)
    close(model(ids).last_hidden_state, hidden if ln_pos else norm(model.norm, hidden), 1e-4)


@pytest.mark.parametrize("changes", KINDS)
@torch.no_grad()
def test_a_text_has_the_same_vectors_alone_and_padded(changes):
    model, lengths = encoder(**changes), (5, 24, 1, 17)
    ids, mask = words(*lengths)
    together = model(ids, mask).last_hidden_state
    assert together.shape == (4, 24, 16)
    for row, length in enumerate(lengths):
        close(together[row, :length], model(ids[row : row + 1, :length]).last_hidden_state[0])


@pytest.mark.parametrize("changes", KINDS)
def test_gradients_do_not_depend_on_padding(changes):
    model, (ids, mask) = encoder(**changes), words(5, 9)
    gradients = []
    for length in (9, 24):
        longer, seen = (F.pad(x, (0, length - 9), value=v) for x, v in ((ids, 3), (mask, 0)))
        out = model(longer, seen).last_hidden_state
        weighted = (out[:, :9] * noise(2, 9, 16) * mask.unsqueeze(-1)).sum()
        gradients.append(torch.autograd.grad(weighted, list(model.parameters())))
    for short, long in zip(*gradients, strict=True):
        scale = short.abs().max().clamp(min=1)
        close(long / scale, short / scale)


@torch.no_grad()
def test_what_stands_in_the_padding_does_not_matter():
    model, (ids, mask) = encoder(), words(5, 12)
    other = torch.where(mask == 1, ids, 39 - ids)
    ours, again = (model(x, mask).last_hidden_state[mask == 1] for x in (ids, other))
    assert torch.equal(ours, again)
    assert not torch.allclose(ours, model(ids).last_hidden_state[mask == 1], atol=1e-2)


@pytest.mark.parametrize("changes", KINDS)
def test_a_text_of_nothing_but_padding_is_harmless(changes):
    model, (ids, mask) = encoder(**changes), words(5, 9)
    mask[0] = 0
    out = model(ids, mask).last_hidden_state
    assert out.isfinite().all()
    gradients = torch.autograd.grad(out[1].sum(), list(model.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("causal", [False, True])
def test_every_query_sees_a_key_and_real_ones_only_real_keys(causal):
    padding = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool().unsqueeze(-1)
    visible = visible_keys(padding, 5, causal, padding.device).squeeze(1)
    for text, query, key in itertools.product(range(3), range(5), range(5)):
        real = not padding[text, key] and (key <= query or not causal)
        assert visible[text, query, key] == (real or key == query)
    assert visible_keys(None, 5, False, padding.device) is None


@pytest.mark.parametrize("changes", [{}, {"causal": True}, {"causal": True, "ln_pos": 1}])
@torch.no_grad()
def test_a_causal_encoder_never_looks_ahead(changes):
    model, (ids, mask) = encoder(**changes), words(24)
    changed = ids.clone()
    changed[0, 11] = (ids[0, 11] + 1) % 40
    before, after = (model(x, mask).last_hidden_state[0] for x in (ids, changed))
    moved = ((before - after).abs().amax(-1) > 1e-6).tolist()
    assert all(moved[11:])
    assert not any(moved[:11]) if model.config.causal else all(moved[:11])


def test_texts_longer_than_the_positions_are_refused():
    model = encoder()
    assert model(torch.ones(1, 24, dtype=torch.long)).last_hidden_state.shape == (1, 24, 16)
    with pytest.raises(UserError, match="25 tokens: max_position_embeddings is 24"):
        model(torch.ones(1, 25, dtype=torch.long))


@pytest.mark.parametrize("group", [1, 2, 3])
def test_layers_of_a_group_share_one_feed_forward(group):
    model = MixLmEncoder(config(num_hidden_layers=4, layer_group=group))
    used = []
    for feed_forward in model.feed_forwards:
        feed_forward.register_forward_pre_hook(lambda module, _: used.append(id(module)))
    model(torch.ones(1, 3, dtype=torch.long))
    assert used == [id(model.feed_forwards[layer // group]) for layer in range(4)]
    one = sum(p.numel() for p in MixFeedForward(config()).parameters())
    alone = sum(p.numel() for p in MixLmEncoder(config(num_hidden_layers=4, layer_group=1)).parameters())
    assert sum(p.numel() for p in model.parameters()) == alone - (4 - math.ceil(4 / group)) * one


@pytest.mark.parametrize("ln_pos", [0, 1])
def test_one_group_of_all_layers_has_the_parameters_of_one_layer(ln_pos):
    """ALBERT (Lan et al. 2019, section 3.1): gMLP block and norms are shared too; it equals layers that are alike."""
    model, (ids, mask) = encoder(layer_group=3, ln_pos=ln_pos), words(7, 4)
    one = encoder(num_hidden_layers=1, layer_group=1, ln_pos=ln_pos)
    assert len(model.layers) == 3 and model.num_parameters() == one.num_parameters()
    alike = encoder(layer_group=1, ln_pos=ln_pos)
    for mine, other in ((alike.layers, model.layers[0]), (alike.feed_forwards, model.feed_forwards[0])):
        for part in mine:
            part.load_state_dict(other.state_dict())
    for name in ("embeddings", "norm"):
        getattr(alike, name).load_state_dict(getattr(model, name).state_dict())
    close(model(ids, mask).last_hidden_state, alike(ids, mask).last_hidden_state)


@pytest.mark.parametrize("changes", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_parameter_gets_a_gradient_in_every_precision(changes, dtype):
    (ids, mask), model = words(5, 9), MixLmEncoder(config(initializer_range=0.2, **changes))
    reference = model(ids, mask).last_hidden_state.detach()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = model(ids, mask).last_hidden_state
    out.float().pow(2).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert out.dtype == torch.float32
    close(out[mask == 1], reference[mask == 1], {torch.float32: 1e-6, torch.bfloat16: 0.3, torch.float16: 0.05}[dtype])
    pure = model.to(dtype)(ids, mask).last_hidden_state
    assert pure.dtype == dtype
    assert pure.isfinite().all()


def test_recomputed_activations_give_the_same_gradients():
    model, (ids, mask) = encoder().train(), words(5, 9)
    gradients = []
    for _ in range(2):
        out = model(ids, mask).last_hidden_state
        gradients.append(torch.autograd.grad(out.pow(2).sum(), list(model.parameters())))
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_dropout_is_for_training_alone():
    model, (ids, mask) = MixLmEncoder(config(dropout_prob=0.5)), words(5, 9)
    for trains in (True, False):
        one, again = (model.train(trains)(ids, mask).last_hidden_state for _ in range(2))
        assert torch.equal(one, again) is not trains


@pytest.mark.parametrize("ln_pos", [0, 1])
def test_dropout_falls_on_the_embeddings_and_behind_each_sublayer(ln_pos):
    model, calls = MixLmEncoder(config(dropout_prob=0.5, ln_pos=ln_pos, layer_group=1)), []
    for name, part in model.named_modules():
        if isinstance(part, Dropout):
            part.register_forward_hook(lambda *_, name=name: calls.append(name))
    model(*words(5, 9))
    assert calls == ["embeddings.dropout", *(f"layers.{k}.dropout" for k in (0, 0, 1, 1, 2, 2))]


def test_every_norm_has_the_epsilon_of_the_config():
    norms = [part for part in MixLmEncoder(config(LN_eps=0.125)).modules() if isinstance(part, torch.nn.LayerNorm)]
    assert len(norms) == 3 * 3 + 2 and {norm.eps for norm in norms} == {0.125}


# Weights and files -------------------------------------------------------------------------------------------------


def test_initial_values():
    model = MixLmEncoder(
        config(vocab_size=400, hidden_size=64, ff_dim=128, initializer_range=0.05, max_position_embeddings=64)
    )
    spatial = [name for name, module in model.named_modules() if isinstance(module, SpatialGating)]
    assert len(spatial) == 3
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        if owner in spatial:
            std = 0.05 / 8  # 64 positions: W Z2 begins as N(0, 0.05)
            expected = torch.ones_like(parameter) if name.endswith("bias") else None
        else:
            std = 0.05
            value = 1.0 if "norm" in owner and name.endswith("weight") else 0.0
            expected = torch.full_like(parameter, value) if "norm" in owner or name.endswith("bias") else None
        if expected is not None:
            assert torch.equal(parameter, expected), name
        else:
            error = std * 5 / math.sqrt(parameter.numel())
            assert parameter.std().item() == pytest.approx(std, abs=error), name
            assert parameter.mean().item() == pytest.approx(0, abs=error), name


@pytest.mark.parametrize("changes", KINDS)
def test_a_saved_encoder_loads_as_it_was(tmp_path, changes):
    model, (ids, mask) = encoder(**changes), words(5, 9)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors").values()
    assert sum(t.numel() for t in stored) == sum(p.numel() for p in model.parameters())  # shared weights once
    for loaded in (MixLmEncoder.from_pretrained(tmp_path), AutoModel.from_pretrained(tmp_path)):
        assert type(loaded) is MixLmEncoder
        assert all(getattr(loaded.config, key) == getattr(model.config, key) for key in SMALL | changes)
        assert torch.equal(loaded(ids, mask).last_hidden_state, model(ids, mask).last_hidden_state)


def test_the_shipped_config_has_every_key_and_builds():
    values = json.loads((ROOT / "models" / "mix_lm_config.json").read_text(encoding="utf-8"))
    assert set(values) - {"model_type"} == set(MixLmConfig.__annotations__) - {"attribute_map"}
    made = AutoConfig.for_model(**values)
    assert type(made) is MixLmConfig
    with torch.device("meta"):
        model = MixLmEncoder(made)
    assert sum(p.numel() for p in model.parameters()) == 73_713_664


def test_word_vectors_are_there_for_a_tied_head():
    model = encoder()
    assert model.get_input_embeddings().weight.shape == (40, model.config.embedding_size)
    model.resize_token_embeddings(48)
    assert model.get_input_embeddings().weight.shape == (48, 6)
    assert model(torch.tensor([[47]])).last_hidden_state.shape == (1, 1, 16)


def test_positions_have_two_spellings():
    values = {key: value for key, value in SMALL.items() if key != "max_position_embeddings"}
    made = MixLmConfig(**values, max_position_embedding=9)
    assert made.max_position_embeddings == made.max_position_embedding == 9
    assert MixLmEncoder(made).embeddings.positions.num_embeddings == 9
    assert "max_position_embedding" not in made.to_dict()


@pytest.mark.parametrize(
    ("key", "value", "advice"),
    [
        ("kernel_size", 4, "odd"),
        ("kernel_size", 1, "3 or more"),
        ("n_experts", 3, "must divide hidden_size 16"),
        ("n_experts", 16, "parts of 1 channels"),
        ("ff_dim", 25, "must divide ff_dim 25"),
        ("ff_dim", 2, "parts of 1 channels for 2 kernel sizes"),
        ("kernel_size", 19, "8 channels for 9 kernel sizes"),
        ("act_fn", "gelo", "did you mean 'gelu'"),
        ("act_fn", None, "gelu, relu, swish"),
        ("hidden_size", -16, "1 or more"),
        ("num_heads", 0, "1 or more"),
        ("vocab_size", "40", "whole number"),
        ("layer_group", True, "whole number"),
        ("layer_group", 4, "at most num_hidden_layers 3"),
        ("num_hidden_layers", 2.0, "whole number"),
        ("max_position_embedding", 0, "1 or more"),
        ("dropout_prob", 1, "from 0 to below 1"),
        ("dropout_prob", -0.1, "from 0 to below 1"),
        ("initializer_range", 0, "number"),
        ("LN_eps", float("nan"), "number"),
        ("ln_pos", 2, "post-norm"),
        ("causal", "no", "true or false"),
        ("pad_token_id", 40, "0 to 39"),
        ("pad_token_id", None, "0 to 39"),
        ("model_type", "gpt2", "needs 'kozero_mix_lm'"),
    ],
)
def test_a_wrong_value_is_one_line(key, value, advice):
    with pytest.raises(UserError) as caught:
        config(**{key: value})
    line = str(caught.value)
    assert key in line or "n_experts" in line
    assert advice in line
    assert "\n" not in line
