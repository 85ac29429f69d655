"""How much memory a rank holds, its peak since a moment, and how much it may take: of its GPU, else of the machine."""

import ctypes
import gc
import math
from pathlib import Path

import torch

from kozero import distributed
from kozero.cgroups import PROC, ROOT, levels
from kozero.errors import UserError

# Of cgroups v2 and v1: limit and use in bytes, and what memory.stat calls pages of files, which the system takes back.
V2 = ("memory.max", "memory.current", ("active_file", "inactive_file"))
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file"))


class DeviceMemory:
    """What torch's allocator has taken of the GPU of this rank, fragments included. In bytes."""

    def reset(self) -> int:
        """Give back what is not in use, begin a new peak, and return what is held."""
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_reserved()

    def peak(self) -> int:
        """Most that was held since `reset`."""
        return torch.cuda.max_memory_reserved()

    def limit(self) -> int:
        """What this rank could hold by now: what it holds and its share of what is free."""
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()


class ProcessMemory:
    """The same of what this process holds of the machine, without pages of files: those are dropped when room is
    needed."""

    def reset(self) -> int:
        gc.collect()
        trim_heap()
        (PROC / "self/clear_refs").write_text("5")  # VmHWM begins anew, and ru_maxrss with it: man 5 proc
        return self.now("VmRSS")

    def peak(self) -> int:
        return self.now("VmHWM")

    def limit(self) -> int:
        available = kilobytes(PROC / "meminfo")["MemAvailable"] * 1024
        free = min(available, cgroup_free((PROC / "self/cgroup").read_text(), ROOT))
        return self.now("VmRSS") + int(free) // distributed.local_world_size()

    def now(self, name: str) -> int:
        """A size of this process without its pages of files."""
        sizes = kilobytes(PROC / "self/status")
        return (sizes[name] - sizes["RssFile"]) * 1024


Memory = DeviceMemory | ProcessMemory


def rank_memory() -> Memory:
    """The memory that limits this rank.

    Raises: UserError where a system does not tell the peak of a process.
    """
    if torch.cuda.is_available():
        return DeviceMemory()
    memory = ProcessMemory()
    try:
        memory.reset(), memory.peak(), memory.limit()
    except (OSError, KeyError) as error:
        raise UserError(
            f"--train_batch_size 0: this system does not tell a process's peak memory ({error}); give a number of rows"
        ) from None
    return memory


def rank_limit() -> int | None:
    """Bytes that this rank could hold by now, None where a system does not tell."""
    try:
        return (DeviceMemory() if torch.cuda.is_available() else ProcessMemory()).limit()
    except (OSError, KeyError):
        return None


def trim_heap() -> None:
    """Let glibc give freed memory back; other C libraries have no such call."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)


def kilobytes(path: Path) -> dict[str, int]:
    """The lines `Name: 123 kB` of a file of /proc."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if words[-1:] == ["kB"]}


def cgroup_free(groups: str, root: Path) -> float:
    """Bytes that are left below the tightest memory limit of a process, infinity without one. See levels."""
    found = (left_in(folder, *(V1 if old else V2)) for old, folder in levels("memory", groups, root))
    return min(found, default=math.inf)


def left_in(folder: Path, limit_file: str, used_file: str, droppable: tuple[str, ...]) -> float:
    """Bytes that are left below the limit of one cgroup, infinity without a limit."""
    try:
        limit = (folder / limit_file).read_text().strip()
        used = int((folder / used_file).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # the root group of v2 has no limit, and a folder above may be hidden
        return math.inf
    return math.inf if limit == "max" else int(limit) - used + sum(int(stat.get(name, 0)) for name in droppable)
