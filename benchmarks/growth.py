"""How time and memory grow: with the data, with the ranks that share a batch, with the length of a row.

    python benchmarks/growth.py --of data --train_file nsmc/ratings_train.txt --output_file growth_data.json
    python benchmarks/growth.py --of ranks --stage 2 --output_file growth_ranks.json
    python benchmarks/growth.py --of length --output_file growth_length.json

data: so many times --reviews are tokenised into a token store, then started from (the store is found, its rows are
packed). A file that is too short is read again from its beginning. ranks: updates of the same --rows rows of --length
tokens, whose losses must agree. length: updates of --rows rows, each one text, or texts of --text_length tokens side by
side, which must predict as many tokens.

Each size is a process (or one a rank) of its own, and they take turns. "Peak" is the most that a process held, of the
rank that held the most and without pages of files; "of the work" is that without what it held before: Python and the
libraries. An exponent is that of the growth since the row before: 0 is constant, 1 linear, 2 quadratic.
"""

import math
import shutil
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import chain, cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from contest import Block, Contender, Reported, compete, report, table, timed

from finetune.arguments import DataArguments
from finetune.data import SAMPLE_TOKENIZER, cached_store, read, sources
from finetune.tasks import TASKS, Source
from kozero import distributed
from kozero.config import BatchSizes, TrainingArguments, arg, at_least, parse_arguments
from kozero.data.batches import Text, TrainingRows, collate
from kozero.data.readers import LeftOut
from kozero.data.store import TokenStore
from kozero.engines import build_engine, prepare_engine
from kozero.errors import require, run_main
from kozero.memory import PROC, Memory, ProcessMemory, rank_memory
from kozero.pause import Pauses
from models.causal_lm import CausalLM, build
from models.language_model import load_tokenizer, read_config, set_dropout
from runs import ROOT

UNITS = {"data": "times the data", "ranks": "ranks", "length": "tokens of a row"}
SIZES = {"data": "1,10,100", "ranks": "1,2,4", "length": "128,256,512,1024"}
RATE = 1e-4
TOLERANCES = {False: 1e-4, True: 1e-2}  # of losses on other numbers of ranks, relative; by --bf16


@dataclass
class BenchmarkArguments(Reported):
    """What grows, and what else there is."""

    of: str = arg("data", "what grows", choices=list(SIZES))
    sizes: str | None = arg(
        None, f"by comma: times the data, ranks, or tokens of a row; default: {SIZES['data']}, {SIZES['ranks']} or "
        f"{SIZES['length']}",
    )  # fmt: skip
    rounds: int = arg(3, "blocks of each size that count; one more before them warms up")
    train_file: str | None = arg(None, "TSV of NSMC; default: the sample data")
    tokenizer_name_or_path: str = arg(str(SAMPLE_TOKENIZER), "folder")
    reviews: int = arg(1500, "reviews at size 1 of the data")
    row_length: int = arg(128, "tokens of a packed row of reviews")
    config_file: str = arg("models/small_config.json", "model JSON of the updates")
    stage: int = arg(0, "ZeRO stage of the updates", choices=[0, 1, 2, 3])
    bf16: bool = arg(False, "compute in bfloat16")
    rows: int = arg(8, "rows of an update over all ranks")
    length: int = arg(128, "tokens of a row where the ranks grow")
    text_length: int = arg(16, "tokens of a short text")
    updates: int = arg(2, "updates of a block")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, self, "rounds", "reviews", "row_length", "rows", "length", "text_length", "updates")
        self.sizes = self.sizes or SIZES[self.of]
        numbers = self.sizes.split(",")
        whole = all(number.isdecimal() and int(number) for number in numbers)
        require(whole and len(numbers) > 1, f"--sizes {self.sizes}: must be two numbers above 0 or more, by comma")
        if self.of != "data":
            self.check_rows(list(map(int, numbers)))

    def check_rows(self, sizes: list[int]) -> None:
        """Rows fit the model and are shared evenly."""
        longest = max(sizes) if self.of == "length" else self.length
        positions = read_config(Path(self.config_file)).n_positions
        flag = "sizes" if self.of == "length" else "length"
        require(longest <= positions, f"--{flag} {getattr(self, flag)}: the model has {positions} positions")
        uneven = [ranks for ranks in sizes if self.of == "ranks" and self.rows % ranks]
        require(not uneven, f"--rows {self.rows}: cannot be shared evenly by {''.join(map(str, uneven[:1]))} ranks")


