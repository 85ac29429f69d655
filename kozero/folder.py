"""The output folder of a run: writable, one run's at a time, small files replaced in one move."""

import fcntl
import json
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile, gettempdir
from typing import Any, TextIO
from uuid import uuid4

from filelock import FileLock, Timeout

from kozero import distributed
from kozero.errors import SaveFailed, UserError, require
from kozero.streams import outlive_readers

LOCK = ".lock"
COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")  # processes that srun, Open MPI, MPICH started
RESULTS = (  # files of training, each written by some task
    "run.json", "metrics.jsonl", "scores.json", "predictions.json", "nbest.json", "passages.jsonl", "retrieval.json",
)  # fmt: skip
LONGEST = 130  # bytes of the longest file name that a run makes in its folder: TensorBoard's, with the host's name


@contextmanager
def claim_output(name: str, reads: Iterable[Any] = ()) -> Iterator[Path]:
    """The output folder, made if need be and kept from other runs until this one ends. One that was made for a run that
    leaves nothing goes again.

    Args: reads: see new_file.

    Raises: UserError when it cannot be written, holds in the place of a result what is read, or another run holds it,
        before anything long begins.
    """
    made = not Path(name).exists()
    folder = writable_folder("--output_dir", Path(name))
    new_file("--output_dir", *(folder / file for file in (LOCK, *RESULTS)), reads=reads)
    lock = FileLock(folder / LOCK)
    message = None
    if distributed.is_main():
        try:
            lock.acquire(timeout=0)
        except Timeout:
            message = f"--output_dir {name}: another run is writing there; wait for it or choose another folder"
            message += apart()
    if message := distributed.broadcast(message):
        raise UserError(message)
    try:
        yield folder
    except OSError as error:
        if folder.exists():
            raise
        raise SaveFailed(f"--output_dir {name}: was removed while the run wrote to it; start again") from error
    finally:
        lock.release()
        if made and distributed.is_main() and folder.exists() and [path.name for path in folder.iterdir()] == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()


def apart() -> str:
    """What to say where srun or mpirun has started processes that were to be ranks of one run."""
    names = [name for name in COUNTS if os.environ.get(name, "1") != "1" and distributed.world_size() == 1]
    return f"; {names[0]} is set: srun and mpirun start as many runs, torchrun as many ranks of one" if names else ""


def writable_folder(flag: str, folder: Path) -> Path:
    """A folder, made if need be, in which a file could be written just now; `flag` named it. The results go there, so
    nobody needs to read what is printed.

    Raises: UserError, before anything long begins.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=folder, prefix=".write-probe-".ljust(LONGEST - 8, "-")):
            pass
    except OSError as error:
        raise UserError(f"{flag} {folder}: cannot be written ({error.strerror})") from None
    outlive_readers()
    return folder


def cache_folder(name: str) -> Path:
    """The folder that --cache_dir names. A user whose home folder is not there or takes no files (a container's --user)
    has it below XDG_CACHE_HOME, or beside temporary files, in a folder that nobody else can use.

    Raises: UserError when somebody else has made that one.
    """
    with suppress(RuntimeError, OSError):
        folder = Path(name).expanduser()
        if not name.startswith("~/"):
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base, "kozero")
    folder = Path(gettempdir(), f"kozero-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    alone = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
    require(alone, f"--cache_dir {folder}: others can write there; name another folder, or set HOME")
    return folder


def new_file(flag: str, path: Path, *beside: Path, reads: Iterable[Any] = ()) -> Path:
    """A file that could be written, as could those `beside` it; `flag` named it.

    Args: reads: the arguments of the command.

    Raises: UserError, before anything long begins, also for a file that the arguments name to be read, or one in the
        folder of such a model: its content would be lost.
    """
    told = {name: value for part in reads for name, value in vars(part).items() if name != "output_file"}
    names = [value for name, value in told.items() if value and name.endswith(("_path", "_file", "_config"))]
    inputs = [os.stat(name) for name in names if os.path.exists(name)]
    for file in (path, *beside):
        try:
            found = file.stat()
        except FileNotFoundError:
            found = None
        except OSError as error:
            raise UserError(f"{flag} {file}: cannot be written ({error.strerror})") from None
        require(not file.is_dir(), f"{flag} {file}: is a folder; name a file in it")
        above = writable_folder(flag, file.resolve().parent).stat()
        lost = any(os.path.samestat(read, here) for read in inputs for here in (found, above) if here)
        require(not lost, f"{flag} {file}: is read by this command, or lies in a model that is; name another file")
        usual = found is None or (file.is_file() and not any(os.path.samestat(found, os.fstat(n)) for n in (1, 2)))
        require(usual, f"{flag} {file}: is a device, a pipe or where this program prints; name a file of its own")
    return path


def write_text(path: Path, text: str) -> None:
    """Replace a small text file, see write_bytes."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a small file in one move, so that a reader sees the old content or the new. Of a symbolic link the file
    that it points to is replaced."""
    path = path.resolve()
    temporary = path.with_name(f".{uuid4().hex}.new")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def incomplete(path: Path) -> Path:
    """Where a file grows until it is complete."""
    return path.with_name(f"{path.name}.incomplete")


@contextmanager
def growing_file(path: Path) -> Iterator[TextIO]:
    """A text file that grows beside the earlier one and replaces it when it is complete. What an interrupted run has
    written stays under the name of `incomplete`.

    Raises: UserError when another process writes it.
    """
    building = incomplete(path)
    with building.open("a", encoding="utf-8", errors="backslashreplace") as file:
        require(is_ours(file, building), f"{path}: another run is writing it; wait for it or choose another file")
        file.truncate(0)
        yield file
        file.flush()
        os.fsync(file.fileno())
        building.replace(path.resolve())


def is_ours(file: TextIO, path: Path) -> bool:
    """Whether this process alone has opened the file at `path`: another one may be writing it, or have renamed it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def set_aside(folder: Path, suffix: str) -> Path:
    """Give a folder, if it is there, a longer name; what has that name goes. Returns the name."""
    aside = folder.with_name(f"{folder.name}{suffix}")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
    return aside


def save_run(output_dir: Path, run: dict) -> None:
    """Keep the resolved run beside its results."""
    if distributed.is_main():
        write_text(output_dir / "run.json", json.dumps(run, indent=2, ensure_ascii=False))
