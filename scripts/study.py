"""What a study of pauses is: the JSON file that describes it."""

import json
import re
import shlex
import shutil
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from finetune.tasks import TASKS
from kozero.errors import UserError, require
from kozero.json_files import check_keys, read_json_object

KEYS = {
    "title": str, "output_dir": str, "seeds": list, "tasks": dict, "pretraining": dict, "finetuning": dict,
    "arms": list, "baseline": str, "pretrain": dict, "finetune": dict, "evaluate": dict, "sweep_pauses": list,
    "launch": str,
}  # fmt: skip
NO_PRETRAINING = {"": {}}
IN_JSON = {str: "a text", list: "a list", dict: "an object"}
NAME = re.compile(r"\w[\w+-]{0,60}")  # of a setting: it becomes a folder's
# Flags that the study itself gives.
OWNED = (
    "output_dir", "seed", "task", "resume", "model_name", "output_file", "sweep_pauses", "sweep_placement", "help",
    "local_rank",
)  # fmt: skip
FILES = ("train_file", "validation_file", "config_file", "corpus_path", "deepspeed_config", "tokenizer_name_or_path")
MODELS = ("model_name_or_path", "model", "checkpoint")


@dataclass(frozen=True)
class Study:
    """A study file with its defaults filled in. Settings are flags of the entries by their names.

    pretraining, finetuning: named settings, whose pairs PT_FT are the arms; one with `model_name_or_path` is a model
    that is there already. pretrain, finetune, evaluate: settings of all runs of a kind. text: the file as it was read.
    """

    output_dir: Path
    seeds: list[int]
    tasks: dict[str, dict]
    pretraining: dict[str, dict]
    finetuning: dict[str, dict]
    arms: list[tuple[str, str]]
    baseline: str
    text: str
    title: str = "Pauses"
    pretrain: dict = field(default_factory=dict)
    finetune: dict = field(default_factory=dict)
    evaluate: dict = field(default_factory=dict)
    sweep_pauses: list[int] = field(default_factory=list)
    launch: str = "python"

    @classmethod
    def read(cls, path: Path) -> "Study":
        """Read and check a study file.

        Raises: UserError naming the file and the key.
        """
        values = read_json_object(path)
        check_keys(values, KEYS, str(path))
        for key, value in values.items():
            told = f"{path}: {key!r} must be {IN_JSON[KEYS[key]]}, is {json.dumps(value, ensure_ascii=False)}"
            require(isinstance(value, KEYS[key]), told)
        require(values.get("title", "").isprintable(), f"{path}: 'title': must be one line")
        for key in ("tasks", "finetuning"):
            require(bool(values.get(key)), f"{path}: {key!r}: name at least one")
        check_keys(values["tasks"], TASKS, f"{path}: tasks")
        pretraining = values.get("pretraining") or NO_PRETRAINING
        pairs = [(before, after) for before in pretraining for after in values["finetuning"]]
        names = ", ".join(name_of(*pair) for pair in pairs)
        named = {name_of(*pair): pair for pair in pairs}
        require(len(named) == len(pairs), f"{path}: two arms have one name; the arms are {names}")
        arms = values.get("arms") or list(named)
        whole = all(isinstance(arm, str) for arm in arms) and len(set(arms)) == len(arms)
        require(whole, f"{path}: arms {arms!r}: must be different names of {names}")
        check_keys(arms, named, f"{path}: arms")
        baseline = values.get("baseline") or arms[0]
        require(baseline in arms, f"{path}: baseline {baseline!r}: no such arm; the arms are {', '.join(arms)}")
        seeds = values.get("seeds") or [42]
        for key, numbers in (("seeds", seeds), ("sweep_pauses", values.get("sweep_pauses", []))):
            whole = all(type(number) is int and number >= 0 for number in numbers)
            different = whole and len(set(numbers)) == len(numbers)
            require(different, f"{path}: {key} {numbers!r}: must be different whole numbers, 0 or more")
        filled = {"output_dir": Path(values.get("output_dir") or f"runs/{path.stem}"), "pretraining": pretraining}
        filled |= {"seeds": seeds, "baseline": baseline, "arms": [named[arm] for arm in arms]}
        filled["text"] = json.dumps(values, indent=2, ensure_ascii=False)
        study = cls(**values | filled)
        study.check(path)
        return study

    def check(self, path: Path) -> None:
        """Names can be folders, settings are flat and name files that are there, and none is the study's own."""
        try:
            launch = [*shlex.split(self.launch), ""][0]
        except ValueError as error:
            raise UserError(f"{path}: launch {self.launch!r}: {error}") from None
        known = launch == "python" or shutil.which(launch) is not None
        require(known, f"{path}: launch {self.launch!r}: no such program; e.g. python, or deepspeed --num_gpus 2")
        for name in [*(self.pretraining if self.pretraining != NO_PRETRAINING else {}), *self.finetuning]:
            told = f"{path}: {name!r}: it names folders; use up to 60 letters, digits, + - _"
            require(NAME.fullmatch(name) is not None, told)
        parts = {"pretrain": self.pretrain, "finetune": self.finetune, "evaluate": self.evaluate}
        for kind in ("tasks", "pretraining", "finetuning"):
            parts |= {f"{kind}.{name}": settings for name, settings in getattr(self, kind).items()}
        for where, settings in parts.items():
            require(isinstance(settings, dict), f"{path}: {where}: must be an object of flags and values")
            for key, value in settings.items():
                check_setting(f"{path}: {where}", key, value)
        for before, after in self.arms:
            right = len(name_of(before, after).encode()) <= 255
            require(right, f"{path}: arm {name_of(before, after)!r}: names a folder, of 255 bytes at most")
            for task in self.tasks:
                number, told = self.inference_pauses(after, task), f"{path}: pauses of {name_of(before, after)}, {task}"
                require(type(number) is int and number >= 0, f"{told}: {number!r}: must be a whole number, 0 or more")
                pauses = TASKS[task].whole_texts and (number or self.merged(after, task).get("num_pauses"))
                require(not pauses, f"{told}: {pauses!r}: its texts have no prompt to pause")
        for name in self.pretraining:
            self.check_rows(name, f"{path}: pretraining.{name}")

    def check_rows(self, before: str, told: str) -> None:
        """Rows of a pre-training must be possible."""
        length, share = self.text_and_pauses(before)
        right = type(length) is int and length > 0
        require(right, f"{told}: max_seq_length {length!r}: must be a whole number above 0")
        right = isinstance(share, int | float) and 0 <= share <= 0.999  # beyond, rows are a thousand times their text
        require(right, f"{told}: pause_fraction {share!r}: must be a number from 0 to 0.999")
        config = (self.pretrain | self.pretraining[before]).get("config_file")
        if self.trains(before) and config and type(most := read_json_object(config).get("n_positions")) is int:
            row = self.row_length(before)
            require(row <= most, f"{told}: max_seq_length {length}: {row} with pauses; {config} has {most} positions")

    def merged(self, after: str, task: str) -> dict:
        """All settings of a fine-tuning."""
        return self.finetune | self.tasks[task] | self.finetuning[after]

    def inference_pauses(self, after: str, task: str) -> int:
        """M_inf of an arm on a task."""
        settings = self.merged(after, task)
        return settings.get("num_inference_pauses", settings.get("num_pauses", 0))

    def text_and_pauses(self, before: str) -> tuple[int, float]:
        """Tokens of text in a row of a pre-training, and the share of pauses in a row."""
        settings = self.pretrain | self.pretraining[before]
        return settings.get("max_seq_length", 128), settings.get("pause_fraction", 0.0)

    def row_length(self, before: str) -> int:
        """Rows with pauses are longer by them, so every arm sees the same text in every step."""
        length, share = self.text_and_pauses(before)
        least = max(length, int((length - 0.5) / (1 - share)) - 1)
        return next(n for n in count(least) if n - round(share * n) >= length)

    def numbers(self, before: str, after: str, task: str) -> list[int]:
        """Pauses at inference with which an arm is scored: those of the sweep and of every arm. A model that never saw
        a pause has none."""
        if TASKS[task].whole_texts:
            return [0]
        own = self.inference_pauses(after, task)
        met = self.merged(after, task).get("num_pauses") or (self.text_and_pauses(before)[1] and self.trains(before))
        if not (met or self.knows_pauses(before)):
            return sorted({0, own})
        return sorted({0, *(self.inference_pauses(other, task) for _, other in self.arms), *self.sweep_pauses})

    def trains(self, before: str) -> bool:
        """Whether a pre-training is a run of the study."""
        return bool(before) and "model_name_or_path" not in self.pretraining[before]

    @property
    def trained(self) -> list[str]:
        """The pre-trainings of the arms that are runs of the study."""
        return [before for before in dict.fromkeys(before for before, _ in self.arms) if self.trains(before)]

    def knows_pauses(self, before: str) -> bool:
        """Whether a model that is there already was trained with pauses, by its config.json."""
        name = self.pretraining[before].get("model_name_or_path")
        config = Path(name) / "config.json" if name else None
        return bool(config and config.exists() and read_json_object(config).get("pause"))


def check_setting(where: str, key: str, value: object) -> None:
    """A flag that may be set, by its name, with one value; a file that is there."""
    require(key.isidentifier(), f"{where}: {key!r}: write flags without dashes, e.g. max_steps")
    require(key not in OWNED, f"{where}: {key!r} is given by the study; leave it out")
    require(not isinstance(value, dict | list), f"{where}: {key!r} must be one value")
    if key in FILES and value is not None and key != "tokenizer_name_or_path":  # that may be a name on the hub
        require(isinstance(value, str) and Path(value).exists(), f"{where}: {key} {value!r}: no such file or folder")


def name_of(before: str, after: str) -> str:
    """Name of the arm that pairs a pre-training with a fine-tuning."""
    return f"{before}_{after}" if before else after
