"""Questions and passages as vectors: the loss on two ranks, the search, the file of vectors, BM25, the scores."""

import errno
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import pytest
import torch
from kiwipiepy import Kiwi

from finetune import retrieval as under_test
from finetune.arguments import ReadingArguments
from finetune.bm25 import morphemes, rank_by_bm25
from finetune.questions import QuestionSet
from finetune.retrieval import Retrieval, Retriever, pair_lengths, reserve, search, shared_search
from kozero import distributed
from kozero.config import BatchSizes, TrainingArguments
from kozero.data.framing import Framing
from kozero.engines import EngineSettings, build_engine
from kozero.metrics import retrieval
from models.heads import ROUTER_WEIGHTS
from models.mix_lm import MixLmConfig, MixLmEncoder
from models.transformer import TransformerConfig, TransformerEncoder
from tests.ranks import run_ranks
from tests.test_reading import Questions

FRAMING = Framing(1, 2)
CAPACITY = 24
SHARED = {"vocab_size": 200, "hidden_size": 16, "num_hidden_layers": 1, "max_position_embeddings": 32}
SHARED |= {"dropout_prob": 0.0, "initializer_range": 0.3, "ff_dim": 32, "pad_token_id": 0}


def retriever(kind: str = "mix_lm") -> Retriever:
    """A small one without dropout, the same every time; its pool prefers some positions."""
    torch.manual_seed(0)
    if kind == "mix_lm":
        encoder = MixLmEncoder(MixLmConfig(**SHARED, embedding_size=8, kernel_size=3, n_experts=2))
    else:  # every token fits its expert: dropping depends on the batch
        encoder = TransformerEncoder(TransformerConfig(**SHARED, num_heads=2, n_experts=2, capacity_factor=8.0))
    module = Retriever(encoder)
    with torch.no_grad():
        module.pool.weight.copy_(torch.linspace(0.05, 0.5, 32))
    return module


def questions() -> Questions:
    """24 questions on 9 passages, some of which several share."""
    rng = np.random.default_rng(1)
    passages = rng.integers(3, 40, 9).tolist()
    asked = [(int(rng.integers(2, 12)), int(rng.integers(9))) for _ in range(24)]
    store = Questions(passages, asked, [(0, 1)] * 24)
    store.passage_tokens = rng.integers(5, 200, len(store.passage_tokens))
    store.question_tokens = rng.integers(5, 200, len(store.question_tokens))
    return store


def task() -> Retrieval:
    return Retrieval(ReadingArguments(max_query_length=10), FRAMING, CAPACITY)


def stepped(kind: str, sizes: BatchSizes) -> dict[str, Any]:
    """One SGD step of an engine on the first rows: losses and the weights after it."""
    arguments = TrainingArguments(optim="sgd", max_grad_norm=0.0, weight_decay=0.0)
    engine = build_engine(retriever(kind), arguments, EngineSettings())
    rows = task().rows(questions(), BatchSizes(8, 1, 1), 0, kind == "transformer")
    stats = engine.train_step(rows.step(0, sizes, distributed.rank()), 0.5)
    return {"losses": stats.losses, "weights": engine.full_state_dict()}


def texts() -> list[np.ndarray]:
    store = questions()
    return [store.passage(k) for k in range(store.num_passages)]


def measure(folder: Path) -> dict[str, Any]:
    """What a rank of two finds."""
    found = {kind: stepped(kind, BatchSizes(4, 1, 2)) for kind in ("mix_lm", "transformer")}
    engine = build_engine(retriever(), TrainingArguments(), EngineSettings())
    written = task().write_vectors(engine, texts(), 2, folder / "two.npy")
    rng = np.random.default_rng(0)
    queries, vectors = rng.standard_normal((7, 5), np.float32), rng.standard_normal((11, 5), np.float32)
    store = questions()
    score = task().score(engine, QuestionSet([None] * 24, np.arange(24), store), 2)
    return found | {
        "written": np.array(written),
        "vectors": task().vectors(engine, texts(), 2),
        "search": shared_search(queries, vectors, 4),
        "score": score.values,
    }


@pytest.fixture(scope="module", autouse=True)
def process_group():
    distributed.setup()
    yield
    distributed.shutdown()


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> list[dict[str, Any]]:
    """What two ranks found."""
    return run_ranks(measure, tmp_path_factory.mktemp("ranks"))


# The loss ----------------------------------------------------------------------------------------------------------


def direct(module: torch.nn.Module, text: np.ndarray, most: int) -> torch.Tensor:
    """(H,) vector of one text alone, pooled by hand."""
    ids = torch.tensor([[1, *text.tolist()[: most - 2], 2]])
    hidden = module.encoder(input_ids=ids).last_hidden_state[0]
    return (module.pool.weight[: len(hidden), None] * hidden).sum(0)


