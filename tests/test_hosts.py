"""Several machines: network namespaces, each its own address (tests/hosts.py)."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.hosts import Host, hosts, possible
from tests.scripts import run_script

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("hosts"),  # one network
    pytest.mark.skipif(not possible(), reason="network namespaces need root and `ip`"),
]
ROOT = Path(__file__).parent.parent
PORT = 29_777
RUN = {
    "deepspeed_config": "ds_configs/zero2.json",
    "config_file": "models/tiny_config.json",
    "per_device_train_batch_size": 1,
    "max_seq_length": 64,
    "max_eval_samples": 4,
    "logging_steps": 1,
    "eval_steps": 1000,
}


def torchrun(first: Host, num: int, rank: int) -> list[object]:
    rendezvous = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{first.address}:{PORT}", "--rdzv_id", "kozero"]
    return ["torchrun", "--nnodes", num, "--nproc_per_node", 1, *rendezvous]


def deepspeed(first: Host, num: int, rank: int) -> list[object]:
    """The documented equal of ssh: the same command on every host, each with its number."""
    names = Path(f"/etc/netns/{first.name}/hosts").read_text().split()[2::][1::2]
    hostfile = Path(f"/etc/netns/{first.name}/hostfile")
    hostfile.write_text("".join(f"{name} slots=1\n" for name in names[:num]))
    told = ["--hostfile", hostfile, "--no_ssh", "--node_rank", rank]
    return ["deepspeed", *told, "--master_addr", first.address, "--master_port", PORT]


def start(launcher, made: list[Host], folder: Path, *flags: object) -> list[subprocess.Popen]:
    """The same run on every host, all that each says in a pipe."""
    told = [word for name, value in RUN.items() for word in (f"--{name}", value)]
    told += ["--output_dir", folder / "run", "--cache_dir", folder / "cache", *flags]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": path}
    commands = [
        host.command(*launcher(made[0], len(made), k), "finetune/train.py", *told) for k, host in enumerate(made)
    ]
    return [subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) for command in commands]


def ranks(folder: Path) -> dict[int, psutil.Process]:
    """Processes that train, by their ids."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if str(folder / "run") in process.cmdline() and "RANK" in process.environ():
                found[process.pid] = process
    return found


def losses(folder: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Losses of four steps on one rank with as many rows a step."""
    folder = tmp_path_factory.mktemp("alone")
    told = [f"--{name} {value}" for name, value in RUN.items()]
    told += ["--gradient_accumulation_steps 2 --max_steps 4 --dropout 0", f"--output_dir {folder}/run"]
    done = run_script(f"finetune/train.py {' '.join(told)}")
    assert done.returncode == 0, done.stderr
    return losses(folder)


@pytest.mark.parametrize("launcher", [torchrun, deepspeed])
def test_two_hosts_train_together(tmp_path, alone, launcher):
    with hosts(2) as made:
        runs = start(launcher, made, tmp_path, "--max_steps", 4, "--dropout", 0)
        told = [run.communicate(timeout=200)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], told
    assert "2 rows a step on 2 ranks" in told[0]
    assert losses(tmp_path) == pytest.approx(alone, abs=1e-4)


def test_a_host_that_is_cut_off_ends_the_run_in_time_and_the_rest_goes_on(tmp_path):
    flags = ("--max_steps", 100_000, "--save_steps", 2, "--timeout_seconds", 10)
    with hosts(2) as made:
        runs = start(torchrun, made, tmp_path, *flags)
        assert any("step 5/" in line for line in runs[0].stdout)
        made[1].cut_off()
        began = time.monotonic()
        told = runs[0].communicate(timeout=200)[0]
        assert runs[0].returncode and "Timed out waiting 10000ms" in told
        # torchrun itself goes on looking for the other host for a while; its rank has ended.
        while processes := [process for process in ranks(tmp_path).values() if process.is_running()]:
            assert time.monotonic() - began < 200, processes
            time.sleep(0.2)
        flags = ("--max_steps", 12, "--save_steps", 2, "--gradient_accumulation_steps", 2, "--resume", "auto")
        (rest,) = start(torchrun, made[:1], tmp_path, *flags)
        told = rest.communicate(timeout=200)[0]
    assert rest.returncode == 0 and "resumed from" in told, told
    assert set(losses(tmp_path)) == set(range(1, 13))
