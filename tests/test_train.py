"""finetune/train.py, evaluate.py and generate.py as a user calls them, in this process."""

import io
import json
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune import evaluate, generate, train
from kozero import distributed
from kozero.engines import build_engine
from kozero.errors import UserError
from tests.helpers import refused

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "sample_data"


@pytest.fixture(autouse=True)
def in_root(monkeypatch, tmp_path_factory):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "toy.json"
    values = json.loads((ROOT / "models/tiny_config.json").read_text())
    path.write_text(json.dumps(values | {"n_embd": 32, "n_inner": 64}))
    return path


def call(monkeypatch, main, *flags):
    monkeypatch.setattr(sys, "argv", ["prog", *map(str, flags)])
    main()


def run(monkeypatch, config, out, *flags, task="nsmc"):
    shared = ("--config_file", config, "--output_dir", out, "--cache_dir", out.parent / "cache", "--task", task)
    sizes = ("--max_steps", 4, "--per_device_train_batch_size", 2, "--max_eval_samples", 6, "--logging_steps", 1)
    call(monkeypatch, train.main, *shared, *sizes, *flags)


def points(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out):
    return {row["step"]: row["train/loss"] for row in points(out) if "train/loss" in row}


def test_a_run_leaves_a_scored_model_its_curves_and_what_it_was_told(monkeypatch, config, tmp_path, capsys):
    out = tmp_path / "run"
    run(monkeypatch, config, out, "--num_pauses", 3, "--num_train_epochs", 5)
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-1] == str(out / "model") and "--max_steps 4 decides, not --num_train_epochs" in lines
    rows = points(out)
    wanted = {
        "loss",
        "learning_rate",
        "grad_norm",
        "loss_scale",
        "skipped_steps",
        "tokens_per_second",
        "peak_memory_gib",
    }
    assert {f"train/{name}" for name in wanted} <= set(rows[0])
    assert {"eval/accuracy", "eval/macro_f1", "eval/predicted_긍정"} <= set().union(*rows)
    assert list((out / "tensorboard").glob("events.*"))
    told = json.loads((out / "run.json").read_text())
    assert told["arguments"]["num_pauses"] == 3 and told["versions"]["torch"] and told["command"]
    best = max(row["eval/accuracy"] for row in rows if "eval/accuracy" in row)
    assert json.loads((out / "scores.json").read_text())["scores"]["accuracy"] == best
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert model.config.pause["num_pauses"] == 3 and model.generation_config.suppress_tokens == [7]
    assert AutoTokenizer.from_pretrained(out / "model").eos_token == "</s>"
    assert "Pauses: 3 x `<unused0>`" in (out / "model/README.md").read_text()


@pytest.mark.parametrize("placement", ["append", "filler"])
def test_evaluation_of_the_exported_folder_gives_the_score_of_the_run(monkeypatch, config, tmp_path, placement):
    out = tmp_path / "run"
    run(monkeypatch, config, out, "--num_pauses", 2, "--pause_placement", placement)
    model = ("--model_name_or_path", out / "model", "--cache_dir", tmp_path / "cache")
    call(monkeypatch, evaluate.main, *model, "--max_eval_samples", 6, "--output_file", tmp_path / "e.json")
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["num_pauses"] == 2
    assert f"Pauses: 2 x `{'.' if placement == 'filler' else '<unused0>'}`, {placement}" in (
        out / "model/README.md"
    ).read_text(encoding="utf-8")
    assert found["scores"] == pytest.approx(json.loads((out / "scores.json").read_text())["scores"])
    assert len((tmp_path / "e.predictions.jsonl").read_text().splitlines()) == 6


def test_generation_shows_neither_pauses_nor_special_tokens(monkeypatch, config, tmp_path, capsys):
    out = tmp_path / "run"
    run(monkeypatch, config, out, "--num_pauses", 2)
    capsys.readouterr()
    flags = ("--model_name_or_path", out / "model", "--prompt", "긍정", "--num_samples", 3, "--max_new_tokens", 8)
    call(monkeypatch, generate.main, *flags)
    first = capsys.readouterr().out
    assert len(first.strip().splitlines()) == 3
    assert all(line.startswith("긍정") for line in first.strip().splitlines())
    assert "<unused0>" not in first and "</s>" not in first
    call(monkeypatch, generate.main, *flags)
    assert capsys.readouterr().out == first  # the same seed writes the same text


