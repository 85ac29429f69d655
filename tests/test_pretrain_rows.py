"""Rows of pre-training: what is hidden, how segments are framed, which sentence asks, and that a place in the stream
is all that a row depends on."""

import math
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordPiece
from transformers import PreTrainedTokenizerFast

from kozero.config import BatchSizes
from kozero.data.batch import Batch, padded
from kozero.data.framing import Framing
from kozero.data.order import ABSENT, Order
from kozero.errors import UserError
from kozero.pause import IGNORE
from pretrain.chunks import Blocks, Numbered
from pretrain.corpus import Shard
from pretrain.rows import BlockRows, EncoderRows, Masking, Sample, Tokens
from tests.helpers import sample_tokenizer, word_tokenizer

PAD, CLS, SEP, MASK, UNK = range(5)
VOCAB = 60
FIRST = 10  # tokens from here on are words; 5 to 9 are spare
SPECIAL = np.arange(VOCAB) < FIRST
TOKENS = Tokens(Framing(CLS, SEP), MASK, VOCAB, SPECIAL, np.arange(VOCAB) % 3 != 0)
TASKS = ["mlm", "mlm_sop", "mlm_ict"]
Units = list[np.ndarray]


class Listed:
    """Rows of a corpus as a list."""

    def __init__(self, rows: list[Units]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> Units:
        return self.rows[number]

    def lengths(self, numbers: np.ndarray) -> np.ndarray:
        return np.array([sum(map(len, self.rows[number])) for number in numbers])


def random_rows(num: int = 300, room: int = 21, seed: int = 0) -> Listed:
    """Rows of up to `room` different tokens in one to five units."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(num):
        ids = rng.permutation(np.arange(FIRST, VOCAB))[: rng.integers(1, room, endpoint=True)]
        cuts = rng.permutation(np.arange(1, len(ids)))[: rng.integers(0, 5)]
        rows.append(np.split(ids, np.sort(cuts)))
    return Listed(rows)


def encoder_rows(
    task: str, chunks: Listed | None = None, most: int = 24, seed: int = 3, router: bool = False
) -> EncoderRows:
    chunks = chunks or random_rows()
    order = Order(len(chunks), len(chunks), 8, seed, chunks.lengths)
    return EncoderRows(chunks, order, Masking(TOKENS), task, router, most)


def restored(sample: Sample) -> np.ndarray:
    """The ids of a row before tokens were hidden."""
    return np.where(sample.predicts == IGNORE, sample.ids, sample.predicts)


def within(found: float, expected: float, num: int, sigmas: float = 4.5) -> None:
    """A share that was found in `num` draws."""
    assert abs(found - expected) < sigmas * (expected * (1 - expected) / num) ** 0.5


# What is hidden ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, shown and targets, (4000, 40) each, hidden token by token."""
    rng = np.random.default_rng(0)
    ids = rng.integers(FIRST, VOCAB, (4000, 40))
    masking = Masking(TOKENS)
    hidden = [masking([row[:15], row[15:]], np.random.default_rng([1, k])) for k, row in enumerate(ids)]
    return ids, np.array([shown for shown, _ in hidden]), np.array([targets for _, targets in hidden])


def test_targets_are_the_ids_where_they_are_hidden_and_the_rest_is_shown(many):
    ids, shown, targets = many
    assert (np.where(targets == IGNORE, ids, targets) == ids).all()
    assert (shown == ids)[targets == IGNORE].all()


def test_fifteen_in_a_hundred_tokens_are_hidden_at_every_place_alike(many):
    hidden = many[2] != IGNORE
    assert (hidden.sum(1) == 6).all()  # 15 % of 40
    for share in hidden.mean(0):
        within(share, 0.15, len(hidden))


def test_of_them_80_become_the_mask_10_another_token_10_stay(many):
    ids, shown, targets = many
    hidden = targets != IGNORE
    num = hidden.sum()
    another = hidden & (shown != MASK) & (shown != ids)
    within((shown == MASK).sum() / num, 0.8, num)
    within(another.sum() / num, 0.1 * 49 / 50, num)  # one draw in 50 meets the token itself
    within((hidden & (shown == ids)).sum() / num, 0.1 * 51 / 50, num)


def test_replacements_are_ordinary_tokens_each_as_often(many):
    ids, shown, targets = many
    drawn = shown[(targets != IGNORE) & (shown != MASK) & (shown != ids)]
    assert set(drawn) == set(range(FIRST, VOCAB))
    counts = np.bincount(drawn, minlength=VOCAB)[FIRST:]
    expected = len(drawn) / 50
    assert ((counts - expected) ** 2 / expected).sum() < 49 + 4.5 * 98**0.5


def test_what_becomes_of_a_token_is_drawn_for_each_by_itself(many):
    ids, shown, targets = many
    hidden = targets != IGNORE
    within((hidden & (shown == MASK)).sum(1).tolist().count(6) / len(ids), 0.8**6, len(ids))
    another = hidden & (shown != MASK) & (shown != ids)
    pairs = [row[where] for row, where in zip(shown, another, strict=True) if where.sum() == 2]
    within(np.mean([a == b for a, b in pairs]), 1 / 50, len(pairs))


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 6, 7, 13, 126])
def test_at_least_one_token_is_hidden_and_no_more_than_the_share(length, whole_words):
    masking, rng = Masking(TOKENS, whole_words=whole_words), np.random.default_rng(length)
    for _ in range(50):
        ids = rng.integers(FIRST, VOCAB, length)
        hidden = masking([ids], rng)[1] != IGNORE
        words = word_slices(ids, {0}) if whole_words else [slice(k, k + 1) for k in range(length)]
        num = sum(hidden[word].any() for word in words)
        assert num in {max(1, math.floor(0.15 * len(words))), math.ceil(0.15 * len(words))}


