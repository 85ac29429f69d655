"""What an engine really holds: the allocator's own account of a few training steps."""

import gc
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config

from finetune.planned import PlannedModel
from kozero import distributed
from kozero.config import BatchSizes, TrainingArguments
from kozero.data.batches import PackedBatch
from kozero.data.packing import packing_of
from kozero.engines import build_engine, prepare_engine
from kozero.engines.base import Engine


@dataclass(frozen=True)
class Case:
    """A training run on a CPU. json: a DeepSpeed JSON, None for none."""

    json: str | None
    dtype: str = "fp32"
    accumulation: int = 1
    micro: int = 8
    freeze: str | None = None
    checkpointing: bool = False
    scale: int = 1  # of width, vocabulary and length; on a GPU its libraries' workspaces have to be small beside it

    def model(self) -> PlannedModel:
        """Weights, activations and logits of about the same size."""
        config = GPT2Config(
            n_layer=4, n_embd=192 * self.scale, n_head=4, vocab_size=2048 * self.scale, n_positions=self.length,
            resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.0, activation_function="gelu_pytorch_tanh",
            bos_token_id=1, eos_token_id=1, pad_token_id=None,
        )  # fmt: skip
        on_gpu = torch.cuda.is_available()
        return PlannedModel(config, self.freeze, False, self.dtype, length=self.length, on_gpu=on_gpu)

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return 64 * self.scale


def peaks(cases: list[Case]) -> list[int]:
    """Bytes that are alive at the peak of a later step. Runs on every rank."""
    return [peak(case) for case in cases]


def peak(case: Case) -> int:
    """One case, from the weights on."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        engine = built(case)
        step(engine, case)
        torch.cuda.reset_peak_memory_stats()
        step(engine, case)
        engine.close()
        return torch.cuda.max_memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        engine = built(case)
        for _ in range(2):  # DDP makes its buckets anew in the second step, and may hold the old ones through it
            step(engine, case)
        begin = time.time_ns()
        step(engine, case)
        engine.close()
        del engine
        gc.collect()
    return most(allocations(profiler, living()), begin)


def built(case: Case) -> Engine:
    """The engine of a case."""
    module = case.model().module(checkpointing=case.checkpointing)
    told = TrainingArguments(
        deepspeed_config=case.json,
        per_device_train_batch_size=case.micro,
        gradient_accumulation_steps=case.accumulation,
        bf16=case.dtype == "bf16",
        fp16=case.dtype == "fp16",
    )
    sizes = BatchSizes(case.micro, case.accumulation, distributed.world_size())
    return build_engine(module, told, prepare_engine(told, sizes))


def step(engine: Engine, case: Case) -> None:
    """One update."""
    engine.train_step([batch(case) for _ in range(case.accumulation)], 1e-4)


def batch(case: Case) -> PackedBatch:
    """Rows of two texts each, every token predicted."""
    ids = torch.randint(1, 2048, (case.micro, case.length))
    places = torch.arange(ids.numel())
    positions = torch.arange(case.length // 2).repeat(case.micro, 2)
    inputs = {
        "input_ids": ids,
        "position_ids": positions,
        "target_index": places,
        "target_ids": ids.flatten(),
    }
    return PackedBatch(inputs, (len(places),), len(places), places, packing_of(positions.numpy()))


def living() -> set[int]:
    """Addresses of all tensors that Python still reaches: DeepSpeed keeps those of ZeRO-3 when its engine has gone."""
    return {t.untyped_storage().data_ptr() for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)}


def allocations(profiler: Any, living: set[int]) -> list[tuple[int, int]]:
    """(time in ns, bytes) of everything that was taken or, below 0, given back.

    The profiler sees no other threads, and a tensor of a collective may end in gloo's. So what lay at an address that
    is taken again was given back unseen; what is not there when the engine has gone was too, and is left out.
    """
    events = []
    waiting = list(profiler.profiler.kineto_results.experimental_event_tree())
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == _EventType.Allocation:
            events.append((event.start_time_ns, event.extra_fields.alloc_size, event.extra_fields.ptr))
    found, held = [], {}
    for when, size, address in sorted(events):
        if address in held:
            since, taken = held.pop(address)
            found += [(since, taken), (when, -taken)]
        if size > 0:
            held[address] = (when, size)
    return sorted(found + [taken for address, taken in held.items() if address in living])


def most(found: list[tuple[int, int]], begin: int) -> int:
    """Most bytes at once after a time."""
    held = highest = 0
    for when, size in found:
        held += size
        highest = max(highest, held) if when > begin else held
    return highest
