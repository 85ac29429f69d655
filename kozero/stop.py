"""The wish to end a run: a signal is noted and acted upon between two steps, by all ranks alike."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
import torch.distributed as dist

from kozero import distributed
from kozero.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# Launchers send what a terminal has sent already, another one or the same; only a person's next one means: at once.
AGAIN_SECONDS = 1.0


class Stop:
    """Notes signals while it is entered. One that comes again after a second ends the process at once.

    A thread reads them from where Python's C handler writes them: Python's own handlers wait for the main thread, which
    may be inside a collective whose other rank hangs.
    """

    def __init__(self) -> None:
        self.first: dict[int, float] = {}  # when each came first
        self.raises = False

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self.reader, self.writer = socket.socketpair()
            self.writer.setblocking(False)
            heard = [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]  # by nohup
            self.before = {number: signal.signal(number, self.handle) for number in heard}
            signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
            threading.Thread(target=self.watch, args=(self.reader,), name="signals", daemon=True).start()
        else:
            self.before = {}
        return self

    def __exit__(self, *_: object) -> None:
        if self.before:
            signal.set_wakeup_fd(-1)
            self.writer.close()  # which ends the thread
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def watch(self, reader: socket.socket) -> None:
        """What the thread does: a byte is the number of a signal."""
        with reader:
            while numbers := reader.recv(64):
                for number in set(numbers) & set(SIGNALS):
                    self.note(number)

    def note(self, number: int) -> None:
        """Remember a signal, or end the process."""
        now = time.monotonic()
        if now - self.first.setdefault(number, now) > AGAIN_SECONDS:
            os._exit(128 + number)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Python's handler, in the main thread."""
        if self.raises:
            raise Stopped(number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Around work that may be broken off because everything before it is saved: a signal raises Stopped."""
        self.raises = True
        try:
            yield
        finally:
            self.raises = False

    def agreed(self) -> int:
        """The signal of any rank, the same on all, 0 for none. Collective: about 0.1 ms on gloo."""
        mine = torch.tensor([max(self.first, default=0)])
        dist.all_reduce(mine, dist.ReduceOp.MAX, group=distributed.control)
        return int(mine)
