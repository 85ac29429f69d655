"""Loading a model with its tokenizer and pause token, and the exported folder that plain transformers loads."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BertConfig, GPT2LMHeadModel
from transformers.activations import ACT2FN

from kozero.errors import UserError
from kozero.seal import whole_folder
from models import language_model
from models.causal_lm import reset_row
from models.language_model import LanguageModel, export, load, load_config, read_config
from tests.helpers import ROOT, SAMPLE_TOKENIZER, word_tokenizer

TINY = json.loads((ROOT / "models" / "tiny_config.json").read_text(encoding="utf-8"))
SMALLEST = TINY | {"n_layer": 1, "n_embd": 32, "n_inner": 64, "n_positions": 64}  # same vocabulary as the sample
IDS = torch.tensor([[1564, 1132, 1233, 7, 7, 610]])  # with two pauses


@pytest.fixture
def config_file(tmp_path):
    def write(value=None, **changes) -> str:
        path = tmp_path / "config.json"
        path.write_text(value if isinstance(value, str) else json.dumps((value or SMALLEST) | changes))
        return str(path)

    return write


def loaded(model: str | None = None, config: str | None = None, tokenizer: str | None = None, **other) -> LanguageModel:
    if config and not tokenizer:
        tokenizer = str(SAMPLE_TOKENIZER)
    options = {"pause_token": "<unused0>", "with_pauses": True, "seed": 3} | other
    return load(model, config, tokenizer, **options)


def refused(*args, **other) -> str:
    """The one line that a user reads."""
    with pytest.raises(UserError) as caught:
        loaded(*args, **other)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pauses_of(model: LanguageModel, num: int = 2) -> dict:
    token = model.tokenizer.convert_ids_to_tokens(model.pause_id)
    numbers = {"num_pauses": num, "num_inference_pauses": num}
    return {"token": token, "token_id": model.pause_id, "placement": "append"} | numbers


def exported(folder, model: LanguageModel, pause: dict | None = None):
    with whole_folder(folder) as made:
        export(made, model, model.module.state_dict(), pauses_of(model) if pause is None else pause, "# card")
    return folder


def logits(lm, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return lm.eval()(ids).logits


# Loading -----------------------------------------------------------------------------------------------------------


def test_a_config_makes_random_weights_by_its_seed_alone(config_file):
    one, again, other = (loaded(config=config_file(), seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one.module.parameters(), again.module.parameters(), strict=True))
    assert not torch.equal(one.module.lm.transformer.wte.weight, other.module.lm.transformer.wte.weight)


def test_loading_leaves_the_global_random_state_alone(config_file):
    before = torch.get_rng_state()
    loaded(config=config_file())
    assert torch.equal(torch.get_rng_state(), before)


def test_the_pause_is_a_spare_token_and_nothing_is_resized(config_file):
    model = loaded(config=config_file())
    assert model.pause_id == 7
    assert model.tokenizer.convert_ids_to_tokens(7) == "<unused0>"
    assert model.config.vocab_size == 4096


def test_the_pause_token_can_be_chosen(config_file):
    model = loaded(config=config_file(), pause_token="<unused3>")
    assert model.pause_id == model.tokenizer.convert_tokens_to_ids("<unused3>")


def test_the_pause_is_never_predicted(config_file):
    out = logits(loaded(config=config_file()).module.lm)
    assert (out[..., 7] == -torch.inf).all()
    assert torch.isfinite(out).sum(-1).unique().tolist() == [4095]


def test_without_pauses_no_token_is_silent(config_file):
    assert torch.isfinite(logits(loaded(config=config_file(), with_pauses=False).module.lm)).all()


def test_dropout_replaces_all_rates(config_file):
    model = loaded(config=config_file(), dropout=0.0)
    model.module.train()
    assert torch.equal(model.module.lm(IDS).logits, model.module.lm(IDS).logits)
    assert {model.config.resid_pdrop, model.config.embd_pdrop, model.config.attn_pdrop} == {0.0}


@pytest.fixture
def plain_words(tmp_path):
    """A tokenizer without spare tokens: 103 words and marks."""
    folder = tmp_path / "words"
    word_tokenizer(100).save_pretrained(folder)
    return str(folder)


def test_a_tokenizer_without_spare_tokens_gets_a_pause_and_padded_rows(config_file, plain_words):
    model = loaded(config=config_file(vocab_size=103), tokenizer=plain_words)
    assert model.pause_id == model.tokenizer.convert_tokens_to_ids("<pause>") == 103
    assert model.config.vocab_size == model.module.lm.transformer.wte.weight.shape[0] == 128


def test_an_added_pause_is_one_token_that_is_never_shown(config_file, plain_words):
    tokenizer = loaded(config=config_file(vocab_size=103), tokenizer=plain_words).tokenizer
    assert tokenizer("w1 <pause> w2", split_special_tokens=False)["input_ids"] == [4, 103, 5]
    assert tokenizer.decode([4, 103, 5], skip_special_tokens=True) == "w1 w2"


def test_rows_that_only_pad_the_vocabulary_are_never_predicted(config_file, plain_words):
    model = loaded(config=config_file(vocab_size=103), tokenizer=plain_words)
    out = logits(model.module.lm, torch.tensor([[4, 103, 5]]))
    assert torch.isfinite(out[..., :103]).all()
    assert (out[..., 103:] == -torch.inf).all()


def test_a_new_pause_takes_a_spare_row_where_there_is_one(config_file, plain_words):
    model = loaded(config=config_file(vocab_size=120), tokenizer=plain_words)
    assert (model.pause_id, model.config.vocab_size) == (103, 120)


def test_resizing_keeps_the_rows_of_known_tokens_and_the_tie(config_file, plain_words):
    grown = loaded(config=config_file(vocab_size=103), tokenizer=plain_words).module.lm
    plain = loaded(config=config_file(vocab_size=103), tokenizer=plain_words, with_pauses=False).module.lm
    assert torch.equal(grown.transformer.wte.weight[:103], plain.transformer.wte.weight)
    assert grown.lm_head.weight is grown.transformer.wte.weight


def test_without_pauses_no_token_is_added(config_file, plain_words):
    model = loaded(config=config_file(vocab_size=103), tokenizer=plain_words, with_pauses=False)
    assert model.pause_id is None
    assert (len(model.tokenizer), model.config.vocab_size) == (103, 103)


def test_special_tokens_that_the_files_leave_out_are_those_of_kogpt2(tmp_path):
    """As skt/kogpt2-base-v2 ships: tokenizer.json alone."""
    shutil.copy(SAMPLE_TOKENIZER / "tokenizer.json", tmp_path)
    tokenizer = language_model.load_tokenizer(str(tmp_path))
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "mask_token")
    assert [getattr(tokenizer, name) for name in names] == ["</s>", "</s>", "<unk>", "<pad>", "<mask>"]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 3)


# Exporting ---------------------------------------------------------------------------------------------------------


def test_plain_transformers_gives_the_same_logits(tmp_path, config_file):
    model = loaded(config=config_file())
    lm = AutoModelForCausalLM.from_pretrained(exported(tmp_path / "model", model))
    spoken = torch.arange(4096) != model.pause_id
    torch.testing.assert_close(logits(lm)[..., spoken], logits(model.module.lm)[..., spoken], atol=1e-6, rtol=0)


def test_a_model_trained_with_a_separate_pause_row_gives_the_same_logits(tmp_path, config_file):
    model = loaded(config=config_file())
    model.module.separate_pause_row()
    with torch.no_grad():
        model.module.lm.transformer.wte.pause_row.add_(0.5)
    lm = AutoModelForCausalLM.from_pretrained(exported(tmp_path / "model", model))
    spoken = torch.arange(4096) != model.pause_id
    torch.testing.assert_close(logits(lm)[..., spoken], logits(model.module.lm)[..., spoken], atol=1e-6, rtol=0)


def test_the_tokenizer_goes_with_the_model(tmp_path, config_file):
    model = loaded(config=config_file())
    tokenizer = AutoTokenizer.from_pretrained(exported(tmp_path / "model", model))
    text = "부정 아 더빙.. 진짜 <unused0>"
    for split in (True, False):
        wanted = model.tokenizer(text, split_special_tokens=split)["input_ids"]
        assert tokenizer(text, split_special_tokens=split)["input_ids"] == wanted
    assert tokenizer.eos_token == "</s>"


def test_an_added_pause_token_goes_with_the_model(tmp_path, config_file, plain_words):
    folder = exported(tmp_path / "model", loaded(config=config_file(vocab_size=103), tokenizer=plain_words))
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<pause>") == 103
    assert AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight.shape[0] == 128


def test_weights_are_safetensors_in_32_bit_tied_ones_once(tmp_path, config_file):
    folder = exported(tmp_path / "model", loaded(config=config_file()))
    assert not list(folder.glob("*.bin")) + list(folder.glob("*.pt"))
    with safe_open(folder / "model.safetensors", "pt") as file:
        names = set(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {torch.float32}
    assert "transformer.wte.weight" in names
    assert not {name for name in names if "lm_head" in name or "pause" in name or "mask" in name}


def test_the_config_says_which_pauses_and_how_many(tmp_path, config_file):
    model = loaded(config=config_file())
    folder = exported(tmp_path / "model", model)
    assert json.loads((folder / "config.json").read_text())["pause"] == pauses_of(model)
    assert AutoModelForCausalLM.from_pretrained(folder).config.pause == pauses_of(model)


def test_generation_suppresses_what_the_model_never_predicts(tmp_path, config_file, plain_words):
    spare = exported(tmp_path / "a", loaded(config=config_file()))
    grown = exported(tmp_path / "b", loaded(config=config_file(vocab_size=103), tokenizer=plain_words))
    settings = [json.loads((folder / "generation_config.json").read_text()) for folder in (spare, grown)]
    assert settings[0]["suppress_tokens"] == [7]
    assert sorted(settings[1]["suppress_tokens"]) == list(range(103, 128))
    assert (settings[0]["eos_token_id"], settings[0]["pad_token_id"]) == (1, 3)


def test_plain_transformers_never_writes_a_pause(tmp_path, config_file):
    model = loaded(config=config_file())
    ln_f, wte = model.module.lm.transformer.ln_f, model.module.lm.transformer.wte
    with torch.no_grad():
        ln_f.bias.copy_(100 * wte.weight[7])  # by its logit the pause would always come next
    lm = AutoModelForCausalLM.from_pretrained(exported(tmp_path / "model", model)).eval()
    assert logits(lm).argmax(-1).unique().tolist() == [7]
    written = lm.generate(IDS, max_new_tokens=5, do_sample=False)[0, IDS.shape[1] :]
    assert 7 not in written.tolist()


def test_a_model_without_pauses_says_nothing_about_them(tmp_path, config_file):
    folder = exported(tmp_path / "model", loaded(config=config_file(), with_pauses=False), pause={})
    assert "pause" not in json.loads((folder / "config.json").read_text())
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.suppress_tokens is None


@pytest.mark.parametrize("with_pauses", [True, False])
def test_an_exported_model_loads_again_with_its_pauses_and_weights(tmp_path, config_file, with_pauses):
    model = loaded(config=config_file())
    again = loaded(str(exported(tmp_path / "model", model)), with_pauses=with_pauses, seed=99)
    assert again.pause_settings == pauses_of(model)
    assert again.pause_id == 7
    assert torch.equal(again.module.lm.transformer.wte.weight, model.module.lm.transformer.wte.weight)
    torch.testing.assert_close(logits(again.module.lm), logits(model.module.lm), atol=1e-6, rtol=0)


def test_its_own_pause_token_wins_over_the_default_and_no_other_is_taken(tmp_path, config_file):
    folder = exported(tmp_path / "model", loaded(config=config_file(), pause_token="<unused3>"))
    for token in ("<unused0>", "<unused3>"):
        again = loaded(str(folder), pause_token=token)
        assert (again.pause_settings["token"], again.pause_id) == ("<unused3>", again.pause_settings["token_id"])
    assert "was trained with <unused3>" in refused(str(folder), pause_token="<unused1>")


def test_a_pause_token_that_the_tokenizer_lacks_is_refused(tmp_path, config_file):
    folder = exported(tmp_path / "model", loaded(config=config_file()))
    config = json.loads((folder / "config.json").read_text())
    config["pause"]["token"] = "<gone>"
    (folder / "config.json").write_text(json.dumps(config))
    assert "<gone>, which the tokenizer lacks" in refused(str(folder))


def test_a_model_that_meets_its_first_pauses_gets_a_fresh_row_by_seed(tmp_path, config_file):
    model = loaded(config=config_file(), with_pauses=False)
    folder = str(exported(tmp_path / "model", model, pause={}))
    rows = [loaded(folder, seed=seed).module.lm.transformer.wte.weight for seed in (3, 3, 4)]
    old = model.module.lm.transformer.wte.weight
    assert torch.equal(rows[0], rows[1])
    assert not torch.equal(rows[0][7], rows[2][7])
    assert not torch.equal(rows[0][7], old[7])
    assert torch.equal(rows[0][8:], old[8:])


def test_a_fresh_row_is_drawn_as_gpt2_draws_all():
    """Of 4,096 numbers, whose standard deviation has an error of 1.1 %."""
    table, config = torch.nn.Embedding(9, 4096), SimpleNamespace(n_embd=4096, initializer_range=0.3)
    before = table.weight.detach().clone()
    reset_row(SimpleNamespace(transformer=SimpleNamespace(wte=table), config=config, dtype=torch.float32), 7, seed=3)
    assert table.weight[7].std().item() == pytest.approx(0.3, rel=0.05)
    assert (table.weight != before).any(1).nonzero().flatten().tolist() == [7]


def test_random_weights_with_more_rows_than_tokens_load_again_after_export(tmp_path, config_file):
    """As --config_file models/kogpt2_config.json with the sample tokenizer does: 51,200 rows, 4,096 tokens."""
    model = loaded(config=config_file(vocab_size=8192))
    again = loaded(str(exported(tmp_path / "model", model)))
    torch.testing.assert_close(logits(again.module.lm), logits(model.module.lm), atol=1e-6, rtol=0)


def test_an_export_replaces_an_older_one_whole(tmp_path, config_file):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "old.bin").write_text("")
    exported(folder, loaded(config=config_file()))
    assert not (folder / "old.bin").exists()
    assert (folder / "README.md").read_text() == "# card"
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["model"]


class Evil:
    """Makes a folder when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def test_a_model_whose_weights_are_a_pickle_with_code_is_refused_and_does_nothing(tmp_path, config_file):
    folder, marker = tmp_path / "model", tmp_path / "marker"
    exported(folder, loaded(config=config_file()))
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    loaded(str(folder))  # plain ones are read: published models have them
    torch.save(weights | {"transformer.ln_f.weight": Evil(marker)}, folder / "pytorch_model.bin")
    assert "cannot be loaded" in refused(str(folder))
    assert not marker.exists()


