"""DeepSpeed JSON and command line: "auto" is filled in, contradictions are refused with both values."""

import json

import pytest

from kozero.config import BatchSizes, TrainingArguments
from kozero.ds_config import resolve
from kozero.engines.deepspeed import check_sections
from kozero.errors import UserError
from tests.helpers import ROOT

SIZES = BatchSizes(micro=4, accumulation=2, world_size=3)
SHIPPED = sorted((ROOT / "ds_configs").glob("*.json"))
STAGES = {"zero0": 0, "zero1": 1, "zero2": 2, "zero2_offload": 2, "zero3": 3, "zero3_offload": 3}


def of_file(path, **flags) -> dict:
    defaults = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    return resolve(TrainingArguments(deepspeed_config=str(path), **(defaults | flags)), SIZES)


@pytest.fixture
def resolved(tmp_path):
    """Resolve a JSON value."""

    def write(value, **flags) -> dict:
        path = tmp_path / "zero.json"
        path.write_text(json.dumps(value))
        return of_file(path, **flags)

    return write


@pytest.fixture
def refused(resolved):
    """The one line that a user reads."""

    def read(value, **flags) -> str:
        with pytest.raises(UserError) as caught:
            resolved(value, **flags)
        assert "zero.json" in str(caught.value)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return read


def leaves(value) -> list:
    if isinstance(value, dict):
        return [leaf for part in value.values() for leaf in leaves(part)]
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, list) else [value]


def test_every_stage_ships_with_a_file():
    assert {path.stem for path in SHIPPED} == set(STAGES)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_are_filled_from_the_command_line(path):
    config = of_file(path, max_grad_norm=0.7, bf16=True)
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 2
    assert config["train_batch_size"] == 24
    assert config["gradient_clipping"] == 0.7
    assert config["bf16"]["enabled"] is True
    assert config["fp16"]["enabled"] is False


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_leave_no_auto_and_keep_their_stage(path):
    config = of_file(path)
    assert "auto" not in leaves(config)
    assert config["zero_optimization"]["stage"] == STAGES[path.stem]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_only_the_offload_files_offload(path):
    offloads = {name for name in of_file(path)["zero_optimization"] if name.startswith("offload")}
    stage3 = {"offload_optimizer", "offload_param"}
    assert offloads == {"zero2_offload": {"offload_optimizer"}, "zero3_offload": stage3}.get(path.stem, set())


def test_what_the_file_leaves_out_is_filled_in_too(resolved):
    config = resolved({"zero_optimization": {"stage": 2}}, fp16=True)
    assert config["train_batch_size"] == 24
    assert config["fp16"]["enabled"] is True


def test_an_empty_object_is_stage_zero(resolved):
    assert resolved({})["zero_optimization"]["stage"] == 0


def test_values_that_agree_are_accepted(resolved):
    same = {"train_batch_size": 24, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2}
    config = resolved(same | {"gradient_clipping": 1, "bf16": {"enabled": False}})
    assert config["train_batch_size"] == 24


def test_what_the_command_line_does_not_decide_passes_through(resolved):
    value = {"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}, "fp16": {"initial_scale_power": 8}}
    config = resolved(value, fp16=True)
    assert config["zero_optimization"]["reduce_bucket_size"] == 1000
    assert config["fp16"] == {"initial_scale_power": 8, "enabled": True}


def test_an_auto_size_of_zero_gets_deepspeeds_default(resolved):
    assert (
        "reduce_bucket_size" not in resolved({"zero_optimization": {"reduce_bucket_size": "auto"}})["zero_optimization"]
    )


@pytest.mark.parametrize(
    ("value", "says", "flag", "wants"),
    [
        ({"train_micro_batch_size_per_gpu": 3}, "train_micro_batch_size_per_gpu 3", "--per_device_train_batch_size", 4),
        ({"gradient_accumulation_steps": 7}, "gradient_accumulation_steps 7", "--gradient_accumulation_steps", 2),
        ({"train_batch_size": 25}, "train_batch_size 25", "4 x 2 x 3 ranks", 24),
        ({"gradient_clipping": 0.5}, "gradient_clipping 0.5", "--max_grad_norm", 1.0),
        ({"fp16": {"enabled": True}}, "fp16.enabled True", "--fp16", False),
        ({"bf16": {"enabled": 0}}, "bf16.enabled 0", "--bf16", False),
    ],
)
def test_a_contradiction_names_both_values(refused, value, says, flag, wants):
    message = refused(value)
    assert says in message
    assert flag in message
    assert str(wants) in message.split(flag)[1]
    assert '"auto"' in message


def test_all_contradictions_are_told_at_once(refused):
    message = refused(
        {
            "train_batch_size": 99,
            "gradient_accumulation_steps": 7,
            "gradient_clipping": 0.5,
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0.3}},
        }
    )
    for part in (
        "train_batch_size 99", "gradient_accumulation_steps 7", "gradient_clipping 0.5", "bf16.enabled True",
        "optimizer.params.lr 0.1", "optimizer.params.weight_decay 0.3",
    ):  # fmt: skip
        assert part in message


