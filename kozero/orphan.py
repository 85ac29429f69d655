"""A rank whose launcher has gone: on one machine the `deepspeed` command (0.19) ends on SIGTERM without a word to its
ranks, torchrun on SIGUSR1, and they would train on."""

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil


def end_with_launcher() -> None:
    """Have SIGUSR1 sent to this rank when the launcher that started it, if one did, has ended. (SIGTERM it may have had
    a second before, and another one would end it without saving.)"""
    if launcher := launching_command():
        threading.Thread(target=wait_for, args=(launcher,), name="launcher", daemon=True).start()


def wait_for(launcher: psutil.Process) -> None:
    """What the thread does. A process that nobody asked for its exit code has ended, too."""
    with suppress(psutil.NoSuchProcess):
        while launcher.is_running() and launcher.status() != psutil.STATUS_ZOMBIE:
            time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGUSR1)


def launching_command() -> psutil.Process | None:
    """The user's command: `torchrun`, which starts the ranks, or `deepspeed`, which starts one
    `deepspeed.launcher.launch` a machine, which starts them."""
    try:
        launch = psutil.Process().parent()
        if launch and {"torchrun", "torch.distributed.run"} & {Path(word).name for word in launch.cmdline()[:4]}:
            return launch
        if launch is None or "deepspeed.launcher.launch" not in launch.cmdline():
            return None
        command = launch.parent()
        words = {Path(word).name for word in command.cmdline()[:4]} if command else set()
        return command if words & {"deepspeed", "ds", "deepspeed.launcher.runner"} else None
    except psutil.Error:
        return None
