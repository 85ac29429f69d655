"""Documents of files as people have them: texts in UTF-8 or CP949, NSMC's tables, JSON lines, KorQuAD's JSON."""

import codecs
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from kozero.data.readers import LINE_BYTES, BadRow, Located, check_line, raw_lines, read_jsonl, read_tsv, text_field
from kozero.errors import require
from kozero.json_files import read_json_object, reading

SUFFIXES = (".txt", ".dat", ".jsonl", ".json")


def documents(path: Path, unit: str, counts: Counter) -> Iterator[Located]:
    """(where, {"text": ...}) of each document of a file; what cannot be read is counted.

    Args: unit: of texts: "document", up to an empty line, or "line".
    """
    suffix = path.suffix.lower()
    require(suffix in SUFFIXES, f"{path}: not one of {', '.join(SUFFIXES)}; convert it, or rename a plain text")
    if suffix == ".jsonl":
        yield from rows_with_text(read_jsonl(path), "text", counts)
    elif suffix == ".json":
        yield from paragraphs(path, counts)
    elif is_nsmc(path):
        yield from rows_with_text(read_tsv(path, ("document",)), "document", counts)
    else:
        yield from texts(path, unit, counts)


def is_nsmc(path: Path) -> bool:
    """Whether a file is a table in NSMC's form."""
    with reading(path) as file:
        first = next(raw_lines(file), b"")
    return first.rstrip(b"\r\n").removeprefix(codecs.BOM_UTF8) == b"id\tdocument\tlabel"


def texts(path: Path, unit: str, counts: Counter) -> Iterator[Located]:
    """Documents of a plain text."""
    lines: list[str] = []
    first, size = 1, 0
    for number, line in enumerate(lenient_lines(path, counts), start=1):
        if line.strip() and unit == "document":
            first, size = (first, size + len(line)) if lines else (number, len(line))
            advice = "put blank lines between documents, or read each line as one (--unit line)"
            message = f"{path}:{first}: a document of over {LINE_BYTES:,} characters; {advice}"
            require(size <= LINE_BYTES, message)
            lines.append(line)
        elif line.strip():
            yield f"{path}:{number}", {"text": line}
        elif lines:
            yield f"{path}:{first}", {"text": "\n".join(lines)}
            lines = []
    if lines:
        yield f"{path}:{first}", {"text": "\n".join(lines)}


def lenient_lines(path: Path, counts: Counter) -> Iterator[str]:
    """Lines in UTF-8, or else in CP949, as older Korean files are, or else with U+FFFD for what is neither."""
    with reading(path) as file:
        for number, line in enumerate(raw_lines(file), start=1):
            line = check_line(f"{path}:{number}", line)
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                text = from_cp949(line, counts)
            yield text


def from_cp949(line: bytes, counts: Counter) -> str:
    """A line that is no UTF-8."""
    try:
        text = line.decode("cp949")
    except UnicodeDecodeError:
        counts["lines in no known encoding"] += 1
        return line.decode("utf-8", errors="replace")
    counts["lines in CP949"] += 1
    return text


def rows_with_text(rows: Iterable[Located | BadRow], name: str, counts: Counter) -> Iterator[Located]:
    """The texts of rows, which have them under `name`."""
    for item in rows:
        try:
            if isinstance(item, BadRow):
                raise item
            where, row = item
            yield where, {"text": text_field(where, row, name)}
        except BadRow:
            counts["rows without a text"] += 1


def paragraphs(path: Path, counts: Counter) -> Iterator[Located]:
    """The paragraphs of a file in KorQuAD's form."""
    whole = read_json_object(path)
    articles = whole.get("data")
    require(isinstance(articles, list), f"{path}: no list 'data'; .json is read as KorQuAD's, other texts as .jsonl")
    for number, article in enumerate(articles, start=1):
        counts["articles without paragraphs"] += not members(article)
        for place, paragraph in enumerate(members(article), start=1):
            where = f"{path} article {number} paragraph {place}"
            require(isinstance(paragraph, dict), f"{where}: not a JSON object")
            yield where, {"text": text_field(where, paragraph, "context")}


def members(article: object) -> Iterable:
    """The paragraphs of an article."""
    found = article.get("paragraphs") if isinstance(article, dict) else None
    return found if isinstance(found, list) else []


class Pool:
    """Texts in a file, read one after the other or by number: in memory they take 8 bytes each."""

    def __init__(self, path: Path, found: Iterable[tuple[str, str]]) -> None:
        """Write (where, text) of each to `path`."""
        places = array("Q")
        with path.open("wb") as file:
            for item in found:
                places.append(file.tell())
                file.write(json.dumps(item).encode() + b"\n")
        self.places = np.array(places, dtype=np.int64)
        self.file = path.open("rb")

    def keep(self, numbers: np.ndarray) -> None:
        """Forget all but these, ascending."""
        self.places = self.places[numbers]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: int) -> tuple[str, str]:
        """The place that a document came from, and its text."""
        self.file.seek(int(self.places[number]))
        where, text = json.loads(self.file.readline())
        return where, text

    def __iter__(self) -> Iterator[str]:
        return (self[number][1] for number in range(len(self)))
