"""RMSNorm over the last dimension, and the gated group form of the Mamba-2 mixer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nemomodel.ops.fused import fused, sum_rows
from nemomodel.ops.precision import wide
from nemomodel.ops.wgrad import deliver_grad


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight, computed in FP32, returned in x's dtype."""
    return _RMSNorm.apply(x, weight, eps)


def gated_group_rms_norm(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, num_groups: int
) -> Tensor:
    """RMSNorm of x * silu(z) within each of `num_groups` slices of the last dimension.

    Source: arXiv:2405.21060 section 8.2; gate before norm, as Megatron-LM
    core/ssm/mamba_mixer.py @ d98e8a64 (norm_before_gate=False). Keeps x, z and 1 / rms only.
    """
    return _GatedGroupRMSNorm.apply(x, z, weight, eps, num_groups)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / rms(x) over the last dimension, which stays as 1."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return (norm.square_().div_(x.shape[-1])).add_(eps).rsqrt_()


def _normalize_backward(d_hat: Tensor, hat: Tensor, inverse_rms: Tensor) -> Tensor:
    """Gradient of hat = x * inverse_rms(x); overwrites d_hat."""
    projection = torch.linalg.vecdot(d_hat, hat).unsqueeze(-1) / hat.shape[-1]
    return d_hat.addcmul_(hat, projection, value=-1).mul_(inverse_rms)


# Below, tensors are [R, G, C]: rows, groups, channels of one group; weight [G, C], inverse_rms
# [R, G, 1].


@fused
def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    inverse_rms = _inverse_rms(wide(x), eps)
    return (x * inverse_rms).mul_(weight).to(x.dtype), inverse_rms


@fused
def _backward(x: Tensor, weight: Tensor, inverse_rms: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of x; and of the weight, as sums over some rows."""
    hat, dy = x * inverse_rms, wide(dy)
    dx = _normalize_backward(dy * weight, hat, inverse_rms)
    return dx.to(x.dtype), sum_rows(dy * hat)


@fused
def _gated_forward(x: Tensor, z: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    gated = wide(x) * F.silu(wide(z))
    inverse_rms = _inverse_rms(gated, eps)
    return gated.mul_(inverse_rms).mul_(weight).to(x.dtype), inverse_rms


@fused
def _gated_backward(
    x: Tensor, z: Tensor, weight: Tensor, inverse_rms: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and z; and of the weight, as sums over some rows."""
    wide_x, wide_z, dy = wide(x), wide(z), wide(dy)
    gate = torch.sigmoid(wide_z)
    silu = wide_z * gate
    hat = wide_x * silu * inverse_rms
    dw = sum_rows(dy * hat)
    d_gated = _normalize_backward(dy * weight, hat, inverse_rms)
    dx = (d_gated * silu).to(x.dtype)
    # silu'(z) = sigmoid(z) + silu(z) (1 - sigmoid(z))
    d_silu = gate.addcmul_(silu, 1 - gate)
    return dx, d_gated.mul_(wide_x).mul_(d_silu).to(z.dtype), dw


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        y, inverse_rms = _forward(_rows(x, 1), weight.detach(), eps)
        ctx.save_for_backward(x, inverse_rms)
        ctx.weight = weight
        return y.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        x, inverse_rms = ctx.saved_tensors
        dx, dw = _backward(_rows(x, 1), ctx.weight.detach(), inverse_rms, _rows(dy, 1))
        dw = deliver_grad(ctx.weight, dw.sum(0).flatten()) if ctx.needs_input_grad[1] else None
        return dx.view_as(x), dw, None


class _GatedGroupRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, z, weight, eps, num_groups):
        ctx.weight, ctx.groups = weight, num_groups
        args = _rows(x, num_groups), _rows(z, num_groups), weight.detach().view(num_groups, -1)
        y, inverse_rms = _gated_forward(*args, eps)
        ctx.save_for_backward(x, z, inverse_rms)
        return y.view_as(x)

    @staticmethod
    def backward(ctx, dy):
        x, z, inverse_rms = ctx.saved_tensors
        weight = ctx.weight.detach().view(ctx.groups, -1)
        rows = (_rows(t, ctx.groups) for t in (x, z))
        dx, dz, dw = _gated_backward(*rows, weight, inverse_rms, _rows(dy, ctx.groups))
        dw = deliver_grad(ctx.weight, dw.sum(0).flatten()) if ctx.needs_input_grad[2] else None
        return dx.view_as(x), dz.view_as(z), dw, None, None


def _rows(t: Tensor, groups: int) -> Tensor:
    return t.detach().flatten(0, -2).unflatten(-1, (groups, -1))
