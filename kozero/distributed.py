"""Who we are among the ranks, and the few collectives that the rest of the library needs.

A run always has a process group, also with one rank, so that nothing else asks whether it is distributed.
"""

import ctypes
import math
import os
import random
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import psutil
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from kozero import cgroups
from kozero.errors import UserError, first_line, require
from kozero.orphan import end_with_launcher, launching_command
from kozero.streams import outlive_readers

T = TypeVar("T")
DESCRIBED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
NEEDED = (("RANK", "WORLD_SIZE"), *(("WORLD_SIZE", name) for name in ("RANK", "MASTER_ADDR", "MASTER_PORT")))
BY_LAUNCHER = "start with torchrun or deepspeed, or unset"
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
FROM_MKL = (
    torch.exp, torch.log, torch.log2, torch.log10, torch.sqrt, torch.sin, torch.cos, torch.tan, torch.tanh, torch.asin,
    torch.acos, torch.atan, torch.erf, torch.erfc, torch.erfinv, torch.lgamma,
)  # fmt: skip

# Of ranks that wait for one of them to read, download or tokenise, which may take as long as it likes. A rank that
# dies meanwhile ends the wait at once: its connections close.
PATIENCE = timedelta(days=7)
patient: dist.ProcessGroup | None = None
# Of the threads that write checkpoints while the ranks go on training; one rank may write all of it.
WRITING = timedelta(hours=1)
background: dist.ProcessGroup | None = None
# Of small messages between steps, on the CPU: None is the group of all there.
control: dist.ProcessGroup | None = None


def setup(timeout_seconds: float = 600.0) -> None:
    """Join the process group that `torchrun` or `deepspeed` describes in the environment, or make one of one rank."""
    if dist.is_initialized():
        return
    check_environment()
    end_with_launcher()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    timeout = timedelta(seconds=timeout_seconds)
    # Libraries make groups without a timeout (DeepSpeed's gradients travel in one), which is half an hour under gloo.
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout
    use_device()
    with ended_by_interrupts():
        make_groups(backend, timeout)
        number_ranks()
    if not torch.cuda.is_available():
        settle_processor()


def check_environment() -> None:
    """Refuse a description of the ranks that no launcher gives.

    Raises: UserError that names the variable.
    """
    told = {name: os.environ[name] for name in DESCRIBED if name in os.environ}
    for name, value in told.items():
        right = name == "MASTER_ADDR" or (value.isascii() and value.isdecimal())
        require(right, f"{name} {value!r}: must be a whole number; {BY_LAUNCHER} {name}")
    for name, needed in NEEDED:
        require(name not in told or needed in told, f"{name} is set and {needed} is not: {BY_LAUNCHER} {name}")
    limits = {"RANK": told.get("WORLD_SIZE"), "LOCAL_RANK": told.get("LOCAL_WORLD_SIZE"), "MASTER_PORT": 2**16}
    for name, limit in limits.items():
        right = name not in told or limit is None or int(told[name]) < int(limit)
        require(right, f"{name} {told.get(name)}: must be below {limit}; {BY_LAUNCHER} {name}")


def number_ranks() -> None:
    """Say which rank of its machine this is where who started it has not: Kubernetes (PyTorchJob) sets RANK,
    WORLD_SIZE and MASTER_* alone. Collective."""
    hosts = gather(socket.gethostname(), patient)
    if "LOCAL_RANK" not in os.environ:
        os.environ["LOCAL_RANK"] = str(hosts[: rank()].count(hosts[rank()]))
        os.environ["LOCAL_WORLD_SIZE"] = str(hosts.count(hosts[rank()]))
        use_device()


def use_device() -> None:
    """Compute on the GPU of this rank, where there are any."""
    if gpus := torch.cuda.device_count():
        require(local_rank() < gpus, f"LOCAL_RANK {local_rank()}: there is one rank a GPU, GPUs visible here: {gpus}")
        torch.cuda.set_device(local_rank())


