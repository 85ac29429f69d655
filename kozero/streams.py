"""Standard input, output and error of a program whose output may go where Korean cannot be spelled, where no room is
left, or where nobody reads any more."""

import errno
import io
import os
import re
import select
import sys
from contextlib import suppress
from typing import Any

COMMANDS = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # last those of direction
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Unread(Exception):
    """Nobody reads standard output any more."""


class Output(io.FileIO):
    """The descriptor of standard output or error. What cannot be written is dropped, but of standard output only where
    it is `needed` no more."""

    needed = True  # until the results of the program go into files

    def write(self, data: Any) -> int:
        """Raises: Unread, or OSError where there is no room."""
        done = 0
        try:
            while done < len(data):
                if (written := super().write(memoryview(data)[done:])) is None:
                    select.select([], [self], [])  # a pipe that another program told not to wait
                done += written or 0
        except OSError as error:
            if self.needed and self.fileno() != 2:
                no_room = OSError(error.errno, error.strerror, "standard output")
                raise (no_room if error.errno in NO_ROOM else Unread) from None
        return len(data)


class Terminal(io.TextIOWrapper):
    """Standard output where a person reads it: what would command the terminal is spelled, as UserError does."""

    def write(self, text: str) -> int:
        """Returns: the characters of the text."""
        super().write(COMMANDS.sub(lambda found: found[0].encode("unicode_escape").decode(), text))
        return len(text)


def guard_streams() -> None:
    """Let standard output and error take any text; streams that were closed before the program began lead nowhere."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        # The number of what is opened is the lowest that is free: the stream's own.
        old = getattr(sys, name) or os.fdopen(os.open(os.devnull, os.O_RDWR), mode, closefd=False)
        with suppress(OSError, AttributeError):  # a host program's stream has no number: it stays
            os.set_inheritable(old.fileno(), True)
            setattr(sys, name, guarded(old) if mode == "w" else old)


def guarded(old: io.TextIOWrapper) -> io.TextIOWrapper:
    """A stream in the place of another one."""
    with suppress(OSError):
        old.flush()
    raw = Output(old.fileno(), "w", closefd=False)
    binary = raw if old.write_through else io.BufferedWriter(raw)  # python -u keeps nothing back
    kind = Terminal if raw.fileno() == 1 and raw.isatty() else io.TextIOWrapper
    return kind(binary, old.encoding, "backslashreplace", None, old.line_buffering, old.write_through)


def outlive_readers() -> None:
    """Go on where what is printed cannot be, because the results go into files."""
    Output.needed = False
