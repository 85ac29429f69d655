"""What the benchmarks share. That each runs, and that its sides do the same work, is in test_commands.py."""

import json
import sys
from dataclasses import dataclass
from importlib import import_module

import pytest

from kozero.config import arg, parse_arguments
from kozero.errors import UserError
from tests.helpers import ROOT


@pytest.fixture
def contest(monkeypatch):
    """By its bare name, as the scripts beside it find it."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return import_module("contest")


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