def test_code_in_the_folder_of_a_model_is_not_run(tmp_path, config_file):
    folder, marker = tmp_path / "model", tmp_path / "marker"
    exported(folder, loaded(config=config_file()))
    (folder / "code.py").write_text(f"import os; os.mkdir({str(marker)!r})\nclass Config: pass\nclass Model: pass\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps(config))
    loaded(str(folder))
    assert not marker.exists()


def test_weights_that_are_not_the_models_are_not_exported(tmp_path, config_file):
    model = loaded(config=config_file())
    state = model.module.state_dict()
    state.pop("lm.transformer.h.0.attn.c_attn.weight")
    with pytest.raises(RuntimeError, match=r"c_attn\.weight"):
        export(tmp_path / "model", model, state, {}, "")
    assert not (tmp_path / "model").exists()


# What is refused ---------------------------------------------------------------------------------------------------


def test_a_config_of_fewer_rows_than_tokens_is_refused_with_both_numbers(config_file):
    message = refused(config=config_file(vocab_size=1000))
    assert "4,096 tokens" in message
    assert "1,000 rows" in message


def test_a_tokenizer_that_does_not_belong_to_the_weights_is_refused(tmp_path, config_file, plain_words):
    folder = exported(tmp_path / "model", loaded(config=config_file()))
    message = refused(str(folder), tokenizer=plain_words)
    assert "103 tokens" in message
    assert "4,096 rows" in message
    assert "--tokenizer_name_or_path" in message


@pytest.mark.parametrize("name", ["/nowhere/model", "./nowhere", "runs/nowhere/model", "nowhere/"])
def test_a_missing_folder_is_named(name):
    assert f"{name}: no such folder" in refused(name)


def test_a_missing_tokenizer_folder_is_named(config_file):
    assert "/nowhere: no such folder" in refused(config=config_file(), tokenizer="/nowhere")


def test_a_hub_name_offline_is_one_line_with_the_way_out():
    message = refused("skt/kogpt2-base-v2")
    assert "skt/kogpt2-base-v2" in message
    assert "--config_file" in message


def test_a_missing_config_is_named():
    assert "--config_file /nowhere.json: no such file" in refused(config="/nowhere.json")


@pytest.mark.parametrize("text", [" ", '{"n_layer" 2}'])
def test_a_config_that_is_no_json_is_named(config_file, text):
    assert "config.json:1: not JSON" in refused(config=config_file(text))


def test_an_unknown_config_key_is_answered_with_the_nearest(config_file):
    assert "unknown key 'n_layers', did you mean 'n_layer'" in refused(config=config_file(n_layers=3))


@pytest.mark.parametrize(
    "change",
    [
        {"n_layer": "zwei"},
        {"n_layer": 0},
        {"n_embd": -32},
        {"n_head": 3},
        {"n_positions": 0},
        {"n_inner": -5},
        {"n_positions": 10**14},
        {"resid_pdrop": 5},
        {"attn_pdrop": "half"},
        {"activation_function": "gelu_nwe"},
    ],
)
def test_a_config_of_impossible_values_is_refused(config_file, change):
    assert "--config_file" in refused(config=config_file(**change))


def test_an_unknown_activation_is_answered_with_the_nearest(config_file):
    assert "did you mean 'gelu_new'" in refused(config=config_file(activation_function="gelu_nwe"))


@pytest.mark.parametrize("name", ["gelu_new", "gelu_pytorch_tanh", "relu"])
def test_the_gelu_of_eight_operators_becomes_that_of_one(config_file, name):
    """From a JSON and from a folder alike; others stay."""
    path = Path(config_file(activation_function=name))
    wanted = "gelu_pytorch_tanh" if name == "gelu_new" else name
    assert [load(path).activation_function for load in (read_config, lambda path: load_config(str(path.parent)))] == [
        wanted, wanted,
    ]  # fmt: skip
    x = torch.linspace(-6, 6, 999)
    torch.testing.assert_close(ACT2FN[wanted](x), ACT2FN[name](x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("text", ['{"model_type": "bert"}', "{}", "[]"])
def test_a_config_of_another_architecture_is_refused(config_file, text):
    assert "'gpt2' is needed here" in refused(config=config_file(text))


def test_a_config_whose_head_is_not_tied_is_refused(config_file):
    """The head is taken from the embedding at export, so an untied one would be lost."""
    assert "tie_word_embeddings" in refused(config=config_file(tie_word_embeddings=False))


def test_a_folder_of_another_architecture_is_refused(tmp_path):
    shutil.copytree(SAMPLE_TOKENIZER, tmp_path / "bert")
    BertConfig().save_pretrained(tmp_path / "bert")
    message = refused(str(tmp_path / "bert"))
    assert "model_type 'bert'" in message
    assert str(tmp_path / "bert") in message


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_folder_is_named(tmp_path, config_file, name, damage):
    folder = exported(tmp_path / "model", loaded(config=config_file()))
    path = folder / name
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:200])
    else:
        path.unlink()
    assert str(folder) in refused(str(folder))


def test_a_folder_whose_head_is_not_tied_is_refused(tmp_path, config_file):
    folder = exported(tmp_path / "model", loaded(config=config_file()))
    config = AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = False
    GPT2LMHeadModel(config).save_pretrained(folder)
    assert str(folder) in refused(str(folder))


def with_weight(folder, name: str, weight: torch.Tensor) -> str:
    """The folder, whose file of weights has one more."""
    path = folder / "model.safetensors"
    save_file(load_file(path) | {name: weight}, path, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(("name", "shape"), [("lm_head.weight", (4096, 16)), ("lm_head.bias", (4096,))])
def test_a_head_of_its_own_is_refused_although_the_config_ties_it(tmp_path, config_file, name, shape):
    """It would be scored in training and left out of the exported model."""
    folder = exported(tmp_path / "model", loaded(config=config_file(n_embd=16, vocab_size=4096)))
    assert "lm_head" in refused(with_weight(folder, name, torch.ones(shape)))


def test_a_file_may_hold_the_tied_head_twice(tmp_path, config_file):
    folder = exported(tmp_path / "model", loaded(config=config_file()))
    table = load_file(folder / "model.safetensors")["transformer.wte.weight"]
    lm = loaded(with_weight(folder, "lm_head.weight", table.clone())).module.lm
    assert lm.lm_head.weight is lm.transformer.wte.weight


def test_weights_that_lack_a_layer_are_refused(tmp_path, config_file):
    """transformers would draw it at random and only print a table."""
    folder = exported(tmp_path / "model", loaded(config=config_file()))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 2}))
    assert str(folder) in refused(str(folder))


