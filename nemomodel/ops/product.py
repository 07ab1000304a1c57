"""The matrix product of large operands."""

import torch
from torch import Tensor

ONEDNN_MIN_SIZE = 256
"""Smallest dimension from which oneDNN's FP32 product is the faster one on a CPU: up to 1.3 times
(docs/performance.md). PyTorch itself calls it for BF16 only, and MKL for FP32."""


def product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a @ b for matrices of any strides, without autograd; a may have leading dimensions."""
    if (
        a_MK.device.type == "cpu"
        and a_MK.dtype == torch.float32 == b_KN.dtype
        and min(a_MK.numel() // a_MK.shape[-1], *b_KN.shape) >= ONEDNN_MIN_SIZE
        and torch.backends.mkldnn.is_available()
    ):
        # The only way to it that PyTorch 2.11 has: y = a w^T, here with w = b^T.
        return torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.T, None, "none", [], "")
    return a_MK @ b_KN
