"""Run a script of this project as a user does, but in a process that is forked from one which has imported the
libraries (tests/ranks.py): importing them anew takes longer than most of what tests ask of a script."""

import multiprocessing
import os
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path

from kozero import distributed
from tests.helpers import ROOT
from tests.ranks import START


def run_script(
    command: str, world_size: int = 1, timeout: float = 300, pipes: list[Path] | None = None
) -> subprocess.CompletedProcess[str]:
    """`python COMMAND` in the root; with more ranks, what torchrun starts. Standard output and error are those of all
    ranks, or go into two named `pipes`; the exit code is that of the first which failed, and the others are ended
    then."""
    words, end = shlex.split(command), time.monotonic() + timeout
    port = distributed.free_port()
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / name for name in ("out", "err")]
        for path in said:
            path.touch()
        start = multiprocessing.get_context(START).Process
        told = [distributed.described(rank, world_size, port) for rank in range(world_size)] if world_size > 1 else [{}]
        running = [start(target=work, args=(words, dict(os.environ) | rank, pipes or said)) for rank in told]
        for process in running:
            process.start()
        try:
            codes = ends(running, end)
        finally:
            for process in running:  # and what it started
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
                process.join()
        out, err = (path.read_text(encoding="utf-8") for path in said)
        if codes is None:
            raise subprocess.TimeoutExpired(words, timeout, out, err)
        return subprocess.CompletedProcess(words, next(filter(None, codes), 0), out, err)


def ends(running: list, end: float) -> list[int] | None:
    """The exit codes in the order of ending, up to the first failure; None when the time is over."""
    left, codes = list(running), []
    while left and not any(codes):
        ready = wait([process.sentinel for process in left], max(0, end - time.monotonic()))
        if not ready:
            return None
        for process in [process for process in left if process.sentinel in ready]:
            process.join()
            codes.append(process.exitcode)
            left.remove(process)
    return codes


def work(words: list[str], environment: dict[str, str], said: list[Path]) -> None:
    """What Python does with a script: its arguments, its folder first on the path, its name."""
    os.setsid()
    os.environ.clear()
    os.environ |= environment
    for number, path in enumerate(said, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.chdir(ROOT)
    sys.argv = list(words)
    sys.path.insert(0, str((ROOT / words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")
