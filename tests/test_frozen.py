"""Frozen layers at the bottom of a model: what a step keeps of them; --cache_frozen, their outputs computed once."""

import itertools
import json
import os
import shutil
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.autograd.graph import saved_tensors_hooks

from finetune import frozen, train
from finetune.frozen import FrozenLayers, check_cacheable, check_room, vectors, version
from kozero import distributed
from kozero.config import BatchSizes
from kozero.data import hidden
from kozero.data.batches import TrainingRows
from kozero.data.hidden import HiddenStore
from kozero.engines.base import Engine
from kozero.errors import UserError
from kozero.freeze import compile_plan, speedup
from kozero.pause import PauseArguments, Pauses
from kozero.plan import ModelShape
from models.language_model import checkpoint_activations, read_config
from tests.helpers import ROOT
from tests.ranks import run_ranks
from tests.toys import CAPACITY, LAYERS, PAUSE, arguments, engine_for, toy, training_rows

BOTTOM = "wte,wpe,h.0,pause"
NAMES = ["plain", "zero2"]
DTYPES = {"fp32": {}, "bf16": {"bf16": True}, "fp16": {"fp16": True}}
RATE = 0.5  # of SGD: Adam would make something of the noise that is the gradient of a key's bias
every_engine = pytest.mark.parametrize("name", NAMES)


def measure(folder: Path) -> tuple[dict, list[int]]:
    """What a rank finds, by engine and subject, and the shards that it has made."""
    hidden.SHARD = 300
    made = []
    write, HiddenStore.write = HiddenStore.write, lambda self, *a, **k: (made.append(k["shard"]), write(self, *a, **k))
    found = {}
    for name in NAMES:
        for checkpointing in (False, True):
            found[name, "needs", checkpointing] = needs_gradients(name, checkpointing)
        found[name, "bytes"] = bytes_of_a_step(name, folder / f"{name}-bytes")
        for dtype in DTYPES:
            found[name, dtype] = [trained(name, folder / f"{name}-{dtype}" if kept else None, dtype) for kept in (0, 1)]
    return found, made


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[tuple[dict, list[int]]]:
    """What two ranks find, in processes of their own."""
    return run_ranks(measure, tmp_path_factory.mktemp("frozen"))


def cached(engine: Engine, rows: TrainingRows, folder: Path, dtype: str = "fp32") -> HiddenStore:
    """The outputs of the toy's lowest layer."""
    engine.module.entry = 1
    store = HiddenStore(folder, rows.fit.length, engine.module.lm.config.n_embd, frozen.DTYPES[dtype])
    distributed.together(
        lambda: frozen.make(store, store.missing(distributed.rank(), distributed.world_size()), engine, rows, micro=3)
    )
    return store


def trained(name: str, folder: Path | None, dtype: str = "fp32", checkpointing: bool = False) -> tuple:
    """Losses and weights after some steps, with the outputs of the frozen layer in a folder or without."""
    module = toy(BOTTOM)
    if checkpointing:
        checkpoint_activations(module.lm)
    engine, sizes = engine_for(name, module, arguments(name, optim="sgd", **DTYPES[dtype]))
    rows = training_rows()
    if folder:
        rows.hidden = cached(engine, rows, folder, dtype)
    consumed = range(0, 4 * sizes.global_batch, sizes.global_batch)
    losses = [engine.train_step(rows.step(k, sizes, distributed.rank()), RATE).loss for k in consumed]
    weights = engine.full_state_dict()
    engine.close()
    return losses, weights


def same(found: tuple, wanted: tuple, tolerance: float) -> None:
    """Losses and weights agree, and training has changed what it should."""
    assert found[0] == pytest.approx(wanted[0], rel=tolerance)
    before = dict(toy(BOTTOM).named_parameters())
    assert found[1].keys() == wanted[1].keys() == before.keys()
    for name, parameter in before.items():
        torch.testing.assert_close(found[1][name], wanted[1][name], rtol=tolerance, atol=tolerance)
        assert torch.equal(found[1][name], parameter) != parameter.requires_grad


# What a step keeps of frozen layers --------------------------------------------------------------------------------


