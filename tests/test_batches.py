"""Batches: how texts lie in rows, which rows make a step, and that texts of a row do not see each other."""

from collections import Counter

import numpy as np
import pytest
import torch

from kozero import distributed
from kozero.config import BatchSizes
from kozero.data.batch import shares
from kozero.data.batches import (
    PAD_MULTIPLE,
    PackedBatch,
    Prefixes,
    Text,
    TrainingRows,
    collate,
    evaluation_batches,
)
from kozero.data.rows import fit
from kozero.pause import IGNORE, Pauses
from models.causal_lm import CausalLM
from tests.helpers import MemoryStore, numbered_store, toy_gpt2

PAUSE = 7
NO_PAUSES = Pauses(PAUSE, 0)


def text(ids: list[int], num_targets: int, number: int) -> Text:
    """A text whose last `num_targets` tokens are its target."""
    cut = len(ids) - num_targets
    return Text(*NO_PAUSES.sequence(np.array(ids[:cut], dtype=int), np.array(ids[cut:], dtype=int)), number)


@pytest.fixture
def batch():
    """Two texts in the first row, one in the second."""
    return collate([[text([11, 12, 13], 1, 4), text([21, 22], 1, 9)], [text([31, 32, 33, 34], 2, 5)]])


def test_texts_lie_side_by_side_and_padding_comes_last(batch):
    assert batch.inputs["input_ids"].tolist() == [[11, 12, 13, 21, 22, 0, 0, 0], [31, 32, 33, 34, 0, 0, 0, 0]]


def test_positions_restart_at_every_text(batch):
    positions = batch.inputs["position_ids"]
    assert positions[0, :5].tolist() == [0, 1, 2, 0, 1]
    assert positions[1, :4].tolist() == [0, 1, 2, 3]


def test_padding_begins_no_text_of_its_own(batch):
    assert batch.inputs["position_ids"][0, 5:].tolist() == [2, 3, 4]


def test_targets_are_given_by_flat_place_id_and_text(batch):
    assert batch.inputs["target_index"].tolist() == [1, 3, 9, 10]  # 8 positions a row
    assert batch.inputs["target_ids"].tolist() == [13, 22, 33, 34]
    assert batch.texts.tolist() == [4, 9, 5, 5]
    assert batch.num_targets == (4,)


def test_real_tokens_are_counted_without_padding(batch):
    assert batch.num_tokens == 9


def test_no_label_crosses_a_join():
    rows = [[text([11, 12], 2, 0), text([21, 22], 2, 1), text([31, 32], 2, 2)]]
    inputs = collate(rows).inputs
    assert inputs["target_index"].tolist() == [0, 2, 4]
    assert inputs["target_ids"].tolist() == [12, 22, 32]


def test_rows_are_padded_to_the_longest_rounded_up():
    assert collate([[text(list(range(9)), 1, 0)], [text([1, 2], 1, 1)]]).inputs["input_ids"].shape == (2, 16)
    assert PAD_MULTIPLE == 8


def test_rows_are_padded_to_a_given_length():
    assert collate([[text([1, 2], 1, 0)]], length=30).inputs["input_ids"].shape == (1, 30)


def test_rows_without_texts_predict_nothing():
    empty = collate([[], []], length=8)
    assert empty.inputs["input_ids"].shape == (2, 8)
    assert (empty.num_targets, empty.num_tokens) == ((0,), 0)


@pytest.mark.parametrize(
    ("ranks", "wanted"),
    [
        (1, [[([1, 3], [1, 3]), ([4, 0], [4, 0]), ([2], [2])]]),
        (2, [[([1, 3], [1, 3]), ([2], [2])], [([4, 0], [4, 0]), ([], [1])]]),
    ],
)
def test_ranks_share_rows_the_longest_first_and_one_without_any_computes_the_longest(monkeypatch, ranks, wanted):
    """So what does not fit into memory shows in the first pass."""
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    for rank, passes in enumerate(wanted):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        found = [(mine.tolist(), computed.tolist()) for mine, computed in shares([3, 9, 1, 9, 5], 2)]
        assert found == passes


def training_rows(
    batching: str = "packed", num: int = 200, seed: int = 3, num_pauses: int = 1, **other
) -> TrainingRows:
    return TrainingRows(numbered_store(num, **other), Pauses(PAUSE, num_pauses), 16, batching, seed)


def step_texts(rows: TrainingRows, consumed: int, sizes: BatchSizes) -> Counter:
    """How often each example is in a step, over all ranks."""
    batches = [batch for rank in range(sizes.world_size) for batch in rows.step(consumed, sizes, rank)]
    return Counter(number for batch in batches for number in set(batch.texts.tolist()))


def rows_of_step(rows: TrainingRows, consumed: int, sizes: BatchSizes) -> list[int]:
    return [rows.row_at(consumed + k, sizes.global_batch) for k in range(sizes.global_batch)]


SPLITS = [(8, 1, 1), (4, 2, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2), (2, 1, 4), (1, 1, 8)]


