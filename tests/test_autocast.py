"""What is to be computed in 32 bit is, also inside autocast, which casts the operands of a product back to 16 bit; so
PyTorch's engines (autocast) and DeepSpeed (weights in 16 bit) give the same losses for the same 16-bit vectors."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from finetune.reading import SpanReader
from finetune.retrieval import Retriever
from kozero.contrast import in_batch_logits
from models.heads import Float32Linear, PositionPool
from models.mix_lm import MixLmConfig, MixLmEncoder, SpatialGating
from models.transformer import TransformerConfig, TransformerEncoder
from pretrain.objectives import EncoderPretraining
from tests.toy_encoder import HIDDEN, POSITIONS, VOCAB

HALF = [torch.bfloat16, torch.float16]


def vectors(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Numbers that 16 bit hold exactly."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class GivenEncoder(nn.Module):
    """An encoder whose vectors are given: text k of a batch has those that its first id names."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden  # (N, T, H)
        self.config = SimpleNamespace(
            hidden_size=hidden.shape[-1], max_position_embeddings=hidden.shape[1], initializer_range=0.3, LN_eps=1e-5,
            type_vocab_size=2,
        )  # fmt: skip
        self.embedding = nn.Embedding(VOCAB, 6)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor):
        return SimpleNamespace(last_hidden_state=self.hidden[input_ids[:, 0]], router_losses=None)


