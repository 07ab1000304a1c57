"""Views of a matrix as tiles that share a scale."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def as_matrix(x: Tensor) -> Tensor:
    """x [..., K] as [M, K].

    Raises:
        ValueError: x is no tensor, has infinities or NaN, another dtype than BF16, FP16 and FP32,
            or no dimension.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"x is a {type(x).__name__}; use a BF16, FP16 or FP32 tensor")
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32) or not x.dim():
        raise ValueError(
            f"x is {x.dtype} of shape {list(x.shape)}; use a BF16, FP16 or FP32 matrix"
        )
    if not torch.isfinite(x).all():
        raise ValueError("x has infinities or NaN, which have no code in a block format")
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def to_tiles(x_MK: Tensor, block: tuple[int, int]) -> Tensor:
    """[M / a, a, K / b, b] of a matrix, padded with zeros to whole blocks of (a, b)."""
    a, b = block
    M, K = x_MK.shape
    if M % a or K % b:
        x_MK = F.pad(x_MK, (0, -K % b, 0, -M % a))
    return x_MK.reshape(-(-M // a), a, -(-K // b), b)


def from_tiles(tiles: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of `to_tiles`, cut to `shape` [M, K]."""
    M, K = shape
    return tiles.flatten(2, 3).flatten(0, 1)[:M, :K]


def tile_amax(tiles: Tensor) -> Tensor:
    """Largest magnitude of every tile, [M / a, 1, K / b, 1]."""
    return tiles.abs().amax((1, 3), keepdim=True)
