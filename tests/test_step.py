"""benchmarks/step.py: its arithmetic by hand and by PyTorch's counter, its tokens, its memory, its profile."""

import importlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2Config

from kozero.data.batches import Text, collate
from kozero.errors import UserError
from kozero.freeze import apply_plan, compile_plan, step_flops
from kozero.plan import ModelShape
from models.causal_lm import CausalLM, build
from tests.helpers import ROOT

TINY = ("--config_file", ROOT / "models/tiny_config.json", "--length", 16, "--updates", 2, "--rounds", 1)


@pytest.fixture
def benchmark(monkeypatch):
    """A script of benchmarks/ as a module; its neighbours import it by its bare name."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def call(step, monkeypatch, capsys, tmp_path, *flags) -> tuple[str, list[dict]]:
    """What it prints, and the rows of its JSON."""
    told = [*TINY, *flags, "--output_file", tmp_path / "new/step.json"]
    monkeypatch.setattr(sys, "argv", ["step.py", *map(str, told)])
    step.main()
    return capsys.readouterr().out, json.loads((tmp_path / "new/step.json").read_text())["rows"]


# Arithmetic ---------------------------------------------------------------------------------------------------------


def test_the_arithmetic_of_a_step_by_hand():
    """2 layers of 4 x 4 x 4 + 4 x 4 + 2 x 4 x 8 + 8 + 4 + 4 x 4 = 172, a head of 10 x 4 = 40, texts of 3 tokens: the
    attention of a layer is 4 x 3 x 4 = 48 forward."""
    shape = ModelShape(num_layers=2, hidden=4, inner=8, vocab_size=10, positions=16)
    assert shape.block_parameters == 172
    everything, bottom = (compile_plan(text, 2, has_pause=False) for text in (None, "wte,wpe,h.0"))
    assert step_flops(everything, shape, 3) == 6 * (2 * 172 + 40) + 12 * 2 * 4 * 3
    assert step_flops(everything, shape, 3, predicted=0.5) == 6 * (2 * 172 + 20) + 12 * 2 * 4 * 3
    forward, activations, weights = 2 * (344 + 40) + 2 * 48, 2 * (172 + 40) + 2 * 48, 2 * 172
    assert step_flops(bottom, shape, 3) == forward + activations + weights


@pytest.mark.parametrize("text", [None, "wte,wpe,h.0-1", "h.0-1", "wte,wpe,ln_f,h.1-2"])
def test_the_arithmetic_of_a_step_by_pytorchs_counter(text):
    """It leaves biases and layer norms out, a hundredth here. One chunk of one text, so nothing is masked away."""
    config = GPT2Config(
        n_layer=3, n_embd=128, n_head=2, vocab_size=512, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    module, plan = CausalLM(build(config, seed=0), []), compile_plan(text, 3, has_pause=False)
    apply_plan(plan, module)
    ids = torch.randint(0, 512, (33,)).numpy()
    batch = collate([[Text(ids[:-1], ids[1:], 0)]])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(**batch.inputs).backward()
    assert counter.get_total_flops() / 32 == pytest.approx(step_flops(plan, ModelShape.of(config), 32), rel=0.015)


def test_share_and_limit_follow_from_the_blocks(benchmark):
    """Blocks of 2 updates: 100 tokens in 1, 2 and 4 seconds, 10 operations a token, 1,000 a second at most."""
    blocks = [{"tokens": 100, "seconds": seconds, "batching": 0.1} for seconds in (4.0, 1.0, 2.0)]
    found = benchmark("step").figures(blocks, 2, flops=10.0, limit=1000.0)
    assert (found["speed"], found["ms"], found["spread_ms"]) == (50.0, 1000.0, (500.0, 2000.0))
    assert (found["flops"], found["share"], found["limit_speed"]) == (500.0, 0.5, 100.0)
    assert found["batching_ms"] == pytest.approx(50.0)


# Tokens, memory, settings -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "targets"), [(("--packed", 5), 1.0), (("--packed", 5, "--targets", 0.4), 0.4)])
def test_real_tokens_are_those_of_the_texts_and_their_targets_a_share(one_rank, benchmark, flags, targets):
    """Counted in the batches: every text begins at position 0, and its first token is predicted by nothing."""
    step = benchmark("step")
    (told,) = step.parse_arguments(step.StepArguments, prog="", description="", argv=list(map(str, (*TINY, *flags))))
    run = step.Run(told, step.read_config(ROOT / "models/tiny_config.json"), micro=4)
    lengths = run.rows.store.lengths
    assert 4 < lengths.sum(1).mean() < 6 and lengths.sum(1).min() >= 2
    seen = learnt = tokens = 0
    for _ in range(6):
        (batch,) = run.rows.step(run.consumed, run.sizes, 0)
        starts = (batch.inputs["position_ids"] == 0).sum().item()
        seen, learnt = seen + starts, learnt + len(batch.inputs["target_ids"])
        tokens += run.update()[2]
    assert learnt == tokens - seen if targets == 1 else learnt / tokens == pytest.approx(targets, abs=0.06)


def test_every_micro_batch_has_a_row_of_full_rows(one_rank, benchmark, monkeypatch, capsys, tmp_path):
    flags = ("--micro_batch", "2, 3", "--accumulation", 2, "--freeze", "wte,wpe,h.0", "--bf16")
    out, rows = call(benchmark("step"), monkeypatch, capsys, tmp_path, *flags)
    assert out.count("\n| ") == 4 and "train" in out
    for row, micro in zip(rows, (2, 3), strict=True):
        assert [block["tokens"] for block in row["blocks"]] == [2 * 2 * micro * 16] * 2  # updates x accumulation
        assert all(len(block["losses"]) == 2 and not block["skipped"] for block in row["blocks"])
        assert row["speed"] > 0 and row["peak_bytes"] > 0 and row["planned_bytes"] > 0
        assert row["limit_speed"] == pytest.approx(row["speed"] / row["share"])


def test_the_model_learns_what_it_repeats(one_rank, benchmark, monkeypatch, capsys, tmp_path):
    """A block is an epoch."""
    _, ((row),) = call(benchmark("step"), monkeypatch, capsys, tmp_path, "--micro_batch", 1, "--rounds", 3)
    first, *_, last = (sum(block["losses"]) for block in row["blocks"])
    assert last < first - 0.01


@pytest.mark.slow
def test_zero_2_and_checkpoints_of_activations_take_the_same_step(tmp_path):
    rows, env = [], os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for name, flags in (("plain", ""), ("zero2", "--deepspeed_config ds_configs/zero2.json --gradient_checkpointing")):
        file = tmp_path / f"{name}.json"
        told = [*map(str, TINY), *flags.split(), "--output_file", str(file)]
        done = subprocess.run([sys.executable, "benchmarks/step.py", *told], cwd=ROOT, env=env, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        rows += json.loads(file.read_text())["rows"]
    plain, sharded = ([loss for block in row["blocks"] for loss in block["losses"]] for row in rows)
    assert sharded == pytest.approx(plain, abs=1e-4)
    assert rows[0]["flops_a_token"] == rows[1]["flops_a_token"]


def test_too_large_a_batch_leaves_the_others_measured(one_rank, benchmark, monkeypatch, capsys, tmp_path):
    step = benchmark("step")
    block = step.Run.block

    def full(run, updates):
        if run.sizes.micro == 3:
            raise torch.cuda.OutOfMemoryError("of 1 byte")
        return block(run, updates)

    monkeypatch.setattr(step.Run, "block", full)
    out, rows = call(step, monkeypatch, capsys, tmp_path, "--micro_batch", "3,1")
    assert rows[0]["speed"] is None and rows[1]["speed"] > 0
    assert "| 3 | out of memory |" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--micro_batch", "8,"), "--micro_batch 8,: must be whole numbers"),
        (("--micro_batch", "0"), "--micro_batch 0"),
        (("--targets", "0"), "--targets 0.0"),
        (("--packed", "1"), "--packed 1: must be 0, or 2"),
        (("--length", "1024"), "--length 1024: must be from 2 to the model's 512 positions"),
        (("--length", "1"), "--length 1"),
        (("--freeze", "h.7"), "--freeze h.7"),
        (("--dropout", "1"), "--dropout 1.0"),
        (("--bf16", "--fp16"), "--fp16 and --bf16"),
        (("--deepspeed_config", "none.json"), "none.json"),
        (("--config_file", "none.json"), "none.json"),
    ],
)
def test_mistakes_are_named_before_anything_is_measured(
    one_rank, benchmark, monkeypatch, capsys, tmp_path, flags, message
):
    step = benchmark("step")
    monkeypatch.setattr(step, "product_rate", lambda dtype: pytest.fail("measured"))
    with pytest.raises(UserError, match=message):
        call(step, monkeypatch, capsys, tmp_path, *flags)


# The profile --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::_flash_attention_backward", "attention"),
        ("aten::_efficient_attention_forward", "attention"),
        ("aten::_softmax_backward_data", "attention"),
        ("aten::_log_softmax_backward_data", "softmax and losses"),
        ("aten::copy_", "casts and copies"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::mul_", "zeros, norm, clipping"),
        ("aten::mul", "dropout, sums"),
        ("aten::gelu_backward", "GELU, layer norms"),
        ("nccl:all_reduce", "communication"),
        ("c10d::allreduce_", "communication"),
        ("aten::add", "dropout, sums"),
        ("aten::as_strided", "rest"),
    ],
)
def test_the_category_of_an_operator(benchmark, name, kind):
    assert benchmark("operators").category(name) == kind


def test_the_profile_of_a_cpu_loses_no_time_and_names_nearly_all(one_rank, benchmark, monkeypatch, capsys, tmp_path):
    flags = ("--profile", "--length", 128, "--micro_batch", 16, "--updates", 1)
    out, (row,) = call(benchmark("step"), monkeypatch, capsys, tmp_path, *flags)
    parts, largest = row["profile"]["categories"], row["profile"]["largest"]
    inside = sum(parts.values()) - parts["no operator runs"]
    assert parts["rest"] < 0.1 * inside
    assert parts["matrix products"] > 0 and parts["attention"] > 0 and parts["optimizer"] > 0
    assert len(largest) == 10 and largest[0][2] >= largest[-1][2] and sum(ms for *_, ms in largest) <= inside
    assert out.count("\n| ") == 3 + 2 + len(parts) + 2 + 10


def test_on_a_gpu_the_time_is_that_of_kernels_and_those_of_no_operator_are_told(benchmark):
    def row(key, device, own, annotation=False):
        return SimpleNamespace(
            key=key, count=4, device_type=device, self_device_time_total=own, self_cpu_time_total=9e9,
            is_user_annotation=annotation,
        )  # fmt: skip

    cpu, gpu = DeviceType.CPU, DeviceType.CUDA
    rows = [
        row("aten::mm", cpu, 6000.0), row("aten::view", cpu, 0.0), row("sm90_gemm", gpu, 6000.0),
        row("lone_kernel", gpu, 1000.0), row("Optimizer.step#AdamW.step", gpu, 5e6, annotation=True),
    ]  # fmt: skip
    found = benchmark("operators").own_times(rows, updates=2)
    assert found == [("aten::mm", 2.0, 3.0), ("aten::view", 2.0, 0.0), ("other kernels", 0.0, 0.5)]
