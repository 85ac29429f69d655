"""Folders of models and tokenizers that somebody broke, or made to break: one line, before anything large is made, or
the model that the weights are."""

import json
import logging
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune import train as finetuning
from finetune.paused import PausedGenerator
from kozero.errors import UserError
from models.encoders import build_encoder, export_encoder, load_encoder, read_encoder_config
from models.language_model import load, load_config, load_tokenizer, load_weights, read_config
from tests.helpers import ROOT, SAMPLE_TOKENIZER, export_paused, refused, sample_tokenizer

CONFIGS = {"gpt2": "tiny", "transformer": "transformer_tiny", "mix_lm": "mix_lm_tiny"}
HUGE, NAN, INF = 10**30, math.nan, math.inf

SIZE = (-2, 0, True, 1.5, NAN, HUGE, "2", [2])
RATE = (-0.1, 1, 1.5, NAN, INF, "0.1", [0.1])
WIDTH = (-1e-5, NAN, INF, 1e30, "1e-5", [1e-5])
NO_CHOICE = (3, "", "nope", [], {})
BAD: dict[str, dict[str, tuple]] = {
    "gpt2": {
        **dict.fromkeys(("n_head", "n_embd", "n_positions", "vocab_size", "n_inner"), SIZE),
        "n_layer": (*SIZE, 10**6, 900),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), RATE),
        "layer_norm_epsilon": (*WIDTH, 0, 1.0),
        "initializer_range": WIDTH,
        "activation_function": NO_CHOICE,
        "add_cross_attention": (True, 1, "no"),
        "tie_word_embeddings": (False, 0),
        "scale_attn_weights": (2, "yes"),
        "quantization_config": ({"quant_method": "bitsandbytes", "load_in_8bit": True},),
        "model_type": ("llama", "nope", 3, None),
    },
    "transformer": {
        **dict.fromkeys(("hidden_size", "num_heads", "ff_dim", "n_experts", "layer_group", "vocab_size"), SIZE),
        "num_hidden_layers": (*SIZE, 10**6),
        "dropout_prob": RATE,
        "LN_eps": (*WIDTH, 0, 1.0),
        "initializer_range": WIDTH,
        "capacity_factor": (*WIDTH, 0, 1e300),
        "act_fn": NO_CHOICE,
        "quantization_config": ({"quant_method": "bitsandbytes", "load_in_8bit": True},),
    },
    "mix_lm": {
        **dict.fromkeys(("hidden_size", "num_heads", "ff_dim", "n_experts", "kernel_size", "embedding_size"), SIZE),
        "num_hidden_layers": (*SIZE, 10**6),
        "dropout_prob": RATE,
        "LN_eps": (*WIDTH, 0, 1.0),
        "initializer_range": WIDTH,
        "act_fn": NO_CHOICE,
    },
}

