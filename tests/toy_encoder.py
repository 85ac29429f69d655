"""A toy encoder and what it learns on one rank. Imports little: new processes import it too."""

from types import SimpleNamespace

import torch
from torch import nn

from kozero import distributed
from pretrain.objectives import EncoderPretraining

VOCAB, HIDDEN, POSITIONS = 60, 16, 32
Inputs = dict[str, torch.Tensor]


class ToyEncoder(nn.Module):
    """As much of an encoder as the objectives need: each position sees itself and the mean of its text."""

    def __init__(self, router: bool = False) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            hidden_size=HIDDEN, LN_eps=1e-5, max_position_embeddings=POSITIONS, initializer_range=0.3
        )
        self.tokens, self.types = nn.Embedding(VOCAB, 6), nn.Embedding(2, 6)
        self.widen, self.router = nn.Linear(6, HIDDEN), router

    def get_input_embeddings(self) -> nn.Embedding:
        return self.tokens

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor
    ) -> SimpleNamespace:
        """`router`: two losses that are none of a router, and a load that is always the same."""
        hidden = self.widen(self.tokens(input_ids) + self.types(token_type_ids))
        mask = attention_mask.unsqueeze(-1)
        hidden = torch.tanh(hidden + (hidden * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True))
        load = torch.tensor([[0.25, 0.75]])
        losses = torch.stack([hidden.square().mean(), hidden.abs().mean()]) if self.router else None
        return SimpleNamespace(last_hidden_state=hidden, router_losses=losses, expert_load=load, dropped=load[:, 0])


def shaken(module: nn.Module) -> nn.Module:
    """All weights and biases large and different, so that each of them matters."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
    return module.eval()


def losses_and_gradients(inputs: Inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(2, 2) sums and right answers of MLM and ICT, and the gradients of the sums."""
    module = shaken(EncoderPretraining(ToyEncoder(), "mlm_ict"))
    result = module(**inputs, score=True)
    result[0].sum().backward()
    return result.detach(), {name: p.grad for name, p in module.named_parameters()}


def on_rank(cases: list[list[Inputs]]) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """The same of this rank's batch in each case."""
    return [losses_and_gradients(batches[distributed.rank()]) for batches in cases]
