"""Rounding FP32 values to an element format, and the random bits of stochastic rounding.

Only additions, masks and comparisons: no tables and no logarithms, so eager, compiled and Triton
code give the same bits. Exact for every finite FP32 input.
"""

import hashlib
import math
from typing import Literal

import torch
from torch import Tensor

from nemomodel.quant.formats import Element

Rounding = Literal["nearest", "stochastic"]

FP32_MANTISSA_BITS = 23
FP32_MAX = torch.finfo(torch.float32).max
_EXPONENT_MASK = 0x7F800000
_NAN = 0x7FC00000


def power_of_two(v: Tensor) -> Tensor:
    """2^floor(log2 |v|); 0 for zeros and FP32 denormals."""
    return (v.view(torch.int32) & _EXPONENT_MASK).view(torch.float32)


def exp2(exponent: Tensor) -> Tensor:
    """2^exponent as FP32 for int32 exponents from -127 (a denormal number) to 127."""
    normal = (exponent + 127) << FP32_MANTISSA_BITS
    return torch.where(exponent == -127, 1 << (FP32_MANTISSA_BITS - 1), normal).view(torch.float32)


def round_nearest(v: Tensor, element: Element) -> Tensor:
    """The nearest value of the format, ties to even, saturating; zeros lose their sign.

    Adding and subtracting 1.5 * 2^23 steps leaves nothing below one step.
    """
    v = v.clamp(-element.max, element.max)
    top = power_of_two(v).clamp(min=2.0**element.min_exponent)
    shift = top * (1.5 * 2.0 ** (FP32_MANTISSA_BITS - element.mantissa_bits))
    return (v + shift) - shift


def round_stochastic(v: Tensor, element: Element, bits: Tensor) -> Tensor:
    """One of the two neighbours, the nearer one more often: the mean is v; saturating.

    Args:
        bits: int32 of v's shape, uniform. The upper 23 - mantissa_bits of them decide.

    A random fraction of a step is added to the magnitude, and what is below one step cut off.
    """
    smallest = 2.0**element.min_exponent
    dropped = FP32_MANTISSA_BITS - element.mantissa_bits
    magnitude = v.abs().clamp(max=element.max)
    # Below the smallest exponent the steps are those of that exponent: move values into it.
    low = magnitude < smallest
    magnitude = torch.where(low, magnitude + smallest, magnitude)
    fraction = (bits >> (32 - dropped)) & ((1 << dropped) - 1)
    # The clamp is for NaN, which stays NaN: no sum below wraps around.
    cut = (magnitude.view(torch.int32).clamp(max=_NAN) + fraction) & -(1 << dropped)
    magnitude = cut.view(torch.float32)
    magnitude = torch.where(low, magnitude - smallest, magnitude).clamp(max=element.max)
    return torch.copysign(magnitude, v)


def round_values(
    v: Tensor, element: Element, key: tuple[int, int] | None, counter: Tensor | None = None
) -> Tensor:
    """Values of the format, rounded to nearest even, or stochastically with a stream.

    Args:
        key: of the stream, from `stream_key`; None is to nearest even.
        counter: int32 in v's shape, the number of every element in the stream; None is 0, 1, 2 ..
            in the order of memory.
    """
    if key is None:
        return round_nearest(v, element)
    if counter is None:
        return round_stochastic(v, element, random_bits(tuple(v.shape), key, v.device))
    return round_stochastic(v, element, hash_counter(counter, key))


def random_bits(shape: tuple[int, ...], key: tuple[int, int], device: torch.device) -> Tensor:
    """`hash_counter` of 0, 1, 2 .. in the order of memory; at most 2^31 elements."""
    count = math.prod(shape)
    assert count < 2**31, shape
    counter = torch.arange(count, dtype=torch.int32, device=device).view(shape)
    return hash_counter(counter, key)


def hash_counter(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Uniform int32 bits of a counter-based stream: element i of stream `key` is a pure function
    of both, whatever the device and the shape.

    The counter passes three multiplications with the keys between them, the mixing of MurmurHash3
    (constants of xxHash32); keys must come from `stream_key`.
    """
    x = (counter ^ key[0]) * -1640531535
    x = ((x ^ _shift_right(x, 15)) + key[1]) * -2048144777
    return (x ^ _shift_right(x, 13)) * -1028477379


def stream_key(*parts: int | str) -> tuple[int, int]:
    """Two signed 32-bit keys from whatever names a stream: seed, step, layer, operand."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return (
        int.from_bytes(digest[:4], "little", signed=True),
        int.from_bytes(digest[4:], "little", signed=True),
    )


def _shift_right(x: Tensor, n: int) -> Tensor:
    """Logical shift of int32, which torch has for unsigned types only."""
    return (x >> n) & ((1 << (32 - n)) - 1)
