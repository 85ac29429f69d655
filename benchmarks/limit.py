"""The limit of a training step: the rate of large matrix products, which have nothing to wait for, on the same device.

Its neighbours import it by its bare name: they are scripts, and another package of the name benchmarks is installed.
"""

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from contest import Block, Contender, paired

from kozero import distributed
from kozero.freeze import compile_plan, step_flops
from kozero.plan import ModelShape

NAME = "large matrix products"
SPECIFIED = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # operations a second, 16 bit, by NVIDIA's data sheets
SIZES = {"cuda": (8192, 20), "cpu": (2048, 8)}  # rows and columns at most; products of a measurement
LONG_ENOUGH = 0.02  # seconds of a product beside which a call's own cost does not count


def wait() -> None:
    """Until the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def product_rate(dtype: torch.dtype) -> float:
    """Operations a second of a product of two large matrices of random numbers, the median of five measurements. They
    are no larger than a product of LONG_ENOUGH needs: a CPU without 16-bit arithmetic takes 12 s for the largest."""
    size, (largest, products) = 128, SIZES[distributed.device().type]
    while size < largest and seconds(size, 1, dtype) < LONG_ENOUGH:
        size *= 2
    return 2 * size**3 / median([seconds(size, products, dtype) for _ in range(5)])


def seconds(size: int, products: int, dtype: torch.dtype) -> float:
    """Of one product, the mean of some."""
    left, right = (torch.randn(size, size, device=distributed.device()).to(dtype) for _ in range(2))
    left @ right  # it warms up
    wait()
    begin = time.perf_counter()
    for _ in range(products):
        left @ right
    wait()
    return (time.perf_counter() - begin) / products


def specified(dtype: torch.dtype) -> float | None:
    """Operations a second that the maker of the device says; None in 32 bit, and for one that is not in the list."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    slower = any(form in device for form in ("PCIe", "NVL"))  # than what the list has
    if dtype == torch.float32 or slower:
        return None
    return next((flops for name, flops in SPECIFIED.items() if name in device), None)


def contender(bf16: bool, ranks: int = 1) -> Contender:
    """Measures the rate of a side's devices in turn with the sides of a benchmark; ranks on a CPU share one."""
    return Contender(NAME, measured, (torch.bfloat16 if bf16 else torch.float32, ranks))


def measured(dtype: torch.dtype, ranks: int) -> Block:
    """Its block."""
    distributed.setup()
    devices = min(ranks, max(1, torch.cuda.device_count()))
    return lambda: {"flops": devices * product_rate(dtype)}


def flops_a_token(config: Any, lengths: np.ndarray, learnt: int, freeze: str | None = None) -> float:
    """Operations a real token of texts. It sees its own text alone, so T of the formula is what it sees on average.

    Args: config: of GPT-2; lengths: tokens of each text; learnt: how many tokens of all are predicted.
    """
    plan = compile_plan(freeze, config.n_layer, has_pause=False)
    seen = float((lengths**2).sum() / lengths.sum())
    return step_flops(plan, ModelShape.of(config), seen, learnt / lengths.sum())


def shared(rows: Sequence[dict[str, Any]], blocks: Sequence[dict[str, Any]], flops: float) -> dict[str, Any]:
    """Give each row its `share` of the limit, the median over rounds.

    Args: blocks: of the contender, the first of which warmed up; flops: operations a token.

    Returns: what the report of the rows tells beside them.
    """
    rates = [block["flops"] for block in blocks[1:]]
    for row in rows:
        row["share"] = paired([speed * flops for speed in row["speeds"]], rates)
    return {"product_flops": rates, "flops_a_token": flops, "limit_speed": median(rates) / flops}
