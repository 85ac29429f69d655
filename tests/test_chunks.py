"""Chunks of sentences, blocks of a stream, their numbers over several shards, and the order in which they come."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from kozero.data.order import GROUPS, Order
from pretrain import chunks
from pretrain.chunks import Chunks, Numbered, held_out_documents
from pretrain.corpus import Shard

SEPARATOR = 7
Sentences = list[np.ndarray]


def shard_of(documents: list[list[int]], folder: Path = Path("none"), first: int = 100) -> Shard:
    """A shard of documents given by the lengths of their sentences; ids count up from `first`, so each is a place."""
    lengths = [length for document in documents for length in document]
    tokens = np.arange(first, first + sum(lengths), dtype=np.uint32)
    return Shard(
        folder,
        tokens,
        np.cumsum([0, *lengths], dtype=np.int64),
        np.cumsum([0, *map(len, documents)], dtype=np.int64),
    )


def cut(shard: Shard, room: int, fraction: float) -> Chunks:
    return chunks.cut(shard, room, *held_out_documents([shard.num_documents], fraction))


def blocks_of(shard: Shard, size: int, separator: int, fraction: float) -> chunks.Blocks:
    return chunks.Blocks(shard, size, separator, *held_out_documents([shard.num_documents], fraction))


def random_documents(seed: int, num: int = 30, longest: int = 30) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, longest, rng.integers(1, 9), endpoint=True).tolist() for _ in range(num)]


def sentences_of(shard: Shard) -> list[Sentences]:
    """The ids of each sentence of each document, cut out one by one."""
    sentences = [shard.tokens[a:b] for a, b in pairwise(shard.sentences.tolist())]
    return [sentences[a:b] for a, b in pairwise(shard.documents.tolist())]


def all_of(parts: Chunks) -> list[list[np.ndarray]]:
    return [parts[number] for number in range(len(parts.chunks) - 1)]


def joined(lists: list) -> list[int]:
    return [int(token) for units in lists for unit in units for token in unit]


# Chunks ----------------------------------------------------------------------------------------------------------

ROOMS = [1, 2, 7, 13, 29, 30, 200]


@pytest.fixture(params=range(4))
def documents(request):
    return random_documents(request.param)


@pytest.mark.parametrize("room", ROOMS)
def test_each_token_is_in_one_chunk_in_its_order(tmp_path, documents, room):
    shard = shard_of(documents, tmp_path / "shard")
    assert joined(all_of(cut(shard, room, 0.1))) == shard.tokens.tolist()


@pytest.mark.parametrize("room", ROOMS)
def test_chunks_are_greedy_and_stay_in_their_document(tmp_path, documents, room):
    """A loop that takes unit after unit and starts anew when the next does not fit or belongs to another document."""
    shard = shard_of(documents, tmp_path / "shard")
    found = all_of(cut(shard, room, 0.1))
    begins = {int(document[0][0]) for document in sentences_of(shard)}
    expected: list[list[np.ndarray]] = []
    for unit in (unit for units in found for unit in units):
        fits = expected and sum(map(len, expected[-1])) + len(unit) <= room
        if fits and int(unit[0]) not in begins:
            expected[-1].append(unit)
        else:
            expected.append([unit])
    assert [joined([units]) for units in found] == [joined([units]) for units in expected]
    assert [len(units) for units in found] == [len(units) for units in expected]
    assert max(sum(map(len, units)) for units in found) <= room


@pytest.mark.parametrize("room", ROOMS)
def test_units_are_sentences_and_near_equal_parts_of_those_that_are_too_long(tmp_path, documents, room):
    shard = shard_of(documents, tmp_path / "shard")
    units = iter([unit for units in all_of(cut(shard, room, 0.1)) for unit in units])
    for sentence in (sentence for document in sentences_of(shard) for sentence in document):
        parts = [next(units) for _ in range(-(-len(sentence) // room))]
        assert np.concatenate(parts).tolist() == sentence.tolist()
        assert max(map(len, parts)) <= min(map(len, parts)) + 1
    assert next(units, None) is None


def test_chunks_by_hand(tmp_path):
    parts = cut(shard_of([[2, 3, 1], [4], [9, 2]], tmp_path / "shard", first=0), 5, 0.4)
    expected = [[[0, 1], [2, 3, 4]], [[5]], [[6, 7, 8, 9]], [[10, 11, 12, 13]], [[14, 15, 16, 17, 18]], [[19, 20]]]
    assert [[unit.tolist() for unit in units] for units in all_of(parts)] == expected
    assert parts.num_train == 2  # two of three documents are held out
    assert parts.lengths(np.array([4, 0])).tolist() == [5, 5]
    assert parts[0][0].dtype == np.int64  # what an embedding takes


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.3, 0.999])
def test_the_last_documents_are_held_out(tmp_path, documents, fraction):
    shard = shard_of(documents, tmp_path / "shard")
    parts = cut(shard, 13, fraction)
    num = min(29, int(np.ceil(fraction * 30)))
    kept = [sentence for document in sentences_of(shard)[: 30 - num] for sentence in document]
    assert joined(all_of(parts)[: parts.num_train]) == np.concatenate(kept).tolist()


@pytest.mark.parametrize(
    ("num_documents", "fraction", "num"),
    [
        (0, 0.5, 0),
        (1, 0.9, 0),
        (2, 0.01, 1),
        (100, 0.01, 1),
        (101, 0.01, 2),
        (5, 0.99, 4),
        (9, 0.0, 0),
        (9, None, 1),
        (100, None, 10),
        (170, None, 16),
        (1600, None, 16),
        (10_000, None, 100),
    ],
)
def test_so_many_documents_are_held_out(num_documents, fraction, num):
    assert held_out_documents([num_documents], fraction) == [num]


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.3, 0.999])
@pytest.mark.parametrize("counts", [[1] * 200, [2] * 40, [7, 0, 1, 92, 100], [0, 1]])
def test_shards_of_few_documents_hold_out_the_share_of_all(counts, fraction):
    held = held_out_documents(counts, fraction)
    total = sum(counts)
    assert sum(held) == min(int(np.ceil(fraction * total)), total - 1)
    assert all(0 <= part <= whole for part, whole in zip(held, counts, strict=True))
    so_far = np.cumsum(held) - fraction * np.cumsum(counts)
    assert (np.abs(so_far) <= 1).all() or fraction > 0.9  # as evenly as whole documents can be


def test_a_shard_without_documents_has_no_rows(tmp_path):
    parts = cut(shard_of([], tmp_path / "shard"), 8, 0.5)
    assert (len(all_of(parts)), parts.num_train) == (0, 0)
    blocks = blocks_of(shard_of([]), 8, SEPARATOR, 0.5)
    assert (len(blocks), blocks.num_train) == (0, 0)


class CountedCut:
    """write_cut, counted."""

    def __init__(self) -> None:
        self.times, self.write = 0, chunks.write_cut

    def __call__(self, *args, **named) -> None:
        self.times += 1
        self.write(*args, **named)


@pytest.mark.parametrize("damage", [None, "units.npy", "chunks.npy", "chunk_of_document.npy", "meta.json"])
def test_a_shard_is_cut_once_and_again_where_that_is_damaged(tmp_path, monkeypatch, documents, damage):
    shard = shard_of(documents, tmp_path / "shard")
    monkeypatch.setattr(chunks, "write_cut", counted := CountedCut())
    before = joined(all_of(cut(shard, 13, 0.1)))
    if damage:
        path = tmp_path / "shard-13" / damage
        path.write_bytes(path.read_bytes()[:-1])
    assert joined(all_of(cut(shard, 13, 0.5))) == before  # what is held out is not kept with it
    assert counted.times == (2 if damage else 1)
    cut(shard, 14, 0.1)
    assert counted.times == (3 if damage else 2)


# Blocks ----------------------------------------------------------------------------------------------------------


def streams(shard: Shard, fraction: float) -> list[list[tuple[int, int]]]:
    """(document, token) at each place of the training stream and of the held-out one."""
    places = []
    for number, sentences in enumerate(sentences_of(shard)):
        tokens = [SEPARATOR, *np.concatenate(sentences).tolist()]
        places.append([(number, token) for token in tokens])
    edge = len(places) - min(len(places) - 1, int(np.ceil(fraction * len(places))))
    return [[place for document in part for place in document] for part in (places[:edge], places[edge:])]


BLOCKS = [(size, fraction) for size in (1, 2, 5, 16, 10_000) for fraction in (0.0, 0.3)]


@pytest.mark.parametrize(("size", "fraction"), BLOCKS)
def test_blocks_are_the_stream_cut_at_every_so_many_tokens(documents, size, fraction):
    shard = shard_of(documents)
    blocks = blocks_of(shard, size, SEPARATOR, fraction)
    expected = []
    for stream in streams(shard, fraction):
        expected.append([stream[k : k + size] for k in range(0, len(stream), size)])
    assert (blocks.num_train, len(blocks)) == (len(expected[0]), len(expected[0]) + len(expected[1]))
    for number, block in enumerate(expected[0] + expected[1]):
        parts = blocks[number]
        assert [token for ids, _ in parts for token in ids.tolist()] == [token for _, token in block]
        documents_in_it = [document for document, _ in block]
        assert [len(ids) for ids, _ in parts] == [documents_in_it.count(d) for d in sorted(set(documents_in_it))]
    lengths = blocks.lengths(np.arange(len(blocks)))
    assert lengths.tolist() == [len(block) for block in expected[0] + expected[1]]


@pytest.mark.parametrize(("size", "fraction"), BLOCKS)
def test_each_token_is_predicted_once_from_the_one_before_it_and_the_last_predicts_the_separator(
    documents, size, fraction
):
    """Ids are places, so a token tells where it stands."""
    shard = shard_of(documents)
    blocks = blocks_of(shard, size, SEPARATOR, fraction)
    bounds = (0, blocks.num_train, len(blocks))
    for (first, last), stream in zip(pairwise(bounds), streams(shard, fraction), strict=True):
        pairs = []
        for number in range(first, last):
            for ids, following in blocks[number]:
                pairs += zip(ids.tolist(), following.tolist(), strict=True)
        expected = [(a[1], b[1] if a[0] == b[0] else SEPARATOR) for a, b in pairwise([*stream, (-1, -1)])]
        assert pairs == expected


def test_blocks_by_hand():
    blocks = blocks_of(shard_of([[2, 2], [1]], first=10), 3, SEPARATOR, 0.0)  # 7 10 11 | 12 13 7 | 14
    found = [[(ids.tolist(), following.tolist()) for ids, following in blocks[n]] for n in range(len(blocks))]
    assert found == [[([7, 10, 11], [10, 11, 12])], [([12, 13], [13, 7]), ([7], [14])], [([14], [7])]]


# Several shards ----------------------------------------------------------------------------------------------------


def shards_for_numbers(kind: str, folder: Path) -> list[Chunks | chunks.Blocks]:
    """Shards of which the first, one in the middle and the last are empty, and some have one document."""
    sizes = [0, 12, 1, 0, 0, 30, 2, 0]
    made = [shard_of(random_documents(k, num), folder / str(k), 10_000 * k + 100) for k, num in enumerate(sizes)]
    if kind == "chunks":
        return [cut(shard, 13, 0.2) for shard in made]
    return [blocks_of(shard, 13, SEPARATOR, 0.2) for shard in made]


def tokens_of(row: list, kind: str) -> list[int]:
    return np.concatenate([part if kind == "chunks" else part[0] for part in row]).tolist()


@pytest.mark.parametrize("kind", ["chunks", "blocks"])
@pytest.mark.parametrize("held_out", [False, True])
def test_rows_of_all_shards_have_one_number_each(tmp_path, kind, held_out):
    parts = shards_for_numbers(kind, tmp_path)
    rows = Numbered(parts, held_out)
    expected = []
    for part in parts:
        whole = len(all_of(part)) if kind == "chunks" else len(part)
        expected += [
            tokens_of(part[k], kind) for k in (range(part.num_train, whole) if held_out else range(part.num_train))
        ]
    assert len(rows) == len(expected) > 5
    assert [tokens_of(rows[number], kind) for number in range(len(rows))] == expected
    numbers = np.random.default_rng(0).permutation(len(rows))
    assert rows.lengths(numbers).tolist() == [len(expected[number]) for number in numbers]


def test_training_and_held_out_rows_share_no_token_and_miss_none(tmp_path):
    parts = shards_for_numbers("chunks", tmp_path)
    sides = [[token for n in range(len(rows)) for token in tokens_of(rows[n], "chunks")] for rows in both(parts)]
    everything = [token for part in parts for token in part.shard.tokens.tolist()]
    assert sorted(sides[0] + sides[1]) == everything


def both(parts: list) -> list[Numbered]:
    return [Numbered(parts, held_out) for held_out in (False, True)]


def test_a_shard_without_training_rows_is_passed_over():
    shard = shard_of([[3], [2], [4]], first=0)
    part = Chunks(shard, shard.sentences, np.arange(4), 0)
    other = Chunks(shard, shard.sentences, np.arange(4), 2)
    training, held_out = both([part, other, part])
    assert [tokens_of(training[n], "chunks") for n in range(len(training))] == [[0, 1, 2], [3, 4]]
    assert len(held_out) == 7
    assert training.lengths(np.array([1, 0])).tolist() == [2, 3]


@pytest.mark.parametrize(("most", "found", "looked"), [(99, 9, 5), (9, 9, 4), (4, 4, 2)])
def test_the_longest_row_is_looked_for_until_one_has_the_most(monkeypatch, most, found, looked):
    """Ten rows, two at once: the longest is the seventh."""
    monkeypatch.setattr(chunks, "SLICE", 2)
    shard = shard_of([[n] for n in (2, 3, 4, 1, 1, 1, 9, 1, 1, 1)])
    rows, seen = Numbered([Chunks(shard, shard.sentences, np.arange(11), 10)], held_out=False), []
    lengths = rows.lengths
    monkeypatch.setattr(rows, "lengths", lambda numbers: seen.append(len(numbers)) or lengths(numbers))
    assert rows.longest(most) == found and seen == [2] * looked


def test_no_shards_have_no_rows():
    assert len(Numbered([], held_out=False)) == 0


# Order -----------------------------------------------------------------------------------------------------------

LENGTHS = np.random.default_rng(1).integers(1, 101, 5000)


def order(num: int = 1000, epoch_rows: int = 0, group: int = 8, seed: int = 3, lengths=LENGTHS.__getitem__) -> Order:
    return Order(num, epoch_rows or num, group, seed, lengths)


def epoch(rows: Order, number: int) -> list[int]:
    return [rows[place] for place in range(number * rows.epoch_rows, (number + 1) * rows.epoch_rows)]


@pytest.mark.parametrize("num", [1, 2, 3, 7, 8, 399, 400, 401, 1000])  # 400: a window
@pytest.mark.parametrize("group", [1, 8])
def test_each_row_comes_once_an_epoch(num, group):
    rows = order(num, group=group)
    assert sorted(epoch(rows, 0)) == sorted(epoch(rows, 5)) == list(range(num))


def test_each_epoch_and_each_seed_has_an_order_of_its_own():
    orders = [epoch(order(seed=seed), number) for seed, number in ((3, 0), (3, 1), (4, 0), (4, 1))]
    assert all((np.array(a) == b).mean() < 0.02 for k, a in enumerate(orders) for b in orders[:k])


@pytest.mark.parametrize("epoch_rows", [5, 96, 999])
def test_a_shorter_epoch_draws_other_rows_each_time(epoch_rows):
    rows = order(epoch_rows=epoch_rows)
    epochs = [epoch(rows, number) for number in range(40)]
    assert all(len(set(drawn)) == epoch_rows for drawn in epochs)
    assert set(np.concatenate(epochs)) <= set(range(1000))
    assert len({tuple(sorted(drawn)) for drawn in epochs}) == 40
    if epoch_rows == 96:  # 40 epochs reach all but (1 - 0.096) ** 40 = 1.8 % of the rows
        assert 960 < len(set(np.concatenate(epochs))) < 1000


@pytest.mark.parametrize("epoch_rows", [3, 250, 1000])
def test_a_place_has_its_row_whoever_asks_in_whatever_order(epoch_rows):
    history = [order(epoch_rows=epoch_rows)[place] for place in range(0, 3000, 7)]
    came = order(epoch_rows=epoch_rows)
    shuffled = np.random.default_rng(0).permutation(len(history))
    assert [came[7 * int(k)] for k in shuffled] == [history[k] for k in shuffled]
    resumed = order(epoch_rows=epoch_rows)
    assert [resumed[place] for place in range(2100, 3000, 7)] == history[300:]


def test_the_rows_of_a_group_have_about_one_length():
    rows = order(4000)
    groups = LENGTHS[np.array(epoch(rows, 1))].reshape(-1, 8)
    spreads = np.ptp(groups, axis=1)
    assert spreads.mean() < 4 < 60 < np.ptp(LENGTHS[:4000].reshape(-1, 8), axis=1).mean()


def test_groups_are_not_in_the_order_of_their_lengths():
    rows = order(4000)
    means = LENGTHS[np.array(epoch(rows, 1))].reshape(-1, 8).mean(1)
    assert abs(np.corrcoef(means, np.arange(500))[0, 1]) < 0.2
    assert abs(np.corrcoef(means[:50], np.arange(50))[0, 1]) < 0.5


def test_no_more_is_held_than_two_windows():
    """Of more rows than any memory holds: what is asked for at once is a window."""
    asked = []

    def lengths(numbers: np.ndarray) -> np.ndarray:
        asked.append(len(numbers))
        return numbers % 50

    rows = order(10**14, group=4, lengths=lengths)
    drawn = [rows[place] for place in range(10**13, 10**13 + 1500)]
    assert len(set(drawn)) == 1500 and min(drawn) >= 0 and max(drawn) < 10**14
    assert set(asked) == {4 * GROUPS} and len(asked) <= 1500 // (4 * GROUPS) + 2
    assert sum(map(len, rows.windows.values())) <= 2 * 4 * GROUPS


def test_a_step_over_two_windows_does_not_make_them_anew_each_time():
    """Also in a run that went back."""
    asked = []
    rows = order(lengths=lambda numbers: asked.append(1) or LENGTHS[numbers])
    for place in (999, 500, 390, 410, 391, 411, 392, 412):
        assert 0 <= rows[place] < 1000
    assert len(asked) == 3  # the windows 2, 1, 0, then 1 and 0 in turn
