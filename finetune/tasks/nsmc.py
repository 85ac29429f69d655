"""NSMC: movie reviews, positive or negative. The polarity word comes first, so the model both classifies (which
polarity makes the review more likely) and writes reviews of a polarity."""

from collections.abc import Iterator
from functools import partial

from finetune.tasks.base import Example, Task, check_label, filled
from kozero.data.readers import read_tsv, text_field

POLARITIES = ("부정", "긍정")  # by label: 0, 1


class Nsmc(Task):
    """Prompt: the polarity word. Target: the review."""

    name = "nsmc"
    hub = ("e9t/nsmc", None, "train", "test")
    sample_files = ("nsmc/ratings_train.txt", "nsmc/ratings_test.txt")
    readers = dict.fromkeys((".txt", ".tsv"), partial(read_tsv, columns=("id", "document", "label")))
    max_seq_length = 256
    labels = POLARITIES
    best_score = "accuracy"

    def examples_of_row(self, where: str, row: dict) -> Iterator[Example]:
        """One review."""
        label = check_label(where, row.get("label"), POLARITIES)
        review = filled(where, text_field(where, row, "document"))
        yield Example(str(row.get("id", where)), review, "", POLARITIES[label], (review,), label)

    def choices(self, example: Example) -> list[tuple[str, str]]:
        """The same review after each polarity word."""
        return [(polarity, example.targets[0]) for polarity in POLARITIES]
