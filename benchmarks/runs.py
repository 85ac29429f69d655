"""Runs of entry points as a benchmark: started as users start them, in turn, read from what they wrote.

Its neighbours import it by its bare name: they are scripts, and another package of the name benchmarks is installed.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import numpy as np
from contest import Reported, paired, report, table

from kozero.config import arg, at_least
from kozero.errors import require

ROOT = Path(__file__).parent.parent
TOLERANCES = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}  # of losses and gradient norms, relative


@dataclass
class RunArguments(Reported):
    """What all runs take."""

    known: ClassVar[tuple[str, ...]]  # sides by name

    ranks: int = arg(2, "processes")
    steps: int = arg(5, "optimizer updates of each run")
    micro_batch: int = arg(1, "rows of one forward pass on one rank")
    rounds: int = arg(3, "runs of each side, which take turns")
    sides: str | None = arg(None, "which, by comma; default: all")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "ranks", "steps", "micro_batch", "rounds")
        for name in self.chosen:
            require(name in self.known, f"--sides {name!r}: is none of {', '.join(self.known)}")
        require(len(set(self.chosen)) == len(self.chosen), f"--sides {self.sides}: names one twice")

    @property
    def chosen(self) -> Sequence[str]:
        """Sides by name."""
        return self.sides.split(",") if self.sides else self.known


def in_turn(names: Sequence[str], run: Callable[[str], dict[str, Any]], rounds: int) -> list[dict[str, Any]]:
    """A row for each name: medians over its runs, speeds with their spread and beside the first row's.

    The order is reversed in every other round. Nothing has to warm up: every run is a process of its own.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(1, rounds + 1):
        for name in names if number % 2 else names[::-1]:
            found[name].append(run(name))
        print(f"round {number} of {rounds} done", flush=True)
    rows = [row_of(runs) for runs in found.values()]
    return [row | {"ratio": paired(row["speeds"], rows[0]["speeds"])} for row in rows]


def row_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the runs of one name."""
    speeds = [run["speed"] for run in runs]
    medians = {"peak_gib": median([run["peak_gib"] for run in runs]), "speed": median(speeds)}
    return runs[0] | medians | {"speeds": speeds, "spread": (min(speeds), max(speeds)), "runs": runs}


def check(rows: list[dict[str, Any]], dtype: str) -> None:
    """All runs of all rows have learnt the same as the first run of the first.

    Raises: UserError.
    """
    for run in (run for row in rows for run in row["runs"]):
        for kind in ("losses", "norms"):
            found, first = run[kind], rows[0][kind]
            near = len(found) == len(first) and np.allclose(found, first, rtol=TOLERANCES[dtype])
            require(near, f"{run['name']}: {kind} {found}, of {rows[0]['name']}: {first}")


def measured(name: str, command: list[str], run: Path) -> dict[str, Any]:
    """One run that writes to `run`: its losses, gradient norms, peak memory of rank 0 in GiB, median of tokens/s.

    Raises: UserError with the run's last line, or its exit code, when it fails.
    """
    place = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | place)
    last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
    require(done.returncode == 0, f"{name} failed: {last}")
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    points = [point for point in map(json.loads, lines) if "train/loss" in point]
    return {
        "name": name,
        "losses": [point["train/loss"] for point in points],
        "norms": [point["train/grad_norm"] for point in points],
        "peak_gib": points[-1]["train/peak_memory_gib"],
        "speed": median([point["train/tokens_per_second"] for point in points]),
    }


def flags(values: dict[str, Any]) -> list[str]:
    """Arguments of a command line; None is left out, True is a flag alone."""
    given = {name: value for name, value in values.items() if value is not None and value is not False}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]


def show(rows: list[dict[str, Any]], arguments: Reported) -> None:
    """Print the rows as a Markdown table, and write them."""
    cells = []
    for row in rows:
        losses, norms = (" ".join(f"{value:.6f}" for value in row[name]) for name in ("losses", "norms"))
        memory = (f"{row['peak_gib']:.2f}", f"{row['formula_gib']:.2f}")
        speed = (f"{row['speed']:,.0f}", "{:,.0f} to {:,.0f}".format(*row["spread"]), f"{row['ratio']:.2f}")
        cells.append((row["name"], losses, norms, *memory, *speed))
    columns = ("engine", "losses", "gradient norms", "peak GiB (rank 0)", "states by formula, GiB", "tokens/s",
               "least to most", "times the first")  # fmt: skip
    print(table(columns, cells))
    report(arguments, rows)


def python(entry: str) -> list[str]:
    """The command that runs an entry point here."""
    return [sys.executable, entry]
