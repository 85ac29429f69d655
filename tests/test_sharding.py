"""Which engine a run gets, and which parts of a module are gathered by themselves."""

from typing import Any

import pytest
import torch
from fairscale.optim.grad_scaler import ShardedGradScaler
from torch import nn

from kozero.config import BatchSizes, TrainingArguments
from kozero.data.batch import Batch
from kozero.engines import EngineSettings, Sharding, build_engine, prepare_engine
from kozero.engines.base import StepStats
from kozero.engines.pieces import Piece, Saved
from kozero.engines.plain import PlainEngine
from kozero.engines.torch_engine import LossScale
from kozero.engines.units import layers
from kozero.errors import UserError
from kozero.files import write_file
from tests.helpers import ROOT, toy_gpt2

SIZES = BatchSizes(8, 1, 1)


def names(module: nn.Module) -> list[str]:
    """The units by their names in the module."""
    paths = {id(part): name for name, part in module.named_modules()}
    return [f"{paths[id(members)]}.{name}" for members, name in layers(module)]


class Parts(nn.Module):
    """A module of given parts."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def linears(num: int) -> nn.ModuleList:
    """Layers that share nothing."""
    return nn.ModuleList([nn.Linear(2, 2) for _ in range(num)])


# Tests ---------------------------------------------------------------------------------------------------------------


def test_each_block_of_gpt2_is_a_unit_and_its_tied_head_is_not():
    assert names(toy_gpt2(num_layers=3)) == ["transformer.h.0", "transformer.h.1", "transformer.h.2"]


def test_members_of_several_lists_are_units_and_other_parts_are_not():
    module = Parts(head=nn.Linear(2, 2), encoder=linears(2), decoder=linears(1), acts=nn.ModuleList([nn.ReLU()]))
    assert names(module) == ["encoder.0", "encoder.1", "decoder.0"]


def test_a_layer_that_runs_several_times_stays_in_the_root():
    shared = nn.Linear(2, 2)
    assert names(Parts(layers=nn.ModuleList([shared, nn.Linear(2, 2), shared]))) == ["layers.1"]


def test_layers_that_share_a_weight_with_each_other_or_with_the_head_stay_in_the_root():
    module = Parts(layers=linears(4), head=nn.Linear(2, 2))
    module.layers[1].weight = module.layers[0].weight
    module.layers[2].bias = module.head.bias
    assert names(module) == ["layers.3"]


def test_a_layer_may_share_a_weight_with_itself():
    block = Parts(first=nn.Linear(2, 2), second=nn.Linear(2, 2))
    block.second.weight = block.first.weight
    assert names(Parts(layers=nn.ModuleList([block]))) == ["layers.0"]


def test_lists_are_searched_inside_members_that_share_and_not_inside_units():
    whole = Parts(experts=linears(2))
    sharing = Parts(experts=linears(2), gate=nn.Linear(2, 2))
    module = Parts(layers=nn.ModuleList([whole, sharing]), gate=sharing.gate)
    assert names(module) == ["layers.0", "layers.1.experts.0", "layers.1.experts.1"]


def test_without_a_choice_the_plain_engine_runs():
    assert prepare_engine(TrainingArguments(), SIZES) == EngineSettings("plain", 0)


def test_a_deepspeed_json_chooses_deepspeed_from_stage_1(monkeypatch):
    stages = [("zero0", "plain", 0), ("zero1", "deepspeed", 1), ("zero3_offload", "deepspeed", 3)]
    monkeypatch.setattr("kozero.engines.deepspeed.check_config", lambda config, path: None)
    for name, engine, stage in stages:
        arguments = TrainingArguments(deepspeed_config=str(ROOT / "ds_configs" / f"{name}.json"))
        settings = prepare_engine(arguments, SIZES)
        assert (settings.engine, settings.stage, settings.auto_wrap) == (engine, stage, False)
        assert settings.resolved["train_batch_size"] == 8


def test_a_sharding_is_taken_as_it_is():
    for sharding in (Sharding(), Sharding("oss", 1), Sharding("fsdp", 3, auto_wrap=True)):
        settings = prepare_engine(TrainingArguments(), SIZES, sharding)
        wanted = (sharding.engine, sharding.stage, sharding.auto_wrap, {})
        assert (settings.engine, settings.stage, settings.auto_wrap, settings.resolved) == wanted


def test_a_sharding_beside_a_deepspeed_json_is_refused():
    arguments = TrainingArguments(deepspeed_config=str(ROOT / "ds_configs" / "zero2.json"))
    with pytest.raises(UserError, match=r"--deepspeed_config .*zero2.json: this entry shards .* pretrain/train.py"):
        prepare_engine(arguments, SIZES, Sharding("oss", 1))


def test_fairscale_without_a_gpu_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"needs a GPU and none is visible; --sharding torch"):
        prepare_engine(TrainingArguments(), SIZES, Sharding("fairscale_fsdp", 2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert prepare_engine(TrainingArguments(), SIZES, Sharding("fairscale_fsdp", 2)).engine == "fairscale_fsdp"


def test_an_engine_that_is_not_there_is_told():
    with pytest.raises(ValueError, match="no engine 'fsdb'"):
        build_engine(nn.Linear(1, 1), TrainingArguments(), EngineSettings("fsdb"))


def test_a_checkpoint_with_weights_that_the_model_lacks_is_refused(one_rank, tmp_path):
    """As one of separate layers by a model whose layers are one: the weights of the first alone would be read."""
    two, one = (PlainEngine(Parts(layers=linears(num)), TrainingArguments()) for num in (2, 1))
    for name, value in two.snapshot().items():
        write_file(tmp_path / name, value)
    assert two.load(tmp_path)
    with pytest.raises(UserError, match=r"a checkpoint of another model: it holds layers.1.bias, which this one lacks"):
        one.load(tmp_path)


def test_pieces_of_one_owner_have_its_highest_count_of_steps_and_no_state_that_was_not_saved(tmp_path):
    """As where one parameter had its first gradient later than another."""
    saved = {"a/0/weight": torch.ones(2), "a/0/step": torch.tensor(3.0)}
    saved |= {"b/0/weight": torch.full((3,), 2.0), "b/0/step": torch.tensor(5.0)}
    write_file(tmp_path / "rank0.safetensors", saved)
    owner = torch.zeros(5)
    states = {owner: {"exp_avg": torch.ones(5)}}
    pieces = [Piece("a", 2, owner, 0, 2), Piece("b", 3, owner, 0, 3, start=2)]
    Saved([tmp_path / "rank0.safetensors"]).restore(pieces, states)
    assert owner.tolist() == [1, 1, 2, 2, 2] and states == {owner: {"step": torch.tensor(5.0)}}


def test_the_loss_scale_is_that_of_torchs_scaler():
    scaler = torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD([weight := nn.Parameter(torch.ones(1))])
    ours = LossScale(enabled=True)
    for k in range(2005):
        finite = k not in (1, 2, 3)
        scaler.scale(weight.sum())
        weight.grad = torch.full((1,), 1.0 if finite else torch.inf)
        scaler.step(optimizer)
        scaler.update()
        ours.update(finite)
        assert (ours.value, ours.applied) == (scaler.get_scale(), scaler._get_growth_tracker())
    assert ours.value == 2.0**14  # 2^16, halved three times, doubled once


def test_fairscales_own_scaler_scales_nothing_without_cuda(monkeypatch):
    """Why the engines of fairscale have the same loss scale as all others."""
    monkeypatch.setattr("fairscale.optim.grad_scaler.amp_definitely_not_available", lambda: True)
    with pytest.warns(UserWarning, match="CUDA is not available"):
        scaler = ShardedGradScaler()
    assert not scaler.is_enabled()
    assert scaler.scale(torch.ones(1)) == 1


@pytest.mark.parametrize(
    ("stage", "limit", "told"), [(1, 320_000, True), (1, 319_999, False), (0, 10**9, False), (2, None, False)]
)
def test_a_stage_that_only_costs_is_told(monkeypatch, one_rank, capsys, stage, limit, told):
    """100 x 100 numbers in 32 bit take 16 bytes each, 160,000 in all; twice as much is room enough."""
    monkeypatch.setattr("kozero.engines.rank_limit", lambda: limit)
    monkeypatch.setattr("kozero.engines.plain.PlainEngine", lambda *told: None)
    build_engine(nn.Linear(100, 100, bias=False), TrainingArguments(), EngineSettings("plain", stage))
    assert (f"note: ZeRO-{stage} saves memory and costs time" in capsys.readouterr().out) == told


class Repeated(nn.Module):
    """One layer over many inputs, and a number that is added to the loss."""

    def __init__(self, added: float = 0.0) -> None:
        super().__init__()
        self.layer, self.added = nn.Linear(16, 16, bias=False), added

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(self.layer(part).float().square().sum() for part in x) + self.added


def step_of(module: nn.Module, x: torch.Tensor, **told: Any) -> StepStats:
    """One unclipped update at rate 1."""
    said = TrainingArguments(weight_decay=0.0, max_grad_norm=0.0, **told)
    return PlainEngine(module, said).train_step([Batch({"x": x}, (1,), 1)], 1.0)


def test_gradients_of_a_weight_that_is_used_many_times_are_summed_in_32_bit(one_rank):
    """Autocast that casts it once would sum them in 16 bit."""
    torch.manual_seed(0)
    module, x = Repeated(), torch.randn(256, 4, 16).bfloat16().float()
    before = module.layer.weight.detach().clone()
    exact = before.bfloat16().double().requires_grad_()
    (x.double() @ exact.T).square().sum().backward()
    step_of(module, x, bf16=True, optim="sgd")
    off = (before - module.layer.weight.detach() - exact.grad).norm() / exact.grad.norm()
    assert off < 0.002


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_an_infinite_loss_whose_gradients_are_finite_is_no_update(one_rank, optim):
    module = Repeated(torch.inf)
    before = module.layer.weight.detach().clone()
    stats = step_of(module, torch.ones(2, 4, 16), optim=optim)
    assert not stats.applied and stats.loss == torch.inf and 0 < stats.grad_norm < torch.inf
    assert torch.equal(module.layer.weight, before)
