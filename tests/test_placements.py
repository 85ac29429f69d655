"""Where pauses go. The reference: what is predicted from where is written out token by token by another rule, and the
places of each placement by hand."""

from functools import partial

import numpy as np
import pytest

from kozero.config import BatchSizes
from kozero.data.batches import Prefixes, TrainingRows, collate
from kozero.data.marks import MARKERS, token_marks
from kozero.data.store import TextRow, open_or_build
from kozero.pause import BY_TEXT, IGNORE, PLACEMENTS, Pauses, begins_inside, filler_id, insert, random_gaps, schedule
from tests.helpers import MemoryStore, numbered_store, sample_tokenizer

PAUSE = 7
PREFIX = np.array([11, 12, 13, 14, 15])
TARGET = np.array([21, 22, 1])
MARKS = np.array([0, 2, 3])
TEXT = "헛수고를 한 맨손의 초등학생. 그는 새하얀 눈을 보았다.\n\n둘째 문단입니다."


def reference(ids: list[int], targets: list[int], gaps: list[int], first: int) -> list[tuple[int, int]]:
    """(token, what it predicts) one by one: a pause predicts what stands behind it, unless that is a pause; so does a
    token, and what is to be predicted goes with the token that is predicted."""
    before = dict(enumerate([first, *targets]))  # token k of the sequence is to be predicted as before[k]
    slots = []  # (id, is pause, number of the next real token)
    for k in range(len(ids) + 1):
        slots += [(PAUSE, True, k)] * gaps[k]
        slots += [(ids[k], False, k + 1)] if k < len(ids) else []
    found = []
    for k, (token, _, following) in enumerate(slots):
        pause_next = k + 1 < len(slots) and slots[k + 1][1]
        found.append((token, IGNORE if pause_next else before[following]))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_insertion_is_the_papers_rule_token_by_token(seed):
    """Section 3.1: where the next token is a pause there is no loss; a pause before a real token predicts it."""
    rng = np.random.default_rng(seed)
    ids, gaps = rng.integers(10, 99, 6), rng.integers(0, 3, 7)
    targets = np.where(rng.random(6) < 0.7, np.append(ids[1:], 99), IGNORE)
    found = insert(ids, targets, gaps, PAUSE, int(ids[0]))
    expected = reference(ids.tolist(), targets.tolist(), gaps.tolist(), int(ids[0]))
    assert list(zip(*(part.tolist() for part in found), strict=True)) == expected


@pytest.mark.parametrize(
    ("placement", "num", "prompt"),
    [
        ("append", 2, [11, 12, 13, 14, 15, PAUSE, PAUSE]),
        ("filler", 2, [11, 12, 13, 14, 15, PAUSE, PAUSE]),
        ("prepend", 2, [PAUSE, PAUSE, 11, 12, 13, 14, 15]),
        ("sentence", 1, [PAUSE, 11, 12, 13, 14, 15]),
        ("sentence", 2, [PAUSE, 11, 12, PAUSE, 13, 14, 15]),  # evenly spaced marks, rounded down
        ("sentence", 3, [PAUSE, 11, 12, PAUSE, 13, PAUSE, 14, 15]),
        ("before_prefix", 4, [PAUSE, PAUSE, 11, 12, PAUSE, 13, PAUSE, 14, 15]),  # the first mark takes what is left
        ("least_confident", 2, [PAUSE, 11, 12, PAUSE, 13, 14, 15]),
        ("least_confident", 0, [11, 12, 13, 14, 15]),
    ],
)
def test_places_by_hand(placement, num, prompt):
    assert Pauses(PAUSE, num, placement).prompt(PREFIX, MARKS).tolist() == prompt


def test_least_confident_places_are_taken_in_their_order():
    pauses = Pauses(PAUSE, 2, "least_confident")
    assert pauses.prompt(PREFIX, np.array([4, 1, 2])).tolist() == [11, PAUSE, 12, 13, 14, PAUSE, 15]


@pytest.mark.parametrize("placement", BY_TEXT)
def test_a_text_without_a_place_has_its_pauses_behind_it(placement):
    assert Pauses(PAUSE, 2, placement).prompt(PREFIX, np.array([])).tolist() == [11, 12, 13, 14, 15, PAUSE, PAUSE]


@pytest.mark.parametrize("num", [0, 1, 3, 10])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_obeys_the_law(placement, num):
    """Without its pauses the sequence is the plain one, and each target token is predicted once, from the position
    before it; no pause is in the target, and the prompt is the head of the training sequence."""
    pauses = Pauses(PAUSE, num, placement)
    ids, predicts = pauses.sequence(PREFIX, TARGET, MARKS)
    assert len(ids) == len(PREFIX) + num + len(TARGET)
    assert ids[ids != PAUSE].tolist() == [*PREFIX, *TARGET]
    assert ids[-len(TARGET) :].tolist() == TARGET.tolist()
    assert pauses.prompt(PREFIX, MARKS).tolist() == ids[: -len(TARGET)].tolist()
    assert predicts[predicts != IGNORE].tolist() == TARGET.tolist()
    assert np.flatnonzero(predicts != IGNORE).tolist() == [len(ids) - 4, len(ids) - 3, len(ids) - 2]


