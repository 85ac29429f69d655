"""Freeze plans: what they say, what they refuse, what they save, and that the frozen part stays bit-equal."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from kozero.config import TrainingArguments
from kozero.data.batches import Text, collate
from kozero.errors import UserError
from kozero.freeze import apply_plan, compile_plan, count_parameters, report, skipped_layers, speedup
from kozero.optim import build_optimizer, parameter_groups
from kozero.pause import Pauses
from kozero.plan import ModelShape
from models.causal_lm import CausalLM
from models.language_model import read_config
from tests.helpers import ROOT, numbered_store, toy_gpt2

PAUSE_ID = 7
ALL = {"wte", "wpe", "ln_f", "h.0", "h.1", "h.2", "h.3"}


def plan(text: str | None, num_layers: int = 4, has_pause: bool = False):
    return compile_plan(text, num_layers, has_pause)


# What a plan says --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [None, "", " "])
def test_without_a_plan_all_parts_train(text):
    assert plan(text).trainable == ALL
    assert plan(text).frozen == set()


def test_named_parts_are_frozen():
    made = compile_plan("wte,wpe,h.0-5", 12, has_pause=False)
    assert made.frozen == {"wte", "wpe", *(f"h.{n}" for n in range(6))}
    assert made.trainable == {"ln_f", *(f"h.{n}" for n in range(6, 12))}


def test_all_but_trains_the_named_parts():
    made = compile_plan("all_but:h.12-23,ln_f", 24, has_pause=False)
    assert made.trainable == {"ln_f", *(f"h.{n}" for n in range(12, 24))}
    assert made.frozen == {"wte", "wpe", *(f"h.{n}" for n in range(12))}


@pytest.mark.parametrize("text", ["h.0-1,ln_f", " h.0-1 , ln_f ", "h.0,h.1,ln_f", "h.0-1,h.1,ln_f,", "ln_f,h.1,h.0-0"])
def test_order_spaces_and_repetition_do_not_matter(text):
    assert plan(text) == plan("h.0-1,ln_f")


def test_the_head_is_the_embedding():
    assert plan("wte,lm_head") == plan("wte")
    assert plan("all_but:lm_head,wte").trainable == {"wte"}


def test_a_frozen_embedding_leaves_the_pause_row_to_train():
    made = plan("wte", has_pause=True)
    assert "pause" in made.trainable
    assert made.separate_pause


def test_a_pause_row_of_a_trained_embedding_is_not_separate():
    assert not plan("h.0", has_pause=True).separate_pause
    assert not plan("all_but:wte", has_pause=True).separate_pause
    assert "pause" in plan("all_but:wte", has_pause=True).trainable


def test_the_pause_row_can_be_frozen_with_its_embedding():
    assert plan("wte,pause", has_pause=True).frozen == {"wte", "pause"}


def test_the_pause_row_alone_can_train():
    made = plan("all_but:pause", has_pause=True)
    assert made.trainable == {"pause"}
    assert made.separate_pause


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("wtee", "no such part, did you mean 'wte'"),
        ("h", "no such part"),
        ("h.x", "no such part"),
        ("transformer.h.0", "no such part"),
        ("h.4", "the model has 4 layers, h.0 to h.3"),
        ("h.2-4", "the model has 4 layers"),
        ("h.3-1", "write h.1-3"),
        ("lm_head", "lm_head and wte are one tied parameter"),
        ("all_but:lm_head", "lm_head and wte are one tied parameter"),
        ("wte,wpe,h.0-3,ln_f", "nothing is left to train"),
        ("all_but:", "nothing is left to train"),
        ("pause", "this run has no pauses"),
        ("all_but:pause", "this run has no pauses"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_with_its_text(text, says):
    with pytest.raises(UserError) as caught:
        plan(text)
    assert f"--freeze {text.removeprefix('all_but:')}" in str(caught.value).replace("all_but:", "")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pause_row_cannot_be_frozen_while_its_embedding_trains():
    with pytest.raises(
        UserError, match=r"^--freeze pause: the pause row is a row of wte, which trains; freeze wte too$"
    ):
        plan("pause", has_pause=True)


# What it does to a model -------------------------------------------------------------------------------------------


def frozen_model(text: str | None, num_layers: int = 4, has_pause: bool = True) -> CausalLM:
    """A model in the order of a run: compile, separate the pause row if need be, apply."""
    model = CausalLM(toy_gpt2(num_layers), [PAUSE_ID] if has_pause else [], PAUSE_ID)
    made = compile_plan(text, num_layers, has_pause)
    if made.separate_pause:
        model.separate_pause_row()
    apply_plan(made, model)
    return model


def trained_names(model: CausalLM) -> set[str]:
    names = {name.removeprefix("lm.transformer.") for name, p in model.named_parameters() if p.requires_grad}
    return {".".join(name.split(".")[:2]) if name.startswith("h.") else name for name in names}


def test_exactly_the_parameters_of_the_plan_require_gradients():
    assert trained_names(frozen_model("wpe,h.0-1")) == {"wte.weight", "h.2", "h.3", "ln_f.weight", "ln_f.bias"}
    assert trained_names(frozen_model("all_but:h.3,ln_f")) == {"h.3", "ln_f.weight", "ln_f.bias"}
    assert trained_names(frozen_model("wte,wpe,ln_f,h.0-2")) == {"wte.pause_row", "h.3"}


def test_the_head_stays_tied_under_every_plan():
    for text in (None, "wte", "h.0"):
        model = frozen_model(text)
        assert model.lm.lm_head.weight is model.lm.transformer.wte.weight


def test_a_plan_can_be_applied_over_another():
    model = frozen_model("wte,wpe,h.0-2", has_pause=False)
    apply_plan(compile_plan(None, 4, has_pause=False), model)
    assert all(p.requires_grad for p in model.parameters())


def paused_batch():
    """Texts with two pauses each, all ids below 60; 7, the pause, may be in a text by chance, so it is replaced."""
    store, texts = numbered_store(6, shortest=4), []
    for number in range(6):
        start, _context, prompt, end = store.rows[number, :4]
        ids = store.tokens[start:end].astype("int64")
        ids[ids == PAUSE_ID] = 8
        texts.append(Text(*Pauses(PAUSE_ID, 2).sequence(ids[: prompt - start], ids[prompt - start :]), number))
    return collate([[text] for text in texts])


def train(model: CausalLM, steps: int = 3) -> None:
    arguments = TrainingArguments(learning_rate=0.05, weight_decay=0.5)
    optimizer = build_optimizer(parameter_groups(model, 0.5), arguments)
    batch = paused_batch()
    for _step in range(steps):
        (model(**batch.inputs) / batch.num_targets[0]).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("text", ["wte,wpe,h.0-1", "all_but:h.2,ln_f", "h.2-3", "wpe"])
def test_frozen_parameters_come_out_bit_equal_and_the_others_change(text):
    model = frozen_model(text)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != parameter.requires_grad, name


def test_a_separate_pause_row_alone_gets_gradients():
    model = frozen_model("all_but:pause")
    batch = paused_batch()
    model(**batch.inputs).backward()
    graded = {name for name, p in model.named_parameters() if p.grad is not None}
    assert graded == {"lm.transformer.wte.pause_row"}
    assert model.lm.transformer.wte.pause_row.grad.abs().sum() > 0


def test_separating_the_pause_row_changes_no_loss():
    joined, separate = (CausalLM(toy_gpt2(), [PAUSE_ID], PAUSE_ID) for _ in range(2))
    separate.separate_pause_row()
    batch = paused_batch()
    assert torch.equal(joined(**batch.inputs), separate(**batch.inputs))


def test_the_gradient_of_a_separate_pause_row_is_that_of_the_row_in_the_embedding():
    """The pause is never predicted, so its row gets no gradient through the tied head."""
    joined, separate = frozen_model(None), frozen_model("wte")
    for model in (joined, separate):
        model(**paused_batch().inputs).backward()
    in_table = joined.lm.transformer.wte.weight.grad[PAUSE_ID]
    torch.testing.assert_close(separate.lm.transformer.wte.pause_row.grad[0], in_table)


def test_the_trained_pause_row_returns_to_the_embedding_and_no_other_row_changes():
    model = frozen_model("wte,wpe,h.0-1")
    before = model.lm.transformer.wte.weight.detach().clone()
    train(model)
    state = model.plain_state(model.state_dict())
    table = state["transformer.wte.weight"]
    others = torch.arange(len(table)) != PAUSE_ID
    assert torch.equal(table[others], before[others])
    assert torch.equal(table[PAUSE_ID], model.lm.transformer.wte.pause_row[0])
    assert not torch.equal(table[PAUSE_ID], before[PAUSE_ID])
    assert torch.equal(model.lm.transformer.wte.weight, before)


@pytest.mark.parametrize("text", [None, "wte"])
def test_a_plain_state_fits_plain_transformers(text):
    model = frozen_model(text)
    train(model, steps=1)
    lm = toy_gpt2(4)
    result = lm.load_state_dict(model.plain_state(model.state_dict()), strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["lm_head.weight"], [])
    ids = torch.tensor([[11, 12, PAUSE_ID, PAUSE_ID, 13]])
    with torch.no_grad():
        found, expected = lm(ids).logits, model.lm(ids).logits
    spoken = torch.arange(found.shape[-1]) != PAUSE_ID
    torch.testing.assert_close(found[..., spoken], expected[..., spoken])


# What it saves -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "skipped"),
    [
        ("wte,wpe,h.0-1", 2),
        ("wte,wpe", 0),
        ("wte,h.0-1", 0),  # positions train below them
        ("wpe,h.0-1", 0),
        ("h.2-3", 0),
        ("wte,wpe,h.1-2", 0),
        ("wte,wpe,h.0,h.2", 1),
        ("all_but:ln_f", 4),
    ],
)
def test_only_a_frozen_bottom_with_nothing_trained_below_is_skipped(text, skipped):
    assert skipped_layers(plan(text), 4) == skipped


def test_a_trained_pause_row_is_below_all_layers():
    assert skipped_layers(plan("wte,wpe,h.0-1", has_pause=True), 4) == 0
    assert skipped_layers(plan("wte,wpe,h.0-1,pause", has_pause=True), 4) == 2


@pytest.mark.parametrize(
    ("config", "text", "factor"),
    [
        ("kogpt2", "wte,wpe,h.0-5", 1.50),
        ("kogpt2", "h.0-5", 1.11),
        ("kogpt2", "h.6-11", 1.11),
        ("ko_gpt_trinity", "wte,wpe,h.0-11", 1.50),
        ("ko_gpt_trinity", "h.0-11", 1.16),
        ("ko_gpt_trinity", "h.12-23", 1.16),
        ("kogpt2", None, 1.00),
    ],
)
def test_arithmetic_saved_by_the_table_of_limits(config, text, factor):
    """PERFORMANCE.md section 8, half the layers frozen at 1,024 tokens."""
    shape = ModelShape.of(read_config(ROOT / "models" / f"{config}_config.json"))
    made = compile_plan(text, shape.num_layers, has_pause=False)
    assert speedup(made, shape, 1024) == pytest.approx(factor, abs=0.006)


def activation_bytes(model: CausalLM) -> int:
    """Bytes that autograd keeps for the backward pass, parameters apart."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(**paused_batch().inputs)
    assert loss.requires_grad
    return sum(kept.values())


