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
        return onednn_linear(a_MK, b_KN.T)
    return a_MK @ b_KN


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T by oneDNN, on a CPU and without autograd; PyTorch 2.11 has no public way to it."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
