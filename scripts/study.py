"""What a study of pauses is: the JSON file that describes it."""

import json
import re
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from finetune.tasks import TASKS
from kozero.errors import require
from kozero.json_files import check_keys, read_json_object

KEYS = {
    "title": str, "output_dir": str, "seeds": list, "tasks": dict, "pretraining": dict, "finetuning": dict,
    "arms": list, "baseline": str, "pretrain": dict, "finetune": dict, "evaluate": dict, "sweep_pauses": list,
    "launch": str,
}  # fmt: skip
NO_PRETRAINING = {"": {}}
IN_JSON = {str: "a text", list: "a list", dict: "an object"}
NAME = re.compile(r"\w[\w.+-]*")  # of a setting: it becomes a folder's
OWNED = ("output_dir", "seed", "task", "resume", "model_name")  # flags that the study itself gives


@dataclass(frozen=True)
class Study:
    """A study file with its defaults filled in. Settings are flags of the entries by their names.

    pretraining, finetuning: named settings, whose pairs PT_FT are the arms; one with `model_name_or_path` is a model
    that is there already. pretrain, finetune, evaluate: settings of all runs of a kind.
    """

    output_dir: Path
    seeds: list[int]
    tasks: dict[str, dict]
    pretraining: dict[str, dict]
    finetuning: dict[str, dict]
    arms: list[tuple[str, str]]
    baseline: str
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
        for key in ("tasks", "finetuning"):
            require(bool(values.get(key)), f"{path}: {key!r}: name at least one")
        check_keys(values["tasks"], TASKS, f"{path}: tasks")
        pretraining = values.get("pretraining") or NO_PRETRAINING
        pairs = [(before, after) for before in pretraining for after in values["finetuning"]]
        named = {name_of(*pair): pair for pair in pairs}
        arms = values.get("arms") or list(named)
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
        study = cls(**values | filled)
        study.check(path)
        return study

    def check(self, path: Path) -> None:
        """Names can be folders, settings are flat, and none is the study's own."""
        for name in [*(self.pretraining if self.pretraining != NO_PRETRAINING else {}), *self.finetuning]:
            right = NAME.fullmatch(name)
            require(right, f"{path}: {name!r}: it names folders; use letters, digits, and . + - _ within")
        parts = {"pretrain": self.pretrain, "finetune": self.finetune, "evaluate": self.evaluate}
        for kind in ("tasks", "pretraining", "finetuning"):
            parts |= {f"{kind}.{name}": settings for name, settings in getattr(self, kind).items()}
        for where, settings in parts.items():
            require(isinstance(settings, dict), f"{path}: {where}: must be an object of flags and values")
            for key, value in settings.items():
                require(key not in OWNED, f"{path}: {where}: {key!r} is given by the study; leave it out")
                require(not isinstance(value, dict | list), f"{path}: {where}: {key!r} must be one value")
        for name, settings in self.finetuning.items():
            number, told = inference_pauses(settings), f"{path}: finetuning.{name}"
            require(type(number) is int, f"{told}: pauses {number!r}: must be a whole number")
        for name in self.pretraining:
            length, share = self.text_and_pauses(name)
            told = f"{path}: pretraining.{name}"
            right = type(length) is int and length > 0
            require(right, f"{told}: max_seq_length {length!r}: must be a whole number above 0")
            right = isinstance(share, int | float) and 0 <= share < 1
            require(right, f"{told}: pause_fraction {share!r}: must be a number from 0 to below 1")

    def text_and_pauses(self, before: str) -> tuple[int, float]:
        """Tokens of text in a row of a pre-training, and the share of pauses in a row."""
        settings = self.pretrain | self.pretraining[before]
        return settings.get("max_seq_length", 128), settings.get("pause_fraction", 0.0)

    def row_length(self, before: str) -> int:
        """Rows with pauses are longer by them, so every arm sees the same text in every step."""
        length, share = self.text_and_pauses(before)
        return next(n for n in count(length) if n - round(share * n) >= length)

    def numbers(self, before: str, after: str) -> list[int]:
        """Pauses at inference with which an arm is scored: those of the sweep and of every arm. A model that never saw
        a pause has none."""
        if not (self.pretraining[before].get("pause_fraction") or self.finetuning[after].get("num_pauses")):
            return [0]
        own = {inference_pauses(self.finetuning[after]) for _, after in self.arms}
        return sorted({0, *own, *self.sweep_pauses})

    def trains(self, before: str) -> bool:
        """Whether a pre-training is a run of the study."""
        return bool(before) and "model_name_or_path" not in self.pretraining[before]


def name_of(before: str, after: str) -> str:
    """An arm's name."""
    return f"{before}_{after}" if before else after


def inference_pauses(settings: dict) -> int:
    """M_inf of a fine-tuning setting."""
    return settings.get("num_inference_pauses", settings.get("num_pauses", 0))
