"""One process per GPU (or --nproc processes on a CPU) from one command, unless a launcher has started them already."""

import os
import signal
import socket
import sys
from collections.abc import Callable

import torch
import torch.multiprocessing as mp

from kozero.errors import run_main


def run_ranks(main: Callable[[], None], nproc: int) -> None:
    """Run `main` on the ranks of this machine and end with the exit code of the first that failed.

    Under torchrun or deepspeed this process is one of them. `main` must be importable, since the others are started
    afresh.
    """
    wanted = nproc or torch.cuda.device_count() or 1
    if "WORLD_SIZE" in os.environ or wanted == 1:
        run_main(main)
    ranks = mp.spawn(one_rank, args=(main, wanted, free_port(), sys.argv), nprocs=wanted, join=False)
    signal.signal(signal.SIGTERM, lambda *_: [process.terminate() for process in ranks.processes])
    try:
        while not ranks.join():
            pass
    except mp.ProcessExitedException as ended:
        sys.exit(ended.exit_code if ended.exit_code >= 0 else 128 - ended.exit_code)  # by a signal: as shells say it
    sys.exit()  # not by run_main, which would leave the queues of this process behind


def one_rank(rank: int, main: Callable[[], None], world_size: int, port: int, argv: list[str]) -> None:
    """What a started process does. When the one that started it is gone, torch has the system send SIGINT, which a job
    in the background of a shell ignores."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = argv
    described = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    os.environ |= {name: str(value) for name, value in described.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run_main(main)


def free_port() -> int:
    """A TCP port that nobody uses now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
