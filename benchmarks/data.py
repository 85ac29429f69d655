"""Data beside the libraries that a user would take: tokenising a file of reviews, starting again with what is cached,
and rows a second of the loader alone.

    python benchmarks/data.py --train_file nsmc/ratings_train.txt --output_file data.json

Ours reads the published TSV into a token store and packs rows of it; the peer is `datasets.map`, in this process and in
two workers of one thread each, and a DataLoader that pads to the longest of a batch. Threads of the tokenizers library:
all cores, and one. Times are of whole calls in a process of their own; memory is the most that one process held. The
limit is the rate at which that library encodes the same reviews, in batches of 1,000, with nothing else to do.
"""

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from contest import Block, Contender, Reported, compete, report, table, timed

from finetune.arguments import DataArguments
from finetune.data import SAMPLE_TOKENIZER, cached_store, read, sources
from finetune.tasks import TASKS, Source
from kozero import distributed
from kozero.config import BatchSizes, arg, at_least, parse_arguments
from kozero.data.batches import TrainingRows
from kozero.data.readers import LeftOut
from kozero.errors import require, run_main
from kozero.pause import Pauses
from models.language_model import load_tokenizer

ROWS = 32  # of a batch
ALONE = 1000  # reviews that the library gets at once


@dataclass
class BenchmarkArguments(Reported):
    """What to run. Without --train_file: the sample data."""

    train_file: str | None = arg(None, "TSV of NSMC")
    tokenizer_name_or_path: str = arg(str(SAMPLE_TOKENIZER), "folder")
    row_length: int = arg(256, "tokens of a packed row")
    batches: int = arg(200, "batches of 32 that a loader makes in a block")
    rounds: int = arg(3, "blocks of each side that count; one more before them warms up")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "row_length", "batches", "rounds")


def main() -> None:
    """Measure, check, print a Markdown table."""
    (arguments,) = parse_arguments(BenchmarkArguments, prog="benchmarks/data.py", description=__doc__)
    source, _ = sources(DataArguments(task="nsmc", train_file=arguments.train_file), TASKS["nsmc"])
    print(f"{source.path}: {len(reviews_of(Source(source.path))):,} reviews", flush=True)
    with tempfile.TemporaryDirectory(prefix="kozero-data-") as folder:
        told = (arguments, str(source.path), folder)
        sides = [
            Contender("kozero", ours, (*told, 0)),
            Contender("kozero, 1 thread", ours, (*told, 1)),
            Contender("datasets.map", peer, (*told, None)),
            Contender("datasets.map, 2 workers", peer, (*told, 2)),
        ]
        limits = [Contender(f"tokenizers, threads: {num or 'all'}", alone, (*told, num)) for num in (0, 1)]
        blocks = compete([*sides, *limits], arguments.rounds)
    size = source.path.stat().st_size / 1e6
    seconds = [median([block["cold"] for block in blocks.pop(side.name)[1:]]) for side in limits]
    all_threads, one = (size / number for number in seconds)
    print(f"the tokenizers library alone: {all_threads:.2f} MB/s, with one thread {one:.2f}")
    rows = [figures(name, found, size) for name, found in blocks.items()]
    for row in rows:
        row["share"] = row["mb_per_s"] / (one if row["name"] == "kozero, 1 thread" else all_threads)
    print(table(
        ("side", "tokenised, MB/s", "least to most", "of the library's rate", "start with what is cached, s",
         "least to most", "loader: texts/s", "least to most", "real tokens/s", "peak MiB"),
        [(row["name"], f"{row['mb_per_s']:.2f}", "{:.2f} to {:.2f}".format(*row["mb_spread"]), f"{row['share']:.0%}",
          f"{row['warm']:.3f}", "{:.3f} to {:.3f}".format(*row["warm_spread"]), f"{row['texts_per_s']:,.0f}",
          "{:,.0f} to {:,.0f}".format(*row["texts_spread"]), f"{row['tokens_per_s']:,.0f}", f"{row['peak_mib']:.0f}")
         for row in rows],
    ))  # fmt: skip
    report(arguments, rows, library_mb_per_s=all_threads, library_mb_per_s_1_thread=one)
    for row in rows[1:]:
        require(row["tokens"] == rows[0]["tokens"], f"{row['name']}: {row['tokens']:,} tokens, {rows[0]['tokens']:,}")


def reviews_of(source: Source) -> list[str]:
    """The reviews of a file of NSMC, in its order."""
    return [example.targets[0] for example in read(source, TASKS["nsmc"], LeftOut())]


