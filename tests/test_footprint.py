"""Predicted memory beside what the allocator counts in real runs of every engine, and the plans that come of it."""

import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from finetune import planned, ways
from finetune.planned import PlannedModel
from kozero.config import BatchSizes, TrainingArguments
from kozero.engines.deepspeed import zero_sizes
from kozero.errors import UserError
from kozero.footprint import Footprint, Setting, footprint
from kozero.json_files import read_json_object
from kozero.trace import Traced
from models.language_model import read_config
from scripts import plan
from tests.helpers import ROOT, gpt2_configs
from tests.peaks import Case, batch, peaks
from tests.ranks import run_ranks

JSONS = ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
SMALL = {"reduce_bucket_size": 200_000, "stage3_param_persistence_threshold": 1000}  # in the proportion of the model
RECIPES = {  # file: GiB of a GPU (15 of a T4's 16 can be used), their number, and what the READMEs say of it
    "trinity_t4": (15, 1, 12.1),
    "trinity_2xt4": (15, 2, 11.3),
    "trinity_24gb": (24, 1, 22.2),
    "trinity_8xa100": (80, 8, 18.4),
}


def cases(folder, world_size) -> list[Case]:
    """Every engine in 32 and 16 bit, and what changes memory: accumulation, freezing, checkpoints of activations."""
    files = {None: None}
    for name in JSONS:
        config = read_json_object(str(ROOT / f"ds_configs/{name}.json"))
        config["zero_optimization"] |= {k: v for k, v in SMALL.items() if k[:6] != "stage3" or "zero3" in name}
        files[name] = str(folder / f"{name}.json")
        (folder / f"{name}.json").write_text(json.dumps(config))
    if world_size == 1:  # on one CPU rank no weight has to travel from the machine's memory to the device's
        del files["zero3_offload"]
    dtypes = ["bf16"] if world_size == 1 else ["fp32", "bf16"]
    every = [Case(file, dtype) for file in files.values() for dtype in dtypes]
    frozen = {"freeze": "wte,wpe,h.0-1", "accumulation": 2}
    return every + [
        Case(files[None], "bf16", accumulation=2),
        Case(files["zero1"], "bf16", accumulation=2),
        Case(files["zero2"], "bf16", **frozen),
        Case(files["zero3"], "bf16", **frozen),
        Case(files["zero2_offload"], "bf16", **frozen),
        Case(files["zero2"], "bf16", checkpointing=True),
        Case(files["zero2"], "fp32", micro=1),
        Case(files["zero2"], "fp16", accumulation=2),
        Case(files["zero3"], "bf16", checkpointing=True),
    ]


