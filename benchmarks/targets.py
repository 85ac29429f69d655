"""What scripts/gpu_check.sh has found beside what one H200 should reach: speed of a step, the gain of frozen layers,
memory beside the plan's. Speeds are left out where another device was measured.

    python benchmarks/targets.py --folder OUTPUT      # with kogpt2.json, trinity.json, trinity_frozen.json, ...

The fastest row of a model counts, of texts of 1,024 tokens or packed ones, compiled or not; frozen and unfrozen layers
are compared at the same micro batch. Nothing fails here: a figure that is missed is a figure.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from contest import Reported, report, table

from kozero.config import arg, parse_arguments
from kozero.errors import require, run_main

SPEEDS = {"kogpt2": 460_000, "trinity": 60_000}  # real tokens a second: 50 % and 60 % of 790 TFLOP/s
WAYS = ("", "_packed", "_compiled")  # of a model's reports, those of which the fastest row counts
DEVICE = "H200"  # that the speeds are for
FROZEN, PLANNED = 1.4, 1.1  # times as fast with 12 of 24 layers frozen; the peak beside the plan's, at most

Row = dict[str, Any]


@dataclass
class BenchmarkArguments(Reported):
    """What to read."""

    folder: str = arg("", "of the reports of benchmarks/step.py that scripts/gpu_check.sh wrote")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.folder) and Path(self.folder).is_dir(), f"--folder {self.folder}: is no folder")


def main() -> None:
    """Read, print a Markdown table."""
    (arguments,) = parse_arguments(BenchmarkArguments, prog="benchmarks/targets.py", description=__doc__)
    reports = [path for path in sorted(Path(arguments.folder).glob("*.json")) if path.is_file()]
    rows = compared({path.stem: measured(path) for path in reports})
    require(bool(rows), f"--folder {arguments.folder}: no report of benchmarks/step.py is in it")
    print(table(
        ("figure", "target", "found", ""),
        [(row["figure"], f"{row['target']:,}", f"{row['found']:,.2f}", "reached" if row["reached"] else "MISSED")
         for row in rows],
    ))  # fmt: skip
    report(arguments, rows)


def measured(path: Path) -> list[Row]:
    """The rows of a report of benchmarks/step.py that have a speed; none of another report, or of half a one."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    except (ValueError, KeyError, TypeError):
        return []
    return [row for row in rows if row.get("speed") and "planned_bytes" in row]


def compared(reports: dict[str, list[Row]]) -> list[Row]:
    """Figures beside their targets, of the reports that are there."""
    rows = []
    for name, target in SPEEDS.items():
        found = [(row, name + way) for way in WAYS for row in reports.get(name + way, [])]
        if speeds := [(row["speed"], which) for row, which in found if DEVICE in row["device"]]:
            speed, which = max(speeds)
            rows.append(least(f"{which}: real tokens/s", speed, target))
    whole = {row["micro_batch"]: row["speed"] for row in reports.get("trinity", [])}
    frozen = {row["micro_batch"]: row["speed"] for row in reports.get("trinity_frozen", [])}
    if both := whole.keys() & frozen.keys():
        rows.append(least("trinity: times as fast when frozen", max(frozen[k] / whole[k] for k in both), FROZEN))
    for name, found in reports.items():
        if found:
            most = max(row["peak_bytes"] / row["planned_bytes"] for row in found)
            figure = f"{name}: peak memory, times the plan's"
            rows.append({"figure": figure, "found": most, "target": PLANNED, "reached": most <= PLANNED})
    return rows


def least(figure: str, found: float, target: float) -> Row:
    """A figure that should be at least so large."""
    return {"figure": figure, "found": found, "target": target, "reached": found >= target}


if __name__ == "__main__":
    run_main(main)
