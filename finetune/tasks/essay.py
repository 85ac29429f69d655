"""Texts as they are: the model learns to write more of their kind."""

from collections.abc import Iterator
from typing import ClassVar

from finetune.tasks.base import Example, Task, filled
from kozero.data.readers import read_jsonl, text_field
from kozero.errors import UserError


class Essay(Task):
    """No prompt. Target: the whole text, cut into rows so that each of its tokens is learned once."""

    name = "essay"
    sample_files = ("essay/train.jsonl", "essay/validation.jsonl")
    readers: ClassVar = {".jsonl": read_jsonl}  # a field `text`, as scripts/select_topic.py writes it
    max_seq_length = 512
    whole_texts = True
    best_score = "perplexity"
    lower_is_better = True

    @property
    def hub(self) -> tuple[str, str | None, str, str]:
        """There is none."""
        raise UserError("--from_hub: --task essay has no data set on the hub; take scripts/select_topic.py")

    def examples_of_row(self, where: str, row: dict) -> Iterator[Example]:
        """One text, its lines joined by spaces: KoGPT2's vocabulary has no line feed."""
        text = filled(where, " ".join(text_field(where, row, "text").split()))
        yield Example(str(row.get("id", where)), text, "", "", (text,))
