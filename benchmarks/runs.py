"""A run of an entry point as a benchmark: started as users start it, read from what it wrote.

Its neighbours import it by its bare name: they are scripts, and another package of the name benchmarks is installed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from contest import Reported, report, table

from kozero.errors import require

ROOT = Path(__file__).parent.parent


def measured(name: str, command: list[str], run: Path) -> dict[str, Any]:
    """One run that writes to `run`: its losses, gradient norms, peak memory of rank 0 in GiB, median of tokens/s.

    Raises: UserError with the run's last line when it fails.
    """
    place = {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | place)
    last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""
    require(done.returncode == 0, f"{name} failed: {last}")
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    points = [point for point in map(json.loads, lines) if "train/loss" in point]
    return {
        "name": name,
        "losses": [point["train/loss"] for point in points],
        "norms": [point["train/grad_norm"] for point in points],
        "peak_gib": points[-1]["train/peak_memory_gib"],
        "speed": sorted(point["train/tokens_per_second"] for point in points)[len(points) // 2],
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
        figures = (f"{row['peak_gib']:.2f}", f"{row['formula_gib']:.2f}", f"{row['speed']:,.0f}")
        cells.append((row["name"], losses, norms, *figures))
    columns = ("engine", "losses", "gradient norms", "peak GiB (rank 0)", "states by formula, GiB", "tokens/s")
    print(table(columns, cells))
    report(arguments, rows)


def python(entry: str) -> list[str]:
    """The command that runs an entry point here."""
    return [sys.executable, entry]
