"""KLUE-NLI: does the premise entail the hypothesis, contradict it, or neither."""

from collections.abc import Iterator
from pathlib import Path

from finetune.tasks.base import Example, Task, check_label, check_suffix, filled
from kozero.data.readers import BadRow, Located, read_json_list, read_jsonl, text_field

CLASSES = ("entailment", "neutral", "contradiction")  # by label number, as on the hub
WORDS = ("함의", "중립", "모순")


class KlueNli(Task):
    """Context: the premise. Prompt: the hypothesis. Target: one of 함의, 중립, 모순."""

    name = "klue_nli"
    hub = ("klue", "nli", "train", "validation")
    sample_files = ("klue_nli/klue-nli-v1.1_train.json", "klue_nli/klue-nli-v1.1_dev.json")
    max_seq_length = 256
    max_new_tokens = 4
    labels = WORDS
    best_score = "accuracy"

    def read_file(self, path: Path) -> Iterator[Located | BadRow]:
        """KLUE's JSON list, or the same objects one a line."""
        check_suffix(path, (".json", ".jsonl"))
        return read_json_list(path) if path.suffix.lower() == ".json" else read_jsonl(path)

    def examples_of_row(self, where: str, row: dict) -> Iterator[Example]:
        """One pair. Files name the label `gold_label`, the hub `label`."""
        if "gold_label" not in row and "label" not in row:
            raise BadRow(f"{where}: no field 'gold_label'; found {', '.join(map(str, row))}")
        label = check_label(where, row.get("gold_label", row.get("label")), CLASSES)
        premise = filled(where, text_field(where, row, "premise"))
        hypothesis = filled(where, text_field(where, row, "hypothesis"))
        prompt = f"가설: {hypothesis} 관계:"
        yield Example(str(row.get("guid", where)), premise, f"전제: {premise}", prompt, (WORDS[label],), label)