def test_autograd_keeps_no_activations_for_a_frozen_bottom():
    full, half, top = (activation_bytes(frozen_model(t, has_pause=False)) for t in (None, "wte,wpe,h.0-1", "h.2-3"))
    assert half < 0.65 * full
    assert top > 0.7 * full  # a frozen top is crossed


def test_each_skipped_layer_saves_the_same():
    kept = [activation_bytes(frozen_model(f"wte,wpe,h.0-{n}", has_pause=False)) for n in range(3)]
    assert kept[0] > kept[1] > kept[2]
    assert kept[0] - kept[1] == pytest.approx(kept[1] - kept[2], rel=0.02)


def test_the_report_counts_what_trains_and_says_where_the_backward_pass_stops():
    model = frozen_model("wte,wpe,h.0-1", has_pause=False)
    shape = ModelShape.of(model.lm.config)
    lines = report(plan("wte,wpe,h.0-1"), count_parameters(model), shape, 64, saved_bytes=3 * 2**20)
    frozen = (64 + 64) * 32 + 2 * shape.block_parameters
    assert f"{shape.parameters:,} in all, {shape.parameters - frozen:,} train, {frozen:,} frozen" in lines[0]
    assert "3.0 MiB" in lines[1]
    assert "above h.1" in lines[2]


def test_the_report_names_what_trains_below_frozen_layers():
    made = plan("wte,wpe,h.0-1", has_pause=True)
    model = frozen_model("wte,wpe,h.0-1")
    assert (
        "because pause below them trains"
        in report(made, count_parameters(model), ModelShape.of(model.lm.config), 64, 0.0)[2]
    )
