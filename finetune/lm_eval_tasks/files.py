"""Rows of the published files for lm-evaluation-harness, and KorQuAD's scores. Other files than the sample data are
named by `--metadata '{"nsmc": "ratings_test.txt", "klue_nli": "dev.json", "korquad": "KorQuAD_v1.0_dev.json"}'`.
"""

import csv
import json
from pathlib import Path
from typing import Any

from datasets import Dataset

from finetune import paused_lm  # noqa: F401  so that lm_eval knows the model too where it is given these tasks by folder
from finetune.data import SAMPLE_DATA
from finetune.tasks import TASKS
from finetune.tasks.klue_nli import CLASSES
from kozero.errors import require
from kozero.metrics import question_answering


def path_of(task: str, told: dict[str, Any]) -> Path:
    """The file of a task: that of --metadata, else the sample data."""
    path = Path(told.get(task) or SAMPLE_DATA / TASKS[task].sample_files[1])
    require(path.is_file(), f"--metadata: {task} {str(path)!r}: no such file")
    print(f"kozero_{task}: {path if task in told else 'the sample data; --metadata names another file'}")
    return path


def nsmc(**told: Any) -> dict[str, Dataset]:
    """Rows of id, document, label; without the few that have no text."""
    with path_of("nsmc", told).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    rows = [row | {"document": row["document"].strip(), "label": int(row["label"])} for row in rows if row["document"]]
    return {"test": Dataset.from_list([row for row in rows if row["document"]])}


def klue_nli(**told: Any) -> dict[str, Dataset]:
    """Rows of premise, hypothesis, label (its number)."""
    rows = json.loads(path_of("klue_nli", told).read_text(encoding="utf-8"))
    texts = [{name: row[name].strip() for name in ("premise", "hypothesis")} for row in rows]
    labels = [{"label": CLASSES.index(row["gold_label"])} for row in rows]
    return {"test": Dataset.from_list([text | label for text, label in zip(texts, labels, strict=True)])}


def korquad(**told: Any) -> dict[str, Dataset]:
    """Rows of context, question, answers."""
    articles = json.loads(path_of("korquad", told).read_text(encoding="utf-8"))["data"]
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    rows = [
        {"context": p["context"].strip(), "question": q["question"].strip(), "answers": q["answers"]}
        for p in paragraphs
        for q in p["qas"]
    ]
    return {"test": Dataset.from_list(rows)}


def korquad_scores(row: dict[str, Any], results: list[str]) -> dict[str, float]:
    """KorQuAD's exact match and character F1 of an answer, percent."""
    return question_answering([results[0].strip()], [[answer["text"] for answer in row["answers"]]])
