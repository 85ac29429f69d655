"""Checkpoints of a run: their names, which one is the newest, which may go, and that none is half there.

output_dir/checkpoints/step-000100/   what the engine saved, rng-rank0.json ..., state.json (written last)
output_dir/checkpoints/latest         name of the newest
output_dir/checkpoints/best           name of the one with the best score
"""

import copy
import json
import random
import re
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from kozero import distributed
from kozero.engines.base import Engine
from kozero.errors import SaveFailed, UserError, first_line, require
from kozero.files import on_host, tensor_bytes, to_disk, write_file
from kozero.folder import set_aside, write_text
from kozero.seal import UNREADABLE, fingerprints, put_in_place, read_sealed, write_seal, wrong_content, wrong_size

# What libraries raise when a file of theirs is not what it should be.
LOAD_ERRORS = (
    OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, SafetensorError,
)  # fmt: skip
SEED_STRIDE = 1_000_003  # between the streams of a run that goes on with other ranks, by step
STATE = "state.json"  # written last: a folder without it is not a checkpoint
NAME = re.compile(r"step-\d{6,}")
INCOMPLETE, REMOVED = ".incomplete", ".removed"  # behind the name of one that is being written, or removed


@dataclass
class RunState:
    """Where a run stands. `step` counts optimizer updates, `consumed_rows` the rows they and skipped steps took.

    `window_*` are sums over the steps since the last point of the curves (losses: one sum an objective, and the number
    of steps that had targets of it) and the highest spike score among them.
    """

    step: int = 0
    consumed_rows: int = 0
    skipped_steps: int = 0
    real_tokens: int = 0
    best_score: float | None = None
    best_step: int = 0
    best_scores: dict[str, float] = field(default_factory=dict)
    evaluations_since_best: int = 0
    evaluated_step: int = 0
    recent_losses: list[float] = field(default_factory=list)
    bad_in_a_row: int = 0
    window_steps: int = 0
    window_losses: list[float] = field(default_factory=list)
    window_counts: list[float] = field(default_factory=list)
    window_tokens: int = 0
    window_seconds: float = 0.0
    window_spike: float = 0.0


def saved_run(folder: Path) -> dict:
    """What `Checkpoints.save` was told of the run that wrote a whole checkpoint."""
    return read_sealed(folder / STATE)["run"]


def check_steps(folder: Path, total_steps: int) -> None:
    """Refuse a whole checkpoint that has done more steps than a run has."""
    step = read_sealed(folder / STATE)["state"]["step"]
    advice = "give more with --max_steps or --num_train_epochs, or resume from an earlier checkpoint"
    message = f"--resume {folder}: has done {step:,} steps and this run has {total_steps:,}; {advice}"
    require(step <= total_steps, message)


def damage(folder: Path) -> str | None:
    """What keeps a folder from being a whole checkpoint, by its state and the sizes of its files; None when nothing
    does."""
    try:
        saved = read_sealed(folder / STATE)
        check_state(RunState(**saved["state"]), folder)
        return wrong_size(folder, saved["files"])
    except FileNotFoundError:
        return f"not a whole checkpoint (no {STATE} in it)"
    except UNREADABLE as error:
        return f"{STATE} is damaged ({first_line(error)})"


def content_damage(folder: Path) -> str | None:
    """The same by the content of the files. Collective: every rank reads a part of them, at about 1.5 GB/s."""
    if found := distributed.broadcast(damage(folder)):
        return found
    files = distributed.broadcast(read_sealed(folder / STATE)["files"] if distributed.is_main() else None)
    mine = {name: files[name] for name in sorted(files)[distributed.rank() :: distributed.world_size()]}
    return next(filter(None, distributed.gather(wrong_content(folder, mine))), None)


