"""Where the time of a training step goes, by PyTorch's profiler: operators in categories, milliseconds an update.

On a GPU it is the time of the kernels that an operator starts, on a CPU the operator's own, without those it calls.
"""

import os
import re
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells of its start and stop otherwise

# Whole names of operators, as regular expressions. What is in none of them is the rest.
CATEGORIES = {
    "matrix products": r"aten::(mm|addmm|linear|mkldnn_linear\w*|_scaled_mm|_grouped_mm)",
    "attention": r".*attention\w*|aten::(bmm|baddbmm|softmax|_softmax\w*|_safe_softmax|where|isneginf|all)",
    "casts and copies": r"aten::(copy_|_to_copy|clone|cat|index\w*|_index_put_impl_|embedding\w*|_foreach_copy_)",
    "softmax and losses": r"aten::(exp_|sub_|amax|div_?|log|gather|scatter_add_|_?log_softmax\w*|nll_loss\w*)",
    "optimizer": r"aten::_fused_adamw_|aten::_foreach_(add|addcdiv|addcmul|lerp|sqrt|div)_|Optimizer\.step.*",
    "zeros, norm, clipping": r"aten::(zero_|zeros\w*|fill_|mul_|_foreach_(mul|norm|zero)\w*|linalg_vector_norm)",
    "GELU, layer norms": r"aten::(gelu\w*|native_layer_norm\w*)",
    "dropout, sums": r"aten::(bernoulli_|native_dropout\w*|random_|ge|add_?|mul|sum)",
    "communication": r"(c10d|gloo|nccl)\w*:.*|record_param_comms",
}
REST, OUTSIDE = "rest", "no operator runs"
LARGEST = 10


def profiled(update: Callable[[], Any], updates: int) -> dict[str, Any]:
    """Milliseconds of an update, by category and of the largest operators.

    Args: update: returns when the device is done; others of its kind have warmed up.

    Returns: `categories`: the rest and what is outside of all operators last; on a GPU it waits then, for the CPU,
        which the profiler slows down. `largest`: (name, calls, milliseconds).
    """
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
    with profile(activities=activities, acc_events=True):  # the first one loads libraries
        update()
    with profile(activities=activities, acc_events=True) as found:
        begin = time.perf_counter()
        for _ in range(updates):
            update()
        clock = (time.perf_counter() - begin) * 1e3 / updates
    rows = own_times(found.key_averages(), updates)
    categories = dict.fromkeys([*CATEGORIES, REST], 0.0)
    for name, _, ms in rows:
        categories[category(name)] += ms
    outside = max(0.0, clock - sum(categories.values()))
    return {"categories": categories | {OUTSIDE: outside}, "largest": sorted(rows, key=lambda row: -row[2])[:LARGEST]}


def category(name: str) -> str:
    """Of an operator."""
    return next((kind for kind, pattern in CATEGORIES.items() if re.fullmatch(pattern, name)), REST)


def own_times(rows: Any, updates: int) -> list[tuple[str, float, float]]:
    """(name, calls, milliseconds) an update of all operators, by the averages of a profile. Kernels that no operator
    has started stand under a name of their own."""
    operators = [row for row in rows if row.device_type == DeviceType.CPU]
    kernels = [row for row in rows if row.device_type != DeviceType.CPU and not row.is_user_annotation]
    own = "self_device_time_total" if kernels else "self_cpu_time_total"
    found = [(row.key, row.count / updates, getattr(row, own) / 1e3 / updates) for row in operators]
    if kernels:
        known = sum(ms for _, _, ms in found)
        found.append(("other kernels", 0.0, sum(row.self_device_time_total for row in kernels) / 1e3 / updates - known))
    return found
