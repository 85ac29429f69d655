"""What an encoder learns in pre-training: masked tokens, and the order of segments or the passage of a sentence."""

import torch
import torch.nn.functional as F
from torch import nn

from kozero.contrast import in_batch_logits
from kozero.pause import IGNORE
from models.heads import Float32Linear, PositionPool, router_sums

TASKS = ("mlm", "mlm_sop", "mlm_ict")


class MaskedHead(nn.Module):
    """Logits of hidden tokens: a dense layer, a norm, and the transposed embedding (Devlin et al. 2018)."""

    def __init__(self, embedding: nn.Embedding, hidden_size: int, eps: float) -> None:
        super().__init__()
        vocab_size, embedding_size = embedding.weight.shape
        self.dense = nn.Linear(hidden_size, embedding_size)
        self.norm = nn.LayerNorm(embedding_size, eps=eps)
        self.decoder = nn.Linear(embedding_size, vocab_size)
        self.decoder.weight = embedding.weight

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, H) to (N, V)."""
        return self.decoder(self.norm(F.gelu(self.dense(hidden))))


class EncoderPretraining(nn.Module):
    """An encoder with the heads of its objectives.

    Args:
        encoder: its forward takes input_ids, attention_mask and token_type_ids (B, T) and returns an object with
            last_hidden_state (B, T, H) and router_losses: (2,) balance and z-loss, or None.
        task: one of TASKS.
    """

    def __init__(self, encoder: nn.Module, task: str) -> None:
        super().__init__()
        config = encoder.config
        self.encoder, self.task = encoder, task
        self.mlm = MaskedHead(encoder.get_input_embeddings(), config.hidden_size, config.LN_eps)
        if task == "mlm_sop":
            size = config.hidden_size
            self.sop = nn.Sequential(Float32Linear(size, size), nn.Tanh(), Float32Linear(size, 2))
        if task == "mlm_ict":
            self.pool = PositionPool(config.max_position_embeddings)
        self.statistics: dict[str, torch.Tensor] = {}  # of the last forward pass, for the curves
        self.start(config.initializer_range)

    def start(self, std: float) -> None:
        """Draw the heads as the encoder draws its own layers."""
        for name in ("mlm", "sop"):
            for layer in getattr(self, name, nn.Module()).modules():
                if isinstance(layer, nn.Linear):
                    nn.init.zeros_(layer.bias)
                    if layer is not self.mlm.decoder:
                        nn.init.normal_(layer.weight, std=std)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor,
        target_index: torch.Tensor,
        target_ids: torch.Tensor,
        swapped: torch.Tensor | None = None,
        query_ids: torch.Tensor | None = None,
        query_mask: torch.Tensor | None = None,
        has_query: torch.Tensor | None = None,
        passage: torch.Tensor | None = None,
        score: bool = False,
    ) -> torch.Tensor:
        """Sums of the losses, in nats, router losses weighted.

        Args:
            input_ids, attention_mask, token_type_ids: (B, T).
            target_index, target_ids: (N,) places in the flattened (B * T) positions and the tokens hidden there.
            swapped: (B,) 1, 0 or IGNORE (SOP).
            query_ids, query_mask: (B, Q); has_query: (B,); passage: (B,) its number (ICT, Lee et al. 2019, equation 5).
            score: count right answers too.

        Returns: (K,) sums of [mlm, sop or ict, balance, router z]; with `score` (2, K): the sums, and how many are
            right (0 for the router).
        """
        out = self.encoder(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        hidden = out.last_hidden_state
        parts = [summed(self.mlm(hidden.flatten(0, 1)[target_index]), target_ids)]
        if swapped is not None:
            parts.append(summed(self.sop(hidden[:, 0]), swapped))
        routing = [router_sums(out, attention_mask)]
        if query_ids is not None:
            query = self.encoder(query_ids, attention_mask=query_mask, token_type_ids=torch.zeros_like(query_ids))
            queries = self.pool(query.last_hidden_state, query_mask)
            logits, own = in_batch_logits(queries, self.pool(hidden, attention_mask), passage)
            parts.append(summed(logits, own.masked_fill(~has_query, IGNORE)))
            routing.append(router_sums(query, query_mask))
        if out.router_losses is not None:
            self.statistics = {"expert_load": out.expert_load.detach(), "dropped": out.dropped.detach()}
        parts += [(sum(losses), input_ids.new_zeros(())) for losses in zip(*routing, strict=True)]
        sums, right = (torch.stack([part[k].float() for part in parts]) for k in (0, 1))
        return torch.stack([sums, right]) if score else sums


def summed(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the cross entropy in nats over targets that are not IGNORE, and how many are the most likely."""
    loss = F.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=IGNORE)
    return loss, (logits.argmax(-1) == targets).sum()
