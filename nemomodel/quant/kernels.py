"""The quantiser of operands as Triton kernels, with the bits of the plain one in `operand.py`.

Two passes over a matrix, one for the largest magnitude and one that rounds, move 6 bytes per
BF16 element in NVFP4; MXFP8 needs the second only, 4 bytes. Every FP32 operation is that of
`nvfp4.py`, `mx.py`, `rounding.py` and `hadamard.py`, in their order, and none is fused with
another. Magnitudes are compared by their bits as integers: exact in any order, and NaN is above
all numbers.

Run in Triton's interpreter and compiled for compute capability 9.0, 10.0 and 12.0. No GPU has run
it yet: tile sizes are reasoned, not measured.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from torch import Tensor

from nemomodel.quant.hadamard import SIGNS
from nemomodel.quant.kernel_math import (
    E2M1,
    E4M3,
    magnitude_bits,
    mxfp8_scales,
    nvfp4_scales,
    random_bits,
    round_nearest,
    round_stochastic,
    round_to_bf16,
)
from nemomodel.quant.nvfp4 import LARGEST
from nemomodel.quant.operand import ExactOperand, GroupedOperand, Key, OperandFormat, Place2D

SIGN_BITS = sum((sign < 0) << i for i, sign in enumerate(SIGNS))


def quantize_matrix(
    x_MK: Tensor,
    format: OperandFormat,
    *,
    key: Key | None,
    place: Place2D | None,
    amax_group: dist.ProcessGroup | None,
) -> ExactOperand:
    """`operand.quantize_operand` of a CUDA tensor. Nothing waits for the device."""
    rows, out_rows = len(x_MK), format.rows_of(len(x_MK))
    values = x_MK.new_empty(out_rows, x_MK.shape[1])
    launch = _Launch(x_MK, format, -(-out_rows // _tile(format)[0]), groups=0, table=None)
    factor, amax = launch.run(rows, values, key or (0, 0), place, amax_group)
    return ExactOperand(values, None if factor is None else factor[0], amax[0])


def quantize_groups(
    x_RK: Tensor,
    format: OperandFormat,
    rows: Sequence[int],
    counts: Sequence[int],
    *,
    keys: Sequence[Key] | None,
    place: Place2D | None,
    amax_group: dist.ProcessGroup | None,
) -> GroupedOperand:
    """`operand.quantize_groups` of a CUDA tensor: one launch per pass, whatever the groups."""
    out_rows = [format.rows_of(n) for n in rows]
    values = x_RK.new_empty(sum(out_rows), x_RK.shape[1])
    tiles = [-(-n // _tile(format)[0]) for n in out_rows]
    if list(rows) == list(counts) == [len(x_RK)]:  # needs no table
        launch = _Launch(x_RK, format, tiles[0], groups=0, table=None)
        key = keys[0] if keys else (0, 0)
        factor_E, amax_E = launch.run(len(x_RK), values, key, place, amax_group)
        return GroupedOperand(values, factor_E, out_rows, amax_E)
    ends = [list(itertools.accumulate(n)) for n in (tiles, rows, out_rows)]
    starts = [[0, *end[:-1]] for end in ends]
    streams = zip(*(keys or [(0, 0)] * len(rows)), strict=True)
    # As `_place` and `_quantize` read it.
    columns = [ends[0], *starts, counts, out_rows, *streams]
    table = torch.tensor(columns, dtype=torch.int32, pin_memory=x_RK.is_cuda)
    table = table.to(x_RK.device, non_blocking=True)
    launch = _Launch(x_RK, format, sum(tiles), groups=len(rows), table=table)
    factor_E, amax_E = launch.run(0, values, (0, 0), place, amax_group)
    return GroupedOperand(values, factor_E, out_rows, amax_E)


def _tile(format: OperandFormat) -> tuple[int, int]:
    """Rows and columns of a program, which is one warp: a thread has 64 values, all rows of 2 or 4
    neighbouring columns, so that maxima along rows and the transform stay within it."""
    return (32, 64) if (format.format, format.along) == ("mxfp8", "rows") else (16, 128)


class _Launch:
    """The passes over one matrix, or over the `groups` of a table."""

    def __init__(
        self, x: Tensor, format: OperandFormat, tiles: int, *, groups: int, table: Tensor | None
    ) -> None:
        self.x = x if x.stride(1) == 1 else x.contiguous()
        self.format, self.table = format, table
        tile = _tile(format)
        self.grid = (tiles * triton.cdiv(x.shape[1], tile[1]),)
        signs = SIGN_BITS if format.hadamard else None
        self.options = {"TILE": tile, "GROUPS": groups, "SIGNS": signs}

    def run(
        self,
        rows: int,
        values: Tensor,
        key: Key,
        place: Place2D | None,
        amax_group: dist.ProcessGroup | None,
    ) -> tuple[Tensor | None, Tensor]:
        """Fill `values`; the FP32 factors and largest magnitudes of all groups."""
        bits = torch.zeros(self.options["GROUPS"] or 1, dtype=torch.int32, device=self.x.device)
        nvfp4 = self.format.format == "nvfp4"
        if nvfp4:
            self._launch(_amax, rows, bits)
            if amax_group is not None:
                dist.all_reduce(bits, dist.ReduceOp.MAX, amax_group)
        block, K = self.format.block, self.x.shape[1]
        whole = 0, None, -(-K // block[1]) * block[1]
        row, ids, width = (place.row, place.columns, place.width) if place else whole
        self._launch(
            _quantize,
            rows,
            bits,
            *(values, len(values), _int32(row), _int32(width), ids, *key),
            BLOCK=block,
            NVFP4=nvfp4,
            STOCHASTIC=self.format.stochastic,
        )
        amax = bits.view(torch.float32)
        return amax * (1 / LARGEST) if nvfp4 else None, amax

    def _launch(self, kernel: Any, rows: int, *args: Any, **options: Any) -> None:
        if self.grid[0]:
            where = self.x, self.x.stride(0), rows, self.x.shape[1], self.table
            options |= self.options
            kernel[self.grid](*where, *args, **options, num_warps=1, enable_fp_fusion=False)


def _int32(number: int) -> int:
    """Wrapped around, as counters do."""
    return (number + 2**31) % 2**32 - 2**31


@triton.jit(do_not_specialize=["rows"])
def _amax(
    x,
    stride,
    rows,
    columns,
    table,
    amax,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
    SIGNS: tl.constexpr,
):
    """The bits of the largest magnitude of every group."""
    group, row, c, first, _, rows = _place(rows, columns, table, TILE, GROUPS)
    v = _load(x, stride, first, row, rows, c, columns, TILE, SIGNS)
    _raise(amax + group, tl.max(magnitude_bits(v)))


@triton.jit(do_not_specialize=["rows", "out_rows", "place_row", "width", "key0", "key1"])
def _quantize(
    x,
    stride,
    rows,
    columns,
    table,
    amax,
    values,
    out_rows,
    place_row,
    width,
    column_ids,
    key0,
    key1,
    TILE: tl.constexpr,
    GROUPS: tl.constexpr,
    SIGNS: tl.constexpr,
    BLOCK: tl.constexpr,
    NVFP4: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """Code times block scale of every element, and for MXFP8 what `_amax` makes for NVFP4."""
    group, row, c, first, out_first, rows = _place(rows, columns, table, TILE, GROUPS)
    v = _load(x, stride, first, row, rows, c, columns, TILE, SIGNS)
    BLOCKS: tl.constexpr = (TILE[0] // BLOCK[0], BLOCK[0], TILE[1] // BLOCK[1], BLOCK[1])
    v = tl.reshape(v, BLOCKS)
    largest = tl.max(tl.max(magnitude_bits(v), 3, keep_dims=True), 1, keep_dims=True)
    if NVFP4:
        ELEMENT: tl.constexpr = E2M1
        encode, decode = nvfp4_scales(largest, tl.load(amax + group))
    else:
        ELEMENT: tl.constexpr = E4M3
        encode, decode = mxfp8_scales(largest)
        _raise(amax + group, tl.max(largest))
    r = row + tl.arange(0, TILE[0])
    if STOCHASTIC:
        if GROUPS:
            key0 = tl.load(table + 6 * GROUPS + group)
            key1 = tl.load(table + 7 * GROUPS + group)
        ids = c
        if column_ids is not None:
            ids = tl.load(column_ids + c, mask=c < columns, other=0)
        counter = (place_row + r)[:, None] * width + ids[None, :]
        bits = tl.reshape(random_bits(counter, key0, key1), BLOCKS)
        v = round_stochastic(v * encode, bits, ELEMENT)
    else:
        v = round_nearest(v * encode, ELEMENT)
    v = tl.reshape(v * decode, TILE)
    if GROUPS:
        out_rows = tl.load(table + 5 * GROUPS + group)
    at = (out_first + r).to(tl.int64)[:, None] * columns + c[None, :]
    mask = (r < out_rows)[:, None] & (c < columns)[None, :]
    tl.store(values + at, v.to(values.dtype.element_ty), mask=mask)


@triton.jit
def _place(rows, columns, table, TILE: tl.constexpr, GROUPS: tl.constexpr):
    """Of a program: its group, its first row in it, its columns; the group's first row in x and
    in the values, and its number of rows."""
    across = tl.cdiv(columns, TILE[1])
    tile = tl.program_id(0) // across
    c = tl.program_id(0) % across * TILE[1] + tl.arange(0, TILE[1])
    # Otherwise a thread takes 8 columns and some of the rows: twice the registers, or shuffles.
    c = tl.max_contiguous(c, TILE[1] // 32)
    group = tile * 0
    first = tile * 0
    out_first = tile * 0
    if GROUPS:
        e = tl.arange(0, triton.next_power_of_2(GROUPS))
        ends = tl.load(table + e, mask=e < GROUPS, other=2147483647)
        group = tl.sum((ends <= tile).to(tl.int32), 0)
        tile -= tl.load(table + 1 * GROUPS + group)
        first = tl.load(table + 2 * GROUPS + group)
        out_first = tl.load(table + 3 * GROUPS + group)
        rows = tl.load(table + 4 * GROUPS + group)
    return group, tile * TILE[0], c, first, out_first, rows


@triton.jit
def _load(x, stride, first, row, rows, c, columns, TILE: tl.constexpr, SIGNS: tl.constexpr):
    """A tile in FP32, zeros where there is no x; transformed and rounded to x's dtype."""
    r = row + tl.arange(0, TILE[0])
    at = (first + r).to(tl.int64)[:, None] * stride + c[None, :]
    v = tl.load(x + at, mask=(r < rows)[:, None] & (c < columns)[None, :], other=0).to(tl.float32)
    if SIGNS is not None:
        negative = (SIGNS >> tl.arange(0, TILE[0])) & 1
        v = v * tl.where(negative != 0, -0.25, 0.25)[:, None]
        for _ in tl.static_range(4):
            even, odd = tl.split(tl.permute(tl.reshape(v, (8, 2, TILE[1])), (0, 2, 1)))
            v = tl.reshape(tl.permute(tl.join(even + odd, even - odd), (2, 0, 1)), TILE)
        if x.dtype.element_ty == tl.bfloat16:
            v = round_to_bf16(v)
    return v


@triton.jit
def _raise(amax, bits):
    # The value read may be old, which costs an update more; mostly it saves one.
    tl.atomic_max(amax, bits, mask=bits > tl.load(amax))