def figures(name: str, blocks: list[dict[str, Any]], size: float) -> dict[str, Any]:
    """A side's row, of a file of `size` MB; its first block warmed up."""
    later = blocks[1:]
    rates, starts = [size / block["cold"] for block in later], [block["warm"] for block in later]
    texts = [block["texts"] / block["loading"] for block in later]
    return {
        "name": name,
        "tokens": blocks[0]["tokens"],
        "mb_per_s": median(rates),
        "mb_spread": (min(rates), max(rates)),
        "warm": median(starts),
        "warm_spread": (min(starts), max(starts)),
        "texts_per_s": median(texts),
        "texts_spread": (min(texts), max(texts)),
        "tokens_per_s": median([block["loaded"] / block["loading"] for block in later]),
        "peak_mib": max(block["peak_mib"] for block in later),
        "blocks": blocks,
    }


def peak_mib() -> float:
    """Of this process and of those that it waited for."""
    used = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(used) / 1024


def ours(arguments: BenchmarkArguments, path: str, folder: str, threads: int) -> Block:
    """This project's store and packed rows."""
    if threads:
        os.environ["RAYON_NUM_THREADS"] = str(threads)
    distributed.setup()
    tokenizer = load_tokenizer(arguments.tokenizer_name_or_path)
    source, _ = sources(DataArguments(task="nsmc", train_file=path, validation_file=path), TASKS["nsmc"])
    cache = Path(folder) / f"kozero-{threads}"

    def store() -> Any:
        return cached_store(source, TASKS["nsmc"], "train", 0, tokenizer, str(cache))

    def block() -> dict[str, Any]:
        shutil.rmtree(cache, ignore_errors=True)
        cold, built = timed(store)
        warm, rows = timed(lambda: TrainingRows(store(), Pauses(0, 0), arguments.row_length, "packed", seed=0))
        micro = min(ROWS, len(rows))
        sizes = BatchSizes(micro, 1, 1)
        batches = min(arguments.batches, len(rows) // micro)

        loading, loaded = timed(lambda: [rows.step(k * micro, sizes, 0)[0] for k in range(batches)])
        return {
            "cold": cold, "warm": warm, "tokens": len(built.tokens), "loading": loading,
            "texts": sum(len(batch.texts.unique()) for batch in loaded),
            "loaded": sum(batch.num_tokens for batch in loaded), "peak_mib": peak_mib(),
        }  # fmt: skip

    return block


def alone(arguments: BenchmarkArguments, path: str, folder: str, threads: int) -> Block:
    """The library under both, of which nobody keeps what it finds."""
    if threads:
        os.environ["RAYON_NUM_THREADS"] = str(threads)
    backend = load_tokenizer(arguments.tokenizer_name_or_path).backend_tokenizer
    texts = [f" {review}" for review in reviews_of(Source(Path(path)))]

    def encode() -> None:
        for start in range(0, len(texts), ALONE):
            backend.encode_batch_fast(texts[start : start + ALONE], add_special_tokens=False)

    def block() -> dict[str, Any]:
        return {"cold": timed(encode)[0]}

    return block


def peer(arguments: BenchmarkArguments, path: str, folder: str, workers: int | None) -> Block:
    """datasets and a DataLoader, as transformers' examples have them."""
    import datasets
    from torch.utils.data import DataLoader
    from transformers import DataCollatorForSeq2Seq

    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(arguments.tokenizer_name_or_path)
    labels = ("부정", "긍정")

    def encode(rows: dict[str, list]) -> dict[str, list]:
        prompts = tokenizer([labels[label] for label in rows["label"]], add_special_tokens=False)["input_ids"]
        texts = [f" {text.strip()}" for text in rows["document"]]
        targets = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ends = [target + [tokenizer.eos_token_id] for target in targets]
        return {
            "input_ids": [p + t for p, t in zip(prompts, ends, strict=True)],
            "labels": [[-100] * len(p) + t for p, t in zip(prompts, ends, strict=True)],
        }

    cache = Path(folder) / f"datasets-{workers}"

    def tokenised() -> Any:
        read = datasets.load_dataset(
            "csv", data_files=path, delimiter="\t", lineterminator="\n", quoting=3, keep_default_na=False,
            split="train", cache_dir=str(cache),
        )  # fmt: skip
        read = read.filter(lambda rows: [bool(text.strip()) for text in rows["document"]], batched=True)
        return read.map(encode, batched=True, num_proc=workers, remove_columns=read.column_names)

    def batches(data: Any) -> Iterator[dict]:
        collate = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
        loader = DataLoader(data, ROWS, shuffle=True, collate_fn=collate)
        for number, batch in enumerate(loader):
            if number == arguments.batches:
                return
            yield batch

    def block() -> dict[str, Any]:
        shutil.rmtree(cache, ignore_errors=True)
        cold, data = timed(tokenised)
        warm, data = timed(tokenised)
        loading, loaded = timed(lambda: list(batches(data)))
        tokens = sum(int(batch["attention_mask"].sum()) for batch in loaded)
        return {
            "cold": cold, "warm": warm, "tokens": sum(map(len, data["input_ids"])), "loading": loading,
            "texts": sum(len(batch["input_ids"]) for batch in loaded), "loaded": tokens, "peak_mib": peak_mib(),
        }  # fmt: skip

    return block


if __name__ == "__main__":
    run_main(main)
