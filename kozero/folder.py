"""The output folder of a run: writable, one run's at a time, small files replaced in one move."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from kozero import distributed
from kozero.errors import UserError

LOCK = ".lock"


@contextmanager
def claim_output(name: str) -> Iterator[Path]:
    """The output folder, made if need be and kept from other runs until this one ends. One that was made for a run that
    leaves nothing goes again.

    Raises: UserError when it cannot be written or another run holds it, before anything long begins.
    """
    made = not Path(name).exists()
    folder = writable_folder("--output_dir", Path(name))
    lock = FileLock(folder / LOCK)
    message = None
    if distributed.is_main():
        try:
            lock.acquire(timeout=0)
        except Timeout:
            message = f"--output_dir {name}: another run is writing there; wait for it or choose another folder"
    if message := distributed.broadcast(message):
        raise UserError(message)
    try:
        yield folder
    finally:
        lock.release()
        if made and distributed.is_main() and [path.name for path in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()


def writable_folder(flag: str, folder: Path) -> Path:
    """A folder, made if need be, in which a file could be written just now; `flag` named it.

    Raises: UserError, before anything long begins.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".write-probe-{distributed.rank()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be written ({error.strerror})") from None
    return folder


def new_file(flag: str, path: Path) -> Path:
    """A file that could be written; `flag` named it.

    Raises: UserError, before anything long begins.
    """
    writable_folder(flag, path.parent)
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a folder; name a file in it")
    return path


def write_text(path: Path, text: str) -> None:
    """Replace a small file in one move, so that a reader sees the old text or the new."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def save_run(output_dir: Path, run: dict) -> None:
    """Keep the resolved run beside its results."""
    if distributed.is_main():
        write_text(output_dir / "run.json", json.dumps(run, indent=2, ensure_ascii=False))
