"""Pre-training as a user runs it: the three entries, what a run leaves, resume, mistakes."""

import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, BertConfig

from kozero.checkpoint import RunState, damage
from kozero.config import BatchSizes
from kozero.data.batch import Batch
from kozero.data.order import ABSENT
from kozero.errors import UserError
from models import encoders
from pretrain import launch, train, train_zero_one, train_zero_two
from pretrain import run as pretraining
from pretrain.model import card, causal_lm
from tests import helpers
from tests.helpers import ROOT, interruptible, sample_tokenizer, toy_gpt2, word_tokenizer
from tests.scripts import run_script

pytestmark = pytest.mark.usefixtures("one_rank")

SIZES = (
    "--num_steps", 4, "--train_batch_size", 4, "--warmup_steps", 1, "--scheduler_num_steps", 8, "--max_seq_length", 64,
    "--logging_steps", 1, "--eval_steps", 2, "--max_eval_samples", 8, "--learning_rate", 0.003,
)  # fmt: skip


def pretrain(monkeypatch, folder, *flags, entry="train", model="transformer"):
    config = "tiny_config.json" if model == "causal_lm" else f"{model}_tiny_config.json"
    source = () if "--checkpoint" in flags else ("--config_file", ROOT / "models" / config)
    told = [
        "--model_name",
        "hong",
        "--model",
        model,
        *source,
        *SIZES,
        "--output_dir",
        folder,
        "--cache_dir",
        folder.parent / "cache",
        *flags,
    ]
    monkeypatch.setattr(sys, "argv", ["prog", *map(str, told)])
    pretraining.main(entry)
    return folder / "hong"


def points(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return {row["step"]: row["train/loss"] for row in points(folder) if "train/loss" in row}


@pytest.mark.parametrize(("num_tokens", "rows"), [(128, 128), (129, 256), (255, 256), (256, 256)])
def test_a_vocabulary_has_the_next_multiple_of_128_rows(num_tokens, rows):
    told = SimpleNamespace(checkpoint=None, seed=1)
    corpus = SimpleNamespace(config_file=str(ROOT / "models/tiny_config.json"))
    lm = causal_lm(told, corpus, num_tokens)
    assert lm.config.vocab_size == lm.get_input_embeddings().num_embeddings == rows


@pytest.mark.parametrize("task", ["mlm", "mlm_sop", "mlm_ict"])
@pytest.mark.parametrize("model", ["transformer", "mix_lm"])
def test_an_encoder_learns_and_loads_again(monkeypatch, tmp_path, model, task):
    longer = ("--num_steps", 12, "--scheduler_num_steps", 24, "--dropout", 0)
    folder = pretrain(monkeypatch, tmp_path / "runs", "--task", task, *longer, model=model)
    curve = list(losses(folder).values())
    assert len(curve) == 12 and sum(curve[-4:]) < sum(curve[:4])
    last = points(folder)[-1]
    parts = task.split("_") + (["balance", "router_z"] if model == "transformer" else [])
    assert last["eval/loss"] == pytest.approx(sum(last[f"eval/{part}_loss"] for part in parts), rel=1e-6)
    encoder, tokenizer = AutoModel.from_pretrained(folder / "model"), AutoTokenizer.from_pretrained(folder / "model")
    assert encoder(**tokenizer("정말 좋다", return_tensors="pt")).last_hidden_state.shape[-1] == 64
    assert (folder / "model/heads.safetensors").is_file()


def test_a_language_model_learns_from_scratch_and_writes(monkeypatch, tmp_path):
    folder = pretrain(monkeypatch, tmp_path / "runs", model="causal_lm")
    curve = losses(folder)
    assert curve[4] < curve[1]
    lm = AutoModelForCausalLM.from_pretrained(folder / "model")
    prompt = AutoTokenizer.from_pretrained(folder / "model")("오늘은", return_tensors="pt")
    written = lm.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)[0].tolist()
    given = prompt["input_ids"][0].tolist()
    assert written[: len(given)] == given and len(written) == len(given) + 5


