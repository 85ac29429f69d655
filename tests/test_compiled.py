"""--torch_compile: the layers of a compiled engine compute what they did, and are compiled once."""

import pytest
import torch
from torch._dynamo.utils import counters

from kozero import distributed
from kozero.config import BatchSizes, TrainingArguments
from kozero.data.batches import TrainingRows
from kozero.engines import Sharding, build_engine, prepare_engine
from kozero.errors import UserError
from kozero.loop import LEAST_COMPILED, Trainer, compile_long
from kozero.pause import Pauses
from tests.helpers import numbered_store
from tests.toys import arguments, deal, steps, toy


@pytest.fixture(autouse=True)
def traced_alone(monkeypatch, one_rank):
    """Traced as for the compiler and then run by PyTorch: code is not what these tests are about, and takes minutes."""
    monkeypatch.setattr("kozero.engines.units.COMPILER", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


class OnGpu:
    """A batch that brings its packing, as it would to a GPU."""

    def __init__(self, batch):
        self.batch, self.num_targets = batch, batch.num_targets

    def to(self, device):
        return self.batch.to(device) | {"packing": self.batch.packing}


def batches(packed):
    """The micro batches of each step, all of new texts."""
    sizes = BatchSizes(4, 2, 1)
    dealt = [deal(rows, sizes) for rows in steps()]
    return [[OnGpu(batch) for batch in step] for step in dealt] if packed else dealt


def built(compiled=True):
    said = arguments("plain", shape=(4, 2), torch_compile=compiled)
    engine = build_engine(toy(), said, prepare_engine(said, BatchSizes(4, 2, 1)))
    if compiled:
        compile_long(engine.module, LEAST_COMPILED)
    return engine


@pytest.mark.parametrize("packed", [False, True])
def test_a_compiled_engine_trains_as_an_uncompiled_one(packed):
    found = []
    for compiled in (False, True):
        engine = built(compiled)
        stats = [engine.train_step(batch, 0.01) for batch in batches(packed)]
        found.append(([(s.loss, s.grad_norm) for s in stats], engine.full_state_dict()))
    (curve, weights), (other_curve, others) = found
    assert other_curve == [pytest.approx(point, abs=1e-5) for point in curve]
    assert weights.keys() == others.keys()
    assert all(torch.allclose(weights[name], others[name], atol=1e-5) for name in weights)
    assert counters["stats"]["unique_graphs"] > 0


@pytest.mark.parametrize("packed", [False, True])
def test_new_texts_and_evaluations_compile_nothing_anew(packed):
    engine = built()
    first, *others = batches(packed)
    engine.train_step(first, 0.01)
    graphs = counters["stats"]["unique_graphs"]
    for step in others:
        engine.train_step(step, 0.01)
    with engine.evaluating() as module:
        for length in (5, 9, 14):
            module.lm(torch.arange(length)[None])
    assert counters["stats"]["unique_graphs"] == graphs > 0


def test_short_runs_are_not_compiled(monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr("kozero.loop.compile_layers", compiled.append)
    module = torch.nn.Linear(1, 1)
    compile_long(module, LEAST_COMPILED - 1)
    assert not compiled and "--torch_compile is left out" in capsys.readouterr().out
    compile_long(module, LEAST_COMPILED)
    assert compiled == [module]


@pytest.mark.parametrize("wanted", [False, True])
def test_a_long_run_compiles_where_it_is_asked_to(monkeypatch, tmp_path, wanted):
    compiled = []
    monkeypatch.setattr("kozero.loop.compile_layers", compiled.append)
    engine = built(compiled=False)
    said = TrainingArguments(output_dir=str(tmp_path), max_steps=LEAST_COMPILED, torch_compile=wanted)
    rows = TrainingRows(numbered_store(20), Pauses(7, 1), 16, "grouped", seed=0)
    Trainer(engine, rows, said, BatchSizes(2, 1, 1), lambda log, step: {}, "", {})
    assert compiled == [engine.module] * wanted


@pytest.mark.parametrize("sharding", [Sharding("oss", 1), Sharding("fsdp", 3), None])
def test_stages_that_shard_refuse(sharding):
    said = TrainingArguments(torch_compile=True, deepspeed_config=None if sharding else "ds_configs/zero2.json")
    with pytest.raises(UserError, match=r"--torch_compile: ZeRO-[123] .* choose stage 0"):
        prepare_engine(said, BatchSizes(8, 1, distributed.world_size()), sharding)


def test_recomputed_layers_are_refused():
    """A checkpoint is one piece for the compiler, and attention by text interrupts it: nothing would be compiled."""
    with pytest.raises(UserError, match=r"--torch_compile and --gradient_checkpointing: .* choose one"):
        TrainingArguments(torch_compile=True, gradient_checkpointing=True)