def predicted(case: Case, world_size: int) -> float:
    """Of rank 0; on a CPU device and machine are the same memory."""
    stage, zero = 0, None
    if case.json:
        config = read_json_object(case.json)
        stage, zero = config["zero_optimization"]["stage"], zero_sizes(config, case.json)
    found = case.model().footprint(case.micro, case.accumulation, world_size, stage, zero, case.checkpointing)
    return found.peak if torch.cuda.is_available() else found.peak + found.host + found.kept


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the ranks would share a GPU")
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_prediction_is_within_a_tenth_of_the_allocators_peak(tmp_path, world_size):
    todo = cases(tmp_path, world_size)
    measured = run_ranks(peaks, todo, world_size=world_size)[0]
    found = [predicted(case, world_size) / size for case, size in zip(todo, measured, strict=True)]
    wrong = [(case, round(ratio, 3)) for case, ratio in zip(todo, found, strict=True) if not 0.9 <= ratio <= 1.1]
    assert not wrong
    plain = [ratio for case, ratio in zip(todo, found, strict=True) if case.json is None]
    assert plain == pytest.approx([1] * len(plain), abs=0.01)  # PyTorch alone hides nothing


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is visible")
def test_the_prediction_is_within_a_tenth_of_a_gpus_peak(tmp_path):
    """Wide enough for the workspaces of CUDA's libraries, some 40 MB, to be small."""
    todo = [replace(case, scale=6) for case in cases(tmp_path, 1)]
    measured = run_ranks(peaks, todo, world_size=1)[0]
    found = {case: predicted(case, 1) / size for case, size in zip(todo, measured, strict=True)}
    assert not {case: ratio for case, ratio in found.items() if not 0.9 <= ratio <= 1.1}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_layer_keeps_what_autograd_says_that_it_keeps(dtype):
    """Two layers less one, against the tensors that autograd saves in a real pass."""
    half = torch.bfloat16 if dtype == "bf16" else torch.float32
    found = []
    for layers in (2, 3):
        model = replace(Case(None, dtype).model(), config=replaced(n_layer=layers), on_gpu=False)
        module, saved = model.module(half), {}
        known = {p.untyped_storage().data_ptr() for p in module.parameters()}

        def keep(tensor, known=known, saved=saved):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                saved[storage.data_ptr()] = (tensor, storage.nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = module(**batch(Case(None)).inputs)
        found.append((sum(size for _, size in saved.values()), model.traced(8, True, 1.0, False).peak))
        del loss
    (few, low), (many, high) = found
    assert high - low == pytest.approx(many - few, rel=0.02)


def replaced(**values):
    """The config of the cases with other values."""
    config = Case(None).model().config
    return type(config)(**config.to_dict() | values)


def test_dropout_keeps_one_byte_an_element(monkeypatch):
    """Three dropouts of (B, T, H) in each layer and one behind the embeddings, at the loss."""
    on_cpu = replace(Case(None).model(), on_gpu=False)
    assert on_cpu.config.resid_pdrop
    without, elements = replaced(resid_pdrop=0.0, embd_pdrop=0.0), 8 * 64 * 192 * (1 + 2 * 4)
    found = [replace(on_cpu, on_gpu=gpu).traced(8, True, 1.0, False).peak for gpu in (True, False)]
    monkeypatch.setattr(planned, "use_kernels", lambda lm: None)  # a dropout of 0 keeps nothing, the kernel a mask
    least = [replace(on_cpu, on_gpu=gpu, config=without).traced(8, True, 1.0, False).peak for gpu in (True, False)]
    for some, none in zip(found, least, strict=True):
        assert some - none == pytest.approx(elements, rel=0.02)


def test_on_a_gpu_attention_keeps_no_matrix_of_a_rows_tokens():
    """Twice the length at half the rows: the same tokens, and the same memory."""
    short = replace(Case(None, "bf16").model(), on_gpu=True, config=replaced(n_positions=512))
    long = replace(short, length=128)
    found = [short.traced(8, True, 1.0, False).peak, long.traced(4, True, 1.0, False).peak]
    assert found[1] == pytest.approx(found[0], rel=0.01)


def call(monkeypatch, capsys, *flags) -> str:
    monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, flags)])
    plan.main()
    return capsys.readouterr().out


TINY = ("--config_file", ROOT / "models/tiny_config.json", "--max_seq_length", 64)


def only(monkeypatch, *names: str) -> None:
    """Leave the other shipped JSONs out."""
    monkeypatch.setattr(ways, "SHIPPED", names)


def test_what_is_proposed_fits_and_a_larger_micro_batch_does_not(monkeypatch, capsys):
    """The proposal, planned again as told; the micro batch is not bounded by the update."""
    only(monkeypatch, "zero0", "zero1")
    machine = ("--device_gib", 0.05, "--reserve_gib", 0, "--bf16")
    out = call(monkeypatch, capsys, *TINY, *machine, "--per_device_train_batch_size", 512)
    assert "does not fit into the GPU" in out
    proposed = out.split("proposed: ")[1].splitlines()[0].split()
    again = call(monkeypatch, capsys, *TINY, *machine, *proposed)
    assert "rows): fits" in again and "512 rows an update" in out
    place = proposed.index("--per_device_train_batch_size") + 1
    proposed[place] = str(2 * int(proposed[place]))
    assert "does not fit" in call(monkeypatch, capsys, *TINY, *machine, *proposed).split("as told")[1].splitlines()[0]


def test_a_larger_micro_batch_may_take_less_and_is_found():
    """Under DDP gradients of earlier micro batches lie beside the buckets, and one micro batch has no earlier one."""
    model = PlannedModel(read_config(ROOT / "models/kogpt2_config.json"), None, False, "fp32", length=8)
    planner = ways.Planner(model, room=0.0, host=math.inf, global_batch=8)
    two = ways.Way("zero0.json", ranks=2, checkpointing=False, stage=0, zero=None)
    small, large = (planner.choice(two, micro).footprint.peak for micro in (2, 4))
    assert small > large
    planner.room = (small + large) / 2
    assert planner.largest(two).micro == 4
    planner.room = large - 1
    assert planner.largest(two) is None


