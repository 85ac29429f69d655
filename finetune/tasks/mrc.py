"""Questions of KorQuAD 1.0 for an encoder: answered by pointing into the passage (mrc), or used to find it (ict)."""

from collections.abc import Iterator

from finetune.tasks.base import Example
from finetune.tasks.korquad import Korquad, read_question


class Mrc(Korquad):
    """Machine reading comprehension. Context: the passage; prompt: the question; both as they are written."""

    name = "mrc"
    max_seq_length = 384
    num_train_epochs = 5.0

    def examples_of_row(self, where: str, row: dict) -> Iterator[Example]:
        """One question with its answers."""
        yield read_question(where, row)


class Ict(Mrc):
    """Retrieval, fine-tuned from the inverse cloze task: which passage was the question asked about."""

    name = "ict"
    num_train_epochs = 3.0
    best_score = "mrr@100"
