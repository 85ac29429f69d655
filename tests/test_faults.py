"""What happens to whole runs under their launchers: signals, ranks that die, restarts."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from kozero.checkpoint import damage
from kozero.distributed import free_port
from tests.helpers import ROOT, interruptible

pytestmark = pytest.mark.slow
LAUNCHERS = {"deepspeed": ["deepspeed", "--num_gpus", "2"], "torchrun": ["torchrun", "--nproc_per_node", "2"]}
RUN = {
    "deepspeed_config": "ds_configs/zero2.json",
    "config_file": "models/tiny_config.json",
    "tokenizer_name_or_path": "sample_data/tokenizer",
    "task": "nsmc",
    "train_file": "sample_data/nsmc/ratings_train.txt",
    "validation_file": "sample_data/nsmc/ratings_test.txt",
    "max_eval_samples": 4,
    "per_device_train_batch_size": 1,
    "max_seq_length": 64,
    "logging_steps": 1,
}


@contextmanager
def started(launcher: str, folder: Path, *flags: object) -> Iterator[subprocess.Popen]:
    """A run of two ranks in a session of its own, all that it says in one pipe; nothing of it is left afterwards."""
    tool, *told = LAUNCHERS[launcher]
    command = [Path(sys.executable).parent / tool, "--master_port", free_port(), *told, "finetune/train.py"]
    command += [word for name, value in RUN.items() for word in (f"--{name}", value)] + [*flags]
    command += ["--output_dir", folder / "run", "--cache_dir", folder / "cache"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    run = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, env=environment, start_new_session=True, preexec_fn=interruptible, **pipes
    )
    try:
        yield run
    finally:
        for process in members(folder):
            process.kill()
        run.wait()


def members(folder: Path) -> list[psutil.Process]:
    """Processes, launchers too, whose command names the output folder."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if str(folder / "run") in process.cmdline():
                found.append(process)
    return found


def ranks(folder: Path) -> dict[str, psutil.Process]:
    """The processes that train, by their number."""
    found = {}
    for process in members(folder):
        with suppress(psutil.Error):
            found[process.environ().get("RANK")] = process
    return found


def all_gone(folder: Path, seconds: float = 60) -> bool:
    """Whether every process of a run ends within some seconds."""
    end = time.monotonic() + seconds
    while members(folder) and time.monotonic() < end:
        time.sleep(0.1)
    return not members(folder)


def wait_for(run: subprocess.Popen, words: str) -> None:
    assert any(words in line for line in run.stdout), words


@pytest.mark.parametrize(
    ("launcher", "number", "to_all"),
    [
        ("deepspeed", signal.SIGTERM, False),
        ("deepspeed", signal.SIGINT, True),  # as a terminal does
        ("torchrun", signal.SIGTERM, False),
        ("torchrun", signal.SIGINT, True),
        ("torchrun", signal.SIGUSR1, False),
    ],
)
def test_a_signal_saves_and_leaves_no_rank(tmp_path, launcher, number, to_all):
    with started(launcher, tmp_path, "--max_steps", 100_000, "--eval_steps", 100_000) as run:
        wait_for(run, "step 3/")
        os.killpg(run.pid, number) if to_all else run.send_signal(number)
        told = run.stdout.read()  # ends when the last process that writes there has ended
        assert run.wait() != 0 and all_gone(tmp_path)
    assert told.count(": saved at step ") == 1
    (checkpoint,) = (tmp_path / "run/checkpoints").glob("step-??????")
    assert damage(checkpoint) is None
    assert f"saved at step {int(checkpoint.name[5:])};" in told


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    points = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert len(dict(points)) == len(points)  # none twice
    return dict(points)


def test_ranks_that_are_killed_come_back_by_themselves_and_lose_nothing(tmp_path):
    flags = ("--max_steps", 14, "--save_steps", 3, "--eval_steps", 14)
    with started("torchrun", tmp_path / "undisturbed", *flags) as run:
        assert run.stdout.read() and run.wait() == 0
    LAUNCHERS["restarting"] = [*LAUNCHERS["torchrun"], "--max-restarts", "2"]
    with started("restarting", tmp_path / "killed", "--resume", "auto", *flags) as run:
        for step, rank in ((5, "1"), (10, "0")):
            wait_for(run, f"step {step}/")
            ranks(tmp_path / "killed")[rank].kill()
        told = run.stdout.read()
        assert run.wait() == 0, told
    assert losses(tmp_path / "killed") == losses(tmp_path / "undisturbed")


def test_a_rank_that_hangs_ends_the_other_when_its_time_is_over(tmp_path):
    flags = ("--max_steps", 100_000, "--eval_steps", 100_000, "--timeout_seconds", 5)
    with started("torchrun", tmp_path, *flags) as run:
        wait_for(run, "step 2/")
        ranks(tmp_path)["1"].suspend()
        began = time.monotonic()
        wait_for(run, "Timed out waiting 5000ms")
        assert time.monotonic() - began < 60


def test_a_rank_that_dies_ends_the_other_with_its_error(tmp_path):
    with started("deepspeed", tmp_path, "--max_steps", 100_000, "--eval_steps", 100_000) as run:
        wait_for(run, "step 2/")
        ranks(tmp_path)["1"].kill()
        began = time.monotonic()
        told = run.stdout.read()
        assert run.wait() != 0 and all_gone(tmp_path)
    assert time.monotonic() - began < 60
    assert "exits with return code = -9" in told or "Connection closed by peer" in told or "reset by peer" in told
