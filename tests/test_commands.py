"""What the READMEs, the scripts and the shipped JSON files promise, run as a user runs it."""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from finetune import demo, evaluate, generate, sentiment, train
from kozero.config import parse_arguments
from kozero.distributed import free_port
from kozero.errors import UserError
from kozero.plan import ModelShape
from pretrain.arguments import CorpusArguments, PretrainingArguments, ShardingArguments, ZeroArguments
from scripts import plan
from scripts.select_topic import SelectionArguments
from scripts.train_tokenizer import TokenizerArguments
from tests.helpers import gpt2_configs
from tests.scripts import run_script

ROOT = Path(__file__).parent.parent
ARGUMENTS = {
    "finetune/train.py": train.ARGUMENTS,
    "finetune/evaluate.py": evaluate.ARGUMENTS,
    "finetune/generate.py": generate.ARGUMENTS,
    "finetune/demo.py": demo.ARGUMENTS,
    "finetune/sentiment.py": sentiment.ARGUMENTS,
    "pretrain/train.py": (PretrainingArguments, CorpusArguments),
    "pretrain/train_zero_one.py": (ZeroArguments, CorpusArguments),
    "pretrain/train_zero_two.py": (ZeroArguments, CorpusArguments, ShardingArguments),
    "scripts/train_tokenizer.py": (TokenizerArguments,),
    "scripts/select_topic.py": (SelectionArguments,),
    "scripts/plan.py": plan.ARGUMENTS,
}  # fmt: skip
DS_CONFIGS = sorted(path.name for path in (ROOT / "ds_configs").glob("*.json"))
SHORT = "--max_steps 2 --max_eval_samples 4 --per_device_train_batch_size 1 --gradient_accumulation_steps 1"


