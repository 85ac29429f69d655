"""What only a GPU shows, beside the laws of tests/test_engines.py, which run on it too: its kernels against the CPU's
at shapes that reach them, its memory, its profile."""

import copy
import importlib
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from kozero import distributed
from kozero.batch_search import Prober, largest_micro_batch
from kozero.config import BatchSizes, TrainingArguments
from kozero.data.batches import Batch, Text, collate
from kozero.engines import EngineSettings, build_engine
from kozero.memory import DeviceMemory
from kozero.pause import IGNORE
from models.causal_lm import CausalLM, build
from models.encoders import ENCODERS, build_encoder, read_encoder_config
from models.language_model import checkpoint_activations, read_config, set_dropout
from models.transformer import SwitchFeedForward, has_grouped_product, route
from pretrain.objectives import EncoderPretraining
from tests.helpers import ROOT, sample_tokenizer
from tests.ranks import run_ranks
from tests.test_pretrain_rows import encoder_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")

LENGTH = 256
FIRST, LAST = 4, 4095  # tokens that are spoken, the last one not
HALF = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SCALE = 1024.0  # of fp16's losses
NEAR = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 1e-2}  # of gradients, relative to their norm
ROWS = {"one text a row": [LENGTH], "packed": [7, 100, 31, 2, 60], "padded": [200]}


@pytest.fixture(autouse=True)
def thirty_two_bits(monkeypatch):
    """Convolutions too: by default cuDNN computes them with 10 bits of each factor."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def batch_of(lengths: list[int], prompt: int = 1) -> Batch:
    """Four rows of such texts; the first tokens of each are a prompt."""
    rng, rows = np.random.default_rng(0), []
    for _ in range(4):
        texts = [rng.integers(FIRST, LAST, num + 1) for num in lengths]
        hidden = [min(prompt, num - 1) for num in lengths]
        rows.append([
            Text(ids[:-1], np.where(np.arange(len(ids) - 1) < skip, IGNORE, ids[1:]), 0)
            for ids, skip in zip(texts, hidden, strict=True)
        ])  # fmt: skip
    return collate(rows, LENGTH)


def small_lm(checkpointing: bool = False) -> CausalLM:
    """Four layers of 256, a vocabulary of 4,096, some of it silent."""
    lm = build(read_config(ROOT / "models/small_config.json"), seed=0)
    set_dropout(lm, 0.0)
    if checkpointing:
        checkpoint_activations(lm)
    return CausalLM(lm, [FIRST - 1, LAST])


def gradients(module: torch.nn.Module, batch: Batch, device: torch.device, dtype: str) -> tuple[torch.Tensor, dict]:
    """The mean losses of a copy of a module on a device, and all gradients, on the CPU."""
    module, scale = copy.deepcopy(module).to(device).train(), SCALE if dtype == "fp16" else 1.0
    computing = torch.autocast(device.type, HALF[dtype] or torch.bfloat16, enabled=dtype != "fp32")
    with computing:
        losses = module(**batch.to(device)) / torch.tensor(batch.num_targets, device=device)
    (losses.sum() * scale).backward()
    found = {name: p.grad.float().cpu() / scale for name, p in module.named_parameters() if p.grad is not None}
    return losses.detach().cpu(), found


def same_step(module: torch.nn.Module, batch: Batch, dtype: str) -> None:
    """Losses and each gradient on the device beside those of 32 bit on the CPU."""
    losses, wanted = gradients(module, batch, torch.device("cpu"), "fp32")
    found_losses, found = gradients(module, batch, distributed.device(), dtype)
    torch.testing.assert_close(found_losses, losses, rtol=1e-5 if dtype == "fp32" else 5e-3, atol=1e-5)
    assert found.keys() == wanted.keys()
    size = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    off = {name: float((found[name] - gradient).norm() / size) for name, gradient in wanted.items()}
    assert {name: ratio for name, ratio in off.items() if not ratio <= NEAR[dtype]} == {}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("rows", ROWS)
def test_a_step_of_a_language_model_is_that_of_a_cpu(rows, dtype):
    same_step(small_lm(), batch_of(ROWS[rows]), dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_with_prompts_and_recomputed_activations_too(dtype):
    same_step(small_lm(checkpointing=True), batch_of([100, 90], prompt=60), dtype)


@pytest.mark.parametrize("dtype", HALF)
def test_texts_of_a_row_do_not_see_each_other(dtype):
    """Another first text changes no loss of the second."""
    module = small_lm().to(distributed.device())
    one = batch_of([40, 100])
    other = copy.deepcopy(one)
    other.inputs["input_ids"][:, :40] = 5
    found = []
    for batch in (one, other):
        with torch.no_grad(), torch.autocast("cuda", HALF[dtype] or torch.bfloat16, enabled=dtype != "fp32"):
            losses = module(**batch.to(distributed.device()), reduction="none").view(4, -1)
        found.append(losses[:, 39:])  # 39 of the first text
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def test_a_step_waits_for_the_device_once(one_rank):
    """PyTorch warns of whatever makes the host wait. tests/test_waits.py looks for the same on a CPU, whose kernels are
    others."""
    engine = build_engine(small_lm(), TrainingArguments(bf16=True), EngineSettings())
    batch = batch_of(ROWS["packed"])
    batch.pin_memory()
    engine.train_step([batch, batch], 1e-3)  # it warms up
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            engine.train_step([batch, batch], 1e-3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([one for one in told if "synchronizing" in str(one.message)]) == 1


@pytest.mark.parametrize("task", ["mlm_sop", "mlm_ict"])
@pytest.mark.parametrize("kind", ENCODERS)
def test_a_step_of_an_encoder_is_that_of_a_cpu(one_rank, kind, task):
    (batch,) = encoder_rows(task, router=kind == "transformer").step(0, BatchSizes(6, 1, 1), 0)
    module = EncoderPretraining(build_encoder(encoder_config(kind), 3), task)
    same_step(module, batch, "fp32")


def encoder_config(kind: str) -> Any:
    """The tiny one, without dropout."""
    config = read_encoder_config(ROOT / f"models/{kind}_tiny_config.json", kind, sample_tokenizer())
    config.dropout_prob = 0.0
    return config


def test_grouped_products_of_experts_are_those_of_batched_ones():
    """In bf16, which CUDA's grouped product takes alone; with gradients, and an expert without tokens."""
    layer = SwitchFeedForward(encoder_config("transformer")).to("cuda", torch.bfloat16).train()
    torch.manual_seed(0)
    for weight in (layer.w_in, layer.w_out):
        torch.nn.init.normal_(weight, std=0.1)
    layer.capacity_factor = float(len(layer.w_in))  # nothing is dropped
    tokens = torch.randn(64, layer.w_in.shape[1], device="cuda", dtype=torch.bfloat16)
    logits = torch.randn(64, len(layer.w_in), device="cuda")
    logits[:, 1] = -torch.inf
    routing = route(logits, layer.capacity(64))
    assert has_grouped_product(tokens, layer.w_in)
    found = []
    for multiply in (layer.grouped, layer.batched):
        layer.zero_grad()
        out = multiply(tokens, layer.w_in, layer.w_out, routing)
        out.square().sum().backward()
        found.append([out.detach(), layer.w_in.grad, layer.w_out.grad])
    for grouped, batched in zip(*found, strict=True):
        torch.testing.assert_close(grouped, batched, rtol=2e-2, atol=2e-2 * float(batched.abs().max()))


