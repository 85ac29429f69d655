"""kozero.distributed: what a process settles before it computes."""

import pytest
import torch

from kozero import distributed


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
