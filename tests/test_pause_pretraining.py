"""Pre-training with pauses at random places: Goyal et al. (arXiv 2310.02226), section 3.1."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from finetune import train as finetune
from kozero.config import BatchSizes
from kozero.data.order import Order
from kozero.errors import UserError
from kozero.pause import IGNORE, Pauses, begins_inside
from models.language_model import load
from pretrain import run as pretraining
from pretrain.arguments import CorpusArguments
from pretrain.chunks import Blocks, Numbered
from pretrain.corpus import Shard
from pretrain.rows import BlockRows
from tests.helpers import word_tokenizer
from tests.test_pretrain import losses, points, pretrain

PAUSE, SEP, SIZE, NUM = 99, 1, 20, 4
PAUSED = ("--pause_placement", "random", "--pause_fraction", 0.25)


def paused_rows(lengths: list[int] | None = None) -> tuple[BlockRows, list[list[int]]]:
    """Rows of 20 tokens, of which 4 are pauses, and the documents that they are made of."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(10, 90, n).tolist() for n in lengths or rng.integers(1, 40, 30)]
    places = np.cumsum([0, *map(len, documents)])
    shard = Shard(None, np.concatenate(documents).astype(np.uint16), places, np.arange(len(documents) + 1))
    blocks = Numbered([Blocks(shard, SIZE - NUM, SEP, 0)], held_out=False)
    order = Order(len(blocks), len(blocks), 8, 3, blocks.lengths)
    return BlockRows(blocks, order, SIZE, Pauses(PAUSE, NUM, "random", None, 3)), documents


def test_full_rows_have_their_pauses_and_lose_no_token():
    rows, documents = paused_rows()
    found = [rows.texts(row, row) for row in range(len(rows))]
    ids = [np.concatenate([text.ids for text in texts]) for texts in found]
    assert {len(row) for row in ids[:-1]} == {SIZE} and len(ids[-1]) <= SIZE
    assert {int((row == PAUSE).sum()) for row in ids[:-1]} == {NUM}
    stream = np.concatenate(ids)
    assert stream[stream != PAUSE].tolist() == [token for document in documents for token in [SEP, *document]]
    assert rows.num_tokens(0, len(rows)) == sum(map(len, documents)) + len(documents)


@pytest.mark.parametrize(("length", "pauses"), [(1, 0), (2, 0), (3, 1), (5, 1), (6, 2), (8, 2), (12, 3), (15, 4)])
def test_a_short_last_block_has_its_share_of_pauses(length, pauses):
    """4 of 16 tokens, rounded; the document's separator is a token."""
    rows, _ = paused_rows([2 * (SIZE - NUM) + length - 1])
    assert len(rows) == 3
    counts = [sum(int((text.ids == PAUSE).sum()) for text in rows.texts(row, row)) for row in range(3)]
    assert counts == [NUM, NUM, pauses]
    assert sum(text.num_pauses for text in rows.texts(2, 2)) == pauses


def test_loss_is_dropped_exactly_where_the_next_token_is_a_pause():
    """All over a row, whatever document a token is of; and what is predicted is the stream, each token once and in its
    order, as without pauses: nothing is predicted twice, by a token and by the pause behind it."""
    rows, documents = paused_rows()
    predicted, dropped = [], 0
    for row in range(len(rows)):
        texts = rows.texts(row, row)
        ids = np.concatenate([text.ids for text in texts])
        predicts = np.concatenate([text.predicts for text in texts])
        head = np.flatnonzero(ids != PAUSE)[0]  # pauses that nothing of the row stands before
        silent = np.append(ids[1:] == PAUSE, False)
        silent[:head] = True
        assert ((predicts == IGNORE) == silent).all()
        predicted += predicts[predicts != IGNORE].tolist()
        dropped += silent.sum()
    stream = [token for document in documents for token in [SEP, *document]]
    assert predicted == [*stream[1:], SEP] and dropped > 50


def test_places_are_drawn_anew_at_every_place_of_the_stream():
    rows, _ = paused_rows()
    draw = lambda place: [text.ids.tolist() for text in rows.texts(0, place)]  # noqa: E731
    assert draw(0) == draw(0) != draw(len(rows))


