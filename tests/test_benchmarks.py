"""What the benchmarks share. That each runs, and that its sides do the same work, is in test_commands.py."""

import json
import os
import signal
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version

import numpy as np
import pytest
import torch
from packaging.version import Version

from kozero.config import arg, parse_arguments
from kozero.data.batches import collate
from kozero.data.readers import read_tsv
from kozero.errors import UserError
from tests.helpers import ROOT


@pytest.fixture
def script(monkeypatch):
    """One of them by its bare name, as the others find it."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.chdir(ROOT)
    return import_module


@pytest.fixture
def contest(script):
    return script("contest")


def parsed(contest, monkeypatch, *flags):
    @dataclass
    class Arguments(contest.Reported):
        train_file: str | None = arg(None, "file")
        rounds: int = arg(3, "blocks")

    monkeypatch.setattr(sys, "argv", ["benchmarks/any.py", *map(str, flags)])
    return parse_arguments(Arguments, prog="any", description="")[0]


@pytest.mark.parametrize("form", ["--train_file={}", "--train_file {}"])
def test_a_report_says_everything_but_the_folders_of_the_machine(contest, monkeypatch, tmp_path, form):
    path, out = tmp_path / "data of mine/nsmc/ratings_train.txt", tmp_path / "new/found.json"
    flags = [word.format(path) for word in form.split()]
    arguments = parsed(contest, monkeypatch, *flags, f"--output_file={out}")
    contest.report(arguments, [{"name": "한 줄", "speed": 1.5}], product="grouped")
    text = out.read_text(encoding="utf-8")
    found = json.loads(text)
    assert str(tmp_path) not in text and "data of mine" not in text
    given = {"train_file": "nsmc/ratings_train.txt", "output_file": "new/found.json", "rounds": 3}
    assert found["arguments"] == given
    written = form.format("nsmc/ratings_train.txt")
    assert found["command"].endswith(f"benchmarks/any.py {written} --output_file=new/found.json")
    assert found["rows"] == [{"name": "한 줄", "speed": 1.5}] and found["product"] == "grouped"
    assert found["machine"]["processor"] and found["versions"]["torch"]


@pytest.mark.parametrize(
    "value, told",
    {
        "/a/b/c/d.json": "c/d.json", "a/b": "a/b", "--flag=/a/b/c": "--flag=b/c", "/x/a/b,/x/c/d": "a/b,c/d",
        "kozero,padded": "kozero,padded", "": "", 3: 3, None: None,
    }.items(),
)  # fmt: skip
def test_paths_keep_two_parts(contest, value, told):
    assert contest.without_folders(value) == told


def test_where_a_report_cannot_be_written_nothing_is_measured(contest, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output_file .*file/found.json: cannot be written"):
        parsed(contest, monkeypatch, "--output_file", tmp_path / "file/found.json")
    assert parsed(contest, monkeypatch).output_file is None


def runs_of(script, told, rounds=3):
    """Rows of `runs.in_turn`, by their figures in the order of the runs."""
    begun = []

    def run(name):
        begun.append(name)
        losses, norms, peak, speed = told[name][begun.count(name) - 1]
        return {"name": name, "losses": losses, "norms": norms, "peak_gib": peak, "speed": speed, "formula_gib": 0.25}

    return script("runs").in_turn(list(told), run, rounds), begun


SAME = [8.25, 7.5], [1.5, 2.0]


def test_runs_of_entry_points_take_turns_and_are_a_table_and_a_report(contest, script, monkeypatch, tmp_path, capsys):
    """By hand: speeds 4, 2 and 1 beside 8, 8 and 2 are 0.5 times, the middle one of 0.5, 0.25 and 0.5."""
    told = {
        "zero0": [(*SAME, 0.5, 8.0), (*SAME, 0.25, 8.0), (*SAME, 0.75, 2.0)],
        "zero2": [(*SAME, 1.0, 4.0), (*SAME, 1.0, 2.0), (*SAME, 1.0, 1.0)],
    }
    rows, begun = runs_of(script, told)
    assert begun == ["zero0", "zero2", "zero2", "zero0", "zero0", "zero2"]
    script("runs").show(rows, parsed(contest, monkeypatch, "--output_file", tmp_path / "found.json"))
    header, rule, first, second = capsys.readouterr().out.strip().splitlines()[3:]
    assert first == "| zero0 | 8.250000 7.500000 | 1.500000 2.000000 | 0.50 | 0.25 | 8 | 2 to 8 | 1.00 |"
    assert second == "| zero2 | 8.250000 7.500000 | 1.500000 2.000000 | 1.00 | 0.25 | 2 | 1 to 4 | 0.50 |"
    assert header.count("|") == rule.count("|") == first.count("|")
    found = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert [row["speeds"] for row in found] == [[8.0, 8.0, 2.0], [4.0, 2.0, 1.0]]


@pytest.mark.parametrize(
    "losses, norms, message",
    [
        ([8.25001, 7.5], [1.5, 2.0], None),
        ([8.26, 7.5], [1.5, 2.0], "zero2: losses"),
        ([8.25, 7.5], [1.5, 2.1], "zero2: norms"),
        ([8.25], [1.5], "zero2: losses"),
    ],
)
def test_a_run_that_learns_something_else_is_told(script, losses, norms, message):
    told = {"zero0": [(*SAME, 1, 1)] * 2, "zero2": [(*SAME, 1, 1), (losses, norms, 1, 1)]}
    rows, _ = runs_of(script, told, rounds=2)
    with pytest.raises(UserError, match=message) if message else nullcontext():
        script("runs").check(rows, "fp32")


@pytest.mark.parametrize("code, told", [("raise SystemExit(3)", "exit code 3"), ("raise SystemExit('last')", "last")])
def test_a_run_that_fails_says_why(script, tmp_path, code, told):
    with pytest.raises(UserError, match=f"^zero2 failed: {told}$"):
        script("runs").measured("zero2", [sys.executable, "-c", code], tmp_path)


def test_the_limit_of_a_side_is_what_products_reach_in_its_round(script):
    """By hand: 10 operations a token; 2 of 4, 3 of 4 and 1 of 10 tokens are a half, three quarters and a tenth."""
    rows, blocks = [{"speeds": [2.0, 3.0, 1.0]}], [{"flops": flops} for flops in (1e9, 40.0, 40.0, 100.0)]
    told = script("limit").shared(rows, blocks, flops=10.0)
    assert rows[0]["share"] == 0.5
    assert told == {"product_flops": [40.0, 40.0, 100.0], "flops_a_token": 10.0, "limit_speed": 4.0}


@pytest.mark.parametrize(
    "name, flops",
    [("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA H100 PCIe", None), ("another", None)],
)
def test_mfu_is_of_what_the_maker_of_a_gpu_says(script, monkeypatch, name, flops):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert script("limit").specified(torch.bfloat16) == flops
    assert script("limit").specified(torch.float32) is None


MISTAKES = {
    "checkpoints --steps 0": "--steps 0: must be 1 or more",
    "encoders --config_files models/tiny_config.json": "--config_file models/tiny_config.json: model_type 'gpt2'; "
    "'kozero_transformer' or 'kozero_mix_lm' is needed here",
    "engines --sides zero0,zero4": "--sides 'zero4': is none of zero0, zero1, zero2, zero3, zero2_offload, "
    "zero3_offload",
    "sharding --sides train,train": "--sides train,train: names one twice",
    "sharding --rounds 0": "--rounds 0: must be 1 or more",
    "encoders --length 1024": "--length 1024: models/transformer_config.json has 512 positions",
    "encoders --layers -1": "--layers -1: must be 0 or more",
    "finetuning --learning_rate -1": "--learning_rate -1: must be above 0",
    "finetuning --dropout 1": "--dropout 1: must be in [0, 1)",
    "finetuning --sides padded,padded": "--sides padded,padded: names one twice",
    "finetuning --peer_arguments [1]": "--peer_arguments [1]: is no JSON object",
    "finetuning --peer_arguments {": "--peer_arguments {: is no JSON object",
    "finetuning --peer_attention flash_attention_2": "--peer_attention flash_attention_2: needs a GPU and the package "
    "flash-attn; install it, or choose sdpa",
    "growth --of length --sizes 128,2048": "--sizes 128,2048: the model has 1024 positions",
    "growth --of ranks --length 2048": "--length 2048: the model has 1024 positions",
    "growth --of ranks --rows 6": "--rows 6: cannot be shared evenly by 4 ranks",
    "targets --folder nowhere": "--folder nowhere: is no folder",
    "techniques --length 512": "--length 512: 'rows not four times as long' measures rows of 2048 tokens, the model "
    "has 1024 positions; choose less",
    "techniques --length 2048 --techniques bf16": "--length 2048: 'bf16' measures rows of 2048 tokens, the model has "
    "1024 positions; choose less",
    "techniques --length 16 --packed 10": "--length 16: 'rows not half as long' measures rows of 8 tokens, a text has "
    "--packed 10; choose more",
    "techniques --rows 2": "--rows 2: 'rows not four times as long' needs a multiple of 4",
    "zero --updates 1": "--updates 1: must be 2 or more",
    "growth --sizes 10": "--sizes 10: must be two numbers above 0 or more, by comma",
    "growth --sizes 0,10": "--sizes 0,10: must be two numbers above 0 or more, by comma",
    "growth --sizes 1,1.5": "--sizes 1,1.5: must be two numbers above 0 or more, by comma",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_measured(script, command):
    name, *flags = command.split()
    with pytest.raises(UserError) as error:
        parse_arguments(script(name).BenchmarkArguments, prog=name, description="", argv=flags)
    assert str(error.value) == MISTAKES[command]


def test_how_many_times_as_fast_is_the_median_over_rounds(contest):
    """By hand: 2, 1 and 4 times. The quotient of the medians would be 3."""
    assert contest.paired([20.0, 30.0, 40.0], [10.0, 30.0, 10.0]) == 2.0


def test_a_mistake_that_a_side_finds_is_told_as_one(contest):
    with pytest.raises(UserError, match=r"^--flag: of no use$"):
        contest.compete([contest.Contender("side", mistaken, ())], rounds=1)


def mistaken():
    """A side that cannot be built."""
    raise UserError("--flag: of no use")


@pytest.mark.parametrize("loads", [True, False])
def test_a_side_that_ends_without_a_word_is_named_with_its_exit_code(contest, loads):
    with pytest.raises(UserError, match=r"^side ended with exit code -9$"):
        contest.compete([contest.Contender("side", killed, (loads,))], rounds=1)


def killed(loads):
    """A side that the system kills, as one without memory: in its first block or before."""
    if not loads:
        os.kill(os.getpid(), signal.SIGKILL)
    return lambda: os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    "others, message",
    [([10.0, 9.0, 8.01], None), ([10.0, 9.0, 8.1], "differ"), ([10.0, 10.0, 10.0], "differ")],
)
def test_engines_that_learn_otherwise_are_told(script, others, message):
    check = script("zero").check
    sides = [{"stage": 2, "losses": losses} for losses in ([10.0, 9.0, 8.0], others)]
    with pytest.raises(UserError, match=message) if message else nullcontext():
        check(*sides, tolerance=0.002)


def test_losses_that_hardly_fall_show_nothing(script):
    same = {"stage": 1, "losses": [10.0, 9.95]}
    with pytest.raises(UserError, match="hardly fall, so they show nothing"):
        script("zero").check(same, same, tolerance=0.002)


def test_exponents_are_those_of_powers_and_the_first_block_is_left_out(script):
    def blocks(size):
        later = [{"seconds": 3 * size**2 * noise, "mib": 5.0, "peak_mib": 300} for noise in (0.5, 1, 4)]
        return [{"work": {"seconds": 1e9, "mib": 1e9, "peak_mib": 1e9}}, *({"work": block} for block in later)]

    first, *rows = script("growth").rows_of([(size, blocks(size)) for size in (1, 10, 40)])
    assert first["time_exponent"] is None and first["seconds"] == 3 and first["spread"] == (1.5, 12)
    assert [row["time_exponent"] for row in rows] == pytest.approx([2, 2])
    assert [row["memory_exponent"] for row in rows] == pytest.approx([0, 0])


def test_what_took_no_memory_has_no_exponent(script):
    sizes = {1: 0.0, 2: -0.5, 4: 3.0}
    found = [(size, [{"work": {"seconds": 1.0, "mib": mib, "peak_mib": 1}}] * 2) for size, mib in sizes.items()]
    assert [row["memory_exponent"] for row in script("growth").rows_of(found)] == [None] * 3


def test_a_table_is_made_longer_by_its_own_rows(script, tmp_path):
    (tmp_path / "a").write_bytes("id\tdocument\tlabel\n1\t좋다\t1\r\n2\t나쁘다\t0".encode())
    script("growth").lengthen(tmp_path / "a", tmp_path / "b", 5)
    rows = [row for _, row in read_tsv(tmp_path / "b", ("document",))]
    assert [row["document"] for row in rows] == ["좋다", "나쁘다", "좋다", "나쁘다", "좋다"]


@pytest.mark.parametrize("length", [4, 5, 20])
def test_texts_of_any_length_predict_the_same_tokens_of_a_row(script, length):
    row = np.arange(100, 121)
    found = script("growth").texts(row, length)
    assert max(len(text.ids) for text in found) == length
    batch = collate([found], 20)
    assert batch.inputs["input_ids"].tolist() == [row[:-1].tolist()]
    assert batch.inputs["target_ids"].tolist() == row[1:].tolist()
    assert batch.inputs["position_ids"].tolist() == [[k % length for k in range(20)]]


def test_other_work_at_one_size_is_told(script):
    check = partial(script("growth").check, tolerance=1e-2)
    losses = [{"size": 1, "losses": [8.0, 7.0]}, {"size": 2, "losses": [8.0, 7.01]}]
    check(losses, "ranks")
    with pytest.raises(UserError, match="2 ranks: losses"):
        check([losses[0], {"size": 2, "losses": [8.0, 7.5]}], "ranks")
    check([{"size": 16, "targets": 32}, {"size": 16, "targets": 32}, {"size": 32, "targets": 64}], "length")
    with pytest.raises(UserError, match="unequal numbers of targets"):
        check([{"size": 16, "targets": 32}, {"size": 16, "targets": 30}], "length")


def step_rows(*found):
    """Rows of a report of benchmarks/step.py: (micro batch, real tokens/s, peak of a plan of 100 bytes)."""
    names = ("micro_batch", "speed", "peak_bytes")
    told = {"planned_bytes": 100, "device": "NVIDIA H200"}
    return [dict(zip(names, row, strict=True)) | told for row in found]


def test_what_a_gpu_reached_stands_beside_its_targets(script):
    """Frozen layers count at one micro batch: 80,000 to 50,000, not 80,000 to 61,000."""
    reports = {"kogpt2": step_rows((16, 400_000, 90), (32, 459_999, 90)), "nsmc": []}
    reports |= {"trinity": step_rows((8, 50_000, 90), (16, 61_000, 111)), "trinity_frozen": step_rows((8, 80_000, 90))}
    found = {row["figure"]: (row["found"], row["reached"]) for row in script("targets").compared(reports)}
    assert found == {
        "kogpt2: real tokens/s": (459_999, False),
        "trinity: real tokens/s": (61_000, True),
        "trinity: times as fast when frozen": (1.6, True),
        "kogpt2: peak memory, times the plan's": (0.9, True),
        "trinity: peak memory, times the plan's": (1.11, False),
        "trinity_frozen: peak memory, times the plan's": (0.9, True),
    }


def test_the_fastest_way_of_a_model_counts(script):
    reports = {"kogpt2": step_rows((16, 400_000, 90)), "kogpt2_compiled": step_rows((32, 470_000, 90))}
    reports |= {"kogpt2_fp16": step_rows((16, 900_000, 90)), "trinity_packed": step_rows((16, 50_000, 90))}
    found = script("targets").compared(reports)
    assert [(row["figure"], row["reached"]) for row in found[:2]] == [
        ("kogpt2_compiled: real tokens/s", True), ("trinity_packed: real tokens/s", False),
    ]  # fmt: skip


def test_another_device_has_no_targets_of_speed(script):
    rows = [row | {"device": "CPU"} for row in step_rows((1, 2.0, 90))]
    assert [row["figure"] for row in script("targets").compared({"kogpt2": rows})] == [
        "kogpt2: peak memory, times the plan's"
    ]


@pytest.mark.parametrize("name", ["one gradient for embedding and head", "GELU in one kernel", "AdamW in one kernel"])
def test_a_step_without_a_technique_runs_the_operators_that_it_spares(one_rank, script, monkeypatch, name):
    """By PyTorch's profiler; what the process of a side puts in place is taken back here."""
    techniques = script("techniques")
    told = techniques.BenchmarkArguments(
        config_file=str(ROOT / "models/tiny_config.json"), length=16, rows=4, packed=4.0, updates=1, rounds=1
    )
    for owner, attribute, _ in techniques.TECHNIQUES[name].put:
        monkeypatch.setattr(owner, attribute, getattr(owner, attribute))
    found = {}
    for side in ("with", "without"):
        block = techniques.blocks_of(told, name, side)
        with torch.profiler.profile() as seen:
            figures = block()
        found[side] = {event.key: event.count for event in seen.key_averages()}, figures["losses"]
    (ours, losses), (theirs, others) = found["with"], found["without"]
    spared = {
        "one gradient for embedding and head": "aten::embedding_dense_backward",
        "GELU in one kernel": "aten::pow",
        "AdamW in one kernel": "aten::_foreach_addcdiv_",
    }[name]
    assert theirs.get(spared, 0) > ours.get(spared, 0) and others == pytest.approx(losses, rel=1e-4)


