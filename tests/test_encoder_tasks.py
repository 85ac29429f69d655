"""finetune/train.py and evaluate.py on encoders as a user calls them: --task mrc, --task ict, --train_mode encoder."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

from finetune import evaluate, train
from finetune.arguments import ModelArguments
from finetune.encoder import load
from finetune.retrieval import Retriever
from kozero import distributed
from kozero.errors import UserError
from models.encoders import build_encoder, export_encoder, read_encoder_config
from tests.helpers import ROOT, SAMPLE_DATA, sample_tokenizer, toy_gpt2, word_tokenizer
from tests.scripts import run_script
from tests.test_commands import losses

DEV = SAMPLE_DATA / "korquad/KorQuAD_v1.0_dev.json"
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "ff_dim": 64, "max_position_embeddings": 160, "n_experts": 2}
CONFIGS = {
    "transformer": {"model_type": "kozero_transformer", "num_heads": 2, "ln_pos": 0, "dropout_prob": 0.1},
    "mix_lm": {"model_type": "kozero_mix_lm", "embedding_size": 16, "kernel_size": 3, "dropout_prob": 0.0},
}


@pytest.fixture(autouse=True)
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """Configs of small encoders, and a cache for all runs."""
    folder = tmp_path_factory.mktemp("encoders")
    for name, values in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(SIZES | values))
    return folder


@pytest.fixture(scope="module")
def pretrained(shared) -> Path:
    """A folder as pre-training with ICT leaves it."""
    config = read_encoder_config(shared / "mix_lm.json", "mix_lm", sample_tokenizer())
    module = torch.nn.Module()
    module.encoder = build_encoder(config, 3)
    heads = {"pool.weight": torch.linspace(0.01, 0.2, 160), "mlm.dense.bias": torch.zeros(16)}
    state = dict(module.named_parameters()) | heads
    export_encoder(shared / "pretrained", module, state, sample_tokenizer(), "# pretrained\n")
    return shared / "pretrained"


def call(monkeypatch, main, *flags):
    monkeypatch.setattr(sys, "argv", ["prog", *map(str, flags)])
    main()


def run(monkeypatch, shared, out, task, *flags, model="mix_lm"):
    """A short run; later flags win."""
    source = ("--config_file", shared / f"{model}.json") if model in CONFIGS else ("--model_name_or_path", model)
    told = ("--task", task, *source, "--output_dir", out, "--cache_dir", shared / "cache", "--logging_steps", 1)
    sizes = ("--max_steps", 4, "--eval_steps", 4, "--max_train_samples", 8, "--max_eval_samples", 6)
    call(monkeypatch, train.main, *told, *sizes, "--learning_rate", 0.01, *flags)


def score(monkeypatch, shared, model, task, *flags):
    told = ("--model_name_or_path", model, "--task", task, "--cache_dir", shared / "cache", "--max_eval_samples", 6)
    call(monkeypatch, evaluate.main, *told, *flags)


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("model", ["transformer", "mix_lm"])
def test_reading_is_learned_scored_and_exported(monkeypatch, shared, tmp_path, capsys, model):
    out = tmp_path / "run"
    run(monkeypatch, shared, out, "mrc", "--max_steps", 20, "--eval_steps", 20, "--dropout", 0, model=model)
    said = capsys.readouterr().out
    assert said.strip().splitlines()[-1] == str(out / "model") and "8 questions in 8 windows" in said
    found = losses(out)
    assert found[0] > 4 and found[-1] < 0.5 * found[0]  # log(100) for a guess among a hundred places
    parts = read_points(out)
    names = {"train/span_loss"} | ({"train/balance_loss", "train/router_z_loss"} if model == "transformer" else set())
    assert all(names <= set(row) for row in parts if "train/loss" in row)
    assert all(
        sum(row[name] for name in names) == pytest.approx(row["train/loss"]) for row in parts if "train/loss" in row
    )
    assert AutoModel.from_pretrained(out / "model").config.model_type == CONFIGS[model]["model_type"]
    assert AutoTokenizer.from_pretrained(out / "model").encode("말")
    assert all(word in (out / "model/README.md").read_text() for word in ("mrc", "exact_match", "heads.safetensors"))
    assert set(load_file(out / "model/heads.safetensors")) == {"span.weight", "span.bias"}
    predictions, nbest = read(out / "predictions.json"), read(out / "nbest.json")
    assert len(predictions) == 6 and all(answers[0]["text"] == predictions[name] for name, answers in nbest.items())
    score(monkeypatch, shared, out / "model", "mrc", "--output_file", tmp_path / "e.json")
    assert read(tmp_path / "e.json")["scores"] == pytest.approx(read(out / "scores.json")["scores"])
    assert read(tmp_path / "e.predictions.json") == predictions
    assert [answer["text"] for answers in read(tmp_path / "e.nbest.json").values() for answer in answers] == [
        answer["text"] for answers in nbest.values() for answer in answers
    ]


def read_points(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_retrieval_goes_on_from_pretraining_and_its_vectors_are_searched(
    monkeypatch, shared, pretrained, tmp_path, capsys
):
    out, vectors = tmp_path / "run", tmp_path / "vectors"
    flags = ("--max_steps", 16, "--eval_steps", 16, "--max_train_samples", 32)
    run(monkeypatch, shared, out, "ict", *flags, model=pretrained)
    assert "drawn anew" not in capsys.readouterr().out
    found = losses(out)
    assert found[0] > 1 and np.mean(found[-3:]) < 0.5 * found[0]
    pool = load_file(out / "model/heads.safetensors")["pool.weight"]
    before = load_file(pretrained / "heads.safetensors")["pool.weight"]
    assert not torch.equal(pool, before) and torch.equal(pool[150:], before[150:])  # no text is as long
    score(monkeypatch, shared, out / "model", "ict", "--output_file", tmp_path / "e.json")
    assert read(tmp_path / "e.json")["scores"] == pytest.approx(read(out / "scores.json")["scores"])

    capsys.readouterr()
    told = ("--train_mode", "encoder", "--model_name_or_path", out / "model", "--output_dir", vectors)
    call(monkeypatch, train.main, *told, "--cache_dir", shared / "cache")
    said = capsys.readouterr().out
    whole = read(vectors / "retrieval.json")
    assert set(whole["scores"]) == {str(out / "model"), "BM25 (bm25s, kiwipiepy morphemes)"}
    assert whole["scores"]["BM25 (bm25s, kiwipiepy morphemes)"]["recall@1"] > 0.8
    assert (vectors / "retrieval.md").read_text() in said and said.count("| recall@1 |") == 1
    texts = [json.loads(line)["text"] for line in (vectors / "passages.jsonl").read_text().splitlines()]
    rows = np.load(vectors / "vectors.npy", mmap_mode="r")
    assert rows.shape == (58, 32) and len(set(texts)) == 58  # of both files
    distributed.setup()
    model = load(ModelArguments(str(out / "model")), Retriever, 0)
    distributed.shutdown()
    ids = torch.tensor([[1, *model.tokenizer.encode(texts[50], add_special_tokens=False), 1]])
    with torch.no_grad():
        alone = model.module.eval()(ids, torch.ones_like(ids))[0]
    np.testing.assert_allclose(rows[50], alone.numpy(), atol=1e-5)


def test_a_resumed_run_ends_bit_for_bit_where_an_undisturbed_one_does(monkeypatch, shared, tmp_path):
    flags = ("--save_steps", 2, "--gradient_accumulation_steps", 2, "--train_batch_size", 2, "--max_seq_length", 96)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run(monkeypatch, shared, straight, "mrc", *flags, model="transformer")  # with dropout and dropped tokens
    shutil.copytree(straight, broken)
    shutil.rmtree(broken / "checkpoints/step-000004")
    shutil.rmtree(broken / "model")
    (broken / "predictions.json").unlink()
    run(monkeypatch, shared, broken, "mrc", *flags, "--resume", "auto", model="transformer")
    for name in ("model.safetensors", "heads.safetensors"):
        left, right = (load_file(out / "model" / name) for out in (straight, broken))
        assert all(torch.equal(left[key], right[key]) for key in left)
    assert losses(straight) == losses(broken)
    assert read(straight / "predictions.json") == read(broken / "predictions.json")
    with pytest.raises(UserError, match="doc_stride"):
        run(monkeypatch, shared, broken, "mrc", *flags, "--doc_stride", 9, "--resume", "auto", model="transformer")


def test_predictions_are_those_of_the_exported_weights(monkeypatch, shared, tmp_path):
    out = tmp_path / "run"
    run(monkeypatch, shared, out, "mrc", "--eval_steps", 1, "--learning_rate", 0)  # the first evaluation stays the best
    assert read(out / "scores.json")["step"] == 1
    score(monkeypatch, shared, out / "model", "mrc", "--output_file", tmp_path / "e.json")
    assert read(tmp_path / "e.predictions.json") == read(out / "predictions.json")


@pytest.mark.parametrize(("task", "epochs"), [("mrc", 5), ("ict", 3)])
def test_epochs_that_are_not_said_are_the_tasks(monkeypatch, shared, tmp_path, task, epochs):
    flags = ("--max_steps", 0, "--max_train_samples", 5, "--train_batch_size", 4)
    run(monkeypatch, shared, tmp_path / "run", task, *flags)
    assert read(tmp_path / "run/run.json")["arguments"]["num_train_epochs"] == epochs
    assert len(losses(tmp_path / "run")) == -(-5 * epochs // 4)


@pytest.mark.parametrize("task", ["mrc", "ict"])
def test_recomputed_activations_change_no_loss(monkeypatch, shared, tmp_path, task):
    for name, flags in (("plain", ()), ("recomputed", ("--gradient_checkpointing",))):
        run(monkeypatch, shared, tmp_path / name, task, "--max_steps", 2, *flags, model="transformer")
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "recomputed"), abs=1e-5)


# Mistakes ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2")
    toy_gpt2(vocab_size=4096).save_pretrained(folder)
    sample_tokenizer().save_pretrained(folder)
    return folder


BAD_INPUT = {
    "a language model that reads": (
        "mrc",
        "{gpt2}",
        [],
        "model_type 'gpt2'; an encoder of transformer, mix_lm is needed",
    ),
    "a language model's config": ("ict", None, ["--config_file", "models/tiny_config.json"], "model_type 'gpt2'"),
    "an encoder that classifies": ("nsmc", "{pretrained}", [], "model_type 'kozero_mix_lm'; 'gpt2' is needed here"),
    "an encoder's config": (
        "nsmc",
        None,
        ["--config_file", "{mix_lm}"],
        "model_type 'kozero_mix_lm'; 'gpt2' is needed",
    ),
    "model and config": ("mrc", "mix_lm", ["--model_name_or_path", "{pretrained}"], "either --model_name_or_path or"),
    "no such folder": ("mrc", "./no-model", [], "./no-model: no such folder"),
    "rows too short": ("mrc", "mix_lm", ["--max_seq_length", 80], "--max_seq_length 80: beside a question of"),
    "rows for nothing": (
        "ict",
        "mix_lm",
        ["--max_seq_length", 2],
        "--max_seq_length 2: 2 special tokens leave no room",
    ),
    "rows above the positions": ("ict", "mix_lm", ["--max_seq_length", 384], "the model has 160 positions"),
    "no stride": ("mrc", "mix_lm", ["--doc_stride", 0], "--doc_stride 0: must be 1 or more"),
    "no other passage": ("ict", "mix_lm", ["--train_batch_size", 1], "raise it (accumulated rows do not count)"),
    "pauses": ("mrc", "mix_lm", ["--num_pauses", 3], "--num_pauses 3: --task mrc has no pauses"),
    "frozen parts": ("ict", "mix_lm", ["--freeze", "h.0"], "--freeze h.0: names parts of a GPT-2"),
    "vectors of a reader": ("mrc", "mix_lm", ["--train_mode", "encoder"], "--train_mode encoder and --task mrc"),
    "nothing to train on": ("mrc", "mix_lm", ["--validation_file", str(DEV)], "--validation_file alone trains nothing"),
    "another shape": ("mrc", "mix_lm", ["--train_file", "sample_data/klue_nli/klue-nli-v1.1_dev.json"], "klue-nli"),
    "another tokenizer": ("mrc", "{pretrained}", ["--tokenizer_name_or_path", "{words}"], "vocabulary mismatch"),
    "half an encoder": ("mrc", "{half}", [], "1 weights are missing, the first is embeddings.norm.bias"),
    "a damaged head": ("ict", "{damaged}", [], "heads.safetensors: cannot be loaded"),
    "a head of another size": ("ict", "{short}", [], "pool.weight has the shape (9,), this encoder needs (160,)"),
}


@pytest.fixture(scope="module")
def places(shared, pretrained, gpt2) -> dict[str, Path]:
    """Folders that are wrong in their own way."""
    found = {"gpt2": gpt2, "pretrained": pretrained, "mix_lm": shared / "mix_lm.json"}
    for name in ("half", "damaged", "short"):
        found[name] = Path(shutil.copytree(pretrained, shared / name))
    weights = load_file(pretrained / "model.safetensors")
    del weights["embeddings.norm.bias"]
    save_file(weights, found["half"] / "model.safetensors", metadata={"format": "pt"})
    (found["damaged"] / "heads.safetensors").write_bytes(b"nothing")
    save_file({"pool.weight": torch.zeros(9)}, found["short"] / "heads.safetensors")
    word_tokenizer(9, ("<unk>", "</s>", "<pad>", "<s>")).save_pretrained(shared / "words")
    return found | {"words": shared / "words"}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_a_mistake_is_one_line_that_names_it_and_nothing_is_half_written(monkeypatch, shared, places, tmp_path, case):
    task, model, flags, message = BAD_INPUT[case]
    flags = [str(flag).format(**places) for flag in flags]
    source = [] if model is None else ["--config_file", shared / "mix_lm.json"]
    if model not in (None, "mix_lm"):
        source = ["--model_name_or_path", model.format(**places)]
    told = [
        "--task",
        task,
        *source,
        "--output_dir",
        tmp_path / "run",
        "--cache_dir",
        shared / "cache",
        "--max_steps",
        1,
    ]
    with pytest.raises(UserError) as error:
        call(monkeypatch, train.main, *told, *flags)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run/model").exists() and not (tmp_path / "run/checkpoints").exists()


def test_a_reader_without_a_head_is_not_scored(monkeypatch, shared, pretrained):
    with pytest.raises(UserError, match="no head for --task mrc; fine-tune one"):
        score(monkeypatch, shared, pretrained, "mrc")


# On two ranks ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("task", ["mrc", "ict"])
def test_two_ranks_under_every_stage_learn_what_one_process_does(shared, tmp_path, task):
    told = f"--task {task} --config_file {shared}/mix_lm.json --cache_dir {shared}/cache --max_steps 3 --eval_steps 3"
    told += " --logging_steps 1 --learning_rate 0.01 --max_eval_samples 7"
    alone = run_script(f"finetune/train.py {told} --train_batch_size 4 --output_dir {tmp_path}/alone")
    assert alone.returncode == 0, alone.stderr
    for name in ("plain", "zero1", "zero2", "zero3"):
        stage = "" if name == "plain" else f"--deepspeed_config ds_configs/{name}.json"
        run = f"finetune/train.py {told} {stage} --train_batch_size 2 --output_dir {tmp_path}/{name}"
        done = run_script(run, world_size=2)
        assert done.returncode == 0, done.stdout + done.stderr
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "alone"), abs=2e-5), name
        scores = [read(tmp_path / run / "scores.json")["scores"] for run in (name, "alone")]
        assert scores[0] == pytest.approx(scores[1]), name
        AutoModel.from_pretrained(tmp_path / name / "model")


@pytest.mark.slow
def test_two_ranks_write_the_vectors_of_one_process(shared, pretrained, tmp_path):
    told = f"finetune/train.py --train_mode encoder --model_name_or_path {pretrained} --cache_dir {shared}/cache"
    for world_size, name in ((1, "one"), (2, "two")):
        done = run_script(f"{told} --output_dir {tmp_path}/{name}", world_size)
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = (np.load(tmp_path / name / "vectors.npy") for name in ("one", "two"))
    np.testing.assert_allclose(one, two, atol=1e-6)
    assert read(tmp_path / "one/retrieval.json")["scores"] == read(tmp_path / "two/retrieval.json")["scores"]


def test_a_head_that_is_drawn_follows_the_seed(one_rank):
    def weight(seed: int) -> torch.Tensor:
        arguments = ModelArguments(config_file=str(ROOT / "models/transformer_tiny_config.json"))
        return load(arguments, lambda encoder: torch.nn.Sequential(torch.nn.Linear(9, 9)), seed).module[0].weight

    assert torch.equal(weight(1), weight(1)) and not torch.equal(weight(1), weight(2))