def test_random_places_are_all_equally_likely():
    """Chi-square over the 21 ways of 2 pauses among 5 tokens; 45.3 is its 99.9th percentile at 20 degrees."""
    rng, counts = np.random.default_rng(0), {}
    for _ in range(4200):
        key = tuple(random_gaps(5, 2, rng).tolist())
        counts[key] = counts.get(key, 0) + 1
    assert len(counts) == 21 and sum((count - 200) ** 2 / 200 for count in counts.values()) < 45.3


def test_random_places_depend_on_the_text_the_seed_and_the_epoch_alone():
    places = lambda prefix, seed, epoch: tuple(Pauses(PAUSE, 4, "random", None, seed).gaps(prefix, None, epoch))  # noqa: E731
    long = np.arange(100, 140)
    assert places(long, 0, 0) == places(long.astype(np.uint16), 0, 0)
    assert len({places(long, 0, 0), places(long, 1, 0), places(long, 0, 1), places(long + 1, 0, 0)}) == 4


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_at_the_limit_of_1024_positions_the_question_the_pauses_and_the_answer_stay(tmp_path, placement):
    """A passage that is too long loses text, and nothing else does; positions end at 1,023."""
    tokenizer, num, limit = sample_tokenizer(), 20, 1024
    passage = "문맥: " + " ".join([TEXT.replace("\n\n", " ")] * 60)
    question, answer, place = "질문: 무엇을 보았나? 정답:", "새하얀 눈", passage.rindex("새하얀 눈")
    row = TextRow(passage, question, answer, (place, place + len(answer)))
    marker = partial(token_marks, placement) if placement in MARKERS else None
    store = open_or_build(tmp_path, "limit", lambda: [row], tokenizer, marker=marker)
    assert store.lengths[0, 0] > limit
    ranked = np.arange(30, 30 + num)[None] if placement == "least_confident" else None
    rows = TrainingRows(store, Pauses(PAUSE, num, placement), limit, "packed", 0, ranked=ranked)
    (text,) = rows.texts(0)
    assert len(text.ids) == limit and (text.ids == PAUSE).sum() == num
    written = tokenizer(f" {answer}", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    kept = text.ids[text.ids != PAUSE]
    assert tokenizer.decode(kept).endswith(f"{question} {answer}</s>")
    assert tokenizer.decode(kept[: -len(written)]).count(answer) >= 1, "the answer is still in what is left of it"
    assert text.ids[-len(written) :].tolist() == written
    assert text.predicts[text.predicts != IGNORE].tolist() == written
    inputs = collate([[text]]).inputs
    assert inputs["position_ids"].max() == limit - 1 and inputs["input_ids"].shape == (1, limit)


# Characters ------------------------------------------------------------------------------------------------------


def byte_tokenizer():
    """Byte-level BPE without merges: every Hangul syllable is three tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: k for k, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_no_placement_splits_a_syllable(placement):
    """What stands between two pauses decodes to whole characters."""
    tokenizer = byte_tokenizer()
    ids = np.asarray(tokenizer.encode("한글 abc 뷁"))
    assert len(ids) == 3 * 3 + 5
    pauses = Pauses(999, 6, placement, begins_inside(tokenizer), seed=1)
    for marks in (np.arange(len(ids)), np.array([1, 2, 13])):
        prompt = pauses.prompt(ids, marks)
        pieces = np.split(prompt, np.flatnonzero(prompt == 999))
        texts = [tokenizer.decode(piece[piece != 999].tolist()) for piece in pieces]
        assert "".join(texts) == "한글 abc 뷁" and "\ufffd" not in "".join(texts)


def test_tokens_that_begin_within_a_character():
    tokenizer = byte_tokenizer()
    inside = begins_inside(tokenizer)
    by_bytes = [0x80 <= byte < 0xC0 for byte in "한 a".encode()]
    assert inside[tokenizer.encode("한 a")].tolist() == by_bytes == [False, True, True, False, False]
    assert not begins_inside(sample_tokenizer()).any()


# Marks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("placement", "marked"),
    [
        ("before_prefix", "|▁헛 수 고 를 ▁한 |▁맨 손 의 |▁초 등학생 . ▁그는 |▁새"),
        ("after_prefix", "▁헛 |수 고 를 ▁한 ▁맨 |손 의 ▁초 |등학생 . ▁그는 ▁새"),
        ("before_xpn", "|▁헛 수 고 를 ▁한 |▁맨 손 의 ▁초 등학생 . ▁그는 ▁새"),
        ("after_xpn", "▁헛 |수 고 를 ▁한 ▁맨 |손 의 ▁초 등학생 . ▁그는 ▁새"),
        ("sentence", "|▁헛 수 고 를 ▁한 ▁맨 손 의 ▁초 등학생 . |▁그는 ▁새"),
        ("paragraph", "|▁헛 수 고 를 ▁한 ▁맨 손 의 ▁초 등학생 . ▁그는 ▁새"),
    ],
)
def test_marks_of_a_sentence(placement, marked):
    tokenizer = sample_tokenizer()
    found = tokenizer(TEXT, add_special_tokens=False, return_offsets_mapping=True)
    marks = set(token_marks(placement, TEXT, np.array(found["offset_mapping"])).tolist())
    names = tokenizer.convert_ids_to_tokens(found["input_ids"])[: len(marked.split())]
    assert " ".join("|" * (k in marks) + name for k, name in enumerate(names)) == marked


def test_a_new_paragraph_is_marked():
    offsets = np.array([(k, k + 1) for k in range(len(TEXT))])
    assert token_marks("paragraph", TEXT, offsets).tolist() == [0, TEXT.index("둘")]
    assert token_marks("sentence", TEXT, offsets).tolist() == [0, TEXT.index("그는"), TEXT.index("둘")]


@pytest.mark.parametrize("place", [1, 5, TEXT.index("둘"), len(TEXT)])
def test_a_token_without_characters_moves_the_marks_behind_it_and_no_other(place):
    """As special tokens are given in a tokenizer's offsets: (0, 0), wherever they stand."""
    offsets = [(k, k + 1) for k in range(len(TEXT))]
    offsets.insert(place, (0, 0))
    second = TEXT.index("둘") + (place <= TEXT.index("둘"))
    assert token_marks("paragraph", TEXT, np.array(offsets)).tolist() == [0, second]


@pytest.mark.parametrize("placement", MARKERS)
def test_an_empty_text_has_no_mark(placement):
    assert len(token_marks(placement, "", np.zeros((0, 2), dtype=np.int64))) == 0


def test_marks_follow_the_cut_of_a_context():
    """Context of 8, prompt of 2; tokens 3 to 6 of the context are kept."""
    store = MemoryStore([(range(30, 38), [11, 12], [21])], marks=[[0, 3, 5, 6, 8, 9]])
    prefixes = Prefixes(store, np.array([[3, 6]]))
    assert prefixes.parts(0)[0].tolist() == [33, 34, 35, 11, 12]
    assert prefixes.marks(0).tolist() == [0, 2, 3, 4]
    prompt = prefixes.prompt(0, Pauses(PAUSE, 4, "sentence"))
    assert prompt.tolist() == [PAUSE, 33, 34, PAUSE, 35, PAUSE, 11, PAUSE, 12]


# How many --------------------------------------------------------------------------------------------------------


def test_a_curriculum_grows_from_none_to_all_in_the_first_half():
    numbers = [schedule("curriculum", 4, 0, 100)(consumed) for consumed in range(0, 100, 5)]
    assert numbers == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4] + [4] * 10


