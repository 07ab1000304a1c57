"""What ranks exchange inside a model, with gradients. On an axis of one rank nothing happens.

The collectives are megatron-core's; it is imported where there is somebody to exchange with.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nemomodel.parallel.mesh import Axis


def gather_positions(x_SBD: Tensor, axis: Axis) -> Tensor:
    """The positions of all ranks, from this rank's; gradients are summed over the ranks."""
    if axis.size == 1:
        return x_SBD
    from megatron.core.tensor_parallel import mappings

    return mappings.gather_from_sequence_parallel_region(x_SBD.contiguous(), group=axis.group)


def scatter_positions(partial_SBD: Tensor, axis: Axis) -> Tensor:
    """The sum over ranks of `partial_SBD`, of which this rank gets its positions."""
    if axis.size == 1:
        return partial_SBD
    from megatron.core.tensor_parallel import mappings

    return mappings.reduce_scatter_to_sequence_parallel_region(
        partial_SBD.contiguous(), group=axis.group
    )


def positions_to_heads(x_SBC: Tensor, parts: Sequence[Sequence[range]], axis: Axis) -> Tensor:
    """From some positions with all channels to all positions with some channels.

    Args:
        parts: the channels that each rank gets, one after the other; several may get the same.

    Returns:
        [S * ranks, B, C'].
    """
    if axis.size == 1:
        return x_SBC
    from megatron.core.tensor_parallel import mappings

    sent = [torch.cat([x_SBC[..., r.start : r.stop] for r in ranges], -1) for ranges in parts]
    return mappings.all_to_all(axis.group, torch.cat(sent))


def heads_to_positions(y_SBC: Tensor, axis: Axis) -> Tensor:
    """The way back, when the channels of all ranks together are all, each once, in order."""
    if axis.size == 1:
        return y_SBC
    from megatron.core.tensor_parallel import mappings

    received = mappings.all_to_all(axis.group, y_SBC.contiguous())
    return torch.cat(received.chunk(axis.size), -1)


def sum_ranks(t: Tensor, axis: Axis) -> Tensor:
    """The sum over ranks, in place, without gradients."""
    if axis.size > 1:
        dist.all_reduce(t, group=axis.group)
    return t


def max_ranks(t: Tensor, axis: Axis) -> Tensor:
    """The largest of all ranks, in place, without gradients."""
    if axis.size > 1:
        dist.all_reduce(t, op=dist.ReduceOp.MAX, group=axis.group)
    return t


def attach(x: Tensor, loss: Tensor) -> Tensor:
    """x; its backward pass also runs that of `loss`, a scalar that is added to the total."""
    return _Attach.apply(x, loss)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, loss):
        ctx.like = torch.ones_like(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return dx, ctx.like
