"""Queries against the passages of a batch."""

import torch

from kozero.contrast import in_batch_logits


def test_a_copy_of_the_own_passage_and_a_row_without_one_are_no_negatives():
    generator = torch.Generator().manual_seed(0)
    queries, passages = (torch.randn(4, 6, generator=generator) for _ in range(2))
    logits, own = in_batch_logits(queries, passages, torch.tensor([8, 5, 8, -1]))
    products = queries @ passages.T / 6**0.5
    counts = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [1, 1, 1, 1]], dtype=torch.bool)
    assert own.tolist() == [0, 1, 2, 3]
    torch.testing.assert_close(logits[counts], products[counts])
    assert (logits[~counts] == -torch.inf).all()


def test_a_row_without_a_passage_gives_no_gradient():
    vectors = torch.ones(2, 4, requires_grad=True)
    logits, own = in_batch_logits(vectors, vectors, torch.tensor([-1, -1]))
    loss = torch.nn.functional.cross_entropy(logits, own.fill_(-100), reduction="sum")
    loss.backward()
    assert loss.item() == 0 and vectors.grad.abs().sum() == 0
