"""The command line and its JSON form: defaults, precedence, and what is refused with which words."""

import dataclasses
import json
from pathlib import Path

import pytest

from finetune.arguments import DataArguments, ModelArguments
from finetune.decoding import DecodingArguments
from finetune.evaluate import EvaluationArguments
from finetune.generate import GenerationArguments
from finetune.train import FreezeArguments
from kozero.config import BatchSizes, TrainingArguments, batch_sizes, describe_run, parse_arguments
from kozero.errors import UserError
from kozero.json_files import read_json
from kozero.pause import PauseArguments

CLASSES = (TrainingArguments, ModelArguments, DataArguments, PauseArguments, FreezeArguments)
GENERATION = (GenerationArguments, DecodingArguments)
ALL_CLASSES = (*CLASSES, EvaluationArguments, *GENERATION)


def parse(*argv: str, classes: tuple[type, ...] = CLASSES) -> tuple:
    return parse_arguments(*classes, prog="train.py", description="Train.", argv=list(argv))


def refused(*argv: str) -> str:
    """The one line that a user reads."""
    with pytest.raises(UserError) as caught:
        parse(*argv)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def json_file(tmp_path):
    def write(value) -> str:
        path = tmp_path / "arguments.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        return str(path)

    return write


# What is filled in -------------------------------------------------------------------------------------------------


def test_nothing_given_is_the_default_of_every_class():
    found = parse()
    assert found == tuple(c() for c in CLASSES)


def test_flags_fill_the_class_that_knows_them():
    training, _model, data, pause, freeze = parse(
        "--learning_rate", "3e-4", "--task", "korquad", "--num_pauses=10", "--freeze", "wte,h.0-5", "--bf16"
    )
    assert (training.learning_rate, training.bf16) == (3e-4, True)
    assert data.task == "korquad"
    assert pause.num_pauses == 10
    assert freeze.freeze == "wte,h.0-5"


def test_the_short_batch_names_are_the_long_ones():
    training = parse("--train_batch_size", "3", "--eval_batch_size", "5")[0]
    assert (training.per_device_train_batch_size, training.per_device_eval_batch_size) == (3, 5)


def test_a_json_file_fills_the_same_arguments(json_file):
    path = json_file({"learning_rate": 0.001, "task": "klue_nli", "bf16": True, "fp16": False, "warmup_steps": 0.1})
    training, _model, data, *_rest = parse(path)
    assert (training.learning_rate, training.warmup_steps) == (0.001, 0.1)
    assert (training.bf16, training.fp16) == (True, False)
    assert data.task == "klue_nli"


def test_a_null_in_the_file_is_the_default(json_file):
    assert parse(json_file({"deepspeed_config": None, "max_steps": None}))[0] == TrainingArguments()


def test_a_zero_in_the_file_is_no_default(json_file):
    training = parse(json_file({"max_grad_norm": 0, "weight_decay": 0.0, "seed": 0}))[0]
    assert (training.max_grad_norm, training.weight_decay, training.seed) == (0, 0, 0)


@pytest.mark.parametrize("first", [True, False])
def test_flags_win_over_the_file_wherever_it_stands(json_file, first):
    path, flags = json_file({"max_steps": 5, "seed": 1}), ["--max_steps=9"]
    training = parse(*([path, *flags] if first else [*flags, path]))[0]
    assert (training.max_steps, training.seed) == (9, 1)


def test_the_rank_that_the_launcher_puts_first_does_not_hide_the_file(json_file):
    training = parse("--local_rank=1", json_file({"max_steps": 5}), "--seed", "3")[0]
    assert (training.local_rank, training.max_steps, training.seed) == (1, 5, 3)


def test_the_value_of_a_flag_is_not_taken_for_the_file():
    assert parse("--deepspeed_config", "ds_configs/zero2.json")[0].deepspeed_config == "ds_configs/zero2.json"


def test_what_is_written_beside_a_run_makes_it_again(json_file):
    filled = parse("--learning_rate", "0.002", "--task", "korquad", "--num_pauses", "3", "--bf16", "--dropout", "0.2")
    assert parse(json_file(describe_run(*filled)["arguments"])) == filled