def test_an_update_of_many_divisors_is_planned_in_a_few_passes(monkeypatch):
    """720,720 rows have 240 divisors, and each is a pass through the model of a second."""
    tried = []

    def choice(planner, way, micro, accumulation=0):
        tried.append(micro)
        return ways.Choice(way, micro, 720_720 // micro, Footprint({"weights": micro}, 0.0, 0.0, 0.0))

    monkeypatch.setattr(ways.Planner, "choice", choice)
    one = ways.Way("zero0.json", ranks=1, checkpointing=False, stage=0, zero=None)
    for room, micro in ((1000, 990), (720_720, 720_720), (1, 1), (0, None)):
        tried.clear()
        found = ways.Planner(None, room=room, host=math.inf, global_batch=720_720).largest(one)
        assert (found and found.micro) == micro and len(tried) <= 12


def test_the_machine_has_room_for_what_all_ranks_hold_and_for_what_they_load():
    four = ways.Way("zero3.json", ranks=4, checkpointing=False, stage=3, zero=None)
    for loading, wanted in ((3.0, 4 * 10 + 5), (20.0, 4 * 20)):
        found = Footprint(device={}, host=10.0, kept=5.0, loading=loading)
        assert ways.Choice(four, 1, 1, found).host == wanted


def test_activations_that_are_made_anew_cost_a_third_more_arithmetic():
    """A forward pass is a third of a step, 2 of 6 operations a parameter and token."""
    model = SimpleNamespace(counts={"total": 1000, "trainable": 1000}, length=128, dtype="fp32", num_tensors=3)
    planner = ways.Planner(model, room=0, host=0, global_batch=8)
    one = ways.Way("zero0.json", ranks=1, checkpointing=False, stage=0, zero=None)
    plain, anew = (planner.seconds(ways.Choice(way, 8, 1, None)) for way in (one, replace(one, checkpointing=True)))
    assert anew / plain == pytest.approx(8 / 6)


def test_what_only_costs_where_everything_fits_comes_last():
    """Stages in their order, checkpoints of activations after the same without, offload after everything else."""
    model = PlannedModel(read_config(ROOT / "models/kogpt2_config.json"), None, False, "fp32", length=1024)
    planner = ways.Planner(model, room=math.inf, host=math.inf, global_batch=64)
    said = TrainingArguments(per_device_train_batch_size=8, gradient_accumulation_steps=2)
    order = ways.ways(4, said, BatchSizes(8, 2, 4))
    order.sort(key=lambda way: planner.seconds(planner.choice(way, 8)))
    names = [way.name for way in order]
    plain = [name for name in names if "+" not in name]
    assert names[0] == "zero0" and plain == ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
    assert all(names.index(name) < names.index(f"{name} + checkpointing") for name in plain)


def test_nothing_fits_and_what_then(monkeypatch, capsys):
    out = call(monkeypatch, capsys, *TINY, "--device_gib", 0.001, "--reserve_gib", 0, "--host_gib", 0.001)
    assert "does not fit into the GPU and the machine" in out and "no setting fits" in out
    assert all(name in out for name in ("--max_seq_length", "--freeze", "--bf16", "--host_gib"))


def test_a_table_for_each_number_of_ranks_and_its_file(monkeypatch, capsys, tmp_path):
    """Under ZeRO-3 a rank of two has half of the states that one has; on one rank it shards nothing."""
    only(monkeypatch, "zero0", "zero3")
    file = tmp_path / "new" / "plan.json"
    model = ("--config_file", ROOT / "models/kogpt2_config.json", "--max_seq_length", 64, "--bf16")
    out = call(monkeypatch, capsys, *model, "--ranks", "1, 2", "--output_file", file)
    one, two = json.loads(file.read_text())["plans"]
    assert out.count("| setting |") == 2 and (one["ranks"], two["ranks"]) == (1, 2)
    names = ["zero0", "zero0", "zero0 + checkpointing", "zero3", "zero3 + checkpointing"]
    assert [[row["setting"] for row in told["rows"]] for told in (one, two)] == [names[:3], names]
    paper = [two["rows"][k]["by the paper"] for k in (0, 3)]
    assert paper == pytest.approx([16 * 125_164_032, 8 * 125_164_032])


@pytest.mark.parametrize("stem", [path.stem for path in gpt2_configs()])
def test_every_shipped_model_can_be_planned(stem):
    model = PlannedModel(read_config(ROOT / f"models/{stem}.json"), None, True, "bf16", 64)
    assert model.footprint(1, 1, 1, 0, None, False).peak > 16 * model.counts["total"]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "trinity_8xa100" else pytest.mark.slow) for n in RECIPES]
)
def test_a_recipe_fits_its_machine_as_the_readmes_say_and_nothing_is_much_better(monkeypatch, capsys, name):
    gib, ranks, said = RECIPES[name]
    only(monkeypatch, "zero0", "zero1")  # every way is tried in test_commands.py
    out = call(monkeypatch, capsys, ROOT / f"finetune/recipes/{name}.json", "--device_gib", gib, "--ranks", ranks)
    assert "fits, and nothing is much better" in out
    peak = next(line for line in out.splitlines() if line.startswith("| zero")).split("|")[10]
    assert float(peak) == pytest.approx(said, abs=0.051)  # both are rounded
    for readme in ("README.md", "README.ko.md"):
        (line,) = [line for line in (ROOT / readme).read_text().splitlines() if f"`{name}.json`" in line]
        assert line.endswith(f"| {said} |")