@pytest.mark.parametrize("batching", ["packed", "grouped"])
@pytest.mark.parametrize("split", SPLITS)
def test_a_global_batch_does_not_depend_on_how_it_is_dealt_out(batching, split):
    rows = training_rows(batching)
    expected = Counter(int(n) for row in rows_of_step(rows, 24, BatchSizes(8, 1, 1)) for n in rows.rows[row])
    assert step_texts(rows, 24, BatchSizes(*split)) == expected


@pytest.mark.parametrize("split", SPLITS)
def test_each_rank_gets_its_micro_batches(split):
    micro, accumulation, world_size = split
    rows = training_rows()
    for rank in range(world_size):
        batches = rows.step(0, BatchSizes(*split), rank)
        assert [len(batch.inputs["input_ids"]) for batch in batches] == [micro] * accumulation


@pytest.mark.parametrize("batching", ["packed", "grouped"])
def test_every_row_comes_exactly_once_an_epoch_and_every_example_is_in_one_row(batching):
    rows = training_rows(batching)
    epochs = [[rows.row_at(epoch * len(rows) + k, 8) for k in range(len(rows))] for epoch in (0, 1)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(len(rows)))
    assert epochs[0] != epochs[1]
    assert sorted(np.concatenate(rows.rows)) == list(range(200))


@pytest.mark.parametrize("batching", ["packed", "grouped"])
def test_a_step_that_crosses_an_epoch_edge_takes_the_tail_and_the_next_head(batching):
    rows, sizes = training_rows(batching, num=30), BatchSizes(4, 1, 1)
    edge = len(rows)
    assert edge % 4 != 0
    consumed = edge - edge % 4
    expected = [rows.order(0, 4)[k] for k in range(consumed, edge)]
    expected += [rows.order(1, 4)[k] for k in range(4 - len(expected))]
    assert rows_of_step(rows, consumed, sizes) == expected
    assert step_texts(rows, consumed, sizes) == Counter(int(n) for row in expected for n in rows.rows[row])