def word_slices(ids: np.ndarray, begins: set[int]) -> list[slice]:
    """Words of (T,) ids, where a word begins at some places and at each token that does not go on with one."""
    places = [k for k in range(len(ids)) if k in begins or ids[k] % 3 == 0]
    return [slice(a, b) for a, b in pairwise([*places, len(ids)])]


def test_whole_words_are_hidden_or_none_of_their_tokens():
    masking, rng = Masking(TOKENS, whole_words=True), np.random.default_rng(0)
    total = 0
    for _ in range(300):
        units = np.split(rng.integers(FIRST, VOCAB, 100), [30, 31, 70])
        hidden = masking(units, rng)[1] != IGNORE
        words = word_slices(np.concatenate(units), {0, 30, 31, 70})
        taken = [hidden[word].all() for word in words]
        assert taken == [hidden[word].any() for word in words]
        total += hidden.sum()
    assert 0.145 < total / (300 * 100) < 0.155


def words_of_lengths(lengths: list[int]) -> list[np.ndarray]:
    """A word of each length by TOKENS: multiples of 3 begin one."""
    return [np.array([12, *[13, 14, 16, 17, 19][: length - 1]]) for length in lengths]


@pytest.mark.parametrize(
    ("task", "whole_words"), [("mlm", True), ("mlm_sop", True), ("mlm_ict", True), ("mlm_sop", False)]
)
def test_words_of_every_length_are_hidden_alike_and_tokens_by_the_share(task, whole_words):
    """In rows of one segment and of two, of which one may be a sentence of two words."""
    lengths = [[1, 6], [3, 4, 2], [5, 1, 2, 6], [4, 3, 5]]
    units = [np.concatenate(words_of_lengths(of_unit)) for of_unit in lengths]
    rows = encoder_rows(task, Listed([units] * 100), 64)
    rows.masking = Masking(TOKENS, 0.15, whole_words)
    hidden, seen = np.zeros(7), np.zeros(7)
    for place in range(1000):
        sample = rows.sample(place)
        ids = restored(sample)[1:]
        word = np.where(
            ids == SEP, 0, np.cumsum(ids == 12)
        )  # 0: no word, and none has one token that is another's first
        sizes = np.bincount(word)[word] * (word > 0)
        seen += np.bincount(sizes, minlength=7)
        hidden += np.bincount(sizes, weights=sample.predicts[1:] != IGNORE, minlength=7)
    for size in range(1, 7):
        within(hidden[size] / seen[size], 0.15, seen[size] / (size if whole_words else 1))
    within(hidden.sum() / seen[1:].sum(), 0.15, seen[1:].sum() / (4 if whole_words else 1))