def test_a_tokenizer_without_end_of_text_is_refused(tmp_path, config_file):
    word_tokenizer(20, ("<unk>", "<pad>")).save_pretrained(tmp_path / "words")
    assert "no end-of-text token" in refused(config=config_file(vocab_size=64), tokenizer=str(tmp_path / "words"))


@pytest.mark.parametrize("both", [True, False])
def test_a_run_needs_one_model(config_file, both):
    path = config_file()
    assert "--model_name_or_path or --config_file" in refused("x/y" if both else None, path if both else None)


def test_random_weights_need_a_tokenizer(config_file):
    with pytest.raises(UserError, match=r"^--config_file makes random weights and needs --tokenizer_name_or_path$"):
        load(None, config_file(), None, pause_token="<unused0>", with_pauses=False, seed=0)


def test_weights_of_layers_that_the_config_does_not_have_are_not_dropped(tmp_path, config_file):
    folder = exported(tmp_path / "model", loaded(config=config_file(n_layer=2)))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_layer": 1}))
    assert "of layers that its config.json does not have" in refused(str(folder))


def test_weights_of_another_shape_are_named(tmp_path, config_file):
    folder = exported(tmp_path / "model", loaded(config=config_file()))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_positions": 32}))
    assert "wpe" in refused(str(folder))


