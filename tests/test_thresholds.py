"""Every limit from both sides: the last value that is taken, and the first that is not."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from finetune.arguments import DataArguments, ModelArguments, ReadingArguments
from finetune.decoding import DecodingArguments
from finetune.demo import DemoArguments
from finetune.generate import GenerationArguments
from finetune.sentiment import SentimentArguments
from finetune.sweep import warnings
from kozero.batch_search import MAX_SKIPPED, Prober, Room
from kozero.config import BatchSizes, TrainingArguments, batch_sizes
from kozero.contrast import check_negatives
from kozero.data.batches import TrainingRows
from kozero.data.cleaning import Cleaner
from kozero.data.duplicates import rows_of_a_band
from kozero.engines.torch_engine import LossScale
from kozero.errors import UserError
from kozero.loop import Intervals, Trainer, total_steps
from kozero.optim import schedule
from kozero.pause import PauseArguments, Pauses
from models.language_model import check_vocabulary
from pretrain.arguments import CorpusArguments
from pretrain.chunks import held_out_documents
from scripts.plan import PlanArguments
from scripts.select_topic import SelectionArguments
from tests.helpers import numbered_store
from tests.test_sweep import cell

JUST = 1e-9  # beside a limit that is no whole number


def selection(**told: Any) -> SelectionArguments:
    return SelectionArguments(files=["x"], query=["y"], **told)


def greedy(**told: Any) -> DecodingArguments:
    return DecodingArguments(temperature=0.0, **told)


def reviews(**told: Any) -> SentimentArguments:
    return SentimentArguments("writer", "judge", **told)


# By flag: what takes it, values at the limits that are taken, and values beyond them that are not.
FLAGS: dict[str, tuple[Callable, tuple, tuple]] = {
    "per_device_train_batch_size": (TrainingArguments, (1,), (0,)),
    "gradient_accumulation_steps": (TrainingArguments, (1,), (0,)),
    "logging_steps": (TrainingArguments, (1,), (0,)),
    "save_total_limit": (TrainingArguments, (1,), (0,)),
    "max_nonfinite": (TrainingArguments, (1,), (0,)),
    "per_device_eval_batch_size": (TrainingArguments, (0,), (-1,)),
    "max_steps": (TrainingArguments, (0,), (-1,)),
    "eval_steps": (TrainingArguments, (0,), (-1,)),
    "save_steps": (TrainingArguments, (0,), (-1,)),
    "warmup_steps": (TrainingArguments, (0.0,), (-JUST,)),
    "weight_decay": (TrainingArguments, (0.0,), (-JUST,)),
    "max_grad_norm": (TrainingArguments, (0.0,), (-JUST,)),
    "learning_rate": (TrainingArguments, (0.0,), (-JUST,)),
    "spike_sigmas": (TrainingArguments, (0.0,), (-JUST,)),
    "early_stopping_patience": (TrainingArguments, (0,), (-1,)),
    "adam_beta1": (TrainingArguments, (0.0, 1 - JUST), (-JUST, 1.0)),
    "adam_beta2": (TrainingArguments, (0.0, 1 - JUST), (-JUST, 1.0)),
    "adam_epsilon": (TrainingArguments, (JUST,), (0.0,)),
    "num_train_epochs": (TrainingArguments, (JUST, 1e6), (0.0, 1e6 + 1)),
    "timeout_seconds": (TrainingArguments, (JUST, 1e7), (0.0, 1e7 + 1)),
    "seed": (TrainingArguments, (0, 2**32 - 1), (-1, 2**32)),
    "num_pauses": (PauseArguments, (0,), (-1,)),
    "num_inference_pauses": (PauseArguments, (-1,), (-2,)),
    "temperature": (DecodingArguments, (0.0, 0.01, 100.0), (-1.0, 0.01 - JUST, 100.1)),
    "top_p": (DecodingArguments, (JUST, 1.0), (0.0, 1 + JUST)),
    "top_k": (DecodingArguments, (0,), (-1,)),
    "max_new_tokens": (DecodingArguments, (1,), (0,)),
    "no_repeat_ngram_size": (DecodingArguments, (0,), (-1,)),
    "repetition_penalty": (DecodingArguments, (0.01, 100.0), (0.01 - JUST, 100.1)),
    "dropout": (ModelArguments, (0.0, 1 - JUST), (-JUST, 1.0)),
    "validation_fraction": (DataArguments, (JUST, 1 - JUST), (0.0, 1.0)),
    "max_seq_length": (CorpusArguments, (8,), (7,)),
    "mask_share": (CorpusArguments, (JUST, 1 - JUST), (0.0, 1.0)),
    "min_hangul": (selection, (0.0, 1 - JUST), (-JUST, 1.0)),
    "similarity": (selection, (JUST, 1.0), (0.0, 1 + JUST)),
    "predicted": (PlanArguments, (JUST, 1.0), (0.0, 1 + JUST)),
    "port": (DemoArguments, (0, 65535), (-1, 65536)),
    "num_beams": (greedy, (1, 64), (0, 65)),
    "n_best_size": (ReadingArguments, (1, 1000), (0, 1001)),
}
# Numbers of texts, which two programs take.
FLAGS |= {
    f"{name} of {kind.__name__}": (kind, (1, most), (0, most + 1))
    for kind in (GenerationArguments, reviews)
    for name, most in (("num_samples", 100_000), ("batch_size", 1024))
}
FLAGS |= {
    "length": (GenerationArguments, (0, 100_000), (-1, 100_001)),
}


@pytest.mark.parametrize("name", FLAGS)
def test_a_flag_takes_the_values_up_to_its_limits_and_names_the_first_beyond(name):
    (kind, taken, refused), name = FLAGS[name], name.split()[0]
    for value in taken:
        assert getattr(kind(**{name: value}), name) == value
    for value in refused:
        with pytest.raises(UserError) as caught:
            kind(**{name: value})
        assert f"--{name} {value}: must be" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [GenerationArguments, DecodingArguments, SentimentArguments, ReadingArguments])
def test_the_help_says_how_much_a_flag_takes(kind):
    bounded = {name.split()[0]: told[1][-1] for name, told in FLAGS.items() if told[1][-1] in (64, 1000, 1024, 100_000)}
    helps = {f.name: f.metadata["help"] for f in dataclasses.fields(kind) if f.name in bounded}
    assert helps and [name for name, told in helps.items() if f"{bounded[name]:,} at most" not in told] == []


def works(function: Callable, *args: Any) -> bool:
    """Whether something is not refused."""
    try:
        function(*args)
    except UserError:
        return False
    return True


def stays(text: str, **told: Any) -> bool:
    """Whether a text is left in."""
    return not Cleaner(**{"min_chars": 0, "max_chars": 0, "min_hangul": 0.0} | told).reason_against(text)


def depends_on_pauses(without: float) -> bool:
    return any("depend on" in line for line in warnings([cell("none", 0, without), cell("append", 1, 0.8)]))


def gains_nothing(with_pauses: float) -> bool:
    return any("beats none" in line for line in warnings([cell("none", 0, 0.5), cell("append", 1, with_pauses)]))


# By what it limits: the law, the values that obey it, and the first that do not.
LIMITS: dict[str, tuple[Callable[[Any], bool], tuple, tuple]] = {
    "half of the letters are Hangul": (lambda text: stays(text, min_hangul=0.5), ("가나ab 12", "가나"), ("가나abc",)),
    "a shortest text": (lambda n: stays("가" * n, min_chars=20), (20,), (19,)),
    "a longest text": (lambda n: stays("가" * n, max_chars=20), (20,), (21,)),
    "below half of the best score a model has collapsed": (depends_on_pauses, (0.39,), (0.4,)),
    "pauses help that are better than none": (lambda value: not gains_nothing(value), (0.51,), (0.5, 0.49)),
    "a foreign tokenizer leaves few rows": (lambda n: works(check_vocabulary, n, 1000, True), (1000, 873), (1001, 872)),
    "the model's own may leave many": (lambda n: works(check_vocabulary, n, 1000, False), (1000, 1), (1001,)),
    "a passage has others beside it": (lambda n: works(check_negatives, BatchSizes(n, 8, 1)), (2, 0), (1,)),
}


@pytest.mark.parametrize("name", LIMITS)
def test_a_limit_holds_from_both_sides(name):
    law, inside, outside = LIMITS[name]
    assert [law(value) for value in inside] == [True] * len(inside)
    assert [law(value) for value in outside] == [False] * len(outside)


@pytest.mark.parametrize(("micro", "fine"), [(2000, True), (2001, False)])
def test_a_step_takes_a_hundred_times_all_rows_at_most(one_rank, tmp_path, micro, fine):
    rows = TrainingRows(numbered_store(20), Pauses(7, 1), 16, "grouped", seed=0)
    said = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=micro)
    assert works(Trainer, None, rows, said, batch_sizes(said, 1), None, "", {}) == fine


@pytest.mark.parametrize(
    ("told", "total", "evaluates", "saves"),
    [({}, 100, 10, 10), ({}, 19, 1, 1), ({}, 3, 1, 1), ({"save_steps": 7}, 100, 10, 7), ({"eval_steps": 3}, 100, 3, 3)],
)
def test_a_run_is_evaluated_ten_times_and_saved_as_often_unless_told_otherwise(told, total, evaluates, saves):
    assert Intervals.of(TrainingArguments(**told), total) == Intervals(10, evaluates, saves)


@pytest.mark.parametrize(("epochs", "rows", "steps"), [(1, 8, 2), (1, 9, 3), (2, 9, 5), (0.01, 8, 1)])
def test_epochs_are_rounded_up_to_whole_steps(epochs, rows, steps):
    assert total_steps(TrainingArguments(num_train_epochs=epochs), rows, BatchSizes(2, 2, 1)) == steps
    assert total_steps(TrainingArguments(num_train_epochs=epochs, max_steps=7), rows, BatchSizes(2, 2, 1)) == 7


def test_a_loss_scale_falls_no_lower_than_1():
    scale = LossScale(True)
    for _ in range(17):
        scale.update(False)
    assert scale.value == 1.0


@pytest.mark.parametrize(("skipped", "steps"), [(MAX_SKIPPED - 1, MAX_SKIPPED), (MAX_SKIPPED + 9, MAX_SKIPPED)])
def test_a_warm_up_of_the_batch_search_ends_with_an_update_or_after_40(one_rank, skipped, steps):
    done = []
    engine = SimpleNamespace(train_step=lambda *_: done.append(1) or SimpleNamespace(applied=len(done) > skipped))
    memory = SimpleNamespace(reset=lambda: 1, limit=lambda: 2)
    assert Prober(lambda: engine, lambda rows: [], memory).warm_up() == Room(1, 2) and len(done) == steps


@pytest.mark.parametrize("similarity", [0.5, 0.8, 0.95])
def test_bands_are_as_wide_as_one_missed_pair_in_a_hundred_allows(similarity):
    rows = rows_of_a_band(similarity)
    missed = [(1 - similarity**r) ** (128 // r) for r in (rows, rows + 1)]
    assert missed[0] <= 0.01 < missed[1]


@pytest.mark.parametrize(
    ("documents", "held_out"), [(1, 0), (9, 1), (100, 10), (159, 16), (160, 16), (1600, 16), (1601, 17), (5000, 50)]
)
def test_a_hundredth_of_the_documents_validates_but_16_and_a_tenth_at_most(documents, held_out):
    assert sum(held_out_documents([documents], None)) == held_out


@pytest.mark.parametrize(("warmup", "steps"), [(0.999, 100), (1.0, 1), (1.5, 1)])
def test_a_warm_up_below_1_is_a_share_and_from_1_on_a_number_of_updates(warmup, steps):
    lr_at = schedule(TrainingArguments(warmup_steps=warmup, learning_rate=1.0, lr_scheduler_type="constant"), 100)
    assert [lr_at(step) < 1 for step in (steps - 1, steps)] == [True, False]
