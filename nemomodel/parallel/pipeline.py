"""Forward and backward passes over the micro-batches of a step, on one stage or on many.

The schedules are megatron-core's. A stage sends what its model calls `total`, one tensor, and gets
the gradient of that back.
"""

from collections.abc import Callable, Iterator
from itertools import count

import torch
from torch import Tensor

from nemomodel.parallel import cpu

cpu.install()  # before the first import of megatron

from megatron.core.distributed import DistributedDataParallel  # noqa: E402
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator  # noqa: E402
from megatron.core.pipeline_parallel.schedules import (  # noqa: E402
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402

Forward = Callable[[int, Tensor | None], Tensor]
"""The output of one micro-batch, by its number, from what the stage before sent."""


def run_micro_batches(
    ddp: DistributedDataParallel,
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
        shape: [rows, B, D] of what stages exchange.
    """
    if groups.pp.size() > 1:
        _pipeline(ddp, forward, number, groups, shape, backward)
        return
    if not backward:
        for i in range(number):
            forward(i, None)
        return
    with ddp.no_sync():
        for i in range(number - 1):
            forward(i, None).backward()
    forward(number - 1, None).backward()


def _pipeline(
    ddp: DistributedDataParallel,
    forward: Forward,
    number: int,
    groups: ProcessGroupCollection,
    shape: tuple[int, int, int],
    backward: bool,
) -> None:
    config = ddp.config
    rows, batch_size, _ = shape
    config.no_sync_func = ddp.no_sync
    received: list[Tensor | None] = [None]
    ddp.module.set_input_tensor = lambda tensors: received.__setitem__(0, tensors[0])

    def step(numbers: Iterator[int], _: object) -> tuple[Tensor, Callable]:
        output = forward(next(numbers), received[0])
        # The number of tokens, and what to log: sums are kept by `forward`.
        return output, lambda loss: (loss, torch.zeros((), dtype=torch.int), {})

    try:
        forward_backward_pipelining_without_interleaving(
            forward_step_func=step,
            data_iterator=count(),
            model=ddp,
            num_microbatches=number,
            # What megatron-core divides by the ranks that share a sequence.
            seq_length=rows * groups.cp.size() * groups.tp.size(),
            micro_batch_size=batch_size,
            forward_only=not backward,
            p2p_communicator=P2PCommunicator(pp_group=groups.pp, config=config),
            pg_collection=groups,
        )
    finally:
        del ddp.module.set_input_tensor
