"""Windows on passages and answers found in them, against plain loops over tokens and spans."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from finetune.arguments import ReadingArguments
from finetune.data import read
from finetune.questions import QuestionSet, QuestionStore, open_questions, question_set, text_of, write_store
from finetune.reading import Reading, SpanReader, best_spans
from finetune.tasks import ENCODER_TASKS, Example, Source
from finetune.windows import Windows, WindowSize
from kozero import distributed
from kozero.config import BatchSizes
from kozero.data.framing import Framing
from kozero.data.readers import LeftOut
from kozero.errors import UserError
from models.heads import ROUTER_WEIGHTS
from tests.helpers import SAMPLE_DATA, sample_tokenizer, word_tokenizer

MRC = ENCODER_TASKS["mrc"]
TRAIN, DEV = (SAMPLE_DATA / name for name in MRC.sample_files)
FRAMING = Framing(1, 2)


@pytest.fixture(scope="module", autouse=True)
def process_group():
    distributed.setup()
    yield
    distributed.shutdown()


class Questions(QuestionStore):
    """Given lengths and answers: the tokens of a passage are 100, 101, ..., those of a question 50, 51, ..."""

    def __init__(self, passages: list[int], questions: list[tuple[int, int]], answers: list[tuple[int, int]]) -> None:
        self.passage_tokens = np.concatenate([np.arange(100, 100 + n) for n in passages])
        self.passage_ends = np.cumsum([0, *passages])
        self.question_tokens = np.concatenate([np.arange(50, 50 + n) for n, _ in questions])
        self.question_ends = np.cumsum([0, *(n for n, _ in questions)])
        self.answers = np.array([(p, *span) for (_, p), span in zip(questions, answers, strict=True)])
        self.spelled = 1.0
        self.offsets = np.concatenate([np.stack([np.arange(n) * 3, np.arange(n) * 3 + 2], 1) for n in passages])


def random_questions(num: int = 40) -> Questions:
    rng = np.random.default_rng(0)
    passages = rng.integers(1, 90, 15).tolist()
    questions = [(int(rng.integers(1, 14)), int(rng.integers(15))) for _ in range(num)]
    firsts = [int(rng.integers(passages[p])) for _, p in questions]
    lasts = [min(passages[p], first + int(rng.integers(1, 6))) for (_, p), first in zip(questions, firsts, strict=True)]
    return Questions(passages, questions, list(zip(firsts, lasts, strict=True)))


def by_hand(store: QuestionStore, capacity: int, stride: int, most_query: int) -> list[dict]:
    """Every window's row, token by token, as the loop of BERT's SQuAD code makes them."""
    rows = []
    for question, (passage, first, last) in enumerate(store.answers.tolist()):
        query = store.question(question).tolist()[:most_query]
        tokens = store.passage(passage).tolist()
        start = 0
        while True:
            length = min(len(tokens) - start, capacity - len(query) - 3)
            ids = [1, *query, 2, *tokens[start : start + length], 2]
            types = [0] * (len(query) + 2) + [1] * (length + 1)
            target = (0, 0)
            if start <= first and last <= start + length:
                target = (len(query) + 2 + first - start, len(query) + 2 + last - 1 - start)
            rows.append({"question": question, "start": start, "ids": ids, "types": types, "target": target})
            if start + length == len(tokens):
                break
            start += min(length, stride)
    return rows


@pytest.mark.parametrize(("capacity", "stride", "most_query"), [(32, 7, 10), (24, 11, 10), (40, 1, 5), (120, 64, 64)])
def test_windows_are_those_of_a_plain_loop(capacity, stride, most_query):
    store = random_questions()
    windows = Windows(store, WindowSize(capacity, stride, most_query), np.arange(store.num_questions))
    wanted = by_hand(store, capacity, stride, most_query)
    assert len(windows) == len(wanted)
    for k, row in enumerate(wanted):
        ids, types = windows.row(k, FRAMING)
        assert (ids.tolist(), types.tolist()) == (row["ids"], row["types"])
        assert (windows.question[k], windows.first[k], windows.lengths[k]) == (
            row["question"],
            row["start"],
            len(row["ids"]),
        )
        assert tuple(windows.targets[k]) == row["target"]
    assert (capacity == 120) == (len(wanted) == store.num_questions)


def test_every_token_of_a_passage_is_in_a_window_and_windows_begin_a_stride_apart():
    store = random_questions()
    windows = Windows(store, WindowSize(32, 9, 10), np.arange(store.num_questions))
    for question in range(store.num_questions):
        mine = windows.question == question
        seen = {t for a, b in zip(windows.first[mine], windows.last[mine], strict=True) for t in range(a, b)}
        assert seen == set(range(store.passage_lengths[store.answers[question, 0]]))
        assert set(np.diff(windows.first[mine]).tolist()) <= {9}


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """The sample questions that train, tokenised by the sample tokenizer, and their examples."""
    store = open_questions(Source(TRAIN), MRC, 0, sample_tokenizer(), str(tmp_path_factory.mktemp("cache")))
    return store, list(read(Source(TRAIN), MRC, LeftOut()))


def test_positions_lead_back_to_the_very_answer(sample):
    store, examples = sample
    windows = Windows(store, WindowSize(64, 20, 16), np.arange(store.num_questions))
    found = 0
    for k in np.flatnonzero(windows.targets[:, 0]):
        example = examples[windows.question[k]]
        ids, _ = windows.row(k, FRAMING)
        first, last = (int(p - windows.begins[k] + windows.first[k]) for p in windows.targets[k])
        offsets = store.offsets_of(int(store.answers[windows.question[k], 0]))
        text = text_of(example.context, offsets, first, last + 1)
        answer = example.targets[0]
        assert answer in text and answer not in (
            text_of(example.context, offsets, first + 1, last + 1),
            text_of(example.context, offsets, first, last),
        )
        if text == answer:
            found += 1
            pointed = ids[windows.targets[k, 0] : windows.targets[k, 1] + 1]
            assert sample_tokenizer().decode(pointed.tolist()).strip() == answer
    assert found > 300


def test_a_passage_is_tokenised_once_however_many_questions_it_has(sample):
    store, examples = sample
    contexts = list(dict.fromkeys(example.context for example in examples))
    assert (store.num_questions, store.num_passages) == (240, len(contexts))
    for k in (0, 17, 239):
        passage, question = contexts[store.answers[k, 0]], examples[k].prompt
        assert passage == examples[k].context
        encode = sample_tokenizer().encode
        assert store.passage(int(store.answers[k, 0])).tolist() == encode(passage, add_special_tokens=False)
        assert store.question(k).tolist() == encode(question, add_special_tokens=False)


def test_a_store_is_built_once_and_a_damaged_one_again(sample, tmp_path, monkeypatch):
    store, _ = sample
    cache = str(store.folder.parent)
    with monkeypatch.context() as patch:
        patch.setattr("finetune.questions.write_store", lambda *_: pytest.fail("built twice"))
        again = open_questions(Source(TRAIN), MRC, 0, sample_tokenizer(), cache)
    assert again.folder == store.folder
    damaged = open_questions(Source(TRAIN), MRC, 0, sample_tokenizer(), str(tmp_path))
    (damaged.folder / "answers.npy").write_bytes(b"")
    assert np.array_equal(
        open_questions(Source(TRAIN), MRC, 0, sample_tokenizer(), str(tmp_path)).answers, store.answers
    )


def test_the_store_counts_the_answers_that_whole_tokens_match(tmp_path):
    """Of several answers to a question the first one counts."""
    context = "w1 w2 w3"
    answers = [
        (("w2", "2"), (3, 5)),
        (("w3",), (6, 8)),
        (("2", "w2"), (4, 5)),
        (("w1", "1"), (0, 2)),
    ]  # "w2" is a token
    examples = [Example(str(k), "", context, "w4", texts, 0, span) for k, (texts, span) in enumerate(answers)]
    write_store(lambda: examples, word_tokenizer(9), list, tmp_path)
    assert QuestionStore(tmp_path).spelled == 0.75


# Spans -------------------------------------------------------------------------------------------------------------


def all_spans(logits: torch.Tensor, max_length: int) -> list[tuple[float, int, int]]:
    """Every span of a row by its score, the best first."""
    begin, end = logits.tolist()
    spans = [
        (begin[i] + end[j] - begin[0] - end[0], i, j)
        for i in range(1, len(begin))
        for j in range(i, min(len(begin), i + max_length))
    ]
    return sorted((span for span in spans if span[0] > -torch.inf), reverse=True)


@pytest.mark.parametrize(("num", "max_length"), [(1, 1), (5, 4), (5, 20), (500, 3)])
def test_the_best_spans_are_the_best_of_all(num, max_length):
    logits = torch.randn(6, 2, 12, generator=torch.Generator().manual_seed(0))
    for row, (begin, end) in enumerate([(3, 12), (1, 4), (5, 6), (11, 12), (2, 10), (1, 12)]):
        outside = [p for p in range(1, 12) if not begin <= p < end]
        logits[row][:, outside] = -torch.inf
    scores, first, last = best_spans(logits, num, max_length)
    assert scores.shape == first.shape == last.shape == (6, num)
    for row in range(6):
        wanted = all_spans(logits[row], max_length)[:num]
        found = [(s.item(), i.item(), j.item()) for s, i, j in zip(scores[row], first[row], last[row], strict=True)]
        found = [span for span in found if span[0] > -torch.inf]
        assert [span[1:] for span in found] == [span[1:] for span in wanted]
        assert [span[0] for span in found] == pytest.approx([span[0] for span in wanted], abs=1e-5)


class FixedLogits(nn.Module):
    """Stands for a trained reader: the logits of a window follow from the tokens that it reads. High ones where `right`
    says so, noise elsewhere, and another constant for each window, which the loss leaves open."""

    def __init__(self, windows: Windows, right: dict[int, tuple[int, int]], noise: float = 1.0) -> None:
        super().__init__()
        self.rng = torch.Generator().manual_seed(0)
        self.noise, self.constant = noise, 0.0
        self.lookup = {}
        for k in range(len(windows)):
            places = tuple(windows.targets[k]) if windows.question[k] in right else (0, 0)
            self.lookup[tuple(windows.row(k, Framing(1, 1))[0].tolist())] = places

    def forward(self, input_ids, attention_mask, token_type_ids, window):
        logits = self.noise * torch.rand(len(input_ids), 2, input_ids.shape[1], generator=self.rng)
        for row, (ids, mask) in enumerate(zip(input_ids.tolist(), attention_mask.tolist(), strict=True)):
            first, last = self.lookup[tuple(ids[: sum(mask)])]
            logits[row, 0, first] += 10
            logits[row, 1, last] += 10
            self.constant += 7
            logits[row] += self.constant
        places = torch.arange(input_ids.shape[1])
        outside = ((places < window[:, :1]) | (places >= window[:, 1:])) & (places > 0)
        return logits.masked_fill(outside[:, None], -torch.inf)


def engine_of(module: nn.Module) -> SimpleNamespace:
    """An engine that can do nothing but evaluate."""

    @contextmanager
    def evaluating():
        with torch.no_grad():
            yield module

    return SimpleNamespace(evaluating=evaluating, module=module)


@pytest.fixture(scope="module")
def dev(tmp_path_factory) -> QuestionSet:
    return question_set(Source(DEV), MRC, 0, sample_tokenizer(), str(tmp_path_factory.mktemp("cache")))


def test_two_questions_of_one_id_are_refused_for_one_answer_would_be_lost(tmp_path):
    whole = json.loads(DEV.read_text(encoding="utf-8"))
    first, second = (question for part in whole["data"][0]["paragraphs"] for question in part["qas"][:1])
    second["id"] = first["id"]
    path = tmp_path / "dev.json"
    path.write_text(json.dumps(whole), encoding="utf-8")
    with pytest.raises(UserError, match=rf"{path}: 2 questions have the id '{first['id']}'; give each its own"):
        question_set(Source(path), MRC, 0, sample_tokenizer(), str(tmp_path))


def test_right_spans_with_the_highest_logits_score_in_full(dev):
    reading = Reading(ReadingArguments(doc_stride=24, max_query_length=24), Framing(1, 1), 64)
    windows = Windows(dev.store, reading.size, dev.numbers)
    assert len(windows) > 2 * len(dev.examples)
    found = reading.score(engine_of(FixedLogits(windows, dict.fromkeys(range(50)))), dev, 4)
    whole = [
        text_of(e.context, dev.store.offsets_of(int(p)), int(a), int(b))
        for e, (p, a, b) in zip(dev.examples, dev.store.answers, strict=True)
    ]
    assert found.files["predictions"] == {e.id: text for e, text in zip(dev.examples, whole, strict=True)}
    exact = [text == example.targets[0] for text, example in zip(whole, dev.examples, strict=True)]
    assert 100 * np.mean(exact) <= found.values["exact_match"] < 100 and found.values["f1"] > 90
    half = reading.score(engine_of(FixedLogits(windows, dict.fromkeys(range(25)))), dev, 4)
    assert half.values["f1"] < 0.75 * found.values["f1"]


class LogitsOfTokens(nn.Module):
    """Logits that follow from the tokens alone."""

    def forward(self, input_ids, attention_mask, token_type_ids, window):
        places = torch.arange(input_ids.shape[1])
        outside = ((places < window[:, :1]) | (places >= window[:, 1:])) & (places > 0)
        logits = torch.stack([(input_ids * factor % 101) / 7 for factor in (37, 53)], 1)
        return logits.masked_fill(outside[:, None], -torch.inf)


def test_a_rank_without_windows_changes_no_span(dev, monkeypatch):
    """Three ranks of four windows: of the last pass the third has none, and the second a part."""
    reading = Reading(ReadingArguments(doc_stride=24, max_query_length=24), Framing(1, 1), 64)
    every = Windows(dev.store, reading.size, dev.numbers)
    num = next(
        n for n in range(3, len(dev.numbers)) if len(Windows(dev.store, reading.size, dev.numbers[:n])) % 12 == 6
    )
    windows = Windows(dev.store, reading.size, dev.numbers[:num])
    assert 12 < len(windows) < len(every)
    engine = engine_of(LogitsOfTokens())
    alone = reading.window_spans(engine, windows, 4)
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        parts.append(reading.window_spans(engine, windows, 4))
    assert np.array_equal(sum(parts), alone)


def test_the_n_best_answers_are_the_best_different_texts_of_all_windows(dev):
    few = QuestionSet(dev.examples[:6], dev.numbers[:6], dev.store)
    reading = Reading(ReadingArguments(doc_stride=24, max_query_length=24, max_answer_length=4), Framing(1, 1), 64)
    windows = Windows(few.store, reading.size, few.numbers)
    module = FixedLogits(windows, {}, noise=20.0)
    kept: dict[int, list] = {}  # the logits that the reader saw

    def remember(ids, mask, types, window):
        logits = module(ids, mask, types, window)
        for row, row_ids, row_mask in zip(logits, ids.tolist(), mask.tolist(), strict=True):
            kept[tuple(row_ids[: sum(row_mask)])] = row
        return logits

    found = reading.score(engine_of(lambda **x: remember(*x.values())), few, 3)
    for k, example in enumerate(few.examples):
        candidates: dict[str, float] = {}
        offsets = few.store.offsets_of(int(few.store.answers[few.numbers[k], 0]))
        for w in np.flatnonzero(windows.question == few.numbers[k]):
            shift = int(windows.first[w] - windows.begins[w])
            for score, i, j in all_spans(kept[tuple(windows.row(w, Framing(1, 1))[0].tolist())], 4):
                text = text_of(example.context, offsets, i + shift, j + shift + 1)
                candidates[text] = max(score, candidates.get(text, -np.inf))
        wanted = sorted(candidates.items(), key=lambda item: -item[1])[:5]
        nbest = found.files["nbest"][example.id]
        assert [answer["text"] for answer in nbest] == [text for text, _ in wanted]
        assert [answer["score"] for answer in nbest] == pytest.approx([score for _, score in wanted], abs=1e-3)
        assert nbest[0]["text"] == found.files["predictions"][example.id]
        assert sum(answer["probability"] for answer in nbest) == pytest.approx(1, abs=1e-5)


def test_an_answer_that_a_window_spells_several_times_takes_the_place_of_no_other(tmp_path):
    examples = [Example("q", "", "w2 w2 w1 w2 w3", "w4", ("w1",), 0, (6, 8))]
    write_store(lambda: examples, word_tokenizer(9), list, tmp_path)
    questions = QuestionSet(examples, np.array([0]), QuestionStore(tmp_path))
    arguments = ReadingArguments(n_best_size=2, max_answer_length=1, max_query_length=4, doc_stride=8)
    found = Reading(arguments, FRAMING, 24).score(engine_of(LogitsOfTokens()), questions, 1)
    assert [answer["text"] for answer in found.files["nbest"]["q"]] == ["w2", "w1"]  # scores 147, 57 and 35 sevenths


# The loss ----------------------------------------------------------------------------------------------------------


class FixedHidden(nn.Module):
    """Stands for an encoder: hidden states by token, and two router losses."""

    def __init__(self, router_losses: torch.Tensor | None) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=8, initializer_range=0.5, type_vocab_size=1)
        self.table = nn.Embedding(200, 8)
        self.router_losses = router_losses

    def forward(self, input_ids, attention_mask, token_type_ids):
        assert token_type_ids.max() == 0  # this encoder knows one segment
        return SimpleNamespace(last_hidden_state=self.table(input_ids), router_losses=self.router_losses)


def test_the_loss_is_the_mean_of_both_ends_summed_over_windows():
    torch.manual_seed(0)
    store = random_questions(4)
    windows = Windows(store, WindowSize(32, 9, 10), np.arange(4))
    rows = Reading(ReadingArguments(max_query_length=10, doc_stride=9, max_answer_length=5), FRAMING, 32).rows(
        store, BatchSizes(2, 1, 1), 0, True
    )
    module = SpanReader(FixedHidden(torch.tensor([1.5, 2.5])))
    numbers = list(range(len(windows)))
    batch = rows.batch(numbers)
    sums = module(**batch.inputs)
    wanted = 0.0
    for k in numbers:
        ids, _ = windows.row(k, FRAMING)
        logits = module.span(module.encoder.table(torch.from_numpy(ids)))
        begin = int(windows.begins[k])
        allowed = [0, *range(begin, len(ids) - 1)]
        for side in (0, 1):
            target = allowed.index(int(windows.targets[k, side]))
            wanted += F.cross_entropy(logits[allowed, side], torch.tensor(target)).item() / 2
    assert sums[0].item() == pytest.approx(wanted, rel=1e-5)
    tokens = int(windows.lengths.sum())
    assert sums[1:].tolist() == pytest.approx([1.5 * ROUTER_WEIGHTS[0] * tokens, 2.5 * ROUTER_WEIGHTS[1] * tokens])
    assert batch.num_targets == (len(numbers), tokens, tokens) and batch.num_tokens == tokens
    without = SpanReader(FixedHidden(None))(**batch.inputs)
    assert without.shape == (1,)


def test_an_epoch_meets_every_window_once_and_ranks_share_a_step():
    store = random_questions()
    reading = Reading(ReadingArguments(max_query_length=10, doc_stride=9, max_answer_length=5), FRAMING, 32)
    rows = reading.rows(store, BatchSizes(2, 2, 2), 3, False)
    order = [rows.order[place] for place in range(2 * len(rows))]
    assert sorted(order[: len(rows)]) == sorted(order[len(rows) :]) == list(range(len(rows.windows)))
    assert order[: len(rows)] != order[len(rows) :]
    sizes = BatchSizes(2, 2, 2)
    batches = [batch for rank in (0, 1) for batch in rows.step(8, sizes, rank)]
    alone = rows.step(8, BatchSizes(8, 1, 1), 0)[0]
    assert sum(batch.num_tokens for batch in batches) == alone.num_tokens == rows.num_tokens(8, 8)

    def texts(batch):
        return [tuple(ids[mask > 0].tolist()) for ids, mask in zip(*list(batch.inputs.values())[:2], strict=True)]

    assert sorted(text for batch in batches for text in texts(batch)) == sorted(texts(alone))


@pytest.mark.parametrize(
    ("capacity", "flags", "message"),
    [
        (80, {}, "--max_seq_length 80: beside a question of --max_query_length 64 it leaves 13 tokens"),
        (40, {}, "it leaves 0 tokens"),
        (128, {"max_answer_length": 62}, "less than --max_answer_length 62"),
    ],
)
def test_a_row_without_room_for_an_answer_is_refused(capacity, flags, message):
    with pytest.raises(UserError, match=message):
        Reading(ReadingArguments(**flags), FRAMING, capacity)


def test_a_stride_that_would_skip_tokens_is_shortened(capsys):
    reading = Reading(ReadingArguments(), FRAMING, 100)
    assert reading.size.stride == 33 and "--doc_stride 128: taken as 33" in capsys.readouterr().out
