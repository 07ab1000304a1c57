"""Squared ReLU, optionally weighted per row."""

import torch
from torch import Tensor


def squared_relu(h: Tensor) -> Tensor:
    """relu(h)^2."""
    return _SquaredReLU.apply(h)


def gated_squared_relu(h_RF: Tensor, gate_R: Tensor) -> Tensor:
    """gate * relu(h)^2 with one gate per row; returned in h's dtype."""
    return _GatedSquaredReLU.apply(h_RF, gate_R)


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h):
        relu = h.relu()
        ctx.save_for_backward(relu)
        return relu.square()

    @staticmethod
    def backward(ctx, dy):
        (relu,) = ctx.saved_tensors
        return (dy * relu).mul_(2)


class _GatedSquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, gate):
        relu = h.relu()
        ctx.save_for_backward(relu, gate)
        return relu.square().mul_(gate.unsqueeze(-1).to(h.dtype))

    @staticmethod
    def backward(ctx, dy):
        relu, gate = ctx.saved_tensors
        dy_relu = dy * relu
        d_gate = (dy_relu * relu).sum(-1, dtype=gate.dtype)
        return dy_relu.mul_(2 * gate.unsqueeze(-1).to(dy.dtype)), d_gate