@pytest.mark.parametrize("cls", ALL_CLASSES)
def test_every_argument_has_help(cls):
    without = [f.name for f in dataclasses.fields(cls) if len(f.metadata.get("help", "")) < 8]
    assert without == []


@pytest.mark.parametrize(
    "classes", [CLASSES, (EvaluationArguments, *CLASSES[1:4]), (GenerationArguments, DecodingArguments)]
)
def test_help_prints_every_argument(classes, capsys):
    with pytest.raises(SystemExit) as done:
        parse("--help", classes=classes)
    assert done.value.code == 0
    printed = capsys.readouterr().out
    assert [f.name for c in classes for f in dataclasses.fields(c) if f"--{f.name}" not in printed] == []


# What is refused ---------------------------------------------------------------------------------------------------


def test_an_unknown_flag_is_answered_with_the_nearest():
    message = refused("--learnin_rate", "0.1")
    assert "--learnin_rate" in message
    assert "did you mean '--learning_rate'" in message


def test_what_is_like_no_flag_gets_no_advice():
    assert "did you mean" not in refused("--xyzzy", "0.1")


def test_flags_are_not_abbreviated():
    assert "--learning" in refused("--learning", "0.1")


def test_an_unknown_key_is_answered_with_file_and_nearest(json_file):
    path = json_file({"num_pause": 3})
    assert f"{path}: unknown key 'num_pause', did you mean 'num_pauses'" in refused(path)


def test_a_key_written_twice_is_named(json_file):
    path = json_file('{"max_steps": 3, "seed": 1, "max_steps": 4}')
    assert f"{path}: key 'max_steps' is written twice" in refused(path)


def test_a_file_that_is_no_object_is_named(json_file):
    path = json_file([{"max_steps": 3}])
    assert f"{path}: expected a JSON object, found list" in refused(path)


def test_broken_json_is_named_by_line(json_file):
    path = json_file('{"max_steps": 3,\n"seed" 1}')
    assert f"{path}:2: not JSON" in refused(path)


def test_a_missing_file_is_named():
    assert "nowhere.json: no such file" in refused("nowhere.json")


def test_a_file_that_is_not_utf8_is_named_by_line(tmp_path):
    path = tmp_path / "arguments.json"
    path.write_bytes('{\n"freeze": "가"}'.encode("cp949"))
    assert f"{path}:2: not UTF-8" in refused(str(path))


def test_endless_nesting_is_an_error_not_a_crash(json_file):
    with pytest.raises(UserError, match=r"arguments\.json: nested too deeply"):
        read_json(json_file("[" * 100_000))


@pytest.mark.parametrize("value", [[1], {"a": 1}])
def test_a_key_with_several_values_is_named(json_file, value):
    assert "'max_steps' must be one value" in refused(json_file({"max_steps": value}))


@pytest.mark.parametrize("key", ["output_dir", "output-dir", "resume", "deepspeed_config"])
def test_true_and_false_are_no_name_of_a_folder(json_file, key):
    assert f"{key!r} must be text, found false" in refused(json_file({key: False}))


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--max_steps", "drei"), ("--max_steps", "1.5"), ("--learning_rate", "fast"), ("--bf16", "vielleicht")],
)
def test_a_value_of_another_type_is_named_with_its_flag(flag, value):
    message = refused(flag, value)
    assert flag in message
    assert value in message


