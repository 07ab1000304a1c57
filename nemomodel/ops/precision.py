"""The dtype that sums, exponentials and norms are computed in."""

import torch
from torch import Tensor


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """FP32, or FP64 for FP64 input."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """x in its accumulator dtype."""
    return x.to(accumulator(x.dtype))
