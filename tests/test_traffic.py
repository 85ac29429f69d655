"""How often ranks send something in an update, by the calls of gloo that PyTorch's profiler sees."""

import pytest
import torch

from tests.ranks import run_ranks
from tests.toys import arguments, deal, engine_for, steps, toy

ONCE, EVERY_TIME = ["plain", "oss", "zero1"], ["fsdp2_wrap", "zero2"]
SHAPES = [(4, 1), (1, 4)]  # micro batch and accumulation

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts the calls of gloo")


def calls(names: list[str]) -> dict[str, list[int]]:
    """Of an update of each engine, in passes of four rows and of one."""
    return {name: [calls_of(name, shape) for shape in SHAPES] for name in names}


def calls_of(name: str, shape: tuple[int, int]) -> int:
    """The second update; the first of DDP tells the ranks how its buckets lie."""
    engine, sizes = engine_for(name, toy(), arguments(name, shape))
    batches = deal(steps(1)[0], sizes)
    engine.train_step(batches, 0.0)
    with torch.profiler.profile() as seen:
        engine.train_step(batches, 0.0)
    engine.close()
    return sum(event.count for event in seen.key_averages() if event.key.startswith("gloo:"))


@pytest.fixture(scope="module")
def counted():
    return run_ranks(calls, ONCE + EVERY_TIME)[0]


@pytest.mark.parametrize("name", ONCE)
def test_gradients_travel_once_however_many_passes_an_update_has(counted, name):
    one, four = counted[name]
    assert one == four > 0


@pytest.mark.parametrize("name", EVERY_TIME)
def test_where_they_are_sharded_they_travel_after_every_pass(counted, name):
    one, four = counted[name]
    assert four > one > 0