def test_each_question_is_told_apart_from_the_other_passages_of_the_batch():
    store, module = questions(), retriever()
    rows = task().rows(store, BatchSizes(8, 1, 1), 0, False)
    numbers = [rows.order[place] for place in range(8)]
    passages = store.answers[numbers, 0].tolist()
    assert len(set(passages)) < 8  # some of the eight share a passage, which is then no negative
    queries = [direct(module, store.question(n), 12) for n in numbers]
    vectors = {p: direct(module, store.passage(p), CAPACITY) for p in passages}
    wanted = 0.0
    for query, own in zip(queries, passages, strict=True):
        columns = [own] + [p for p in passages if p != own]  # one that two questions share counts twice for a third
        logits = torch.stack([query @ vectors[p] for p in columns]) / 16**0.5
        wanted += -logits.log_softmax(0)[0].item()
    sums = module(**rows.batch(range(8)).inputs)
    assert sums.tolist() == pytest.approx([wanted], rel=1e-4)


@pytest.mark.parametrize("kind", ["mix_lm", "transformer"])
def test_two_ranks_have_the_loss_of_one_process(both, kind):
    alone = stepped(kind, BatchSizes(8, 1, 1))["losses"]
    for two in both:
        losses = two[kind]["losses"]
        assert (losses[0], losses[-1]) == pytest.approx((alone[0], alone[-1]), abs=1e-5)  # balance is that of a rank


def test_two_ranks_take_the_step_of_one_process(both):
    alone = stepped("mix_lm", BatchSizes(8, 1, 1))["weights"]
    before = retriever().state_dict()
    for name, weight in alone.items():
        assert torch.allclose(both[0]["mix_lm"]["weights"][name], weight, atol=2e-5), name
    assert not torch.allclose(alone["pool.weight"], before["pool.weight"], atol=1e-3)


def test_router_losses_count_the_tokens_of_questions_and_passages():
    store, module = questions(), retriever("transformer").eval()
    rows = task().rows(store, BatchSizes(4, 1, 1), 0, True)
    batch = rows.batch([0, 1, 2])
    wanted = torch.zeros(2)
    for ids, mask in (("ids", "mask"), ("passage_ids", "passage_mask")):
        given = {"input_ids": batch.inputs[ids], "attention_mask": batch.inputs[mask]}
        wanted += module.encoder(**given).router_losses * batch.inputs[mask].sum()
    sums = module(**batch.inputs)
    assert sums[1:].tolist() == pytest.approx((wanted * torch.tensor(ROUTER_WEIGHTS)).tolist(), rel=1e-5)
    assert batch.num_targets == (3, batch.num_tokens, batch.num_tokens)
    assert batch.num_tokens == pair_lengths(store, CAPACITY, 10, rows.numbers(range(3))).sum()


def test_a_question_that_is_longer_than_a_row_is_cut_to_it():
    store = Questions([5, 30], [(40, 0), (3, 1)], [(0, 1)] * 2)
    rows = Retrieval(ReadingArguments(max_query_length=64), FRAMING, 16).rows(store, BatchSizes(2, 1, 1), 0, False)
    batch = rows.batch([0, 1])
    asked = {tuple(ids[mask > 0].tolist()) for ids, mask in zip(batch.inputs["ids"], batch.inputs["mask"], strict=True)}
    assert asked == {(1, *range(50, 64), 2), (1, 50, 51, 52, 2)}
    assert batch.inputs["passage_ids"].shape == (2, 16) and rows.num_tokens(0, 2) == 16 + 7 + 5 + 16


@pytest.mark.parametrize("lengths", [[50] * 40, range(64, 104)])
def test_questions_of_one_passage_seldom_meet(lengths):
    """Also where a batch has passages of about one length and each has a length of its own."""
    store = Questions([*lengths], [(5, n % 40) for n in range(400)], [(0, 1)] * 400)
    rows = Retrieval(ReadingArguments(), FRAMING, 128).rows(store, BatchSizes(8, 1, 1), 0, False)
    steps = [store.answers[[rows.order[place] for place in range(k, k + 8)], 0] for k in range(0, 400, 8)]
    different = np.mean([len(np.unique(step)) for step in steps])
    assert different > 7  # drawn at random it is 40 (1 - (39 / 40)^8) = 7.3


# Vectors and search ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [1, 4, 50])
def test_vectors_in_the_file_are_those_of_each_text_alone(both, tmp_path, micro):
    module = retriever()
    engine = build_engine(module, TrainingArguments(), EngineSettings())
    written = task().write_vectors(engine, texts(), micro, tmp_path / "vectors.npy")
    assert isinstance(written, np.memmap) and written.dtype == np.float32 and written.shape == (9, 16)
    assert [path.name for path in tmp_path.iterdir()] == ["vectors.npy"]

    with torch.no_grad():
        wanted = torch.stack([direct(module.eval(), text, CAPACITY) for text in texts()]).numpy()
    for found in (written, both[0]["written"], both[1]["written"], both[1]["vectors"]):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_vectors_without_room_are_refused_and_leave_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    said = reserve(tmp_path / "vectors.npy", (2**20, 256))
    assert said == f"{tmp_path}/vectors.npy: 1,024.0 MiB of vectors cannot be written (No space left on device)"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("chunk", "queries"), [(1, 2), (64, 3), (10_000, 1000)])