def test_the_published_models_need_no_download():
    for name, file in plan.SHAPES.items():
        assert (
            plan.shape(plan.ModelArguments(model_name_or_path=name)).to_dict()
            == read_config(ROOT / "models" / file).to_dict()
        )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ranks", "0"), "--ranks 0: must be whole numbers"),
        (("--ranks", "two"), "--ranks two"),
        (("--device_gib", "1"), "--device_gib 1.0: not above --reserve_gib"),
        (("--predicted", "0"), "--predicted 0.0"),
        (("--task", "mrc"), "--task mrc: plans are for GPT-2"),
        (("--task", "essay", "--num_pauses", "3"), "--num_pauses 3: --task essay has no prompts"),
        (("--model_name_or_path", "skt/kogpt2-base-v2"), "give either"),
        (("--per_device_train_batch_size", 10**9), "must be 1,048,576 at most"),
        (("--gradient_accumulation_steps", 10**15), "must be 1,048,576 at most"),
        (("--ranks", "1" * 999), "--ranks 1111"),
        (("--output_file", str(ROOT)), "is a folder"),
        (("--max_seq_length", "4096"), "--max_seq_length 4096"),
        (("--freeze", "h.9"), "--freeze h.9"),
        (("--deepspeed_config", "none.json"), "none.json"),
    ],
)
def test_mistakes_are_named(monkeypatch, capsys, flags, message):
    with pytest.raises(UserError, match=message):
        call(monkeypatch, capsys, *TINY, *flags)


BAD_JSONS = {
    "a section that is a number": ({"zero_optimization": 3}, "'zero_optimization' must be an object"),
    "a stage as text": ({"zero_optimization": {"stage": "2"}}, "zero_optimization.stage '2'"),
    "a size as text": ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "big"}}, "DeepSpeed refuses it"),
    "an unknown key": ({"zero_optimisation": {"stage": 2}}, "did you mean 'zero_optimization'"),
    "another batch": ({"train_micro_batch_size_per_gpu": 99, "zero_optimization": {"stage": 1}}, "disagree"),
}


@pytest.mark.parametrize("case", BAD_JSONS)
def test_a_json_that_training_refuses_is_refused(monkeypatch, capsys, tmp_path, case):
    content, message = BAD_JSONS[case]
    (tmp_path / "ds.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        call(monkeypatch, capsys, *TINY, "--deepspeed_config", tmp_path / "ds.json")


def test_offload_to_nowhere_is_none():
    section = {"stage": 2, "offload_optimizer": {"device": "none"}, "contiguous_gradients": False}
    assert not zero_sizes({"zero_optimization": section}, "x").offload_optimizer
    section["offload_optimizer"]["device"] = "cpu"
    found = zero_sizes({"zero_optimization": section}, "x")
    assert found.offload_optimizer and found.buckets == 1


def test_pinned_memory_is_rounded_up_to_powers_of_two():
    """ZeRO-2 with offload on one rank, 5 trained parameters in bf16: 20 bytes of weights and of gradients become 32
    each, 10 of 16-bit weights 16, 6 of the largest tensor 8; 40 of moments stay 40."""
    zero = zero_sizes(
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}}}, "x"
    )
    setting = Setting(5, 5, 5, 3, stage=2, world_size=1, dtype="bf16", accumulation=1, zero=zero)
    assert footprint(setting, Traced(0, 0, 0)).host == 32 + 32 + 16 + 8 + 40
