"""What a run tells while it goes: a progress bar, TensorBoard curves, and the same scalars as JSON lines."""

import json
import math
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kozero import distributed
from kozero.folder import write_text


class RunLog:
    """Writes on rank 0; on the others every method does nothing. Curves are over optimizer steps."""

    def __init__(self, output_dir: Path, total_steps: int, first_step: int = 0, scored: bool = True) -> None:
        self.writer = self.file = self.bar = None
        if not distributed.is_main():
            return
        from torch.utils.tensorboard import SummaryWriter  # imported here: it takes a second, and only rank 0 writes

        path = output_dir / "metrics.jsonl"
        keep_until(path, first_step, scored)
        self.file = path.open("a", encoding="utf-8")
        self.writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=first_step + 1)
        self.bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True, disable=None)
        self.started, self.first, self.step, self.total = time.perf_counter(), first_step, first_step, total_steps

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One point of each curve."""
        if self.file is None:
            return
        row = {"step": step, "time": round(time.time(), 3)} | {name: as_json(v) for name, v in values.items()}
        self.file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        """A piece of text beside the curves."""
        if self.writer is not None:
            self.writer.add_text(name, text, step)
            self.say(f"{name}: {text}")

    def progress(self, steps: int, **shown: str) -> None:
        """Move the bar on; where no terminal shows a bar, print a line whenever there is something to show."""
        if self.bar is None:
            return
        self.step += steps
        self.bar.update(steps)
        if shown and self.bar.disable:
            seconds = (time.perf_counter() - self.started) / max(1, self.step - self.first) * (self.total - self.step)
            values = ", ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step {self.step}/{self.total}: {values}, {tqdm.format_interval(seconds)} left", flush=True)
        elif shown:
            self.bar.set_postfix(shown, refresh=False)

    def say(self, message: str) -> None:
        """A line that does not tear the bar."""
        if self.bar is not None:
            self.bar.write(message)
            sys.stdout.flush()

    def close(self) -> None:
        """Flush everything."""
        if self.file is not None:
            self.file.close()
            self.writer.close()
            self.bar.close()


def keep_until(path: Path, step: int, scored: bool) -> None:
    """Drop the points after `step` from an earlier file, and unless it is `scored` its evaluation: a resumed run writes
    them again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():  # torn inside a letter, perhaps
        try:
            point = json.loads(line)
            again = point["step"] == step and not scored and any(name.startswith("eval/") for name in point)
            if point["step"] <= step and not again:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # the last line of a killed run may be torn
    write_text(path, "".join(kept))


def as_json(value: Any) -> Any:
    """Numbers that are not finite as text: JSON has none, and they must not be hidden."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def peak_memory_gib() -> float:
    """Most memory that this rank has used so far: of the GPU where there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
