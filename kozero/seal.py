"""Folders that hold what was written: a JSON file in them names the bytes and the SHA-256 of every other file and of
itself. Checkpoints and caches are sealed by it, and checked before they are trusted."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from kozero import distributed
from kozero.errors import SaveFailed, UserError, disk_error, first_line, require
from kozero.files import file_hash, fingerprint, to_disk
from kozero.folder import set_aside, write_text
from kozero.streams import outlive_readers

CHANGED = "its SHA-256 is not that of what was written"
UNREADABLE = (OSError, ValueError, LookupError, TypeError, RecursionError)  # of a sealed file that is damaged

Files = Mapping[str, Mapping[str, Any]]  # path in the folder to what `fingerprint` returns


def sealed(value: dict[str, Any]) -> str:
    """JSON of a value and of the SHA-256 of the value's JSON."""
    return json.dumps(value | {"sha256": hashlib.sha256(json.dumps(value).encode()).hexdigest()}, indent=2)


def read_sealed(path: Path) -> dict[str, Any]:
    """The value of a file that `sealed` made.

    Raises: ValueError when a byte of it is another.
    """
    text = path.read_text(encoding="utf-8")
    value = json.loads(text)
    if not isinstance(value, dict) or value.pop("sha256", None) is None or sealed(value) != text:
        raise ValueError(CHANGED)
    return value


def fingerprints(folder: Path, known: Files | None = None) -> dict[str, Any]:
    """What `fingerprint` returns of every file below a folder, which is on the disk by then; `known` ones are not read
    again."""
    known = known or {}
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    return {name: known[name] if name in known else fingerprint(folder / name) for name in names}


def wrong_size(folder: Path, files: Files) -> str | None:
    """Which of some files has not its size, None where all have."""
    for name, written in files.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else "no"
        if found != written["bytes"]:
            return f"{name} is damaged: {found} bytes, {written['bytes']} were written"
    return None


def wrong_content(folder: Path, files: Files) -> str | None:
    """Which of some files has another content, None where none has. They are read, at about 1.5 GB/s."""
    for name, written in files.items():
        with suppress(OSError):
            if file_hash(folder / name) == written["sha256"]:
                continue
        return f"{name} is damaged: {CHANGED}"
    return None


def damage(folder: Path, seal: str) -> str | None:
    """What keeps a sealed folder from holding what was written, None when nothing does. Reads all of it."""
    try:
        files = read_sealed(folder / seal)["files"]
        return wrong_size(folder, files) or wrong_content(folder, files)
    except UNREADABLE as error:
        return f"{seal} is damaged ({first_line(error)})"


def put_in_place(staging: Path, final: Path) -> None:
    """Give a folder its name when every name in it is on the disk, as its files are; the new name is there too then."""
    for folder, _, _ in os.walk(staging):
        to_disk(Path(folder))
    staging.rename(final)
    to_disk(final.parent)


@contextmanager
def whole_folder(final: Path) -> Iterator[Path]:
    """An empty folder to fill, which takes the place of `final` when all of it is on the disk, or goes again. Its files
    have the mode that the umask leaves, whoever made them (safetensors makes its own for the owner alone)."""
    staging = final.with_name(f"{final.name}.incomplete")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        for path in staging.rglob("*"):
            if path.is_file():
                path.chmod(staging.stat().st_mode & 0o666)
                to_disk(path)
        old = set_aside(final, ".old")
        put_in_place(staging, final)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def new_folder(flag: str, folder: Path) -> Iterator[Path]:
    """`whole_folder` of a user's results where nothing is yet, for one process at a time. What a killed one has left
    beside it is removed.

    Raises: UserError when the folder that `flag` names holds something, cannot be made, or is being written; SaveFailed
    when the disk is full or broken.
    """
    folder = folder.resolve()
    require(not os.path.ismount(folder), f"{flag} {folder}: is a mount point; name a folder in it")
    lock = FileLock(folder.with_name(f"{folder.name}.incomplete.lock"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{flag} {folder}: another run is writing it; wait for it or choose another folder") from None
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be written ({error.strerror})") from None
    outlive_readers()
    try:
        is_empty = folder.is_dir() and not any(folder.iterdir())
        require(is_empty or not folder.exists(), f"{flag} {folder}: holds something already; choose another folder")
        with whole_folder(folder) as made:
            yield made
    except Exception as error:
        if (told := disk_error(error)) and not isinstance(error, UserError):  # that one tells of another folder
            raise SaveFailed(f"{flag} {folder}: cannot be written ({told}); make room and start again") from error
        raise
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def rehearse(output_dir: Path, export: Callable[[Path, None], None]) -> None:
    """Try on rank 0 whether a model can be exported: all but its weights, into a folder that goes again. Collective.

    Args: export: fills a folder, without weights when it is given None.

    Raises: UserError with what fails, on all ranks.
    """

    def attempt() -> None:
        folder = output_dir / ".rehearsal"
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            export(folder, None)
        except UserError:
            raise
        except Exception as error:  # whatever a library does not like in a tokenizer or a config
            message = f"--output_dir {output_dir}: the model could not be exported there ({first_line(error)})"
            raise UserError(message) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    distributed.together(attempt if distributed.is_main() else distributed.nothing)


def write_seal(path: Path, value: dict[str, Any]) -> None:
    """Write the file that seals its folder, last."""
    write_text(path, sealed(value))
