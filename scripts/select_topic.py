"""From a folder of Korean texts to training data on some topics: clean, drop duplicates, take what BM25 ranks highest
for the topic's queries, split by document.

python scripts/select_topic.py --files sample_data/corpus --topic 음식 --query 된장찌개 국수 --output_dir runs/food
"""

import json
import re
import resource
import shlex
import tempfile
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from finetune.bm25 import has_kiwi, search
from kozero.config import arg, at_least, check_seed, parse_arguments
from kozero.data.cleaning import Cleaner
from kozero.data.documents import SUFFIXES, Pool, documents
from kozero.data.duplicates import duplicates
from kozero.data.readers import text_files
from kozero.errors import require, run_main
from kozero.folder import cache_folder, write_text
from kozero.json_files import has_lone_surrogate, read_json_object
from kozero.seal import new_folder

FUSION = 60  # of reciprocal rank fusion (Cormack, Clarke, Buettcher, SIGIR 2009)
Chosen = list[tuple[int, float]]  # (number, score) of documents, the best first
TOPIC = re.compile(r"\w[\w +-]{0,59}")  # it becomes a folder's name, of at most 180 bytes


@dataclass
class SelectionArguments:
    """What is read, what is wanted, what is left out."""

    files: list[str] = field(
        default_factory=list,
        metadata={"help": "texts, or folders of them: .txt and .dat, .jsonl with a field text, .json as KorQuAD's"},
    )
    unit: str = arg("document", "of .txt and .dat: up to a blank line, or one line", choices=["document", "line"])
    query: list[str] = field(default_factory=list, metadata={"help": "queries of one topic; their rankings are fused"})
    topic: str = arg("topic", "name of the topic of --query, and of its folder")
    topics_file: str | None = arg(None, 'JSON of several topics: {"name": ["query", "query"], ...}')
    top_k: int = arg(500, "documents of a topic at most")
    validation_fraction: float = arg(0.1, "share of the documents that validates, at least one of every topic; 0: none")
    output_dir: str = arg("runs/selection", "folder for a folder a topic, report.json and summary.md")
    min_chars: int = arg(20, "shorter documents are left out; characters after cleaning")
    max_chars: int = arg(0, "longer documents are left out; 0: none")
    min_hangul: float = arg(0.5, "share of Hangul syllables among the letters below which a document is left out")
    similarity: float = arg(0.8, "Jaccard index of character 5-grams from which two documents are duplicates")
    terms: str = arg("kiwi", "what BM25 counts: morphemes, or pairs of syllables (faster)", choices=["kiwi", "bigram"])
    cache_dir: str = arg("~/.cache/kozero", "folder of analysed texts")
    seed: int = arg(42, "seed of the random documents beside the selected ones")

    def __post_init__(self) -> None:
        require(bool(self.files), "--files: name at least one file or folder")
        require(bool(self.query) != bool(self.topics_file), "--query and --topics_file: give one of the two")
        at_least(1, self, "top_k")
        at_least(0, self, "min_chars", "max_chars")
        check_seed(self.seed)
        for name in ("validation_fraction", "min_hangul"):
            value = getattr(self, name)
            require(0 <= value < 1, f"--{name} {value}: must be from 0 to below 1")
        require(0 < self.similarity <= 1, f"--similarity {self.similarity}: must be above 0 and at most 1")


def main() -> None:
    """Clean, drop duplicates, search, write."""
    (arguments,) = parse_arguments(SelectionArguments, prog="scripts/select_topic.py", description=__doc__)
    wanted = topics(arguments)
    files = [file for name in arguments.files for file in text_files("--files", Path(name), SUFFIXES)]
    if arguments.terms == "kiwi" and not has_kiwi():
        print("kiwipiepy is not installed: BM25 counts pairs of syllables")
        arguments.terms = "bigram"
    named = Path(arguments.output_dir)
    with new_folder("--output_dir", named) as folder:
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            report = select(arguments, wanted, files, folder, Path(scratch))
        write_text(folder / "report.json", json.dumps(report, indent=2, ensure_ascii=False))
        write_text(folder / "summary.md", summary(report))
    print(named / "summary.md")
    print(next_command(named, report["topics"]))


