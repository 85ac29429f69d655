"""scripts/gpu_check.sh: what it refuses, and a rehearsal of it on the CPU."""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers import ROOT


def check(*told, **environment: str) -> subprocess.CompletedProcess:
    """A run of the script with this Python."""
    environment = {"PYTHON": sys.executable, "KOZERO_DEVICE": "cpu"} | environment
    command = ["bash", "scripts/gpu_check.sh", *map(str, told)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300)


def test_without_a_gpu_it_ends_with_one_line(tmp_path):
    done = check(tmp_path / "out")
    assert done.returncode == 2 and "torch 2" in done.stdout
    assert done.stderr.strip().splitlines() == [
        "error: no GPU is visible; --rehearse goes through all parts on the CPU with tiny shapes"
    ]


@pytest.mark.parametrize(
    ("told", "environment", "message"),
    [
        ((), {}, "name a folder for the results"),
        (("--fast", "out"), {}, "--fast: unknown"),
        (("out", "zero9"), {}, "zero9: no such part; the parts are laws laws_slow"),
        (("out",), {"PYTHON": "no-python-here"}, "no-python-here does not run"),
        (("out",), {"WHEELS": str(ROOT / "docs")}, "cannot be installed"),
    ],
)
def test_mistakes_are_one_line(tmp_path, told, environment, message):
    done = check(*(tmp_path / word if word == "out" else word for word in told), **environment)
    assert done.returncode == 2 and message in done.stderr.splitlines()[-1]


def test_what_the_machine_lacks_is_named(tmp_path):
    """By a Python that has nothing but itself."""
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    done = check(tmp_path / "out", PYTHON=str(bare))
    assert done.returncode == 2 and "lacks torch transformers" in done.stderr and "WHEELS" in done.stderr


@pytest.mark.slow
def test_a_rehearsal_goes_on_after_a_part_that_failed(tmp_path):
    (tmp_path / "kogpt2.json").mkdir()  # its results have no place
    done = check("--rehearse", tmp_path, "kogpt2", "laws", "laws_slow", "trinity_frozen", "nsmc", "targets")
    summary = (tmp_path / "summary.txt").read_text().splitlines()
    assert done.returncode == 1 and done.stdout.endswith("\n".join(summary) + "\n")
    assert [line.split(",")[0] for line in summary] == [
        "kogpt2: FAILED with exit code 2", "laws: passed", "laws_slow: passed", "trinity_frozen: passed",
        "nsmc: passed", "targets: passed",
    ], done.stdout  # fmt: skip
    assert "is a folder" in (tmp_path / "kogpt2.log").read_text()
    (row,) = json.loads((tmp_path / "trinity_frozen.json").read_text())["rows"]
    assert row["speed"] > 0 and row["profile"]
    assert [row["name"] for row in json.loads((tmp_path / "nsmc.json").read_text())["rows"]] == ["kozero", "padded"]
    *_, target = json.loads((tmp_path / "targets.json").read_text())["rows"]
    assert target["figure"] == "trinity_frozen: peak memory, times the plan's"
