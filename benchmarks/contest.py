"""Contenders that do the same work, side by side: each is a process (or one a rank) that loads once and then waits, and
all take turns in blocks of work, the order reversed in every other round, so that a busy machine slows all alike.

Its neighbours import it by its bare name: they are scripts, and another package of the name benchmarks is installed.
"""

import json
import multiprocessing
import os
import platform
import shlex
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from kozero import distributed
from kozero.config import arg, describe_run
from kozero.errors import UserError
from kozero.folder import new_file

# Sides are forked from a process that has imported what takes longest. Not with a GPU, for what a process has asked of
# CUDA its forks cannot use.
START = "spawn" if torch.cuda.is_available() else "forkserver"

# What sides inherit: settings that a benchmark makes for its own process are not for those beside us.
ENVIRONMENT = dict(os.environ)

Block = Callable[[], dict[str, Any]]  # one block of work: its figures


@dataclass
class Reported:
    """What every benchmark takes."""

    output_file: str | None = arg(None, "JSON for machine, versions, settings and rows")

    def __post_init__(self) -> None:
        if self.output_file:
            new_file("--output_file", Path(self.output_file))


@dataclass(frozen=True)
class Contender:
    """One side. `build(*arguments)` runs in its process, once, and returns its block; it must be importable."""

    name: str
    build: Callable[..., Block]
    arguments: tuple
    ranks: int = 1


@dataclass
class Running:
    """The processes of a contender and their ends of the pipes, by rank."""

    contender: Contender
    processes: list[multiprocessing.Process]
    pipes: list[Connection]

    def turn(self, word: str) -> Any:
        """Send a word to all ranks, wait for all, and return what rank 0 answers.

        Raises: a UserError of a rank, or RuntimeError with the traceback of one that failed.
        """
        self.send(word)
        return self.answers()[0]

    def send(self, word: str) -> None:
        """To all ranks; one that has ended hears nothing, and `answers` says so."""
        for pipe in self.pipes:
            with suppress(OSError):
                pipe.send(word)

    def end(self) -> None:
        """Ask all ranks to, and give them a moment to tidy up."""
        self.send("end")
        for process in self.processes:
            process.join(timeout=10)

    def answers(self) -> list[Any]:
        """One of each rank."""
        found = []
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            try:
                found.append(pipe.recv())
            except (EOFError, ConnectionError):
                process.join()
                raise UserError(f"{self.contender.name} ended with exit code {process.exitcode}") from None
        for answer in found:
            if isinstance(answer, UserError):
                raise answer
        if failed := [answer for answer in found if isinstance(answer, str)]:
            raise RuntimeError(f"{self.contender.name} failed:\n{''.join(failed)}")
        return found


def start(contender: Contender) -> Running:
    """Its processes, which load now: their first answers say that they have."""
    port = distributed.free_port()
    context = multiprocessing.get_context(START)
    context.set_forkserver_preload(["transformers.models.gpt2.modeling_gpt2"])
    processes, pipes = [], []
    for rank in range(contender.ranks):
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(contender, rank, port, ENVIRONMENT, there))
        process.start()
        there.close()
        processes.append(process)
        pipes.append(here)
    return Running(contender, processes, pipes)


def serve(contender: Contender, rank: int, port: int, environment: dict[str, str], pipe: Connection) -> None:
    """A rank: load, then a block of work for every word."""
    os.environ.clear()
    os.environ |= environment
    try:
        if contender.ranks > 1:
            os.environ |= distributed.described(rank, contender.ranks, port)
        block = contender.build(*contender.arguments)
        pipe.send({})
        while pipe.recv() == "go":
            pipe.send(block())
    except (EOFError, KeyboardInterrupt):
        pass
    except UserError as error:
        pipe.send(error)
    except BaseException:
        pipe.send(traceback.format_exc())
    if START == "spawn":
        os._exit(0)  # libraries' threads may abort at exit; a fork of the server ends like this by itself


def compete(contenders: Sequence[Contender], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Figures of every block, by contender; the first of each warms up."""
    sides = []
    try:
        for contender in contenders:
            print(f"loading {contender.name}", flush=True)
            sides.append(start(contender))
            sides[-1].answers()
        found: dict[str, list[dict[str, Any]]] = {contender.name: [] for contender in contenders}
        for number in range(rounds + 1):
            for side in sides if number % 2 else sides[::-1]:
                found[side.contender.name].append(side.turn("go"))
            print(f"round {number} of {rounds} done" + " (it warmed up)" * (number == 0), flush=True)
        for side in sides:
            side.end()
        return found
    finally:
        for side in sides:
            for process in side.processes:
                process.kill()
                process.join()


def speeds(blocks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Tokens a second of each block but the first, which warmed up; their median, least and most."""
    found = [block["tokens"] / block["seconds"] for block in blocks[1:]]
    return {"speeds": found, "speed": statistics.median(found), "spread": (min(found), max(found))}


def paired(these: Sequence[float], others: Sequence[float]) -> float:
    """How many times as fast as the others: the median over rounds, whose blocks a busy machine slowed alike."""
    return statistics.median(speed / other for speed, other in zip(these, others, strict=True))


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and what it returned."""
    begin = time.perf_counter()
    found = work()
    return time.perf_counter() - begin, found


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown: the names of its columns, then the rows."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        flags = next((line for line in info.read_text().splitlines() if line.startswith("flags")), "")
        units = [unit for unit in ("avx512_bf16", "amx_bf16") if unit in flags.split()]
        name = ", ".join([*names[:1], f"{len(names)} cores", *units])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"processor": name, "device": device, "system": platform.platform()}


def report(arguments: Reported, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write rows, and what else was found, with machine, versions and settings, if --output_file asks for it."""
    if not arguments.output_file:
        return
    run = describe_run(arguments)
    run["arguments"] = {name: without_folders(value) for name, value in run["arguments"].items()}
    run["command"] = shlex.join(map(without_folders, shlex.split(run["command"])))
    text = json.dumps(run | {"machine": machine()} | more | {"rows": rows}, indent=2, ensure_ascii=False)
    Path(arguments.output_file).write_text(text + "\n", encoding="utf-8")


def without_folders(value: Any) -> Any:
    """The last two parts of each path in PATH,PATH or --flag=PATH: a report names no folders of a machine."""
    if not isinstance(value, str):
        return value
    flag, equals, paths = value.rpartition("=")
    return flag + equals + ",".join("/".join(path.split("/")[-2:]) for path in paths.split(","))