def needs_gradients(name: str, checkpointing: bool) -> tuple[list[bool], set[str]]:
    """Whether the outputs of each layer need gradients in a step, and the parameters that have some behind it."""
    module, needed = toy(BOTTOM), []
    if checkpointing:
        checkpoint_activations(module.lm)
    for block in module.lm.transformer.h:
        block.register_forward_hook(lambda _block, _given, out: needed.append(out.requires_grad))
    engine, sizes = engine_for(name, module, arguments(name))
    batches = training_rows().step(0, sizes, distributed.rank())
    engine.train_step(batches, 0.1)
    graded = {n for n, p in module.named_parameters() if not p.requires_grad and p.grad is not None}
    engine.close()
    return needed[:LAYERS], graded


def bytes_of_a_step(name: str, folder: Path) -> list[int]:
    """Bytes that the forward passes of a step keep for backward, of one that computes the frozen layer and of one that
    reads its outputs."""
    engine, sizes = engine_for(name, toy(BOTTOM), arguments(name))
    rows = training_rows()
    computed = kept_bytes(engine, rows.step(0, sizes, distributed.rank()))
    rows.hidden = cached(engine, rows, folder)
    read = kept_bytes(engine, rows.step(0, sizes, distributed.rank()))
    engine.close()
    return [computed, read]


def kept_bytes(engine: Engine, batches: list) -> int:
    """Weights apart, and each tensor once."""
    weights = {p.untyped_storage().data_ptr() for p in engine.module.parameters()}
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept.append(tensor)  # alive, so that no other tensor takes its place
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        engine.train_step(batches, 0.0)
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}.values())


@every_engine
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_frozen_bottom_has_no_gradients_and_its_outputs_need_none(ranks, name, checkpointing):
    for found, _ in ranks:
        assert found[name, "needs", checkpointing] == ([False, True], set())


@every_engine
def test_a_frozen_bottom_leaves_nothing_for_the_backward_pass(ranks, name):
    """What autograd keeps of a step is what it keeps of one that begins above the frozen layers."""
    for found, _ in ranks:
        computed, read = found[name, "bytes"]
        assert 0 < computed == read


def test_frozen_layers_have_dropout_in_training_and_their_kept_outputs_have_none(one_rank, tmp_path):
    module, seen = toy(BOTTOM, dropout=0.5), []
    module.lm.transformer.h[0].register_forward_hook(lambda _block, _given, out: seen.append(out))
    engine, sizes = engine_for("plain", module, arguments("plain"))
    rows = training_rows()
    batches = rows.step(0, sizes, 0)
    for _ in range(2):
        engine.train_step(batches, 0.0)
    assert not torch.equal(seen[0], seen[len(batches)])
    store = cached(engine, rows, tmp_path)
    for number, wanted in vectors(engine, rows, rows.fit.used, 3, torch.float32):
        assert torch.equal(store.of(number), wanted)
    assert module.training


def test_the_dropout_of_embeddings_does_not_fall_on_kept_outputs_again(one_rank):
    module = toy(BOTTOM)
    module.lm.transformer.drop.p, module.entry = 0.5, 1
    (batch,) = training_rows().step(0, BatchSizes(4, 1, 1), 0)
    kept = module.eval().lower(batch.inputs["input_ids"], batch.inputs["position_ids"]).detach()
    losses = [module.train(trains)(**batch.inputs, hidden=kept).item() for trains in (False, True, True)]
    assert len(set(losses)) == 1


# The same training -------------------------------------------------------------------------------------------------


@every_engine
def test_kept_outputs_train_the_same_weights(ranks, name):
    wanted, found = ranks[0][0][name, "fp32"]
    same(found, wanted, 1e-5)


def test_kept_outputs_and_recomputed_activations_train_the_same_weights(one_rank, tmp_path):
    same(trained("plain", tmp_path, checkpointing=True), trained("plain", None), 1e-5)


@every_engine
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_outputs_kept_in_16_bit_train_nearly_the_same(ranks, name, dtype):
    """DeepSpeed computes in 16 bit throughout, so nothing is lost; autocast adds up the layers' outputs in 32 bit."""
    wanted, found = ranks[0][0][name, dtype]
    assert found[0] == pytest.approx(wanted[0], rel=0.01 if name == "plain" else 0.002)


def test_ranks_make_different_shards(ranks):
    (_, first), (_, second) = ranks
    assert first and second and not set(first) & set(second)