def test_in_every_row_the_hidden_tokens_are_nearly_the_share_whatever_its_words():
    """Words are taken at equal distances in the order of their lengths, so the sums of rows differ by two words at
    most; of words that are drawn in the order of the text they would have a standard deviation of about 12 tokens."""
    masking, rng = Masking(TOKENS, 0.15, whole_words=True), np.random.default_rng(0)
    for _ in range(200):
        words = np.repeat(np.arange(200), rng.integers(1, 9, 200))
        assert abs(masking.draw(words, rng).sum() - 0.15 * len(words)) <= 2 * 8


def test_a_word_does_not_go_on_in_the_next_sentence():
    """Some tokenizers put no space before the first word of a text."""
    units, masking = [np.array([12, 13]), np.array([13, 14])], Masking(TOKENS, 0.5, whole_words=True)
    hidden = {tuple(np.flatnonzero(masking(units, np.random.default_rng(k))[1] != IGNORE)) for k in range(20)}
    assert hidden == {(0, 1), (2, 3)}


def test_where_the_share_is_less_than_a_word_one_is_hidden_each_as_often():
    ids = np.array([12, 13, 13, 12, 13, 12, 13, 13, 13, 12, 14])  # words of 3, 2, 4 and 2 tokens
    masking, num = Masking(TOKENS, 0.05, whole_words=True), 2000
    hidden = Counter(
        tuple(np.flatnonzero(masking([ids], np.random.default_rng(k))[1] != IGNORE).tolist()) for k in range(num)
    )
    assert set(hidden) == {(0, 1, 2), (3, 4), (5, 6, 7, 8), (9, 10)}
    for count in hidden.values():
        within(count / num, 1 / 4, num)


def test_single_tokens_are_hidden_where_words_do_not_count(many):
    """Negative control: else a word's tokens would share their fate here too."""
    ids, _, targets = many
    split = [len(set((targets[k] != IGNORE)[word])) == 2 for k in range(100) for word in word_slices(ids[k], {0})]
    assert np.mean(split) > 0.2


# Tokenizers --------------------------------------------------------------------------------------------------------


