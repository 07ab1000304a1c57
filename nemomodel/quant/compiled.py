"""The quantiser of operands on CPUs, compiled by torch.compile, with the bits of the plain one.

The passes over a matrix, or over the matrices of all experts at once:

    transform    rows, where the format has one                 compiled
    peaks        the largest magnitude of every block           compiled
    amax         of every matrix, from the peaks                small
    scales       of every block                                 compiled
    values       code times scale                               compiled

Each is a graph of its own, for any size: fused into one, a scale would be computed again for every
element. Inductor goes through memory where a float is read as an integer, so elements of E2M1 are
rounded with comparisons here. Small matrices are not worth a call, nor a wait for the compiler.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nemomodel.ops.fused import compiled, has_compiler
from nemomodel.quant.formats import E4M3
from nemomodel.quant.hadamard import SIGNS
from nemomodel.quant.mx import block_exponents
from nemomodel.quant.nvfp4 import block_scales, max_over_ranks
from nemomodel.quant.rounding import exp2, hash_counter, round_nearest, round_stochastic

if TYPE_CHECKING:
    from nemomodel.quant.operand import OperandFormat, Place2D

WORTH_A_CALL = 2**17
"""Elements from which compiled passes are used: their calls take as long as the plain quantiser
does for about 2^14, and programs that have only small matrices do not wait for the compiler."""
LANES = 16
"""Every pass sees the columns in groups of as many."""
_FIXED = (1, LANES)
"""Sizes that are compiled in."""


@dataclass(frozen=True)
class Part:
    """Consecutive rows that are quantised as a matrix of their own."""

    row: int
    rows: int
    out_row: int
    """Where the operand's rows begin in the result."""
    out_rows: int
    """At least `rows`; the others are zero but for what a transform mixes into them."""
    key: tuple[int, int] | None
    """Stream of stochastic rounding."""


