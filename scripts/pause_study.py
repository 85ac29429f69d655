"""Run a study of pauses: every arm on every task with every seed, each a run in a folder of its own, then a report.

    python scripts/pause_study.py sample_data/study.json

A study that was stopped goes on where it stood; what is finished is not run again unless a file that it read changed.
"""

import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from dataclasses import dataclass, fields
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from filelock import FileLock

from finetune import evaluate, train
from finetune.arguments import DataArguments
from finetune.data import sources
from finetune.tasks import TASKS
from kozero.config import arg, parse_arguments
from kozero.data.readers import files_below
from kozero.data.store import key_of
from kozero.errors import EXIT_DIVERGED, GRACE_SECONDS, Diverged, UserError, require, run_main
from kozero.files import file_hash, fingerprint
from kozero.folder import LOCK, writable_folder, write_text
from kozero.seal import damage, write_seal
from pretrain.arguments import CorpusArguments, PretrainingArguments
from pretrain.data import find_pieces
from scripts.study import FILES, MODELS, Study, name_of
from scripts.study_report import Result, write_report

ROOT = Path(__file__).parent.parent
PRETRAIN, FINETUNE, EVALUATE = "pretrain/train.py", "finetune/train.py", "finetune/evaluate.py"
ARGUMENTS = {PRETRAIN: (PretrainingArguments, CorpusArguments), FINETUNE: train.ARGUMENTS, EVALUATE: evaluate.ARGUMENTS}
SETTINGS = "study.json"  # in the output folder
EVALUATION_FLAGS = [field.name for field in fields(DataArguments) if field.name not in ("task", "train_mode")]


@dataclass
class StudyArguments:
    """Where the study is described."""

    report_only: bool = arg(False, "write the report of what is finished, run nothing")