def test_the_search_is_exact_whatever_its_batches(monkeypatch, tmp_path, chunk, queries):
    monkeypatch.setattr(under_test, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(under_test, "QUERIES", queries)
    rng = np.random.default_rng(2)
    np.save(tmp_path / "v.npy", rng.standard_normal((23, 4), np.float32))
    vectors = np.load(tmp_path / "v.npy", mmap_mode="r")
    asked = rng.standard_normal((9, 4), np.float32)
    products, numbers = search(torch.from_numpy(asked), vectors, 6)
    wanted = asked @ vectors.T
    order = np.argsort(-wanted, axis=1)[:, :6]
    assert np.array_equal(numbers.numpy(), order)
    np.testing.assert_allclose(products.numpy(), np.take_along_axis(wanted, order, axis=1), rtol=1e-5)


def test_ranks_that_share_a_search_find_what_one_does(both):
    rng = np.random.default_rng(0)
    queries, vectors = rng.standard_normal((7, 5), np.float32), rng.standard_normal((11, 5), np.float32)
    wanted = np.argsort(-(queries @ vectors.T), axis=1)[:, :4]
    for found in (both[0]["search"], both[1]["search"], shared_search(queries, vectors, 4)):
        assert np.array_equal(found, wanted)
    assert shared_search(queries, vectors, 100).shape == (7, 11)


def test_recall_and_reciprocal_rank_by_hand():
    found = np.array([[4, 2, 9, *range(10, 30)], [2, 4, 9, *range(10, 30)], [1, 2, 3, *range(10, 30)]])
    scores = retrieval(found, np.array([4, 29, 7]))
    assert scores == pytest.approx(
        {"recall@1": 1 / 3, "recall@5": 1 / 3, "recall@20": 1 / 3, "recall@100": 2 / 3, "mrr@100": (1 + 1 / 23) / 3}
    )


def test_the_score_of_a_retriever_is_that_of_ranking_by_hand(both):
    store, module = questions(), retriever().eval()
    with torch.no_grad():
        asked = torch.stack([direct(module, store.question(k), 12) for k in range(24)])
        passages = torch.stack([direct(module, text, CAPACITY) for text in texts()])
    ranks = [
        1 + int((row > row[own]).sum())
        for row, own in zip(asked @ passages.T, store.answers[:, 0].tolist(), strict=True)
    ]
    assert both[0]["score"] == both[1]["score"]
    assert both[0]["score"]["mrr@100"] == pytest.approx(np.mean([1 / rank for rank in ranks]))
    assert both[0]["score"]["recall@5"] == pytest.approx(np.mean([rank <= 5 for rank in ranks]))


# BM25 --------------------------------------------------------------------------------------------------------------

PASSAGES = ["세종은 훈민정음을 만들었다.", "이순신은 거북선으로 싸웠다.", "훈민정음은 1446년에 반포되었다."]
ASKED = ["훈민정음을 만든 왕은?", "거북선", "반포된 해", "qwerty"]


@pytest.fixture(scope="module")
def kiwi() -> Kiwi:
    """Loading it takes a second."""
    return Kiwi()


def test_bm25_ranks_as_bm25s_does_on_kiwis_morphemes(kiwi, tmp_path, monkeypatch):
    monkeypatch.setattr("kiwipiepy.Kiwi", lambda num_workers: kiwi)
    forms = [
        [[t.form for t in kiwi.tokenize(text) if t.tag[0] in "NVMX" or t.tag in ("SN", "SL", "SH")] for text in texts]
        for texts in (PASSAGES, ASKED)
    ]
    index = bm25s.BM25()
    index.index(forms[0], show_progress=False)
    wanted = [int(index.get_scores(query).argmax()) for query in forms[1][:3]]
    found = rank_by_bm25(ASKED, PASSAGES, 100, tmp_path)
    assert found.shape == (4, 3) and found[:3, 0].tolist() == wanted == [0, 1, 2]
    assert forms[0][0] == ["세종", "훈민정음", "만들"]  # particles and endings say little
    monkeypatch.setattr("kiwipiepy.Kiwi", lambda num_workers: pytest.fail("analysed twice"))
    assert list(morphemes(PASSAGES, tmp_path)) == forms[0]
    monkeypatch.setattr("kiwipiepy.Kiwi", lambda num_workers: kiwi)
    for path in tmp_path.glob("*/morphemes.jsonl"):  # what is cut short is analysed anew
        path.write_bytes(path.read_bytes()[:-9])
    assert list(morphemes(PASSAGES, tmp_path)) == forms[0]
