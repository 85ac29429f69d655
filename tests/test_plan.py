"""Parameters and memory by formula, against published sizes and the models that transformers builds."""

import pytest
import torch
from transformers import GPT2LMHeadModel

from kozero.plan import ModelShape, state_bytes
from models.language_model import read_config
from tests.helpers import gpt2_configs

CONFIGS = {path.stem: read_config(path) for path in gpt2_configs()}
KOGPT2, TRINITY = (ModelShape.of(CONFIGS[name]) for name in ("kogpt2_config", "ko_gpt_trinity_config"))


def test_kogpt2_has_its_published_size():
    assert (KOGPT2.parameters, KOGPT2.block_parameters) == (125_164_032, 7_087_872)


def test_trinity_has_its_published_size():
    assert (TRINITY.parameters, TRINITY.block_parameters) == (1_162_556_160, 44_261_760)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_formula_counts_what_transformers_builds(name):
    with torch.device("meta"):
        model = GPT2LMHeadModel(CONFIGS[name])
    assert ModelShape.of(CONFIGS[name]).parameters == sum(p.numel() for p in model.parameters())
    assert ModelShape.of(CONFIGS[name]).block_parameters == sum(p.numel() for p in model.transformer.h[0].parameters())


def test_the_inner_size_is_four_times_hidden_unless_told_otherwise():
    config = CONFIGS["tiny_config"].__class__(n_embd=8, n_head=2, n_inner=None)
    assert ModelShape.of(config).inner == 32


EMBEDDINGS = (51_200 + 1024) * 1920
TABLE = [  # PERFORMANCE.md section 8, GB a rank at stages 0 / 1 / 2 / 3, by number of ranks
    (KOGPT2.parameters, 0, {1: "2.00", 2: "2.00/1.25/1.13/1.00", 4: "2.00/0.88/0.69/0.50", 8: "2.00/0.69/0.47/0.25"}),
    (
        KOGPT2.parameters,
        6 * KOGPT2.block_parameters,
        {1: "1.41", 2: "1.41/0.91/0.83/0.70", 4: "1.41/0.66/0.54/0.35", 8: "1.41/0.54/0.39/0.18"},
    ),
    (
        TRINITY.parameters,
        0,
        {1: "18.60", 2: "18.60/11.63/10.46/9.30", 4: "18.60/8.14/6.39/4.65", 8: "18.60/6.39/4.36/2.33"},
    ),
    (
        TRINITY.parameters,
        12 * TRINITY.block_parameters,
        {1: "11.16", 2: "11.16/7.38/6.75/5.58", 4: "11.16/5.48/4.54/2.79", 8: "11.16/4.54/3.43/1.40"},
    ),
    (
        TRINITY.parameters,
        12 * TRINITY.block_parameters + EMBEDDINGS,
        {1: "9.76", 2: "9.76/6.57/6.04/4.88", 4: "9.76/4.98/4.18/2.44", 8: "9.76/4.18/3.25/1.22"},
    ),
]


@pytest.mark.parametrize(("total", "frozen", "row"), TABLE)
def test_states_of_each_stage_and_number_of_ranks_by_the_table(total, frozen, row):
    for world_size, cells in row.items():
        expected = [float(cell) for cell in cells.split("/")] * (4 if world_size == 1 else 1)
        found = [state_bytes(total, total - frozen, stage, world_size, "bf16") / 1e9 for stage in range(4)]
        assert found == pytest.approx(expected, abs=0.0055)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_one_rank_holds_sixteen_bytes_a_trained_parameter_at_every_stage(dtype):
    assert [state_bytes(1000, 1000, stage, 1, dtype) for stage in range(4)] == [16_000] * 4


def test_stages_divide_states_then_gradients_then_parameters():
    """4 ranks in 32 bit: 4 + 4 + 8 bytes, each share by hand."""
    found = [state_bytes(1000, 500, stage, 4, "fp32") for stage in range(4)]
    assert found == [4000 + 2000 + 4000, 4000 + 2000 + 1000, 4000 + 500 + 1000, 1000 + 500 + 1000]
