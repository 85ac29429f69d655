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
from pathlib import Path
from typing import Any, BinaryIO

from kozero.errors import UserError, nearest, require

JSON_MIB = 2048  # of a file, which is read as a whole: Python needs several times as much memory for it
HALF = re.compile("[\ud800-\udfff]")


def has_lone_surrogate(text: str) -> bool:
    """Whether a text holds half a character: a byte of the command line that was not UTF-8, or JSON's \\ud800."""
    return HALF.search(text) is not None


def not_utf8(content: bytes) -> str:
    """What to do about a file that does not begin like, or does not go on as, UTF-8."""
    encoding = "utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "cp949"
    return f"not UTF-8; if it is {encoding.upper()}, convert it: iconv -f {encoding} -t utf-8"


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
            yield file
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def read_json(path: str | Path) -> Any:
    """Parse a UTF-8 JSON file; one that is missing, broken or names a key twice is a UserError with file and line."""
    path = Path(path)

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = min(key for key, num in Counter(key for key, _ in pairs).items() if num > 1)
            raise UserError(f"{path}: key {twice!r} is written twice; remove one")
        return found

    with reading(path) as file:
        mib = -(-path.stat().st_size // 2**20)
        message = f"{path}: {mib:,} MiB of JSON, which is read as a whole; at most {JSON_MIB:,}, split it"
        require(mib <= JSON_MIB, message)
        content = file.read().replace(b"\r\n", b"\n").replace(b"\r", b"\n")  # errors count lines
    try:
        return json.loads(content.decode("utf-8-sig"), object_pairs_hook=no_duplicates)
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: {not_utf8(error.object)}") from None
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