def test_every_technique_can_be_chosen_alone(script):
    techniques = script("techniques")
    for name in techniques.TECHNIQUES:
        assert techniques.BenchmarkArguments(techniques=name).chosen == [name]


def test_packed_rows_of_random_texts_are_full(script):
    """The last row of a store holds what is left; a store of few rows would show it in every other update."""
    step = script("step")
    told = step.StepArguments(config_file="models/tiny_config.json", length=512, packed=17.0, updates=2)
    rows = step.TrainingRows(step.RandomTexts(told, 2, 4096), step.Pauses(0, 0), 512, "packed", seed=0)
    assert rows.store.lengths.sum() > 0.98 * 512 * len(rows)


def test_half_a_report_is_none(script, tmp_path):
    (tmp_path / "kogpt2.json").write_text('{"rows": [')
    assert script("targets").measured(tmp_path / "kogpt2.json") == []


def test_rows_that_ran_out_of_memory_or_are_no_steps_have_no_target(script, tmp_path):
    others = [{"micro_batch": 1, "speed": None, "planned_bytes": 1}, {"name": "kozero", "speed": 2.0}]
    rows = others + step_rows((2, 1, 1))
    (tmp_path / "found.json").write_text(json.dumps({"rows": rows}))
    assert script("targets").measured(tmp_path / "found.json") == step_rows((2, 1, 1))