def check_state(state: RunState, folder: Path) -> None:
    """Raise TypeError or ValueError for a value that no run writes into a folder of that name."""
    check_types(state)
    if negative := [f.name for f in fields(state) if f.type is int and getattr(state, f.name) < 0]:
        raise ValueError(f"{negative[0]} is {getattr(state, negative[0])}")
    other = NAME.fullmatch(folder.name) and state.step != step_of(folder)
    if other or state.step < max(state.best_step, state.evaluated_step):
        raise ValueError(f"step is {state.step}, best_step {state.best_step}, evaluated_step {state.evaluated_step}")


def check_types(state: RunState) -> None:
    """Raise TypeError for a value that no run writes."""
    for f in fields(state):
        value = getattr(state, f.name)
        numbers = "float" in str(f.type)
        several = value.values() if f.name == "best_scores" else value if f.type == list[float] else None
        values = several if several is not None else [] if value is None and numbers else [value]
        for one in values:
            if isinstance(one, bool) or not isinstance(one, int | float if numbers else int):
                raise TypeError(f"{f.name} is {value!r}")


class Checkpoints:
    """The checkpoints of one output folder.

    Args: limit: how many are kept, the best one besides; in_background: write while the run goes on, from a copy in
        the memory of the machine.
    """

    def __init__(self, output_dir: Path, limit: int, in_background: bool = False) -> None:
        self.folder = output_dir / "checkpoints"
        self.limit, self.in_background = limit, in_background
        self.writer = ThreadPoolExecutor(1, "checkpoints")
        self.pending: Future[None] | None = None

    def save(self, engine: Engine, state: RunState, run: dict, best: bool) -> None:
        """Write a checkpoint under a temporary name, rename it when it is whole, then let old ones go. Collective.

        Args: run: what must be the same when the run is resumed.

        Raises: SaveFailed on all ranks when one of them cannot write; in the background at the next save, or `finish`.
        """
        self.finish()
        final = self.of(state.step)
        staging = final.with_name(f"{final.name}{INCOMPLETE}")
        files = engine.snapshot() | {f"rng-rank{distributed.rank()}.json": random_state()}
        self.prepare(staging, sum(distributed.gather(tensor_bytes(files))))
        if self.in_background:
            files = on_host(files)
        text = {"state": asdict(state), "run": copy.deepcopy(run)}
        self.pending = self.writer.submit(self.write, staging, final, files, text, best)
        if not self.in_background:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one."""
        pending, self.pending = self.pending, None
        if pending:
            pending.result()

    def prepare(self, staging: Path, needed: int) -> None:
        """An empty folder on a disk that has room for some bytes. Collective."""
        message = None
        if distributed.is_main():
            shutil.rmtree(staging, ignore_errors=True)
            try:
                staging.mkdir(parents=True)
                if (free := shutil.disk_usage(self.folder).free) < needed:
                    sizes = f"{free / 2**20:,.0f} MiB are free and a checkpoint takes {needed / 2**20:,.0f}"
                    message = f"{self.folder}: {sizes}; make room and go on with --resume auto"
            except OSError as error:
                message = f"{staging}: cannot be made ({error.strerror})"
            if message:
                shutil.rmtree(staging, ignore_errors=True)
        if message := distributed.broadcast(message):
            raise SaveFailed(message)

    def write(self, staging: Path, final: Path, files: dict[str, Any], text: dict, best: bool) -> None:
        """This rank's files, then, when all have theirs, the checkpoint as a whole. Collective, in a thread."""
        written, error = {}, None
        try:
            written = {name: write_file(staging / name, value) for name, value in files.items()}
        except Exception as failure:  # whatever it is: the other ranks wait for this one's word
            error = first_line(failure)
        found = distributed.gather((written, error), distributed.background)
        error = next((error for _, error in found if error), None)
        if error is None and distributed.is_main():
            try:
                self.publish(staging, final, text, {k: v for one, _ in found for k, v in one.items()}, best)
            except Exception as failure:
                error = first_line(failure)
        if error := next(filter(None, distributed.gather(error, distributed.background)), None):
            free = shutil.disk_usage(self.folder).free / 2**20
            if distributed.is_main():
                shutil.rmtree(staging, ignore_errors=True)  # it takes the room that the user is asked to make
            raise SaveFailed(
                f"{staging}: cannot be written ({error}; {free:,.0f} MiB were free); make room and go on with "
                "--resume auto"
            )

    def publish(self, staging: Path, final: Path, text: dict, files: dict[str, dict], best: bool) -> None:
        """Make a checkpoint of what all ranks have written. On rank 0."""
        found = fingerprints(staging, files)  # with what a library has written by itself
        if wrong_size(staging, files | found):
            raise OSError("files of other ranks are not there: --output_dir must be on a disk that all machines share")
        write_seal(staging / STATE, text | {"files": found})
        shutil.rmtree(final.with_name(f"{final.name}.set-aside"), ignore_errors=True)
        remove(final)
        put_in_place(staging, final)
        to_disk(self.folder.parent)  # the first checkpoint's folder is new in it
        write_text(self.folder / "latest", final.name)
        if best:
            write_text(self.folder / "best", final.name)
        self.prune(text["state"]["best_step"])

    def point_to_best(self, step: int) -> bool:
        """Let `best` name the checkpoint of a step, whose state says that it is, if it is here. Collective."""
        whole = None
        if distributed.is_main():
            whole = damage(self.of(step)) is None
            if whole:
                write_text(self.folder / "best", self.of(step).name)
        return distributed.broadcast(whole)

    def amend(self, state: RunState, best: bool) -> None:
        """Put into the checkpoint of this step what its evaluation has shown. Collective.

        Raises: SaveFailed on all ranks.
        """
        self.finish()
        folder, error = self.of(state.step), None
        if distributed.is_main():
            try:
                write_seal(folder / STATE, read_sealed(folder / STATE) | {"state": asdict(state)})
                if best:
                    write_text(self.folder / "best", folder.name)
                self.prune(state.best_step)
            except Exception as failure:
                error = first_line(failure)
        if error := distributed.broadcast(error):
            raise SaveFailed(f"{folder}: cannot be written ({error}); make room and go on with --resume auto")

    def load(self, folder: Path, engine: Engine, run: dict) -> RunState:
        """Restore engine and random state from a whole checkpoint and return where its run stood. Collective."""
        saved = read_sealed(folder / STATE)
        for key, value in run.items():
            if saved["run"].get(key) != value:
                raise UserError(
                    f"{folder}: saved with {key} {saved['run'].get(key)!r}, this run has {value!r}; give the same, or "
                    "begin anew in another --output_dir"
                )
        try:
            engine.load(folder)
            files = sorted(folder.glob("rng-rank*.json"))
            if len(files) == distributed.world_size():  # else every rank goes on with a stream of its own
                random_file = folder / f"rng-rank{distributed.rank()}.json"
                restore_random_state(json.loads(random_file.read_text(encoding="utf-8")))
            else:
                distributed.seed_everything((torch.initial_seed() + SEED_STRIDE * saved["state"]["step"]) % 2**32)
        except LOAD_ERRORS as error:
            raise UserError(f"{folder}: damaged ({first_line(error)}); resume from another checkpoint") from None
        return RunState(**saved["state"])

    def of(self, step: int) -> Path:
        """The folder of a step."""
        return self.folder / f"step-{step:06d}"

    def named(self, pointer: str) -> Path | None:
        """The checkpoint that `latest` or `best` names, or None."""
        try:
            name = (self.folder / pointer).read_text(encoding="utf-8").strip()
        except (OSError, ValueError):  # gone, or no text
            return None
        folder = self.folder / name
        return folder if NAME.fullmatch(name) and damage(folder) is None else None

    def newest(self) -> Path | None:
        """The newest whole checkpoint, whatever `latest` says; tells which damaged ones it passes over."""
        return self.first_whole(reversed(self.all()), damage)

    def first_whole(self, folders: Iterable[Path], faults: Callable[[Path], str | None]) -> Path | None:
        """The first of some folders without a fault; tells which ones it passes over."""
        for path in folders:
            if (found := faults(path)) is None:
                return path
            distributed.say(f"{path}: passed over, {found}")
        return None

    def all(self) -> list[Path]:
        """Folders that are named like a checkpoint."""
        found = self.folder.iterdir() if self.folder.is_dir() else []
        return sorted((path for path in found if NAME.fullmatch(path.name)), key=step_of)

    def prune(self, best_step: int) -> None:
        """Remove the oldest until `limit` are left, the best one beside them, and what a killed run has left half
        written or half removed: a name that a checkpoint has is always that of a whole one."""
        best = self.of(best_step)
        for path in [p for p in self.all() if p != best][: -self.limit]:
            remove(path)
        for suffix in (REMOVED, INCOMPLETE):
            for path in self.folder.glob(f"step-*{suffix}"):
                shutil.rmtree(path, ignore_errors=True)

    def set_aside_after(self, step: int) -> None:
        """Rename checkpoints later than `step`: a run that goes on from there writes its own. Collective."""
        distributed.barrier()
        if distributed.is_main():
            for path in self.all():
                if step_of(path) > step:
                    set_aside(path, ".set-aside")
        distributed.barrier()

    def to_resume(self, choice: str | None, max_steps: int = 0) -> Path | None:
        """The checkpoint that `--resume` means; None to begin at the beginning. `max_steps`: of the run; 0: not known.

        Raises: UserError when there is none where one was named, or when a new run would mix with what is there.
        """
        output_dir = self.folder.parent
        for path in (self.folder, output_dir / "model", output_dir / "tensorboard"):
            if path.exists() and not path.is_dir():
                raise UserError(f"--output_dir {output_dir}: {path.name} in it is a file; choose another folder")
        found = self.chosen(choice)
        if found is None and (output_dir / "model").exists():
            raise UserError(f"--output_dir {output_dir}: holds a model already; choose another folder")
        if found is None and self.all():
            raise UserError(
                f"--resume {choice}: every checkpoint in {self.folder} is damaged; begin anew in another --output_dir, "
                "or take this folder away"
            )
        if found is None and choice == "auto":
            distributed.say(f"--resume auto: no whole checkpoint in {self.folder}, the run begins anew")
        if found and max_steps:
            check_steps(found, max_steps)
        return found

    def chosen(self, choice: str | None) -> Path | None:
        """The checkpoint folder that `choice` means, None to begin anew; see `to_resume`."""
        if choice is None:
            if self.all():
                raise UserError(
                    f"--output_dir {self.folder.parent}: holds checkpoints of an earlier run; go on with "
                    "--resume auto, or choose another folder"
                )
            return None
        if choice == "auto":
            return self.first_whole(reversed(distributed.broadcast(self.all())), content_damage)
        folder = Path(choice)
        if found := content_damage(folder):
            raise UserError(f"--resume {choice}: {found}; resume from another checkpoint, see {self.folder}")
        return folder


def remove(folder: Path) -> None:
    """Take a checkpoint its name, then its files."""
    shutil.rmtree(set_aside(folder, REMOVED), ignore_errors=True)


def step_of(folder: Path) -> int:
    """Step number in a checkpoint's name."""
    return int(folder.name.split("-")[1])


def random_state() -> dict:
    """State of every random generator of this rank, as JSON can hold it."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, list(numbers), gauss],
        "numpy": [name, keys.tolist(), position, has_gauss, cached],
        "torch": torch.get_rng_state().tolist(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state().tolist()
    return state


def restore_random_state(state: dict) -> None:
    """The reverse of `random_state`."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(torch.tensor(state["torch"], dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.tensor(state["cuda"], dtype=torch.uint8))