def test_a_resumed_run_is_the_run_that_never_stopped(monkeypatch, tmp_path, capsys):
    whole = pretrain(monkeypatch, tmp_path / "whole")
    pretrain(monkeypatch, tmp_path / "parts", "--num_steps", 2)
    capsys.readouterr()
    parts = pretrain(monkeypatch, tmp_path / "parts", "--resume", "auto")
    assert {"max_steps: 2 -> 4", "total_steps: 2 -> 4"} <= set(capsys.readouterr().out.splitlines())
    assert losses(parts) == losses(whole)
    ours, theirs = (AutoModel.from_pretrained(folder / "model").state_dict() for folder in (whole, parts))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_whose_held_out_loss_rises_at_the_end_exports_the_best_weights(monkeypatch, tmp_path):
    """The best ones are neither the first nor the last; what is exported is what a run of so many steps ends with."""
    rising = iter([3.0, 2.0, 2.5, 2.25])
    told = ("--dropout", 0, "--eval_steps", 1)
    with monkeypatch.context() as patch:
        patch.setattr(pretraining, "held_out_scores", lambda *_: {"loss": next(rising)})
        found = pretrain(patch, tmp_path / "rising", *told, model="mix_lm")
    short = pretrain(monkeypatch, tmp_path / "short", *told, "--num_steps", 2, model="mix_lm")
    ours, theirs = (load_file(folder / "model/model.safetensors") for folder in (found, short))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "the weights are those of step 2" in (found / "model/README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("model", ["transformer", "mix_lm", "causal_lm"])
def test_recomputed_activations_change_nothing(monkeypatch, tmp_path, model):
    kept = losses(pretrain(monkeypatch, tmp_path / "kept", model=model))
    calls = []
    recompute = torch.utils.checkpoint.checkpoint
    count = lambda *args, **kwargs: calls.append(1) or recompute(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr("torch.utils.checkpoint.checkpoint", count)
    monkeypatch.setattr("transformers.modeling_utils.checkpoint", count)
    assert losses(pretrain(monkeypatch, tmp_path / "again", "--gradient_checkpointing", model=model)) == kept
    assert calls


@pytest.mark.parametrize("task", ["mlm_sop", pytest.param("mlm_ict", marks=pytest.mark.slow)])
def test_held_out_scores_do_not_depend_on_the_batch(monkeypatch, tmp_path, task):
    """Each row counts once, beside the same others, however many are trained on at once."""
    last = []
    for rows in (2, 5, 64):  # fewer and more than are held out
        told = ("--task", task, "--learning_rate", 0, "--train_batch_size", rows, "--validation_fraction", 0.3)
        folder = pretrain(monkeypatch, tmp_path / str(rows), *told, "--max_eval_samples", 0, model="mix_lm")
        last.append({name: value for name, value in points(folder)[-1].items() if name.startswith("eval/")})
    for scores in last[1:]:
        assert scores == pytest.approx(last[0], rel=1e-5)


def test_an_objective_without_targets_has_no_value_and_its_share_is_told(monkeypatch, tmp_path, capsys):
    """Of nine documents the first alone has two sentences, and the last three are held out."""
    (tmp_path / "corpus.txt").write_text(
        "산이 높다.\n물이 맑다.\n" + "".join(f"\n문장 {k}.\n" for k in range(8)), "utf-8"
    )
    told = ("--corpus_path", tmp_path / "corpus.txt", "--validation_fraction", 0.3, "--train_batch_size", 2)
    folder = pretrain(monkeypatch, tmp_path / "runs", *told, "--num_steps", 3, model="mix_lm")
    said = capsys.readouterr().out
    assert "warning: sop: 16.7% of the training rows and 0.0% of the held-out rows have the two sentences" in said
    trained = [point for point in points(folder) if "train/loss" in point]
    with_sop = [point for point in trained if "train/sop_loss" in point]
    assert len(trained) == 3 and len(with_sop) == 1  # six rows, each once
    for point in trained:
        parts = [point[name] for name in ("train/mlm_loss", "train/sop_loss") if name in point]
        assert min(parts) > 0.1 and point["train/loss"] == pytest.approx(sum(parts))
    scores = {name: value for name, value in points(folder)[-1].items() if name.startswith("eval/")}
    assert set(scores) == {"eval/loss", "eval/mlm_loss", "eval/mlm_accuracy"}
    assert scores["eval/loss"] == scores["eval/mlm_loss"]


@pytest.mark.parametrize(
    ("name", "value"), [("act_fn", "relu"), ("num_heads", 4), ("causal", True), ("capacity_factor", 2.0)]
)
def test_a_run_goes_on_with_the_same_architecture_alone(monkeypatch, tmp_path, name, value):
    shipped = ROOT / "models/transformer_tiny_config.json"
    pretrain(monkeypatch, tmp_path / "runs", "--task", "mlm")
    (tmp_path / "other.json").write_text(json.dumps(json.loads(shipped.read_text()) | {name: value}))
    told = ("--task", "mlm", "--resume", "auto", "--num_steps", 6, "--config_file", tmp_path / "other.json")
    with pytest.raises(UserError, match=f"{name} of the model"):
        pretrain(monkeypatch, tmp_path / "runs", *told)


def test_a_run_goes_on_with_another_split_of_its_rows_and_not_with_others(monkeypatch, tmp_path):
    told = ("--dropout", 0)
    whole = losses(pretrain(monkeypatch, tmp_path / "runs", *told, "--num_steps", 4, model="mix_lm"))
    pretrain(monkeypatch, tmp_path / "half", *told, "--num_steps", 2, model="mix_lm")
    again = (*told, "--resume", "auto", "--num_steps", 4)
    split = ("--train_batch_size", 2, "--gradient_accumulation_steps", 2)
    found = losses(pretrain(monkeypatch, tmp_path / "half", *again, *split, model="mix_lm"))
    assert found == pytest.approx(whole, rel=1e-5)
    with pytest.raises(UserError, match="4, this run has 8"):
        pretrain(monkeypatch, tmp_path / "half", *again, "--gradient_accumulation_steps", 2, model="mix_lm")


def test_a_corpus_of_many_small_files_needs_no_more_open_files_than_are_allowed(monkeypatch, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    (tmp_path / "corpus").mkdir()
    for k in range(60):
        (tmp_path / f"corpus/{k}.txt").write_text(f"{k}번째 글입니다.\n둘째 줄도 있습니다.\n", encoding="utf-8")
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, limits[1]))
        pretrain(monkeypatch, tmp_path / "runs", "--corpus_path", tmp_path / "corpus")
        monkeypatch.setattr(resource, "getrlimit", lambda _: (200, 300))
        with pytest.raises(UserError, match="872 open files and 300 are allowed; join small files"):
            pretrain(monkeypatch, tmp_path / "more", "--corpus_path", tmp_path / "corpus")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_run_may_start_from_the_weights_of_another(monkeypatch, tmp_path):
    first = pretrain(monkeypatch, tmp_path / "first", "--learning_rate", 0)
    flags = ("--checkpoint", first / "model", "--learning_rate", 0, "--seed", 7, "--num_steps", 1)
    second = pretrain(monkeypatch, tmp_path / "second", *flags)
    ours, theirs = (AutoModel.from_pretrained(folder / "model").state_dict() for folder in (first, second))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_held_out_text_is_never_trained_on(monkeypatch, tmp_path):
    """A corpus whose last document alone has a word: the training rows never hold it."""
    wood, sea = "나무가 자란다. 숲이 푸르다.", "바다가 깊다. 파도가 높다."
    (tmp_path / "corpus.txt").write_text("\n\n".join([wood] * 30 + [sea]))
    given = {}
    monkeypatch.setattr(pretraining, "make_rows", lambda *args: given.setdefault("data", make(*args)))
    pretrain(
        monkeypatch,
        tmp_path / "runs",
        "--corpus_path",
        tmp_path / "corpus.txt",
        "--task",
        "mlm",
        "--validation_fraction",
        0.01,
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "runs/hong/model")
    only = set(tokenizer(sea)["input_ids"]) - set(tokenizer(wood)["input_ids"])
    rows, held_out = given["data"].training, given["data"].validation
    trained = np.concatenate([np.concatenate(rows.chunks[k]) for k in range(len(rows.chunks))])
    assert not only & set(trained.tolist())
    assert only <= set(np.concatenate(held_out.chunks[0]).tolist()) and len(held_out.chunks) == 1


make = pretraining.make_rows


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--corpus_path", "nowhere"], "--corpus_path nowhere: no such file or folder"),
        (["--max_seq_length", "129"], "the model has 128 positions"),
        (["--task", "clm"], "--model transformer and --task clm"),
        (["--config_file", "models/mix_lm_tiny_config.json"], "'kozero_transformer' is needed here"),
        (["--config_file", "nowhere.json"], "nowhere.json: no such file"),
        (["--tokenizer_name_or_path", "./nowhere"], "./nowhere: no such folder"),
        (["--model_name", "a/b"], "a name, not a path"),
        (["--checkpoint", "./nowhere"], "./nowhere: no such folder"),
        (["--scheduler_num_steps", "2"], "must be the run's 4 steps or more"),
        (["--corpus_hub", "owner/none"], "Offline? Give files with --corpus_path"),
        (["--mask_share", "1"], "--mask_share 1.0"),
        (
            ["--task", "mlm_ict", "--train_batch_size", "1"],
            "told apart from the others of its forward pass, and there are none",
        ),
        (["--num_train_epochs", "3"], "--num_train_epochs 3.0: pre-training counts updates; give --num_steps"),
    ],
)
def test_a_mistake_is_one_line_that_names_it(monkeypatch, tmp_path, flags, message):
    with pytest.raises(UserError) as caught:
        pretrain(monkeypatch, tmp_path / "runs", *flags)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "runs/hong/model").exists()