@dataclass(frozen=True)
class Step:
    """A run of an entry that leaves something in its folder when it is done.

    launch: words before the entry; words: its arguments; needs: the step whose model it goes on from.
    """

    name: str
    entry: str
    words: list[str]
    launch: list[str]
    folder: Path
    leaves: str
    needs: "Step | None" = None

    @property
    def command(self) -> str:
        """As a user would write it."""
        return shlex.join([*self.launch, self.entry, *self.words])

    @property
    def identity(self) -> str:
        """Its command and the content of the files that it names, but of a model that the study makes, after those of
        all that it goes on from: what its result comes from."""
        told = dict(pairwise(self.words))
        paths = [Path(told[f"--{key}"]) for key in (*FILES, *MODELS * (not self.needs)) if f"--{key}" in told]
        read = [word for path in paths if path.exists() for word in (str(path), content(path))]
        own = shlex.join([*shlex.split(self.command), *read])
        return f"{self.needs.identity}\n{own}" if self.needs else own

    @property
    def begun_as(self) -> str | None:
        """The identity with which it was begun; None where there is nothing to lose."""
        kept = self.folder / f"{self.leaves}.command"
        something = (self.folder / self.leaves).exists() or any(self.folder.glob("checkpoints/*"))
        return kept.read_text(encoding="utf-8") if kept.exists() and something else None

    @property
    def is_done(self) -> bool:
        """Whether what it leaves is there, and is what it left. A score of other settings is none: scoring again costs
        little, as does a finished training, which exports its best checkpoint again."""
        there = (self.folder / self.leaves).exists() and self.begun_as == self.identity
        return there and not ((self.folder / self.seal).exists() and damage(self.folder, self.seal))

    @property
    def seal(self) -> str:
        """The file that names the hashes of what it left."""
        return f"{self.leaves}.sealed"

    def seal_all(self) -> None:
        """Seal what it left: a training its model too."""
        model = [] if self.entry == EVALUATE else (self.folder / "model").rglob("*")
        files = [path for path in (self.folder / self.leaves, *model) if path.is_file()]
        left = {path.relative_to(self.folder).as_posix(): fingerprint(path) for path in files}
        write_seal(self.folder / self.seal, {"files": left})

    def check(self, path: Path) -> tuple[Any, ...]:
        """Its arguments. Raises: UserError naming the step and the argument that does not parse."""
        try:
            return parse_arguments(*ARGUMENTS[self.entry], prog=self.entry, description="", argv=self.words)
        except UserError as error:
            raise UserError(f"{path}: {self.name}: {error}") from None

    def conflict(self) -> str | None:
        """In what a training that was begun differs from this one."""
        before = self.begun_as
        same = before is None or self.entry == EVALUATE or before == self.identity
        return None if same else first_difference(before, self.identity)

    def run(self) -> None:
        """Run it; its output goes to a log in its folder.

        Raises: UserError, or Diverged, when it fails.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.entry == EVALUATE:
            (self.folder / self.leaves).unlink(missing_ok=True)
        write_text(self.folder / f"{self.leaves}.command", self.identity)
        python = [sys.executable if word == "python" else word for word in self.launch]
        log = self.folder / f"{self.leaves}.log"
        with log.open("ab") as file:
            start = file.tell()
            words = [*python, os.path.relpath(ROOT / self.entry), *self.words]
            process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
            try:
                process.wait()
            finally:
                end(process)
        if not process.returncode:
            self.seal_all()
        if process.returncode or not self.is_done:
            said = last_words(log.read_bytes()[start:].decode("utf-8", "replace"), process.returncode)
            kind = Diverged if process.returncode == EXIT_DIVERGED else UserError
            raise kind(f"{self.name}: failed, {said} (all of it: {log})")


def content(path: Path) -> str:
    """A hash of a file, or of all files in a folder."""
    files = sorted(files_below(path)) if path.is_dir() else [path]
    return key_of([(str(file.relative_to(path)), hash_of(file, file.stat().st_mtime_ns)) for file in files])


hash_of = cache(lambda file, changed: file_hash(file))  # asked for again for each run of a study


def last_words(output: str, code: int) -> str:
    """Why a process failed: its error line, or by which signal it was ended, or what it said last."""
    lines = [line for line in output.splitlines() if line.strip()]
    if errors := [line for line in lines if line.startswith("error:")]:
        return errors[-1].removeprefix("error: ")
    if code < 0:
        return f"ended by {signal.Signals(-code).name}" + ("; is the memory too small?" if code == -9 else "")
    return lines[-1] if lines else f"exit code {code}"


def end(process: subprocess.Popen) -> None:
    """See a process gone. A terminal has interrupted it too, so it may be saying where it stands; who was not told is:
    by SIGINT, which the deepspeed launcher hands on to its ranks."""
    for told in (signal.SIGINT, signal.SIGTERM):
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            process.send_signal(told)
    process.wait()


def first_difference(before: str, now: str) -> str:
    """The first flag in which two lists of commands differ."""
    then, wanted = shlex.split(before), shlex.split(now)
    for k, (old, new) in enumerate(zip(then, wanted, strict=False)):
        if old != new:
            flag = "" if new.startswith("--") or k == 0 else f"{wanted[k - 1]} "
            return f"{flag}{old} then, {new} now"
    return "one has more arguments"


def flags(*settings: dict[str, Any]) -> list[str]:
    """Settings as flags; later ones win, null leaves a flag out, true stands alone."""
    merged, words = {key: value for part in settings for key, value in part.items()}, []
    for key, value in merged.items():
        if value is not None and value is not False:
            words += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    return words


def steps(study: Study) -> list[Step]:
    """All commands in the order in which they depend on each other."""
    found: list[Step] = []
    for seed in study.seeds:
        trained = {before: pretraining_step(study, before, seed) for before in study.trained}
        found += trained.values()
        for (before, after), task in product(study.arms, study.tasks):
            found += cell_steps(study, before, after, task, seed, trained.get(before))
    return found


def pretraining_step(study: Study, before: str, seed: int) -> Step:
    """The run that an arm begins with."""
    settings = {**study.pretrain, **study.pretraining[before]}
    folder = study.output_dir / "pretraining" / f"{before}-seed{seed}"
    own = {"model": "causal_lm", "task": "clm", "max_seq_length": study.row_length(before), "seed": seed}
    own |= {"resume": "auto", "model_name": folder.name, "output_dir": str(folder.parent)}
    words = flags(settings, own)
    return Step(f"pre-training {before}, seed {seed}", PRETRAIN, words, shlex.split(study.launch), folder, "model")


def cell_steps(
    study: Study, before: str, after: str, task: str, seed: int, pretrained: Step | None
) -> tuple[Step, Step]:
    """Fine-tune, then score over the numbers of pauses."""
    folder, settings = cell_folder(study, before, after, task, seed), study.merged(after, task)
    source = dict(study.pretraining[before]) if before and not pretrained else {}
    if pretrained:
        source = {"model_name_or_path": str(pretrained.folder / "model")}
    own = {"task": task, "seed": seed, "output_dir": str(folder), "resume": "auto"}
    launch, where = shlex.split(study.launch), f"{name_of(before, after)}, {task}, seed {seed}"
    words = flags(settings, source, own)
    training = Step(f"{where}: fine-tuning", FINETUNE, words, launch, folder, "scores.json", pretrained)
    data = {key: value for key, value in settings.items() if key in EVALUATION_FLAGS}
    score = {"model_name_or_path": str(folder / "model"), "task": task, "output_file": str(folder / "sweep.json")}
    score["sweep_pauses"] = ",".join(map(str, study.numbers(before, after, task)))
    score["sweep_placement"] = settings.get("pause_placement", "append")
    words = flags(data, study.evaluate, score)
    return training, Step(f"{where}: scoring", EVALUATE, words, launch, folder, "sweep.json", training)


def cell_folder(study: Study, before: str, after: str, task: str, seed: int) -> Path:
    """Where a cell's runs write."""
    return study.output_dir / name_of(before, after) / task / f"seed{seed}"


