"""From the arguments to token stores: which source trains, which validates, and what is printed about them."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np

from finetune.arguments import DataArguments
from finetune.tasks import Example, Source, Task
from kozero import distributed
from kozero.data.marks import MARKERS, marker_version, token_marks
from kozero.data.readers import LeftOut, hub_rows
from kozero.data.rows import off_characters
from kozero.data.store import (
    TextRow,
    TokenStore,
    encodings,
    key_of,
    open_or_build,
    spaced,
    tokenizer_hash,
    unknown_note,
)
from kozero.errors import UserError
from kozero.files import file_hash
from kozero.folder import cache_folder
from kozero.json_files import regular
from kozero.metrics import exact_match

HERE = "<file>"  # the source's path in a store's notes: another file of the same content has the same store
SAMPLE_DATA = Path(__file__).parent.parent / "sample_data"
SAMPLE_TOKENIZER = SAMPLE_DATA / "tokenizer"
CHECKED_ROWS = 100  # of each source, before anything takes long


def sources(arguments: DataArguments, task: Task) -> tuple[Source, Source]:
    """Where training and validation examples come from. Their first rows are read: what is wrong with a file is told
    before a model is loaded."""
    found = named_sources(arguments, task)
    for source in found:
        if source.path or source.hub:
            check_rows(source, task)
    return found


def check_rows(source: Source, task: Task) -> None:
    """Refuse a source whose first rows break the task's form."""
    for _ in read(source, task, LeftOut(), CHECKED_ROWS):
        pass


def named_sources(arguments: DataArguments, task: Task) -> tuple[Source, Source]:
    """What the arguments name."""
    skip = arguments.bad_rows == "skip"
    if arguments.from_hub:
        name, config, train, validation = task.hub
        train, validation = (Source(hub=(name, config, split), skip_bad_rows=skip) for split in (train, validation))
        return train, validation
    if not (arguments.train_file or arguments.validation_file):
        train, validation = (SAMPLE_DATA / name for name in task.sample_files)
        distributed.say(f"no --train_file and no --from_hub: using the sample data in {SAMPLE_DATA.name}/")
        return Source(train), Source(validation)
    train = regular(Path(arguments.train_file)) if arguments.train_file else None
    if arguments.validation_file:
        validation = regular(Path(arguments.validation_file))
        return Source(train, skip_bad_rows=skip), Source(validation, skip_bad_rows=skip)
    fraction = arguments.validation_fraction
    return (
        Source(train, skip_bad_rows=skip, side="train", validation_fraction=fraction),
        Source(train, skip_bad_rows=skip, side="validation", validation_fraction=fraction),
    )


def training_sources(arguments: DataArguments, task: Task) -> tuple[Source, Source]:
    """The same for a run that trains, which needs something to train on."""
    train, validation = sources(arguments, task)
    if train.path is None and train.hub is None:
        raise UserError("--validation_file alone trains nothing; give --train_file too")
    return train, validation


def cached_store(
    source: Source, task: Task, kind: str, limit: int, tokenizer: Any, cache_dir: str, placement: str = "append"
) -> TokenStore:
    """The token store of a source: `train` pairs, or all `choices` of every example, or `prompts` alone, with the marks
    of a placement that follows the text.

    Built once a machine; the other ranks wait and read it.
    """
    key = key_of(
        task.name, kind, *identity(source, limit), tokenizer_hash(tokenizer), tokenizer.eos_token_id,
        *marker_version(placement),
    )  # fmt: skip
    marker = partial(token_marks, placement) if placement in MARKERS else None
    left_out = LeftOut()

    def rows() -> Iterator[TextRow]:
        for example in read(source, task, left_out, limit):
            yield from text_rows(example, task, kind)

    cache = cache_folder(cache_dir)

    def notes() -> list[str]:
        return [line.replace(str(source.path), HERE) for line in left_out.lines()]

    build = partial(open_or_build, cache, key, rows, tokenizer, notes, marker)
    store = TokenStore(distributed.once_a_machine(lambda: build().folder))
    for note in store.meta["notes"] + unknown_notes(store, tokenizer):
        distributed.say(f"{source}: {note.replace(HERE, str(source.path))}")
    return store


