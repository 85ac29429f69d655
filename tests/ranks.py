"""Run a function on several gloo ranks and bring back what each returned."""

import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from kozero import distributed


def run_ranks(function: Callable[..., Any], *args: Any, world_size: int = 2) -> list[Any]:
    """`function(*args)` on `world_size` new processes that form a process group; results in rank order.

    The function must be importable (at the top of a module) and its result must pickle.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        mp.spawn(work, args=(function, args, world_size, port, folder), nprocs=world_size, join=True)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def work(rank: int, function: Callable, args: tuple, world_size: int, port: int, folder: str) -> None:
    """One rank."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    try:
        distributed.setup(60)
        torch.save(function(*args), Path(folder) / f"{rank}.pt")
        distributed.shutdown()
    except BaseException:
        traceback.print_exc()
        raise
    os._exit(0)  # the interpreter's teardown may abort, see kozero.errors.run_main


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]
