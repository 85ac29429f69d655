"""Rows of data files and hub data sets, each with the place it came from, and one-line errors that name that place."""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from kozero.errors import UserError, first_line, require
from kozero.json_files import has_lone_surrogate, no_duplicates, not_utf8, other_form, read_json, reading, regular

TEXT_SUFFIXES = (".txt", ".dat")
PARQUET = "refs/convert/parquet"  # the hub's branch of data sets as parquet: a folder a config, in it one a split
# What datasets 4 and later say of a data set that is a script, the second where another config of it is in their cache.
SCRIPT = ("scripts are no longer supported", "find cache for")
LINE_BYTES = 2**24  # of a line, and characters of a document or of a text in a row: more would fill the memory
BLOCK = 2**16  # bytes that are read at once
LINE_END = re.compile("\r\n|\r|\n")

Row = dict[str, Any]
Located = tuple[str, Row]  # ("file:line" or "file item 3", the row)


class BadRow(UserError):
    """A row that breaks the form of its file; `--bad_rows skip` leaves it out and counts it."""


class LeftOut:
    """Counts rows that are not used, by reason, and remembers where each reason was first met."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, reason: str, where: str) -> None:
        """Count a row that is left out for `reason`; `where` names its file and line."""
        self.counts[reason] += 1
        self.first.setdefault(reason, where)

    def lines(self) -> list[str]:
        """One line a reason, ready to print."""
        return [f"left out {n} rows: {reason} (first: {self.first[reason]})" for reason, n in self.counts.items()]


def raw_lines(file: BinaryIO, most: int = 0) -> Iterator[bytes]:
    """Lines with their ends: CR, LF, or both. A line is there as soon as its end is known, so a person may type them.

    Of a line of more than `most` bytes (0: LINE_BYTES) the part that was read comes last; see `check_line`.
    """
    rest = b""
    while len(rest) <= (most or LINE_BYTES) + 2 and (block := file.read1(max(BLOCK, len(rest)))):
        lines = (rest + block).splitlines(keepends=True)
        rest = b"" if lines[-1].endswith(b"\n") else lines.pop()  # a CR may have its LF in the next block
        yield from lines
    if rest:
        yield rest


def check_line(where: str, line: bytes, most: int = 0) -> bytes:
    """A line without its end; one of more than `most` bytes (0: LINE_BYTES) is a UserError."""
    most, line = most or LINE_BYTES, line.rstrip(b"\r\n")
    require(len(line) <= most, f"{where}: a line of over {most:,} bytes; break it into lines")
    return line


def numbered_lines(file: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    """Numbered lines in UTF-8, with or without BOM; `name` and a number are a line's place in an error."""
    for number, line in enumerate(raw_lines(file), start=1):
        try:
            text = check_line(f"{name}{number}", line).decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{name}{number}: {other_form(line[:64]) or not_utf8()}") from None
        yield number, text