def unknown_notes(store: TokenStore, tokenizer: Any) -> list[str]:
    """What a tokenizer cannot spell in a store."""
    num = store.unknown_targets()
    share = f"; {num / len(store):.2%} of the targets hold one, without loss on it" if num else ""
    return unknown_note(int((store.tokens == store.unk_id).sum()), len(store.tokens), tokenizer, share)


def identity(source: Source, limit: int) -> tuple:
    """What the name of a store says of its source: another content or choice of rows is another store. Collective."""
    if source.path:
        content = file_hash(source.path)
    else:
        content = distributed.once_a_machine(lambda: [*source.hub, hub_rows(*source.hub)._fingerprint])
    return limit, content, source.side, source.validation_fraction, source.skip_bad_rows


def read(source: Source, task: Task, left_out: LeftOut, limit: int = 0) -> Iterator[Example]:
    """Examples of a source, the first `limit` of them; refuses a source without any and tells why there are none."""
    count = 0
    for example in islice(task.examples(source, left_out), limit or None):
        count += 1
        yield example
    if not count:
        split = "all groups are on the other side; change --validation_fraction or give --validation_file"
        why = "; ".join(left_out.lines()) or (split if source.side != "all" else "it holds no rows")
        raise UserError(f"{source}: no examples ({why})")


def text_rows(example: Example, task: Task, kind: str) -> Iterator[TextRow]:
    """The rows that an example becomes."""
    if kind == "train":
        prompt, target = task.training_pair(example)
        yield TextRow(example.context, prompt, target, example.answer_span)
    elif kind == "choices":
        for prompt, target in task.choices(example):
            yield TextRow(example.context, prompt, target)
    else:
        yield TextRow(example.context, example.prompt, "")


@dataclass
class EvaluationSet:
    """Examples with what the model needs to be scored on them."""

    task: Task
    examples: list[Example]
    store: TokenStore  # choices: len(labels) rows an example; prompts and whole texts: one row an example

    def heads(self, inside: np.ndarray, num_tokens: int = 16) -> "EvaluationSet":
        """The first tokens of whole texts as prompts of whole characters; `inside`: see Pauses."""
        rows = self.store.rows.copy()
        rows[:, 1] = rows[:, 0]
        ends = np.minimum(rows[:, 0] + num_tokens, rows[:, 3] - 1)
        rows[:, 2] = off_characters(self.store.tokens, ends, inside, -1, rows[:, 0])
        return EvaluationSet(self.task, self.examples, self.store.with_rows(rows))


def evaluation_set(
    source: Source, task: Task, arguments: DataArguments, tokenizer: Any, placement: str = "append"
) -> EvaluationSet:
    """All examples of a source, or --max_eval_samples of them, evenly spaced, for pauses of a placement."""
    kind = "choices" if task.labels else "train" if task.whole_texts else "prompts"
    store = cached_store(source, task, kind, 0, tokenizer, arguments.cache_dir, placement)
    examples = list(read(source, task, LeftOut()))
    chosen = evenly(len(examples), arguments.max_eval_samples)
    if len(chosen) < len(examples):
        width = len(store) // len(examples)
        store.rows = store.rows[[k * width + j for k in chosen for j in range(width)]]
    found = EvaluationSet(task, [examples[k] for k in chosen], store)
    if kind == "prompts":
        tell_reachable(source, found.examples, tokenizer)
    return found


def tell_reachable(source: Source, examples: list[Example], tokenizer: Any) -> None:
    """Say how many examples have no answer that the tokenizer gives back as it is, and the best score that leaves."""
    answers = [spaced(text, True) for example in examples for text in example.targets]
    ids = [found.ids for found in encodings(answers, tokenizer)]
    spelled = iter(tokenizer.batch_decode(ids, skip_special_tokens=True))
    pairs = [[(next(spelled), text) for text in example.targets] for example in examples]
    lost = sum(all(normalize("NFC", a.strip()) != normalize("NFC", b.strip()) for a, b in pair) for pair in pairs)
    best = sum(max(exact_match(*texts) for texts in pair) for pair in pairs) / len(pairs)
    if lost:
        told = f"{lost:,} of {len(pairs):,} answers cannot be written as they are"
        distributed.say(f"{source}: {told}; exact_match is {100 * best:.1f} at most")


def evenly(num: int, wanted: int) -> list[int]:
    """`wanted` evenly spaced numbers below `num`; all of them when `wanted` is 0 or no less."""
    wanted = min(wanted or num, num)
    return [k * num // wanted for k in range(wanted)]
