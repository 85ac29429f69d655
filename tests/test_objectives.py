"""What an encoder learns, against heads of transformers, equations written out by hand, and one process for two."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AlbertConfig
from transformers.models.albert.modeling_albert import AlbertMLMHead

from kozero import distributed
from kozero.config import BatchSizes
from kozero.pause import IGNORE
from models.heads import PositionPool
from models.mix_lm import MixLmConfig, MixLmEncoder
from models.transformer import TransformerConfig, TransformerEncoder
from pretrain.objectives import TASKS, EncoderPretraining
from tests.measures import settle, told
from tests.ranks import run_ranks
from tests.test_pretrain_rows import encoder_rows
from tests.toy_encoder import HIDDEN, POSITIONS, VOCAB, Inputs, ToyEncoder, losses_and_gradients, on_rank, shaken
from tests.toys import engine_for

SHARED = {"vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 2, "max_position_embeddings": POSITIONS}
SHARED |= {"dropout_prob": 0.0, "initializer_range": 0.3, "embedding_size": 6, "ff_dim": 24, "n_experts": 2}
KINDS = ["toy", "transformer", "mix_lm"]


def encoder(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "transformer":
        return TransformerEncoder(TransformerConfig(**SHARED, num_heads=2))
    return MixLmEncoder(MixLmConfig(**SHARED, kernel_size=5)) if kind == "mix_lm" else ToyEncoder()


def pretraining(kind: str, task: str) -> EncoderPretraining:
    return shaken(EncoderPretraining(encoder(kind), task))


@pytest.fixture(scope="module", autouse=True)
def process_group():
    threads = torch.get_num_threads()
    distributed.setup()
    torch.set_num_threads(1)  # two only get into each other's way here
    yield
    distributed.shutdown()
    torch.set_num_threads(threads)


def batch_of(task: str, num: int = 6, consumed: int = 0) -> Inputs:
    (batch,) = encoder_rows(task).step(consumed, BatchSizes(num, 1, 1), 0)
    return batch.inputs


def encoded(module: EncoderPretraining, inputs: Inputs) -> torch.Tensor:
    """(B, T, H) by the encoder alone."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    return module.encoder(**{name: inputs[name] for name in names}).last_hidden_state


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


# Masked tokens -----------------------------------------------------------------------------------------------------


