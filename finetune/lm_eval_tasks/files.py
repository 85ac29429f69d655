"""Rows of the published files for lm-evaluation-harness, and KorQuAD's scores. Other files than the sample data are
named by `--metadata '{"nsmc": "ratings_test.txt", "klue_nli": "dev.json", "korquad": "KorQuAD_v1.0_dev.json"}'`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset

from finetune import paused_lm  # noqa: F401  so that lm_eval knows the model too where it is given these tasks by folder
from finetune.data import SAMPLE_DATA, read
from finetune.tasks import ENCODER_TASKS, TASKS, Example, Source, Task
from kozero.data.readers import LeftOut
from kozero.errors import require
from kozero.metrics import question_answering


def path_of(task: str, told: dict[str, Any]) -> Path:
    """The file of a task: that of --metadata, else the sample data."""
    path = Path(told.get(task) or SAMPLE_DATA / TASKS[task].sample_files[1])
    require(path.is_file(), f"--metadata: {task} {str(path)!r}: no such file")
    print(f"kozero_{task}: {path if task in told else 'the sample data; --metadata names another file'}")
    return path


def rows(task: str, told: dict[str, Any], form: Task, row: Callable[[Example], dict]) -> dict[str, Dataset]:
    """A row of each example of a task's file as training reads them: without the few that have no text."""
    found = read(Source(path_of(task, told)), form, LeftOut())
    return {"test": Dataset.from_list([row(example) for example in found])}


def nsmc(**told: Any) -> dict[str, Dataset]:
    """Rows of document, label."""
    return rows("nsmc", told, TASKS["nsmc"], lambda e: {"document": e.targets[0], "label": e.label})


def klue_nli(**told: Any) -> dict[str, Dataset]:
    """Rows of premise, hypothesis, label (its number)."""

    def row(e: Example) -> dict:
        hypothesis = e.prompt.removeprefix("가설: ").removesuffix(" 관계:")
        return {"premise": e.context.removeprefix("전제: "), "hypothesis": hypothesis, "label": e.label}

    return rows("klue_nli", told, TASKS["klue_nli"], row)


def korquad(**told: Any) -> dict[str, Dataset]:
    """Rows of context, question, answers."""

    def row(e: Example) -> dict:
        return {"context": e.context, "question": e.prompt, "answers": [{"text": text} for text in e.targets]}

    return rows("korquad", told, ENCODER_TASKS["mrc"], row)


def korquad_scores(row: dict[str, Any], results: list[str]) -> dict[str, float]:
    """KorQuAD's exact match and character F1 of an answer, percent."""
    return question_answering([results[0].strip()], [[answer["text"] for answer in row["answers"]]])
