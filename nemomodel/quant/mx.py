"""Blocks that share a power of two: MX formats, and shared microexponents (BDR)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nemomodel.quant.formats import BDRFormat, Element, MXFormat, lookup
from nemomodel.quant.rounding import (
    FP32_MANTISSA_BITS,
    Rounding,
    exp2,
    round_values,
    stream_key,
)
from nemomodel.quant.tiles import as_matrix, from_tiles, tile_amax, to_tiles

ScaleRule = Literal["floor", "even", "ceil", "rceil"]
SCALE_RULES = ("floor", "even", "ceil", "rceil")
MIN_EXPONENT, MAX_EXPONENT = -127, 127
"""Of E8M0, the format of the shared scales."""


@dataclass(frozen=True)
class SharedExponentTensor:
    """A matrix [M, K] whose blocks share powers of two; rows of other shapes are flattened."""

    elements: Tensor
    """Numbers of the element format, FP32, in tiles [M, 1, K / block, block], padded."""
    exponents: Tensor
    """int32, [M, 1, K / block, 1], or [.., block] where pairs have their own."""
    shape: tuple[int, ...]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """elements * 2^exponents, in the original shape."""
        rows = self.elements.shape[0], self.shape[-1]
        values = from_tiles(self.elements * exp2(self.exponents), rows)
        return values.to(dtype).view(self.shape)


def quantize_mx(
    x: Tensor,
    format: MXFormat | str,
    scale_rule: ScaleRule = "floor",
    rounding: Rounding = "nearest",
    *,
    seed: int = 0,
) -> SharedExponentTensor:
    """Quantise x [..., K] in blocks along K.

    Args:
        format: of `quant.formats`, or its name: MXFP4, MXFP6_E2M3, MXFP6_E3M2, MXFP8_E4M3,
            MXFP8_E5M2, MXINT8.
        scale_rule: the exponent of a block from its largest magnitude a, with e_max that of the
            element format: floor(log2 a) - e_max (OCP; elements may saturate); the same of a
            rounded to the element's mantissa (even); ceil(log2 a) - e_max; or
            ceil(log2(a / max)) (rceil: nothing saturates; cuBLAS and Transformer Engine multiply by
            the rounded 1 / max, the same for BF16 input).
        seed: of stochastic rounding.

    Raises:
        ValueError: x has infinities or NaN, no floating dtype, or no dimension; an unknown rule or
            format.
    """
    format = lookup(format, MXFormat)
    if scale_rule not in SCALE_RULES:
        raise ValueError(f"scale_rule={scale_rule!r}: use one of {', '.join(SCALE_RULES)}")
    tiles = to_tiles(as_matrix(x), (1, format.block_size)).float()
    elements, exponents = encode_mx(tiles, format.element, scale_rule, key=_key(rounding, seed))
    return SharedExponentTensor(elements, exponents, tuple(x.shape))


def encode_mx(
    tiles: Tensor,
    element: Element,
    scale_rule: ScaleRule,
    *,
    key: tuple[int, int] | None,
    counter: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Elements [M / a, a, K / b, b] and exponents, int32 [M / a, 1, K / b, 1].

    Args:
        tiles: FP32, as `to_tiles` makes them.
        key, counter: of the random bits; see `round_values`.
    """
    exponents = block_exponents(tile_amax(tiles), element, scale_rule)
    return round_values(tiles * exp2(-exponents), element, key, counter), exponents


def quantize_bdr(
    x: Tensor, format: BDRFormat | str, rounding: Rounding = "nearest", *, seed: int = 0
) -> SharedExponentTensor:
    """Quantise x [..., K] with shared microexponents: pairs all of whose values are below the
    power of two of their block use half of it, and so half the step.

    Args:
        format: of `quant.formats`, or its name: MX9, MX6, MX4.

    Raises:
        ValueError: as `quantize_mx`.
    """
    format = lookup(format, BDRFormat)
    tiles = to_tiles(as_matrix(x), (1, format.block_size)).float()
    shared = _floor_log2(tile_amax(tiles))
    pairs = tiles.unflatten(-1, (-1, format.pair_size))
    own = _floor_log2(pairs.abs().amax(-1, keepdim=True)).expand_as(pairs).flatten(-2)
    exponents = (shared - (own < shared).int()).clamp(MIN_EXPONENT, MAX_EXPONENT)
    elements = round_values(tiles * exp2(-exponents), format.element, _key(rounding, seed))
    return SharedExponentTensor(elements, exponents, tuple(x.shape))


def _key(rounding: Rounding, seed: int) -> tuple[int, int] | None:
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding={rounding!r}: use 'nearest' or 'stochastic'")
    return stream_key(seed) if rounding == "stochastic" else None


def block_exponents(amax: Tensor, element: Element, rule: ScaleRule) -> Tensor:
    """int32, the power of two that blocks of these largest magnitudes share."""
    if rule == "rceil":
        exponents = _ceil_log2(torch.div(amax, torch.full_like(amax, element.max)))
    elif rule == "ceil":
        exponents = _ceil_log2(amax) - element.max_exponent
    elif rule == "even":
        half_step = 1 << (FP32_MANTISSA_BITS - 1 - element.mantissa_bits)
        rounded = (amax.view(torch.int32) + half_step).view(torch.float32)
        exponents = _floor_log2(rounded) - element.max_exponent
    else:
        exponents = _floor_log2(amax) - element.max_exponent
    return exponents.clamp(MIN_EXPONENT, MAX_EXPONENT)


def _floor_log2(a: Tensor) -> Tensor:
    """int32; -127 for zeros and FP32 denormals. a is not negative."""
    return (a.view(torch.int32) >> FP32_MANTISSA_BITS) - 127


def _ceil_log2(a: Tensor) -> Tensor:
    """int32; -127 up to 2^-127. a is not negative."""
    bits = a.view(torch.int32)
    fraction = bits & ((1 << FP32_MANTISSA_BITS) - 1)
    # Denormals above 2^-127 are the fractions above a half of exponent field 0.
    above = torch.where(bits >> FP32_MANTISSA_BITS == 0, 1 << (FP32_MANTISSA_BITS - 1), 0)
    return _floor_log2(a) + (fraction > above).int()
