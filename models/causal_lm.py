"""GPT-2 language models (KoGPT2, ko-gpt-trinity, and smaller ones of the same shape) as the trainer sees them."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel


class PauseEmbedding(nn.Embedding):
    """Token embedding whose pause row is a parameter of its own, so that it can train while the rest is frozen."""

    def __init__(self, embedding: nn.Embedding, pause_id: int) -> None:
        super().__init__(*embedding.weight.shape, _weight=embedding.weight)
        self.weight = embedding.weight  # the very parameter, still tied to the head
        self.pause_id = pause_id
        self.pause_row = nn.Parameter(embedding.weight.detach()[pause_id : pause_id + 1].clone())  # (1, H)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, T) ids to (B, T, H) vectors."""
        rows = super().forward(input_ids)
        return torch.where((input_ids == self.pause_id).unsqueeze(-1), self.pause_row.to(rows.dtype), rows)


class MaskedHead(nn.Linear):
    """A head without bias that gives some tokens a logit of minus infinity. As the bias of the matrix product the
    mask costs no extra pass over the (N, V) logits."""

    def __init__(self, head: nn.Linear, silent_ids: list[int]) -> None:
        super().__init__(head.in_features, head.out_features, bias=False, device="meta")
        self.weight = head.weight  # the very parameter, still tied to the embedding
        mask = torch.zeros(head.out_features)
        mask[silent_ids] = -torch.inf
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., H) to (..., V)."""
        return F.linear(hidden, self.weight, self.mask.to(hidden.dtype))


class CausalLM(nn.Module):
    """A GPT-2 whose head is computed only where something is predicted.

    Args:
        lm: the transformers model; its head must be tied to its embedding.
        silent_ids: tokens that are never predicted (pauses, rows that only pad the vocabulary). Their logits are
            minus infinity in training, scoring and generation alike.
        pause_id: the token that pauses; None where the vocabulary has none.
    """

    def __init__(self, lm: GPT2LMHeadModel, silent_ids: list[int], pause_id: int | None = None) -> None:
        super().__init__()
        self.lm, self.pause_id = lm, pause_id
        if silent_ids:
            lm.lm_head = MaskedHead(lm.lm_head, silent_ids)

    def separate_pause_row(self) -> None:
        """Give the pause its own (1, H) parameter `lm.transformer.wte.pause_row`."""
        self.lm.transformer.wte = PauseEmbedding(self.lm.transformer.wte, self.pause_id)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        target_index: torch.Tensor,
        target_ids: torch.Tensor,
        reduction: str = "sum",
    ) -> torch.Tensor:
        """Cross entropy of the predicted positions, in nats.

        Args:
            input_ids, position_ids: (B, T). Positions that restart begin a new text, which sees none of the others:
                transformers builds that mask only without attention_mask and without cache.
            target_index: (N,) places in the flattened (B * T) positions.
            target_ids: (N,) the token that follows each.

        Returns: their sum, or all (N,) of them with reduction="none".
        """
        hidden = self.lm.transformer(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        logits = self.lm.lm_head(hidden.flatten(0, 1)[target_index])  # (N, V)
        return F.cross_entropy(logits.float(), target_ids, reduction=reduction)

    def plain_state(self, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A state dict of this module as one of the transformers model: its names, tied weights once, and the pause
        row back in the embedding."""
        state = {name.removeprefix("lm."): tensor for name, tensor in state.items()}
        state.pop("lm_head.weight", None)
        row = state.pop("transformer.wte.pause_row", None)
        if row is not None:
            table = state["transformer.wte.weight"].clone()
            table[self.lm.transformer.wte.pause_id] = row[0].to(table.dtype)
            state["transformer.wte.weight"] = table
        return state


def build(config: GPT2Config, seed: int) -> GPT2LMHeadModel:
    """A model of random weights, the same on every rank for one seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT2LMHeadModel(config)


def resize_vocabulary(lm: GPT2LMHeadModel, num_tokens: int, multiple: int = 128) -> None:
    """Make room for `num_tokens`, rounded up: a vocabulary that is a multiple of 128 keeps matrix products fast."""
    lm.resize_token_embeddings(num_tokens, pad_to_multiple_of=multiple, mean_resizing=False)


def reset_row(lm: GPT2LMHeadModel, token_id: int, seed: int) -> None:
    """Draw the embedding of one token anew, as GPT-2 draws all of them: N(0, initializer_range)."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(lm.config.n_embd, generator=generator) * lm.config.initializer_range
    with torch.no_grad():
        lm.transformer.wte.weight[token_id] = row.to(lm.dtype)
