"""As much of CUDA as fairscale's FullyShardedDataParallel needs, for its tests on a CPU: streams that do nothing."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from unittest.mock import patch

import torch

if not torch.cuda.is_available():  # gloo lacks them; fairscale reads it when it is imported
    os.environ["ENABLE_NCCL_BASE_COLLECTIVES"] = "0"

STREAMS = ("fp32_to_fp16", "all_gather", "post_backward")  # those that fairscale makes where there is CUDA


class Stream:
    """Everything happens at once, so there is nothing to wait for."""

    def wait_stream(self, other: "Stream") -> None:
        """Nothing."""


STREAM = Stream()


@contextmanager
def streams_that_do_nothing() -> Iterator[None]:
    """Let fairscale believe in streams; nothing where there are real ones."""
    if torch.cuda.is_available():
        yield
        return
    from fairscale.nn import FullyShardedDataParallel

    set_up = FullyShardedDataParallel._setup_streams

    def set_up_streams(module: FullyShardedDataParallel) -> None:
        module.bucket_cap_mb = 0.1  # the usual 25 take longer to allocate than all of a toy's step
        set_up(module)
        module._streams.update(dict.fromkeys(STREAMS, STREAM))  # its units share the dictionary

    with ExitStack() as stack:
        for owner, name, value in [
            (FullyShardedDataParallel, "_setup_streams", set_up_streams),
            (torch.cuda, "stream", lambda stream: nullcontext()),
            (torch.cuda, "current_stream", lambda *args: STREAM),
            (torch.cuda, "synchronize", lambda *args: None),
            (torch.Tensor, "record_stream", lambda tensor, stream: None),
            (torch.Tensor, "cuda", lambda tensor, *args: tensor),
        ]:
            stack.enter_context(patch.object(owner, name, value))
        yield
