"""How a run ends when it cannot go on: one line for the user, a documented exit code, no traceback."""

import difflib
import errno
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import NoReturn

from tqdm import tqdm

from kozero.streams import NO_ROOM, Unread, guard_streams, outlive_readers

EXIT_BAD_INPUT = 2
EXIT_DIVERGED = 4
EXIT_NOT_SAVED = 5
EXIT_INTERRUPTED = 130
LONGEST_MESSAGE = 1000
GRACE_SECONDS = 3.0  # the deepspeed launcher looks every second whether a rank has ended


class UserError(Exception):
    """A mistake that the user can mend. The message names the file, line, flag or key, its value, and what to do.

    It is one line of at most LONGEST_MESSAGE characters, for it may quote a file: line breaks and what would command a
    terminal are spelled, and the middle of a longer message is left out.
    """

    def __init__(self, message: str) -> None:
        spelled = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in shortened(message))
        super().__init__(shortened("".join(spelled)))


def shortened(message: str) -> str:
    """A message with its beginning, which names the place, and its end, which says what to do."""
    if len(message) <= LONGEST_MESSAGE:
        return message
    return f"{message[: LONGEST_MESSAGE // 2]} ... {message[5 - LONGEST_MESSAGE // 2 :]}"


class Diverged(Exception):
    """Update after update had gradients that are not finite: the run no longer trains."""


class SaveFailed(Exception):
    """Results could not be written; what was there before, an earlier checkpoint too, is whole."""


class Stopped(Exception):
    """A signal ended the run, and what it has done is saved. Holds its number; its text is its name."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def require(condition: bool, message: str) -> None:
    """Raise a UserError unless `condition` holds."""
    if not condition:
        raise UserError(message)


@contextmanager
def no_panic(what: str) -> Iterator[None]:
    """Make a panic of a library in Rust (tokenizers), which is no Exception, a UserError that begins with `what`."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{what}: the library that reads it gave up ({first_line(error)})") from None


def first_line(error: BaseException) -> str:
    """The first line of an error of a library, short."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


def disk_error(error: BaseException | None) -> str | None:
    """What to tell of an error that a full or broken disk has caused; None of any other.

    Libraries raise what they like of it: with the number of the system's error, with its words, or, as numpy and torch
    do, with how much was written.
    """
    while error is not None:
        told = str(error)
        for number in (*NO_ROOM, errno.EIO):
            if number == getattr(error, "errno", None) or f"(os error {number})" in told or os.strerror(number) in told:
                return f"{getattr(error, 'filename', None) or 'results'}: {os.strerror(number)}"
        if re.search(r"\d+ requested and \d+ written|inline_container.*unexpected pos", told):
            return f"results: {os.strerror(errno.ENOSPC)}"
        error = error.__cause__ or error.__context__
    return None


def nearest(word: str, known: Iterable[str]) -> str:
    """`, did you mean X?` for the closest known word, or an empty string when none is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f", did you mean {close[0]!r}?" if close else ""


def run_main(main: Callable[[], None]) -> NoReturn:
    """Run an entry point; a UserError becomes one line on standard error and exit code 2, Diverged the same with 4,
    SaveFailed, and whatever comes of a full or broken disk, with 5. Stopped, which has been told, is 128 and the number
    of its signal; so is SIGPIPE, where results were printed and nobody read them.

    Ranks usually fail alike. The first of a machine speaks at once, and its launcher then ends the others; they wait
    a little, and are heard only when the first has not failed.
    """
    code = 0
    guard_streams()
    tqdm.set_lock(RLock())  # a bar's own is shared between processes, and os._exit would leave it behind
    try:
        with no_panic("a tokenizer"):
            main()
        sys.stdout.flush()
    except (UserError, Diverged, SaveFailed) as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            time.sleep(GRACE_SECONDS)
        print(f"error: {error}", file=sys.stderr, flush=True)
        codes = ((UserError, EXIT_BAD_INPUT), (Diverged, EXIT_DIVERGED), (SaveFailed, EXIT_NOT_SAVED))
        code = next(code for kind, code in codes if isinstance(error, kind))
        code = EXIT_NOT_SAVED if disk_error(error) else code  # also where another rank's words are told
    except Stopped as stopped:
        code = 128 + stopped.number
    except Unread:  # as a shell tells it of other programs
        code = 128 + signal.SIGPIPE
    except SystemExit:
        outlive_readers()  # the interpreter prints what is left
        raise
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        code = EXIT_INTERRUPTED
    except Exception as error:  # the interpreter would wait for threads that wait for a rank that is gone
        if told := disk_error(error):
            then = "make room, or see to the disk, and start again, a training run with --resume auto"
            print(f"error: {told}; {then}", file=sys.stderr, flush=True)
            code = EXIT_NOT_SAVED
        else:
            traceback.print_exc()
            code = 1
    # Everything is written and closed by now. In the usual teardown a gloo thread of PyTorch that drops the last
    # reference to a tensor asks for the interpreter's lock, Python before 3.14 ends such a thread by unwinding its C++
    # stack, and that aborts the process (one run in thirty); a launcher then reports a finished run as failed.
    outlive_readers()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