def results(study: Study, todo: list[Step]) -> list[Result]:
    """What the finished cells found."""
    done = {step.folder for step in todo if step.entry == EVALUATE and step.is_done}
    return [
        Result.read(name_of(before, after), task, seed, study.inference_pauses(after, task), folder)
        for (before, after), task, seed in product(study.arms, study.tasks, study.seeds)
        if (folder := cell_folder(study, before, after, task, seed)) in done
    ]


def check_all(todo: list[Step], path: Path) -> None:
    """Every run must be possible, and what was begun must be the beginning of it.

    Raises: UserError that names all that was begun with other settings.
    """
    for step in todo:
        step.check(path)
    if conflicts := [(step, told) for step in todo if (told := step.conflict())]:
        first, told = conflicts[0]
        folders = " ".join(str(step.folder) for step, _ in conflicts)
        other = f"begun with other settings or files ({told}); choose another output_dir, or delete {folders}"
        raise UserError(f"{path}: {first.name}: {other}")


def check_files(todo: list[Step], path: Path) -> None:
    """Every file that is yet to be read must be one that its task reads; it is known before the first run begins."""
    parts = {str(part): part for step in todo if not step.is_done for part in step.check(path)}
    for data in parts.values():
        if isinstance(data, DataArguments):
            sources(data, TASKS[data.task])
        elif isinstance(data, CorpusArguments):
            find_pieces(data)


def run_all(todo: list[Step]) -> None:
    """Run what is not done.

    Raises: UserError when a step fails.
    """
    open_steps, seconds = [step for step in todo if not step.is_done], defaultdict(list)
    if len(open_steps) < len(todo):
        print(f"{len(todo) - len(open_steps)} of {len(todo)} runs are done", flush=True)
    for number, step in enumerate(open_steps, start=1):
        started = time.monotonic()
        print(f"[{todo.index(step) + 1}/{len(todo)}] {step.name}", flush=True)
        with FileLock(step.folder / LOCK) if step.folder.exists() else nullcontext():
            pass  # a run of a study that was killed may still be there: let it come to its end
        if not step.is_done:
            step.run()
        seconds[step.entry].append(time.monotonic() - started)
        print(f"    {seconds[step.entry][-1]:.0f} s{time_left(open_steps[number:], seconds)}", flush=True)


def time_left(steps: list[Step], seconds: dict[str, list[float]]) -> str:
    """How long the steps take if they are like those of their entry so far; nothing before each has run once."""
    if not all(seconds[step.entry] for step in steps):
        return ""
    return f", about {sum(statistics.mean(seconds[step.entry]) for step in steps) / 60:.0f} min left"


def curves(study: Study) -> dict[str, list[Path]]:
    """The logs of the study's pre-trainings by name, one a seed."""
    folder = study.output_dir / "pretraining"
    return {name: [folder / f"{name}-seed{seed}" / "metrics.jsonl" for seed in study.seeds] for name in study.trained}


def claim(folder: Path, path: Path) -> None:
    """The study's folder, known by the settings that it keeps.

    Raises: UserError for one that holds something else.
    """
    writable_folder(f"{path}: output_dir", folder)
    mine = (folder / SETTINGS).exists() or not any(folder.iterdir())
    require(mine, f"{path}: output_dir {folder}: holds something else than a study; choose another")


def main() -> None:
    """Check everything, run what is not finished, report."""
    names = [word for word in sys.argv[1:] if not word.startswith("-") and word.endswith(".json")]
    argv = [word for word in sys.argv[1:] if word.startswith("-")]
    (arguments,) = parse_arguments(StudyArguments, prog="scripts/pause_study.py", description=__doc__, argv=argv)
    usual = "name one study file, e.g. python scripts/pause_study.py sample_data/study.json"
    wrong = [word for word in sys.argv[1:] if word not in (*names, *argv)]
    require(not wrong, f"{' '.join(wrong)}: no .json; {usual}")
    require(len(names) == 1, usual)
    path = Path(names[0])
    study = Study.read(path)
    todo = steps(study)
    check_all(todo, path)
    claim(study.output_dir, path)
    if not arguments.report_only:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        write_text(study.output_dir / SETTINGS, study.text)
        check_files(todo, path)
        run_all(todo)
    found = results(study, todo)
    require(bool(found), f"{study.output_dir}: no cell is finished; run without --report_only")
    settings = (study.text, f"python scripts/pause_study.py {path}")
    print(*write_report(study.output_dir, study.title, found, study.baseline, curves(study), *settings), sep="\n")


if __name__ == "__main__":
    run_main(main)
