"""Which part of a parameter a rank holds."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Ranges = tuple[range, ...]
"""Indices along one dimension: contiguous runs, in the order in which a rank holds them."""


@dataclass(frozen=True)
class Shard:
    """The product of one list of ranges per dimension, cut out of a whole parameter."""

    shape: tuple[int, ...]
    """Of the whole."""
    ranges: tuple[Ranges, ...]
    """One entry per dimension."""

    @property
    def local_shape(self) -> tuple[int, ...]:
        return tuple(sum(map(len, ranges)) for ranges in self.ranges)

    def cut(self, whole: Tensor) -> Tensor:
        """This part of the whole parameter, a view or a copy."""
        for dim, ranges in enumerate(self.ranges):
            runs = [whole.narrow(dim, r.start, len(r)) for r in ranges]
            whole = runs[0] if len(runs) == 1 else torch.cat(runs, dim)
        return whole

    def pieces(self, local: Tensor) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Every contiguous block: its offset in the whole, and a view of it in `local`."""
        starts = [[0, *itertools.accumulate(map(len, ranges))] for ranges in self.ranges]
        for runs in itertools.product(*(range(len(ranges)) for ranges in self.ranges)):
            piece = local
            for dim, run in enumerate(runs):
                piece = piece.narrow(dim, starts[dim][run], len(self.ranges[dim][run]))
            yield tuple(self.ranges[dim][run].start for dim, run in enumerate(runs)), piece


def whole(shape: Sequence[int]) -> Shard:
    return Shard(tuple(shape), tuple((range(size),) for size in shape))


def shard_of(tensor: Tensor) -> Shard:
    """How `tensor`, a parameter or a buffer, is cut."""
    return getattr(tensor, "shard", None) or whole(tensor.shape)


def parameter(
    *shape: int,
    dtype: torch.dtype,
    rows: Sequence[range] | None = None,
    columns: Sequence[range] | None = None,
) -> nn.Parameter:
    """An uninitialised parameter, or of one with `shape` the part that this rank holds.

    megatron-core's attributes say what gradients need: one that is not cut meets other positions
    on every tensor-parallel rank, so its gradients are summed over them.

    Args:
        rows, columns: ranges of dimensions 0 and 1 that are held; by default everything.
    """
    cuts = [rows, columns, *[None] * len(shape)]
    ranges = tuple(tuple(cut or (range(n),)) for n, cut in zip(shape, cuts, strict=False))
    shard = Shard(shape, ranges)
    param = nn.Parameter(torch.empty(shard.local_shape, dtype=dtype))
    param.shard = shard
    param.tensor_model_parallel = rows is not None or columns is not None
    param.sequence_parallel = not param.tensor_model_parallel
    return param


def expert_parameter(
    *shape: int,
    dtype: torch.dtype,
    experts: range,
    rows: range | None = None,
    columns: range | None = None,
) -> nn.Parameter:
    """Weights [E, rows, columns] of the `experts` that this rank holds, or a part of each."""
    parts = (experts, rows or range(shape[1]), columns or range(shape[2]))
    shard = Shard(shape, tuple((part,) for part in parts))
    param = nn.Parameter(torch.empty(shard.local_shape, dtype=dtype))
    param.shard = shard
    param.allreduce = False  # megatron-core: summed over expert-data-parallel ranks
    param.tensor_model_parallel = rows is not None or columns is not None
    param.sequence_parallel = False
    return param


def is_expert(param: nn.Parameter) -> bool:
    return not getattr(param, "allreduce", True)


def stacked(*blocks: tuple[int, range]) -> list[range]:
    """Rows of blocks that stand below each other: of each its size, and the part that is held."""
    rows, start = [], 0
    for size, part in blocks:
        rows.append(range(start + part.start, start + part.stop))
        start += size
    return rows


def relative(part: range, to: range) -> range:
    """`part` by its place in `to`."""
    return range(part.start - to.start, part.stop - to.start)


def shared_by(heads: range, heads_per_group: int) -> range:
    """The groups that some heads belong to."""
    return range(heads.start // heads_per_group, (heads.stop - 1) // heads_per_group + 1)


def scaled(part: range, width: int) -> range:
    """The elements of those of `part`, each `width` wide: the channels of heads."""
    return range(part.start * width, part.stop * width)
