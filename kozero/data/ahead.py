"""Batches that are made while the step before them computes."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from kozero.config import BatchSizes
from kozero.data.batch import Batch, Rows


class Ahead:
    """The batches of one rank, step after step. A thread makes those of the next step, in memory that a GPU copies from
    by itself, so that they are there when the device is done. Used with `with`, which ends the thread."""

    def __init__(self, rows: Rows, sizes: BatchSizes, rank: int) -> None:
        self.rows, self.sizes, self.rank = rows, sizes, rank
        self.thread = ThreadPoolExecutor(1, "batches")
        self.next: tuple[int, Future[tuple[list[Batch], int]]] | None = None

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.shutdown(cancel_futures=True)

    def step(self, consumed: int) -> tuple[list[Batch], int]:
        """The micro batches of the step that begins after `consumed` rows, and the tokens of all ranks in it."""
        begin, made = self.next or (None, None)
        if begin != consumed:
            made = self.thread.submit(self.make, consumed)
        found = made.result()
        after = consumed + self.sizes.global_batch
        self.next = after, self.thread.submit(self.make, after)
        return found

    def make(self, consumed: int) -> tuple[list[Batch], int]:
        """In the thread."""
        batches = self.rows.step(consumed, self.sizes, self.rank)
        if torch.cuda.is_available():
            for batch in batches:
                batch.pin_memory()
        return batches, self.rows.num_tokens(consumed, self.sizes.global_batch)