def next_command(folder: Path, told: dict[str, dict]) -> str:
    """What to do with the first topic that has something to learn from."""
    name = next(name for name, topic in told.items() if topic["train"]["documents"])
    files = {"train_file": folder / name / "train.jsonl"}
    if told[name]["validation"]["documents"]:
        files["validation_file"] = folder / name / "validation.jsonl"
    flags = " ".join(f"--{flag} {shlex.quote(str(path))}" for flag, path in files.items())
    return f"next: python finetune/train.py --task essay {flags}"


def topics(arguments: SelectionArguments) -> dict[str, list[str]]:
    """Queries by topic.

    Raises: UserError for a name that cannot be a folder's, and for a topic without queries.
    """
    where = arguments.topics_file or "--query"
    given = read_json_object(arguments.topics_file) if arguments.topics_file else {arguments.topic: arguments.query}
    require(bool(given), f"{where}: no topic")
    found: dict[str, list[str]] = {}
    for name, queries in given.items():
        name = unicodedata.normalize("NFC", name)
        require(name not in found, f"{where}: topic {name!r} is there twice")
        fits = TOPIC.fullmatch(name) is not None
        require(fits, f"{where}: topic {name!r} names a folder; use at most 60 letters and digits")
        texts = isinstance(queries, list) and all(isinstance(query, str) and query.strip() for query in queries)
        spelled = next((query for query in queries if has_lone_surrogate(query)), None) if texts else None
        require(spelled is None, f"{where} {spelled!a}: is not UTF-8")
        require(bool(texts and queries), f'{where}: topic {name!r}: must be a list of queries, e.g. ["여행의 설렘"]')
        found[name] = [" ".join(unicodedata.normalize("NFC", query).split()) for query in queries]
    return found