def test_the_lower_layers_give_what_transformers_gives(one_rank, tmp_path, monkeypatch):
    """Text by text, nothing packed."""
    monkeypatch.setattr(hidden, "SHARD", 300)
    engine, _ = engine_for("plain", toy(BOTTOM), arguments("plain"))
    rows = training_rows()
    store = cached(engine, rows, tmp_path)
    lm = toy(BOTTOM).lm.eval()
    for text in [text for row in range(len(rows)) for text in rows.texts(row)]:
        with torch.no_grad():
            wanted = lm(torch.from_numpy(text.ids)[None], output_hidden_states=True).hidden_states[1][0]
        torch.testing.assert_close(store.of(text.number), wanted, rtol=1e-5, atol=1e-5)


# The store ---------------------------------------------------------------------------------------------------------


def numbers(lengths: np.ndarray, shift: float = 0.0):
    """Vectors that tell their text and place."""

    def made(texts: np.ndarray):
        for n in texts.tolist()[::-1]:  # in whatever order
            yield n, torch.full((lengths[n], 2), float(n)) + torch.arange(lengths[n])[:, None] / 100 + shift

    return made


LENGTHS = np.array([3, 0, 8, 10, 0, 1, 12, 2, 0])


def filled(folder: Path, dtype: torch.dtype = torch.float32) -> HiddenStore:
    store = HiddenStore(folder, LENGTHS, 2, dtype)
    for shard in store.missing():
        store.make(shard, numbers(LENGTHS))
    return store


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 10, 12, 100])
def test_each_text_gets_its_vectors_back(monkeypatch, tmp_path, dtype, size):
    monkeypatch.setattr(hidden, "SHARD", size)
    store = filled(tmp_path, dtype)
    assert store.missing() == [] and store.num_bytes(store.shards()) == LENGTHS.sum() * 2 * dtype.itemsize
    assert sum(path.stat().st_size for path in tmp_path.glob("*/vectors.bin")) == store.num_bytes(store.shards())
    again = HiddenStore(tmp_path, LENGTHS, 2, dtype)
    for number, wanted in numbers(LENGTHS)(np.flatnonzero(LENGTHS)):
        assert torch.equal(again.of(number), wanted.to(dtype))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "harm",
    [lambda p: cut(p), lambda p: p.unlink(), lambda p: cut(p.parent / "meta.json"), lambda p: shutil.rmtree(p.parent)],
)
def test_a_damaged_shard_alone_is_made_again(monkeypatch, tmp_path, harm):
    monkeypatch.setattr(hidden, "SHARD", 10)
    store = filled(tmp_path)
    shards = store.shards()
    assert len(shards) == 4
    harm(tmp_path / hidden.name(shards[1]) / "vectors.bin")
    again = HiddenStore(tmp_path, LENGTHS, 2, torch.float32)
    assert again.missing() == [shards[1]]
    again.make(shards[1], numbers(LENGTHS, shift=0.5))
    again.make(shards[0], numbers(LENGTHS, shift=0.5))  # whole: left as it is
    texts = set(again.texts(shards[1]).tolist())
    for number, wanted in numbers(LENGTHS)(np.flatnonzero(LENGTHS)):
        assert torch.equal(again.of(number), wanted + 0.5 * (number in texts))


