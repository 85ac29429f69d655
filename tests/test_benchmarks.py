"""What the benchmarks share. That each runs, and that its sides do the same work, is in test_commands.py."""

import json
import sys
from dataclasses import dataclass
from importlib import import_module

import numpy as np
import pytest

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


def test_where_a_report_cannot_be_written_nothing_is_measured(contest, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--output_file .*file: cannot be written"):
        parsed(contest, monkeypatch, "--output_file", tmp_path / "file/found.json")
    assert parsed(contest, monkeypatch).output_file is None


MISTAKES = {
    "checkpoints --steps 0": "--steps 0: must be 1 or more",
    "growth --of length --sizes 128,2048": "--sizes 128,2048: the model has 1024 positions",
    "growth --of ranks --length 2048": "--length 2048: the model has 1024 positions",
    "growth --of ranks --rows 6": "--rows 6: cannot be shared evenly by 4 ranks",
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
    check = script("growth").check
    losses = [{"size": 1, "losses": [8.0, 7.0]}, {"size": 2, "losses": [8.0, 7.01]}]
    check(losses, "ranks")
    with pytest.raises(UserError, match="2 ranks: losses"):
        check([losses[0], {"size": 2, "losses": [8.0, 7.5]}], "ranks")
    check([{"size": 16, "targets": 32}, {"size": 16, "targets": 32}, {"size": 32, "targets": 64}], "length")
    with pytest.raises(UserError, match="unequal numbers of targets"):
        check([{"size": 16, "targets": 32}, {"size": 16, "targets": 30}], "length")
