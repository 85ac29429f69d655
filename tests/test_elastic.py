"""A run goes on with another number of ranks, at another stage, under another engine: every pair of them."""

from contextlib import nullcontext
from pathlib import Path

import pytest

from kozero import distributed
from tests.ranks import run_ranks
from tests.streams import streams_that_do_nothing
from tests.toys import RATES, SHAPE, arguments, deal, engine_for, save, steps, toy

pytestmark = pytest.mark.slow
FREEZE = "h.0,wte"
NAMES = ["plain", "oss", "fsdp2_wrap", "fsdp3_wrap", "fairscale_fsdp3_wrap", "zero1", "zero2", "zero3", "zero3_offload"]
# One checkpoint is read like another, so not every pair: from each go on itself, the plain engine and a neighbour, and
# from the plain engine all.
PAIRS = [
    (saved, name)
    for k, saved in enumerate(NAMES) for name in NAMES if name in (saved, "plain", NAMES[k - 1]) or saved == "plain"
]  # fmt: skip
SHAPES = {1: (2, 4), 2: (2, 2)}  # micro batch and accumulation by number of ranks: 8 rows either way


def losses(name: str, first: int, last: int, load: Path | None = None, to: Path | None = None) -> list[float]:
    """Some steps of a fresh engine with AdamW and frozen parts on the ranks that are there."""
    with streams_that_do_nothing() if name.startswith("fairscale_fsdp") else nullcontext():
        said = arguments(name, SHAPES[distributed.world_size()], optim="adamw")
        engine, sizes = engine_for(name, toy(FREEZE), said)
        if load:
            engine.load(load)
        rows, found = steps(), []
        for k in range(first, last):
            if to and k == 2:
                save(engine, to)
            found.append(engine.train_step(deal(rows[k], sizes), RATES["adamw"] * SHAPE[k]).loss)
        engine.close()
        return found


def run_and_save(folder: Path) -> dict[str, list[float]]:
    """Two steps, a checkpoint, two more: by engine, the losses of the last two."""
    return {name: losses(name, 0, 4, to=folder / name)[2:] for name in NAMES}


def go_on(folder: Path) -> dict[tuple[str, str], list[float]]:
    """The last two steps from the checkpoints, by (saved by, goes on)."""
    return {(saved, name): losses(name, 2, 4, load=folder / saved) for saved, name in PAIRS}


def scales(folder: Path) -> dict[tuple[str, str], tuple[float, float]]:
    """In fp16: the loss scale after an overflow, a good step and a checkpoint, and with it elsewhere."""
    found, names = {}, ("plain", "fsdp3_wrap", "zero2", "zero3")
    for saved in names:
        said = arguments(saved, SHAPES[distributed.world_size()], optim="adamw", fp16=True)
        engine, sizes = engine_for(saved, toy(FREEZE), said)
        engine.set_loss_scale_state({"scale": 2.0**40, "applied": 3, "hysteresis": 1})  # overflows
        first = [engine.train_step(deal(rows, sizes), 0.01) for rows in steps()]
        assert not first[0].applied
        save(engine, folder / saved)
        state = engine.loss_scale_state()
        engine.close()
        for name in names:
            said = arguments(name, SHAPES[distributed.world_size()], optim="adamw", fp16=True)
            engine, sizes = engine_for(name, toy(FREEZE), said)
            engine.load(folder / saved)
            after = engine.loss_scale_state()
            found[saved, name] = (state["scale"], state["applied"]), (after["scale"], after["applied"])
            engine.close()
    return found


def test_a_loss_scale_goes_on_under_another_engine(tmp_path):
    found = run_ranks(scales, tmp_path, world_size=1)[0]
    assert len(found) == 16 and all(before == after for before, after in found.values()), found
    assert all(scale < 2.0**40 for (scale, _), _ in found.values())


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_a_run_goes_on_on_other_ranks_under_another_engine(tmp_path, before, after):
    expected = run_ranks(run_and_save, tmp_path, world_size=before)[0]
    found = run_ranks(go_on, tmp_path, world_size=after)[0]
    for (saved, name), values in found.items():
        assert values == pytest.approx(expected[saved], abs=2e-6), (saved, name)