def select(
    arguments: SelectionArguments, wanted: dict[str, list[str]], files: list[Path], folder: Path, scratch: Path
) -> dict[str, Any]:
    """The whole way: a folder of each topic in `folder`. Returns the report."""
    cleaner = Cleaner(arguments.min_chars, arguments.max_chars, arguments.min_hangul)
    clock, rates = time.monotonic(), {}

    def lap(what: str, num: int) -> None:
        nonlocal clock
        seconds, clock = time.monotonic() - clock, time.monotonic()
        rates[what] = round(num / max(seconds, 1e-9))
        print(f"{what}: {num:,} documents, {seconds:.1f} s, {rates[what]:,} a second", flush=True)

    found = (item for file in files for item in documents(file, arguments.unit, cleaner.counts))
    pool = Pool(scratch / "documents.jsonl", cleaner.texts(found))
    why = counted(cleaner.counts) or "there is none"
    require(len(pool) > 0, f"--files {' '.join(arguments.files)}: no document stays ({why})")
    lap("cleaned", cleaner.counts["documents read"])
    earlier = duplicates(pool, arguments.similarity, scratch)
    cleaner.counts["left out: near duplicates"] = int((earlier >= 0).sum())
    lap("compared", len(pool))
    pool.keep(np.flatnonzero(earlier < 0))
    queries = [query for own in wanted.values() for query in own]
    numbers, scores = search(queries, pool, arguments.top_k, cache_folder(arguments.cache_dir), arguments.terms)
    lap("ranked", len(pool))
    chosen, at = {}, 0
    for name, own in wanted.items():
        part = slice(at, at := at + len(own))
        chosen[name] = fused(numbers[part], scores[part])[: arguments.top_k]
        if not chosen[name]:
            print(f"topic {name}: no document has a word of its queries")
    otherwise = ", or --terms bigram" if arguments.terms == "kiwi" else ""
    require(any(chosen.values()), f"no document has a word of any query; write other queries{otherwise}")
    fraction = arguments.validation_fraction
    sides = Sides(fraction, fraction and [[pool[k][1] for k, _ in found] for found in chosen.values()])
    report = {"counts": dict(cleaner.counts), "documents": len(pool), "documents_per_second": rates}
    report |= {"validation_fraction": fraction, "topics": {name: {"queries": wanted[name]} for name in chosen}}
    for name, found in chosen.items():
        report["topics"][name] |= write_topic(folder / name, pool, found, sides, arguments.seed)
    return report | {"peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}  # KiB on Linux


def fused(numbers: np.ndarray, scores: np.ndarray) -> Chosen:
    """(number, score) of the documents that several queries found, the best first, by reciprocal ranks.

    Args: numbers, scores: (Q, K) of each query, the best first; a document with score 0 was not found.
    """
    total: dict[int, float] = {}
    for found, values in zip(numbers.tolist(), scores.tolist(), strict=True):
        for rank, (number, value) in enumerate(zip(found, values, strict=True), start=1):
            if value > 0:
                total[number] = total.get(number, 0.0) + 1 / (FUSION + rank)
    return sorted(total.items(), key=lambda item: (-item[1], item[0]))


def draw(text: str) -> float:
    """A number in [0, 1) that is a text's own."""
    return int.from_bytes(sha256(text.encode()).digest()[:8], "big") / 2**64


class Sides:
    """On which side a document is: that of its text, so that it is the same one for every topic.

    Args: fraction: share that validates. topics: the texts of each; a topic of several documents of which none would
        validate gives the one that is nearest to it.
    """

    def __init__(self, fraction: float, topics: Sequence[Sequence[str]]) -> None:
        self.fraction = fraction
        few = [texts for texts in topics or () if len(texts) > 1 and min(map(draw, texts)) >= fraction]
        self.given = {min(texts, key=draw) for texts in few}

    def validates(self, text: str) -> bool:
        """Whether a text belongs to the validation side."""
        return draw(text) < self.fraction or text in self.given


def write_topic(folder: Path, pool: Pool, chosen: Chosen, sides_of: Sides, seed: int) -> dict[str, Any]:
    """train.jsonl, validation.jsonl and random.jsonl of a topic. Returns what is told of them.

    random.jsonl has other documents, as many characters as train.jsonl, none of the side that validates: what the same
    amount of text teaches that was not chosen.
    """
    folder.mkdir()
    sides: dict[str, list[dict]] = {"train": [], "validation": [], "random": []}
    for number, score in chosen:
        where, text = pool[number]
        side = "validation" if sides_of.validates(text) else "train"
        sides[side].append({"text": text, "source": where, "score": round(score, 6)})
    wanted, taken = sum(len(row["text"]) for row in sides["train"]), {number for number, _ in chosen}
    for number in np.random.default_rng(seed).permutation(len(pool)).tolist():
        if wanted <= 0:
            break
        where, text = pool[number]
        if number not in taken and not sides_of.validates(text):
            sides["random"].append({"text": text, "source": where, "score": 0.0})
            wanted -= len(text)
    told = {}
    for side, rows in sides.items():
        write_text(folder / f"{side}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        told[side] = {"documents": len(rows), "characters": sum(len(row["text"]) for row in rows)}
    if wanted > 0:
        told["note"] = "random.jsonl is smaller than train.jsonl: there are not enough other documents"
    best = [{"text": row["text"][:120], "source": row["source"]} for row in sides["train"][:5]]
    return told | {"best": best}


def counted(counts: dict[str, int]) -> str:
    """Counts in one line."""
    return ", ".join(f"{name} {number:,}" for name, number in counts.items() if number)


def summary(report: dict[str, Any]) -> str:
    """The report for a reader."""
    rates = ", ".join(f"{what} {rate:,}" for what, rate in report["documents_per_second"].items())
    lines = [
        "# Selected texts\n\n| | documents |\n|---|---|",
        *(f"| {name} | {number:,} |" for name, number in report["counts"].items()),
        f"| ranked | {report['documents']:,} |\n",
        f"Documents a second: {rates}. Peak memory {report['peak_memory_mib']:,} MiB.\n",
    ]
    for name, topic in report["topics"].items():
        sides = ("train", "validation", "random")
        lines += [f"## {name}\n\nQueries: {', '.join(topic['queries'])}\n\n| | documents | characters |\n|---|---|---|"]
        lines += [f"| {side} | {topic[side]['documents']:,} | {topic[side]['characters']:,} |" for side in sides]
        lines += ["", *([topic["note"], ""] if "note" in topic else []), "The best of train:\n"]
        lines += [f"- {' '.join(row['text'].split())} ({row['source']})" for row in topic["best"]] + [""]
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
