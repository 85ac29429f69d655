"""Scores of a model against plain computations, and what it reads when it writes answers."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from finetune import scoring
from finetune.data import EvaluationSet
from kozero import distributed
from kozero.data.rows import fit
from kozero.pause import Pauses
from models.causal_lm import CausalLM
from tests.helpers import MemoryStore, toy_gpt2

PAUSE, END, CAPACITY = 7, 1, 16


def engine() -> SimpleNamespace:
    """An engine that can do nothing but evaluate."""
    module = CausalLM(toy_gpt2(), []).eval()

    @contextmanager
    def evaluating():
        with torch.no_grad():
            yield module

    return SimpleNamespace(evaluating=evaluating, module=module)


@pytest.fixture(autouse=True)
def process_group(one_rank):
    assert distributed.world_size() == 1


def choices(lengths: list[tuple[int, list[int]]]) -> EvaluationSet:
    """Examples by the tokens of their prompt and of each of three targets."""
    rng = np.random.default_rng(9)
    rows = [([], rng.integers(8, 60, prompt), rng.integers(8, 60, n)) for prompt, targets in lengths for n in targets]
    examples = [SimpleNamespace(label=k % 3) for k in range(len(lengths))]
    return EvaluationSet(SimpleNamespace(labels=("a", "b", "c")), examples, MemoryStore(rows))


def test_a_choice_is_the_likeliest_target_as_a_whole_whatever_the_lengths_of_targets():
    data, found = choices([(2 + k % 5, [2, 3, 4]) for k in range(12)]), engine()
    sums = []
    for row in data.store.rows:
        ids = data.store.tokens[row[0] : row[3]].astype(np.int64)
        with torch.no_grad():
            logits = found.module.lm(torch.from_numpy(ids)[None]).logits[0].log_softmax(-1)
        places = range(int(row[2] - row[0]), len(ids))
        sums.append(sum(logits[place - 1, ids[place]].item() for place in places))
    by_sum = np.reshape(sums, (-1, 3)).argmax(1)
    assert (by_sum != (np.reshape(sums, (-1, 3)) / [2, 3, 4]).argmax(1)).any()  # a mean would choose otherwise
    scores = scoring.score_choices(found, data, Pauses(PAUSE, 0), CAPACITY, 4)
    assert scores.predictions == ["abc"[k] for k in by_sum]
    assert scores.each == [float(chosen == k % 3) for k, chosen in enumerate(by_sum)]


def test_an_example_of_which_one_target_does_not_fit_counts_as_wrong():
    data = choices([(3, [2, 3, 4]), (10, [2, 3, 7]), (10, [7, 3, 2])])
    scores = scoring.score_choices(engine(), data, Pauses(PAUSE, 0), CAPACITY, 4)
    assert scores.predictions[0] in "abc" and scores.predictions[1:] == ["", ""] and scores.each[1:] == [0, 0]
    assert scores.num_left_out == 2


def test_a_prompt_leaves_room_for_its_pauses_and_the_answer(monkeypatch):
    store = MemoryStore([(range(20, 20 + k), [11, 12], []) for k in (1, 6, 7, 30)])
    task = SimpleNamespace(labels=(), whole_texts=False, max_new_tokens=5, best_score="f1")
    data = EvaluationSet(task, [SimpleNamespace(targets=("가",))] * 4, store)
    asked = []
    monkeypatch.setattr(scoring, "write", lambda *told, **how: asked.extend(told[2]) or [" 가 나"] * len(told[2]))

    def tokenizer(texts: list[str], add_special_tokens: bool) -> dict[str, list]:
        return {"input_ids": [text.split() for text in texts]}

    scores = scoring.score_answers(engine(), data, Pauses(PAUSE, 3), CAPACITY, 2, tokenizer)
    assert [prompt.tolist() for prompt in asked] == [
        [*range(20, 20 + k), 11, 12, PAUSE, PAUSE, PAUSE] for k in (1, 6, 6, 6)
    ]  # fmt: skip
    assert (scores.num_cut, scores.num_left_out) == (2, 0)
    assert scores.num_tokens == 6 + 3 * 11 + 4 * 2  # read and written


def test_tokens_of_the_pass_that_ranks_places_are_counted():
    store = MemoryStore([([], range(10, 10 + k), [11]) for k in (2, 5, 30)])  # the last does not fit
    fitted = fit(store, CAPACITY, 3)
    assert scoring.read_tokens(fitted, Pauses(PAUSE, 3)) == (2 + 3 + 1) + (5 + 3 + 1)
    assert scoring.read_tokens(fitted, Pauses(PAUSE, 3, "least_confident")) == (2 + 3 + 1) + (5 + 3 + 1) + 3 + 6
    assert scoring.read_tokens(fit(store, CAPACITY, 0), Pauses(PAUSE, 0, "least_confident")) == 3 + 6


def test_prompts_are_padded_on_the_left_unseen_and_what_follows_goes_to_its_end():
    given = {}

    def generate(**told):
        given.update(told)
        return torch.cat([told["input_ids"], torch.tensor([[31, END, 0, 0], [31, 32, 33, 34]])], dim=1)

    lm = SimpleNamespace(generate=generate, generation_config=None)
    tokenizer = SimpleNamespace(pad_token_id=0, eos_token_id=END)
    prompts = [np.array([21, 22]), np.array([11, 12, 13, 14])]
    found = scoring.write_batch(lm, tokenizer, prompts, Pauses(PAUSE, 0), torch.device("cpu"), {"max_new_tokens": 4})
    assert given["input_ids"].tolist() == [[0, 0, 21, 22], [11, 12, 13, 14]]
    assert given["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert found == [[31, END], [31, 32, 33, 34]]
