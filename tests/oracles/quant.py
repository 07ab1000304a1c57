"""Number formats of few bits: every value enumerated from its bits, the nearest one by search.

NumPy only. Values are float64, in which every operand, grid point and midpoint here is exact; the
scales of NVFP4 are defined by an order of FP32 operations and so are computed in float32.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
FLT_MAX = np.finfo(np.float32).max


def float_grid(exponent_bits: int, mantissa_bits: int, *, reserved: int = 0) -> Array:
    """Non-negative values of a binary format with IEEE bias, indexed by code without sign bit.

    Args:
        reserved: codes at the top that are infinities or NaN.
    """
    bias = 2 ** (exponent_bits - 1) - 1
    values = []
    for code in range(2 ** (exponent_bits + mantissa_bits) - reserved):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        hidden = 0 if exponent == 0 else 1
        fraction = hidden + mantissa / 2**mantissa_bits
        values.append(fraction * 2.0 ** (max(exponent, 1) - bias))
    return np.array(values)


def fixed_grid(magnitude_bits: int) -> Array:
    """Multiples of 2^-(magnitude_bits - 1) below 2, indexed by magnitude."""
    return np.arange(2**magnitude_bits) / 2.0 ** (magnitude_bits - 1)


GRIDS = {
    "E2M1": float_grid(2, 1),
    "E2M3": float_grid(2, 3),
    "E3M2": float_grid(3, 2),
    "E4M3": float_grid(4, 3, reserved=1),  # 0x7F is NaN
    "E5M2": float_grid(5, 2, reserved=4),  # 0x7C is infinity, 0x7D to 0x7F are NaN
    "INT8": fixed_grid(7),
}
MANTISSA_BITS = {"E2M1": 1, "E2M3": 3, "E3M2": 2, "E4M3": 3, "E5M2": 2, "INT8": 6}


def nearest_code(v: Array, grid: Array) -> NDArray[np.int64]:
    """Index of the grid value nearest to |v|, ties to the even index; saturating."""
    midpoints = (grid[:-1] + grid[1:]) / 2
    below = np.searchsorted(midpoints, np.abs(v), side="left")
    up_to = np.searchsorted(midpoints, np.abs(v), side="right")
    # The two counts differ only on a midpoint, between neighbours of which one is even.
    return np.where(below % 2 == 0, below, up_to)


def nearest_value(v: Array, grid: Array) -> Array:
    """The signed grid value nearest to v; zeros are positive."""
    magnitude = grid[nearest_code(v, grid)]
    return np.where(v < 0, -magnitude, magnitude) + 0.0


def neighbours(v: Array, grid: Array) -> tuple[Array, Array]:
    """Largest grid value <= |v| and smallest >= |v|, with v's sign; the largest where none is."""
    magnitude = np.minimum(np.abs(v), grid[-1])
    lower = grid[np.searchsorted(grid, magnitude, side="right") - 1]
    upper = grid[np.searchsorted(grid, magnitude, side="left")]
    sign = np.where(v < 0, -1.0, 1.0)
    return sign * lower, sign * upper


def pad_to_blocks(x_MK: NDArray, block: tuple[int, int]) -> NDArray:
    """x with rows and columns of zeros up to whole blocks."""
    rows, columns = (-size % part for size, part in zip(x_MK.shape, block, strict=True))
    return np.pad(x_MK, ((0, rows), (0, columns)))


