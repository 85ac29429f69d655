"""Encoders from configs and folders: what is refused, and that a user reads one line about it."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

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
        ({"hidden_size": 64_000_000}, "another shape|cannot be loaded"),
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