@pytest.mark.parametrize("task", ["mlm_sop", "mlm_ict"])
def test_a_corpus_without_two_sentences_in_a_row_is_refused(monkeypatch, tmp_path, task):
    """Sentences of 3 tokens, each a document of its own; and documents of two that do not fit into 8 tokens."""
    (tmp_path / "apart.txt").write_text("가 나 다\n\n" * 9)
    (tmp_path / "long.txt").write_text(f"{'가 ' * 30}\n{'나 ' * 30}\n\n" * 9)
    for name, length in (("apart", 128), ("long", 8)):
        told = ("--task", task, "--corpus_path", tmp_path / f"{name}.txt", "--max_seq_length", length)
        words = (f"--task {task}: no document has two sentences", f"--max_seq_length {length} tokens", "or --task mlm")
        with helpers.refused(*words, untouched=tmp_path / "runs"):
            pretrain(monkeypatch, tmp_path / "runs", *told)
    pretrain(monkeypatch, tmp_path / "runs", "--task", "mlm", "--corpus_path", tmp_path / "apart.txt")


def test_a_corpus_of_one_passage_is_refused(monkeypatch, tmp_path):
    (tmp_path / "one.txt").write_text("가 나\n다 라\n")
    with helpers.refused(
        "--task mlm_ict: the corpus is one row", "give more text, or --task mlm_sop", untouched=tmp_path / "runs"
    ):
        pretrain(monkeypatch, tmp_path / "runs", "--task", "mlm_ict", "--corpus_path", tmp_path / "one.txt")


