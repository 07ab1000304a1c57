"""Squared ReLU, optionally weighted per row."""

import torch
from torch import Tensor

from nemomodel.ops.fused import fused


def squared_relu(h: Tensor) -> Tensor:
    """relu(h)^2."""
    return _SquaredReLU.apply(h)


def gated_squared_relu(h_RF: Tensor, gate_R: Tensor) -> Tensor:
    """gate * relu(h)^2 with one gate per row; returned in h's dtype."""
    return _GatedSquaredReLU.apply(h_RF, gate_R)


@fused
def _square(h: Tensor) -> tuple[Tensor, Tensor]:
    relu = h.relu()
    return relu, relu.square()


@fused
def _square_backward(dy: Tensor, relu: Tensor) -> Tensor:
    return (dy * relu).mul_(2)


@fused
def _gated(h: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    relu = h.relu()
    return relu, relu.square().mul_(gate.unsqueeze(-1).to(h.dtype))


@fused
def _gated_backward(dy: Tensor, relu: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    dy_relu = dy * relu
    d_gate = (dy_relu * relu).sum(-1, dtype=gate.dtype)
    return dy_relu.mul_(2 * gate.unsqueeze(-1).to(dy.dtype)), d_gate


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        relu, y = _square(h)
        ctx.save_for_backward(relu)
        return y

    @staticmethod
    def backward(ctx, dy):
        return _square_backward(dy, *ctx.saved_tensors)


class _GatedSquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, gate):
        relu, y = _gated(h, gate)
        ctx.save_for_backward(relu, gate)
        return y

    @staticmethod
    def backward(ctx, dy):
        return _gated_backward(dy, *ctx.saved_tensors)
