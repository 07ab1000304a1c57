"""The matrix product of large operands."""

import torch
from torch import Tensor

ONEDNN_MIN_PRODUCTS = 2**25
"""Multiplications from which oneDNN's FP32 product is the faster one on a CPU, up to 1.3 times, for
a row-major left operand (docs/performance.md). PyTorch calls it for BF16 only, MKL for FP32."""


def product(a_MK: Tensor, b_KN: Tensor) -> Tensor:
    """a @ b for matrices of any strides, without autograd; a may have leading dimensions."""
    if (
        a_MK.device.type == "cpu"
        and a_MK.dtype == torch.float32 == b_KN.dtype
        and a_MK.stride(-1) == 1
        and a_MK.numel() * b_KN.shape[1] >= ONEDNN_MIN_PRODUCTS
        and torch.backends.mkldnn.is_available()
    ):
        return onednn_linear(a_MK, b_KN.T)
    return a_MK @ b_KN


def scaled_product(a_BMK: Tensor, b_BKN: Tensor, scale: float) -> Tensor:
    """scale * a @ b of a batch of matrices, without a pass for the factor; without autograd."""
    return torch.baddbmm(a_BMK.new_empty(1), a_BMK, b_BKN, beta=0, alpha=scale)


def add_product(out: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> None:
    """Add scale * a @ b, of two matrices or of a batch of them, to `out`, whose dtype may be wider;
    without autograd."""
    if out.dtype != a.dtype:
        out.add_(a @ b, alpha=scale)
    elif out.dim() == 2:
        out.addmm_(a, b, alpha=scale)
    else:
        out.baddbmm_(a, b, alpha=scale)


def onednn_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T by oneDNN, on a CPU and without autograd; PyTorch 2.11 has no public way to it."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