def test_a_refused_run_leaves_no_folder(monkeypatch, tmp_path):
    with helpers.refused("--corpus_path nowhere: no such file or folder", untouched=tmp_path):
        pretrain(monkeypatch, tmp_path / "runs", "--corpus_path", "nowhere")
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_passage_alone_is_not_scored(monkeypatch, tmp_path):
    """Told apart from nothing it would always be found."""
    with helpers.refused(
        "--per_device_train_batch_size 1", "told apart from the others of its", "there are none", untouched=tmp_path
    ):
        pretrain(monkeypatch, tmp_path / "runs", "--task", "mlm_ict", "--eval_batch_size", 1)
    (tmp_path / "two.txt").write_text("가 나\n다 라\n\n" * 2 + "마 바\n사 아\n\n")
    folder = pretrain(
        monkeypatch, tmp_path / "runs", "--task", "mlm_ict", "--corpus_path", tmp_path / "two.txt",
        "--train_batch_size", 2, "--validation_fraction", 0.1,
    )  # fmt: skip
    assert not any(name.startswith("eval/") for point in points(folder) for name in point)


def test_a_run_needs_a_name(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prog"])
    with pytest.raises(UserError, match="--model_name: give the run a name"):
        pretraining.arguments("train")


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ([], 500_000),
        (["--num_steps", "600000"], 600_000),
        (["--num_steps", "200"], 500_000),
        (["--num_steps", "200", "--scheduler_num_steps", "300"], 300),
        (["--scheduler_num_steps", "0"], 0),
    ],
)
def test_the_schedule_is_never_shorter_than_the_run(monkeypatch, flags, steps):
    monkeypatch.setattr(sys, "argv", ["prog", "--model_name", "hong", *flags])
    assert pretraining.arguments("train")[0].scheduler_num_steps == steps


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (train, "Shards nothing"),
        (train_zero_one, "under ZeRO-1: fairscale's OSS shards the optimizer states"),
        (train_zero_two, "under ZeRO-2, which shards optimizer states and gradients"),
    ],
)
def test_help_says_what_an_entry_shards_and_gives_its_command(monkeypatch, capsys, entry, words):
    name = entry.__name__.split(".")[-1]
    monkeypatch.setattr(sys, "argv", ["prog", "--help"])
    with pytest.raises(SystemExit):
        pretraining.arguments(name, entry.__doc__)
    shown = " ".join(capsys.readouterr().out.split("options:")[0].split())
    assert words in shown and f"Example: python pretrain/{name}.py --model_name" in shown


@pytest.mark.parametrize(
    ("gpus", "started", "nproc", "message"),
    [
        (0, None, 8, None),
        (0, None, 9, "--nproc 9: at most 4 ranks a core, here 8 (cores: 2)"),
        (3, None, 3, None),
        (3, None, 4, "--nproc 4: at most one rank a GPU, here 3"),
        (3, 2, 0, None),
        (0, 2, 2, None),
        (3, 2, 3, "--nproc 3: torchrun or deepspeed decides here, ranks of this machine: 2; leave --nproc out"),
    ],
)
def test_more_ranks_than_a_machine_can_run_are_refused(monkeypatch, gpus, started, nproc, message):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(launch.distributed, "usable_cores", lambda: 2)
    if started:
        given = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": str(started), "RANK": "0", "MASTER_ADDR": "localhost"}
        for name, value in (given | {"MASTER_PORT": "29500"}).items():
            monkeypatch.setenv(name, value)
    if message is None:
        return launch.check_nproc(nproc)
    with pytest.raises(UserError, match=re.escape(message)):
        launch.check_nproc(nproc)


