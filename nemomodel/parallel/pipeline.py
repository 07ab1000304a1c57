"""Forward and backward passes over the micro-batches of a step, on one stage or on many.

The schedules are megatron-core's. A stage sends what its model calls `total`, one tensor, and gets
the gradient of that back.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import count

import torch
from torch import Tensor

from nemomodel.parallel import cpu

cpu.install()  # before the first import of megatron

from megatron.core.distributed import DistributedDataParallel  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator  # noqa: E402
from megatron.core.pipeline_parallel.schedules import (  # noqa: E402
    forward_backward_pipelining_with_interleaving,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402

Chunks = Sequence[DistributedDataParallel]
Forward = Callable[[int, int, Tensor | None], Tensor]
"""The output of a chunk for one micro-batch, by their numbers, from what the stage before sent."""


def run_micro_batches(
    chunks: Chunks,
    forward: Forward,
    number: int,
    *,
    groups: ProcessGroupCollection,
    shape: tuple[int, int, int],
    backward: bool = True,
) -> None:
    """Pass micro-batches 0 .. number - 1 forward and, but for validation, backward, in order.

    Gradients of ranks are reduced with the last backward pass.

    Args:
        chunks: the model, or this rank's stages of a pipeline.
        shape: [rows, B, D] of what stages exchange.
    """
    if groups.pp.size() > 1:
        _pipeline(chunks, forward, number, groups, shape, backward)
        return
    if not backward:
        for i in range(number):
            forward(0, i, None)
        return
    with no_sync(chunks):
        for i in range(number - 1):
            forward(0, i, None).backward()
    forward(0, number - 1, None).backward()


def no_sync(chunks: Chunks) -> ExitStack:
    """A context in which backward passes reduce nothing."""
    stack = ExitStack()
    for chunk in chunks:
        stack.enter_context(chunk.no_sync())
    return stack


def _pipeline(
    chunks: Chunks,
    forward: Forward,
    number: int,
    groups: ProcessGroupCollection,
    shape: tuple[int, int, int],
    backward: bool,
) -> None:
    rows, batch_size, _ = shape
    received: list[Tensor | None] = [None] * len(chunks)
    for c, chunk in enumerate(chunks):
        # What megatron-core asks a model for.
        chunk.module.model_type = ModelType.encoder_or_decoder
        chunk.module.set_input_tensor = partial(_receive, received, c)
    config = chunks[0].config
    config.no_sync_func = partial(no_sync, chunks)
    interleaved = len(chunks) > 1

    def step(numbers: Iterator[int], chunk: DistributedDataParallel) -> tuple[Tensor, Callable]:
        c = chunks.index(chunk)
        output = forward(c, next(numbers), received[c])
        # The number of tokens, and what to log: sums are kept by `forward`.
        return output, lambda loss: (loss, torch.zeros((), dtype=torch.int), {})

    schedule = (
        forward_backward_pipelining_with_interleaving
        if interleaved
        else forward_backward_pipelining_without_interleaving
    )
    schedule(
        forward_step_func=step,
        data_iterator=[count() for _ in chunks] if interleaved else count(),
        model=list(chunks) if interleaved else chunks[0],
        num_microbatches=number,
        # What megatron-core divides by the ranks that share a sequence.
        seq_length=rows * groups.cp.size() * groups.tp.size(),
        micro_batch_size=batch_size,
        forward_only=not backward,
        p2p_communicator=P2PCommunicator(pp_group=groups.pp, config=config),
        pg_collection=groups,
    )


def _receive(received: list[Tensor | None], c: int, tensors: list[Tensor | None]) -> None:
    received[c] = tensors[0]