# What changes code, precision, files or what is returned, not the model that the weights are.
OTHER_KEYS = {
    "attn_implementation": "kernels-community/flash-attn3",
    "_attn_implementation": "kernels-community/flash-attn3",
    "_attn_implementation_internal": "eager",
    "experts_implementation": "eager",
    "auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"},
    "torch_dtype": "float16",
    "dtype": "float16",
    "use_cache": False,
    "return_dict": False,
    "output_attentions": True,
    "output_hidden_states": True,
    "torchscript": True,
    "is_decoder": True,
    "is_encoder_decoder": True,
    "_name_or_path": "https://example.org/model",
    "transformers_weights": "other.safetensors",
    "gradient_checkpointing": True,
    "chunk_size_feed_forward": 1,
    "problem_type": "regression",
    "num_labels": 3,
    "max_length": -5,
    "temperature": -1.0,
    "architectures": ["NoSuchModel"],
    "device_map": "meta",
    "tp_plan": {"a": "b"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A small exported model of each architecture."""
    root = tmp_path_factory.mktemp("models")
    export_paused(root / "gpt2", ROOT / "models/tiny_config.json")
    for name in ("transformer", "mix_lm"):
        config = read_encoder_config(ROOT / f"models/{CONFIGS[name]}_config.json", name, sample_tokenizer())
        module = torch.nn.Module()
        module.encoder = build_encoder(config, 1)
        export_encoder(root / name, module, dict(module.named_parameters()), sample_tokenizer(), "# card")
    return {name: root / name for name in CONFIGS}


def changed(folder: Path, to: Path, **values: Any) -> Path:
    """A copy of a folder with other values in its config.json."""
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).symlink_to(path)
    (to / "config.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | values))
    return to


def vectors(name: str, folder: Path) -> torch.Tensor:
    """What a model says of two texts."""
    ids = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    if name == "gpt2":
        lm = load_weights(str(folder), load_config(str(folder))).eval()
        return lm(ids).logits.detach()
    return load_encoder(str(folder)).eval()(ids).last_hidden_state.detach()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_value_that_no_model_has_is_one_line_that_names_the_folder(folders, tmp_path, name):
    wrong = []
    for key, values in BAD[name].items():
        for number, value in enumerate(values):
            folder = changed(folders[name], tmp_path / f"{key}{number}", **{key: value})
            try:
                vectors(name, folder)
                wrong.append((key, value, "loads"))
            except UserError as error:
                if str(folder) not in str(error):
                    wrong.append((key, value, str(error)))
    assert wrong == []


@pytest.mark.parametrize("name", CONFIGS)
def test_keys_that_are_no_part_of_the_model_change_nothing(folders, tmp_path, name):
    found = vectors(name, changed(folders[name], tmp_path / "all", **OTHER_KEYS))
    assert torch.equal(found, vectors(name, folders[name]))


JSONS = ("config", "generation_config", "tokenizer", "tokenizer_config", "special_tokens_map", "added_tokens")


@pytest.mark.parametrize("text, told", [("[]", "list"), ("null", "NoneType"), ("[" * 100_000, "nested too deeply")])
def test_json_of_a_folder_that_is_no_object_is_named_by_its_file(folders, tmp_path, text, told):
    for file in JSONS:
        folder = changed(folders["gpt2"], tmp_path / file)
        path = folder / f"{file}.json"
        path.unlink(missing_ok=True)
        path.write_text(text)
        for reader in (load_tokenizer, load_config, PausedGenerator.from_pretrained):
            with refused(f"{path}: ", told):
                reader(str(folder))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("name", ["gpt2", "transformer"])
def test_weights_that_are_whole_numbers_are_refused(folders, tmp_path, name, file):
    """As int8 without what it was scaled by; also where a single weight is stored so."""
    folder = changed(folders[name], tmp_path / "int8")
    weights = load_file(folder / "model.safetensors")
    largest = max(weights, key=lambda key: weights[key].numel())
    weights[largest] = (weights[largest] * 100).to(torch.int8)
    (folder / "model.safetensors").unlink()
    if file.endswith(".bin"):
        torch.save(weights, folder / file)
    else:
        save_file(weights, folder / file, metadata={"format": "pt"})
    with refused(str(folder), "1 weights are whole numbers", largest.split(".")[-2]):
        vectors(name, folder)


def test_ids_of_a_config_that_nobody_uses_are_no_warning(folders, tmp_path, caplog):
    ids = {"bos_token_id": 10**6, "eos_token_id": 10**6, "pad_token_id": -5}
    folder = changed(folders["gpt2"], tmp_path / "ids", **ids)
    logging.getLogger("transformers").addHandler(caplog.handler)
    load(str(folder), None, None, pause_token="<unused0>", with_pauses=True, seed=1)
    values = json.loads((ROOT / "models/tiny_config.json").read_text()) | ids
    (tmp_path / "config.json").write_text(json.dumps(values))
    read_config(tmp_path / "config.json")
    PausedGenerator.from_pretrained(str(folder))
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert caplog.messages == []


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_in_a_folder_is_refused(folders, tmp_path, name):
    folder = changed(folders[name], tmp_path / "model")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/else", "peft_type": "LORA"}')
    with pytest.raises(UserError, match=f"{folder}: holds an adapter"):
        vectors(name, folder)


LARGE_SIZES = [{"n_layer": 10**6}, {"n_layer": 200, "n_embd": 2**16}]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [*((name, sizes) for name in CONFIGS for sizes in LARGE_SIZES), ("gpt2", {"vocab_size": 2**45})],
)  # an encoder's vocabulary is its tokenizer's
def test_a_config_of_more_weights_than_memory_is_refused_before_they_are_made(tmp_path, name, sizes):
    """Of random weights: numbers of layers, widths, words that no machine of today holds."""
    shipped = json.loads((ROOT / f"models/{CONFIGS[name]}_config.json").read_text())
    names = {"n_layer": "num_hidden_layers", "n_embd": "hidden_size"} if name != "gpt2" else {}
    path = tmp_path / "config.json"
    values = {names.get(key, key): value for key, value in sizes.items()}
    path.write_text(json.dumps(shipped | values))
    with pytest.raises(UserError, match=str(path)):
        if name == "gpt2":
            load(None, str(path), str(SAMPLE_TOKENIZER), pause_token="<unused0>", with_pauses=False, seed=1)
        else:
            build_encoder(read_encoder_config(path, name, sample_tokenizer()), 1)


@pytest.mark.parametrize("key", ["n_layer", "n_embd", "vocab_size", "n_positions", "n_inner"])
def test_sizes_that_no_model_has_are_refused_without_making_it(tmp_path, key):
    """Also for a plan, which asks for no memory: a million layers take minutes there."""
    path, most = tmp_path / "config.json", 1000 if key == "n_layer" else 2**24
    shipped = json.loads((ROOT / "models/tiny_config.json").read_text())
    path.write_text(json.dumps(shipped | {key: most + 1}))
    with refused(f"{path}: {key} {most + 1}: must be a whole number from 1 to {most:,}"):
        read_config(path)


@pytest.mark.parametrize("value", [NAN, INF, 0, 1.0, -1e-5, True])
def test_a_norm_that_divides_by_nothing_is_refused_in_a_config_file_too(tmp_path, value):
    path = tmp_path / "config.json"
    shipped = json.loads((ROOT / "models/tiny_config.json").read_text())
    path.write_text(json.dumps(shipped | {"layer_norm_epsilon": value}))
    with pytest.raises(UserError, match="layer_norm_epsilon"):
        read_config(path)


# Tokenizers ----------------------------------------------------------------------------------------------------------


def replace(pattern: dict, content: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


BOMB = {"Regex": "(a+)+b"}  # Oniguruma gives up after some million steps, and Rust panics
GROWING = {
    "letters": [replace({"String": "a"}, "a" * 1000)] * 4,
    "empty matches": [replace({"Regex": "x*"}, "ab")] * 20,
    "a sequence in a sequence": [{"type": "Sequence", "normalizers": [replace({"String": "a"}, "a" * 99)] * 9}],
    "beginnings": [{"type": "Prepend", "prepend": "a" * 200}, replace({"String": "a"}, "a" * 200)],
}
LONG = "a" * 40
TEXT = "정말 재미있는 영화였습니다"


def tokenizer_folder(to: Path, **parts: Any) -> str:
    """The sample tokenizer with other parts."""
    shutil.copytree(SAMPLE_TOKENIZER, to)
    path = to / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | parts), encoding="utf-8")
    return str(to)


@pytest.mark.parametrize("part", ["normalizer", "decoder"])
@pytest.mark.parametrize("case", GROWING)
def test_a_tokenizer_that_makes_long_texts_of_short_ones_is_refused(tmp_path, part, case):
    steps = GROWING[case]
    if part == "decoder":
        steps = [step | {"decoders": step["normalizers"]} if "normalizers" in step else step for step in steps]
        steps = [step for step in steps if step["type"] != "Prepend"] * 2
    name = tokenizer_folder(tmp_path / "t", **{part: {"type": "Sequence", f"{part}s": steps}})
    with pytest.raises(UserError, match=rf"tokenizer {name}: its {part} .* times as long"):
        load_tokenizer(name)


def test_tokenizers_whose_parts_are_usual_are_taken(tmp_path):
    """ALBERT's, CLIP's and Llama's steps, which may make a text a little longer."""
    albert = [replace({"String": "``"}, '"'), {"type": "NFKD"}, {"type": "StripAccents"}, {"type": "Lowercase"}]
    clip = [{"type": "NFC"}, replace({"Regex": "\\s+"}, " "), {"type": "Lowercase"}]
    llama = [{"type": "Prepend", "prepend": "▁"}, replace({"String": " "}, "▁")]
    for number, steps in enumerate((albert, clip, llama, [*albert, *clip, *llama])):
        name = tokenizer_folder(tmp_path / str(number), normalizer={"type": "Sequence", "normalizers": steps})
        assert load_tokenizer(name).backend_tokenizer.encode("영화").ids


def test_a_panic_of_the_tokenizers_library_is_one_line(tmp_path, monkeypatch, one_rank):
    name = tokenizer_folder(tmp_path / "t", normalizer=replace(BOMB, "x"))
    train = tmp_path / "train.txt"
    train.write_text(f"id\tdocument\tlabel\n1\t좋다 {LONG}\t1\n2\t나쁘다\t0\n", encoding="utf-8")
    flags = ["--config_file", "models/tiny_config.json", "--tokenizer_name_or_path", name, "--train_file", str(train)]
    flags += [
        "--validation_file",
        str(train),
        "--output_dir",
        str(tmp_path / "run"),
        "--cache_dir",
        str(tmp_path / "c"),
    ]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(UserError, match=rf"tokenizer {name}: .*retry-limit"):
        finetuning.main()


def test_a_tokenizer_that_cannot_encode_is_one_line(tmp_path):
    model = {"type": "WordLevel", "vocab": {"</s>": 0, "<unk>": 1, "a": 2}, "unk_token": "<gone>"}
    name = tokenizer_folder(tmp_path / "t", model=model, added_tokens=[], normalizer=None)
    with pytest.raises(UserError, match=f"tokenizer {name}"):
        from kozero.data.store import encodings

        encodings(["나"], load_tokenizer(name))


def test_a_text_has_the_same_tokens_every_time(tmp_path):
    """With dropout of merges (Provilkov et al. 2020) each reading is another: no score could be had again."""
    model = json.loads((SAMPLE_TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokenizer = load_tokenizer(tokenizer_folder(tmp_path / "t", model=model | {"dropout": 0.5}))
    assert {tuple(tokenizer.encode(text)) for text in [TEXT] * 20} == {tuple(sample_tokenizer().encode(TEXT))}


def test_ids_beyond_the_number_of_tokens_are_refused(tmp_path):
    model = {"type": "WordLevel", "vocab": {"</s>": 0, "<unk>": 1, "a": 10**6}, "unk_token": "<unk>"}
    name = tokenizer_folder(tmp_path / "t", model=model, added_tokens=[], normalizer=None)
    with pytest.raises(UserError, match=rf"tokenizer {name}: the id of 'a' is 1,000,000"):
        load_tokenizer(name)
