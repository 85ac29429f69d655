"""--train_mode encoder: all paragraphs as vectors in a file, and how well questions find theirs, beside BM25.

Leaves vectors.npy, whose row k is the vector of line k of passages.jsonl, retrieval.md and retrieval.json.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune.arguments import ModelArguments, ReadingArguments, TrainingDataArguments
from finetune.bm25 import rank_by_bm25
from finetune.data import read, sources
from finetune.encoder import load
from finetune.questions import QuestionSet, open_questions, question_set
from finetune.retrieval import Retrieval, Retriever
from finetune.setup import row_capacity
from finetune.tasks import ENCODER_TASKS, Source, Task
from kozero import distributed
from kozero.config import TrainingArguments, batch_sizes, describe_run
from kozero.data.framing import Framing
from kozero.data.readers import LeftOut
from kozero.engines import build_engine, prepare_engine
from kozero.files import fingerprint
from kozero.folder import cache_folder, write_text
from kozero.metrics import RECALL_AT, retrieval

BM25 = "BM25 (bm25s, kiwipiepy morphemes)"


@dataclass
class Collection:
    """Different passages of one or more sources: `tokens[k]` are those of `texts[k]`, whose place is `number[text]`."""

    texts: list[str]
    tokens: list[np.ndarray]
    number: dict[str, int]


def encode_passages(
    training: TrainingArguments,
    model_arguments: ModelArguments,
    data: TrainingDataArguments,
    reading: ReadingArguments,
    output_dir: Path,
) -> None:
    """Model, passages, engine, vectors, search, table."""
    settings = prepare_engine(training, batch_sizes(training, distributed.world_size()))
    task = ENCODER_TASKS[data.task]
    train_source, validation_source = sources(data, task)
    model = load(model_arguments, Retriever, training.seed)
    capacity = row_capacity(data.max_seq_length, task.max_seq_length, model.encoder.config.max_position_embeddings)
    retriever = Retrieval(reading, Framing.of(model.tokenizer), capacity)
    limits = {train_source: data.max_train_samples, validation_source: 0}
    named = {source: limit for source, limit in limits.items() if source.path or source.hub}
    passages = collect(named, task, model.tokenizer, data.cache_dir)
    questions = question_set(validation_source, task, data.max_eval_samples, model.tokenizer, data.cache_dir)
    engine = build_engine(model.module, training, settings)

    micro = training.per_device_eval_batch_size or training.per_device_train_batch_size
    building = output_dir / "vectors.npy.incomplete"  # has its name when all that belongs to it is there
    vectors = retriever.write_vectors(engine, passages.tokens, micro, building)
    found = retriever.search(engine, questions, vectors, micro)
    by_bm25 = distributed.machine_first(lambda: bm25_ranks(questions, passages, data))
    if distributed.is_main():
        name = model_arguments.model_name_or_path or f"random weights of {model_arguments.config_file}"
        wanted = np.array([passages.number[example.context] for example in questions.examples])
        scores = {name: retrieval(found, wanted), BM25: retrieval(by_bm25, wanted)}
        told = {
            "questions": f"{len(questions.examples):,} of {validation_source}",
            "passages": f"{len(passages.texts):,} of {', '.join(map(str, named))}",
            "tokens": f"the first {capacity} of a passage for the encoder, all of it for BM25",
        }
        run = describe_run(training, model_arguments, data, reading)
        (output_dir / "vectors.npy").unlink(missing_ok=True)
        save(output_dir, building, passages, told, scores, run)
        building.rename(output_dir / "vectors.npy")
    engine.close()
    distributed.shutdown()
    distributed.say(str(output_dir / "vectors.npy"))


def collect(sources: dict[Source, int], task: Task, tokenizer: Any, cache_dir: str) -> Collection:
    """The passages of sources, of each those of its first so many questions (0: all), each text once."""
    tokens: dict[str, np.ndarray] = {}
    for source, limit in sources.items():
        store = open_questions(source, task, limit, tokenizer, cache_dir)
        texts = dict.fromkeys(example.context for example in read(source, task, LeftOut(), limit))
        for number, text in enumerate(texts):
            tokens.setdefault(text, store.passage(number))
    return Collection(list(tokens), list(tokens.values()), {text: k for k, text in enumerate(tokens)})


def bm25_ranks(questions: QuestionSet, passages: Collection, data: TrainingDataArguments) -> np.ndarray | None:
    """The same search by words, on rank 0."""
    if not distributed.is_main():
        return None
    asked = [example.prompt for example in questions.examples]
    return rank_by_bm25(asked, passages.texts, max(RECALL_AT), cache_folder(data.cache_dir))


def save(
    output_dir: Path, vectors: Path, passages: Collection, told: dict[str, str], scores: dict[str, dict], run: dict
) -> None:
    """The texts of the vectors, the table, and everything as JSON with the hashes of vectors and texts; prints the
    table."""
    lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in passages.texts)
    write_text(output_dir / "passages.jsonl", "".join(lines))
    text = table(scores)
    notes = "".join(f"- {name}: {value}\n" for name, value in told.items())
    write_text(output_dir / "retrieval.md", f"{text}\n{notes}")
    files = {"vectors.npy": fingerprint(vectors), "passages.jsonl": fingerprint(output_dir / "passages.jsonl")}
    found = told | {"scores": scores, "files": files} | run
    write_text(output_dir / "retrieval.json", json.dumps(found, indent=2, ensure_ascii=False))
    print(f"{text}\n{notes}", end="")


def table(scores: dict[str, dict[str, float]]) -> str:
    """A Markdown table of scores by name, a row a name."""
    columns = list(next(iter(scores.values())))
    rows = [["retriever", *columns], ["---"] * (1 + len(columns))]
    rows += [[name, *(f"{values[column]:.4f}" for column in columns)] for name, values in scores.items()]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
