"""The wish to end a run: a signal is noted and acted upon between two steps, by all ranks alike."""

import os
import signal
import threading
import time
from types import FrameType

import torch
import torch.distributed as dist

from kozero import distributed

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Launchers send what a terminal has sent already, another one or the same; only a person's next one means: at once.
AGAIN_SECONDS = 1.0


class Stop:
    """Notes signals while it is entered. A signal that comes again after a second ends the process at once."""

    def __init__(self) -> None:
        self.first: dict[int, float] = {}
        self.before: dict[int, object] = {}

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self.note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler."""
        now = time.monotonic()
        if now - self.first.setdefault(number, now) > AGAIN_SECONDS:
            os._exit(128 + number)

    def agreed(self) -> int:
        """The signal of any rank, the same on all, 0 for none. Collective: about 0.1 ms on gloo."""
        mine = torch.tensor([max(self.first, default=0)])
        dist.all_reduce(mine, dist.ReduceOp.MAX, group=distributed.patient)
        return int(mine)