def decode_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, with or without BOM, whatever ends its lines."""
    with reading(path) as file:
        yield from numbered_lines(file, f"{path}:")


def text_files(flag: str, path: Path, suffixes: tuple[str, ...] = TEXT_SUFFIXES) -> list[Path]:
    """The file that a flag names, or all files of a folder with one of the suffixes in the order of their names, but
    hidden ones.

    Raises: UserError for what cannot be read, which would be missing without a word.
    """
    require(path.exists(), f"{flag} {path}: no such file or folder")
    if not path.is_dir():
        return [regular(path)]
    files = sorted(regular(file) for file in files_below(path) if file.suffix.lower() in suffixes)
    require(bool(files), f"{flag} {path}: no {' or '.join(suffixes)} file in it")
    return files


def files_below(folder: Path) -> Iterator[Path]:
    """All that is in a folder and in those below it, linked ones too, but what is hidden (.git, ._a.txt of macOS); a
    folder with several names is read once."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); make it readable or move it away")

    seen = set()
    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        identity = os.stat(here)
        if (identity.st_dev, identity.st_ino) in seen:
            folders.clear()
            continue
        seen.add((identity.st_dev, identity.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(here, name) for name in names if not name.startswith("."))


def read_tsv(path: Path, columns: tuple[str, ...]) -> Iterator[Located | BadRow]:
    """Rows of a tab-separated file whose first line names its columns. No quoting, as in NSMC.

    A row with another number of fields is yielded as a BadRow, so that the caller decides whether it ends the run.
    """
    header: list[str] = []
    for number, line in decode_lines(path):
        fields = line.split("\t")
        if not header:
            header = fields
            missing = [name for name in columns if name not in header]
            require(not missing, f"{path}:1: no column {missing[0] if missing else ''!r}; found {', '.join(header)}")
            require(len(set(header)) == len(header), f"{path}:1: two columns of one name in {', '.join(header)}")
        elif not line.strip():
            continue
        elif len(fields) != len(header):
            yield BadRow(f"{path}:{number}: {len(fields)} fields, the header has {len(header)}")
        else:
            yield f"{path}:{number}", dict(zip(header, fields, strict=True))
    require(bool(header), f"{path}: empty file; its first line must name the columns {', '.join(columns)}")


def read_jsonl(path: Path) -> Iterator[Located | BadRow]:
    """Rows of a file with one JSON object a line; a broken line is yielded as a BadRow."""
    for number, line in decode_lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line, object_pairs_hook=partial(no_duplicates, where))
        except UserError as error:
            yield BadRow(str(error))
            continue
        except (ValueError, RecursionError) as error:
            yield BadRow(f"{where}: not JSON ({getattr(error, 'msg', first_line(error))})")
            continue
        yield (where, row) if isinstance(row, dict) else BadRow(f"{where}: not a JSON object")


def read_json_list(path: Path) -> Iterator[Located | BadRow]:
    """Rows of a JSON file that holds a list of objects."""
    rows = read_json(path)
    require(isinstance(rows, list), f"{path}: expected a JSON list of rows, found {type(rows).__name__}")
    for number, row in enumerate(rows, start=1):
        where = f"{path} item {number}"
        yield (where, row) if isinstance(row, dict) else BadRow(f"{where}: not a JSON object")


def read_hub(name: str, config: str | None, split: str) -> Iterator[Located]:
    """Rows of a task's data set, see hub_rows."""
    label = f"{name}{'/' + config if config else ''}:{split}"
    for number, row in enumerate(hub_rows(name, config, split), start=1):
        yield f"{label} row {number}", row


def hub_rows(name: str, config: str | None, split: str) -> Any:
    """A task's data set on the hub (or a local folder that `datasets` can load).

    Raises: UserError when it cannot be loaded, with the way to go on offline.
    """
    label = f"data set {name}{'/' + config if config else ''}:{split}"
    return load_hub(label, "Give the published files with --train_file and --validation_file", name, config, split)


def load_hub(label: str, advice: str, name: str, config: str | None, split: str) -> Any:
    """A split of a hub data set (or of a local folder that `datasets` can load): datasets.Dataset. Of one that is a
    script, the parquet files into which the hub has converted it.

    Raises: UserError that begins with `label` and ends with `advice` to somebody offline.
    """
    import datasets  # imported here: it takes a second, and files do not need it

    reasons = []
    for where in ({"name": config}, {"data_dir": config, "revision": PARQUET}):
        try:
            return datasets.load_dataset(name, split=split, **where)
        except Exception as error:  # the hub client raises a dozen unrelated types for "not there" and "no network"
            reasons.append(first_line(error))
            if not any(words in reasons[-1] for words in SCRIPT):
                break
    raise UserError(f"{label}: cannot be loaded ({'; as parquet: '.join(reasons)}). Offline? {advice}")


def text_field(where: str, row: Row, name: str) -> str:
    """A text of a row; a missing or non-text field is a BadRow. May be empty."""
    if name not in row:
        raise BadRow(f"{where}: no field {name!r}; found {', '.join(map(str, row))}")
    if not isinstance(row[name], str):
        raise BadRow(f"{where}: field {name!r} is {type(row[name]).__name__}, not text")
    if len(row[name]) > LINE_BYTES:
        raise BadRow(f"{where}: field {name!r} has {len(row[name]):,} characters, at most {LINE_BYTES:,} are read")
    if has_lone_surrogate(row[name]):
        raise BadRow(f"{where}: field {name!r} holds half a character (a lone surrogate)")
    return row[name].strip()
