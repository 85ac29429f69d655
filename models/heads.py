"""What stands on an encoder."""

import torch
from torch import nn


class PositionPool(nn.Module):
    """One vector of a text: a learned weight for each position, over the real ones."""

    def __init__(self, num_positions: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((num_positions,), 1.0 / num_positions**0.5))

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, T, H) vectors and their (B, T) mask to (B, H)."""
        weights = self.weight[: hidden.shape[1]] * mask
        return torch.einsum("bt,bth->bh", weights.to(hidden.dtype), hidden)
