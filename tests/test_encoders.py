"""Encoders from configs and folders: what is refused, and that a user reads one line about it."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig

from kozero.data.framing import Framing
from kozero.errors import UserError
from models.encoders import ENCODERS, build_encoder, load_encoder, read_encoder_config
from models.language_model import load_tokenizer
from tests.helpers import ROOT, SAMPLE_TOKENIZER, sample_tokenizer, word_tokenizer

CONFIGS = {name: json.loads((ROOT / "models" / f"{name}_tiny_config.json").read_text()) for name in ENCODERS}


def encoder_of(path, name: str = "transformer", tokenizer=None, **changes):
    """Random weights of a shipped config with some values changed."""
    (path / "config.json").write_text(json.dumps(CONFIGS[name] | changes))
    config = read_encoder_config(path / "config.json", name, tokenizer or sample_tokenizer())
    return build_encoder(config, 3)


def refused(make, *args, **other) -> str:
    """The one line that a user reads."""
    with pytest.raises(UserError) as caught:
        make(*args, **other)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(params=ENCODERS)
def folder(request, tmp_path):
    encoder_of(tmp_path, request.param).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change_config(folder, **changes) -> str:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))
    return str(folder)


# Folders -----------------------------------------------------------------------------------------------------------


def test_a_saved_encoder_loads_as_it_was(folder):
    saved, loaded = load_file(folder / "model.safetensors"), load_encoder(str(folder)).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in saved.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": 1}, "weights are of layers that its config.json does not have, the first is"),
        ({"num_hidden_layers": 3}, "weights are missing, the first is"),
        ({"hidden_size": 32}, "weights have another shape than its config.json says, the first is"),
        ({"hidden_size": 64_000_000}, "another shape|cannot be loaded|its files have"),
        ({"n_experts": 0}, "config.json: .* n_experts 0: must be"),
        ({"model_type": "bert"}, "model_type 'bert'; an encoder of transformer, mix_lm is needed here"),
    ],
)
def test_a_config_that_does_not_fit_the_weights_is_one_line(folder, caplog, capfd, change, message):
    said = refused(load_encoder, change_config(folder, **change), "--checkpoint")
    assert said.startswith(f"--checkpoint {folder}: ")
    assert re.search(message, said)
    assert "LOAD REPORT" not in capfd.readouterr().err + caplog.text


def test_weights_that_are_not_finite_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.norm.bias"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert "1 weights are not finite, the first is embeddings.norm.bias" in refused(load_encoder, str(folder))


def test_weights_are_loaded_in_32_bit_whatever_the_config_says(folder):
    encoder = load_encoder(change_config(folder, dtype="bfloat16"))
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}


@pytest.mark.parametrize("place", ["run", "run/checkpoints", "run/checkpoints/step-000006"])
def test_a_run_or_a_step_of_it_is_answered_with_its_exported_model(tmp_path, place):
    (tmp_path / "run/checkpoints/step-000006").mkdir(parents=True)
    named = str(tmp_path / place)
    message = "has no config.json; give the exported model of a run,"
    assert refused(load_encoder, named, "--checkpoint") == f"--checkpoint {named}: {message} RUN/model"
    encoder_of(tmp_path).save_pretrained(tmp_path / "run/model")
    assert refused(load_encoder, named, "--checkpoint").endswith(f"{message} {tmp_path}/run/model")


@pytest.mark.parametrize(
    ("flag", "advice"),
    [("--checkpoint", "Give the exported model of a run"), ("--model_name_or_path", "Offline? Give a local folder")],
)
def test_a_name_that_cannot_be_had_offline_is_answered_with_what_to_do(flag, advice):
    said = refused(load_encoder, "nobody/nothing", flag)
    assert said.startswith(f"{flag} nobody/nothing: ") and advice in said


# Configs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
def test_random_weights_are_of_32_bit_whatever_the_config_says(tmp_path, name):
    encoder = encoder_of(tmp_path, name, dtype="bfloat16")
    assert {p.dtype for p in encoder.parameters()} == {torch.float32}
    plain = encoder_of(tmp_path, name).state_dict()
    assert all(torch.equal(tensor, plain[key]) for key, tensor in encoder.state_dict().items())


@pytest.mark.parametrize("name", ENCODERS)
def test_sizes_beyond_any_memory_are_refused(tmp_path, name):
    said = refused(encoder_of, tmp_path, name, hidden_size=64_000_000_000)
    assert said.startswith(f"--config_file {tmp_path}/config.json: no model of these sizes can be built")


# Another value of each key, and what else it needs to be possible.
OTHER_VALUES = {
    "transformer": {
        "vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_heads": 4, "ff_dim": 40, "n_experts": 3,
        "capacity_factor": 0.5, "act_fn": "relu", "dropout_prob": 0.5, "initializer_range": 0.03, "layer_group": 2,
        "max_position_embeddings": 20, "type_vocab_size": 3, "LN_eps": 0.01, "ln_pos": 1, "causal": True,
        "embedding_size": 8, "pad_token_id": 1, "tie_word_embeddings": False,
    },
    "mix_lm": {
        "vocab_size": 50, "embedding_size": 8, "hidden_size": 32, "num_hidden_layers": 3, "num_heads": 2,
        "kernel_size": 7, "n_experts": 1, "ff_dim": 40, "act_fn": "swish", "dropout_prob": 0.5,
        "initializer_range": 0.03, "layer_group": 2, "max_position_embeddings": 20, "type_vocab_size": 3,
        "LN_eps": 0.01, "ln_pos": 1, "causal": True, "pad_token_id": 1,
    },
}  # fmt: skip
BASE = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "ff_dim": 24, "n_experts": 2, "kernel_size": 5,
    "max_position_embeddings": 12, "num_heads": 1, "LN_eps": 1e-5, "ln_pos": 0, "dropout_prob": 0.1, "pad_token_id": 3,
}  # fmt: skip


def trace_of(name: str, **changes) -> list:
    """All that a config decides: weights, and the vectors of a text in training and in evaluation."""
    kind, model = ENCODERS[name]
    base = {key: value for key, value in BASE.items() if key in kind.__dataclass_fields__}
    torch.manual_seed(0)
    encoder = model(kind(**base | changes))
    ids = torch.arange(4, 16)[None].repeat(3, 1)
    outputs = [encoder.train(training)(ids).last_hidden_state for training in (True, False)]
    return [tensor.detach().numpy().tobytes() for tensor in (*encoder.parameters(), *outputs)]


@pytest.mark.parametrize("name", ENCODERS)
def test_every_key_of_a_config_has_an_effect_or_is_refused(name):
    kind, plain = ENCODERS[name][0], trace_of(name)
    own = set(kind.__dataclass_fields__) - set(PreTrainedConfig.__dataclass_fields__)
    assert own | {"pad_token_id"} <= set(OTHER_VALUES[name]) | {"model_type"}
    assert trace_of(name) == plain, "negative control: nothing but a key changes it"
    for key, value in OTHER_VALUES[name].items():
        try:
            changed = trace_of(name, **{key: value})
        except UserError as error:
            assert key in str(error)
            continue
        assert changed != plain, key


@pytest.mark.parametrize("name", ENCODERS)
def test_a_key_of_transformers_that_changes_nothing_here_is_refused(tmp_path, name):
    assert encoder_of(tmp_path, name, output_attentions=False, dtype="float32", transformers_version="4.0")
    for key, value in PreTrainedConfig().to_dict().items():
        if key not in ("architectures", "dtype", "transformers_version", "model_type"):
            other = not value if isinstance(value, bool) else 3
            said = refused(encoder_of, tmp_path, name, **{key: other})
            assert f"config.json: {key} {other!r}: has no effect" in said


def test_two_spellings_of_one_key_must_agree(tmp_path):
    assert encoder_of(tmp_path, max_position_embedding=128, max_position_embeddings=128)
    said = refused(encoder_of, tmp_path, max_position_embedding=64, max_position_embeddings=128)
    assert "max_position_embedding 64 and max_position_embeddings 128 are one setting" in said


@pytest.mark.parametrize("name", ENCODERS)
def test_what_the_tokenizer_decides_is_told_where_the_file_says_otherwise(tmp_path, name, capsys):
    tokenizer = sample_tokenizer()
    encoder_of(tmp_path, name, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    assert capsys.readouterr().out == ""
    config = encoder_of(tmp_path, name, vocab_size=50, pad_token_id=9).config
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{tmp_path}/config.json: vocab_size 50: the tokenizer's {len(tokenizer)} is used"
    assert said[1] == f"{tmp_path}/config.json: pad_token_id 9: the tokenizer's {tokenizer.pad_token_id} is used"
    assert (config.vocab_size, config.pad_token_id) == (len(tokenizer), tokenizer.pad_token_id)


@pytest.mark.parametrize("name", ENCODERS)
def test_the_vector_of_padding_is_zero_and_never_trains(tmp_path, name):
    encoder = encoder_of(tmp_path, name)
    pad = encoder.config.pad_token_id
    encoder(torch.tensor([[pad, 200, pad]])).last_hidden_state[..., 0].sum().backward()
    table = encoder.get_input_embeddings().weight
    assert not table[pad].any() and not table.grad[pad].any() and table.grad[200].any()


@pytest.mark.parametrize("name", ENCODERS)
def test_an_export_whose_layers_shared_feed_forwards_alone_is_refused(tmp_path, name):
    """transformers would load each of its layers into the one that there is, so that the last is left."""
    encoder_of(tmp_path, name, layer_group=2).save_pretrained(tmp_path / "model")
    assert load_encoder(str(tmp_path / "model"))
    weights = load_file(tmp_path / "model" / "model.safetensors")
    more = {key.replace("layers.0.", "layers.1."): tensor + 1 for key, tensor in weights.items() if "layers.0" in key}
    save_file(weights | more, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    said = refused(load_encoder, str(tmp_path / "model"), "--checkpoint")
    assert said.startswith(
        f"--checkpoint {tmp_path}/model: layer_group 2 shares all weights of its layers, and the file"
    )


# Tokenizers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
def test_padding_is_the_tokenizers(tmp_path, name):
    assert encoder_of(tmp_path, name, pad_token_id=9).config.pad_token_id == sample_tokenizer().pad_token_id


@pytest.mark.parametrize("name", ENCODERS)
def test_a_tokenizer_without_padding_is_refused(tmp_path, name):
    """Else a word of it would have a vector of zeros that never trains."""
    word_tokenizer(20, ("<unk>", "</s>", "<s>")).save_pretrained(tmp_path / "words")
    tokenizer = load_tokenizer(str(tmp_path / "words"), writes=False)
    said = refused(encoder_of, tmp_path, name, tokenizer)
    assert f"--tokenizer_name_or_path {tmp_path}/words: no padding token" in said and "train_tokenizer.py" in said


def test_a_tokenizer_that_pads_with_its_end_of_text_is_refused(tmp_path):
    tokenizer = load_tokenizer(str(SAMPLE_TOKENIZER))
    tokenizer.pad_token = tokenizer.eos_token
    assert "pads with </s>, which has another role too" in refused(encoder_of, tmp_path, tokenizer=tokenizer)


def test_a_tokenizer_that_cannot_frame_a_row_is_named(tmp_path):
    word_tokenizer(20, ("<unk>", "<pad>")).save_pretrained(tmp_path / "words")
    said = refused(Framing.of, load_tokenizer(str(tmp_path / "words"), writes=False))
    assert f"--tokenizer_name_or_path {tmp_path}/words: neither [CLS] and [SEP] nor" in said
    assert "scripts/train_tokenizer.py" in said