def test_a_resumed_run_ends_bit_for_bit_where_an_undisturbed_one_does(monkeypatch, config, tmp_path):
    flags = ("--save_steps", 2, "--eval_steps", 4, "--num_pauses", 1, "--gradient_accumulation_steps", 2)
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run(monkeypatch, config, straight, *flags)
    run(monkeypatch, config, broken, *flags)
    shutil.rmtree(broken / "checkpoints/step-000004")
    shutil.rmtree(broken / "model")
    run(monkeypatch, config, broken, *flags, "--resume", "auto")
    left, right = (load_file(out / "model/model.safetensors") for out in (straight, broken))
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert losses(straight) == losses(broken)
    assert [row["step"] for row in points(broken) if "train/loss" in row] == [1, 2, 3, 4]  # no double points


def test_frozen_weights_come_out_bit_equal(monkeypatch, config, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    run(monkeypatch, config, first)
    source = ("--model_name_or_path", first / "model")
    flags = ("--freeze", "wte,wpe,h.0", "--learning_rate", 0.01, "--weight_decay", 0.5)
    shared = ("--output_dir", second, "--cache_dir", tmp_path / "cache", "--max_steps", 2, "--max_eval_samples", 2)
    call(monkeypatch, train.main, *source, *shared, *flags)
    before, after = (load_file(out / "model/model.safetensors") for out in (first, second))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {
        name for name in before if name.startswith(("transformer.wte", "transformer.wpe", "transformer.h.0."))
    } == same


def test_recomputed_activations_change_no_loss(monkeypatch, config, tmp_path):
    run(monkeypatch, config, tmp_path / "plain")
    run(monkeypatch, config, tmp_path / "recomputed", "--gradient_checkpointing")
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "recomputed"), abs=1e-5)


def test_length_groups_train_on_the_same_texts_as_packed_rows(monkeypatch, config, tmp_path):
    flags = ("--train_file", SAMPLE / "nsmc/ratings_test.txt", "--validation_file", SAMPLE / "nsmc/ratings_test.txt")
    flags += ("--max_steps", 1, "--dropout", 0, "--max_train_samples", 16)
    run(monkeypatch, config, tmp_path / "packed", *flags)
    run(monkeypatch, config, tmp_path / "grouped", *flags, "--batching", "grouped", "--train_batch_size", 16)
    assert losses(tmp_path / "packed")[1] == pytest.approx(losses(tmp_path / "grouped")[1], abs=0.02)


@pytest.mark.parametrize("task", ["klue_nli", "korquad"])
def test_the_other_tasks_train_the_pause_row_alone(monkeypatch, config, tmp_path, task):
    out = tmp_path / "run"
    flags = ("--num_pauses", 2, "--freeze", "all_but:pause", "--max_seq_length", 300, "--learning_rate", 0.1)
    run(monkeypatch, config, out, *flags, "--max_steps", 2, "--eval_steps", 2, task=task)
    scores = json.loads((out / "scores.json").read_text())["scores"]
    assert set(scores) >= ({"exact_match", "f1"} if task == "korquad" else {"accuracy", "macro_f1"})


def test_training_stops_early_when_the_score_does_not_rise(monkeypatch, config, tmp_path):
    out = tmp_path / "run"
    flags = ("--learning_rate", 0, "--eval_steps", 1, "--early_stopping_patience", 2, "--max_steps", 9)
    run(monkeypatch, config, out, *flags)
    assert max(losses(out)) == 3  # the first evaluation is the best, two more are not better
    assert json.loads((out / "scores.json").read_text())["step"] == 1


def test_the_best_and_the_last_checkpoints_are_kept(monkeypatch, config, tmp_path):
    out = tmp_path / "run"
    run(monkeypatch, config, out, "--learning_rate", 0, "--eval_steps", 1, "--save_total_limit", 1)
    assert sorted(p.name for p in (out / "checkpoints").glob("step-*")) == ["step-000001", "step-000004"]
    assert (out / "checkpoints/best").read_text() == "step-000001"
    assert (out / "checkpoints/latest").read_text() == "step-000004"