def test_batches_of_held_out_rows_are_the_same_on_any_number_of_ranks(monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(pretraining, "make_rows", lambda *args: given.setdefault("data", make(*args)))
    pretrain(monkeypatch, tmp_path / "runs", "--task", "mlm")
    rows = given["data"].validation
    alone = rows.step(0, BatchSizes(4, 1, 1), 0)[0].inputs["target_ids"]
    both = [rows.step(0, BatchSizes(2, 1, 2), rank)[0].inputs["target_ids"] for rank in (0, 1)]
    assert torch.equal(alone, torch.cat(both))


def test_held_out_rows_do_not_follow_the_seed_and_an_epoch_may_be_shorter(monkeypatch, tmp_path):
    orders, lengths = {"training": [], "validation": []}, []
    for seed, limit in ((1, 0), (2, 0), (1, 2)):
        told = f"prog --model_name a --cache_dir {tmp_path} --task mlm --train_batch_size 4 --max_seq_length 64"
        monkeypatch.setattr(sys, "argv", [*told.split(), "--seed", str(seed), "--max_steps_per_epoch", str(limit)])
        training, corpus, _ = pretraining.arguments("train")
        tokenizer = pretraining.load_tokenizer(corpus)
        shards = pretraining.open_shards(corpus, tokenizer)
        data = make(shards, corpus, training, BatchSizes(4, 1, 1), tokenizer, router=False)
        lengths.append(len(data.training))
        for name, found in orders.items():
            rows = getattr(data, name)
            found.append(tuple(rows.order[place] for place in range(len(rows))))
    assert len(set(orders["validation"])) == 1 and len(orders["validation"][0]) > 3
    assert len(set(orders["training"])) == 3 and lengths == [lengths[0], lengths[0], 2 * 4]


@pytest.mark.parametrize(("rows", "ranks", "micro"), [(0, 1, 32), (0, 2, 16), (0, 3, 11), (5, 2, 5)])
def test_a_held_out_batch_has_32_rows_over_all_ranks_unless_told_otherwise(rows, ranks, micro):
    training = SimpleNamespace(per_device_eval_batch_size=rows)
    assert pretraining.held_out_sizes(training, ranks) == BatchSizes(micro, 1, ranks)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["transformer", "mix_lm", "causal_lm"])
def test_every_entry_trains_alike_on_two_ranks(tmp_path, model):
    config = "tiny_config.json" if model == "causal_lm" else f"{model}_tiny_config.json"
    shared = ["--model_name", "hong", "--nproc", "2", "--model", model, "--config_file", f"models/{config}"]
    entries = {"train": [], "train_zero_one": [], "train_zero_two": [], "zero3": ["--zero3", "--auto_wrap"]}
    if model == "causal_lm":  # with pauses, so that no engine has them wrong; DeepSpeed's too
        shared += ["--pause_placement", "random", "--pause_fraction", "0.2"]
        entries |= {f"ds{stage}": ["--deepspeed_config", f"ds_configs/zero{stage}.json"] for stage in (1, 2, 3)}
    curves = {}
    for name, flags in entries.items():
        script = "train_zero_two" if name == "zero3" else "train" if name.startswith("ds") else name
        script = f"pretrain/{script}.py"
        told = [*shared, *map(str, SIZES), "--output_dir", str(tmp_path / name), "--cache_dir", str(tmp_path / "cache")]
        done = run_script(shlex.join([script, *told, *flags]))
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == str(tmp_path / name / "hong/model")
        curves[name] = losses(tmp_path / name / "hong")
    for name, curve in curves.items():
        assert curve == pytest.approx(curves["train"], abs=2e-5), name


@pytest.mark.slow
def test_a_run_goes_on_by_every_entry(tmp_path):
    """Four updates by each, on other ranks too, as one run."""
    config = ["--model", "mix_lm", "--config_file", "models/mix_lm_tiny_config.json", "--dropout", "0"]
    shared = ["--model_name", "hong", *config]  # experts of a Switch layer drop other tokens on other ranks
    shared += [*map(str, SIZES), "--scheduler_num_steps", "16", "--cache_dir", str(tmp_path / "cache")]

    def run(folder: str, entry: str, num: int, *flags: str) -> None:
        told = [*shared, "--num_steps", str(num), "--output_dir", str(tmp_path / folder), *flags]
        done = run_script(shlex.join([f"pretrain/{entry}.py", *told]))
        assert done.returncode == 0, done.stderr

    run("straight", "train", 12, "--train_batch_size", "8")
    run("crossed", "train_zero_one", 4, "--nproc", "2")
    shutil.rmtree(tmp_path / "crossed/hong/model")
    run("crossed", "train_zero_two", 8, "--zero3", "--auto_wrap", "--train_batch_size", "8", "--resume", "auto")
    shutil.rmtree(tmp_path / "crossed/hong/model")
    run("crossed", "train", 12, "--train_batch_size", "8", "--resume", "auto")
    assert losses(tmp_path / "crossed/hong") == pytest.approx(losses(tmp_path / "straight/hong"), abs=2e-5)


