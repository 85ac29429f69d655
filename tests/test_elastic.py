"""A run goes on with another number of ranks, and at another of the stages 1 and 2, to float tolerance."""

from pathlib import Path

import pytest

from kozero import distributed
from kozero.errors import UserError
from tests.ranks import run_ranks
from tests.toys import RATES, SHAPE, arguments, deal, engine_for, save, steps, toy

pytestmark = pytest.mark.slow
FREEZE = "h.0,wte"
SAVED = ("plain", "zero1", "zero2", "zero3")
SHAPES = {1: (2, 4), 2: (2, 2)}  # micro batch and accumulation by number of ranks: 8 rows either way
CASES = {  # engine that saved on 2 ranks: engines that go on, by number of ranks
    1: {"plain": ["plain"], "zero1": ["zero1", "zero2"], "zero2": ["zero1"], "zero3": ["zero3"]},
    2: {"zero1": ["zero2"], "zero2": ["zero1"]},
}


def started(name: str):
    """A fresh engine with AdamW and frozen parts on the ranks that are there."""
    said = arguments(name, SHAPES[distributed.world_size()], optim="adamw")
    return engine_for(name, toy(FREEZE), said)


def losses(engine, sizes, first: int, last: int) -> list[float]:
    rows = steps()
    done = [engine.train_step(deal(rows[k], sizes), RATES["adamw"] * SHAPE[k]) for k in range(first, last)]
    return [stats.loss for stats in done]


def run_and_save(folder: Path) -> dict[str, list[float]]:
    """Two steps, a checkpoint, two more: by engine, the losses of the last two."""
    found = {}
    for name in SAVED:
        engine, sizes = started(name)
        losses(engine, sizes, 0, 2)
        save(engine, folder / name)
        found[name] = losses(engine, sizes, 2, 4)
    return found


def go_on(folder: Path) -> dict[tuple[str, str], list[float]]:
    """The last two steps from the checkpoints, by (saved by, goes on)."""
    found = {}
    for saved, names in CASES[distributed.world_size()].items():
        for name in names:
            engine, sizes = started(name)
            engine.load(folder / saved)
            found[saved, name] = losses(engine, sizes, 2, 4)
    return found


def refusals(folder: Path) -> list[str]:
    """What an engine says to the checkpoint of one that it cannot follow."""
    said = []
    for saved, name in (("zero3", "zero2"), ("zero2", "zero3"), ("plain", "zero2"), ("zero2", "plain")):
        with pytest.raises(UserError) as caught:
            started(name)[0].load(folder / saved)
        said.append(str(caught.value))
    return said


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elastic")
    return folder, run_ranks(run_and_save, folder)[0]


@pytest.mark.parametrize("world_size", CASES)
def test_a_run_goes_on_with_other_ranks_and_stages(saved, world_size):
    folder, expected = saved
    found = run_ranks(go_on, folder, world_size=world_size)[0]
    assert set(found) == {(a, b) for a, names in CASES[world_size].items() for b in names}
    for (name, _), values in found.items():
        assert values == pytest.approx(expected[name], abs=2e-6)


def test_what_cannot_be_followed_is_refused(saved):
    said = run_ranks(refusals, saved[0], world_size=1)[0]
    assert "saved at ZeRO-3, which ZeRO-2 cannot go on from" in said[0]
    assert "saved at ZeRO-2, which ZeRO-3 cannot go on from" in said[1]
    assert "not saved by DeepSpeed" in said[2] and "saved by another engine" in said[3]
