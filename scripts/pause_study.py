"""Run a study of pauses: every arm on every task with every seed, each a run in a folder of its own, then a report.

    python scripts/pause_study.py sample_data/study.json

A study that was stopped goes on where it stood; what is finished is not run again.
"""

import json
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
from pathlib import Path
from typing import Any

from filelock import FileLock

from finetune import evaluate, train
from finetune.arguments import DataArguments
from kozero.config import arg, parse_arguments
from kozero.errors import GRACE_SECONDS, UserError, require, run_main
from kozero.folder import LOCK, writable_folder, write_text
from pretrain.arguments import CorpusArguments, PretrainingArguments
from scripts.study import Study, inference_pauses, name_of
from scripts.study_report import Result, write_report

ROOT = Path(__file__).parent.parent
PRETRAIN, FINETUNE, EVALUATE = "pretrain/train.py", "finetune/train.py", "finetune/evaluate.py"
ARGUMENTS = {
    PRETRAIN: (PretrainingArguments, CorpusArguments),
    FINETUNE: train.ARGUMENTS,
    EVALUATE: evaluate.ARGUMENTS,
}
EVALUATION_FLAGS = [field.name for field in fields(DataArguments) if field.name not in ("task", "train_mode")]


@dataclass
class StudyArguments:
    """Where the study is described."""

    report_only: bool = arg(False, "write the report of what is finished, run nothing")