@pytest.mark.slow
def test_a_mistake_ends_all_ranks_with_exit_code_2(tmp_path):
    told = ["--model_name", "hong", "--nproc", "2", "--corpus_path", "nowhere", "--output_dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "pretrain/train.py", *told], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr == "error: --corpus_path nowhere: no such file or folder\n"


def second_is_killed():
    """What a rank does; the second one is ended as the system ends a process when memory is short."""
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(100)


def test_a_rank_that_the_system_ends_is_named(capsys, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as end:
        launch.run_ranks(second_is_killed, 2)
    assert end.value.code == 128 + signal.SIGKILL
    assert capsys.readouterr().err == "error: rank 1 was ended by SIGKILL; is the memory too small?\n"


def endless(folder, start=interruptible):
    """A run of two ranks that writes all it says into one pipe, in a process group of its own."""
    told = ["--model_name", "hong", "--nproc", 2, "--num_steps", 100_000, *SIZES[2:], "--scheduler_num_steps", 0]
    told += ["--config_file", ROOT / "models/transformer_tiny_config.json", "--eval_steps", 100_000]
    told += ["--output_dir", folder / "runs", "--cache_dir", folder / "cache"]
    command = [sys.executable, "pretrain/train.py", *map(str, told)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, preexec_fn=start, **pipes)


def test_an_interrupt_of_all_ranks_is_told_once(tmp_path):
    """As a terminal's Ctrl-C, which goes to every process."""
    with endless(tmp_path) as run:
        assert any("step 1/" in line for line in run.stdout)
        os.killpg(run.pid, signal.SIGINT)
        told = [line for line in run.stdout.read().splitlines() if not line.startswith("step ")]
    assert run.returncode == 130
    assert len(told) == 2 and told[0].startswith("SIGINT: saved at step ") and told[1] == "interrupted"
    (checkpoint,) = (tmp_path / "runs/hong/checkpoints").glob("step-??????")
    assert damage(checkpoint) is None


class Fixed(torch.nn.Module):
    """Gives the same sums of losses, and numbers of right answers, in every pass."""

    def __init__(self, *found: list[float]) -> None:
        super().__init__()
        self.found = torch.tensor(found)

    def forward(self, score: bool = False) -> torch.Tensor:
        return self.found if score else self.found[0]


def held_out(
    monkeypatch, module: Fixed, num: int, objectives: tuple[str, ...], targets: tuple[int, ...], limit: int = 0,
    micro: int = 4,
):  # fmt: skip
    """Scores of some rows, `micro` a pass, and the places of each pass."""
    asked = []

    class Rows(list):
        def batch(self, places: list[int]) -> Batch:
            asked.append(places)
            return Batch({}, targets, 1)

    monkeypatch.setattr(pretraining, "EncoderPretraining", Fixed if len(module.found) > 1 else str)
    engine = SimpleNamespace(module=module, evaluating=lambda: nullcontext(module))
    return pretraining.held_out_scores(engine, Rows(range(num)), limit, BatchSizes(micro, 1, 1), objectives), asked


def test_held_out_scores_by_hand(monkeypatch):
    """Three passes of ten rows; places without a row are told so. Without a target there is no score."""
    names, module = ("mlm", "sop", "balance"), Fixed([6.0, 2.0, 1.0], [3.0, 1.0, 0.0])
    found, asked = held_out(monkeypatch, module, 10, names, (4, 1, 2))
    wanted = {"mlm_loss": 1.5, "mlm_accuracy": 0.75, "sop_loss": 2.0, "sop_accuracy": 1.0, "balance_loss": 0.5}
    assert found == pytest.approx(wanted | {"loss": 4.0})
    assert asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, ABSENT, ABSENT]]
    found, asked = held_out(monkeypatch, module, 10, names, (4, 0, 2), limit=5)
    assert set(found) == set(wanted) - {"sop_loss", "sop_accuracy"} | {"loss"} and found["loss"] == 2.0
    assert asked == [[0, 1, 2, 3], [4, ABSENT, ABSENT, ABSENT]]


def test_a_pass_is_no_larger_than_the_rows_there_are(monkeypatch):
    module = Fixed([6.0, 2.0], [3.0, 1.0])
    _, asked = held_out(monkeypatch, module, 3, ("mlm", "ict"), (4, 3), micro=10**15)
    assert asked == [[0, 1, 2]]


@pytest.mark.parametrize(("loss", "perplexity"), [(2.0, math.exp(2.0)), (79.0, math.exp(79.0)), (99.0, math.exp(80.0))])
def test_perplexity_is_that_of_the_loss_and_stays_finite(monkeypatch, loss, perplexity):
    found, _ = held_out(monkeypatch, Fixed([8 * loss]), 6, ("clm",), (8,))
    assert found == pytest.approx({"loss": loss, "clm_loss": loss, "perplexity": perplexity})


@pytest.mark.parametrize(("num", "passes"), [(4, 1), (5, 1), (6, 2), (1, 0)])
def test_a_passage_that_would_be_alone_in_the_last_pass_is_left_out(monkeypatch, num, passes):
    found, asked = held_out(monkeypatch, Fixed([1.0, 1.0], [1.0, 1.0]), num, ("mlm", "ict"), (1, 1))
    assert len(asked) == passes and bool(found) == (passes > 0)