def test_what_was_being_written_when_a_run_ended_does_not_count(tmp_path):
    store = HiddenStore(tmp_path, LENGTHS, 2, torch.float32)

    def broken(texts: np.ndarray):
        yield from itertools.islice(numbers(LENGTHS)(texts), 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.make(0, broken)
    assert store.missing() == [0] and not list(tmp_path.glob("*.incomplete"))


# What a store is named by ------------------------------------------------------------------------------------------


def named(freeze: str = BOTTOM, engine: str = "plain", dtype: str = "fp32", change=None) -> tuple:
    module = toy(freeze, dropout=0.1)
    if change:
        with torch.no_grad():
            change(module.lm)
    return FrozenLayers.of(module, compile_plan(freeze, LAYERS, has_pause=True), engine, dtype).version


def add_to(parameter: torch.Tensor) -> None:
    parameter.view(-1)[-1] += 1e-3  # behind the first thousand numbers


def test_another_model_or_precision_has_other_outputs(one_rank):
    first = named()
    assert first == named() == named(change=lambda lm: add_to(lm.transformer.h[1].mlp.c_fc.weight))  # it trains
    others = [
        named(change=lambda lm: add_to(lm.transformer.h[0].mlp.c_fc.weight)),
        named(change=lambda lm: add_to(lm.transformer.wte.weight)),
        named(change=lambda lm: add_to(lm.transformer.wpe.weight)),
        named(change=lambda lm: setattr(lm.config, "layer_norm_epsilon", 1e-6)),
        named("all_but:ln_f"),
        named(engine="deepspeed"),
        named(dtype="bf16"),
    ]
    assert len({json.dumps(v) for v in [first, *others]}) == 1 + len(others)


def test_other_texts_cuts_or_pauses_have_other_outputs():
    def of(pauses: Pauses = Pauses(PAUSE, 2), capacity: int = CAPACITY, name: str = "a", ranked=None) -> list:  # noqa: B008
        store = training_rows().store
        store.folder = Path(name)
        store.rows = store.rows.copy()
        store.rows[:, 1] += 3  # a context that can be cut
        store.rows[:, 2:4] = np.maximum(store.rows[:, 2:4], store.rows[:, 1:2] + np.arange(2))
        return version(TrainingRows(store, pauses, capacity, "packed", seed=5, ranked=ranked))

    others = [
        of(Pauses(PAUSE, 1)), of(Pauses(PAUSE, 2, "prepend")), of(Pauses(9, 2)), of(capacity=8), of(name="b"),
        of(ranked=np.zeros((160, 2), np.int32)), of(ranked=np.ones((160, 2), np.int32)),
    ]  # fmt: skip
    assert of() == of(replace(Pauses(PAUSE, 2), seed=1))
    assert len({json.dumps(v) for v in [of(), *others]}) == 1 + len(others)


# A whole run -------------------------------------------------------------------------------------------------------


def call(folder: Path, out: str, *flags) -> Path:
    """finetune/train.py in this process, on a toy."""
    config = folder / "toy.json"
    values = json.loads((ROOT / "models/tiny_config.json").read_text())
    config.write_text(json.dumps(values | {"n_embd": 32, "n_inner": 64}))
    shared = ("--config_file", config, "--output_dir", folder / out, "--cache_dir", folder / "cache")
    sizes = ("--max_steps", 4, "--train_batch_size", 2, "--max_eval_samples", 4, "--logging_steps", 1)
    sys.argv = ["train", *map(str, (*shared, *sizes, "--freeze", "wte,wpe,h.0", *flags))]
    train.main()
    return folder / out


def found_in(out: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and exported weights of a run."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [r["train/loss"] for r in rows if "train/loss" in r], load_file(out / "model/model.safetensors")


def whole_runs(folder: Path, *flags) -> dict:
    """Runs without and with kept outputs, and one of these that is broken off and resumed; what was said."""
    os.chdir(ROOT)
    distributed.shutdown = lambda: None
    said: list[str] = []
    distributed.say = said.append
    flags = (*flags, "--dropout", 0, "--save_steps", 2, "--learning_rate", RATE, "--optim", "sgd")
    found = {"plain": found_in(call(folder, "plain", *flags))}
    kept = call(folder, "kept", *flags, "--cache_frozen")
    found["kept"] = found_in(kept)
    broken = folder / "broken"
    shutil.copytree(kept, broken, ignore=shutil.ignore_patterns("step-000004", "model"))
    found["resumed"] = found_in(call(folder, "broken", *flags, "--cache_frozen", "--resume", "auto"))
    shutil.rmtree(broken / "model")
    with pytest.raises(UserError, match="saved with --cache_frozen True, this run has None"):
        call(folder, "broken", *flags, "--max_steps", 5, "--resume", "auto")
    return found | {"said": "\n".join(said)}


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--deepspeed_config", "ds_configs/zero2.json", "--gradient_checkpointing")])
def test_a_run_that_keeps_outputs_is_the_run_without_and_goes_on_bit_for_bit(tmp_path, flags):
    (found,) = run_ranks(whole_runs, tmp_path, *flags, world_size=1)
    (losses, weights), (losses_kept, weights_kept) = found["plain"], found["kept"]
    assert losses_kept == pytest.approx(losses, rel=1e-5)
    for name, weight in weights.items():
        torch.testing.assert_close(weights_kept[name], weight, rtol=1e-5, atol=1e-5)
    assert found["resumed"][0] == losses_kept
    assert all(torch.equal(weight, weights_kept[name]) for name, weight in found["resumed"][1].items())
    said = found["said"]
    assert "outputs of the lowest 1 layers for" in said and "GiB to compute" in said and "a step begins at h.1" in said
    assert said.count("all there") == 1


PAUSED = ("--num_pauses", 2, "--freeze", "wte,wpe,h.0,pause")
MISTAKES = {
    "nothing frozen": (("--freeze", ""), "--cache_frozen: nothing is frozen; say what with --freeze"),
    "positions train": (("--freeze", "wte,h.0"), "no layer below all that trains (wpe); freeze wte,wpe,h.0 at least"),
    "no layer": (("--freeze", "wte,wpe"), "no layer below all that trains (h.0)"),
    "the pause trains": (("--num_pauses", 2), "(pause); freeze wte,wpe,h.0,pause at least"),
    "other places": ((*PAUSED, "--pause_placement", "random"), "--cache_frozen and --pause_placement random"),
    "other numbers": ((*PAUSED, "--pause_schedule", "sampled"), "--cache_frozen and --pause_schedule sampled"),
    "an encoder": (("--task", "mrc"), "--freeze wte,wpe,h.0: names parts of a GPT-2"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_cannot_be_kept_is_one_line(one_rank, monkeypatch, tmp_path, case):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [])
    flags, message = MISTAKES[case]
    with pytest.raises(UserError) as error:
        call(tmp_path, "run", *flags, "--cache_frozen")
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_stage_3_has_no_whole_layers():
    plan = compile_plan("wte,wpe,h.0", LAYERS, has_pause=False)
    check_cacheable("wte,wpe,h.0", plan, LAYERS, PauseArguments(), stage=2)
    with pytest.raises(UserError, match="--cache_frozen: under ZeRO-3 no rank has a whole layer"):
        check_cacheable("wte,wpe,h.0", plan, LAYERS, PauseArguments(), stage=3)


def test_a_disk_that_is_too_small_is_found_before_anything_is_computed(monkeypatch, tmp_path):
    store = HiddenStore(tmp_path / "store", LENGTHS, 2, torch.float32)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(frozen.shutil, "disk_usage", lambda path: usage(10**6, 10**6, LENGTHS.sum() * 8 - 1))
    with pytest.raises(UserError, match=r"--cache_frozen: needs .* GiB in --cache_dir .* GiB are free"):
        check_room(store, store.missing())
    monkeypatch.setattr(frozen.shutil, "disk_usage", lambda path: usage(10**6, 10**6, LENGTHS.sum() * 8))
    check_room(store, [0])
    assert store.missing() == [0]


def test_numbers_that_16_bit_cannot_hold_are_one_line(one_rank, tmp_path):
    module = toy(BOTTOM)
    with torch.no_grad():
        module.lm.transformer.h[0].mlp.c_proj.bias.fill_(1e5)
    engine, _ = engine_for("plain", module, arguments("plain"))
    with pytest.raises(UserError, match=r"^--cache_frozen: .* not finite as torch\.float16; choose another precision$"):
        cached(engine, training_rows(), tmp_path, "fp16")
    assert not list(tmp_path.rglob("vectors.bin"))


def test_arithmetic_of_a_step_that_begins_above_half_of_the_layers():
    """PERFORMANCE.md section 8, ko-gpt-trinity at 1,024 tokens: 7.526 GFLOP a token in all, 5.02 with bottom and head
    frozen, of which 12 layers forward, 2 x 12 x 44.26 M + 4 x 12 x 1,024 x 1,920, are left out."""
    shape = ModelShape.of(read_config(ROOT / "models/ko_gpt_trinity_config.json"))
    plan = compile_plan("wte,wpe,h.0-11", shape.num_layers, has_pause=False)
    left = 5.02 - (2 * 12 * 44.26e-3 + 4 * 12 * 1024 * 1920 * 1e-9)
    assert speedup(plan, shape, 1024, cached=True) == pytest.approx(7.526 / left, rel=0.01)
