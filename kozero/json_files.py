"""Files that users write, and JSON in them: errors name the file and line, a key that is written twice or unknown is
refused."""

import codecs
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from kozero.errors import UserError, nearest, require

JSON_MIB = 2048  # of a file, which is read as a whole: Python needs several times as much memory for it
SIGNS = {  # what a file begins with: its encoding, or what unpacks it
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16", b"\x1f\x8b": "gunzip", b"PK\3\4": "unzip", b"\xfd7zXZ": "unxz", b"BZh9": "bunzip2",
    b"(\xb5/\xfd": "unzstd",
}  # fmt: skip
HALF = re.compile("[\ud800-\udfff]")


def has_lone_surrogate(text: str) -> bool:
    """Whether a text holds half a character: a byte of the command line that was not UTF-8, or JSON's \\ud800."""
    return HALF.search(text) is not None


def not_utf8(encoding: str = "cp949") -> str:
    """What to do about a file that is no UTF-8."""
    return f"not UTF-8; if it is {encoding.upper()}, convert it: iconv -f {encoding} -t utf-8"


def other_form(head: bytes) -> str:
    """What to do about a file whose first 64 bytes say that it is no UTF-8; nothing about others. A wide encoding
    without a mark is known by its zeros: bytes 2 and 3 of four, or the second of two."""
    if form := next((form for sign, form in SIGNS.items() if head.startswith(sign)), None):
        return not_utf8(form) if form.startswith("utf") else f"compressed; unpack it: {form}"
    zeros = [head[k : len(head) // 4 * 4 : 4].count(0) for k in range(4)]
    if not len(head) <= 8 * sum(zeros) < 8 * len(head):
        return ""
    for form, pair in (("utf-32le", zeros[2:]), ("utf-32be", zeros[:2])):
        if min(pair) == len(head) // 4:
            return not_utf8(form)
    return not_utf8("utf-16le" if zeros[1] + zeros[3] > zeros[0] + zeros[2] else "utf-16be")


def regular(path: Path) -> Path:
    """`path`, unless it is missing, not readable, a folder, or a FIFO, device or socket, which may never end.

    Raises: UserError.
    """
    try:
        is_regular = stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    require(is_regular, f"{path}: is a folder, a pipe or a device; name a regular file")
    require(os.access(path, os.R_OK), f"{path}: cannot be read (Permission denied)")
    return path


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """A regular file, open for reading; one that cannot be read is a UserError."""
    regular(path)
    try:
        with path.open("rb") as file:
            require(not (form := other_form(file.peek(64)[:64])), f"{path}: {form}")
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def no_duplicates(where: object, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object_pairs_hook of json.loads."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = min(key for key, num in Counter(key for key, _ in pairs).items() if num > 1)
        raise UserError(f"{where}: key {twice!r} is written twice; remove one")
    return found


def read_json(path: str | Path) -> Any:
    """Parse a UTF-8 JSON file; one that is missing, broken or names a key twice is a UserError with file and line."""
    path = Path(path)
    with reading(path) as file:
        mib = -(-path.stat().st_size // 2**20)
        message = f"{path}: {mib:,} MiB of JSON, which is read as a whole; at most {JSON_MIB:,}, split it"
        require(mib <= JSON_MIB, message)
        content = file.read().replace(b"\r\n", b"\n").replace(b"\r", b"\n")  # errors count lines
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=partial(no_duplicates, path))
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: {not_utf8()}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON ({error.msg})") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{path}: not usable JSON ({error})"[:300]) from None


def read_json_object(path: str | Path) -> dict[str, Any]:
    """`read_json` of a file that must hold an object."""
    value = read_json(path)
    require(isinstance(value, dict), f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def check_keys(keys: Any, known: Any, where: str) -> None:
    """Refuse the first unknown key, naming the nearest known one."""
    for key in keys:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{nearest(key, known)}")
