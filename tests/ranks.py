"""Run a function on several ranks and bring back what each returned: of gloo, where GPUs are visible of NCCL."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from kozero import distributed

# Processes are forked from one that has imported what follows, which takes seconds. Not with a GPU, for
# what a process has asked of CUDA its forks cannot use.
START = "spawn" if torch.cuda.is_available() else "forkserver"
multiprocessing.get_context("forkserver").set_forkserver_preload(
    ["tests.ranks", "transformers.models.gpt2.modeling_gpt2", "kozero.engines.deepspeed", "kozero.engines.fsdp"]
)

# Of a law that two ranks show, and one where there is one GPU: NCCL takes no two ranks of it.
RANKS = min(2, torch.cuda.device_count() or 2)


def run_ranks(function: Callable[..., Any], *args: Any, world_size: int = 2) -> list[Any]:
    """`function(*args)` on `world_size` new processes that form a process group; results in rank order.

    The function must be importable (at the top of a module) and its result must pickle.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus < world_size:
        pytest.skip(f"{world_size} ranks need as many GPUs, {gpus} visible; CUDA_VISIBLE_DEVICES= runs them on the CPU")
    with tempfile.TemporaryDirectory() as folder:
        port = distributed.free_port()
        told = (function, args, dict(os.environ), world_size, port, folder)
        mp.start_processes(work, told, world_size, start_method=START)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def work(
    rank: int, function: Callable, args: tuple, environment: dict, world_size: int, port: int, folder: str
) -> None:
    """One rank. The environment is that of now, not of when the first process was forked."""
    os.environ.clear()
    os.environ |= environment | distributed.described(rank, world_size, port)
    if torch.cuda.is_available():  # what is compared bit by bit must not depend on which kernel thread was the first
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        distributed.setup(60)
        torch.save(function(*args), Path(folder) / f"{rank}.pt")
        distributed.shutdown()
    except BaseException:
        traceback.print_exc()
        raise
    os._exit(0)  # the interpreter's teardown may abort, see kozero.errors.run_main