def passed(script, encoder, side):
    """Losses and gradient norm of a tiny side of benchmarks/encoders.py in one pass, and its parameters."""
    encoders = script("encoders")
    path = f"models/{encoder}_tiny_config.json"
    arguments = encoders.BenchmarkArguments(config_files=path, layers=0, rows=2, length=24)
    config = encoders.config_of(arguments, path)
    config.vocab_size = 512
    module = encoders.sides_of(path)[side](config).train()
    batch = next(encoders.batches(arguments, config.vocab_size, 0))
    losses = module(**batch.inputs)
    losses.sum().backward()
    norm = torch.stack([p.grad.norm() for p in module.parameters() if p.grad is not None]).norm()
    return losses.detach(), norm, sum(p.numel() for p in module.parameters())


SWITCH_SIDES = ("loop over experts", "batched products", "transformers' Switch layer")


@pytest.mark.parametrize(
    "encoder, side", [*(("transformer", side) for side in SWITCH_SIDES), ("mix_lm", "masked large kernel")]
)
def test_another_layer_of_the_same_weights_changes_no_loss_and_no_gradient(script, encoder, side):
    if side == SWITCH_SIDES[-1] and Version(version("transformers")) < Version("5.23"):
        pytest.skip("an older transformers routes without a capacity for each sequence")
    losses, norm, number = passed(script, encoder, "this project")
    found, found_norm, found_number = passed(script, encoder, side)
    torch.testing.assert_close(found, losses)
    torch.testing.assert_close(found_norm, norm)
    assert found_number >= number  # a masked kernel has taps that count for nothing


@pytest.mark.parametrize("encoder", ["transformer", "mix_lm"])
def test_a_head_at_hidden_tokens_changes_no_loss_of_bert(script, encoder):
    everywhere = passed(script, encoder, "BertForMaskedLM")
    torch.testing.assert_close(passed(script, encoder, "BertForMaskedLM, head at hidden tokens"), everywhere)


def test_a_layer_that_learns_something_else_is_told(script):
    rows = [{"name": f"{name}: {side}", "losses": [8.0], "norms": [norm]} for name, side, norm in [
        ("transformer", "this project", 1.0), ("transformer", "loop over experts", 1.0005),
        ("transformer", "BertForMaskedLM", 3.0), ("mix_lm", "this project", 2.0),
    ]]  # fmt: skip
    script("encoders").check(rows)
    rows.append({"name": "mix_lm: masked large kernel", "losses": [8.0], "norms": [2.01]})
    with pytest.raises(UserError, match="mix_lm: masked large kernel: norms"):
        script("encoders").check(rows)