@dataclass(frozen=True)
class Step:
    """A run of an entry that leaves something in its folder when it is done.

    launch: words before the entry; words: its arguments.
    """

    name: str
    entry: str
    words: list[str]
    launch: list[str]
    folder: Path
    leaves: str

    @property
    def is_done(self) -> bool:
        """Whether what it leaves is there."""
        return (self.folder / self.leaves).exists()

    @property
    def command(self) -> str:
        """As a user would write it."""
        return shlex.join([*self.launch, self.entry, *self.words])

    def check(self, path: Path) -> None:
        """Its arguments parse, and are those with which it was begun.

        Raises: UserError naming the step and the argument.
        """
        try:
            parse_arguments(*ARGUMENTS[self.entry], prog=self.entry, description="", argv=self.words)
        except UserError as error:
            raise UserError(f"{path}: {self.name}: {error}") from None
        kept = self.folder / f"{self.leaves}.command"
        before = kept.read_text(encoding="utf-8") if kept.exists() else self.command
        require(
            before == self.command,
            f"{path}: {self.name}: begun with other settings ({first_difference(before, self.command)}); choose "
            f"another output_dir, or delete {self.folder}",
        )

    def run(self) -> None:
        """Run it; its output goes to a log in its folder.

        Raises: UserError when it fails.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / f"{self.leaves}.command", self.command)
        python = [sys.executable if word == "python" else word for word in self.launch]
        log = self.folder / f"{self.leaves}.log"
        with log.open("a", encoding="utf-8") as file:
            words = [*python, os.path.relpath(ROOT / self.entry), *self.words]
            process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
        try:
            process.wait()
        finally:
            end(process)
        if process.returncode or not self.is_done:
            lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
            said = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "")
            raise UserError(f"{self.name}: failed, {said.removeprefix('error: ')} (all of it: {log})")


def end(process: subprocess.Popen) -> None:
    """See a process gone: a terminal has interrupted it too, so it may be saying where it stands."""
    try:
        process.wait(GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()


def first_difference(before: str, now: str) -> str:
    """The first words in which two commands differ."""
    pairs = zip(shlex.split(before), shlex.split(now), strict=False)
    return next((f"{a!r} then, {b!r} now" for a, b in pairs if a != b), "one has more arguments")


def flags(*settings: dict[str, Any]) -> list[str]:
    """Settings as flags; later ones win, null leaves a flag out, true stands alone."""
    merged: dict[str, Any] = {}
    for part in settings:
        merged |= part
    words = []
    for key, value in merged.items():
        if value is not None and value is not False:
            words += [f"--{key}"] if value is True else [f"--{key}", str(value)]
    return words


def steps(study: Study) -> list[Step]:
    """All commands in the order in which they depend on each other."""
    found: list[Step] = []
    for seed in study.seeds:
        for before in dict.fromkeys(before for before, _ in study.arms):
            if study.trains(before):
                found.append(pretraining_step(study, before, seed))
        for before, after in study.arms:
            for task in study.tasks:
                found += cell_steps(study, before, after, task, seed)
    return found


def pretraining_step(study: Study, before: str, seed: int) -> Step:
    """The run that an arm begins with."""
    settings = study.pretrain | study.pretraining[before]
    folder = study.output_dir / "pretraining" / f"{before}-seed{seed}"
    own = {
        "model": "causal_lm",
        "task": "clm",
        "max_seq_length": study.row_length(before),
        "seed": seed,
        "resume": "auto",
    }
    own |= {"model_name": folder.name, "output_dir": str(folder.parent)}
    words = flags(settings, own)
    return Step(f"pre-training {before}, seed {seed}", PRETRAIN, words, shlex.split(study.launch), folder, "model")


def cell_steps(study: Study, before: str, after: str, task: str, seed: int) -> list[Step]:
    """Fine-tune, then score over the numbers of pauses."""
    name = name_of(before, after)
    folder = study.output_dir / name / task / f"seed{seed}"
    settings = study.finetuning[after]
    model = study.pretraining[before].get("model_name_or_path") if before else None
    if study.trains(before):
        model = str(study.output_dir / "pretraining" / f"{before}-seed{seed}" / "model")
    own = {"task": task, "seed": seed, "output_dir": str(folder), "resume": "auto"}
    source = {"model_name_or_path": model} if model else {}
    launch, where = shlex.split(study.launch), f"{name}, {task}, seed {seed}"
    words = flags(study.finetune, study.tasks[task], settings, source, own)
    training = Step(f"{where}: fine-tuning", FINETUNE, words, launch, folder, "scores.json")
    shared = study.finetune | study.tasks[task]
    data = {key: value for key, value in shared.items() if key in EVALUATION_FLAGS}
    score = {"model_name_or_path": str(folder / "model"), "task": task, "output_file": str(folder / "sweep.json")}
    score["sweep_pauses"] = ",".join(map(str, study.numbers(before, after)))
    score["sweep_placement"] = settings.get("pause_placement", "append")
    words = flags(data, study.evaluate, score)
    return [training, Step(f"{where}: scoring", EVALUATE, words, launch, folder, "sweep.json")]


def results(study: Study) -> list[Result]:
    """What the finished cells found."""
    found = []
    for before, after in study.arms:
        for task in study.tasks:
            for seed in study.seeds:
                folder = study.output_dir / name_of(before, after) / task / f"seed{seed}"
                if (folder / "sweep.json").exists():
                    pauses = inference_pauses(study.finetuning[after])
                    found.append(Result.read(name_of(before, after), task, seed, pauses, folder))
    return found


def run_all(todo: list[Step], path: Path) -> None:
    """Check every step, then run those that are not done.

    Raises: UserError before the first of them runs, or when one fails.
    """
    for step in todo:
        step.check(path)
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
    names = [before for before in dict.fromkeys(before for before, _ in study.arms) if study.trains(before)]
    folder = study.output_dir / "pretraining"
    return {name: [folder / f"{name}-seed{seed}" / "metrics.jsonl" for seed in study.seeds] for name in names}


def main() -> None:
    """Check everything, run what is not finished, report."""
    names = [word for word in sys.argv[1:] if word.endswith(".json") and not word.startswith("-")]
    argv = [word for word in sys.argv[1:] if word not in names]
    (arguments,) = parse_arguments(StudyArguments, prog="scripts/pause_study.py", description=__doc__, argv=argv)
    require(len(names) == 1, "name one study file, e.g. python scripts/pause_study.py sample_data/study.json")
    path = Path(names[0])
    study = Study.read(path)
    writable_folder(f"{path}: output_dir", study.output_dir)
    if not arguments.report_only:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        run_all(steps(study), path)
    found = results(study)
    require(bool(found), f"{study.output_dir}: no cell is finished; run without --report_only")
    told = json.dumps(json.loads(path.read_text(encoding="utf-8")), indent=2, ensure_ascii=False)
    command = f"python scripts/pause_study.py {path}"
    for written in write_report(study.output_dir, study.title, found, study.baseline, curves(study), told, command):
        print(written)


if __name__ == "__main__":
    run_main(main)
