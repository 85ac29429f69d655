"""Linux control groups, by which containers limit memory and processor time (man 7 cgroups)."""

import math
from collections.abc import Iterator
from pathlib import Path

PROC, ROOT = Path("/proc"), Path("/sys/fs/cgroup")


def levels(controller: str, groups: str, root: Path) -> Iterator[tuple[bool, Path]]:
    """The folders of the groups that limit a process, each below its parents, with whether they are of version 1.

    Args:
        groups: its /proc/<pid>/cgroup, lines `number:controllers:path`; version 2 names no controllers.
        root: where cgroups are mounted. A container may see its own group there and not the one of that path.
    """
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root
        folder = top / path.lstrip("/")
        yield from ((bool(controllers), level) for level in (folder, *folder.parents) if level.is_relative_to(top))


def cores(groups: str, root: Path) -> float:
    """Processor cores of the tightest quota, infinity without one."""
    return min((quota(*level) for level in levels("cpu", groups, root)), default=math.inf)


def quota(old: bool, folder: Path) -> float:
    """Processor time in a period of one cgroup."""
    try:
        files = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if old else ("cpu.max",)
        time, period = " ".join((folder / file).read_text() for file in files).split()
    except OSError:  # the root group of version 2 has none, and a folder above may be hidden
        return math.inf
    return math.inf if time in ("max", "-1") else int(time) / int(period)