def commands(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [" ".join(shlex.split(line, comments=True)) for line in lines if shlex.split(line, comments=True)]


def shell(command, timeout=300):
    """Run a command line in the root with this Python's tools first on the path; a script in a fork of a process."""
    if command.startswith("python "):
        return run_script(command.removeprefix("python "), timeout=timeout)
    path = f"export PATH={Path(sys.executable).parent}:$PATH"
    for launcher in ("deepspeed ", "torchrun "):  # another run on this machine may hold the default port
        command = command.replace(launcher, f"{launcher}--master_port {free_port()} ", 1)
    full = ["bash", "-c", f"{path} OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1; {command}"]
    return subprocess.run(full, cwd=ROOT, capture_output=True, text=True, timeout=timeout)


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_tests_of_a_file_share_a_process_and_its_fixtures(request):
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("all tests run in one process")
    assert request.node.nodeid.endswith("@test_commands.py")  # lost without a word where xdist does not know pytest


def test_quickstart_does_not_take_a_folder_that_holds_something_else(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    done = shell(f"bash scripts/quickstart.sh {tmp_path}")
    assert done.returncode == 2 and "holds something else" in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_both_readmes_give_the_same_commands():
    assert commands("README.md") == commands("README.ko.md")


RUNNERS = ("python ", "bash ", "deepspeed ", "torchrun ", "source ", "tensorboard ", "--")
# Files that are published elsewhere, and folders that the ones before these commands make.
PUBLISHED = {
    "KorQuAD_v1.0_train.json",
    "KorQuAD_v1.0_dev.json",
    "ratings_test.txt",
    "data",
    "prompts.txt",
    "topics.json",
}
FROM_ELSEWHERE = PUBLISHED | {"skt/kogpt2-base-v2", "skt/ko-gpt-trinity-1.2B-v0.5", ".venv"}


def documented(path):
    """Words of every command of a text: in blocks, inside lines, in a docstring."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return [line.split("   ")[0] for line in text.split('"""')[1].splitlines() if line.startswith(RUNNERS)]
    blocks = [block for kind, block in re.findall(r"```(\w*)\n(.*?)```", text, re.DOTALL) if kind in ("", "bash")]
    inside = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines() + [" ".join(line.split()) for line in inside]
    return [line for line in lines if line.startswith(RUNNERS)]


def paths_in(words):
    """What looks like a file or folder."""
    parts = [part for word in words for part in re.split("[=,]", word) if not part.startswith(("-", "http"))]
    return [part for part in parts if "/" in part or re.search(r"\.(jsonl?|txt|dat|tsv|py|sh)$", part)]


def made_by(words):
    """The folders that a command leaves."""
    told = dict(pairwise(words))
    named = f"runs/{told['--model_name']}" if "--model_name" in told else "runs/run"
    return {told.get("--output_dir", named), str(Path(told.get("--output_file", "runs/run/x")).parent)}


DOCUMENTS = [*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "scripts").glob("[!_]*.py")]
DOCUMENTS += [*(ROOT / "finetune").glob("[!_]*.py"), *(ROOT / "pretrain").glob("[!_]*.py")]


@pytest.mark.parametrize("name", sorted(str(path.relative_to(ROOT)) for path in DOCUMENTS))
def test_what_a_documented_command_names_is_there_or_was_made_by_one_before_it(name):
    made = FROM_ELSEWHERE | ({"runs"} if name.endswith(".py") else set())
    for command in documented(ROOT / name):
        words = shlex.split(command, comments=True)
        made |= made_by(words)
        missing = [path for path in paths_in(words) if not (ROOT / path).exists()]
        assert all(any(f"{path}/".startswith(f"{folder}/") for folder in made) for path in missing), (command, missing)


OWN_TESTS = ("pause_study.py", "harness.py")  # theirs run in test_study.py and test_harness.py


@pytest.mark.parametrize(
    "command", [c for c in commands("README.md") if ".py" in c and not any(x in c for x in OWN_TESTS)]
)
def test_every_flag_of_a_readme_command_exists(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    script = next(word for word in words if word.endswith(".py"))
    assert parse_arguments(*ARGUMENTS[script], prog=script, description="", argv=words[words.index(script) + 1 :])


@pytest.mark.parametrize("script", ARGUMENTS)
def test_help_tells_meaning_and_default_of_every_argument(script, capsys):
    with pytest.raises(SystemExit) as end:
        parse_arguments(*ARGUMENTS[script], prog=script, description="", argv=["--help"])
    shown = capsys.readouterr().out
    assert end.value.code == 0 and shown.count("(default:") >= 4
    for part in ARGUMENTS[script]:
        for field in dataclasses.fields(part):
            assert f"--{field.name}" in shown and len(field.metadata["help"]) > 8


@pytest.mark.parametrize("recipe", sorted((ROOT / "finetune/recipes").glob("*.json")), ids=lambda path: path.name)
def test_every_recipe_names_arguments_and_files_that_exist(recipe, monkeypatch):
    monkeypatch.chdir(ROOT)
    training, model, *_ = parse_arguments(*ARGUMENTS["finetune/train.py"], prog="", description="", argv=[str(recipe)])
    assert all(Path(path).exists() for path in (training.deepspeed_config, model.config_file) if path)


@pytest.mark.parametrize("config", gpt2_configs(), ids=lambda path: path.name)
def test_every_model_config_builds_a_model_of_the_size_that_is_planned(config):
    values = GPT2Config(**json.loads(config.read_text()))
    with torch.device("meta"):
        model = GPT2LMHeadModel(values)
    assert sum(p.numel() for p in model.parameters()) == ModelShape.of(values).parameters


RUN = f"finetune/train.py --config_file models/tiny_config.json --dropout 0 --logging_steps 1 {SHORT} --num_pauses 2"
RUN += " --freeze wte,wpe,h.0"


@pytest.fixture(scope="module")
def plain_losses(tmp_path_factory):
    """Of RUN in one process without DeepSpeed."""
    folder = tmp_path_factory.mktemp("plain")
    done = shell(f"python {RUN} --per_device_train_batch_size 2 --output_dir {folder}/run --cache_dir {folder}/cache")
    assert done.returncode == 0, done.stderr
    return losses(folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", DS_CONFIGS)
def test_every_deepspeed_json_trains_on_two_ranks(name, plain_losses, tmp_path):
    """By the deepspeed launcher: the commands of the README, below."""
    told = f"{RUN} --deepspeed_config ds_configs/{name} --output_dir {tmp_path}/run --cache_dir {tmp_path}/cache"
    done = run_script(told, world_size=2)
    assert done.returncode == 0, done.stdout + done.stderr
    AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")
    assert losses(tmp_path / "run") == pytest.approx(plain_losses, abs=2e-5)


OFFLINE = [
    c for c in commands("README.md")
    if "finetune/train.py" in c and ("tiny_config" in c or "recipes" in c) and "essay" not in c
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", OFFLINE)
def test_readme_commands_of_fine_tuning_run(command, tmp_path):
    done = shell(f"{command} {SHORT} --output_dir {tmp_path}/run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run/model/model.safetensors").exists()


@pytest.mark.slow
def test_readme_commands_of_pre_training_run_one_after_the_other(tmp_path):
    """From the tokenizer to vectors, each from what the ones before it left."""
    block = [
        c for c in commands("README.md") if "pretrain/" in c or "kind" in c or "runs/gpt" in c or "runs/small" in c
    ]
    block += [c for c in commands("README.md") if "--train_mode encoder" in c]
    for command in block:
        command = command.replace("runs/", f"{tmp_path}/runs/")
        command += f" {SHORT} --output_dir {tmp_path}/runs --save_steps 2" if "pretrain/" in command else ""
        command += f" {SHORT}" if "--task mrc" in command or "--task ict" in command else ""
        command += " --per_device_train_batch_size 2" if "--task ict" in command else ""
        command += " --num_steps 2 --max_seq_length 32" if "--model_name hong" in command else ""
        done = shell(command)
        assert done.returncode == 0, command + done.stdout + done.stderr
    for name in ("wordpiece/tokenizer.json", "small/model/heads.safetensors", "hong/model/config.json"):
        assert (tmp_path / "runs" / name).exists()
    assert (tmp_path / "runs/reader/predictions.json").exists()
    assert "BM25" in (tmp_path / "runs/vectors/retrieval.md").read_text(encoding="utf-8")


SIDE_BY_SIDE = {  # rows of their tables; each compares losses, tokens or weights itself
    "finetuning.py --config_file models/tiny_config.json --texts 16 --rounds 1 --dropout 0.1 "
    "--sides kozero,grouped,packed --peer_arguments '{\"dataloader_num_workers\": 1}'": 5,
    "zero.py --config_file models/tiny_config.json --stages 2 --length 16 --learning_rate 0.001 --rounds 1": 5,
    "data.py --rounds 1 --batches 3": 6,
    "checkpoints.py --config_file models/tiny_config.json --rounds 1 --steps 2": 6,
    "growth.py --of data --sizes 1,4 --reviews 100 --rounds 1": 6,
    "growth.py --of ranks --sizes 1,2 --stage 2 --config_file models/tiny_config.json --rows 2 --rounds 1": 4,
    "growth.py --of length --sizes 16,32 --config_file models/tiny_config.json --text_length 8 --rounds 1": 6,
    "encoders.py --config_files models/mix_lm_tiny_config.json --layers 0 --rounds 1": 6,
    "optimizer.py --config_file models/tiny_config.json --rounds 1": 7,
    "engines.py --config_file models/tiny_config.json --sides zero0,zero2 --steps 2 --rounds 1": 4,
    "sharding.py --config_file models/tiny_config.json --sides train,train_zero_one --steps 2 --rounds 1": 4,
    "techniques.py --config_file models/tiny_config.json --length 32 --packed 8 --rounds 1 --updates 1": 18,
}


@pytest.mark.slow
@pytest.mark.parametrize("command", SIDE_BY_SIDE)
def test_both_sides_of_a_benchmark_do_the_same_work(tmp_path, command):
    done = shell(f"python benchmarks/{command} --output_file {tmp_path}/found.json")
    assert done.returncode == 0 and done.stdout.count("\n| ") == SIDE_BY_SIDE[command], done.stdout + done.stderr
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert len(rows) == SIDE_BY_SIDE[command] - 2


@pytest.mark.slow
def test_a_soak_ends_where_an_undisturbed_run_does(tmp_path):
    command = "python finetune/train.py --config_file models/tiny_config.json --max_seq_length 64 --max_steps 40"
    command += f" --per_device_train_batch_size 2 --save_steps 2 --eval_steps 20 --cache_dir {tmp_path}/cache"
    done = shell(f"python scripts/soak.py --kills 3 --seed 1 --output_dir {tmp_path}/soak -- {command}")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "soak/soak.json").read_text())
    assert found["kills"] >= 1 and found["damaged"] == 0 and found["largest_difference"] == 0


TRINITY = sorted((ROOT / "finetune/recipes").glob("trinity_*.json"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", TRINITY, ids=lambda path: path.stem)
def test_a_recipe_trains_a_narrow_model_of_as_many_layers(recipe, tmp_path):
    """Its sharding, precision, frozen layers and checkpoints of activations; the weights of 1.2B have no room here."""
    values = json.loads((ROOT / "models/tiny_config.json").read_text()) | {"n_layer": 24, "n_embd": 32, "n_head": 2}
    (tmp_path / "model.json").write_text(json.dumps(values | {"n_inner": 64}))
    told = json.loads(recipe.read_text())
    del told["model_name_or_path"]
    short = {"config_file": f"{tmp_path}/model.json", "max_steps": 2, "max_seq_length": 64, "max_eval_samples": 2}
    (tmp_path / "recipe.json").write_text(json.dumps(told | short | {"cache_dir": f"{tmp_path}/cache"}))
    done = shell(f"python finetune/train.py {tmp_path}/recipe.json --logging_steps 1 --output_dir {tmp_path}/run")
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(losses(tmp_path / "run")) == 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "run/model")


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in commands("README.md") if "scripts/plan.py" in c])
def test_readme_commands_of_plans_come_to_a_conclusion(command):
    done = shell(command)
    assert done.returncode == 0, done.stderr
    concluded = done.stdout.count("proposed: --deepspeed_config ds_configs/") + done.stdout.count(
        "nothing is much better"
    )
    assert concluded == done.stdout.count("| setting |") > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, code", [("deepspeed --num_gpus 2", 2), ("torchrun --nproc_per_node 2", 1), ("python", 2)]
)
def test_a_mistake_ends_every_launcher_with_one_line_and_no_traceback_of_ours(launcher, code, tmp_path):
    done = shell(f"{launcher} finetune/train.py --task nsmc --train_file {tmp_path}/no.txt --output_dir {tmp_path}/run")
    assert done.returncode == code  # torchrun knows no other code for a failed rank
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "no.txt" in lines[0]
    assert 'File "' not in done.stderr.split("error: ")[0]