def test_curves_of_a_router_by_hand():
    """Shares of four experts in two layers, in even shares."""
    of_layers = {"expert_load": torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.25] * 4]), "dropped": torch.tensor([0.1, 0.3])}
    found = pretraining.router_statistics(SimpleNamespace(statistics=of_layers))
    names = ("router/dropped_share", "router/largest_load", "router/smallest_load")
    assert found == pytest.approx(dict(zip(names, (0.2, 2.0, 0.0), strict=True)))
    assert pretraining.router_statistics(torch.nn.Linear(1, 1)) == {}


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL])
def test_no_rank_outlives_the_process_that_started_it(tmp_path, end):
    """Started as a shell starts a job in the background, with SIGINT ignored."""
    with endless(tmp_path, lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) as run:
        assert any("step 1/" in line for line in run.stdout)
        run.send_signal(end)
        told = run.stdout.read()  # ends when the last process that writes there has ended
    killed = end == signal.SIGKILL
    assert run.returncode == (-end if killed else 128 + end)
    assert f"{'SIGINT' if killed else end.name}: saved at step " in told  # the system interrupts orphans


def started_children(run) -> list[int]:
    """Processes that a run has started so far."""
    return [int(pid) for pid in Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()]


def test_no_rank_outlives_a_start_that_is_killed(tmp_path):
    """Killed as soon as both ranks are there."""
    others = 0 if launch.START == "fork" else 1  # what tracks the semaphores of processes that are started afresh
    with endless(tmp_path) as run:
        while len(started_children(run)) < 2 + others:
            assert run.poll() is None
        run.kill()
        assert "step 1/" not in run.stdout.read()  # which ends with the last of them


def test_an_interrupt_while_libraries_are_imported_is_a_word(tmp_path):
    with endless(tmp_path) as run:
        while "libtorch_cpu" not in Path(f"/proc/{run.pid}/maps").read_text():  # torch is being imported
            assert run.poll() is None
        run.send_signal(signal.SIGINT)
        assert run.stdout.read() == "interrupted\n"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An untrained model of every architecture with the sample tokenizer's vocabulary, by the names of --model."""
    folders = {name: tmp_path_factory.mktemp(name) for name in (*encoders.ENCODERS, "causal_lm")}
    for name in encoders.ENCODERS:
        path = ROOT / "models" / f"{name}_tiny_config.json"
        config = encoders.read_encoder_config(path, name, sample_tokenizer())
        encoders.build_encoder(config, 0).save_pretrained(folders[name])
    toy_gpt2(vocab_size=4096).save_pretrained(folders["causal_lm"])
    return folders


def refused(monkeypatch, tmp_path, *flags, model="transformer") -> str:
    """The one line that a user reads."""
    with pytest.raises(UserError) as caught:
        pretrain(monkeypatch, tmp_path / "runs", *flags, model=model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("held", "model"), permutations(["transformer", "mix_lm", "causal_lm"], 2))
def test_a_checkpoint_of_another_architecture_is_refused(monkeypatch, tmp_path, exported, held, model):
    said = refused(monkeypatch, tmp_path, "--checkpoint", exported[held], model=model)
    assert said.startswith(f"--checkpoint {exported[held]}: its architecture is {held}")
    assert said.endswith(f"give --model {held}")


def test_a_checkpoint_of_an_unknown_architecture_is_refused(monkeypatch, tmp_path):
    BertConfig().save_pretrained(tmp_path)
    said = refused(monkeypatch, tmp_path, "--checkpoint", tmp_path)
    assert f"--checkpoint {tmp_path}: model_type 'bert'; one of kozero_transformer, kozero_mix_lm, gpt2" in said


def test_a_checkpoint_brings_its_own_config(monkeypatch, tmp_path, exported):
    path = ROOT / "models/transformer_tiny_config.json"
    told = ("--checkpoint", exported["transformer"], "--config_file", path)
    said = refused(monkeypatch, tmp_path, *told)
    assert f"--config_file {path} and --checkpoint {exported['transformer']}" in said and "leave --config_file" in said


@pytest.mark.parametrize("model", ["transformer", "causal_lm"])
@pytest.mark.parametrize("name", ["nowhere", "runs/old/checkpoints/step-000006"])
def test_a_checkpoint_that_cannot_be_loaded_is_answered_with_what_to_give(monkeypatch, tmp_path, name, model):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/old/checkpoints/step-000006").mkdir(parents=True)
    said = refused(monkeypatch, tmp_path, "--checkpoint", name, model=model)
    assert said.startswith(f"--checkpoint {name}: ") and "the exported model of a run, RUN/model" in said


