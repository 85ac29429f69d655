"""kozero.distributed: what a process settles before it computes."""

import multiprocessing
import os
import signal
import socket

import pytest
import torch

from kozero import distributed
from tests.ranks import START


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a CPU's functions")
def test_one_thread_is_the_first_to_call_what_comes_from_mkl(monkeypatch, request):
    called = []

    def recorded(function):
        return lambda x: called.append((function, x.dtype, x.numel())) or function(x)

    assert {torch.exp, torch.log, torch.sqrt, torch.tanh, torch.erf} <= set(distributed.FROM_MKL)
    wanted = [(f, dtype, 1) for dtype in (torch.float32, torch.float64) for f in distributed.FROM_MKL]
    monkeypatch.setattr(distributed, "FROM_MKL", [recorded(f) for f in distributed.FROM_MKL])
    request.getfixturevalue("one_rank")
    assert called == wanted


def second_of_two(port):
    """What a rank does whose first one listens and never answers."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ |= distributed.described(1, 2, port)
    distributed.setup(600)


def test_a_rank_that_waits_for_the_others_is_ended_by_an_interrupt():
    """It waits in C++, which hears of no signal that Python is to handle."""
    with socket.create_server(("127.0.0.1", 0)) as first:
        first.settimeout(120)
        rank = multiprocessing.get_context(START).Process(target=second_of_two, args=(first.getsockname()[1],))
        rank.start()
        connection, _ = first.accept()
        os.kill(rank.pid, signal.SIGINT)
        rank.join(60)
        code = rank.exitcode
        rank.kill()
        connection.close()
    assert code == -signal.SIGINT


def test_what_an_interrupt_does_is_as_before_once_all_are_there(one_rank):
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
