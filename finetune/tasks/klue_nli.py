"""KLUE-NLI: does the premise entail the hypothesis, contradict it, or neither."""

from collections.abc import Iterator
from typing import ClassVar

from finetune.tasks.base import Example, Task, check_label, filled
from kozero.data.readers import BadRow, read_json_list, read_jsonl, text_field

CLASSES = ("entailment", "neutral", "contradiction")  # by label number, as on the hub
WORDS = ("함의", "중립", "모순")


class KlueNli(Task):
    """Context: the premise. Prompt: the hypothesis. Target: one of 함의, 중립, 모순."""

    name = "klue_nli"
    hub = ("klue", "nli", "train", "validation")
    sample_files = ("klue_nli/klue-nli-v1.1_train.json", "klue_nli/klue-nli-v1.1_dev.json")
    readers: ClassVar = {".json": read_json_list, ".jsonl": read_jsonl}  # KLUE's list, or the same objects one a line
    max_seq_length = 256
    max_new_tokens = 4
    labels = WORDS
    best_score = "accuracy"

    def examples_of_row(self, where: str, row: dict) -> Iterator[Example]:
        """One pair. Files name the label `gold_label`, the hub `label`."""
        if "gold_label" not in row and "label" not in row:
            raise BadRow(f"{where}: no field 'gold_label'; found {', '.join(map(str, row))}")
        label = check_label(where, row.get("gold_label", row.get("label")), CLASSES)
        premise = filled(where, text_field(where, row, "premise"))
        hypothesis = filled(where, text_field(where, row, "hypothesis"))
        prompt = f"가설: {hypothesis} 관계:"
        yield Example(str(row.get("guid", where)), premise, f"전제: {premise}", prompt, (WORDS[label],), label)