@pytest.mark.parametrize(("key", "value"), [("max_steps", True), ("max_steps", 1.5), ("learning_rate", "fast")])
def test_a_value_of_another_type_in_the_file_is_named(json_file, key, value):
    message = refused(json_file({key: value}))
    assert key in message
    assert str(value) in message


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--task", "sst2"), ("--optim", "adam"), ("--lr_scheduler_type", "step"), ("--batching", "padded")],
)
def test_a_choice_that_does_not_exist_is_named_with_those_that_do(flag, value):
    message = refused(flag, value)
    assert flag in message
    assert value in message
    assert "choose from" in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("per_device_train_batch_size", "0"),
        ("per_device_eval_batch_size", "-1"),
        ("gradient_accumulation_steps", "0"),
        ("num_train_epochs", "0.0"),
        ("max_steps", "-1"),
        ("learning_rate", "-0.1"),
        ("learning_rate", "nan"),
        ("warmup_steps", "-1.0"),
        ("weight_decay", "-0.1"),
        ("adam_beta1", "1.0"),
        ("adam_beta2", "-0.1"),
        ("max_grad_norm", "-1.0"),
        ("max_grad_norm", "nan"),
        ("seed", "-1"),
        ("logging_steps", "0"),
        ("save_total_limit", "0"),
        ("timeout_seconds", "0.0"),
        ("dropout", "1.0"),
        ("validation_fraction", "0.0"),
        ("validation_fraction", "1.0"),
        ("max_seq_length", "-1"),
        ("num_pauses", "-1"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_flag(name, value):
    assert f"--{name} {value}" in refused(f"--{name}={value}")


@pytest.mark.parametrize(
    "name", ["num_train_epochs", "learning_rate", "weight_decay", "warmup_steps", "adam_epsilon", "timeout_seconds"]
)
def test_an_infinite_value_is_refused(name):
    assert f"--{name} inf" in refused(f"--{name}=inf")


def test_fp16_and_bf16_exclude_each_other():
    message = refused("--fp16", "--bf16")
    assert "--fp16" in message
    assert "--bf16" in message


def test_files_and_the_hub_exclude_each_other():
    assert "--from_hub" in refused("--from_hub", "--train_file", "x.txt")


# The arithmetic of a batch -----------------------------------------------------------------------------------------


def test_the_global_batch_is_micro_times_accumulation_times_ranks():
    assert BatchSizes(micro=4, accumulation=3, world_size=2).global_batch == 24


def test_the_batch_of_a_run_comes_from_its_arguments_and_ranks():
    arguments = TrainingArguments(per_device_train_batch_size=4, gradient_accumulation_steps=3)
    assert batch_sizes(arguments, 2) == BatchSizes(4, 3, 2)


@pytest.mark.parametrize(("flags", "dtype"), [({}, "fp32"), ({"bf16": True}, "bf16"), ({"fp16": True}, "fp16")])
def test_the_precision_has_one_name(flags, dtype):
    assert TrainingArguments(**flags).dtype == dtype


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train_file", ""], "--train_file: is empty"),
        (["--output_dir", ""], "--output_dir: is empty"),
        (["--train_file", "\udcff\udcfe"], "--train_file '\\udcff\\udcfe': is not UTF-8"),
        (["--max_train_samples", str(10**30)], "--max_train_samples 1" + "0" * 30 + ": must be"),
        (["--num_pauses", str(2**63)], "--num_pauses 9223372036854775808: must be"),
        (["--seed", str(2**32)], "--seed 4294967296: must be from 0"),
        (["--timeout_seconds", "1e30"], "--timeout_seconds 1e+30: must be"),
        (["--timeout_seconds", "nan"], "--timeout_seconds nan: must be"),
        (["--num_train_epochs", "1e308"], "--num_train_epochs 1e+308: must be"),
        (["--learning_rate", "inf"], "--learning_rate inf: must be finite"),
        (["--adam_epsilon", "0"], "--adam_epsilon 0.0: must be above 0"),
    ],
)
def test_a_value_that_no_run_can_have_is_named(flags, message):
    assert message in refused(*flags)


def test_a_wrong_type_in_a_file_names_the_file(tmp_path):
    path = tmp_path / "arguments.json"
    path.write_text('{"max_steps": 1.5}')
    message = refused(str(path))
    assert str(path) in message and "--max_steps" in message


def test_a_file_may_use_the_other_names_of_an_argument(tmp_path):
    path = tmp_path / "arguments.json"
    path.write_text('{"train_batch_size": 3}')
    assert parse(str(path))[0].per_device_train_batch_size == 3


def test_the_home_folder_is_meant_in_every_path(tmp_path):
    path = tmp_path / "arguments.json"
    path.write_text('{"output_dir": "~/runs"}')
    assert parse(str(path))[0].output_dir == str(Path.home() / "runs")
