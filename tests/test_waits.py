"""Where a step would wait for a GPU, found on a CPU: operators whose results the host must have before it can go on.
That kernels and copies of CUDA do not wait either is in test_cuda.py."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kozero.config import BatchSizes, TrainingArguments
from kozero.data.ahead import Ahead
from kozero.data.batches import Batch, PackedBatch
from kozero.engines import EngineSettings, build_engine
from tests.toys import toy, training_rows

aten = torch.ops.aten
READ = {aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default}  # a number
SIZES = {  # a result's size is in its values
    aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.unique_consecutive.default,
    aten.repeat_interleave.Tensor,
}  # fmt: skip
MASKED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}  # by numbers they do not wait
METHODS = ("tolist", "numpy", "cpu")  # which on a CPU reach no operator


class Waits(TorchDispatchMode):
    """Notes what would make the host wait, by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.found: list[str] = []
        for name in METHODS:
            monkeypatch.setattr(torch.Tensor, name, self.noting(name))

    def noting(self, name):
        method = getattr(torch.Tensor, name)

        def noted(tensor, *args, **kwargs):
            self.found.append(name)
            return method(tensor, *args, **kwargs)

        return noted

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = func in MASKED and any(index is not None and index.dtype == torch.bool for index in args[1])
        if func in READ | SIZES or masks:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("freeze", [None, "wte,wpe,h.0"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_step_waits_once_at_its_end(one_rank, monkeypatch, dtype, freeze):
    def as_on_a_gpu(batch, device):
        return Batch.to(batch, device) | {"packing": batch.packing.to(device, non_blocking=True)}

    monkeypatch.setattr(PackedBatch, "to", as_on_a_gpu)
    arguments = TrainingArguments(bf16=dtype == "bf16", fp16=dtype == "fp16")
    engine = build_engine(toy(freeze, dropout=0.1), arguments, EngineSettings())
    with Ahead(training_rows(), BatchSizes(4, 2, 1), 0) as ahead:
        for place in range(0, 24, 8):
            batches, _ = ahead.step(place)
            with monkeypatch.context() as patch, Waits(patch) as waits:
                engine.train_step(batches, 0.01)
            assert waits.found == ["tolist"]


TENSOR = torch.tensor([1.0, 0.0])


@pytest.mark.parametrize(
    "waits",
    [
        lambda: TENSOR[0].item(), lambda: bool(TENSOR[0]), lambda: int(TENSOR[0]), lambda: TENSOR.tolist(),
        lambda: TENSOR[TENSOR > 0], lambda: TENSOR.clone().index_put_((TENSOR > 0,), TENSOR[0]),
        lambda: TENSOR.index_put((TENSOR > 0,), TENSOR[0]), lambda: TENSOR.nonzero(), lambda: torch.where(TENSOR),
        lambda: TENSOR.masked_select(TENSOR > 0), lambda: TENSOR.unique(), lambda: TENSOR.unique_consecutive(),
        lambda: torch.repeat_interleave(TENSOR.int()), lambda: torch.equal(TENSOR, TENSOR), lambda: TENSOR.cpu(),
        lambda: TENSOR.numpy(),
    ],
)  # fmt: skip
def test_whatever_waits_is_noted(monkeypatch, waits):
    with monkeypatch.context() as patch, Waits(patch) as noted:
        waits()
    assert noted.found


def test_what_does_not_wait_is_not(monkeypatch):
    with monkeypatch.context() as patch, Waits(patch) as noted:
        torch.where(TENSOR > 0, TENSOR, 2.0)[torch.tensor([1])].masked_fill_(torch.tensor([True]), 0.0)
    assert noted.found == []
