"""What a quantised matrix product multiplies: operands that are exact in BF16.

An E2M1 code has at most 2 significant bits and an E4M3 scale at most 4, so code * scale is a
BF16 number without error, and so is an E4M3 or E5M2 code times a power of two. A BF16 product of
such operands with FP32 accumulation, times the factors of both, is the product of the quantised
matrices up to the order of the sum.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from nemomodel.quant import compiled
from nemomodel.quant.formats import MXFP8_E4M3
from nemomodel.quant.hadamard import SIGNS, hadamard_matrix, transform_rows
from nemomodel.quant.mx import encode_mx
from nemomodel.quant.nvfp4 import LARGEST, encode, max_over_ranks
from nemomodel.quant.rounding import exp2
from nemomodel.quant.tiles import from_tiles, to_tiles

Along = Literal["columns", "rows", "both"]
"""The dimension a block extends along; NVFP4 has square blocks too."""

Key = tuple[int, int]
"""Of a stream of random bits; see `stream_key`."""


@dataclass(frozen=True)
class OperandFormat:
    """How one operand of one product is quantised."""

    format: Literal["nvfp4", "mxfp8"]
    along: Along
    stochastic: bool = False
    hadamard: bool = False
    """Transform groups of 16 rows first; both operands of a product have to."""

    def __post_init__(self) -> None:
        assert self.format == "nvfp4" or self.along != "both", "MX formats have no square blocks"

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        size = 16 if self.format == "nvfp4" else MXFP8_E4M3.block_size
        return {"columns": (1, size), "rows": (size, 1), "both": (size, size)}[self.along]

    def rows_of(self, rows: int) -> int:
        """Rows of the operand of a matrix with `rows`: whole groups where a transform mixes."""
        return -(-rows // len(SIGNS)) * len(SIGNS) if self.hadamard else rows

    def __str__(self) -> str:
        a, b = self.block
        extras = [" SR"] * self.stochastic + [" RHT"] * self.hadamard
        return f"{self.format} {a}x{b}{''.join(extras)}"


@dataclass(frozen=True)
class Place2D:
    """Where a matrix lies in the whole one that ranks share.

    Element (r, c) takes the random bits of number (row + r) * width + columns[c], in int32 with
    wrap-around. Ranks cut between blocks, and between groups of a transform.
    """

    row: int
    """Of its first row."""
    columns: Tensor | None
    """int32 [K], of each of its columns; None is 0, 1, 2 .."""
    width: int
    """Columns of the whole matrix."""


@dataclass(frozen=True)
class ExactOperand:
    """value = values * factor."""

    values: Tensor
    """[M, K] in the dtype that the product runs in, code times block scale."""
    factor: Tensor | None
    """FP32 scalar; None is 1."""
    amax: Tensor | None = None
    """FP32 scalar, the largest magnitude of the matrix; not finite where an element is not.
    None: whoever quantised did not need it."""


@dataclass(frozen=True)
class GroupedOperand:
    """Matrices below each other, each quantised by itself: value = values * factor of its group."""

    values: Tensor
    """[R, K]; rows after the last group are undefined."""
    factor_E: Tensor | None
    """FP32; None is 1."""
    rows: list[int]
    """Of each group in `values`."""
    amax_E: Tensor | None = None

    def __iter__(self) -> Iterator[ExactOperand]:
        values = self.values[: sum(self.rows)].split(self.rows)
        none = itertools.repeat(None)
        factors = none if self.factor_E is None else self.factor_E.unbind()
        amax = none if self.amax_E is None else self.amax_E.unbind()
        return map(ExactOperand, values, factors, amax)


def quantize_operand(
    x_MK: Tensor,
    format: OperandFormat,
    *,
    key: Key | None = None,
    place: Place2D | None = None,
    amax_group: dist.ProcessGroup | None = None,
) -> ExactOperand:
    """Quantise a matrix for one product. Padding to whole blocks is cut off again, but for rows
    that a transform mixes: there M is rounded up to a multiple of 16.

    On a GPU by Triton, on a CPU by torch.compile where the matrix is large and there is a
    compiler, else in plain PyTorch: the same bits.

    Args:
        x_MK: BF16 or FP32; values have its dtype.
        key: stream of stochastic rounding; required exactly where the format rounds so.
        place: None is a whole matrix, padded to whole blocks.
        amax_group: ranks that share the matrix, over which the largest magnitude is taken.
    """
    assert (key is not None) == format.stochastic, (format, key)
    if x_MK.is_cuda:
        from nemomodel.quant.kernels import quantize_matrix

        return quantize_matrix(x_MK, format, key=key, place=place, amax_group=amax_group)
    if compiled.takes(x_MK):
        rows, out_rows = len(x_MK), format.rows_of(len(x_MK))
        parts = [compiled.Part(0, rows, 0, out_rows, key)]
        place = place or _whole(x_MK, format)
        values, amax = compiled.quantize(
            x_MK, format, parts, out_rows=out_rows, place=place, amax_group=amax_group
        )
        return ExactOperand(values, _factor(amax[0], format), amax[0])
    return quantize_plain(x_MK, format, key=key, place=place, amax_group=amax_group)


def quantize_plain(
    x_MK: Tensor,
    format: OperandFormat,
    *,
    key: Key | None = None,
    place: Place2D | None = None,
    amax_group: dist.ProcessGroup | None = None,
) -> ExactOperand:
    """`quantize_operand` in plain PyTorch, on any device: what the other ways have to equal."""
    if format.hadamard:
        x_MK = transform_rows(x_MK, hadamard_matrix().to(x_MK.device))
    tiles = to_tiles(x_MK, format.block).float()
    counter = None
    if key is not None and place is not None:
        counter = to_tiles(_counter(place, x_MK), format.block)
    amax = tiles.abs().amax() if x_MK.numel() else tiles.new_zeros(())
    if format.format == "mxfp8":
        codes, exponents = encode_mx(tiles, MXFP8_E4M3.element, "rceil", key=key, counter=counter)
        scales = exp2(exponents)
    else:
        if amax_group is not None:
            max_over_ranks(amax, amax_group)
        codes, scales = encode(tiles, amax, key=key, counter=counter)
    values = from_tiles(codes * scales, tuple(x_MK.shape)).to(x_MK.dtype)
    return ExactOperand(values, _factor(amax, format), amax)


def quantize_groups(
    x_RK: Tensor,
    format: OperandFormat,
    rows: Sequence[int],
    counts: Sequence[int],
    *,
    keys: Sequence[Key] | None = None,
    place: Place2D | None = None,
    amax_group: dist.ProcessGroup | None = None,
) -> GroupedOperand:
    """`quantize_operand` of the first counts[e] of the rows[e] consecutive rows of every group e.
    The other rows count as zeros, and are.

    Args:
        keys: the stream of every group; required exactly where the format rounds stochastically.
        place, amax_group: of every group; see `quantize_operand`.
    """
    assert (keys is not None) == format.stochastic, (format, keys)
    if x_RK.is_cuda:
        from nemomodel.quant import kernels

        return kernels.quantize_groups(
            x_RK, format, rows, counts, keys=keys, place=place, amax_group=amax_group
        )
    streams = keys or [None] * len(rows)
    out_rows = [format.rows_of(n) for n in rows]
    starts, outs = ([0, *itertools.accumulate(n)][:-1] for n in (rows, out_rows))
    groups = list(zip(starts, counts, outs, out_rows, streams, strict=True))
    if compiled.takes(x_RK):
        values, amax_E = compiled.quantize(
            x_RK,
            format,
            [compiled.Part(*group) for group in groups],
            out_rows=sum(out_rows),
            place=place or _whole(x_RK, format),
            amax_group=amax_group,
        )
        return GroupedOperand(values, _factor(amax_E, format), out_rows, amax_E)
    values = x_RK.new_zeros(sum(out_rows), x_RK.shape[1])
    amax_E = x_RK.new_zeros(len(rows), dtype=torch.float32)
    for e, (start, count, out, _, key) in enumerate(groups):
        operand = quantize_plain(
            x_RK[start : start + count], format, key=key, place=place, amax_group=amax_group
        )
        values[out : out + len(operand.values)] = operand.values
        amax_E[e] = operand.amax
    return GroupedOperand(values, _factor(amax_E, format), out_rows, amax_E)


def _whole(x_MK: Tensor, format: OperandFormat) -> Place2D:
    """Of a matrix that is not shared."""
    columns = format.block[1]
    return Place2D(0, None, -(-x_MK.shape[1] // columns) * columns)


def _counter(place: Place2D, x_MK: Tensor) -> Tensor:
    """int32 [M, K], the number of every element in its stream."""
    M, K = x_MK.shape
    rows = torch.arange(place.row, place.row + M, device=x_MK.device)[:, None] * place.width
    columns = torch.arange(K, device=x_MK.device) if place.columns is None else place.columns
    return (rows + columns).to(torch.int32)


def _factor(amax: Tensor, format: OperandFormat) -> Tensor | None:
    return amax * (1 / LARGEST) if format.format == "nvfp4" else None


def product(left: ExactOperand, right: ExactOperand, *, out: Tensor | None = None) -> Tensor:
    """left @ right in the dtype of the values, rounded once: after the factors.

    Args:
        out: where it goes; on a GPU it may be FP32, and then nothing is rounded.

    On a CPU the factor is read by the host; on a GPU nothing waits.
    """
    a, b = left.values, right.values
    factors = [f for f in (left.factor, right.factor) if f is not None]
    if not factors:
        if out is not None and out.dtype != a.dtype:
            return out.copy_(torch.mm(a, b, out_dtype=out.dtype))
        return torch.mm(a, b, out=out)
    factor = factors[0] if len(factors) == 1 else factors[0] * factors[1]
    if a.device.type == "cpu":
        return torch.addmm(a.new_zeros(1), a, b, beta=0, alpha=factor.item(), out=out)
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out).mul_(factor)
    wide = torch.mm(a, b, out_dtype=torch.float32).mul_(factor)
    return wide.to(a.dtype) if out is None else out.copy_(wide)