# The others are started by the quickstart, test_demo.py, test_pretrain.py and test_faults.py.
ALONE = [
    "pretrain/train_zero_one.py", "pretrain/train_zero_two.py", "finetune/sentiment.py", "scripts/train_tokenizer.py",
    "scripts/select_topic.py", "scripts/plan.py",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("script", ALONE)
def test_a_script_starts_in_a_process_that_has_imported_nothing(script):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    told = [sys.executable, script, "--help"]
    done = subprocess.run(told, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and f"usage: {script}" in done.stdout, done.stderr


@pytest.mark.slow
def test_the_quickstart_ends_with_a_model_that_beats_chance(tmp_path):
    done = shell(f"bash scripts/quickstart.sh {tmp_path}/quick", timeout=900)
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip().splitlines()[-1])
    assert (folder / "config.json").exists()
    scores = json.loads((folder.parent / "evaluation.json").read_text())["scores"]
    assert scores["accuracy"] > 0.65  # 120 balanced rows: chance is 0.5 with a standard deviation of 0.046
    assert "긍정" in done.stderr


def trained_tokenizer(monkeypatch, folder, *flags):
    """What scripts/train_tokenizer.py writes for the sample corpus, and that corpus' first line."""
    from transformers import AutoTokenizer

    from scripts import train_tokenizer

    corpus = ROOT / "sample_data/corpus/corpus.txt"
    flags = ["--files", str(corpus.parent), "--vocab_size", "1000", "--output_dir", str(folder), *flags]
    monkeypatch.setattr(sys, "argv", ["train_tokenizer.py", *flags])
    train_tokenizer.main()
    return AutoTokenizer.from_pretrained(folder), corpus.read_text(encoding="utf-8").splitlines()[0]


def test_a_trained_tokenizer_keeps_kogpt2s_special_tokens_and_round_trips(tmp_path, monkeypatch):
    tokenizer, text = trained_tokenizer(monkeypatch, tmp_path)
    names = ["<s>", "</s>", "<usr>", "<pad>", "<sys>", "<unk>", "<mask>", "<unused0>", "<unused99>"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 3, 4, 5, 6, 7, 106]
    assert tokenizer.decode(tokenizer.encode(text)).strip() == text
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("</s>", "<pad>")


def test_a_tokenizer_is_not_written_over(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("mine")
    with pytest.raises(UserError, match=f"--output_dir {tmp_path}: holds something already; choose another"):
        trained_tokenizer(monkeypatch, tmp_path)
    assert (tmp_path / "tokenizer.json").read_text() == "mine"


def test_a_wordpiece_tokenizer_has_berts_form(tmp_path, monkeypatch):
    """By transformers' BertTokenizer with the same vocabulary."""
    from transformers import BertTokenizerFast

    from models.language_model import load_tokenizer

    tokenizer, text = trained_tokenizer(monkeypatch, tmp_path, "--kind", "wordpiece")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]", "[unused99]"]
    assert tokenizer.convert_tokens_to_ids(names) == [0, 1, 2, 3, 4, 5, 104]
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    bert = BertTokenizerFast(str(tmp_path / "vocab.txt"), do_lower_case=False, strip_accents=False)
    for sample in (text, "Seoul(서울)은, 2024년의 수도!", "뷁"):
        assert tokenizer(sample, "뒤")["input_ids"] == bert(sample, "뒤")["input_ids"]
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer.tokenize("가".encode().decode()) == tokenizer.tokenize("\u1100\u1161")  # NFC
    assert load_tokenizer(str(tmp_path), writes=False).cls_token == "[CLS]"
