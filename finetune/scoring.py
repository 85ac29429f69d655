"""Scores of a model under any engine: labels by log-likelihood, answers by writing them. Every rank takes its share
and all of them make the same number of forward passes."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from finetune.confidence import least_confident
from finetune.data import EvaluationSet
from finetune.decoding import ignoring_pauses
from kozero import distributed
from kozero.data.batch import shares
from kozero.data.batches import Prefixes, evaluation_batches
from kozero.data.rows import Fit, fit, pieces
from kozero.engines.base import Engine
from kozero.metrics import classification, perplexity, question_answering
from kozero.pause import Pauses, begun, token_bytes


@dataclass
class Scores:
    """`values` by name, what was predicted for each example, the task's main score of each (whose mean is among the
    values), how many rows were cut or left out, and the tokens of all prompts, pauses and answers."""

    values: dict[str, float]
    predictions: list[str]
    each: list[float]
    num_cut: int
    num_left_out: int
    num_tokens: int
    weights: list[float] = field(default_factory=list)  # of each in that mean; empty: equal ones
    num_unknown: int = 0

    @property
    def notes(self) -> list[str]:
        """What a reader of the scores has to know about examples that did not fit."""
        cut, left_out = self.num_cut, self.num_left_out
        lines = [f"{cut:,} contexts were cut to fit; --max_seq_length sets the limit"] if cut else []
        if left_out:
            lines.append(f"{left_out:,} rows do not fit even without context and count as wrong")
        if self.num_unknown:
            told = f"{self.num_unknown:,} tokens that stand for characters which the tokenizer lacks are not scored"
            lines.append(f"{told}, so there is no nats_per_character, which compares tokenizers")
        return lines


def score(engine: Engine, data: EvaluationSet, pauses: Pauses, capacity: int, micro: int, tokenizer: Any) -> Scores:
    """Score every example of `data`. Collective.

    Args: pauses: M_inf of them; capacity: tokens of a row; micro: rows of a forward pass.
    """
    if data.task.labels:
        return score_choices(engine, data, pauses, capacity, micro)
    if data.task.whole_texts:
        return score_texts(engine, data, pauses, capacity, micro)
    return score_answers(engine, data, pauses, capacity, micro, tokenizer)


def score_choices(engine: Engine, data: EvaluationSet, pauses: Pauses, capacity: int, micro: int) -> Scores:
    """For each example the label whose target has the highest log-likelihood given its prompt."""
    prefixes, fitted = fitted_prefixes(engine, data, pauses, capacity)
    sums, num = likelihoods(engine, prefixes, fitted, pauses, capacity, micro)
    likelihood = torch.where(num > 0, sums, -torch.inf).view(len(data.examples), -1)
    fits = torch.isfinite(likelihood).all(dim=1)
    chosen = torch.where(fits, likelihood.argmax(dim=1), -1).tolist()  # an example that does not fit is wrong
    labels = data.task.labels
    wanted = [example.label for example in data.examples]
    values = classification(chosen, wanted, labels)
    right = [float(k == label) for k, label in zip(chosen, wanted, strict=True)]
    named = [labels[k] if k >= 0 else "" for k in chosen]
    return Scores(values, named, right, fitted.num_cut, fitted.num_left_out, read_tokens(fitted, pauses))


def likelihoods(
    engine: Engine, prefixes: Prefixes, fitted: Fit, pauses: Pauses, capacity: int, micro: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) log-likelihood of the target of each row, and (N,) the tokens that it is of: all but unknown ones, none of a
    row that does not fit. Collective."""
    rank, world_size = distributed.rank(), distributed.world_size()
    batches = evaluation_batches(prefixes, fitted, pauses, capacity, micro, rank, world_size)
    # Column 0 adds up log-likelihoods, column 1 counts: a row that does not fit is on no rank and keeps a count of 0.
    total = torch.zeros(len(prefixes.store), 2, dtype=torch.float64)
    with engine.evaluating() as model:
        for batch in batches:
            losses = model(**batch.to(distributed.device()), reduction="none").double().cpu()
            total.index_add_(0, batch.texts, torch.stack([-losses, torch.ones_like(losses)], dim=1))
    sums, num = distributed.all_reduce(total.to(distributed.device())).cpu().T
    return sums, num


def score_texts(engine: Engine, data: EvaluationSet, pauses: Pauses, capacity: int, micro: int) -> Scores:
    """Perplexity of whole texts, each token given those before it in its row of `capacity` tokens."""
    cut, text = pieces(data.store.rows, capacity)
    store = data.store.with_rows(cut)
    fitted, number = fit(store, capacity, 0), len(data.examples)
    found = likelihoods(engine, Prefixes(store, fitted.cut), fitted, pauses, capacity, micro)
    sums, num_tokens = (np.bincount(text, weights=part.numpy(), minlength=number) for part in found)
    characters = [len(example.targets[0]) for example in data.examples]
    values = perplexity((-sums).tolist(), num_tokens.tolist(), characters)
    num_unknown = int(store.lengths[:, 2].sum() - num_tokens.sum())
    if num_unknown:
        del values["nats_per_character"]
    each, read = (-sums / np.maximum(num_tokens, 1)).tolist(), int(fitted.length.sum())
    return Scores(values, [""] * number, each, 0, 0, read, num_tokens.tolist(), num_unknown)


