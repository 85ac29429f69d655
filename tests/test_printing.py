"""What a program prints where it cannot be printed: the streams of real processes."""

import fcntl
import io
import os
import pty
import subprocess
import sys
import threading

import pytest

from kozero.streams import guard_streams
from tests.helpers import ROOT, SAMPLE_TOKENIZER
from tests.scripts import run_script

TEXT = "한국어 '말뭉치' \udcff"  # the last is a byte of a file name that is not UTF-8
SPELLED = "\\ud55c\\uad6d\\uc5b4 '\\ub9d0\\ubb49\\uce58' \\udcff"
PRINTS = f"""
import sys
from pathlib import Path
from kozero.errors import UserError, run_main
from kozero.streams import outlive_readers  # kozero.folder calls it; it would import torch

def main():
    if "files" in sys.argv:
        outlive_readers()
    for k in range(6_000):
        print({TEXT!a}, k)
    if "fails" in sys.argv:
        print({TEXT!a}, file=sys.stderr)
        raise UserError({"--flag: 한국어"!a})
    if "files" in sys.argv:
        Path(sys.argv[2], "result").touch()

run_main(main)
"""


def process(*words: object, out=subprocess.PIPE, err=subprocess.PIPE, closed: str = "", **environment: str):
    """A program that prints 6,000 lines. `closed`: what a shell writes for streams that are closed."""
    command = ["bash", "-c", f'exec "$@" {closed}', "bash", sys.executable, "-c", PRINTS, *map(str, words)]
    told = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=told)


