"""One process per GPU (or --nproc processes on a CPU) from one command, unless a launcher has started them already."""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from multiprocessing.process import BaseProcess

import torch
import torch.multiprocessing as mp

from kozero import distributed
from kozero.errors import EXIT_INTERRUPTED, GRACE_SECONDS, require, run_main
from kozero.streams import outlive_readers

RANKS_PER_CORE = 4  # more of them is a slip of the keyboard
# A fork has the libraries that this process took seconds to import; what it has asked of CUDA, a fork cannot use.
START = "fork" if sys.platform == "linux" and not torch.cuda.is_available() else "spawn"


def check_nproc(nproc: int) -> None:
    """Refuse a number of ranks that this machine cannot run, or that a launcher has decided otherwise."""
    distributed.check_environment()
    if "WORLD_SIZE" in os.environ:
        started = distributed.local_world_size()
        told = f"torchrun or deepspeed decides here, ranks of this machine: {started}; leave --nproc out"
        require(nproc in (0, started), f"--nproc {nproc}: {told}")
    elif gpus := torch.cuda.device_count():
        require(nproc <= gpus, f"--nproc {nproc}: at most one rank a GPU, here {gpus}")
    else:
        cores = distributed.usable_cores()
        most = RANKS_PER_CORE * cores
        require(nproc <= most, f"--nproc {nproc}: at most {RANKS_PER_CORE} ranks a core, here {most} (cores: {cores})")


def run_ranks(main: Callable[[], None], nproc: int) -> None:
    """Run `main` on the ranks of this machine and end with the exit code of the first that failed.

    Under torchrun or deepspeed this process is one of them. `main` must be importable, since where there are GPUs the
    others are started afresh.
    """
    wanted = nproc or torch.cuda.device_count() or 1
    if "WORLD_SIZE" in os.environ or wanted == 1:
        run_main(main)
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # it tells whom it ends: not for users
    outlive_readers()
    told = (main, wanted, distributed.free_port(), sys.argv, os.getpid())
    ranks = mp.start_processes(one_rank, told, nprocs=wanted, join=False, start_method=START)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _: pass_on(number, ranks.processes))
    try:
        while not ranks.join():
            pass
    except mp.ProcessExitedException as ended:
        if ended.exit_code in (EXIT_INTERRUPTED, -signal.SIGINT):  # a rank was quicker than this process
            raise KeyboardInterrupt from None
        if ended.signal_name not in (None, "SIGTERM"):  # else the rank itself, or who ended us, has told why
            hint = "; is the memory too small?" if ended.signal_name == "SIGKILL" else ""
            print(f"error: rank {ended.error_index} was ended by {ended.signal_name}{hint}", file=sys.stderr)
        sys.exit(ended.exit_code if ended.exit_code >= 0 else 128 - ended.exit_code)  # by a signal: as shells say it
    except KeyboardInterrupt:
        for process in ranks.processes:  # a terminal interrupts them too: let them save; another Ctrl-C ends this wait
            process.join()
        raise
    sys.exit()  # not by run_main, which would leave the queues of this process behind


def pass_on(number: int, processes: Iterable[BaseProcess]) -> None:
    """Send a signal to those that still run."""
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, number)


def one_rank(rank: int, main: Callable[[], None], world_size: int, port: int, argv: list[str], starter: int) -> None:
    """What a process does that the process `starter` started. When that one goes, torch has the system send SIGINT,
    which a job in the background of a shell ignores; it may have gone before torch asked for that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.getppid() != starter:
        os._exit(EXIT_INTERRUPTED)
    sys.argv = argv
    os.environ |= distributed.described(rank, world_size, port)
    run_main(partial(end_silently, main))


def end_silently(main: Callable[[], None]) -> None:
    """Run `main`; the process that started this one says for all that they were interrupted, and ends them with the
    first that leaves: the one that says where the run stands."""
    try:
        main()
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the system sends another one when the starter has gone
        if os.environ["LOCAL_RANK"] != "0":
            time.sleep(GRACE_SECONDS)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(EXIT_INTERRUPTED)