@pytest.mark.parametrize("batching", ["packed", "grouped"])
def test_the_place_in_the_stream_is_one_number(batching):
    """A run that comes to a place and one that begins there take the same rows, going back too."""
    sizes = BatchSizes(4, 2, 1)
    came, fresh = training_rows(batching), training_rows(batching)
    history = [rows_of_step(came, consumed, sizes) for consumed in range(0, 5 * len(came), 8)]
    assert rows_of_step(fresh, 3 * len(came) // 8 * 8, sizes) == history[3 * len(came) // 8]
    assert rows_of_step(came, 0, sizes) == history[0]


def test_steps_of_an_epoch_smaller_than_a_global_batch():
    rows = training_rows(num=3)
    assert 1 <= len(rows) < 4
    assert sum(step_texts(rows, 0, BatchSizes(len(rows) * 2, 1, 1)).values()) >= 3


def test_another_seed_gives_another_order():
    one, other = training_rows("grouped", seed=3), training_rows("grouped", seed=4)
    assert rows_of_step(one, 0, BatchSizes(16, 1, 1)) != rows_of_step(other, 0, BatchSizes(16, 1, 1))


def test_row_lengths_count_the_tokens_and_pauses_of_a_step():
    rows, sizes = training_rows(), BatchSizes(4, 1, 1)
    batch, numbers = rows.step(0, sizes, 0)[0], rows_of_step(rows, 0, sizes)
    num_pauses = sum(len(rows.rows[row]) for row in numbers)  # one a text
    assert batch.num_tokens + num_pauses == sum(rows.length[row] for row in numbers)
    assert batch.num_tokens == rows.num_tokens(0, 4)


def test_packed_rows_have_one_width_and_grouped_ones_that_of_their_longest():
    store = numbered_store(6)  # 54 tokens at most
    widths = {
        batching: TrainingRows(store, NO_PAUSES, 64, batching, 3).step(0, BatchSizes(1, 1, 1), 0)[0].inputs["input_ids"]
        for batching in ("packed", "grouped")
    }
    assert {batching: ids.shape for batching, ids in widths.items()} == {"packed": (1, 64), "grouped": (1, 8)}


@pytest.mark.parametrize("capacity", [16, 20])
@pytest.mark.parametrize("batching", ["packed", "grouped"])
def test_no_position_is_beyond_the_capacity(batching, capacity):
    """A model may have no more positions than that, also where they are no multiple of 8."""
    store = numbered_store(12, shortest=capacity, longest=capacity)
    rows = TrainingRows(store, NO_PAUSES, capacity, batching, seed=0)
    (batch,) = rows.step(0, BatchSizes(4, 1, 1), 0)
    assert batch.inputs["position_ids"].max() < capacity


def test_an_example_that_does_not_fit_is_in_no_row():
    store = MemoryStore([([], [1], [2, 3]), ([], [1], list(range(2, 40)))])
    rows = TrainingRows(store, NO_PAUSES, 16, "packed", seed=0)
    assert [row.tolist() for row in rows.rows] == [[0]]


def test_a_training_text_is_cut_context_prompt_pauses_target():
    store = MemoryStore([(range(30, 50), [11, 12], [21, 1])])
    rows = TrainingRows(store, Pauses(PAUSE, 2), 9, "packed", seed=0)
    (one,) = rows.texts(0)
    assert one.ids.tolist() == [30, 31, 32, 11, 12, PAUSE, PAUSE, 21, 1]
    assert one.predicts.tolist() == [IGNORE] * 6 + [21, 1, IGNORE]


def evaluation(store: MemoryStore, *split: int) -> list[PackedBatch]:
    """Batches of rows of 16 tokens; split: micro batch, rank, number of ranks."""
    fitted = fit(store, 16, 0)
    return list(evaluation_batches(Prefixes(store, fitted.cut), fitted, NO_PAUSES, 16, *split))


@pytest.mark.parametrize(("micro", "world_size"), [(1, 1), (4, 1), (2, 2), (3, 3), (8, 4)])
def test_evaluation_meets_each_example_once_over_all_ranks(micro, world_size):
    store = numbered_store(50)
    ranks = [evaluation(store, micro, rank, world_size) for rank in range(world_size)]
    targets = Counter(n for batches in ranks for batch in batches for n in batch.texts.tolist())
    assert targets == Counter({n: int(length) for n, length in enumerate(store.lengths[:, 2])})


def test_every_rank_makes_as_many_forward_passes_the_last_may_be_empty():
    store = numbered_store(50)
    ranks = [evaluation(store, 4, rank, 7) for rank in range(7)]
    assert len({len(batches) for batches in ranks}) == 1
    shapes = {tuple(batch.inputs["input_ids"].shape) for batches in ranks for batch in batches}
    assert shapes == {(4, 16)}
    assert ranks[-1][-1].num_targets == (0,)


def test_evaluation_takes_no_more_rows_than_there_are():
    """A batch is of `micro` rows on every rank, of which more than there are texts for would be padding alone."""
    store = numbered_store(50)
    (batch,) = evaluation(store, 10**15, 0, 1)
    assert len(set(batch.texts.tolist())) == 50
    assert batch.inputs["input_ids"].ne(0).any(dim=1).all()


def test_evaluation_leaves_out_what_does_not_fit():
    store = MemoryStore([(range(40), [1], [2]), ([], [1], [2]), ([], range(40), [2])])
    assert {n for batch in evaluation(store, 1, 0, 1) for n in batch.texts.tolist()} == {0, 1}


@pytest.fixture(scope="module")
def model():
    return CausalLM(toy_gpt2(), []).eval()


def losses_by_text(model: CausalLM, batch) -> dict[int, torch.Tensor]:
    with torch.no_grad():
        losses = model(**batch.inputs, reduction="none")
    return {n: losses[batch.texts == n] for n in set(batch.texts.tolist())}


def packed_texts() -> list[list[Text]]:
    store = numbered_store(12, shortest=3)
    rows = TrainingRows(store, Pauses(PAUSE, 1), 32, "packed", seed=0)
    return [rows.texts(n) for n in range(len(rows))]


def test_a_text_in_a_packed_row_has_the_losses_it_has_alone(model):
    rows = packed_texts()
    assert max(map(len, rows)) >= 3
    packed = losses_by_text(model, collate(rows, 32))
    for one in (one for row in rows for one in row):
        alone = losses_by_text(model, collate([[one]]))
        torch.testing.assert_close(packed[one.number], alone[one.number], atol=1e-5, rtol=0)


def test_losses_are_those_of_plain_transformers(model):
    rows = packed_texts()
    packed = losses_by_text(model, collate(rows, 32))
    for one in (one for row in rows for one in row):
        with torch.no_grad():
            logits = model.lm(torch.from_numpy(one.ids)[None]).logits[0]
        places = np.flatnonzero(one.predicts != IGNORE)
        expected = -logits.log_softmax(-1)[places, one.predicts[places]]
        torch.testing.assert_close(packed[one.number], expected, atol=1e-5, rtol=0)


LEAKS = {
    "positions that go on": {"position_ids": torch.arange(32)[None]},
    "a mask of ones": {"attention_mask": torch.ones(1, 32, dtype=torch.long)},
    "a cache": {"use_cache": True},
    "none": {},
}


@pytest.mark.parametrize("leak", LEAKS)
def test_what_transformers_is_told_decides_whether_texts_see_each_other(model, leak):
    """Negative controls of the two tests above: what we tell it, but for one argument."""
    batch = collate(packed_texts(), 32)
    ids, places = batch.inputs["input_ids"], batch.inputs["target_index"]
    told = {"position_ids": batch.inputs["position_ids"], "use_cache": False} | LEAKS[leak]
    told |= {name: told[name].expand(len(ids), 32) for name in ("position_ids", "attention_mask") if name in told}
    with torch.no_grad():
        hidden = model.lm.transformer(input_ids=ids, **told).last_hidden_state
        found = model.lm.lm_head(hidden.flatten(0, 1)[places], batch.inputs["target_ids"], "none")
        packed = model(**batch.inputs, reduction="none")
    assert ((packed - found).abs().max() > 1e-2) == (leak != "none")


def test_a_batch_without_targets_has_loss_zero(model):
    assert model(**collate([[]], 8).inputs) == 0