def halved(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Weights in 32 bit that are the same numbers in 16 bit."""
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(dtype).float()
    return module


def by_both_engines(module: nn.Module, dtype: torch.dtype, *inputs, **named) -> list[torch.Tensor]:
    """What a module gives under autocast, and with weights in 16 bit."""
    with torch.autocast("cpu", dtype):
        found = [module(*inputs, **named)]
    return [*found, module.to(dtype)(*inputs, **named)]


@pytest.mark.parametrize("dtype", HALF)
def test_products_of_queries_and_passages_are_those_of_32_bit(dtype):
    """Of passages that differ little 16 bit keep a few different products alone."""
    queries = vectors(8, 768, dtype=dtype)
    passages = (4 + 0.1 * vectors(64, 768, dtype=dtype, seed=1).float()).to(dtype)
    with torch.autocast("cpu", dtype):
        logits, own = in_batch_logits(queries.repeat(8, 1), passages, torch.arange(64))
        loss = F.cross_entropy(logits, own)
    exact = queries.double().repeat(8, 1) @ passages.double().T / 768**0.5
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.double(), F.cross_entropy(exact, own), rtol=1e-6, atol=0)
    assert all(len(row.unique()) == 64 for row in logits)


def test_long_passages_do_not_overflow_in_fp16():
    """512 positions whose vectors point one way: a product of 768 * 22^2 * 9, above 65,504."""
    pool = PositionPool(512)
    with torch.autocast("cpu", torch.float16):
        pooled = pool(torch.full((2, 512, 768), 3.0), torch.ones(2, 512, dtype=torch.long))
        logits, _ = in_batch_logits(pooled, pooled, torch.arange(2))
    assert logits.isfinite().all() and (pooled @ pooled.T).min() > torch.finfo(torch.float16).max


@pytest.mark.parametrize("dtype", HALF)
def test_the_loss_of_questions_is_the_same_under_both_engines(dtype):
    texts = vectors(12, 16, HIDDEN, dtype=dtype)
    retriever = halved(Retriever(GivenEncoder(texts)), dtype)
    retriever.pool.weight.data /= 8
    ids, passage_ids = torch.arange(6)[:, None].expand(6, 16), torch.arange(6, 12)[:, None].expand(6, 16)
    mask = torch.ones(6, 16, dtype=torch.long)
    pooled = torch.einsum("t,bth->bh", retriever.pool.weight.double(), texts.double())
    exact = F.cross_entropy(pooled[:6] @ pooled[6:].T / HIDDEN**0.5, torch.arange(6), reduction="sum")
    for loss in by_both_engines(retriever, dtype, ids, mask, passage_ids, mask, torch.arange(6)):
        torch.testing.assert_close(loss.double(), exact.view(1), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", HALF)
def test_the_logits_of_an_answer_are_those_of_32_bit_under_both_engines(dtype):
    """Begin and end are the best of hundreds of positions: equal logits would be a draw."""
    texts = vectors(2, 384, 256, dtype=dtype)
    reader = halved(SpanReader(GivenEncoder(texts)), dtype)
    exact = (texts.double() @ reader.span.weight.double().T + reader.span.bias.double()).mT
    ids = torch.arange(2)[:, None].expand(2, 384)
    window = torch.tensor([[0, 384]] * 2)
    for logits in by_both_engines(reader, dtype, ids, ids * 0 + 1, ids * 0, window):
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
        assert all(len(row.unique()) > 380 for row in logits.flatten(0, 1))


@pytest.mark.parametrize("dtype", HALF)
def test_the_loss_of_segment_order_is_the_same_under_both_engines(dtype):
    texts = vectors(6, 4, HIDDEN, dtype=dtype)
    module = halved(EncoderPretraining(GivenEncoder(texts), "mlm_sop"), dtype)
    first, _, second = (module.sop[k] for k in range(3))
    hidden = torch.tanh(texts[:, 0].double() @ first.weight.double().T + first.bias.double())
    swapped = torch.tensor([0, 1, 1, 0, 1, -100])
    exact = F.cross_entropy(hidden @ second.weight.double().T + second.bias.double(), swapped, reduction="sum")
    ids = torch.arange(6)[:, None].expand(6, 4)
    nothing = torch.zeros(0, dtype=torch.long)
    for sums in by_both_engines(module, dtype, ids, ids * 0 + 1, ids * 0, nothing, nothing, swapped):
        torch.testing.assert_close(sums[1].double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", HALF)
def test_the_router_computes_in_32_bit(dtype):
    router, tokens = halved(Float32Linear(HIDDEN, 3, bias=False), dtype), vectors(20, HIDDEN, dtype=dtype)
    exact = tokens.double() @ router.weight.double().T
    for logits in by_both_engines(router, dtype, tokens):
        torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)


def test_residual_sums_behind_a_factorised_embedding_are_in_32_bit():
    """16 bit would end in vectors of which 32 bit hold nothing that 16 bit could not."""
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2, "ff_dim": 24, "n_experts": 2}
    sizes |= {"embedding_size": 6, "max_position_embeddings": POSITIONS, "ln_pos": 0}
    torch.manual_seed(0)
    for model in (
        TransformerEncoder(TransformerConfig(**sizes, num_heads=2)),
        MixLmEncoder(MixLmConfig(**sizes, kernel_size=3)),
    ):
        seen = []
        model.norm.register_forward_pre_hook(lambda _, inputs, seen=seen: seen.append(inputs[0]))
        with torch.autocast("cpu", torch.bfloat16):
            model.eval()(torch.arange(20)[None])
        assert (seen[0] != seen[0].bfloat16()).any()


def test_a_spatial_gate_near_one_keeps_what_differs_from_one():
    """Of 1 + W Z2, with W Z2 about 0.02, bfloat16 would keep five different values."""
    config = MixLmConfig(vocab_size=VOCAB, hidden_size=64, max_position_embeddings=64, n_experts=1)
    torch.manual_seed(0)
    gating = SpatialGating(config)
    nn.init.normal_(gating.weight, std=gating.weight_std)
    nn.init.ones_(gating.bias)
    content, gate, attended = torch.ones(1, 64, 64), torch.randn(1, 64, 64), torch.zeros(1, 64, 64)
    exact = gating(content, gate, attended, None) - 1
    with torch.autocast("cpu", torch.bfloat16):
        found = gating(content, gate, attended, None) - 1
    assert (found - exact).norm() < 0.01 * exact.norm()


class Casts(TorchDispatchMode):
    """Finds numbers that were cast to 32 bit and are cast back to 16 bit as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.widened: list[torch.Tensor] = []
        self.narrowed_again: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].is_floating_point():
            if found.dtype == torch.float32 and args[0].dtype in HALF:
                self.widened.append(found)
            places = {x.untyped_storage().data_ptr() for x in self.widened}
            if found.dtype in HALF and args[0].untyped_storage().data_ptr() in places:
                self.narrowed_again.append(tuple(args[0].shape))
        return found


@pytest.mark.parametrize("kind", ["transformer", "mix_lm"])
@pytest.mark.parametrize("task", ["mlm_sop", "mlm_ict"])
def test_nothing_that_was_cast_to_32_bit_is_cast_back_for_a_product(kind, task):
    sizes = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2, "ff_dim": 24, "n_experts": 2}
    sizes |= {"embedding_size": 6, "max_position_embeddings": POSITIONS, "ln_pos": 0, "dropout_prob": 0.0}
    config = TransformerConfig(**sizes, num_heads=2) if kind == "transformer" else MixLmConfig(**sizes, kernel_size=3)
    module = EncoderPretraining((TransformerEncoder if kind == "transformer" else MixLmEncoder)(config), task)
    ids = torch.randint(1, VOCAB, (4, 12), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    inputs |= {"target_index": torch.tensor([1, 20]), "target_ids": torch.tensor([5, 6])}
    if task == "mlm_sop":
        inputs["swapped"] = torch.tensor([0, 1, 0, 1])
    else:
        inputs |= {"query_ids": ids, "query_mask": torch.ones_like(ids), "has_query": torch.ones(4, dtype=torch.bool)}
        inputs["passage"] = torch.arange(4)
    with Casts() as casts, torch.autocast("cpu", torch.bfloat16):
        module(**inputs)
    assert casts.narrowed_again == []