def main() -> None:
    """Measure, check, print a Markdown table."""
    (arguments,) = parse_arguments(BenchmarkArguments, prog="benchmarks/growth.py", description=__doc__)
    require((PROC / "self/clear_refs").exists(), "this system does not tell a process's peak memory: no /proc")
    with tempfile.TemporaryDirectory(prefix="kozero-growth-") as folder:
        sides = SIDES[arguments.of](arguments, folder)
        blocks = compete([side for _, side in sides], arguments.rounds)
    rows = rows_of([(size, blocks[side.name]) for size, side in sides])
    print(table(
        ("", UNITS[arguments.of], "seconds", "least to most", "exponent", "of the work, MiB", "exponent", "peak, MiB"),
        [(row["name"], row["size"], f"{row['seconds']:.3f}", "{:.3f} to {:.3f}".format(*row["spread"]),
          cell(row["time_exponent"]), f"{row['mib']:.1f}", cell(row["memory_exponent"]), f"{row['peak_mib']:.0f}")
         for row in rows],
    ))  # fmt: skip
    report(arguments, rows)
    check(rows, arguments.of, TOLERANCES[arguments.bf16])


def rows_of(sides: list[tuple[int, list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    """Sizes and their blocks to rows, by what was measured. The first block of a side warmed up."""
    found: dict[str, list[dict[str, Any]]] = {}
    for size, blocks in sides:
        for name in blocks[0]:
            series = found.setdefault(name, [])
            row = {"name": name, "size": size} | figures([block[name] for block in blocks[1:]])
            last = series[-1] if series else row
            exponents = {"time_exponent": exponent(last, row, "seconds"), "memory_exponent": exponent(last, row, "mib")}
            series.append(row | exponents)
    return list(chain.from_iterable(found.values()))


def figures(blocks: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of some blocks, the spread of their seconds, and what was done in them."""
    seconds = [block["seconds"] for block in blocks]
    medians = {name: median([block[name] for block in blocks]) for name in ("seconds", "mib", "peak_mib")}
    return blocks[0] | medians | {"spread": (min(seconds), max(seconds))}


def exponent(last: dict[str, Any], row: dict[str, Any], name: str) -> float | None:
    """b of a figure that grows as size ** b between two rows; None where there is no such number."""
    if last["size"] == row["size"] or min(last[name], row[name]) <= 0:
        return None
    return math.log(row[name] / last[name]) / math.log(row["size"] / last["size"])


def cell(number: float | None) -> str:
    """An exponent in the table."""
    return "" if number is None else f"{number:.2f}"


def check(rows: list[dict[str, Any]], of: str, tolerance: float) -> None:
    """Losses do not depend on the ranks, nor the tokens that are predicted on how texts lie."""
    for row in rows if of == "ranks" else []:
        near = np.allclose(row["losses"], rows[0]["losses"], rtol=tolerance)
        require(near, f"{row['size']} ranks: losses {row['losses']}, of {rows[0]['size']}: {rows[0]['losses']}")
    targets = {(row["size"], row["targets"]) for row in rows if of == "length"}
    require(len(targets) == len(dict(targets)), f"unequal numbers of targets at one length: {sorted(targets)}")


Sides = list[tuple[int, Contender]]  # by their sizes


def sizes_of(arguments: BenchmarkArguments) -> list[int]:
    """As numbers."""
    return list(map(int, arguments.sizes.split(",")))


def data_sides(arguments: BenchmarkArguments, folder: str) -> Sides:
    """One a size."""
    source, _ = sources(DataArguments(task="nsmc", train_file=arguments.train_file), TASKS["nsmc"])
    for _ in read(Source(source.path), TASKS["nsmc"], LeftOut()):
        pass  # a mistake in the file is told before anything is measured
    told = (arguments, str(source.path), folder)
    return [(size, Contender(f"{size} times the data", data, (*told, size))) for size in sizes_of(arguments)]


def rank_sides(arguments: BenchmarkArguments, folder: str) -> Sides:
    """One a number of ranks."""
    told = ("an update", arguments, arguments.length, arguments.length)
    return [(ranks, Contender(f"{ranks} ranks", updates, told, ranks)) for ranks in sizes_of(arguments)]


def length_sides(arguments: BenchmarkArguments, folder: str) -> Sides:
    """Two a length."""
    short = arguments.text_length
    return [
        (size, Contender(f"{size} tokens, {name}", updates, (name, arguments, size, text or size)))
        for name, text in (("one text a row", 0), (f"texts of {short} tokens", short))
        for size in sizes_of(arguments)
    ]


def data(arguments: BenchmarkArguments, path: str, folder: str, size: int) -> Block:
    """A token store, and rows of it."""
    distributed.setup()
    tokenizer = load_tokenizer(arguments.tokenizer_name_or_path)
    file, cache, memory = Path(folder) / f"{size}.txt", Path(folder) / f"cache-{size}", ProcessMemory()
    lengthen(Path(path), file, arguments.reviews * size)

    def store() -> TokenStore:
        return cached_store(Source(file), TASKS["nsmc"], "train", 0, tokenizer, str(cache))

    def rows() -> TrainingRows:
        return TrainingRows(store(), Pauses(0, 0), arguments.row_length, "packed", seed=0)

    def block() -> dict[str, Any]:
        shutil.rmtree(cache, ignore_errors=True)
        with redirect_stdout(None):  # what was left out, again and again
            tokenised, built = measured(memory, store)
            started, _ = measured(memory, rows)
        return {"tokenising": tokenised | {"tokens": len(built.tokens)}, "starting": started}

    return block


def lengthen(source: Path, path: Path, number: int) -> None:
    """So many rows of a table, from its beginning again where they end, under its header."""
    with source.open("rb") as file:
        header = next(file)
        lines = [line.rstrip(b"\r\n") + b"\n" for line in islice(file, number)]
    with path.open("wb") as file:
        file.writelines(chain([header], islice(cycle(lines), number)))


def updates(name: str, arguments: BenchmarkArguments, length: int, text_length: int) -> Block:
    """Updates of the same rows of random tokens, each rank with its share of them."""
    distributed.setup()
    micro, rank = arguments.rows // distributed.world_size(), distributed.rank()
    config = str(ROOT / f"ds_configs/zero{arguments.stage}.json")
    training = TrainingArguments(deepspeed_config=config, bf16=arguments.bf16, per_device_train_batch_size=micro)
    settings = prepare_engine(training, BatchSizes(micro, 1, distributed.world_size()))  # DeepSpeed is imported here
    memory = rank_memory()
    before = memory.reset()
    lm = build(read_config(Path(arguments.config_file)), seed=0)
    set_dropout(lm, 0.0)
    engine = build_engine(CausalLM(lm, []), training, settings)
    ids = np.random.default_rng(0).integers(0, lm.config.vocab_size, (arguments.rows, length + 1))
    batch = collate([texts(row, text_length) for row in ids[rank * micro : (rank + 1) * micro]], length)

    def block() -> dict[str, Any]:
        memory.reset()
        seconds, stats = timed(lambda: [engine.train_step([batch], RATE) for _ in range(arguments.updates)])
        peak, held = max(distributed.gather((memory.peak(), before)))
        found = {"seconds": seconds / arguments.updates} | mebibytes(peak, held)
        return {name: found | {"losses": [step.loss for step in stats], "targets": sum(batch.num_targets)}}

    return block


def texts(row: np.ndarray, length: int) -> list[Text]:
    """(T + 1,) tokens as texts side by side, each of whose T tokens predicts the next of the row."""
    places = range(0, len(row) - 1, length)
    return [Text(row[:-1][k : k + length], row[1:][k : k + length], number) for number, k in enumerate(places)]


def measured(memory: Memory, work: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds and memory of a call, and what it returned."""
    held = memory.reset()
    seconds, found = timed(work)
    return {"seconds": seconds} | mebibytes(memory.peak(), held), found


def mebibytes(peak: int, held: int) -> dict[str, float]:
    """What was held at most, and what came on top of what was held before, both in bytes."""
    return {"mib": (peak - held) / 2**20, "peak_mib": peak / 2**20}


SIDES = {"data": data_sides, "ranks": rank_sides, "length": length_sides}

if __name__ == "__main__":
    run_main(main)