def test_pauses_of_a_run_follow_its_seed_and_know_where_characters_begin(one_rank, monkeypatch, tmp_path):
    told = f"prog --model_name a --model causal_lm --cache_dir {tmp_path} --max_seq_length 64 --pause_fraction 0.25"
    monkeypatch.setattr("sys.argv", [*told.split(), "--seed", "5"])
    training, corpus, _ = pretraining.arguments("train")
    tokenizer = pretraining.load_tokenizer(corpus)
    shards = pretraining.open_shards(corpus, tokenizer)
    data = pretraining.make_rows(shards, corpus, training, BatchSizes(4, 1, 1), tokenizer, router=False, pause_id=7)
    for rows in (data.training, data.validation):
        pauses = rows.pauses
        assert (pauses.token_id, pauses.num, pauses.placement, pauses.seed) == (7, 16, "random", 5)
        assert np.array_equal(pauses.inside, begins_inside(tokenizer))


def test_a_paused_model_learns_and_is_fine_tuned(monkeypatch, tmp_path):
    """Its pause row is not drawn anew, and plain fine-tuning keeps it."""
    longer = ("--num_steps", 12, "--scheduler_num_steps", 24, "--dropout", 0)
    folder = pretrain(monkeypatch, tmp_path / "runs", *PAUSED, *longer, model="causal_lm")
    curve = list(losses(folder).values())
    assert sum(curve[-4:]) < sum(curve[:4])
    settings = json.loads((folder / "model/config.json").read_text())["pause"]
    assert (settings["token"], settings["placement"], settings["fraction"]) == ("<unused0>", "random", 0.25)
    row = load_file(folder / "model/model.safetensors")["transformer.wte.weight"][settings["token_id"]]
    for num in (0, 2):
        model = load(str(folder / "model"), None, None, pause_token="<unused0>", with_pauses=num > 0, seed=9)
        assert torch.equal(model.module.lm.transformer.wte.weight[model.pause_id], row)
        told = ["prog", "--model_name_or_path", str(folder / "model"), "--num_pauses", str(num), "--max_steps", "1"]
        out = ["--output_dir", str(tmp_path / f"tuned-{num}"), "--cache_dir", str(tmp_path / "cache")]
        monkeypatch.setattr("sys.argv", [*told, *out, "--max_train_samples", "8", "--max_eval_samples", "4"])
        finetune.main()
        kept = json.loads((tmp_path / f"tuned-{num}/model/config.json").read_text())["pause"]
        assert kept["num_inference_pauses"] == num and kept["token"] == "<unused0>"


def test_the_plain_arm_meets_the_same_text(monkeypatch, tmp_path):
    """Rows of 96 tokens without pauses are those of 128 with 32 pauses: equal tokens, step by step."""
    paused = pretrain(monkeypatch, tmp_path / "paused", *PAUSED, "--max_seq_length", 128, model="causal_lm")
    plain = pretrain(monkeypatch, tmp_path / "plain", "--max_seq_length", 96, model="causal_lm")
    told = [(folder / "model/README.md").read_text().split("Steps: ")[1].split(";")[0] for folder in (paused, plain)]
    assert told[0] == told[1] and told[0].endswith("tokens")


def test_a_vocabulary_without_a_spare_token_gets_one(monkeypatch, tmp_path):
    word_tokenizer(200, ("<unk>", "</s>", "<pad>", "<s>")).save_pretrained(tmp_path / "words")
    (tmp_path / "corpus.txt").write_text("\n\n".join(f"w{n} w{n + 1} w{n + 2}" for n in range(5, 190)))
    own = ("--corpus_path", tmp_path / "corpus.txt", "--tokenizer_name_or_path", tmp_path / "words")
    folder = pretrain(monkeypatch, tmp_path / "runs", *PAUSED, *own, model="causal_lm")
    settings = json.loads((folder / "model/config.json").read_text())["pause"]
    assert settings["token"] == "<pause>" and points(folder)[-1]["eval/loss"] > 0


def test_two_tokens_of_a_row_are_text_at_least():
    shared = {"model": "causal_lm", "max_seq_length": 16}
    assert CorpusArguments(**shared, pause_fraction=14 / 16).num_pauses == 14
    assert CorpusArguments(**shared, pause_fraction=1 / 16).num_pauses == 1
    for fraction, told in ((15 / 16, "15 pauses"), (0.01, "0 pauses")):
        with pytest.raises(UserError, match=rf"{told} in --max_seq_length 16 tokens; must be 1 to 14"):
            CorpusArguments(**shared, pause_fraction=fraction)


@pytest.mark.parametrize(
    ("flags", "message"),
    [(("--pause_fraction", 1), "--pause_fraction 1.0"), (("--task", "mlm", *PAUSED), "--task mlm has no pauses")],
)
def test_a_mistake_is_named(monkeypatch, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        pretrain(monkeypatch, tmp_path / "runs", *flags, model="causal_lm" if "mlm" not in flags else "transformer")