def score_answers(
    engine: Engine, data: EvaluationSet, pauses: Pauses, capacity: int, micro: int, tokenizer: Any
) -> Scores:
    """KorQuAD's exact match and character F1 of greedily written answers."""
    new_tokens = data.task.max_new_tokens
    prefixes, fitted = fitted_prefixes(engine, data, pauses, capacity - new_tokens)
    prompts = [prefixes.prompt(k, pauses) for k in fitted.used.tolist()]
    answers = write(engine, tokenizer, prompts, pauses, micro, max_new_tokens=new_tokens, do_sample=False)
    predictions = [""] * len(data.examples)
    for k, answer in zip(fitted.used.tolist(), answers, strict=True):
        predictions[k] = answer.strip()
    targets = [example.targets for example in data.examples]
    values = question_answering(predictions, targets)
    pairs = zip(predictions, targets, strict=True)
    each = [question_answering([text], [golds])[data.task.best_score] for text, golds in pairs]
    num_tokens = read_tokens(fitted, pauses)
    written = sum(len(ids) for ids in tokenizer(answers, add_special_tokens=False)["input_ids"]) if answers else 0
    return Scores(values, predictions, each, fitted.num_cut, fitted.num_left_out, num_tokens + written)


def fitted_prefixes(
    engine: Engine, data: EvaluationSet, pauses: Pauses, capacity: int, most: int = 0
) -> tuple[Prefixes, Fit]:
    """What the model reads of each example, cut to `capacity` tokens with its pauses; of the first `most` ones that fit
    (0: of all). Collective."""
    fitted = fit(data.store, capacity, pauses.num, pauses.inside)
    if most:
        fitted.length[fitted.used[most:]] = 0
    prefixes = Prefixes(data.store, fitted.cut)
    if pauses.placement == "least_confident" and pauses.num:
        ranked = least_confident(engine, prefixes, fitted, pauses.num, capacity)
        prefixes = Prefixes(data.store, fitted.cut, ranked)
    return prefixes, fitted


def read_tokens(fitted: Fit, pauses: Pauses) -> int:
    """Tokens that the model computes for some rows; the least confident places take a pass of their own."""
    once, ranks = int(fitted.length.sum()), pauses.num and pauses.placement == "least_confident"
    return once + (once - pauses.num * len(fitted.used) if ranks else 0)


def write(
    engine: Engine, tokenizer: Any, prompts: list[np.ndarray], pauses: Pauses, micro: int, **generation: Any
) -> list[str]:
    """What the model writes after each prompt (ids with their pauses), without special tokens. Collective.

    Prompts of about the same length share a batch, padded on the left. All ranks make the same number of calls, and
    under a sharded engine all go on until the last one has finished.
    """
    mine: dict[int, str] = {}
    lm, device = engine.module.lm, distributed.device()
    generation |= {"synced_gpus": engine.lockstep and distributed.world_size() > 1}
    with engine.evaluating():
        for numbers, computed in shares([len(prompt) for prompt in prompts], micro):
            found = write_batch(lm, tokenizer, [prompts[n] for n in computed], pauses, device, generation)
            mine |= {n: spelled(tokenizer, ids) for n, ids in zip(numbers.tolist(), found, strict=False)}
    written: dict[int, str] = {}
    for part in distributed.gather(mine):
        written |= part
    return [written[n] for n in range(len(prompts))]


def write_batch(
    lm: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[np.ndarray],
    pauses: Pauses,
    device: torch.device,
    generation: dict[str, Any],
) -> list[list[int]]:
    """One call of transformers' generate: the ids that follow each prompt, up to the end of the text."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), tokenizer.pad_token_id)
    seen = torch.zeros_like(ids)
    for k, prompt in enumerate(prompts):
        ids[k, longest - len(prompt) :] = torch.from_numpy(prompt)
        seen[k, longest - len(prompt) :] = 1
    words = [torch.from_numpy(pauses.without(prompt)).to(device) for prompt in prompts]
    out = lm.generate(
        input_ids=ids.to(device),
        attention_mask=seen.to(device),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **ignoring_pauses(words, longest, lm.generation_config, generation),
    )
    return [until(ids, tokenizer.eos_token_id) for ids in out[:, longest:].tolist()]


def spelled(tokenizer: Any, ids: list[int]) -> str:
    """The text of some ids without special tokens, and without a last character of which there is only a part: writing
    ends after any number of tokens, and a character may take four. Spaces stay as they were written: the clean-up of
    transformers, made for English, would change words that were shown already."""
    ids = ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids
    num = begun(tokenizer, ids)
    single = num and all(len(part) == 1 for part in token_bytes(tokenizer, ids[-num:]))
    text = tokenizer.decode(ids[:-num] if single else ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text[:-1] if num and not single else text  # the decoder's U+FFFD for a part of a token


def until(ids: list[int], end: int) -> list[int]:
    """Ids up to the first `end`, it too."""
    return ids[: ids.index(end) + 1] if end in ids else ids
