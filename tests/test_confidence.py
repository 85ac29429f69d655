"""The pass that finds the least confident tokens, against transformers, text by text."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune.confidence import least_confident
from kozero.config import TrainingArguments, batch_sizes
from kozero.data.batches import Prefixes
from kozero.data.rows import fit
from kozero.data.store import TextRow, open_or_build
from kozero.engines import build_engine, prepare_engine
from models.language_model import load

TEXTS = ["헛수고를 한 날이다. 그는 집에 갔다.", "새로운 영화", "눈이 왔다. 길을 쓸었다. 차를 마셨다. 손끝이 시렸다."]


@pytest.mark.parametrize("capacity", [64, 24])  # in one packed row, and in several
def test_places_are_before_the_tokens_of_the_lowest_probability(one_rank, tmp_path, paused_model, capacity):
    model = load(paused_model, None, None, pause_token="<unused0>", with_pauses=False, seed=0)
    rows = [TextRow(text, "관계:", "함의") for text in TEXTS]
    store = open_or_build(tmp_path, "rows", lambda: rows, model.tokenizer)
    training = TrainingArguments()
    engine = build_engine(model.module, training, prepare_engine(training, batch_sizes(training, 1)))
    fitted = fit(store, capacity, 5)
    prefixes = Prefixes(store, fitted.cut)
    found = least_confident(engine, prefixes, fitted, 5, capacity)
    lm = AutoModelForCausalLM.from_pretrained(paused_model).eval()
    for number, places in enumerate(found):
        ids, _ = prefixes.parts(number)
        with torch.no_grad():
            chances = lm(torch.from_numpy(ids[None])).logits[0, :-1].softmax(-1)
        chances = chances[torch.arange(len(ids) - 1), torch.from_numpy(ids[1:])].numpy()
        wanted = np.argsort(chances, kind="stable")[:5] + 1
        assert places[places >= 0].tolist() == wanted.tolist()
        assert (places[len(wanted) :] == -1).all()
    engine.close()
