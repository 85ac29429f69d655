"""--task essay: whole texts, each token learned and scored once."""

import json
import math
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune import evaluate, train
from kozero.data.batches import TrainingRows
from kozero.data.rows import pieces
from kozero.data.store import TextRow, open_or_build
from kozero.errors import UserError
from kozero.metrics import perplexity
from kozero.pause import IGNORE, Pauses
from models.language_model import load_tokenizer
from tests.helpers import ROOT, SAMPLE_DATA, MemoryStore, sample_tokenizer

SHORT = ("--max_steps", "2", "--logging_steps", "1", "--max_seq_length", "48", "--dropout", "0")


def test_pieces_by_hand():
    """Two texts of 7 and 3 tokens, rows of 4: each piece begins with the token before it."""
    store = MemoryStore([([], [], range(10, 17)), ([], [], range(20, 23))])
    rows, text = pieces(store.rows, 4)
    assert text.tolist() == [0, 0, 1]
    assert [store.tokens[a:d].tolist() for a, d in rows[:, [0, 3]]] == [
        [10, 11, 12, 13],
        [13, 14, 15, 16],
        [16, 20, 21, 22],
    ]
    assert (rows[:, 2] - rows[:, 0]).tolist() == [1, 1, 1]


@pytest.mark.parametrize("capacity", [2, 5, 16, 1000])
def test_every_token_but_the_first_is_predicted_once(tmp_path, capacity):
    texts = [f"글 {k} " * k for k in range(1, 30)]
    store = open_or_build(tmp_path, "texts", lambda: [TextRow("", "", text) for text in texts], sample_tokenizer())
    cut, text = pieces(store.rows, capacity)
    rows = TrainingRows(store.with_rows(cut), Pauses(0, 0, "append"), capacity, "packed", 0)
    learned = Counter()
    for row in range(len(rows)):
        for part in rows.texts(row):
            assert 2 <= len(part.ids) <= capacity
            learned.update(part.predicts[part.predicts != IGNORE].tolist())
    assert learned == Counter(store.tokens[1:].tolist())
    assert np.array_equal(np.unique(text), np.arange(len(texts)))


def test_perplexity_by_hand():
    found = perplexity([math.log(2) * 3, math.log(2) * 5], [3, 5], [4, 12])
    assert found["perplexity"] == pytest.approx(2) and found["loss"] == pytest.approx(math.log(2))
    assert found["nats_per_character"] == pytest.approx(math.log(2) / 2)


def reference(folder, texts: list[str], capacity: int) -> tuple[float, int]:
    """Loss and tokens by plain transformers: the texts end to end with their ends, in rows that overlap by a token; no
    row holds two texts, but for the end of the text before."""
    tokenizer, lm = load_tokenizer(str(folder)), AutoModelForCausalLM.from_pretrained(folder).eval()
    total, count, before = 0.0, 0, []
    for text in texts:
        ids = before + tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        before = [tokenizer.eos_token_id]
        for start in range(0, len(ids) - 1, capacity - 1):
            part = torch.tensor([ids[start : start + capacity]])
            with torch.no_grad():
                logits = lm(part).logits[0, :-1].double()
            total += torch.nn.functional.cross_entropy(logits, part[0, 1:], reduction="sum").item()
            count += part.shape[1] - 1
    return total, count


def test_a_run_and_its_evaluation_tell_the_perplexity_of_plain_transformers(monkeypatch, tmp_path, capsys):
    shared = ("--task", "essay", "--cache_dir", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["train.py", *shared, *SHORT, "--output_dir", str(tmp_path / "run")])
    train.main()
    model, told = tmp_path / "run/model", json.loads((tmp_path / "run/scores.json").read_text())["scores"]
    lines = (SAMPLE_DATA / "essay/validation.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [" ".join(json.loads(line)["text"].split()) for line in lines]
    loss, count = reference(model, texts, 48)
    assert told["loss"] == pytest.approx(loss / count, abs=1e-5)
    assert told["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-4)
    assert told["nats_per_character"] == pytest.approx(loss / sum(map(len, texts)), rel=1e-5)
    out = tmp_path / "scores.json"
    again = ["--model_name_or_path", str(model), "--max_seq_length", "48", "--output_file", str(out)]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *shared, *again])
    evaluate.main()
    assert json.loads(out.read_text())["scores"] == pytest.approx(told, rel=1e-6)
    rows = [json.loads(line) for line in out.with_suffix(".predictions.jsonl").read_text().splitlines()]
    first, num = reference(model, texts[:1], 48)
    assert len(rows) == len(texts) and rows[0]["score"] == pytest.approx(first / num, abs=1e-5)
    assert "eval/sample" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num_pauses", "2"], "--num_pauses 2: --task essay has no prompts"),
        (["--from_hub"], "--from_hub: --task essay has no data set"),
        (["--train_file", str(ROOT / "README.md")], "this task reads .jsonl"),
    ],
)
def test_a_mistake_is_named(monkeypatch, tmp_path, flags, message):
    argv = ["train.py", "--task", "essay", *SHORT, *flags, "--output_dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(UserError, match=message):
        train.main()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "entry, flags, message",
    [
        (evaluate, ["--num_inference_pauses", "5"], "--num_inference_pauses 5: --task essay has no prompts"),
        (evaluate, ["--sweep_pauses", "0,3"], "--sweep_pauses 3: --task essay has no prompts"),
        (train, ["--num_inference_pauses", "4"], "--num_inference_pauses 4: --task essay has no prompts"),
        (train, ["--num_pauses", "4"], "--num_pauses 4: --task essay has no prompts"),
    ],
)
def test_whole_texts_take_no_pauses(monkeypatch, tmp_path, paused_model, entry, flags, message):
    argv = ["x.py", "--task", "essay", "--model_name_or_path", paused_model, *flags]
    argv += ["--output_dir", str(tmp_path / "run")] if entry is train else []
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(UserError, match=message):
        entry.main()
    assert not (tmp_path / "run").exists()


def test_a_model_that_pauses_is_scored_on_whole_texts_without(monkeypatch, tmp_path, paused_model):
    """As it is where none is asked for; a sweep has the weights with which its texts make the score."""
    found = []
    for flags in ([], ["--num_inference_pauses", "0"], ["--sweep_pauses", "0"]):
        argv = ["evaluate.py", "--task", "essay", "--model_name_or_path", paused_model, "--max_eval_samples", "3"]
        argv += ["--output_file", str(tmp_path / "s.json"), "--cache_dir", str(tmp_path), *flags]
        monkeypatch.setattr(sys, "argv", argv)
        evaluate.main()
        found.append(json.loads((tmp_path / "s.json").read_text()))
    (cell,) = found[2]["cells"]
    assert found[0]["scores"] == found[1]["scores"] == cell["scores"]
    assert math.exp(np.average(cell["each"], weights=cell["weights"])) == pytest.approx(cell["value"])