def reference_logits(module: EncoderPretraining, hidden: torch.Tensor) -> torch.Tensor:
    """(B, T, H) to (B, T, V) by the head of transformers' ALBERT, whose embedding is factorised too."""
    config = AlbertConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, embedding_size=6, hidden_act="gelu",
        layer_norm_eps=module.encoder.config.LN_eps, num_attention_heads=2,
    )  # fmt: skip
    head = AlbertMLMHead(config)
    table = module.encoder.get_input_embeddings().weight
    pairs = {"dense": module.mlm.dense, "LayerNorm": module.mlm.norm}
    state = {f"{name}.{k}": v for name, layer in pairs.items() for k, v in layer.state_dict().items()}
    state |= {"decoder.weight": table, "decoder.bias": module.mlm.decoder.bias, "bias": module.mlm.decoder.bias}
    head.load_state_dict(state)
    return head(hidden)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_loss_of_hidden_tokens_is_that_of_all_logits_of_transformers_head(kind):
    module, inputs = pretraining(kind, "mlm"), batch_of("mlm")
    logits = reference_logits(module, encoded(module, inputs))
    labels = torch.full(inputs["input_ids"].shape, IGNORE)
    labels.view(-1)[inputs["target_index"]] = inputs["target_ids"]
    sums, right = module(**inputs, score=True)
    close(sums[0], F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
    assert right[0] == (logits.argmax(-1) == labels).sum()
    close(module(**inputs)[0], sums[0])


def test_right_answers_are_counted():
    module, inputs = pretraining("toy", "mlm"), batch_of("mlm")
    with torch.no_grad():
        best = reference_logits(module, encoded(module, inputs)).flatten(0, 1).argmax(-1)[inputs["target_index"]]
        inputs["target_ids"] = torch.where(torch.arange(len(best)) % 3 == 0, best, (best + 1) % VOCAB)
        assert module(**inputs, score=True)[1, 0] == -(-len(best) // 3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_is_tied_to_the_embedding(kind):
    module, inputs = pretraining(kind, "mlm"), batch_of("mlm")
    table = module.encoder.get_input_embeddings().weight
    assert module.mlm.decoder.weight is table
    module(**inputs)[0].backward()
    unread = sorted(set(inputs["target_ids"].tolist()) - set(inputs["input_ids"].flatten().tolist()))
    assert unread and (table.grad[unread].abs().sum(1) > 0).all()


# Segment order -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_loss_of_segment_order_by_hand(kind):
    module, inputs = pretraining(kind, "mlm_sop"), batch_of("mlm_sop", 8, consumed=8)
    labels = inputs["swapped"].tolist()
    assert set(labels) == {0, 1, IGNORE}
    first, _, second = module.sop
    total, right = 0.0, 0
    for vector, label in zip(encoded(module, inputs)[:, 0], labels, strict=True):
        scores = second.weight @ torch.tanh(first.weight @ vector + first.bias) + second.bias
        if label != IGNORE:
            total += scores.exp().sum().log() - scores[label]
            right += int(scores[label] > scores[1 - label])
    sums = module(**inputs, score=True)
    close(sums[0, 1], total)
    assert sums[1, 1] == right
    inputs["swapped"] = torch.where(inputs["swapped"] == IGNORE, IGNORE, 1 - inputs["swapped"])
    assert module(**inputs, score=True)[1, 1] == sum(label != IGNORE for label in labels) - right


# Passage of a sentence ---------------------------------------------------------------------------------------------


def pooled(module: EncoderPretraining, hidden: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """One vector a text, position by position."""
    return [
        sum(module.pool.weight[t] * vectors[t] for t in range(int(real.sum())))
        for vectors, real in zip(hidden, mask, strict=True)
    ]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_loss_of_queries_by_hand(kind):
    """Rows without a query add nothing, and their passages are wrong answers for the others."""
    module, inputs = pretraining(kind, "mlm_ict"), batch_of("mlm_ict", 8)
    has_query = inputs["has_query"].tolist()
    assert 1 < sum(has_query) < 8
    passages = pooled(module, encoded(module, inputs), inputs["attention_mask"])
    asked = {"input_ids": inputs["query_ids"], "attention_mask": inputs["query_mask"]}
    asked["token_type_ids"] = torch.zeros_like(inputs["query_ids"])
    queries = pooled(module, encoded(module, asked), inputs["query_mask"])
    total, right = 0.0, 0
    for k in itertools.compress(range(8), has_query):
        scores = torch.stack([queries[k] @ passage for passage in passages]) / HIDDEN**0.5
        total += scores.exp().sum().log() - scores[k]
        right += int(scores.argmax() == k)
    sums = module(**inputs, score=True)
    close(sums[0, 1], total, 1e-4)
    assert sums[1, 1] == right


def test_the_vector_of_a_text_does_not_change_with_its_batch():
    pool = shaken(PositionPool(12))
    hidden, garbage = torch.randn(1, 5, 4), torch.full((1, 4, 4), 1e9)
    alone = pool(hidden, torch.ones(1, 5, dtype=torch.long))
    padded = torch.cat([torch.cat([hidden, garbage], 1), torch.randn(1, 9, 4)])
    mask = torch.tensor([[1] * 5 + [0] * 4, [1] * 9])
    close(pool(padded, mask)[:1], alone)
    close(alone[0], sum(pool.weight[t] * hidden[0, t] for t in range(5)))


def widened(inputs: Inputs, width: int) -> Inputs:
    """A batch with more padding, the targets' places moved."""
    before = inputs["input_ids"].shape[1]
    place = inputs["target_index"]
    wide = {name: F.pad(t, (0, width - t.shape[1])) if t.dim() == 2 else t for name, t in inputs.items()}
    return wide | {"target_index": place // before * width + place % before}


def joined(batches: list[Inputs]) -> Inputs:
    """The batches of all ranks as one."""
    wide = [widened(inputs, POSITIONS) for inputs in batches]
    whole = {name: torch.cat([inputs[name] for inputs in wide]) for name in wide[0]}
    rows = np.cumsum([0, *(len(inputs["input_ids"]) for inputs in wide[:-1])])
    whole["target_index"] = torch.cat(
        [inputs["target_index"] + int(first) * POSITIONS for first, inputs in zip(rows, wide, strict=True)]
    )
    return whole


def batches_of_ranks(quiet: bool) -> list[Inputs]:
    """A batch for each of two ranks, of different widths; `quiet`: the second has no queries."""
    batches = [widened(batch_of("mlm_ict", 4, consumed), width) for consumed, width in ((0, 24), (8, POSITIONS))]
    batches[1]["has_query"] &= not quiet
    return batches


def test_two_ranks_have_the_losses_and_gradients_of_one_with_all_passages():
    cases = [batches_of_ranks(quiet) for quiet in (False, True)]
    for batches, *ranks in zip(cases, *run_ranks(on_rank, cases), strict=True):
        expected, gradients = losses_and_gradients(joined(batches))
        close(ranks[0][0] + ranks[1][0], expected, 1e-4)
        for name, gradient in gradients.items():
            close(ranks[0][1][name] + ranks[1][1][name], gradient, 1e-4)
        asked = [bool(batch["has_query"].any()) for batch in batches]
        assert [bool(losses[0, 1] > 0) for losses, _ in ranks] == asked
        assert all(gradients["pool.weight"].any() for _, gradients in ranks)  # without queries too: as wrong answers


def test_passages_of_one_rank_alone_would_be_another_loss():
    """Negative control of the test above."""
    batches = batches_of_ranks(quiet=False)
    alone = sum(losses_and_gradients(inputs)[0][0, 1] for inputs in batches)
    assert losses_and_gradients(joined(batches))[0][0, 1] - alone > 0.1


# Router losses, sums and counts ------------------------------------------------------------------------------------


def texts_of(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    """What the encoder is given of a batch."""
    return tuple(inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids"))


@pytest.mark.parametrize("task", ["mlm", "mlm_ict"])
@torch.no_grad()
def test_router_losses_are_weighted_and_counted_by_token_also_those_of_queries(task):
    toy = ToyEncoder(router=True)
    module = EncoderPretraining(toy, task).eval()
    inputs = batch_of(task)
    texts = [texts_of(inputs)]
    if task == "mlm_ict":
        texts.append((inputs["query_ids"], inputs["query_mask"], torch.zeros_like(inputs["query_ids"])))
    wanted = torch.zeros(2)
    for ids, mask, types in texts:
        wanted += torch.tensor([0.01, 0.001]) * sum(map(sum, mask.tolist())) * toy(ids, mask, types).router_losses
    sums, right = module(**inputs, score=True)
    close(sums[-2:], wanted)
    assert right[-2:].tolist() == [0, 0]
    out = toy(*texts_of(inputs))
    assert module.statistics["expert_load"].tolist() == out.expert_load.tolist() == [[0.25, 0.75]]
    assert module.statistics["dropped"].tolist() == out.dropped.tolist() and out.dropped.all()


def test_router_losses_of_the_switch_encoder_have_gradients():
    module = EncoderPretraining(encoder("transformer"), "mlm_sop").train()
    module(**batch_of("mlm_sop"))[2:].sum().backward()
    gradient = module.encoder.layers[0].feed_forward.router.weight.grad
    assert gradient.abs().sum() > 0
    assert not any(tensor.requires_grad for tensor in module.statistics.values())


@pytest.mark.parametrize("kind", ["transformer", "mix_lm"])
@pytest.mark.parametrize("task", TASKS)
def test_there_are_as_many_sums_as_numbers_of_targets(kind, task):
    (batch,) = encoder_rows(task, router=kind == "transformer").step(0, BatchSizes(6, 1, 1), 0)
    module = pretraining(kind, task)
    assert module(**batch.inputs).shape == (len(batch.num_targets),)
    assert module(**batch.inputs, score=True).shape == (2, len(batch.num_targets))
    assert (module(**batch.inputs, score=True)[1] <= torch.tensor(batch.num_targets)).all()


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_without_targets_has_loss_zero_and_a_finite_gradient(task):
    module, inputs = pretraining("toy", task), batch_of(task)
    inputs |= {name: inputs[name][:0] for name in ("target_index", "target_ids")}
    inputs |= {"swapped": torch.full((6,), IGNORE)} if task == "mlm_sop" else {}
    inputs |= {"has_query": torch.zeros(6, dtype=torch.bool)} if task == "mlm_ict" else {}
    sums = module(**inputs)
    sums.sum().backward()
    assert not sums.any()
    assert all(p.grad is None or not p.grad.any() for p in module.parameters())


# First weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [0.02, 0.3])
def test_heads_begin_as_the_encoders_own_layers(std):
    torch.manual_seed(0)
    inner = encoder("toy")
    inner.config.initializer_range, inner.config.hidden_size = std, 200
    table = inner.tokens.weight.detach().clone()
    module = EncoderPretraining(inner, "mlm_sop")
    drawn = [module.mlm.dense.weight, module.sop[0].weight, module.sop[2].weight]
    for weight in drawn:
        assert abs(weight.std().item() / std - 1) < 4.5 / (2 * weight.numel()) ** 0.5
        assert abs(weight.mean().item()) < 4.5 * std / weight.numel() ** 0.5
    for layer in (module.mlm.dense, module.mlm.decoder, module.sop[0], module.sop[2]):
        assert not layer.bias.any()
    assert (module.mlm.norm.weight == 1).all() and not module.mlm.norm.bias.any()
    assert (inner.tokens.weight == table).all()


def test_a_pool_begins_with_equal_weights_of_length_one():
    weight = EncoderPretraining(encoder("toy"), "mlm_ict").pool.weight
    assert len(weight) == POSITIONS and (weight == weight[0]).all()
    close(weight.norm(), torch.tensor(1.0))


@pytest.mark.parametrize(
    ("task", "heads"), [("mlm", {"mlm"}), ("mlm_sop", {"mlm", "sop"}), ("mlm_ict", {"mlm", "pool"})]
)
def test_a_task_has_the_heads_it_needs_and_no_others(task, heads):
    """A parameter that no loss uses would have no gradient."""
    module, inputs = pretraining("toy", task), batch_of(task)
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == heads | {"encoder"}
    module(**inputs).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


# Shared layers under the engines -----------------------------------------------------------------------------------


def losses_of_shared_layers(names: list[str]) -> list[list[tuple[float, ...]]]:
    """Three steps of MLM and SOP with each engine, of an encoder whose three layers are one."""
    settle()
    found = []
    for kind, name in itertools.product(KINDS[1:], names):
        torch.manual_seed(0)
        config, model = (
            (TransformerConfig, TransformerEncoder) if kind == "transformer" else (MixLmConfig, MixLmEncoder)
        )
        own = {"num_heads": 2} if kind == "transformer" else {"kernel_size": 5}
        shared = model(config(**SHARED | {"num_hidden_layers": 3}, **own, layer_group=3))
        engine, sizes = engine_for(name, EncoderPretraining(shared, "mlm_sop"), told(name, optim="sgd"))
        rows = encoder_rows("mlm_sop", router=kind == "transformer")
        steps = [rows.step(8 * k, sizes, distributed.rank()) for k in range(3)]
        found.append([engine.train_step(batches, 0.05).losses for batches in steps])
        engine.close()
    return found


@pytest.mark.slow
def test_layers_that_are_one_train_alike_under_every_engine():
    names = ["plain", "oss", "fsdp3_wrap", "zero2", "zero3"]
    found, again = run_ranks(losses_of_shared_layers, names)
    assert found == again
    for first in (0, len(names)):
        for other in found[first + 1 : first + len(names)]:
            np.testing.assert_allclose(other, found[first], atol=1e-5)