def test_weights_that_are_not_finite_are_refused(tmp_path, config_file):
    model = loaded(config=config_file())
    with torch.no_grad():
        model.module.lm.transformer.ln_f.bias[3] = torch.nan
    assert "are not finite" in refused(str(exported(tmp_path / "model", model)))


@pytest.mark.parametrize(
    "pause",
    [
        "yes",
        {"token": "<unused0>"},
        {"token": "<unused0>", "num_pauses": "2", "num_inference_pauses": 2},
        {"token": "<unused0>", "num_pauses": 2, "num_inference_pauses": 10**30},
    ],
)
def test_pause_settings_of_another_form_are_refused(tmp_path, config_file, pause):
    folder = exported(tmp_path / "model", loaded(config=config_file()))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pause": pause}))
    assert "'pause' in its config.json" in refused(str(folder))


@pytest.mark.parametrize("text", ["[" * 100_000, '{"model_type": "gpt2", "n_layer": 2, "n_layer": 3}'])
def test_a_config_file_is_read_as_strictly_as_every_other(config_file, text):
    assert "config.json" in refused(config=config_file(text))


def test_a_replaced_export_leaves_nothing_behind(tmp_path, config_file):
    for _ in range(2):
        exported(tmp_path / "model", loaded(config=config_file()))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["model"]