def word_piece() -> PreTrainedTokenizerFast:
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused1]", "학교", "##에서", "##는", "집", "▁", "."]
    backend = Tokenizer(WordPiece({name: k for k, name in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    roles = {f"{role}_token": f"[{role.upper()}]" for role in ("unk", "pad", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's kind: no space before a text, and a piece that looks like one of WordPiece's."""
    letters = ["<mask>", "</s>", "a", "b", "#", "Ġ", "ab", "Ġa", "##"]
    merges = [("a", "b"), ("Ġ", "a"), ("#", "#")]
    backend = Tokenizer(BPE({name: k for k, name in enumerate(letters)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="<mask>", bos_token="</s>", eos_token="</s>")


def words_by(tokenizer, text: str) -> list[list[str]]:
    """Tokens of a text, grouped by which of them go on with a word."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    words: list[list[str]] = []
    for k, name in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True):
        if words and Tokens.of(tokenizer).continues[k]:
            words[-1].append(name)
        else:
            words.append([name])
    return words


def test_words_are_eojeol_where_tokens_mark_the_space_before_them():
    tokenizer = sample_tokenizer()
    text = "다시마는 물이 끓기 시작하면 바로 건져야 국물이 텁텁하지 않다."
    assert ["".join(word) for word in words_by(tokenizer, text)] == [f"▁{eojeol}" for eojeol in text.split()]
    assert max(map(len, words_by(tokenizer, text))) > 2


def test_words_are_those_of_word_piece_where_tokens_mark_that_they_go_on():
    assert words_by(word_piece(), "학교에서는 집") == [["학교", "##에서", "##는"], ["집"]]


def test_a_piece_of_two_hashes_does_not_make_a_byte_level_tokenizer_word_piece():
    assert words_by(byte_level(), "ab##b a") == [["ab", "##", "b"], ["Ġa"]]


def test_tokens_without_marks_are_words():
    assert not Tokens.of(with_mask(word_tokenizer(5))).continues.any()


def with_mask(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens({"mask_token": "<mask>", "bos_token": "<s>"})
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "cls", "sep", "ordinary"),
    [
        (word_piece, "[CLS]", "[SEP]", ["학교", "##에서", "##는", "집", "▁", "."]),
        (byte_level, "</s>", "</s>", ["a", "b", "#", "Ġ", "ab", "Ġa", "##"]),
    ],
)
def test_roles_and_which_tokens_are_drawn_as_replacement(tokenizer, cls, sep, ordinary):
    tokenizer = tokenizer()
    tokens = Tokens.of(tokenizer)
    assert tokenizer.convert_ids_to_tokens([tokens.framing.cls, tokens.framing.sep, tokens.mask]) == [
        cls,
        sep,
        tokenizer.mask_token,
    ]
    assert tokenizer.convert_ids_to_tokens(np.flatnonzero(~tokens.special).tolist()) == ordinary
    assert tokens.size == len(tokenizer)


def test_a_row_begins_with_the_first_of_a_text_where_there_is_no_cls():
    roles = {"cls_token_id": None, "sep_token_id": None, "bos_token_id": 3, "eos_token_id": 4, "name_or_path": "x"}
    assert Framing.of(SimpleNamespace(**roles)) == Framing(3, 4)
    assert Framing.of(SimpleNamespace(**roles | {"cls_token_id": 0, "sep_token_id": 1})) == Framing(0, 1)


def test_no_special_token_of_the_shipped_tokenizer_is_drawn_as_replacement():
    """Also those without a role, as <s>, <usr> and <sys>."""
    tokenizer = sample_tokenizer()
    drawn = np.flatnonzero(~Tokens.of(tokenizer).special)
    assert drawn.tolist() == list(range(107, len(tokenizer)))  # behind 7 special and 100 spare ones


def test_a_tokenizer_without_the_needed_tokens_is_refused():
    with pytest.raises(UserError, match="no mask token"):
        Tokens.of(word_tokenizer(5))
    tokenizer = word_tokenizer(5, specials=("<unk>", "<pad>"))
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    with pytest.raises(UserError, match=r"neither \[CLS\] and \[SEP\] nor"):
        Tokens.of(tokenizer)


# Frames and second objectives --------------------------------------------------------------------------------------


def samples(task: str, num: int = 2000) -> list[tuple[Sample, Units]]:
    """Rows and the chunks they were made of."""
    rows = encoder_rows(task)
    return [(rows.sample(place), rows.chunks[rows.order[place]]) for place in range(num)]


def check_hidden(sample: Sample) -> None:
    """Every row has a hidden token, no frame is one."""
    borders = np.flatnonzero(np.isin(restored(sample), [CLS, SEP]))
    assert (sample.predicts[borders] == IGNORE).all()
    assert (sample.predicts != IGNORE).any()


def test_a_row_is_its_chunk_between_cls_and_sep():
    for sample, units in samples("mlm", 300):
        assert restored(sample).tolist() == [CLS, *np.concatenate(units), SEP]
        assert sample.types.tolist() == [0] * len(sample.ids)
        assert (sample.swapped, sample.query) == (IGNORE, None)
        check_hidden(sample)


def test_segments_are_neighbours_in_the_order_that_the_label_tells():
    cuts, swaps = Counter(), []
    for sample, units in samples("mlm_sop"):
        check_hidden(sample)
        ids = restored(sample)
        ends = np.flatnonzero(ids == SEP)
        assert (ids[0], ids[-1]) == (CLS, SEP)
        if len(units) == 1:
            assert (ids[1:-1].tolist(), sample.swapped) == (units[0].tolist(), IGNORE)
            assert not sample.types.any()
            continue
        first, second = ids[1 : ends[0]].tolist(), ids[ends[0] + 1 : ends[1]].tolist()
        assert sample.types.tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 1)
        if sample.swapped == 1:
            first, second = second, first
        assert first + second == np.concatenate(units).tolist()
        at = np.cumsum([len(unit) for unit in units]).tolist().index(len(first))
        if len(units) == 4:
            cuts[at] += 1
        swaps.append(sample.swapped)
    assert set(swaps) == {0, 1}
    within(np.mean(swaps), 0.5, len(swaps))
    for at in range(3):
        within(cuts[at] / cuts.total(), 1 / 3, cuts.total())


def test_the_query_is_a_unit_that_one_passage_in_ten_keeps():
    taken, kept = Counter(), []
    for sample, units in samples("mlm_ict", 5000):
        check_hidden(sample)
        passage = restored(sample)[1:-1].tolist()
        assert not sample.types.any() and sample.swapped == IGNORE
        if len(units) == 1:
            assert (passage, sample.query) == (units[0].tolist(), None)
            continue
        assert (sample.query[0], sample.query[-1]) == (CLS, SEP)
        query = sample.query[1:-1].tolist()
        at = [unit.tolist() for unit in units].index(query)  # in its own words: nothing is hidden
        rest = np.concatenate(units[:at] + units[at + 1 :]).tolist()
        whole = np.concatenate(units).tolist()
        assert passage in (rest, whole)
        kept.append(passage == whole)
        if len(units) == 4:
            taken[at] += 1
    within(np.mean(kept), 0.1, len(kept))
    for at in range(4):
        within(taken[at] / taken.total(), 1 / 4, taken.total())


# Batches ---------------------------------------------------------------------------------------------------------

ONE = BatchSizes(8, 1, 1)


@pytest.mark.parametrize("task", TASKS)
def test_padding_comes_last_and_is_masked(task):
    rows = encoder_rows(task)
    (batch,) = rows.step(40, ONE, 0)
    expected = [rows.sample(place) for place in range(40, 48)]
    width = -(-max(len(sample.ids) for sample in expected) // 8) * 8
    for k, sample in enumerate(expected):
        zeros = [0] * (width - len(sample.ids))
        assert batch.inputs["input_ids"][k].tolist() == sample.ids.tolist() + zeros
        assert batch.inputs["token_type_ids"][k].tolist() == sample.types.tolist() + zeros
        assert batch.inputs["attention_mask"][k].tolist() == [1] * len(sample.ids) + zeros
    assert all(tensor.dtype == torch.int64 for name, tensor in batch.inputs.items() if name != "has_query")


@pytest.mark.parametrize("task", TASKS)
def test_targets_are_given_by_flat_place(task):
    (batch,) = encoder_rows(task).step(16, ONE, 0)
    expected = torch.full(batch.inputs["input_ids"].shape, IGNORE)
    for k in range(8):
        predicts = encoder_rows(task).sample(16 + k).predicts
        expected[k, : len(predicts)] = torch.from_numpy(predicts)
    found = torch.full_like(expected, IGNORE)
    found.view(-1)[batch.inputs["target_index"]] = batch.inputs["target_ids"]
    assert found.tolist() == expected.tolist()
    assert len(set(batch.inputs["target_index"].tolist())) == (expected != IGNORE).sum()


def test_queries_are_padded_beside_their_passages():
    rows = encoder_rows("mlm_ict")
    (batch,) = rows.step(0, ONE, 0)
    queries = [rows.sample(place).query for place in range(8)]
    assert batch.inputs["has_query"].tolist() == [query is not None for query in queries]
    assert {True, False} == set(batch.inputs["has_query"].tolist())
    for k, query in enumerate(queries):
        found = batch.inputs["query_ids"][k][batch.inputs["query_mask"][k].bool()].tolist()
        assert found == ([CLS, SEP] if query is None else query.tolist())
    ends = batch.inputs["query_mask"].sum(1)
    assert (batch.inputs["query_mask"] == (torch.arange(batch.inputs["query_ids"].shape[1]) < ends[:, None])).all()


def test_copies_of_a_passage_have_one_number():
    """It is that by which a copy is no negative (kozero/contrast.py)."""
    units = [np.array([11, 12]), np.array([13])]
    others = [[np.array([11]), np.array([13])], [np.array([11, 12]), np.array([14])], [np.array([10, 12]), units[1]]]
    rows = encoder_rows("mlm_ict", Listed([units, units, *others]))
    named = dict(zip(rows.numbers(range(5)).tolist(), rows.batch(range(5)).inputs["passage"].tolist(), strict=True))
    assert named[0] == named[1] and len(set(named.values())) == 4 and min(named.values()) >= 0
    assert rows.batch([ABSENT]).inputs["passage"].tolist() == [-1]


@pytest.mark.parametrize("router", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_the_numbers_of_targets_are_those_in_the_inputs(task, router):
    for batch in encoder_rows(task, router=router).step(8, BatchSizes(4, 4, 1), 0):
        inputs = batch.inputs
        expected = [len(inputs["target_ids"])]
        if task == "mlm_sop":
            expected.append(sum(label in (0, 1) for label in inputs["swapped"].tolist()))
        if task == "mlm_ict":
            expected.append(sum(inputs["has_query"].tolist()))
        masks = [inputs[name] for name in ("attention_mask", "query_mask") if name in inputs]
        expected += [sum(sum(map(sum, mask.tolist())) for mask in masks)] * 2 if router else []
        assert batch.num_targets == tuple(expected)


@pytest.mark.parametrize("most", [13, 16, 21])
@pytest.mark.parametrize("task", TASKS)
def test_no_row_is_longer_than_allowed(task, most):
    """A model may have no more positions than that, also where they are no multiple of 8."""
    special = 3 if task == "mlm_sop" else 2
    full = Listed([[np.full(most - special - 1, 11), np.full(1, 12)]] * 9)
    (batch,) = encoder_rows(task, full, most).step(0, ONE, 0)
    assert batch.inputs["input_ids"].shape == (8, most)
    (batch,) = encoder_rows(task, Listed([[np.full(most - 2, 11)]] * 9), most).step(0, ONE, 0)
    assert batch.inputs["input_ids"].shape == (8, most)
    if task == "mlm_ict":
        assert batch.inputs["query_ids"].shape[1] <= most


def test_rows_are_padded_by_hand():
    filled, mask = padded([np.array([5, 6]), np.array([7] * 9)], 12, IGNORE)
    assert filled.tolist() == [[5, 6] + [IGNORE] * 10, [7] * 9 + [IGNORE] * 3]
    assert mask.tolist() == [[1, 1] + [0] * 10, [1] * 9 + [0] * 3]


# Streams ---------------------------------------------------------------------------------------------------------

SPLITS = [(8, 1, 1), (4, 2, 1), (1, 8, 1), (4, 1, 2), (2, 2, 2), (1, 4, 2), (2, 1, 4), (1, 1, 8)]


def unpadded(batch: Batch) -> list[tuple]:
    """Each row of a batch without its padding: ids, types, targets at their places, the second objective's part."""
    inputs = {name: tensor.numpy() for name, tensor in batch.inputs.items()}
    predicts = np.full(inputs["input_ids"].shape, IGNORE)
    predicts.ravel()[inputs["target_index"]] = inputs["target_ids"]
    rows = []
    for k, mask in enumerate(inputs["attention_mask"].astype(bool)):
        firsts = [of[k][mask].tolist() for of in (inputs["input_ids"], inputs["token_type_ids"], predicts)]
        second = inputs["swapped"][k] if "swapped" in inputs else None
        if "has_query" in inputs:
            second = inputs["has_query"][k], inputs["query_ids"][k][inputs["query_mask"][k] == 1].tolist()
        rows.append((*firsts, second))
    return rows


def dealt(rows, consumed: int, split: tuple[int, int, int], look) -> list:
    """The rows of a step in the order of the stream: round by round over the ranks."""
    sizes = BatchSizes(*split)
    ranks = [rows.step(consumed, sizes, rank) for rank in range(sizes.world_size)]
    assert all(len(batches) == sizes.accumulation for batches in ranks)
    return [row for batches in zip(*ranks, strict=True) for batch in batches for row in look(batch)]


@pytest.mark.parametrize("task", TASKS)
def test_rows_do_not_depend_on_how_they_are_dealt(task):
    expected = dealt(encoder_rows(task), 296, SPLITS[0], unpadded)  # over the edge of an epoch of 300
    for split in SPLITS[1:]:
        assert dealt(encoder_rows(task), 296, split, unpadded) == expected


@pytest.mark.parametrize("task", TASKS)
def test_a_row_is_a_function_of_seed_and_place(task):
    came, resumed = encoder_rows(task), encoder_rows(task)
    history = [dealt(came, consumed, (8, 1, 1), unpadded) for consumed in range(0, 320, 8)]
    assert dealt(resumed, 304, (8, 1, 1), unpadded) == history[38]
    assert dealt(came, 0, (8, 1, 1), unpadded) == history[0]
    assert dealt(encoder_rows(task, seed=4), 0, (8, 1, 1), unpadded) != history[0]


def test_a_row_is_hidden_otherwise_in_each_epoch_and_run():
    runs = [encoder_rows("mlm", Listed([[np.arange(FIRST, 40)]]), seed=seed) for seed in (3, 4)]
    assert len({tuple(rows.sample(place).predicts) for rows in runs for place in range(20)}) == 40


@pytest.mark.parametrize("task", TASKS)
def test_tokens_of_a_step_are_those_of_the_corpus_over_all_ranks(task):
    rows, sizes = encoder_rows(task, router=True), BatchSizes(2, 2, 2)
    batches = [batch for rank in (0, 1) for batch in rows.step(24, sizes, rank)]
    expected = sum(len(token) for place in range(24, 32) for token in rows.chunks[rows.order[place]])
    assert rows.num_tokens(24, 8) == sum(batch.num_tokens for batch in batches) == expected
    if task != "mlm_ict":  # which moves some of them to the queries
        frames = sum((np.isin(restored(rows.sample(place)), [CLS, SEP])).sum() for place in range(24, 32))
        assert expected == sum(int(batch.inputs["attention_mask"].sum()) for batch in batches) - frames


# Blocks of a stream ------------------------------------------------------------------------------------------------


def block_rows(documents: list[list[int]], size: int) -> BlockRows:
    places = np.cumsum([0, *map(len, documents)])
    shard = Shard(None, np.concatenate(documents).astype(np.uint16), places, np.arange(len(documents) + 1))
    blocks = Numbered([Blocks(shard, size, SEP, 0)], held_out=False)
    return BlockRows(blocks, Order(len(blocks), len(blocks), 8, 3, blocks.lengths), size)


def test_blocks_lie_in_rows_as_written_here():
    """11 12 13 14 15 / 21 / 31 32 in blocks of 4: S 11 12 13 | 14 15 S 21 | S 31 32."""
    rows = block_rows([[11, 12, 13, 14, 15], [21], [31, 32]], 4)
    rows.order = [0, 1, 2]  # as in the stream
    batch = rows.batch([0, 1, 2])
    assert batch.inputs["input_ids"].tolist() == [[SEP, 11, 12, 13], [14, 15, SEP, 21], [SEP, 31, 32, 0]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 0, 1], [0, 1, 2, 3]]
    assert batch.inputs["target_index"].tolist() == list(range(11))
    assert batch.inputs["target_ids"].tolist() == [11, 12, 13, 14, 15, SEP, 21, SEP, 31, 32, SEP]
    assert batch.texts.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    assert (batch.num_targets, batch.num_tokens) == ((11,), 11)
    assert rows.num_tokens(0, 3) == 11


def packed(batch: Batch) -> list[tuple]:
    """Each row of a packed batch: ids, positions, targets at their places."""
    inputs = {name: tensor.numpy() for name, tensor in batch.inputs.items()}
    predicts = np.full(inputs["input_ids"].shape, IGNORE)
    predicts.ravel()[inputs["target_index"]] = inputs["target_ids"]
    rows = zip(inputs["input_ids"], inputs["position_ids"], predicts, strict=True)
    return [tuple(part.tolist() for part in row) for row in rows]


def test_blocks_do_not_depend_on_how_they_are_dealt():
    rng = np.random.default_rng(0)
    documents = [rng.integers(FIRST, VOCAB, n).tolist() for n in rng.integers(1, 30, 40)]

    def rows() -> BlockRows:
        return block_rows(documents, 12)

    edge = len(rows()) - 3  # a step over the edge of an epoch
    expected = dealt(rows(), edge, SPLITS[0], packed)
    assert all(dealt(rows(), edge, split, packed) == expected for split in SPLITS[1:])
    everything = dealt(rows(), 0, (len(rows()), 1, 1), packed)
    targets = [target for _, _, predicts in everything for target in predicts if target != IGNORE]
    assert len(targets) == sum(map(len, documents)) + len(documents)  # of each document all tokens, and S
    assert {len(ids) for ids, _, _ in everything} == {12}
    batches = [batch for rank in (0, 1) for batch in rows().step(8, BatchSizes(2, 2, 2), rank)]
    assert rows().num_tokens(8, 8) == sum(batch.num_tokens for batch in batches)
