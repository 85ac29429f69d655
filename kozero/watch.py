"""Numbers going wrong: losses and gradients that are not finite, losses far above the ones before."""

import math
import statistics
from dataclasses import dataclass

import torch

from kozero import distributed
from kozero.checkpoint import RunState
from kozero.config import BatchSizes, TrainingArguments
from kozero.data.batch import Rows
from kozero.engines.base import LEAST_SCALE, StepStats
from kozero.errors import Diverged

HISTORY, LEAST = 128, 32  # losses that a new one is compared with, and how many there must be (128: OLMo-core)
SHOWN = 20  # numbers of examples in a message


@dataclass
class Watch:
    """Looks at what each step did, by numbers that are the same on all ranks, so that all decide alike."""

    arguments: TrainingArguments
    rows: Rows
    sizes: BatchSizes
    state: RunState

    def look(self, stats: StepStats) -> str | None:
        """Note a step before it counts. Returns what the user should read of it.

        Raises: Diverged when the run is to end. Collective.
        """
        if stats.applied and math.isfinite(stats.loss):
            self.state.bad_in_a_row = 0
            return self.spike(stats.loss)
        self.state.bad_in_a_row += 1
        overflow = self.arguments.fp16 and math.isfinite(stats.loss)  # the loss scale looks for its place
        if overflow and stats.loss_scale <= LEAST_SCALE:
            raise Diverged(self.tell(stats, f"gradients overflow at the lowest loss scale, {LEAST_SCALE:g}"))
        if self.arguments.nonfinite == "stop" and not overflow:
            raise Diverged(self.tell(stats, "not finite (--nonfinite stop)"))
        if self.state.bad_in_a_row >= self.arguments.max_nonfinite:
            raise Diverged(self.tell(stats, f"{self.state.bad_in_a_row} steps in a row were not finite"))
        then = "its gradients were finite, updated" if stats.applied else "no update"
        return None if overflow else f"step {self.state.step + 1}: loss {stats.loss}, not finite: {then}"

    def tell(self, stats: StepStats, what: str) -> str:
        """Step, numbers, ranks and examples of a step that ends the run."""
        finite = bool(torch.isfinite(stats.own).all()) if stats.own is not None else True
        ranks = [rank for rank, fine in enumerate(distributed.gather(finite)) if not fine]
        scale = f", loss scale {stats.loss_scale:g}" if self.arguments.fp16 else ""
        where = f"rank {', '.join(map(str, ranks))}, " if ranks else ""
        return (
            f"step {self.state.step + 1}: {what}: loss {stats.loss}, gradient norm {stats.grad_norm}{scale}; {where}"
            f"{self.examples(ranks)}. Lower --learning_rate, look at these examples, or compute with more bits"
        )

    def examples(self, ranks: list[int]) -> str:
        """The training examples of a step, of some ranks or of all."""
        found: list[int] = []
        for rank in ranks or range(self.sizes.world_size):
            found += self.rows.examples(self.state.consumed_rows, self.sizes, rank)
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        return f"training examples {', '.join(map(str, found[:SHOWN]))}{more} (counted from 0)"

    def spike(self, loss: float) -> str | None:
        """Compare a loss with those before it, in their standard deviations, then remember it."""
        before, said = self.state.recent_losses, None
        if len(before) >= LEAST:
            mean, deviation = statistics.fmean(before), statistics.pstdev(before)
            score = (loss - mean) / max(deviation, 1e-12 + 1e-6 * abs(mean))
            self.state.window_spike = max(self.state.window_spike, score)
            if 0 < self.arguments.spike_sigmas < score:
                said = (
                    f"step {self.state.step + 1}: loss {loss:.4f} is {score:.1f} standard deviations above the mean "
                    f"{mean:.4f} of the {len(before)} before; {self.examples([])}"
                )
        self.state.recent_losses = [*before, loss][-HISTORY:]
        return said
