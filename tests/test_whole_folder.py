"""Folders of results that are whole or not there, and what a disk that is full or broken makes of a run."""

import errno
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from kozero.data.store import build_once
from kozero.errors import SaveFailed, UserError, disk_error
from kozero.seal import new_folder
from scripts import select_topic, train_tokenizer
from tests.helpers import ROOT, SAMPLE_DATA


def writing(folder: Path):
    return new_folder("--output_dir", folder)


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


@pytest.mark.parametrize("before", ["nothing", "an empty folder"])
def test_a_folder_has_its_name_when_all_is_in_it(tmp_path, before):
    if before == "an empty folder":
        (tmp_path / "out").mkdir()
    with writing(tmp_path / "out") as folder:
        (folder / "inner").mkdir()
        (folder / "inner/a").write_text("whole")
        assert not (tmp_path / "out/inner").exists()
    assert names(tmp_path) == ["out", "out/inner", "out/inner/a"]


def test_every_file_is_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    synced, real = set(), os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (synced.add(os.fstat(file).st_ino), real(file))[1])
    with writing(tmp_path / "out") as folder:
        (folder / "inner").mkdir()
        (folder / "inner/a").write_text("1")
        (folder / "b").write_text("2")
    assert {path.stat().st_ino for path in (tmp_path / "out").rglob("*")} <= synced


def test_a_mistake_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="no"), writing(tmp_path / "out") as folder:
        (folder / "a").write_text("half")
        raise UserError("no")
    assert names(tmp_path) == []


def test_what_a_killed_process_left_neither_shows_nor_hinders(tmp_path):
    child = os.fork()
    if not child:
        with writing(tmp_path / "out") as folder:
            (folder / "half").write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not (tmp_path / "out").exists()
    with writing(tmp_path / "out") as folder:
        (folder / "a").write_text("whole")
    assert names(tmp_path) == ["out", "out/a"]


def test_two_processes_do_not_write_one_folder(tmp_path):
    with writing(tmp_path / "out") as folder:
        (folder / "a").write_text("first")
        told = pytest.raises(UserError, match=r"--output_dir .*out: another run is writing it")
        with told, writing(tmp_path / "out"):
            pass
    assert names(tmp_path) == ["out", "out/a"]


@pytest.mark.parametrize("kind", ["a folder that holds something", "a file", "a mount point"])
def test_what_is_there_stays_as_it_is(tmp_path, kind):
    if kind == "a file":
        (tmp_path / "out").write_text("years of work")
    else:
        (tmp_path / "out").mkdir()
        (tmp_path / "out/thesis.txt").write_text("years of work")
    place = Path("/") if kind == "a mount point" else tmp_path / "out"
    before = names(tmp_path)
    told = pytest.raises(UserError, match=r"--output_dir .*: (holds something already|is a mount point)")
    with told, writing(place):
        pass
    assert names(tmp_path) == before


# Disks ------------------------------------------------------------------------------------------------------------


@contextmanager
def little_room(size: int = 2000):
    """No file of this process may have more bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def failing(number: int) -> None:
    raise OSError(number, os.strerror(number), "results/a")


def failing_inside() -> None:
    try:
        failing(errno.EDQUOT)
    except OSError as error:
        raise RuntimeError("a library's own words") from error


def large_tokenizer() -> Tokenizer:
    return Tokenizer(models.WordLevel({str(k): k for k in range(1000)}, unk_token="0"))


FAILURES = {
    "ENOSPC": lambda path: failing(errno.ENOSPC),
    "EDQUOT": lambda path: failing(errno.EDQUOT),
    "EIO": lambda path: failing(errno.EIO),
    "inside another error": lambda path: failing_inside(),
    "a file": lambda path: path.write_text("x" * 10**6),
    "tokenizers": lambda path: large_tokenizer().save(str(path)),
    "safetensors": lambda path: save_file({"a": torch.zeros(10**4)}, path),
    "numpy": lambda path: np.save(path, np.zeros(10**6)),
    "torch": lambda path: torch.save({"a": torch.zeros(10**6)}, path),
}


@pytest.mark.parametrize("name", FAILURES)
def test_whatever_a_library_raises_of_a_full_disk_is_known(tmp_path, name):
    with pytest.raises(Exception) as caught, little_room():
        FAILURES[name](tmp_path / "a")
    assert disk_error(caught.value)


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "Permission denied"), ValueError("28"), KeyError(28)])
def test_other_errors_are_no_full_disk(error):
    assert disk_error(error) is None


def test_a_full_disk_ends_a_program_with_one_line_and_exit_code_5():
    told = "from kozero.errors import run_main\ndef main():\n raise Exception('No space left on device (os error 28)')"
    words = [sys.executable, "-c", f"{told}\nrun_main(main)"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 5
    assert done.stderr.startswith("error: results: No space left on device; make room") and done.stderr.count("\n") == 1


def test_what_one_rank_tells_all_of_a_full_disk_ends_each_with_exit_code_5():
    """Each raises the words alone: the error that they came of was another rank's."""
    told = "from kozero.errors import UserError, run_main\ndef main():\n raise UserError('c: No space left on device')"
    words = [sys.executable, "-c", f"{told}\nrun_main(main)"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (5, "error: c: No space left on device\n")


TOOLS = {
    "train_tokenizer": (train_tokenizer, ["--vocab_size", "400"], "tokenizer.json"),
    "select_topic": (select_topic, ["--query", "눈이 쌓인 아침", "--terms", "bigram"], "report.json"),
}


@pytest.mark.parametrize("tool", TOOLS)
def test_a_tool_on_a_full_disk_leaves_nothing_and_the_same_command_works_afterwards(tmp_path, monkeypatch, tool):
    module, flags, result = TOOLS[tool]
    words = ["--files", SAMPLE_DATA / "corpus", "--output_dir", tmp_path / "out", *flags]
    monkeypatch.setattr(sys, "argv", [tool, *map(str, words)])
    told = rf"--output_dir {tmp_path}/out: cannot be written \(.*File too large\); make room"
    with pytest.raises(SaveFailed, match=told), little_room():
        module.main()
    assert names(tmp_path) == []
    module.main()
    assert (tmp_path / "out" / result).exists() and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_cache_on_a_full_disk_is_told_as_one_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="No space left") as caught:
        build_once(tmp_path, "key", lambda folder: failing(errno.ENOSPC))
    assert disk_error(caught.value.__context__)  # by which a program ends with exit code 5
    assert [path for path in names(tmp_path) if not path.endswith(".lock")] == []