def takes(x: Tensor) -> bool:
    """Whether this quantiser is the one for x."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.bfloat16, torch.float32)
        and x.numel() >= WORTH_A_CALL
        and has_compiler()
    )


@torch.no_grad()
def quantize(
    x_MK: Tensor,
    format: "OperandFormat",
    parts: Sequence[Part],
    *,
    out_rows: int,
    place: "Place2D",
    amax_group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Quantise every part of x by itself.

    Args:
        x_MK: BF16 or FP32 on a CPU.
        out_rows: rows of the result; the parts cover them all, in order.
        place: of every part in the matrix that ranks share.

    Returns:
        values [out_rows, K] in the dtype of x, code times block scale, and the largest magnitude
        of every part, FP32, over the ranks of `amax_group` in NVFP4.
    """
    K, (a, b) = x_MK.shape[1], format.block
    heights = [-(-part.out_rows // a) * a for part in parts]
    laid = _lay_out(x_MK, parts, heights, columns=-(-K // max(b, LANES)) * max(b, LANES))
    if format.hadamard:
        laid = _run(_transform, laid.view(-1, len(SIGNS), laid.shape[1])).flatten(0, 1)
    height = 1 if a == 1 else LANES
    groups = laid.view(-1, height, laid.shape[1] // LANES, LANES)
    peaks = _peaks(groups, format)
    band_amax = peaks.flatten(1).amax(1)
    part_of = torch.arange(len(parts)).repeat_interleave(torch.tensor(heights) // height)
    amax = torch.zeros(len(parts)).scatter_reduce_(0, part_of, band_amax, "amax")
    if format.format == "mxfp8":
        exponents = block_exponents(peaks, E4M3, "rceil")
        multipliers, scales = exp2(-exponents), exp2(exponents)
    else:
        if amax_group is not None:
            max_over_ranks(amax, amax_group)
        multipliers, scales = _run(_nvfp4_scales, peaks, amax[part_of].view(-1, 1, 1, 1))
    args = [groups, multipliers, scales]
    if format.stochastic:
        args += _streams(parts, heights, place, groups)
    if format.hadamard and format.along == "rows":
        _run(_IN_PLACE[format.format, format.stochastic], *args)
        values = laid
    else:
        values = _run(_VALUES[format.format, format.stochastic], *args).view(laid.shape)
    if sum(heights) != out_rows:
        pieces = zip(values.split(heights), parts, strict=True)
        values = torch.cat([piece[: part.out_rows] for piece, part in pieces])
    return values[:, :K], amax


def _lay_out(
    x_MK: Tensor, parts: Sequence[Part], heights: Sequence[int], *, columns: int
) -> Tensor:
    """Contiguous, every part `heights` tall and what is not its own zero; x if it is so already."""
    if columns == x_MK.shape[1] and all(
        part.row == start and part.rows == height
        for part, start, height in zip(parts, _starts(heights), heights, strict=True)
    ):
        return x_MK[: sum(heights)].contiguous()
    laid = x_MK.new_zeros(sum(heights), columns)
    for piece, part in zip(laid.split(heights), parts, strict=True):
        piece[: part.rows, : x_MK.shape[1]] = x_MK[part.row : part.row + part.rows]
    return laid


def _starts(heights: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(heights)][:-1]


def _peaks(groups: Tensor, format: "OperandFormat") -> Tensor:
    """The largest magnitude of every block, FP32, [G, 1, C, 1] or [G, 1, C, LANES] for groups
    [G, height, C, LANES]; of a block that is several groups, once for each."""
    dim = 2 if format.along == "columns" else 0
    peaks = _run(_peaks_of_columns if dim else _peaks_of_rows, groups)
    if format.along == "both":
        return peaks.amax(-1, keepdim=True)
    if (several := max(format.block) // LANES) == 1:
        return peaks
    blocks = peaks.unflatten(dim, (-1, several))
    return blocks.amax(dim + 1, keepdim=True).expand_as(blocks).flatten(dim, dim + 1)


def _streams(
    parts: Sequence[Part], heights: Sequence[int], place: "Place2D", groups: Tensor
) -> list[Tensor]:
    """Of every row its first number in the counter, of every column what it adds, and of every row
    the two halves of its key; int32, broadcast against `groups`."""
    rows = torch.cat([torch.arange(place.row, place.row + height) for height in heights])
    columns = torch.arange(groups.shape[2] * LANES)
    if place.columns is not None:
        columns = F.pad(place.columns, (0, len(columns) - len(place.columns)))
    keys = torch.tensor([part.key for part in parts]).repeat_interleave(torch.tensor(heights), 0)
    by_row = [(rows * place.width), *keys.unbind(1)]
    first, *halves = (t.to(torch.int32).view(*groups.shape[:2], 1, 1) for t in by_row)
    return [first, columns.to(torch.int32).view(-1, LANES), *halves]


def _transform(x_GRK: Tensor) -> Tensor:
    """`transform_rows`, written out: its 16 rows stay in registers."""
    factor = len(SIGNS) ** -0.5
    rows = [x.float() * (sign * factor) for x, sign in zip(x_GRK.unbind(1), SIGNS, strict=True)]
    for _ in range(len(SIGNS).bit_length() - 1):
        pairs = list(zip(rows[::2], rows[1::2], strict=True))
        rows = [even + odd for even, odd in pairs] + [even - odd for even, odd in pairs]
    return torch.stack([row.to(x_GRK.dtype) for row in rows], dim=1)


def _peaks_of_columns(groups: Tensor) -> Tensor:
    return groups.float().abs().amax(-1, keepdim=True)


def _peaks_of_rows(groups: Tensor) -> Tensor:
    """Written out: a reduction would read every column of a row by itself."""
    first, *others = (row.float().abs() for row in groups.unbind(1))
    return functools.reduce(torch.maximum, others, first).unsqueeze(1)


def _nvfp4_scales(peaks: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """`block_scales`; E4M3 fits into BF16, which is half the memory to pass."""
    multipliers, scales = block_scales(peaks, amax)
    return multipliers, scales.bfloat16()


def _nvfp4_values(x: Tensor, multipliers: Tensor, scales: Tensor) -> Tensor:
    return (_nearest_e2m1(x.float() * multipliers) * scales).to(x.dtype)


def _mxfp8_values(x: Tensor, multipliers: Tensor, scales: Tensor) -> Tensor:
    return (round_nearest(x.float() * multipliers, E4M3) * scales).to(x.dtype)


def _nvfp4_draws(
    x: Tensor,
    multipliers: Tensor,
    scales: Tensor,
    row: Tensor,
    column: Tensor,
    key0: Tensor,
    key1: Tensor,
) -> Tensor:
    bits = hash_counter(row + column, (key0, key1))
    return (_stochastic_e2m1(x.float() * multipliers, bits) * scales).to(x.dtype)


def _mxfp8_draws(
    x: Tensor,
    multipliers: Tensor,
    scales: Tensor,
    row: Tensor,
    column: Tensor,
    key0: Tensor,
    key1: Tensor,
) -> Tensor:
    bits = hash_counter(row + column, (key0, key1))
    return (round_stochastic(x.float() * multipliers, E4M3, bits) * scales).to(x.dtype)


_VALUES = {
    ("nvfp4", False): _nvfp4_values,
    ("nvfp4", True): _nvfp4_draws,
    ("mxfp8", False): _mxfp8_values,
    ("mxfp8", True): _mxfp8_draws,
}


def _in_place(values: Callable[..., Tensor]) -> Callable[..., None]:
    """Over x itself: fresh memory costs as much as the arithmetic. (Not so where blocks lie along
    columns: the compiler makes scalar code of that.)"""

    def overwrite(x: Tensor, *args: Tensor) -> None:
        x.copy_(values(x, *args))

    return overwrite


_IN_PLACE = {kind: _in_place(values) for kind, values in _VALUES.items()}


def _nearest_e2m1(v: Tensor) -> Tensor:
    """`round_nearest`, with its powers of two from comparisons."""
    v = v.clamp(-6, 6)
    m = v.abs()
    shift = 1.5 * 2.0**22 * torch.where(m < 2, 1.0, torch.where(m < 4, 2.0, 4.0))
    return (v + shift) - shift


def _stochastic_e2m1(v: Tensor, bits: Tensor) -> Tensor:
    """`round_stochastic` in steps of the result: t has its 22 bits below one, and none is lost."""
    m = v.abs().clamp(max=6.0)
    low = m < 1
    m = torch.where(low, m + 1, m)
    step = torch.where(m < 2, 0.5, torch.where(m < 4, 1.0, 2.0))
    per_step = torch.where(m < 2, 2.0, torch.where(m < 4, 1.0, 0.5))
    t = (m * per_step - 2) + ((bits >> 10) & (2**22 - 1)).float() * 2.0**-22
    # Just below 1, m + 1 is 2 and its step that of 2.
    q = t.floor() * step + torch.where(low, 2 * step - 1, 2 * step)
    return torch.copysign(q, v)


def _run(function: Callable[..., Any], *args: Tensor) -> Any:
    """function(*args), compiled for every dtype and kind of broadcasting, not for every size.
    The compiler also makes a difference between the start of a storage and the rest.
    """
    kinds = (
        (arg.dtype, arg.storage_offset() == 0, *(size in _FIXED and size for size in arg.shape))
        for arg in args
    )
    # Of a view, the graph would be for its base too.
    return _graph(function, tuple(kinds))(*(arg.detach() for arg in args))


class _Graph:
    """A compiled function whose first call leaves sizes open."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.open = compiled(function), False

    def __call__(self, *args: Tensor) -> Any:
        if self.open:
            return self.function(*args)
        self.open = True
        for arg in args:
            for dim, size in enumerate(arg.shape):
                if size not in _FIXED:
                    torch._dynamo.maybe_mark_dynamic(arg, dim)
        # Sizes that are equal by chance are not to be so for ever.
        with torch.fx.experimental._config.patch(use_duck_shape=False):
            return self.function(*args)


@functools.cache
def _graph(function: Callable[..., Any], kinds: tuple) -> _Graph:
    return _Graph(function)
