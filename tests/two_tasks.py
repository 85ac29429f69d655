"""A toy with all that the encoders ask of an engine: two objectives with different numbers of targets, stacked experts
that one rank leaves without tokens, layers that run twice in a pass, share weights and return two tensors, and a
collective of the model's own."""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.utils.checkpoint import checkpoint

from kozero import distributed
from kozero.config import BatchSizes
from kozero.data.batch import Batch
from tests.toys import CLIP, GLOBAL_BATCH, RATES, SHAPE

VOCAB, HIDDEN, LENGTH, NUM_EXPERTS = 24, 10, 6, 3
NO_TARGET = -100
STEPS = 4


@dataclass
class Example:
    """A text with its masked words, whether its segments are in order, and which tokens the experts have room for."""

    ids: np.ndarray  # (LENGTH,)
    words: np.ndarray  # (LENGTH,) or NO_TARGET
    order: int  # or NO_TARGET
    has_room: np.ndarray  # (LENGTH,) bool


class Layer(nn.Module):
    """Top-1 routing into stacked experts (Fedus et al. 2022, arXiv 2101.03961), whose scores go on to the next layer,
    then a mixer that all layers are handed. Tokens without room pass the experts by."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, NUM_EXPERTS)
        self.weight = nn.Parameter(torch.randn(NUM_EXPERTS, HIDDEN, HIDDEN) / HIDDEN**0.5)

    def forward(
        self, x: torch.Tensor, scores: torch.Tensor | None, mixer: nn.Module, has_room: torch.Tensor, recompute: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, H), (B, T, E) and (B, T) to the first two."""
        if recompute:
            return checkpoint(self.run, x, scores, mixer, has_room, use_reentrant=False)
        return self.run(x, scores, mixer, has_room)

    def run(
        self, x: torch.Tensor, scores: torch.Tensor | None, mixer: nn.Module, has_room: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What `forward` says."""
        scores = self.router(x) if scores is None else self.router(x) + scores
        chances = scores.softmax(-1)
        chosen = F.one_hot(chances.argmax(-1), NUM_EXPERTS) * has_room.unsqueeze(-1)
        x = x + torch.einsum("bte,bth,ehk->btk", chosen * chances, x, self.weight)
        return x + mixer(x.tanh()), scores


class TwoTasks(nn.Module):
    """Words behind a mask, and the order of segments by two passes through the same layers.

    With `recompute` activations inside a layer are computed once more in the backward pass.
    """

    def __init__(self, recompute: bool) -> None:
        super().__init__()
        self.recompute = recompute
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList([Layer(), Layer(), Layer()])
        self.layers[2].weight = self.layers[0].weight  # so that only the second can be gathered by itself
        self.mixers = nn.ModuleList([nn.Linear(HIDDEN, HIDDEN)])
        self.norm = nn.LayerNorm(HIDDEN)
        self.order_head = nn.Linear(HIDDEN, 2)

    def encode(self, ids: torch.Tensor, has_room: torch.Tensor) -> torch.Tensor:
        """(B, T) to (B, T, H)."""
        x, scores = self.embedding(ids), None
        for layer in self.layers:
            x, scores = layer(x, scores, self.mixers[0], has_room, self.recompute)
        return self.norm(x)

    def forward(
        self, ids: torch.Tensor, words: torch.Tensor, order: torch.Tensor, has_room: torch.Tensor
    ) -> torch.Tensor:
        """(2,) sums of losses."""
        x = self.encode(ids, has_room)
        backwards = self.encode(ids.flip(1), has_room)
        word_logits = (x @ self.embedding.weight.T).flatten(0, 1)
        order_logits = self.order_head(met((x * backwards).mean(1)))
        pairs = [(word_logits, words.flatten()), (order_logits, order)]
        sums = [F.cross_entropy(logits, wanted, ignore_index=NO_TARGET, reduction="sum") for logits, wanted in pairs]
        return torch.stack(sums)


def met(x: torch.Tensor) -> torch.Tensor:
    """The same values after a collective, forwards and backwards: as under in-batch negatives of all ranks."""
    return x + 0 * all_reduce(x.clone()) if dist.is_initialized() else x


def two_tasks(recompute: bool = False) -> TwoTasks:
    """The same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return TwoTasks(recompute)


def examples() -> list[list[Example]]:
    """The examples of each step. Every second pair, which is rank 1's, gives its experts no token and few of its
    orders are known; in the last step no order is."""
    rng = np.random.default_rng(12)
    done = []
    for step in range(STEPS):
        for place in range(GLOBAL_BATCH):
            first = place // 2 % 2 == 0
            ids, wanted = rng.integers(0, VOCAB, (2, LENGTH))
            words = np.where(rng.random(LENGTH) < 0.4, wanted, NO_TARGET)
            known = step < STEPS - 1 and (first or place == 2)
            order = int(rng.integers(2)) if known else NO_TARGET
            done.append(Example(ids, words, order, np.full(LENGTH, first)))
    return [done[k : k + GLOBAL_BATCH] for k in range(0, len(done), GLOBAL_BATCH)]


def batch_of(some: list[Example]) -> Batch:
    """One forward pass."""
    inputs = {
        name: torch.from_numpy(np.stack([getattr(example, name) for example in some]))
        for name in ("ids", "words", "order", "has_room")
    }
    counts = tuple(int((inputs[name] != NO_TARGET).sum()) for name in ("words", "order"))
    return Batch(inputs, counts, num_tokens=inputs["ids"].numel())


def deal_examples(some: list[Example], sizes: BatchSizes) -> list[Batch]:
    """This rank's micro batches."""
    starts = range(distributed.rank() * sizes.micro, len(some), sizes.micro * sizes.world_size)
    return [batch_of(some[k : k + sizes.micro]) for k in starts]


def reference_of_two(optim: str) -> tuple[list[tuple[float | None, ...]], list[float], dict[str, torch.Tensor]]:
    """Losses of both objectives (None without targets), gradient norms and final weights by plain PyTorch, all examples
    in one pass."""
    module = two_tasks()
    decays = [p for p in module.parameters() if p.dim() >= 2]
    rest = [p for p in module.parameters() if p.dim() < 2]
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[optim](groups, lr=1.0)
    losses, norms = [], []
    for step, some in enumerate(examples()):
        batch = batch_of(some)
        means = module(**batch.inputs) / torch.tensor(batch.num_targets).clamp(min=1)
        optimizer.zero_grad()
        means.sum().backward()
        norms.append(nn.utils.clip_grad_norm_(module.parameters(), CLIP).item())
        for group in optimizer.param_groups:
            group["lr"] = RATES[optim] * SHAPE[step]
        optimizer.step()
        losses.append(tuple(mean if num else None for mean, num in zip(means.tolist(), batch.num_targets, strict=True)))
    return losses, norms, {name: p.detach().clone() for name, p in module.named_parameters()}


class Late(nn.Module):
    """Of its two parameters the larger one has no gradient in the first step."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(4, 3))

    def forward(self, x: torch.Tensor, use: torch.Tensor) -> torch.Tensor:
        """The sum of squares of one or of both."""
        total = (self.small * x).square().sum()
        return total + (self.large * x).square().sum() if use else total