def settle_processor() -> None:
    """Threads and memory of a rank that computes on a CPU."""
    if not threads_are_chosen():
        # Ranks of one machine share its cores; more threads than cores slows every rank down.
        torch.set_num_threads(max(1, usable_cores() // local_world_size()))
    keep_freed_memory()
    resolve_kernels()
    # oneDNN keeps what it prepared for 1,024 shapes. Where every batch has new shapes those lie scattered between
    # tensors, and a process grew by 9 MiB a step (fully_shard, MLM + ICT); not with 128, which hold those of a step
    # (KoGPT2 has about 30; with 16 they drove each other out, and a step of 1.8 s spent 0.16 on preparing).
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")


def threads_are_chosen() -> bool:
    """Whether the user has set OMP_NUM_THREADS. torchrun sets it to 1 for its ranks where nobody has."""
    environment: Mapping[str, str] = os.environ
    with suppress(psutil.Error):
        if "TORCHELASTIC_RUN_ID" in os.environ and (launcher := launching_command()):
            environment = launcher.environ()
    return bool(environment.get("OMP_NUM_THREADS"))


@contextmanager
def ended_by_interrupts() -> Iterator[None]:
    """Ctrl-C, and the end of who started this rank, end it at once: it waits for the others in C++, where a signal that
    Python is to handle would not be heard."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def make_groups(backend: str, timeout: timedelta) -> None:
    """Wait for all ranks, and make the groups that they talk in."""
    global patient, background, control
    if "WORLD_SIZE" in os.environ:
        if os.environ["WORLD_SIZE"] != "1":
            outlive_readers()  # a rank that left because of them would take the others down
        try:
            dist.init_process_group(backend, timeout=timeout, **restarted(timeout))
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
            if "EADDRINUSE" in str(error):
                told = f"port {port} is taken, by another run? Choose one with the launcher's --master_port"
            else:
                told = f"MASTER_ADDR {address}, MASTER_PORT {port}: the ranks did not meet there; {first_line(error)}"
            raise UserError(told) from None
    else:
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it, also for one process
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    background = dist.new_group(backend="gloo", timeout=max(timeout, WRITING))
    control = dist.new_group(backend="gloo", timeout=timeout) if backend == "nccl" else None


def restarted(timeout: timedelta) -> dict[str, Any]:
    """Arguments of init_process_group for ranks that `torchrun --max-restarts` has started again on its machine.

    With --master_port it keeps the store of the ranks before, whose addresses the new ones would find and wait for
    (torch 2.13, pytorch#135712). Each start gets keys of its own. With --rdzv_backend c10d, which several machines
    need, a restart has a new store, and machines may count restarts differently.
    """
    again, one_machine = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)), local_world_size() == world_size()
    if not (again and one_machine and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"):
        return {}
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=timeout)
    return {"store": dist.PrefixStore(f"restart{again}", store), "rank": rank(), "world_size": world_size()}


def keep_freed_memory() -> None:
    """Let glibc keep what tensors have freed, where it would give large pieces back to the system and take them anew,
    page by page and filled with zeros, in every step: a fifth of a step of KoGPT2's shape on two cores, for 4 to 8 %
    more memory (benchmarks/results). What the environment says of malloc stays; without glibc nothing changes."""
    if any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def resolve_kernels() -> None:
    """Call each function of FROM_MKL on one number. MKL looks for a kernel at the first call, and of two threads that
    make it together one may get that of lower accuracy (pytorch#188792, torch 2.13): in one run of twenty half of the
    first exp was off by 1e-4, so that the run was equal to no other."""
    for dtype in (torch.float32, torch.float64):
        for function in FROM_MKL:
            function(torch.ones(1, dtype=dtype))


def shutdown() -> None:
    """Leave the process group together: a rank that is gone early takes the others down with it."""
    global patient, background, control
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
        patient = background = control = None


def usable_cores() -> int:
    """Processor cores that this process may use: those that it is bound to, and no more than a container's quota, where
    a part of a core counts as one."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError):
        bound = min(bound, cgroups.cores((cgroups.PROC / "self/cgroup").read_text(), cgroups.ROOT))
    return max(1, math.ceil(bound))


def rank() -> int:
    """This process among all, 0 to world_size - 1."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    """Number of processes over all machines."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    """This process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """Number of processes of this machine; the deepspeed launcher names it only through LOCAL_SIZE."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ.get("WORLD_SIZE") or 1)


def free_port() -> int:
    """A TCP port that nobody uses now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def described(rank: int, world_size: int, port: int) -> dict[str, str]:
    """The environment that torchrun gives to a rank of this machine."""
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    return {name: str(value) for name, value in ranks.items()} | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def is_main() -> bool:
    """True on the one rank that prints and writes."""
    return rank() == 0


def device() -> torch.device:
    """The device of this rank."""
    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


def say(message: str) -> None:
    """Print a line once, from rank 0."""
    if is_main():
        print(message, flush=True)


def barrier() -> None:
    """Wait until every rank is here."""
    dist.barrier()


def all_reduce(tensor: torch.Tensor, op: dist.ReduceOp = dist.ReduceOp.SUM) -> torch.Tensor:
    """Reduce `tensor` in place over all ranks and return it."""
    dist.all_reduce(tensor, op=op)
    return tensor


def broadcast(value: T) -> T:
    """The value of rank 0, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0, device=device())
    return box[0]


def gather(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The values of all ranks in rank order, on every rank."""
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group)
    return values


class GatherRows(torch.autograd.Function):
    """Rows of all ranks; the gradient of a row is the sum of what every rank has for it.

    (torch.distributed.nn.functional has one, deprecated since torch 2.13, and no public one replaces it.)
    """

    @staticmethod
    def forward(ctx: Any, mine: torch.Tensor) -> torch.Tensor:
        """(B, ...) to (world * B, ...)."""
        parts = [torch.empty_like(mine) for _ in range(world_size())]
        dist.all_gather(parts, mine.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """(world * B, ...) of this rank's losses to (B, ...) of all ranks'."""
        return all_reduce(gradient.clone(memory_format=torch.contiguous_format)).chunk(world_size())[rank()]


def gather_rows(mine: torch.Tensor) -> tuple[torch.Tensor, int]:
    """(B, ...) rows of this rank to (world * B, ...) rows of all, with gradients, and the number of its first."""
    return (mine, 0) if world_size() == 1 else (GatherRows.apply(mine), rank() * len(mine))


def together(work: Callable[[], T]) -> T:
    """Run `work` on all ranks and wait for all, however long it takes. A UserError of any rank is raised on all of
    them, so that none waits for a rank that is gone."""
    result, message = None, None
    try:
        result = work()
    except UserError as error:
        message = str(error)
    if messages := [m for m in gather(message, patient) if m]:
        raise UserError(messages[0])
    return result


def machine_first(work: Callable[[], T]) -> T:
    """Run `work` on the first rank of each machine while the others wait, then on the others; see together. Made for
    work that leaves a file behind and is nothing to do the second time."""
    is_first = local_rank() == 0
    first = together(work if is_first else nothing)
    other = together(nothing if is_first else work)
    return first if is_first else other


def nothing() -> None:
    """The work of a rank that waits."""


def once_a_machine(work: Callable[[], T]) -> T:
    """The result of `work` on the first rank of each machine, which must be the same on all, for every rank.

    Raises: UserError on all ranks when a rank has raised one.
    """
    return gather(together(work if local_rank() == 0 else nothing), patient)[0]


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch. Ranks get different streams: dropout must differ between them."""
    random.seed(seed + rank())
    np.random.seed((seed + rank()) % 2**32)
    torch.manual_seed(seed + rank())