def test_a_model_without_spare_tokens_gets_a_pause_token(monkeypatch, config, tmp_path):
    text = (SAMPLE / "tokenizer/tokenizer.json").read_text()
    folder = tmp_path / "tokenizer"
    shutil.copytree(SAMPLE / "tokenizer", folder)
    (folder / "tokenizer.json").write_text(text.replace("<unused", "<other"))
    out = tmp_path / "run"
    run(monkeypatch, config, out, "--num_pauses", 1, "--tokenizer_name_or_path", folder, "--max_steps", 2)
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert model.config.vocab_size == 4224 and model.config.pause == {
        "token": "<pause>",
        "token_id": 4096,
        "placement": "append",
        "num_pauses": 1,
        "num_inference_pauses": 1,
    }


def bad(name, text="", encoding="utf-8"):
    def make(folder):
        path = folder / name
        path.write_bytes(text.encode(encoding))
        return path

    return make


HEADER = "id\tdocument\tlabel\n"
BAD_INPUT = {
    "missing train file": (["--train_file", "no.txt"], "no.txt: no such file"),
    "missing tokenizer folder": (["--tokenizer_name_or_path", "./no-model"], "./no-model: no such folder"),
    "model and config": (
        ["--model_name_or_path", "skt/kogpt2-base-v2"],
        "either --model_name_or_path or --config_file",
    ),
    "missing DeepSpeed JSON": (["--deepspeed_config", "no.json"], "no.json: no such file"),
    "unknown task": (["--task", "nsmk"], "--task"),
    "unknown flag": (["--num_pauzes", "3"], "did you mean '--num_pauses'"),
    "row above the positions": (["--max_seq_length", "513"], "the model has 512 positions"),
    "rows too short for anything": (["--max_seq_length", "2"], "no example fits 2 tokens"),
    "nothing to train": (["--freeze", "wte,wpe,h.0-1,ln_f"], "nothing is left to train"),
    "layer above the model": (["--freeze", "h.0-7"], "the model has 2 layers"),
    "resume from nothing": (["--resume", "no-checkpoint"], "not a whole checkpoint"),
    "schedule shorter than the epochs": (
        ["--max_steps", "0", "--num_train_epochs", "3", "--scheduler_num_steps", "5"],
        "--scheduler_num_steps 5: must be the run's",
    ),
    "negative accumulation": (["--gradient_accumulation_steps", "0"], "must be 1 or more"),
    "both halves": (["--fp16", "--bf16"], "--fp16 and --bf16"),
    "output folder is a file": (["--output_dir", "README.md"], "--output_dir README.md: cannot be written"),
    "hub out of reach": (["--from_hub"], "Offline? Give the published files"),
    "label out of range": (bad("l.txt", HEADER + "1\t좋다\t7\n"), "l.txt:2: label '7' is out of range"),
    "wrong column": (bad("c.txt", "id\ttext\tlabel\n1\t좋다\t1\n"), "c.txt:1: no column 'document'"),
    "too few fields": (bad("f.txt", HEADER + "1\t좋다\t1\n2\t나쁘다\n"), "f.txt:3: 2 fields, the header has 3"),
    "not UTF-8": (bad("e.txt", HEADER + "1\t좋다\t1\n", "cp949"), "e.txt:2: not UTF-8"),
    "empty file": (bad("z.txt"), "z.txt: empty file"),
    "no rows": (bad("n.txt", HEADER), "no examples"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_a_mistake_is_one_line_that_names_it_and_nothing_is_half_written(monkeypatch, config, tmp_path, case):
    flags, message = BAD_INPUT[case]
    if callable(flags):
        flags = ["--train_file", flags(tmp_path), "--validation_file", SAMPLE / "nsmc/ratings_test.txt"]
    with pytest.raises(UserError) as error:
        run(monkeypatch, config, tmp_path / "run", *flags)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run/model").exists() and not (tmp_path / "run/checkpoints").exists()


def test_going_on_from_an_older_step_sets_the_later_ones_aside(monkeypatch, config, tmp_path):
    out = tmp_path / "run"
    flags = ("--eval_steps", 1, "--save_total_limit", 9)
    run(monkeypatch, config, out, *flags)
    folder = out / "checkpoints"
    run(monkeypatch, config, out, *flags, "--max_steps", 2, "--resume", folder / "step-000001")
    assert sorted(p.name for p in folder.glob("step-??????")) == ["step-000001", "step-000002"]
    assert (folder / "latest").read_text() == "step-000002" and (folder / "step-000004.set-aside").is_dir()
    history = json.loads((out / "run.json").read_text())["history"]
    assert [(entry["step"], entry["settings"]["max_steps"]) for entry in history] == [(0, 4), (1, 2)]


def test_a_run_that_goes_on_in_another_folder_exports_the_weights_that_have_its_scores(monkeypatch, config, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    run(monkeypatch, config, first, "--learning_rate", 0, "--eval_steps", 1)  # step 1 stays the best
    flags = ("--learning_rate", 0.1, "--max_steps", 5, "--eval_steps", 1)
    run(monkeypatch, config, second, *flags, "--resume", first / "checkpoints/step-000004")
    assert json.loads((second / "scores.json").read_text())["step"] == 5
    weights = load_file(second / "model/model.safetensors")
    before = load_file(first / "model/model.safetensors")
    assert not torch.equal(weights["transformer.wte.weight"], before["transformer.wte.weight"])


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_goes_on(monkeypatch, config, tmp_path):
    (tmp_path / "run").mkdir()
    told = (f"--output_dir {tmp_path}/run: another run is writing there", "choose another folder")
    with FileLock(tmp_path / "run/.lock"), refused(*told, untouched=tmp_path / "run"):
        run(monkeypatch, config, tmp_path / "run")


def test_a_half_described_launch_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE is set and RANK is not: start with torchrun or deepspeed"):
        distributed.setup()


@pytest.mark.parametrize(
    ("token", "told"),
    [
        ("</s>", "--pause_token </s>: the tokenizer uses it already; name a spare one like <unused0>"),
        ("<pad>", "--pause_token <pad>: the tokenizer uses it already; name a spare one like <unused0>"),
        ("영화", "--pause_token '영화': not a spare token; name one like <unused0>"),
        ("", "--pause_token: is empty; give a value or leave it out"),
    ],
)
def test_a_token_that_means_something_is_no_pause(monkeypatch, config, tmp_path, token, told):
    with refused(told, untouched=tmp_path):
        run(monkeypatch, config, tmp_path / "run", "--num_pauses", 1, f"--pause_token={token}")


def test_evaluation_refuses_a_number_of_training_pauses(monkeypatch, config, tmp_path):
    run(monkeypatch, config, tmp_path / "run", "--max_steps", 1)
    flags = ("--model_name_or_path", tmp_path / "run/model", "--num_pauses", 5)
    with refused("--num_pauses", "did you mean", "--num_inference_pauses", untouched=tmp_path):
        call(monkeypatch, evaluate.main, *flags)


def test_one_process_may_run_under_deepspeed_without_a_launcher(monkeypatch, config, tmp_path):
    run(monkeypatch, config, tmp_path / "plain", "--dropout", 0, "--max_steps", 2)
    flags = ("--deepspeed_config", "ds_configs/zero2.json", "--dropout", 0, "--max_steps", 2)
    run(monkeypatch, config, tmp_path / "zero2", *flags)
    assert losses(tmp_path / "zero2") == pytest.approx(losses(tmp_path / "plain"), abs=1e-5)


def test_offload_to_a_disk_is_refused(monkeypatch, config, tmp_path):
    values = json.loads((ROOT / "ds_configs/zero3_offload.json").read_text())
    values["zero_optimization"]["offload_param"] = {"device": "nvme", "nvme_path": str(tmp_path)}
    (tmp_path / "nvme.json").write_text(json.dumps(values))
    told = (f"{tmp_path}/nvme.json: zero_optimization.offload_param.device 'nvme'", "use 'cpu'")
    with refused(*told, untouched=tmp_path):
        run(monkeypatch, config, tmp_path / "run", "--deepspeed_config", tmp_path / "nvme.json")


def test_an_old_run_is_not_mixed_with_a_new_one(monkeypatch, config, tmp_path):
    run(monkeypatch, config, tmp_path / "run", "--max_steps", 1)
    folder = tmp_path / "run"
    with refused(f"--output_dir {folder}: holds checkpoints", "--resume auto", untouched=folder):
        run(monkeypatch, config, tmp_path / "run", "--max_steps", 1)
    with refused(f"{folder}/checkpoints/step-000001: saved with --num_pauses 0, this run has 4", untouched=folder):
        run(monkeypatch, config, tmp_path / "run", "--max_steps", 2, "--resume", "auto", "--num_pauses", 4)


# What is there stays --------------------------------------------------------------------------------------------------


def test_a_model_that_is_not_of_this_run_is_not_written_over(monkeypatch, config, tmp_path):
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/model/notes.txt").write_text("mine")
    with refused(f"--output_dir {tmp_path}/run: holds a model already", untouched=tmp_path):
        run(monkeypatch, config, tmp_path / "run", "--max_steps", 1)


def test_a_run_does_not_write_over_the_model_that_it_starts_from(monkeypatch, config, tmp_path):
    run(monkeypatch, config, tmp_path / "run", "--max_steps", 1)
    flags = ("--model_name_or_path", tmp_path / "run/model", "--output_dir", tmp_path / "run", "--resume", "auto")
    told = (f"--model_name_or_path {tmp_path}/run/model", "--output_dir would write over it")
    with refused(*told, untouched=tmp_path):
        call(monkeypatch, train.main, *flags, "--cache_dir", tmp_path / "cache")


@pytest.mark.parametrize("name", ["checkpoints", "model", "tensorboard"])
def test_a_file_in_the_place_of_a_folder_is_found_before_training(monkeypatch, config, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("")
    with refused(f"--output_dir {tmp_path}/run: {name} in it is a file", untouched=tmp_path):
        run(monkeypatch, config, tmp_path / "run", "--max_steps", 1)


@pytest.mark.parametrize("name", ["run.json", "scores.json", "metrics.jsonl", ".lock"])
def test_a_folder_in_the_place_of_a_file_is_found_before_training(monkeypatch, config, tmp_path, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    with refused(f"--output_dir {tmp_path}/run/{name}: is a folder", untouched=tmp_path):
        run(monkeypatch, config, tmp_path / "run", "--max_steps", 1)


def test_frozen_weights_that_have_changed_are_found_before_a_run_goes_on(monkeypatch, config, tmp_path):
    """They are not in a checkpoint; half a run on others would end in a mixture."""
    source = tmp_path / "source/model"
    run(monkeypatch, config, tmp_path / "source", "--max_steps", 1)
    shared = ("--model_name_or_path", source, "--output_dir", tmp_path / "run", "--cache_dir", tmp_path / "cache")
    flags = (*shared, "--freeze", "wte,wpe", "--max_eval_samples", 2)
    call(monkeypatch, train.main, *flags, "--max_steps", 1)
    shutil.rmtree(tmp_path / "run/model")
    call(monkeypatch, train.main, *flags, "--max_steps", 2, "--resume", "auto")
    weights = load_file(source / "model.safetensors")
    weights["transformer.wte.weight"] = weights["transformer.wte.weight"] + 1
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    shutil.rmtree(tmp_path / "run/model")
    told = (f"{tmp_path}/run/checkpoints/step-000002: saved with frozen weights (--model_name_or_path)", "begin anew")
    with refused(*told, untouched=tmp_path):
        call(monkeypatch, train.main, *flags, "--max_steps", 3, "--resume", "auto")


def test_a_resumed_run_keeps_its_pause_token(monkeypatch, config, tmp_path):
    run(monkeypatch, config, tmp_path / "run", "--max_steps", 1, "--num_pauses", 1)
    flags = ("--num_pauses", 1, "--pause_token", "<unused5>", "--max_steps", 2, "--resume", "auto")
    with refused("saved with pause token id (--pause_token) 7, this run has 12", untouched=tmp_path / "run"):
        run(monkeypatch, config, tmp_path / "run", *flags)


def test_a_resumed_run_takes_decay_and_betas_from_its_own_command_line(monkeypatch, config, tmp_path):
    built = []
    monkeypatch.setattr(train, "build_engine", lambda *given: built.append(build_engine(*given)) or built[-1])
    run(monkeypatch, config, tmp_path / "run", "--max_steps", 1)
    changed = ("--weight_decay", 0.9, "--adam_beta1", 0.1, "--max_steps", 2, "--resume", "auto")
    run(monkeypatch, config, tmp_path / "run", *changed)
    groups = built[-1].optimizer.param_groups
    assert groups[0]["weight_decay"] == 0.9 and all(group["betas"] == (0.1, 0.999) for group in groups)


def test_a_finished_run_without_its_best_checkpoint_is_scored_anew(monkeypatch, config, tmp_path):
    flags = ("--eval_steps", 1, "--learning_rate", 0)
    run(monkeypatch, config, tmp_path / "run", *flags)
    checkpoints = tmp_path / "run/checkpoints"
    shutil.rmtree(checkpoints / (checkpoints / "best").read_text())
    run(monkeypatch, config, tmp_path / "run", *flags, "--resume", "auto")
    found = json.loads((tmp_path / "run/scores.json").read_text())
    assert found["step"] == 4 and "accuracy" in found["scores"]


def test_a_run_that_stopped_early_stays_stopped(monkeypatch, config, tmp_path):
    flags = ("--learning_rate", 0, "--early_stopping_patience", 1, "--eval_steps", 1)
    run(monkeypatch, config, tmp_path / "run", *flags)
    before = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    run(monkeypatch, config, tmp_path / "run", *flags, "--resume", "auto")
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == before
    assert max(losses(tmp_path / "run")) == 2


def test_curves_torn_inside_a_letter_do_not_keep_a_run_from_going_on(monkeypatch, config, tmp_path):
    run(monkeypatch, config, tmp_path / "run", "--max_steps", 1)
    with (tmp_path / "run/metrics.jsonl").open("ab") as file:
        file.write('{"step": 1, "text": "가'.encode()[:-1])
    run(monkeypatch, config, tmp_path / "run", "--max_steps", 2, "--resume", "auto")
    assert sorted(losses(tmp_path / "run")) == [1, 2]


@pytest.mark.parametrize("name", ["rng-rank0.json", "rank0.safetensors"])
def test_a_checkpoint_whose_bytes_are_gone_is_one_line(monkeypatch, config, tmp_path, name):
    run(monkeypatch, config, tmp_path / "run", "--max_steps", 1)
    path = tmp_path / "run/checkpoints/step-000001" / name
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(UserError, match=rf"--resume .*step-000001: {name} is damaged.*another checkpoint") as error:
        run(monkeypatch, config, tmp_path / "run", "--max_steps", 2, "--resume", path.parent)
    assert "\n" not in str(error.value)


def test_a_validation_set_of_which_nothing_fits_is_found_before_training(monkeypatch, config, tmp_path):
    flags = ("--num_inference_pauses", 200, "--max_seq_length", 128)
    with refused("no validation example fits 128 tokens beside 200 pauses", "raise --max_seq_length"):
        run(monkeypatch, config, tmp_path / "run", *flags)
    with refused("no validation example fits 40 tokens", "32 tokens for the answer", "raise --max_seq_length"):
        run(monkeypatch, config, tmp_path / "run", "--max_seq_length", 40, task="korquad")


def test_a_step_of_more_rows_than_the_data_has_is_a_slip(monkeypatch, config, tmp_path):
    told = ("a step of 2,000,000,000 rows", "100 times all", "lower --per_device_train_batch_size or")
    with refused(*told, "--gradient_accumulation_steps", untouched=tmp_path / "run"):
        run(monkeypatch, config, tmp_path / "run", "--gradient_accumulation_steps", 10**9)


def test_the_next_commands_can_be_pasted(monkeypatch, config, tmp_path, capsys):
    run(monkeypatch, config, tmp_path / "한글 폴더", "--max_steps", 1)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("score:"))
    assert str(tmp_path / "한글 폴더/model") in shlex.split(line)


def test_scores_do_not_go_into_a_folder(monkeypatch, config, tmp_path):
    with refused(f"--output_file {tmp_path}: is a folder", untouched=tmp_path):
        call(monkeypatch, evaluate.main, "--model_name_or_path", tmp_path, "--output_file", tmp_path)


def test_a_prompt_that_is_not_utf8_is_named_by_line():
    with pytest.raises(UserError, match="standard input, line 2: not UTF-8"):
        list(generate.lines_of(io.BytesIO("가\n".encode() + b"\xff\xfe\n")))


def test_notes_of_a_cache_name_the_file_that_is_read(monkeypatch, config, tmp_path, capsys):
    for name in ("first.txt", "second.txt"):
        (tmp_path / name).write_text(HEADER + "1\t\t1\n2\t좋다\t1\n3\t나쁘다\t0\n")
        files = ("--train_file", tmp_path / name, "--validation_file", SAMPLE / "nsmc/ratings_test.txt")
        run(monkeypatch, config, tmp_path / name.split(".")[0], "--max_steps", 1, *files)
    assert f"(first: {tmp_path}/second.txt:2)" in capsys.readouterr().out
