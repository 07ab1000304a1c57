"""What a quantised matrix product multiplies: operands that are exact in BF16.

An E2M1 code has at most 2 significant bits and an E4M3 scale at most 4, so code * scale is a
BF16 number without error, and so is an E4M3 or E5M2 code times a power of two. A BF16 product of
such operands with FP32 accumulation, times the factors of both, is the product of the quantised
matrices up to the order of the sum.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nemomodel.quant.formats import MXFP8_E4M3, MXFormat
from nemomodel.quant.hadamard import hadamard_matrix, transform_rows
from nemomodel.quant.mx import encode_mx
from nemomodel.quant.nvfp4 import LARGEST, encode
from nemomodel.quant.rounding import exp2
from nemomodel.quant.tiles import from_tiles, to_tiles

Along = Literal["columns", "rows", "both"]
"""The dimension a block extends along; NVFP4 has square blocks too."""


@dataclass(frozen=True)
class OperandFormat:
    """How one operand of one product is quantised."""

    format: Literal["nvfp4", "mxfp8"]
    along: Along
    stochastic: bool = False
    hadamard: bool = False
    """Transform groups of 16 rows first; both operands of a product have to."""

    def __str__(self) -> str:
        size = 16 if self.format == "nvfp4" else MXFP8_E4M3.block_size
        block = {"columns": f"1x{size}", "rows": f"{size}x1", "both": f"{size}x{size}"}[self.along]
        extras = [" SR"] * self.stochastic + [" RHT"] * self.hadamard
        return f"{self.format} {block}{''.join(extras)}"


@dataclass(frozen=True)
class ExactOperand:
    """value = values * factor."""

    values: Tensor
    """[M, K] in the dtype that the product runs in, code times block scale."""
    factor: Tensor | None
    """FP32 scalar; None is 1."""


def quantize_operand(
    x_MK: Tensor, format: OperandFormat, *, key: tuple[int, int] | None = None
) -> ExactOperand:
    """Quantise a matrix for one product. Padding to whole blocks is cut off again, but for rows
    that a transform mixes: there M is rounded up to a multiple of 16.

    Args:
        x_MK: BF16 or FP32; values have its dtype.
        key: stream of stochastic rounding; required exactly where the format rounds so.
    """
    assert (key is not None) == format.stochastic, (format, key)
    if format.hadamard:
        x_MK = transform_rows(x_MK, hadamard_matrix().to(x_MK.device))
    shape = tuple(x_MK.shape)
    if format.format == "mxfp8":
        values = _mx_values(x_MK, MXFP8_E4M3, format.along, key)
        return ExactOperand(from_tiles(values, shape).to(x_MK.dtype), None)
    block = {"columns": (1, 16), "rows": (16, 1), "both": (16, 16)}[format.along]
    tiles = to_tiles(x_MK, block).float()
    amax = tiles.abs().amax()
    codes, scales = encode(tiles, amax, key=key)
    return ExactOperand(from_tiles(codes * scales, shape).to(x_MK.dtype), amax * (1 / LARGEST))


def _mx_values(x_MK: Tensor, format: MXFormat, along: Along, key: tuple[int, int] | None) -> Tensor:
    assert along != "both", "MX formats have no square blocks"
    size = format.block_size
    tiles = to_tiles(x_MK, (1, size) if along == "columns" else (size, 1)).float()
    elements, exponents = encode_mx(tiles, format.element, "rceil", key=key)
    return elements * exp2(exponents)


def product(left: ExactOperand, right: ExactOperand) -> Tensor:
    """left @ right in the dtype of the values, rounded once: after the factors.

    On a CPU the factor is read by the host; on a GPU nothing waits.
    """
    a, b = left.values, right.values
    factors = [f for f in (left.factor, right.factor) if f is not None]
    if not factors:
        return a @ b
    factor = factors[0] if len(factors) == 1 else factors[0] * factors[1]
    if a.device.type == "cpu":
        return torch.addmm(a.new_zeros(1), a, b, beta=0, alpha=factor.item())
    if a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32).mul_(factor).to(a.dtype)
    return (a @ b).mul_(factor)