def test_a_sampled_number_is_any_from_none_to_all_and_is_that_of_its_step():
    draw = schedule("sampled", 3, 5, 0)
    numbers = [draw(consumed) for consumed in range(0, 800, 2)]
    assert numbers == [draw(consumed) for consumed in range(0, 800, 2)]
    assert all(70 < numbers.count(num) < 130 for num in range(4))  # 100 each, standard deviation 8.7


@pytest.mark.parametrize("batching", ["packed", "grouped"])
def test_a_step_has_the_number_of_its_schedule(batching):
    rows = TrainingRows(numbered_store(60), Pauses(PAUSE, 3), 24, batching, 0, schedule("curriculum", 3, 0, 40))
    sizes = BatchSizes(4, 1, 1)
    for consumed, num in ((0, 0), (8, 1), (16, 3), (36, 3)):
        (batch,) = rows.step(consumed, sizes, 0)
        numbers = [rows.row_at(consumed + k, 4) for k in range(4)]
        texts = sum(len(rows.rows[number]) for number in numbers)
        assert (batch.inputs["input_ids"] == PAUSE).sum() - pauses_in(rows.store, rows, numbers) == num * texts
        assert rows.num_tokens(consumed, 4) == batch.num_tokens


def test_random_places_of_a_text_are_others_in_the_next_epoch():
    texts = [([], range(10, 40), [50])] * 3  # one example a row
    rows = TrainingRows(MemoryStore(texts), Pauses(PAUSE, 2, "random"), 34, "packed", 0)
    sizes = BatchSizes(3, 1, 1)
    epochs = [rows.step(consumed, sizes, 0)[0].inputs["input_ids"].tolist() for consumed in (0, 3, 3)]
    assert epochs[1] == epochs[2]
    assert not {tuple(row) for row in epochs[0]} & {tuple(row) for row in epochs[1]}


def pauses_in(store: MemoryStore, rows: TrainingRows, numbers: list[int]) -> int:
    """Tokens of the texts themselves that have the id of the pause."""
    prefixes = Prefixes(store, rows.fit.cut)
    return sum((np.concatenate(prefixes.parts(int(n))) == PAUSE).sum() for number in numbers for n in rows.rows[number])


def test_the_filler_is_a_full_stop():
    tokenizer = sample_tokenizer()
    assert tokenizer.decode([filler_id(tokenizer)]).strip() == "."