def test_an_unknown_key_is_answered_with_the_nearest(refused):
    assert "unknown key 'zero_optimisation', did you mean 'zero_optimization'" in refused({"zero_optimisation": {}})


@pytest.mark.parametrize("stage", [5, -1, "2", 1.0, True, None, "auto"])
def test_a_stage_that_does_not_exist_is_named(refused, stage):
    assert f"zero_optimization.stage {stage!r}: must be 0, 1, 2 or 3" in refused(
        {"zero_optimization": {"stage": stage}}
    )


def test_a_schedule_is_refused_with_the_flag_that_decides_it(refused):
    message = refused({"scheduler": {"type": "WarmupLR"}})
    assert "'scheduler'" in message
    assert "--lr_scheduler_type" in message


@pytest.mark.parametrize("name", ["zero_optimization", "optimizer", "fp16", "bf16"])
def test_a_section_that_is_no_object_is_named(refused, name):
    assert f"'{name}' must be an object, found 3" in refused({name: 3})


def test_an_optimizer_that_agrees_is_taken_out(resolved):
    params = {"lr": 5e-5, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": "auto", "torch_adam": True}
    assert "optimizer" not in resolved({"optimizer": {"type": "AdamW", "params": params}})
    assert "optimizer" not in resolved({"optimizer": {"type": "SGD"}}, optim="sgd")
    assert "optimizer" not in resolved({"optimizer": {"type": "auto", "params": {"lr": "auto"}}})


@pytest.mark.parametrize(("kind", "optim"), [("SGD", "adamw"), ("AdamW", "sgd"), ("Lamb", "adamw"), (3, "adamw")])
def test_another_optimizer_is_refused_with_both_names(refused, kind, optim):
    assert f"optimizer.type {kind!r}, --optim {optim!r}" in refused({"optimizer": {"type": kind}}, optim=optim)


@pytest.mark.parametrize(
    ("name", "value", "flag"),
    [
        ("lr", 0.1, "--learning_rate 5e-05"),
        ("betas", [0.8, 0.9], "--adam_beta1, --adam_beta2 [0.9, 0.999]"),
        ("eps", 1e-5, "--adam_epsilon 1e-08"),
        ("adam_w_mode", False, "True"),
    ],
)
def test_optimizer_values_that_disagree_are_named(refused, name, value, flag):
    message = refused({"optimizer": {"type": "Adam", "params": {name: value}}})
    assert f"optimizer.params.{name} {value!r}" in message
    assert flag in message


def test_an_unknown_optimizer_value_is_answered_with_the_nearest(refused):
    message = refused({"optimizer": {"type": "AdamW", "params": {"weight_deca": 0.1}}})
    assert "unknown key 'weight_deca', did you mean 'weight_decay'" in message


def test_an_auto_that_nothing_fills_is_named_by_its_place(refused):
    assert "fp16.loss_scale" in refused({"fp16": {"loss_scale": "auto"}})
    assert "zero_optimization.offload_optimizer.device" in refused(
        {"zero_optimization": {"offload_optimizer": {"device": "auto"}}}
    )


def test_a_file_that_is_no_object_is_named(refused):
    assert "expected a JSON object, found list" in refused([])


def test_the_arguments_are_not_changed_and_the_file_is_read_anew(tmp_path):
    arguments = TrainingArguments(deepspeed_config=str(ROOT / "ds_configs/zero2.json"), per_device_train_batch_size=4)
    before = repr(arguments)
    first = resolve(arguments, BatchSizes(4, 1, 1))
    assert repr(arguments) == before
    assert first == resolve(arguments, BatchSizes(4, 1, 1))
    assert first["train_batch_size"] == 4


@pytest.mark.parametrize("name", ["torch_autocast", "load_universal_checkpoint"])
def test_what_the_command_line_decides_is_not_said_here(refused, name):
    assert name in refused({name: {"enabled": True}, "zero_optimization": {"stage": 2}})


def test_where_nothing_trains_batches_and_clipping_mean_nothing(tmp_path):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"train_batch_size": 999, "gradient_clipping": 0.1, "zero_optimization": {"stage": 3}}))
    found = resolve(TrainingArguments(deepspeed_config=str(path)), BatchSizes(8, 1, 1), trains=False)
    assert found["train_batch_size"] == 8 and found["zero_optimization"] == {"stage": 3}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "'overlap_com', did you mean 'overlap_comm'"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu", "pin_memori": True}}},
            "'pin_memori', did you mean 'pin_memory'",
        ),
        ({"zero_optimization": {"stage": 1}, "fp16": {"loss_scal": 8}}, "'loss_scal', did you mean 'loss_scale'"),
    ],
)
def test_an_unknown_key_inside_a_section_is_answered_with_the_nearest(value, says):
    with pytest.raises(UserError) as caught:
        check_sections(value, "zero.json")
    assert says in str(caught.value) and str(caught.value).startswith("zero.json ")
