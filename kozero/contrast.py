"""Telling the passage of a query from those of other rows, on all ranks."""

import torch

from kozero.config import BatchSizes
from kozero.distributed import gather_rows
from kozero.errors import require


def in_batch_logits(
    queries: torch.Tensor, passages: torch.Tensor, numbers: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each query's products with the passages of all ranks (Karpukhin et al. 2020, arXiv 2004.04906, section 3.2),
    divided by sqrt(H) as in attention. A row with the same passage is no negative, nor is one without any.

    Args: queries, passages: (B, H); numbers: (B,) of the passages, -1 for none.

    Returns: (B, world * B) fp32 logits, -inf at what does not count, and (B,) the column of each query's own passage.
    """
    everything, first = gather_rows(passages)
    all_numbers, _ = gather_rows(numbers)
    own = first + torch.arange(len(queries), device=queries.device)
    with torch.autocast(queries.device.type, enabled=False):  # it would cast both operands back to 16 bit
        logits = queries.float() @ everything.float().T / queries.shape[-1] ** 0.5
    left_out = (numbers[:, None] == all_numbers) | (all_numbers < 0)
    return logits.masked_fill(left_out.scatter(1, own[:, None], False), -torch.inf), own


def check_negatives(sizes: BatchSizes) -> None:
    """Refuse a forward pass of one row on one rank: its loss is 0. A micro batch that is not known yet (0) passes."""
    require(
        sizes.micro * sizes.world_size != 1,
        "--per_device_train_batch_size 1 (--train_batch_size) on one rank: a text is told apart from the others of its "
        "forward pass, and there are none; raise it (accumulated rows do not count) or add ranks",
    )