def ended(program: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, output, errors."""
    out, err = program.communicate(timeout=60)
    return program.returncode, (out or b"").decode("latin-1"), (err or b"").decode("latin-1")


UNABLE = [{"PYTHONIOENCODING": name} for name in ("ascii", "latin-1", "ascii:strict", "cp1252")]
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("environment", [*UNABLE, C_LOCALE])
def test_a_stream_that_cannot_spell_korean_gets_it_spelled(environment):
    code, out, err = ended(process("fails", **environment))
    assert code == 2 and err.splitlines() == [SPELLED, "error: --flag: \\ud55c\\uad6d\\uc5b4"]
    assert out.splitlines() == [f"{SPELLED} {k}" for k in range(6_000)]


def test_korean_stays_korean_where_it_can_be_spelled():
    code, out, _ = ended(process(PYTHONIOENCODING="utf-8"))
    assert code == 0 and out.encode("latin-1").decode().splitlines()[7] == "한국어 '말뭉치' \\udcff 7"


def test_a_tool_whose_reader_goes_ends_quietly_as_others_do():
    program = process()
    program.stdout.readline()
    program.stdout.close()
    assert program.stderr.read() == b"" and program.wait() == 128 + 13  # what a shell says of SIGPIPE


def test_help_that_is_not_read_to_its_end_ends_quietly():
    words = [sys.executable, "-c", "from kozero.errors import run_main\nrun_main(lambda: (print('x' * 9**6), exit(0)))"]
    told = os.environ | {"PYTHONPATH": str(ROOT)}
    program = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=told)
    program.stdout.close()
    assert program.stderr.read() == b"" and program.wait() in (0, 141)


@pytest.mark.parametrize("stream", ["out", "err"])
def test_what_goes_into_files_is_finished_without_a_reader(tmp_path, stream):
    program = process("files", tmp_path, err=subprocess.PIPE)
    program.stdout.readline()
    (program.stdout if stream == "out" else program.stderr).close()
    others = program.stderr if stream == "out" else program.stdout
    said = others.read()
    assert program.wait() == 0 and (tmp_path / "result").exists()
    assert said == b"" if stream == "out" else said.count(b"\n") == 5_999


def test_a_mistake_is_told_by_its_exit_code_where_nobody_reads_it():
    program = process("fails", err=subprocess.PIPE)
    program.stderr.close()
    program.stdout.read()
    assert program.wait() == 2


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_streams_that_are_closed_from_the_start_take_everything(tmp_path, closed):
    code, _, err = ended(process("files", tmp_path, closed=closed))
    assert (code, err) == (0, "") and [path.name for path in tmp_path.iterdir()] == ["result"]
    assert (tmp_path / "result").read_bytes() == b""  # the file did not become standard output


def test_a_full_disk_under_the_log_is_told_unless_results_are_in_files(tmp_path):
    with open("/dev/full", "wb") as full:
        code, _, err = ended(process(out=full))
        assert code == 5 and err.startswith("error: standard output: No space left on device") and err.count("\n") == 1
        assert ended(process("files", tmp_path, out=full))[::2] == (0, "") and (tmp_path / "result").exists()
        assert ended(process("fails", out=full, err=full))[0] in (2, 5)


def test_a_terminal_that_goes_ends_no_run(tmp_path):
    """Where SIGHUP is ignored (nohup) writing to it fails with EIO."""
    ours, theirs = pty.openpty()
    program = process("files", tmp_path, out=theirs, err=theirs)
    os.close(theirs)
    os.read(ours, 100)
    os.close(ours)
    assert program.wait(60) == 0 and (tmp_path / "result").exists()


COMMANDS = "글\x1b[2J\x1b]0;title\x07\r\x9b31m\x7f\u202e끝\t탭 👩\u200d💻"


@pytest.mark.parametrize("terminal", [True, False])
def test_what_would_command_a_terminal_is_spelled_on_one_and_kept_in_files(terminal):
    code = f"from kozero.errors import run_main\nrun_main(lambda: print({COMMANDS!a}))"
    ours, theirs = pty.openpty() if terminal else os.pipe()
    told = os.environ | {"PYTHONPATH": str(ROOT)}
    program = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=theirs, env=told)
    assert program.wait(60) == 0
    found = os.read(ours, 1000).decode().rstrip("\r\n")
    os.close(ours), os.close(theirs)
    spelled = "글\\x1b[2J\\x1b]0;title\\x07\\r\\x9b31m\\x7f\\u202e끝\t탭 👩\u200d💻"
    assert found.expandtabs() == (spelled if terminal else COMMANDS).expandtabs()


def test_a_pipe_that_does_not_wait_is_waited_for():
    """A program that shares the pipe may have made it so; nothing is lost then."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)  # less than Python writes at once
    program = process(out=writer, PYTHONIOENCODING="utf-8")
    os.close(writer)
    with open(reader, encoding="utf-8") as file:
        assert file.read().splitlines() == [f"{TEXT[:-1]}\\udcff {k}" for k in range(6_000)]
    assert program.wait(60) == 0 and program.stderr.read() == b""


def test_nothing_is_kept_back_where_python_is_told_so():
    """python -u, PYTHONUNBUFFERED: as the deepspeed launcher and Kubernetes start ranks."""
    killed = "from kozero.errors import run_main\nrun_main(lambda: (print('x'), __import__('os').kill(0, 9)))"
    told = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run([sys.executable, "-c", killed], env=told, capture_output=True, start_new_session=True)
    assert done.stdout == b"x\n" and done.returncode == -9


def test_a_training_run_outlives_the_reader_of_its_lines(monkeypatch, tmp_path):
    """Its output is ASCII, its reader goes after the first line as `| head -1` does, that of its errors at once."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    pipes = [tmp_path / "out", tmp_path / "err"]
    first = []

    def read(path) -> None:
        with path.open("rb") as file:
            first.append(file.readline() if path.name == "out" else b"")

    for path in pipes:
        os.mkfifo(path)
        threading.Thread(target=read, args=(path,), daemon=True).start()
    run = tmp_path / "말뭉치"
    told = f"--config_file models/tiny_config.json --tokenizer_name_or_path {SAMPLE_TOKENIZER} --output_dir {run}"
    sizes = "--max_steps 3 --max_train_samples 16 --max_eval_samples 4 --logging_steps 1 --max_seq_length 64"
    done = run_script(f"finetune/train.py {told} {sizes} --cache_dir {tmp_path}/cache", pipes=pipes)
    assert done.returncode == 0 and len(first) == 2 and any(first)
    assert (run / "model" / "model.safetensors").exists() and (run / "scores.json").exists()


def test_a_stream_of_a_host_program_that_is_no_file_stays(monkeypatch):
    """As in a notebook, or under pytest."""
    streams = {name: io.StringIO() for name in ("stdin", "stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    guard_streams()
    assert all(getattr(sys, name) is stream for name, stream in streams.items())