def test_a_damaged_language_model_is_named_by_its_flag(monkeypatch, tmp_path, exported):
    shutil.copytree(exported["causal_lm"], tmp_path / "model")
    (tmp_path / "model/model.safetensors").write_bytes(b"nothing")
    said = refused(monkeypatch, tmp_path, "--checkpoint", tmp_path / "model", model="causal_lm")
    assert re.match(
        rf"--checkpoint {tmp_path}/model: its config.json describes .* weights, its files have 7 bytes", said
    )


BAD_CONFIGS = [
    ("transformer", "mlm_sop", {"type_vocab_size": 1}, "type_vocab_size 1: --task mlm_sop has 2 segments"),
    ("mix_lm", "mlm_sop", {"type_vocab_size": 1}, "type_vocab_size 1: --task mlm_sop has 2 segments"),
    ("mix_lm", "mlm_sop", {"causal": True}, "causal true: [CLS] sees nothing behind it"),
    ("transformer", "mlm", {"hidden_size": 64_000_000}, "no model of these sizes can be built"),
    ("causal_lm", "clm", {"n_embd": 16_000_000}, "no model of these sizes can be built"),
    ("causal_lm", "clm", {"tie_word_embeddings": False}, "tie_word_embeddings False: must be true"),
]


def changed_config(tmp_path, model, changes):
    name = "tiny_config.json" if model == "causal_lm" else f"{model}_tiny_config.json"
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(json.loads((ROOT / "models" / name).read_text()) | changes))
    return path


@pytest.mark.parametrize(("model", "task", "changes", "message"), BAD_CONFIGS)
def test_a_config_that_cannot_learn_its_task_is_refused(monkeypatch, tmp_path, model, task, changes, message):
    path = changed_config(tmp_path, model, changes)
    said = refused(monkeypatch, tmp_path, "--config_file", path, "--task", task, model=model)
    assert said.startswith(f"--config_file {path}: {message}")


def test_a_checkpoint_with_one_segment_cannot_learn_their_order(monkeypatch, tmp_path):
    path = changed_config(tmp_path, "transformer", {"type_vocab_size": 1})
    config = encoders.read_encoder_config(path, "transformer", sample_tokenizer())
    encoders.build_encoder(config, 0).save_pretrained(tmp_path / "model")
    said = refused(monkeypatch, tmp_path, "--checkpoint", tmp_path / "model", "--task", "mlm_sop")
    assert said.startswith(f"--checkpoint {tmp_path}/model: type_vocab_size 1")


@pytest.mark.parametrize("model", ["transformer", "mix_lm", "causal_lm"])
def test_a_config_of_16_bit_trains_in_32(monkeypatch, tmp_path, model):
    path = changed_config(tmp_path, model, {"dtype": "bfloat16"})
    odd = pretrain(monkeypatch, tmp_path / "odd", "--config_file", path, "--num_steps", 1, model=model)
    plain = pretrain(monkeypatch, tmp_path / "plain", "--num_steps", 1, model=model)
    assert losses(odd) == losses(plain)


def test_a_tokenizer_that_makes_no_rows_is_refused_before_the_corpus_is_read(monkeypatch, tmp_path):
    word_tokenizer(20).save_pretrained(tmp_path / "words")
    told = ("--tokenizer_name_or_path", tmp_path / "words", "--corpus_path", "nowhere")
    said = refused(monkeypatch, tmp_path, *told)
    assert said.startswith(f"--tokenizer_name_or_path {tmp_path}/words: no mask token")
    assert "scripts/train_tokenizer.py" in said


@pytest.mark.parametrize("model", ["mix_lm", "causal_lm"])
def test_a_card_says_what_the_model_is_and_how_it_is_loaded(monkeypatch, tmp_path, model):
    """Its lines of Python are run as they stand."""
    text = (pretrain(monkeypatch, tmp_path / "runs", model=model) / "model/README.md").read_text()
    for fact in (
        "Start: random weights",
        "Tokenizer: the sample tokenizer",
        "Corpus: the sample corpus",
        "tokens; the weights are those of step 4",
    ):
        assert fact in text
    found = {"folder": str(tmp_path / "runs/hong/model")}
    exec(text.split("```python\n")[1].split("```")[0], found)
    assert found["model"].config.vocab_size == len(found["tokenizer"])


def test_a_card_names_tokenizer_corpus_and_start():
    named = {"checkpoint": "old/model", "tokenizer_name_or_path": "own", "corpus_path": None, "corpus_hub": "owner/set"}
    fixed = {"hub_split": "train", "text_column": "text", "model": "mix_lm", "task": "mlm", "pause_fraction": 0.0}
    text = card("hong", {"arguments": named | fixed, "command": "python"}, RunState(step=5))
    for fact in (
        "Start: old/model",
        "Tokenizer: own",
        "Corpus: owner/set, split train, column text",
        "Steps: 5, 0 tokens; the weights are the last",
    ):
        assert fact in text
    assert "Nothing was held out" in text
