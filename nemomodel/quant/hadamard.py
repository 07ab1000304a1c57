"""The random Hadamard transform: an orthogonal mix of 16 neighbours that spreads outliers."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from nemomodel.ops.precision import wide

SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""Of size 16: the one vector for all layers, ranks and steps of Transformer Engine
(pytorch/tensor/nvfp4_tensor.py @ d0067d0d)."""


@functools.cache
def hadamard_matrix(size: int = 16, seed: int | None = None) -> Tensor:
    """R = diag(signs) H / sqrt(size), FP32 [size, size], with H of Sylvester; R R^T = 1.

    Args:
        size: a power of two.
        seed: of the signs; None is `SIGNS`, which there is for size 16 only.

    Raises:
        ValueError: another size; no seed for a size other than 16.
    """
    if size < 2 or size & (size - 1):
        raise ValueError(f"size={size}: a Hadamard matrix needs a power of two from 2 on")
    if seed is None and size != len(SIGNS):
        raise ValueError(f"size={size}: the fixed signs are for size {len(SIGNS)}; give a seed")
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        top = torch.cat([matrix, matrix], dim=1)
        matrix = torch.cat([top, torch.cat([matrix, -matrix], dim=1)])
    if seed is None:
        signs = torch.tensor(SIGNS, dtype=torch.float32)
    else:
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(2, (size,), generator=generator) * 2.0 - 1.0
    return signs.unsqueeze(1) * matrix * size**-0.5


def transform_rows(x_TC: Tensor, matrix: Tensor) -> Tensor:
    """Mix every `size` consecutive rows: y_j = sum_i R_ij x_i; padded to whole groups with zeros.

    Applied to both operands of dy^T x along the tokens it cancels. x_TC keeps its layout; the
    sums are FP32 and are rounded to x's dtype, as Transformer Engine rounds them to BF16.

    Args:
        matrix: of `hadamard_matrix`; its first column says the signs.

    Sums and differences of neighbours, log2(size) times (Pease's order): a matrix product adds in
    an order of its own on every device, and here every executor has to give the same bits.
    """
    size = len(matrix)
    if len(x_TC) % size:
        x_TC = F.pad(x_TC, (0, 0, 0, -len(x_TC) % size))
    mixed = wide(x_TC).unflatten(0, (-1, size)) * matrix[:, :1]
    for _ in range(size.bit_length() - 1):
        even, odd = mixed[:, 0::2], mixed[:, 1::2]
        mixed = torch.cat([even + odd, even - odd], dim=1)
    return mixed.flatten(0, 1).to(x_TC.dtype)
