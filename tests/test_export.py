"""What a run exports: whole, on the disk, for whom the umask allows, and tried before there is anything to lose."""

import os
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from finetune import train as finetuning
from finetune.card import encoder_card, model_card
from kozero.errors import UserError
from kozero.loop import Trainer
from kozero.seal import whole_folder
from models.encoders import build_encoder, export_encoder, read_encoder_config
from models.language_model import export, load
from pretrain import run as pretraining
from tests.helpers import ROOT, SAMPLE_TOKENIZER, sample_tokenizer
from tests.test_seal import assert_on_disk, disk  # noqa: F401  a fixture


def language_model(folder: Path, weights: bool = True, templates: dict[str, str] | None = None) -> None:
    config = str(ROOT / "models/tiny_config.json")
    model = load(None, config, str(SAMPLE_TOKENIZER), pause_token="<unused0>", with_pauses=True, seed=1)
    model.tokenizer.chat_template = templates
    state = dict(model.module.named_parameters()) if weights else None
    export(folder, model, state, {"token": "<unused0>", "token_id": model.pause_id}, "# 카드 \udc80")


def encoder(folder: Path, weights: bool = True) -> None:
    config = read_encoder_config(ROOT / "models/transformer_tiny_config.json", "transformer", sample_tokenizer())
    module = torch.nn.Module()
    module.encoder, module.head = build_encoder(config, 1), torch.nn.Linear(2, 2)
    export_encoder(folder, module, dict(module.named_parameters()) if weights else None, sample_tokenizer(), "# card")


KINDS = pytest.mark.parametrize("kind", [language_model, encoder])


@KINDS
@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_every_exported_file_has_the_mode_that_the_umask_leaves(tmp_path, kind, umask):
    before = os.umask(umask)
    try:
        with whole_folder(tmp_path / "model") as folder:
            kind(folder)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()}
    assert modes == dict.fromkeys(modes, 0o666 & ~umask) and "model.safetensors" in modes
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o777 & ~umask


@KINDS
def test_all_of_an_export_is_on_the_disk_before_it_has_its_name(tmp_path, disk, kind):  # noqa: F811
    with whole_folder(tmp_path / "model") as folder:
        kind(folder)
    assert_on_disk(disk, tmp_path / "model", folder)


def test_a_folder_that_is_not_filled_leaves_what_was_there(tmp_path):
    with whole_folder(tmp_path / "model") as folder:
        (folder / "old").touch()
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "model") as folder:
        (folder / "half").touch()
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old"]


@KINDS
def test_an_export_without_weights_is_the_export_but_for_them(tmp_path, kind):
    for name in ("whole", "tried"):
        kind(tmp_path / name, weights=name == "whole")
    whole, tried = ({path.name: path.read_bytes() for path in (tmp_path / n).iterdir()} for n in ("whole", "tried"))
    assert tried == {name: content for name, content in whole.items() if not name.endswith(".safetensors")}
    assert len(tried) < len(whole)


TEMPLATES = {"default": "{{ messages }}", "rag/v2": "a", "../../../up": "b", "/tmp/up": "c", "": "d", "가" * 200: "e"}


@pytest.mark.parametrize("names", [["default", "tool_use"], *(["default", name] for name in TEMPLATES)])
def test_chat_templates_of_any_name_come_back_and_none_is_written_elsewhere(tmp_path, names):
    templates = {name: TEMPLATES.get(name, "t") for name in names}
    language_model(tmp_path / "a/b/c/model", weights=False, templates=templates)
    assert {path.name for path in tmp_path.rglob("*") if path.is_dir()} <= {
        "a",
        "b",
        "c",
        "model",
        "additional_chat_templates",
    }
    assert not any(path.is_file() for path in (tmp_path, tmp_path / "a", tmp_path / "a/b", tmp_path / "a/b/c"))
    found = AutoTokenizer.from_pretrained(tmp_path / "a/b/c/model").chat_template
    assert (found if isinstance(found, dict) else {"default": found}) == templates


def test_a_card_tells_what_was_trained_on_what_was_scored_and_the_license_of_its_base():
    run = {
        "arguments": {"model_name_or_path": "skt/kogpt2-base-v2", "config_file": None, "seed": 7},
        "git_commit": "c0",
    }
    pause = {"token": "<pause>", "num_pauses": 3, "placement": "append"}
    lines = model_card("nsmc", run, ("train.txt", "test.txt"), {"accuracy": 0.87654}, 120, pause).splitlines()
    wanted = [
        "base_model: skt/kogpt2-base-v2", "license: cc-by-nc-sa-4.0", "- Start: skt/kogpt2-base-v2",
        "- Trained on: train.txt", "- Scored on: test.txt", "- Pauses: 3 x `<pause>`, append",
        "- Step 120, seed 7, commit c0", "| accuracy | 0.8765 |",
    ]  # fmt: skip
    assert [line for line in lines if line in wanted] == wanted
    run["arguments"] |= {"model_name_or_path": None, "config_file": "tiny.json"}
    lines = encoder_card("mrc", run, ("train.json", "dev.json"), {}, 1).splitlines()
    assert "- Start: random weights of tiny.json" in lines and not any(line.startswith("license") for line in lines)


RUNS = {
    "a language model": (finetuning, ["--task", "nsmc", "--output_dir", "{}/run"]),
    "an encoder": (finetuning, ["--task", "mrc", "--output_dir", "{}/run"]),
    "pre-training": (pretraining, ["--model_name", "run", "--output_dir", "{}", "--train_batch_size", "2",
                                   "--config_file", "models/transformer_tiny_config.json"]),
}  # fmt: skip


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("run", RUNS)
def test_what_cannot_be_exported_is_known_before_anything_is_tokenised(monkeypatch, tmp_path, run):
    module, flags = RUNS[run]
    flags = [flag.format(tmp_path) for flag in [*flags, "--cache_dir", "{}/cache"]]

    def fails(*told, **named):
        raise ValueError("Invalid chat template name: 'x'\nmore")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["prog", *flags])
    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", fails)
    monkeypatch.setattr(Trainer, "fit", lambda self: pytest.fail("it trains"))
    with pytest.raises(UserError, match=r"--output_dir .*run: the model could not be exported there \(ValueError: Inv"):
        module.main(*["train"] * (module is pretraining))
    assert not list(tmp_path.iterdir())
