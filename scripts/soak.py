"""Kill a training run again and again, and see that it ends where an undisturbed one does.

    python scripts/soak.py --kills 50 --output_dir runs/soak -- \
        python finetune/train.py --config_file models/tiny_config.json --max_steps 300 --save_steps 2 --eval_steps 100

The command runs once undisturbed, then with --resume auto, killed with SIGKILL (all its processes) at random moments:
while it starts, loads, trains, evaluates, saves. Then it runs to its end. Both curves must be equal, number by number.
"""

import json
import random
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from kozero import distributed
from kozero.checkpoint import Checkpoints, content_damage, step_of
from kozero.config import arg, parse_arguments
from kozero.errors import UserError, require, run_main
from kozero.folder import new_file, write_text

SECONDS_OF_TRAINING = 3.0  # a run lives at most so long after its first step


@dataclass
class SoakArguments:
    """What is killed, how often."""

    output_dir: str = arg("runs/soak", "folder of both runs and of soak.json")
    kills: int = arg(50, "times that the run is killed")
    seed: int = arg(0, "seed of the moments")


@dataclass
class Report:
    """What happened."""

    kills: int = 0
    before_first_step: int = 0  # of these kills: while it started, loaded, tokenised
    during_save: int = 0  # a checkpoint was half written
    steps_lost: list[int] = field(default_factory=list)  # by each kill: steps done since the newest whole checkpoint
    damaged: int = 0  # checkpoints under their final name that were not whole
    steps: int = 0
    largest_difference: float = float("nan")  # between the losses of both curves
    seconds: float = 0.0


class Run:
    """A started command, and what it has said."""

    def __init__(self, command: list[str], folder: Path) -> None:
        told = [*command, "--output_dir", str(folder), "--resume", "auto", "--logging_steps", "1"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        self.process = subprocess.Popen(told, **pipes)
        self.lines: list[str] = []
        self.started, self.first_step = time.monotonic(), None
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self) -> None:
        """What the thread does."""
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if self.first_step is None and line.startswith("step "):
                self.first_step = time.monotonic()

    def kill(self) -> None:
        """All its processes, at once."""
        with suppress(psutil.NoSuchProcess):
            first = psutil.Process(self.process.pid)
            for process in (*first.children(recursive=True), first):
                process.kill()
        self.wait()

    def wait(self) -> int:
        """Until it has ended."""
        code = self.process.wait()
        self.reader.join()
        return code

    def succeed(self) -> None:
        """Wait for its end, which must be a good one."""
        if self.wait():
            print("\n".join(self.lines[-20:]), file=sys.stderr)
            raise UserError(f"the run failed with exit code {self.process.returncode}; its last words are above")

    def last_step(self) -> int:
        """The last step that it told of, 0 for none."""
        steps = [line.split()[1].split("/")[0] for line in self.lines if line.startswith("step ") and "/" in line]
        return int(steps[-1]) if steps else 0


def main() -> None:
    """The command line."""
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    (said,) = parse_arguments(SoakArguments, prog="soak.py", description=__doc__, argv=sys.argv[1:at])
    command, folder = sys.argv[at + 1 :], Path(said.output_dir)
    require(command, "no command: name it behind --, e.g. -- python finetune/train.py --max_steps 300 --save_steps 2")
    require(not folder.exists(), f"--output_dir {folder}: is there already; choose another folder")
    report_file = new_file("--output_dir", folder / "soak.json")
    distributed.setup()  # checkpoints are looked at by all ranks of a run, here one
    began = time.monotonic()
    straight = Run(command, folder / "undisturbed")
    straight.succeed()
    report = soak(command, folder / "killed", said, straight.first_step - straight.started)
    curves = [losses(folder / name) for name in ("undisturbed", "killed")]
    require(curves[0].keys() == curves[1].keys(), "the curves have different steps")
    report.steps = len(curves[0])
    report.largest_difference = max(abs(curves[0][step] - curves[1][step]) for step in curves[0])
    report.seconds = round(time.monotonic() - began, 1)
    write_text(report_file, json.dumps(asdict(report) | {"command": command}, indent=2))
    print(
        f"{report.kills} kills, {report.before_first_step} of them before the first step, {report.during_save} during "
        f"a save; steps lost {sum(report.steps_lost)}, at most {max(report.steps_lost, default=0)} by one; damaged "
        f"checkpoints {report.damaged}; largest difference of {report.steps} losses {report.largest_difference:g}; "
        f"{report.seconds:,.0f} s"
    )
    sys.exit(0 if report.largest_difference == 0 and report.damaged == 0 else 1)


def soak(command: list[str], folder: Path, said: SoakArguments, start_up: float) -> Report:
    """Kill, look at what is there, start again; in the end let it finish."""
    moments, report = random.Random(said.seed), Report()
    for _ in range(said.kills):
        run = Run(command, folder)
        time.sleep(moments.uniform(0.3 * start_up, start_up + SECONDS_OF_TRAINING))
        if run.process.poll() is not None:
            run.succeed()
            print("the run ended before all kills: give it more steps", flush=True)
            break
        run.kill()
        note(report, run, folder)
        print(f"kill {report.kills}: at step {run.last_step()}, steps lost {report.steps_lost[-1]}", flush=True)
    Run(command, folder).succeed()
    return report


def note(report: Report, run: Run, folder: Path) -> None:
    """What a kill has left."""
    checkpoints = Checkpoints(folder, limit=1)
    report.kills += 1
    report.before_first_step += run.first_step is None
    report.during_save += bool(list(checkpoints.folder.glob("*.incomplete")))
    report.damaged += sum(content_damage(path) is not None for path in checkpoints.all())
    newest = checkpoints.newest()
    report.steps_lost.append(max(0, run.last_step() - (step_of(newest) if newest else 0)))


def losses(folder: Path) -> dict[int, float]:
    """The training loss by step. A step that stands twice is an error."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    points = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
    require(len(dict(points)) == len(points), f"{folder}: steps stand twice in metrics.jsonl")
    return dict(points)


if __name__ == "__main__":
    run_main(main)