@dataclass
class NVFP4:
    """codes with the sign in bit 3, padded to blocks; E4M3 codes of the scales, one per block."""

    scaled: NDArray[np.float32]
    """What the codes are rounded from, padded to blocks."""
    codes: NDArray[np.uint8]
    scale_codes: NDArray[np.uint8]
    amax: np.float32
    block: tuple[int, int]
    shape: tuple[int, int]

    def coded(self) -> Array:
        """code * scale, [M, K]."""
        M, K = self.shape
        magnitude = GRIDS["E2M1"][self.codes & 7]
        signed = np.where(self.codes & 8, -magnitude, magnitude)
        return (signed * np.kron(GRIDS["E4M3"][self.scale_codes], np.ones(self.block)))[:M, :K]

    def dequantize(self) -> NDArray[np.float32]:
        """FP32 product of the exact code * scale with the factor amax * fl(1 / 2688) of a GEMM."""
        factor = self.amax * np.float32(1 / 2688)
        return self.coded().astype(np.float32) * factor

    def packed(self) -> NDArray[np.uint8]:
        """Two codes per byte, the even column in the low four bits; an odd last column and 0."""
        codes = pad_to_blocks(self.codes, (1, 2))
        packed = np.zeros((codes.shape[0], codes.shape[1] // 2), np.uint8)
        for row, column in np.ndindex(packed.shape):
            packed[row, column] = codes[row, 2 * column] + 16 * codes[row, 2 * column + 1]
        return packed


def quantize_nvfp4_oracle(
    x_MK: NDArray[np.float32], block: tuple[int, int], amax: np.float32 | None = None
) -> NVFP4:
    """NVFP4 to nearest even, block by block.

        S     = min(2688 / amax, FLT_MAX), or 1 where amax or S is 0
        s_b   = e4m3(min(amax_b * (S * fl(1/6)), FLT_MAX))
        enc_b = min(1 / (s_b * (1 / S)), FLT_MAX)
        code  = e2m1(x * enc_b)

    Every operation above is one of FP32.

    Args:
        x_MK: finite FP32, or narrower values cast to it.
        block: rows and columns that share a scale.
        amax: largest magnitude to use instead of that of x.

    Source: TransformerEngine @ d0067d0d, NVFP4BlockScaling kernels and Python reference.
    """
    f32 = np.float32
    rows, columns = block
    M, K = x_MK.shape
    padded = pad_to_blocks(x_MK.astype(f32), block)
    if amax is None:
        amax = f32(np.abs(x_MK).max(initial=0))
    with np.errstate(all="ignore"):
        encode = min(f32(2688) / f32(amax), FLT_MAX)
        if amax == 0 or encode == 0:
            encode = f32(1)
        decode = f32(1) / encode
        multiplier = encode * f32(1 / 6)
        scale_shape = (padded.shape[0] // rows, padded.shape[1] // columns)
        scale_codes = np.zeros(scale_shape, np.uint8)
        scaled = np.zeros(padded.shape, f32)
        for i, j in np.ndindex(scale_shape):
            part = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            wanted = min(np.abs(padded[part]).max() * multiplier, FLT_MAX)
            scale_codes[i, j] = nearest_code(np.float64(wanted), GRIDS["E4M3"])
            scale = f32(GRIDS["E4M3"][scale_codes[i, j]])
            encode_block = min(f32(1) / (scale * decode), FLT_MAX)
            product = padded[part] * encode_block
            assert product.dtype == f32, "the order of roundings is that of FP32"
            scaled[part] = product
    codes = nearest_code(scaled.astype(np.float64), GRIDS["E2M1"]) + 8 * (scaled < 0)
    return NVFP4(scaled, codes.astype(np.uint8), scale_codes, f32(amax), block, (M, K))


def floor_log2(a: float) -> int:
    """Exact for every float64 above 0."""
    return int(np.frexp(a)[1]) - 1


def ceil_log2(a: float) -> int:
    """Exact for every float64 above 0."""
    exponent = floor_log2(a)
    return exponent if a == 2.0**exponent else exponent + 1


def mx_exponent_oracle(amax: float, element: str, scale_rule: str) -> int:
    """Exponent of a block whose largest magnitude is amax, within -127 .. 127.

    Source: OCP Microscaling Formats v1.0 section 6.3 (floor); torchao to_mx (even, ceil, rceil).
    """
    if amax == 0:
        return -127
    largest = float(GRIDS[element][-1])
    if scale_rule == "rceil":
        exponent = ceil_log2(amax / largest)
    elif scale_rule == "ceil":
        exponent = ceil_log2(amax) - floor_log2(largest)
    else:
        if scale_rule == "even":
            # To the element's width, halves up; FP32 denormals have the step of 2^-126.
            step = 2.0 ** (max(floor_log2(amax), -126) - MANTISSA_BITS[element])
            amax += step / 2
        exponent = floor_log2(amax)
        exponent -= floor_log2(largest)
    return min(max(exponent, -127), 127)


def quantize_mx_oracle(
    x_MK: NDArray[np.float32], element: str, scale_rule: str
) -> tuple[Array, NDArray[np.int64]]:
    """Element values [M, K] and exponents [M, K / 32], block by block; value = element * 2^e."""
    padded = pad_to_blocks(x_MK.astype(np.float64), (1, 32))
    elements = np.zeros(padded.shape)
    exponents = np.zeros((padded.shape[0], padded.shape[1] // 32), np.int64)
    for i, j in np.ndindex(exponents.shape):
        part = np.s_[i, j * 32 : (j + 1) * 32]
        exponents[i, j] = mx_exponent_oracle(np.abs(padded[part]).max(), element, scale_rule)
        scaled = padded[part] / 2.0 ** int(exponents[i, j])
        elements[part] = nearest_value(scaled, GRIDS[element])
    return elements[:, : x_MK.shape[1]], exponents


def dequantize_bdr_oracle(x_MK: NDArray[np.float32], mantissa_bits: int) -> Array:
    """x after a pass through shared microexponents: blocks of 16, pairs of 2, values float64.

        E    = floor(log2 amax of the block)
        tau  = 1 where the pair's largest magnitude is below 2^E, else 0
        x    ~ round(x / step) * step,  step = 2^(E - tau - (m - 1)),  |code| < 2^m

    E is an 8-bit exponent, so E - tau ends at -127.

    Source: arXiv:2302.08007.
    """
    grid = fixed_grid(mantissa_bits)
    padded = pad_to_blocks(x_MK.astype(np.float64), (1, 16))
    result = np.zeros(padded.shape)
    for i, j in np.ndindex(padded.shape[0], padded.shape[1] // 16):
        part = np.s_[i, j * 16 : (j + 1) * 16]
        pairs = padded[part].reshape(8, 2)
        if not pairs.any():
            continue
        exponent = floor_log2(np.abs(pairs).max())
        tau = np.abs(pairs).max(axis=1, keepdims=True) < 2.0**exponent
        unit = 2.0 ** np.maximum(exponent - tau.astype(int), -127)
        result[part] = (unit * nearest_value(pairs / unit, grid)).flatten()
    return result[:, : x_MK.shape[1]]


def hadamard_oracle(signs: list[int]) -> Array:
    """R_ij = signs_i (-1)^(ones of i & j) / sqrt(size): the matrix of Sylvester, bit by bit."""
    size = len(signs)
    parity = np.array([[(i & j).bit_count() % 2 for j in range(size)] for i in range(size)])
    return np.array(signs)[:, None] * (1 - 2 * parity) / np.sqrt(size)
