"""NVFP4: E2M1 elements, an E4M3 scale per block, one FP32 factor per tensor.

    value = code * scale * amax / 2688          2688 = 6 * 448, the largest code times scale

The order of every FP32 operation is that of Transformer Engine (NVFP4BlockScaling and its
Python reference, TransformerEngine @ d0067d0d): the formula of the paper (arXiv:2509.25149,
appendix B) rounds a quarter of a percent of the scales differently.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nemomodel.quant.formats import E2M1, E4M3
from nemomodel.quant.rounding import (
    FP32_MAX,
    Rounding,
    round_nearest,
    round_values,
    stream_key,
)
from nemomodel.quant.tiles import as_matrix, from_tiles, tile_amax, to_tiles

BLOCKS = ((1, 16), (16, 1), (16, 16))
LARGEST = E2M1.max * E4M3.max

# The code of a magnitude, by twice the magnitude.
_CODE_OF_DOUBLE = (0, 1, 2, 3, 4, 0, 5, 0, 6, 0, 0, 0, 7)
_MAGNITUDE_OF_CODE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class NVFP4Tensor:
    """A matrix [M, K] in NVFP4; rows of other shapes are flattened to M."""

    packed: Tensor
    """uint8 [M, K / 2]: two codes per byte, the one of the lower column in the low four bits.
    M and K are padded to whole blocks (K to an even number of columns with blocks of (16, 1))."""
    scales: Tensor
    """float8_e4m3fn, one per block: [M, K / 16], [M / 16, K] or [M / 16, K / 16]."""
    amax: Tensor
    """FP32 scalar: the largest magnitude of the tensor (or of the group that shares it)."""
    block: tuple[int, int]
    shape: tuple[int, ...]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(code * scale) * (amax / 2688), computed in FP32, in the original shape."""
        values, scales = self.exact()
        factor = self.amax.to(torch.float32) * torch.tensor(1 / LARGEST, device=self.amax.device)
        return (values * scales * factor).to(dtype).view(self.shape)

    def exact(self) -> tuple[Tensor, Tensor]:
        """Codes as numbers and scales, both FP32 [M, K]: their product is exact in BF16."""
        low, high = self.packed & 15, self.packed >> 4
        codes = torch.stack([low, high], dim=-1).flatten(1).long()
        table = torch.tensor(_MAGNITUDE_OF_CODE, device=codes.device)
        values = torch.where(codes > 7, -table[codes & 7], table[codes & 7])
        a, b = self.block
        scales = self.scales.float().repeat_interleave(a, 0).repeat_interleave(b, 1)
        M, K = math.prod(self.shape[:-1]), self.shape[-1]
        return values[:M, :K], scales[:M, :K]


def quantize_nvfp4(
    x: Tensor,
    block: tuple[int, int] = (1, 16),
    rounding: Rounding = "nearest",
    *,
    seed: int = 0,
    amax: Tensor | None = None,
) -> NVFP4Tensor:
    """Quantise x [..., K], seen as a matrix [M, K].

    Args:
        x: BF16, FP16 or FP32, any shape.
        block: rows and columns that share a scale: (1, 16), (16, 1) or (16, 16).
        rounding: of the codes; scales always round to nearest even.
        seed: of stochastic rounding; the same seed gives the same codes.
        amax: scalar to use instead of x's largest magnitude, e.g. that of a group of ranks.

    Raises:
        ValueError: x has infinities or NaN, another dtype, or no dimension; an unknown block; an
            amax that is no finite magnitude.
    """
    if block not in BLOCKS:
        raise ValueError(f"block={block}: use one of {', '.join(map(str, BLOCKS))}")
    if rounding not in ("nearest", "stochastic"):
        raise ValueError(f"rounding={rounding!r}: use 'nearest' or 'stochastic'")
    tiles = to_tiles(as_matrix(x), block).float()
    if amax is None:
        amax = tiles.abs().amax() if x.numel() else tiles.new_zeros(())
    else:
        amax = torch.as_tensor(amax, dtype=torch.float32, device=x.device)
        if amax.numel() != 1 or not 0 <= amax.item() < math.inf:
            raise ValueError(f"amax={amax.tolist()}: use one finite number of at least 0")
        amax = amax.reshape(())
    key = stream_key(seed) if rounding == "stochastic" else None
    scaled, scales = _scale(tiles, amax)
    return NVFP4Tensor(
        packed=_pack(round_values(scaled, E2M1, key), scaled),
        scales=scales.squeeze((1, 3)).to(torch.float8_e4m3fn),
        amax=amax,
        block=block,
        shape=tuple(x.shape),
    )


def max_over_ranks(amax: Tensor, group: dist.ProcessGroup) -> None:
    """The largest of magnitudes, FP32, over ranks, in place; NaN where some rank has it.

    By their bits, whose order is theirs: gloo's maximum of floats loses a NaN.
    """
    dist.all_reduce(amax.view(torch.int32), dist.ReduceOp.MAX, group)


def encode(
    tiles: Tensor, amax: Tensor, *, key: tuple[int, int] | None, counter: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Codes as numbers [M / a, a, K / b, b] and scales [M / a, 1, K / b, 1], all FP32.

    Args:
        tiles: FP32, as `to_tiles` makes them.
        amax: FP32 scalar.
        key, counter: of the random bits; see `round_values`.
    """
    scaled, scales = _scale(tiles, amax)
    return round_values(scaled, E2M1, key, counter), scales


def _scale(tiles: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """Elements divided by their scales, and the E4M3 scale of every block as FP32."""
    encode, scales = block_scales(tile_amax(tiles), amax)
    return tiles * encode, scales


def block_scales(peaks: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """What the elements of every block are multiplied with, and its E4M3 scale, both FP32.

    Args:
        peaks: FP32, the largest magnitude of every block.
        amax: FP32, the largest magnitude of the tensor; broadcast against `peaks`.
    """
    # torch.div of tensors: a division by or of a Python number may become a multiplication.
    largest = torch.full_like(amax, LARGEST)
    global_encode = torch.div(largest, amax).clamp(max=FP32_MAX)
    unusable = (amax == 0) | (global_encode == 0)
    global_encode = torch.where(unusable, torch.ones_like(amax), global_encode)
    global_decode = torch.div(torch.ones_like(amax), global_encode)
    sixth = torch.full_like(amax, 1 / E2M1.max)
    wanted = (peaks * (global_encode * sixth)).clamp(max=FP32_MAX)
    scales = round_nearest(wanted, E4M3)
    block_decode = scales * global_decode
    return torch.div(torch.ones_like(block_decode), block_decode).clamp(max=FP32_MAX), scales


def _pack(values: Tensor, scaled: Tensor) -> Tensor:
    """uint8 [M, K / 2] of codes as numbers; signs are those before rounding."""
    table = torch.tensor(_CODE_OF_DOUBLE, dtype=torch.uint8, device=values.device)
    codes = table[(values.abs() * 2).long()] + 8 * (scaled < 0).to(torch.uint8)
    codes_MK = from_tiles(codes, (codes.shape[0] * codes.shape[1], codes.shape[2] * codes.shape[3]))
    if codes_MK.shape[1] % 2:
        codes_MK = F.pad(codes_MK, (0, 1))
    return codes_MK[:, ::2] | codes_MK[:, 1::2] << 4
