"""PausedGenerator: pauses around transformers' generate, checked against generate by hand."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune.paused import PausedGenerator
from finetune.setup import inference_pauses
from kozero.errors import UserError
from kozero.pause import PLACEMENTS, InferencePauseArguments
from models.language_model import load
from tests.helpers import refused, sample_tokenizer

TEXTS = ["긍정", "헛수고를 한 날이다. 그는 집에 갔다.", "부정 새로운 영화"]


def test_it_appends_the_models_own_pauses(paused_model):
    generator = PausedGenerator.from_pretrained(paused_model)
    prompt = generator.prompt(TEXTS[0])
    assert generator.tokenizer.convert_ids_to_tokens(prompt.tolist()) == ["▁긍정", *["<unused0>"] * 3]


@pytest.mark.parametrize("cached", [True, False])
def test_it_writes_what_transformers_writes_after_the_paused_prompt(paused_model, cached):
    """Greedy, one text at a time without padding, against a batch of different lengths; with and without cache."""
    generator, lm = PausedGenerator.from_pretrained(paused_model), AutoModelForCausalLM.from_pretrained(paused_model)
    expected = []
    for text in TEXTS:
        ids = [*generator.tokenizer.encode(text, add_special_tokens=False), *[generator.pauses.token_id] * 3]
        out = lm.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :]
        expected.append(generator.tokenizer.decode(out, skip_special_tokens=True))
    found = generator.generate(TEXTS, batch_size=2, max_new_tokens=6, do_sample=False, use_cache=cached)
    assert found == expected and len(set(found)) > 1


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_keeps_the_text(paused_model, placement):
    generator = PausedGenerator.from_pretrained(paused_model, num_pauses=4, placement=placement)
    for text in TEXTS:
        prompt = generator.prompt(text)
        plain = generator.tokenizer.encode(text, add_special_tokens=False)
        if placement == "filler":
            assert prompt.tolist() == [*plain, *[generator.pauses.token_id] * 4]
        else:
            assert prompt[prompt != generator.pauses.token_id].tolist() == plain and len(prompt) == len(plain) + 4


def test_least_confident_places_are_those_of_the_lowest_probabilities(paused_model):
    generator = PausedGenerator.from_pretrained(paused_model, num_pauses=2, placement="least_confident")
    ids = generator.tokenizer.encode(TEXTS[1], add_special_tokens=False)
    with torch.no_grad():
        shares = generator.lm(torch.tensor([ids])).logits[0].softmax(-1)
    chances = [shares[k - 1, ids[k]].item() for k in range(1, len(ids))]
    lowest = np.argsort(chances)[:2] + 1
    paused = generator.prompt(TEXTS[1])
    places = np.flatnonzero(paused == generator.pauses.token_id)
    assert (places - np.arange(2)).tolist() == sorted(lowest.tolist())


@pytest.mark.parametrize(
    ("settings", "said", "wanted"),
    [
        ({"num_pauses": 5, "num_inference_pauses": 2, "placement": "prepend"}, {}, (2, "prepend")),
        ({"num_pauses": 5, "num_inference_pauses": 0, "placement": "prepend"}, {}, (0, "prepend")),
        ({"num_pauses": 5, "num_inference_pauses": 2}, {"num_inference_pauses": 0}, (0, "append")),
        ({"num_inference_pauses": 2, "placement": "prepend"}, {"pause_placement": "append"}, (2, "append")),
        (
            {"fraction": 0.1, "placement": "random", "num_inference_pauses": 0},
            {"num_inference_pauses": 3},
            (3, "append"),
        ),
        ({}, {}, (0, "append")),
    ],
)
def test_a_model_pauses_as_its_config_says_unless_told_otherwise(settings, said, wanted):
    model = SimpleNamespace(tokenizer=sample_tokenizer(), pause_id=7, pause_settings=settings)
    found = inference_pauses(model, InferencePauseArguments(**said))
    assert (found.num, found.placement, found.token_id) == (*wanted, 7)


def test_a_pause_is_never_written(paused_model):
    generator = PausedGenerator.from_pretrained(paused_model)
    ids = torch.from_numpy(generator.prompt(TEXTS[0])[None])
    out = generator.lm.generate(ids, max_new_tokens=40, do_sample=True, temperature=50.0)
    assert generator.pauses.token_id not in out[0, ids.shape[1] :]


@pytest.mark.parametrize("placement", ["middle", ["append"], None])
def test_a_placement_of_a_config_that_there_is_not_is_told(tmp_path, paused_model, placement):
    folder = shutil.copytree(paused_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["pause"]["placement"] = placement
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"config.json: 'placement' of 'pause' is .*one of append"):
        PausedGenerator.from_pretrained(folder)


PAUSE = {"token": "<unused0>", "token_id": 7, "placement": "append", "num_pauses": 3, "num_inference_pauses": 3}


@pytest.mark.parametrize(
    "values",
    [
        {"pause": "yes"},
        {"pause": ["<unused0>"]},
        {"pause": {"placement": "append"}},
        *({"pause": PAUSE | {"num_inference_pauses": number}} for number in (2.0, "3", True, -1, 10**30)),
        {"pause": PAUSE | {"token": 5}},
        {"layer_norm_epsilon": 0.0},
        {"attn_pdrop": 2.0},
        {"n_layer": 10**6},
    ],
)
def test_a_config_is_checked_as_the_commands_check_it(tmp_path, paused_model, values):
    folder = shutil.copytree(paused_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    with refused(f"{folder}", "config.json", next(iter(values))):
        load(str(folder), None, None, pause_token="<unused0>", with_pauses=False, seed=0)
    with refused(f"{folder}", "config.json", next(iter(values))):
        PausedGenerator.from_pretrained(folder)


@pytest.mark.parametrize("number", [10**9, "x", None, -1])
def test_the_pause_is_the_token_that_the_config_names_as_in_the_commands(tmp_path, paused_model, number):
    """Its id there is for others."""
    folder = shutil.copytree(paused_model, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["pause"]["token_id"] = number
    (folder / "config.json").write_text(json.dumps(config))
    found, wanted = (PausedGenerator.from_pretrained(path) for path in (folder, paused_model))
    assert found.prompt("글").tolist() == wanted.prompt("글").tolist()


def test_a_mistake_is_told(paused_model):
    with pytest.raises(UserError, match="placement middle: one of append"):
        PausedGenerator.from_pretrained(paused_model, placement="middle")
    with pytest.raises(UserError, match="/nowhere/model: no such folder"):
        PausedGenerator.from_pretrained("/nowhere/model")
    with pytest.raises(UserError, match="num_pauses -1: must be a whole number"):
        PausedGenerator.from_pretrained(paused_model, num_pauses=-1)
    with pytest.raises(UserError, match="tokens with its pauses; at most 508 leave room"):
        PausedGenerator.from_pretrained(paused_model).generate(["영화 " * 600], max_new_tokens=4)
    with pytest.raises(UserError, match="give a list of texts"):
        PausedGenerator.from_pretrained(paused_model).generate("영화")
    with pytest.raises(UserError, match="a prompt is empty"):
        PausedGenerator.from_pretrained(paused_model, num_pauses=0).generate([""])
