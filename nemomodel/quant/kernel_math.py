"""The arithmetic of `rounding.py`, `nvfp4.py` and `mx.py` in Triton, on tiles in FP32.

Written twice, because Triton compiles no torch operation; see there for what it is.
"""

import triton
import triton.language as tl

from nemomodel.quant import formats, nvfp4, rounding

FP32_MAX = tl.constexpr(rounding.FP32_MAX)
LARGEST = tl.constexpr(nvfp4.LARGEST)
SIXTH = tl.constexpr(1 / formats.E2M1.max)


def _element(element: formats.Element) -> tl.constexpr:
    """Mantissa bits, power of two of the smallest exponent, largest value."""
    return tl.constexpr((element.mantissa_bits, 2.0**element.min_exponent, element.max))


E2M1, E4M3 = _element(formats.E2M1), _element(formats.E4M3)


@triton.jit
def round_to_bf16(v):
    """To nearest even, on the bits: the interpreter's conversion truncates. NaN stays NaN."""
    bits = v.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return tl.where(v == v, bits.to(tl.float32, bitcast=True), v)


@triton.jit
def magnitude_bits(v):
    return v.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def nvfp4_scales(largest, amax):
    """`nvfp4.block_scales`: the factor of every block before rounding, and its E4M3 scale.

    Args:
        largest, amax: bits of the largest magnitude of every block, and of the matrix.
    """
    largest, amax = largest.to(tl.float32, bitcast=True), amax.to(tl.float32, bitcast=True)
    global_encode = tl.minimum(tl.math.div_rn(LARGEST, amax), FP32_MAX, tl.PropagateNan.ALL)
    global_encode = tl.where((amax == 0) | (global_encode == 0), 1.0, global_encode)
    global_decode = tl.math.div_rn(1.0, global_encode)
    wanted = largest * (global_encode * SIXTH)
    scales = round_nearest(tl.minimum(wanted, FP32_MAX, tl.PropagateNan.ALL), E4M3)
    block_encode = tl.math.div_rn(1.0, scales * global_decode)
    return tl.minimum(block_encode, FP32_MAX, tl.PropagateNan.ALL), scales


@triton.jit
def mxfp8_scales(largest):
    """`mx.block_exponents` by the rule rceil: 2^-exponent and 2^exponent."""
    largest = largest.to(tl.float32, bitcast=True)
    bits = tl.math.div_rn(largest, E4M3[2]).to(tl.int32, bitcast=True)
    above = tl.where(bits >> 23 == 0, 1 << 22, 0)
    exponent = (bits >> 23) - 127 + ((bits & 0x7FFFFF) > above).to(tl.int32)
    exponent = tl.minimum(tl.maximum(exponent, -127), 127)
    return _exp2(-exponent), _exp2(exponent)


@triton.jit
def _exp2(exponent):
    bits = tl.where(exponent == -127, 1 << 22, (exponent + 127) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def round_nearest(v, ELEMENT: tl.constexpr):
    MANTISSA_BITS: tl.constexpr = ELEMENT[0]
    SMALLEST: tl.constexpr = ELEMENT[1]
    MAX: tl.constexpr = ELEMENT[2]
    v = tl.minimum(v, MAX, tl.PropagateNan.ALL)
    v = tl.maximum(v, -MAX, tl.PropagateNan.ALL)
    top = (v.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    shift = tl.maximum(top, SMALLEST) * (1.5 * (1 << (23 - MANTISSA_BITS)))
    return (v + shift) - shift


@triton.jit
def round_stochastic(v, bits, ELEMENT: tl.constexpr):
    DROPPED: tl.constexpr = 23 - ELEMENT[0]
    SMALLEST: tl.constexpr = ELEMENT[1]
    MAX: tl.constexpr = ELEMENT[2]
    magnitude = magnitude_bits(v).to(tl.float32, bitcast=True)
    magnitude = tl.minimum(magnitude, MAX, tl.PropagateNan.ALL)
    low = magnitude < SMALLEST
    magnitude = tl.where(low, magnitude + SMALLEST, magnitude)
    fraction = (bits >> (32 - DROPPED)) & ((1 << DROPPED) - 1)
    cut = (magnitude.to(tl.int32, bitcast=True) + fraction) & -(1 << DROPPED)
    magnitude = cut.to(tl.float32, bitcast=True)
    magnitude = tl.where(low, magnitude - SMALLEST, magnitude)
    magnitude = tl.minimum(magnitude, MAX, tl.PropagateNan.ALL)
    sign = v.to(tl.int32, bitcast=True) & -2147483648
    return (magnitude.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def random_bits(counter, key0, key1):
    x = (counter ^ key0) * -1640531535
    x = ((x ^ _shift_right(x, 15)) + key1) * -2048144777
    return (x ^ _shift_right(x, 13)) * -1028477379


@triton.jit
def _shift_right(x, N: tl.constexpr):
    return (x >> N) & ((1 << (32 - N)) - 1)
