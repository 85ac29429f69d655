"""The laws of an engine on two ranks, for every engine and ZeRO stage: on CPUs, or on GPUs where they are visible; one
rank where there is one GPU.

Starting processes and importing DeepSpeed takes longer than all of the training here. So three groups of processes
measure everything once (`measured`, `resumed`, `alone`); the tests compare what they bring back.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kozero.pause import Pauses
from tests.measures import (
    CASES,
    DTYPES,
    END,
    HALF_CASES,
    PARTS,
    RESUME_AT,
    RESUME_FREEZE,
    RESUME_STEPS,
    choices,
    expected,
    ids_to_compare,
    measure,
    measure_alone,
    measure_resumed,
    prompts,
    trained_lm,
    without_targets,
)
from tests.ranks import RANKS, run_ranks
from tests.toys import (
    CLIP,
    ENGINES,
    NUM_PAUSES,
    PAUSE,
    RATES,
    SELDOM,
    SHAPE,
    SHARDINGS,
    VOCAB,
    greedy,
    reference,
    steps,
    text_logits,
    toy,
    until,
)
from tests.two_tasks import reference_of_two

pytestmark = pytest.mark.xdist_group("engines")  # the slow ones too: their processes measure once
TOLERANCE = 5e-5 if torch.cuda.is_available() else 1e-5  # of 32 bit; the references are computed on a CPU

# Tests: training ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the runs lie."""
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="module")
def names(request):
    """Engines of the tests that are to run."""
    calls = [item.callspec for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    return [name for name in ENGINES if name in {call.params.get("name") for call in calls}]


@pytest.fixture(scope="module")
def both(names, folder):
    """What the ranks measured."""
    return run_ranks(measure, names, folder, world_size=RANKS)


@pytest.fixture(scope="module")
def measured(both):
    """What rank 0 measured, by engine and subject."""
    return lambda *key: whole(both[0][key])


@pytest.fixture(scope="module")
def elsewhere(both):
    """What the last rank measured."""
    return lambda *key: whole(both[-1][key])


@pytest.fixture(scope="module")
def resumed(both, names, folder):
    """The runs that were resumed in new processes."""
    found = run_ranks(measure_resumed, names, folder, world_size=RANKS)[0]
    return lambda *key: whole(found[key])


@pytest.fixture(scope="module")
def alone(names):
    """What one process measured."""
    found = run_ranks(measure_alone, names, world_size=1)[0]
    return lambda *key: whole(found[key])


def whole(value: Any) -> Any:
    """A measurement, unless it failed."""
    if isinstance(value, str):
        pytest.fail(f"in the processes:\n{value}", pytrace=False)
    return value


def close(found: list[float], wanted: list[float], tolerance: float = TOLERANCE) -> bool:
    """Whether all numbers agree."""
    return found == pytest.approx(wanted, rel=0, abs=tolerance)


def points(folder: Path) -> dict[int, dict[str, Any]]:
    """The curves of a run by step, without what depends on the clock and the machine."""
    merged: dict[int, dict[str, Any]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        merged.setdefault(row.pop("step"), {}).update(row)
    clock = ("time", "train/tokens_per_second", "train/step_time_seconds", "train/peak_memory_gib")
    return {step: {name: v for name, v in point.items() if name not in clock} for step, point in merged.items()}


def names_of(freeze: str | None, trainable: bool = True) -> set[str]:
    """Names of the toy's parameters that train, or do not."""
    return {name for name, p in toy(freeze).named_parameters() if p.requires_grad == trainable}


def freeze_of(what: str) -> str | None:
    """The freeze plan of a case."""
    return CASES[what][2] if what in CASES else HALF_CASES.get(what)


def some(names):
    """Engines as parameters, those that another one is near to for the slow tests."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in SELDOM else name for name in names]


every_engine = pytest.mark.parametrize("name", some(ENGINES))
every_dtype = pytest.mark.parametrize("dtype", DTYPES)
halves = pytest.mark.parametrize("dtype", ["bf16", "fp16"])


def test_the_reference_clips_in_every_step_and_its_micro_batches_differ_in_targets():
    for optim, freeze in [("sgd", None), ("adamw", None), ("sgd", PARTS)]:
        assert min(expected(optim, freeze)[1]) > CLIP
    targets = [[sum((text.predicts >= 0).sum() for text in row) for row in rows] for rows in steps()]
    assert all(len({sum(step[k : k + 2]) for k in range(0, 8, 2)}) > 2 for step in targets)
    assert any(len(row) > 1 for rows in steps() for row in rows)


@pytest.mark.parametrize("what", CASES)
@every_engine
def test_losses_and_gradient_norms_are_those_of_plain_pytorch_text_by_text(measured, name, what):
    optim, _, freeze = CASES[what]
    losses, norms, _ = expected(optim, freeze)
    found = measured(name, what)
    assert close(found["loss"], losses)
    assert close(found["grad_norm"], norms)
    assert found["applied"] == [True] * len(losses)


@pytest.mark.parametrize("what", [what for what in CASES if what.startswith("sgd")])
@every_engine
def test_weights_after_training_are_those_of_plain_pytorch(measured, name, what):
    optim, _, freeze = CASES[what]
    found = toy(freeze).plain_state(measured(name, what)["state"])
    wanted = expected(optim, freeze)[2]
    assert set(found) == set(wanted)
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, atol=TOLERANCE, rtol=0)


@every_engine
def test_a_rank_with_no_targets_in_one_micro_batch_or_in_all_changes_nothing(measured, name):
    losses, norms, _ = reference(without_targets(), "sgd")
    found = measured(name, "no targets")
    assert close(found["loss"], losses)
    assert close(found["grad_norm"], norms)


@every_engine
def test_all_ranks_tell_the_same(measured, elsewhere, name):
    for what in CASES:
        here, there = measured(name, what), elsewhere(name, what)
        assert all(here[key] == there[key] for key in ("loss", "grad_norm", "applied", "loss_scale"))


@pytest.mark.parametrize("name", some(name for name in ENGINES if "offload" not in name))
def test_the_parameters_lie_on_the_device(measured, name):
    assert measured(name, "sgd")["devices"] == {"cuda" if torch.cuda.is_available() else "cpu"}


@every_engine
def test_one_process_trains_as_two_do(alone, name):
    losses, norms, _ = expected("sgd")
    found = alone(name, "sgd")
    assert close(found["loss"], losses)
    assert close(found["grad_norm"], norms)


@pytest.mark.parametrize("optim", RATES)
@every_engine
def test_each_of_two_objectives_has_its_own_divisor_and_experts_may_have_no_tokens(measured, name, optim):
    losses, norms, weights = reference_of_two(optim)
    found = measured(name, f"two objectives, {optim}")
    assert losses[-1][1] is None and None not in losses[0]
    for here, wanted in zip(found["losses"], losses, strict=True):
        assert close(here, wanted)
    assert close(found["loss"], [words + (order or 0.0) for words, order in losses])
    assert close(found["grad_norm"], norms)
    assert set(found["state"]) == set(weights)
    if optim == "sgd":
        for key, tensor in weights.items():
            torch.testing.assert_close(found["state"][key], tensor, atol=TOLERANCE, rtol=0)


@every_engine
def test_recomputing_activations_changes_nothing(measured, name):
    losses, norms, _ = expected("sgd")
    found = measured(name, "recomputed")
    assert close(found["loss"], losses)
    assert close(found["grad_norm"], norms)


@every_engine
def test_a_gradient_that_comes_only_in_the_second_step_is_in_its_norm(alone, name):
    assert close(alone(name, "late gradient"), [12**0.5, (12 + 48) ** 0.5])  # gradients are 2, of 3 and of 12 values


@halves
@every_engine
def test_sixteen_bits_stay_close_to_thirty_two(measured, name, dtype):
    losses, norms, _ = expected("sgd")
    found = measured(name, dtype)
    assert close(found["loss"], losses, 4e-3)
    assert found["grad_norm"] == pytest.approx(norms, rel=5e-3)
    assert all(found["applied"])


def gradients_of(weights: dict, after: dict) -> dict[str, torch.Tensor]:
    """What the first step of SGD, which decays matrices, has subtracted, in 64 bit."""
    rate = RATES["sgd"] * SHAPE[0]
    weights, after = ({key: t.double() for key, t in state.items()} for state in (weights, after))
    return {key: (w - after[key]) / rate - 0.1 * w * (w.dim() > 1) for key, w in weights.items()}


def norm(gradients: dict[str, torch.Tensor]) -> float:
    """Of all numbers together."""
    return torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()


@halves
@every_engine
def test_in_sixteen_bits_the_norm_is_that_of_the_very_gradients_which_are_near_to_those_of_32(measured, name, dtype):
    found = measured(name, f"step {dtype}")
    gradients = gradients_of(found["before"], found["after"])
    assert found["grad_norm"] == pytest.approx(norm(gradients), rel=1e-4)
    wanted = gradients_of(toy().plain_state(dict(toy().named_parameters())), expected("sgd", None, 1)[2])
    off = {key: gradients[f"lm.{key}"] / norm(gradients) - wanted[key] / CLIP for key in wanted}
    assert norm(off) < {"bf16": 0.015, "fp16": 0.002}[dtype]


def assert_equal_vectors(masters: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> None:
    """What a checkpoint holds, as vectors, and what is exported, bit for bit."""
    assert set(masters) == set(weights)
    for key, tensor in weights.items():
        assert torch.equal(masters[key], tensor.flatten()), key


@every_engine
def test_a_checkpoint_holds_every_number_of_a_weight_at_its_place(measured, name):
    """Also of weights that ranks cannot share evenly, as the three rows of a router."""
    found = measured(name, "two objectives, sgd")
    assert_equal_vectors(found["masters"], found["state"])


@halves
@every_engine
def test_exported_weights_are_the_masters_bit_for_bit_and_not_their_sixteen_bits(measured, name, dtype):
    found, half = measured(name, f"step {dtype}"), {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert_equal_vectors(found["masters"], found["after"])
    matrices = torch.cat([tensor.flatten() for tensor in found["after"].values() if tensor.dim() > 1])
    assert (matrices.to(half).float() != matrices).double().mean() > 0.9


@pytest.mark.skipif(RANKS == 1, reason="one rank shares nothing")
@pytest.mark.parametrize("what", ["adamw", "adamw, parts frozen"])
@pytest.mark.parametrize("name", some(SHARDINGS))
def test_two_ranks_share_optimizer_states_from_stage_1_and_parameters_from_stage_2(measured, elsewhere, name, what):
    parameters = [p.numel() for p in toy(CASES[what][2]).parameters()]
    trained = [p.numel() for p in toy(CASES[what][2]).parameters() if p.requires_grad]
    ranks = [rank(name, what)["held"] for rank in (measured, elsewhere)]
    stage, padding = SHARDINGS[name].stage, len(parameters)  # at most one number of each parameter
    copies = 2 if stage == 0 else 1
    found = sum(held["states"] for held in ranks)
    assert 0 <= found - copies * 2 * sum(trained) <= 2 * padding  # AdamW has two numbers for each
    assert stage == 0 or max(held["states"] for held in ranks) < 0.75 * found
    copies = 2 if stage < 2 else 1
    assert 0 <= sum(held["parameters"] for held in ranks) - copies * sum(parameters) <= padding


# Tests: updates that are skipped ------------------------------------------------------------------------------------


@every_dtype
@every_engine
def test_an_infinite_loss_on_one_rank_skips_the_update_on_all(measured, elsewhere, name, dtype):
    for found in (measured(name, f"skips {dtype}"), elsewhere(name, f"skips {dtype}")):
        assert found["applied"] == [True, False, False, False, True, True]


@every_dtype
@every_engine
def test_a_skipped_update_leaves_every_weight_bit_equal(measured, elsewhere, name, dtype):
    found = measured(name, f"skips {dtype}")
    assert all(torch.equal(found["after"][key], tensor) for key, tensor in found["before"].items())
    assert found["mine kept"]
    assert elsewhere(name, f"skips {dtype}")["mine kept"]


@every_dtype
@every_engine
def test_training_goes_on_after_a_skipped_update_as_if_it_had_not_been(measured, name, dtype):
    losses, norms, _ = expected("adamw")
    found = measured(name, f"skips {dtype}")
    tolerance = TOLERANCE if dtype == "fp32" else 5e-3
    assert close([found["loss"][k] for k in (0, 4, 5)], losses[:3], tolerance)
    assert close([found["grad_norm"][k] for k in (0, 4, 5)], norms[:3], 2 * tolerance)


@every_dtype
@every_engine
def test_the_loss_of_a_skipped_update_is_told_as_it_is(measured, name, dtype):
    found = measured(name, f"skips {dtype}")
    assert not any(math.isfinite(loss) for loss in found["loss"][1:4])
    assert not any(math.isfinite(norm) for norm in found["grad_norm"][1:4])


@every_engine
def test_the_loss_scale_of_fp16_falls_after_overflows_and_is_one_otherwise(measured, name):
    scales = measured(name, "skips fp16")["loss_scale"]
    assert scales[0] > scales[4] > 1.0
    assert scales[0] / scales[4] in (4.0, 8.0)  # three overflows; DeepSpeed forgives the first
    assert set(measured(name, "skips bf16")["loss_scale"]) == {1.0}
    assert set(measured(name, "skips fp32")["loss_scale"]) == {1.0}


# Tests: resuming ----------------------------------------------------------------------------------------------------


@every_dtype
@every_engine
def test_a_resumed_run_has_the_curves_of_one_that_never_stopped(measured, resumed, folder, name, dtype):
    measured(name, f"run {dtype}"), resumed(name, dtype)
    straight, again = points(folder / f"{name}-{dtype}"), points(folder / f"{name}-{dtype}-resumed")
    assert list(again) == list(range(1, RESUME_STEPS + 1))
    assert straight == again


@every_dtype
@every_engine
def test_a_resumed_run_ends_with_the_very_same_weights_and_state(measured, resumed, name, dtype):
    straight, again = measured(name, f"run {dtype}"), resumed(name, dtype)
    assert straight["state"] == again["state"]
    assert all(torch.equal(again["weights"][key], tensor) for key, tensor in straight["weights"].items())


@every_engine
def test_saving_changes_nothing_in_training(measured, folder, name):
    measured(name, "run fp32"), measured(name, "unsaved")
    assert points(folder / f"{name}-fp32") == points(folder / f"{name}-unsaved")


@every_engine
def test_the_overflows_before_the_checkpoint_are_in_it(measured, resumed, name):
    assert measured(name, "run fp16")["state"]["skipped_steps"] == 2
    assert resumed(name, "fp16")["state"]["skipped_steps"] == 2


@every_engine
def test_the_loss_scale_goes_on_where_the_checkpoint_left_it(measured, resumed, folder, name):
    measured(name, "run fp16"), resumed(name, "fp16")
    scales = [points(folder / f"{name}-fp16{which}")[RESUME_AT + 1]["train/loss_scale"] for which in ("", "-resumed")]
    assert scales[0] == scales[1] < 2**16


@every_engine
def test_dropout_would_differ_if_the_random_state_were_not_restored(measured, resumed, folder, name):
    measured(name, "run fp32")
    straight = points(folder / f"{name}-fp32")
    losses = [straight[step]["train/loss"] for step in range(RESUME_AT + 1, RESUME_STEPS + 1)]
    forgetful = resumed(name, "forgetful")
    assert all(abs(a - b) > 1e-4 for a, b in zip(losses, forgetful, strict=True))


@every_engine
def test_going_back_to_a_checkpoint_forgets_everything_since(measured, name):
    found = measured(name, "reloaded")
    at_checkpoint, later, after_loading = found["logits"]
    assert torch.equal(at_checkpoint, after_loading)
    assert not torch.equal(at_checkpoint, later)
    assert found["loss"][4:] == found["loss"][2:4]
    assert found["grad_norm"][4:] == found["grad_norm"][2:4]


# Tests: weights that come out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["adamw, parts frozen", *HALF_CASES])
@every_engine
def test_frozen_parameters_come_out_bit_equal_and_the_others_do_not(measured, name, what):
    freeze = freeze_of(what)
    first, found = dict(toy(freeze).named_parameters()), measured(name, what)["state"]
    assert {key for key in first if torch.equal(found[key], first[key])} == names_of(freeze, trainable=False)


@every_engine
def test_frozen_parameters_are_bit_equal_after_a_resumed_run(measured, resumed, name):
    first = dict(toy(RESUME_FREEZE).named_parameters())
    for found in (measured(name, "run fp32"), *(resumed(name, dtype) for dtype in DTYPES)):
        for key in names_of(RESUME_FREEZE, trainable=False):
            assert torch.equal(found["weights"][key], first[key])


@pytest.mark.parametrize("what", [*CASES, *HALF_CASES, "bf16", "fp16"])
@every_engine
def test_rank_0_gets_every_parameter_once_in_32_bit_and_the_others_none(measured, elsewhere, name, what):
    freeze = freeze_of(what)
    state = measured(name, what)["state"]
    assert set(state) == {key for key, _ in toy(freeze).named_parameters()}
    assert "lm.lm_head.weight" not in state
    assert {(t.dtype, t.device.type) for t in state.values()} == {(torch.float32, "cpu")}
    assert RANKS == 1 or elsewhere(name, what)["state"] is None


@pytest.mark.parametrize("what", ["export", "export, pause alone"])
@every_engine
def test_the_exported_model_gives_the_logits_of_the_live_one(measured, elsewhere, folder, name, what):
    live = measured(name, what)["logits"]
    lm = AutoModelForCausalLM.from_pretrained(folder / f"{name}-{'pause' if 'pause' in what else 'model'}").eval()
    with torch.no_grad():
        logits = lm(ids_to_compare()).logits
    spoken = torch.arange(VOCAB) != PAUSE  # the tokenizer has a token for each of the others
    torch.testing.assert_close(logits[..., spoken], live[..., spoken], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(elsewhere(name, what)["logits"], live, atol=TOLERANCE, rtol=0)


# Tests: evaluation --------------------------------------------------------------------------------------------------


@pytest.fixture(params=[1, 2])
def evaluated(request, measured, alone, name):
    """What an engine wrote and chose, on one rank and on two."""
    return measured(name, "evaluation") if request.param == 2 else alone(name, "evaluation")


@every_engine
def test_texts_are_those_of_greedy_writing_text_by_text(evaluated, name):
    wanted = [" ".join(map(str, until(greedy(trained_lm(), prompt, 8), END))) for prompt in prompts()]
    assert len({len(text.split()) for text in wanted}) > 2  # some end early
    assert evaluated["texts"] == wanted
    assert evaluated["in pairs"] == wanted


@every_engine
def test_choices_are_those_of_scoring_text_by_text(evaluated, name):
    data, chosen = choices(), []
    for k in range(6):
        scores = []
        for row in data.store.rows[3 * k : 3 * k + 3]:
            tokens = data.store.tokens.astype(np.int64)
            prompt = Pauses(PAUSE, NUM_PAUSES).prompt(tokens[row[0] : row[2]])
            target = tokens[row[2] : row[3]]
            logits = text_logits(trained_lm(), np.concatenate([prompt, target]))[len(prompt) - 1 : -1]
            scores.append(logits.log_softmax(-1)[range(len(target)), target].sum().item())
        chosen.append("abc"[int(np.argmax(scores))])
    assert len(set(chosen)) > 1
    assert evaluated["chosen"] == [*chosen, ""]
    right = sum(letter == "abcabc"[k] for k, letter in enumerate(chosen))
    assert evaluated["scores"]["accuracy"] == pytest.approx(right / 7)


@every_engine
def test_evaluation_changes_nothing_in_training(evaluated, name):
    losses, norms, _ = expected("sgd")
    assert close(evaluated["loss"], losses)
    assert close(evaluated["grad_norm"], norms)


@every_engine
def test_parts_of_the_module_may_be_called_before_training_and_on_some_ranks_more_than_on_others(measured, name):
    found = measured(name, "evaluated first")
    losses, norms, _ = expected("sgd")
    assert close(found["loss"], losses)
    assert close(found["grad_norm"], norms)
    with torch.no_grad():
        wanted = toy().lm(input_ids=ids_to_compare()).logits
    torch.testing.assert_close(found["logits"][0], wanted, atol=TOLERANCE, rtol=0)


@every_engine
def test_training_after_evaluation_is_bit_equal_to_training_without(measured, name):
    assert measured(name, "evaluation")["loss"] == measured(name, "sgd")["loss"]