def test_device_memory_is_what_the_allocator_took():
    memory, size = DeviceMemory(), 64 * 2**20
    before = memory.reset()
    tensor = torch.empty(size, dtype=torch.uint8, device="cuda")
    assert memory.peak() == before + size
    assert memory.limit() > size
    del tensor
    assert memory.reset() == before


def test_the_search_for_the_largest_batch_survives_running_out_of_memory():
    found, tried = run_ranks(search_in_two_gib, world_size=1)[0]
    assert found > 1 and found in tried and max(tried) > found  # one was too many


def search_in_two_gib() -> tuple[int, list[int]]:
    """Rows that are found, and those that were tried, where the allocator ends sooner than the GPU does."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2 * 2**30 / total)
    tried = []

    def batches(rows: int) -> list[Batch]:
        tried.append(rows)
        ids = np.zeros(LENGTH, dtype=np.int64)
        return [collate([[Text(ids, ids, 0)]] * rows, LENGTH)]

    prober = Prober(lambda: build_engine(small_lm(), TrainingArguments(), EngineSettings()), batches, DeviceMemory())
    return largest_micro_batch(prober, 4096), tried


def test_the_profile_is_of_kernels_and_fits_into_the_clock(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    matrix = torch.randn(4096, 4096, device="cuda")

    def update() -> None:
        torch.nn.functional.gelu(matrix @ matrix)
        torch.cuda.synchronize()

    update()
    found = importlib.import_module("operators").profiled(update, 5)
    parts = found["categories"]
    assert parts["matrix products"] > parts["GELU, layer norms"] > 0
    assert parts["matrix products"] > 0.5 * sum(parts.values())
    assert found["largest"][0][0] == "aten::mm"
