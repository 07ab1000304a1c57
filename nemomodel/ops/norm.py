"""RMSNorm over the last dimension, and the gated group form of the Mamba-2 mixer."""

import torch
import torch.nn.functional as F
from torch import Tensor

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
    core/ssm/mamba_mixer.py @ d98e8a64 (norm_before_gate=False). Keeps x and z only.
    """
    return _GatedGroupRMSNorm.apply(x, z, weight, eps, num_groups)


def _normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x) and 1 / rms(x) over the last dimension, both wide."""
    x = wide(x)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse_rms = (norm.square_().div_(x.shape[-1])).add_(eps).rsqrt_()
    return x * inverse_rms, inverse_rms


def _normalize_backward(d_hat: Tensor, hat: Tensor, inverse_rms: Tensor) -> Tensor:
    """Gradient of `_normalize`; overwrites d_hat."""
    projection = torch.linalg.vecdot(d_hat, hat).unsqueeze(-1) / hat.shape[-1]
    return d_hat.addcmul_(hat, projection, value=-1).mul_(inverse_rms)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        hat, _ = _normalize(x, eps)
        ctx.save_for_backward(x)
        ctx.weight, ctx.eps = weight, eps
        return hat.mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        hat, inverse_rms = _normalize(x, ctx.eps)
        dy = wide(dy)
        dw = None
        if ctx.needs_input_grad[1]:
            dw = deliver_grad(ctx.weight, (dy * hat).flatten(0, -2).sum(0))
        dx = _normalize_backward(dy * ctx.weight, hat, inverse_rms)
        return dx.to(x.dtype), dw, None


class _GatedGroupRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, z, weight, eps, num_groups):
        gated = wide(x) * F.silu(wide(z))
        hat, _ = _normalize(gated.unflatten(-1, (num_groups, -1)), eps)
        ctx.save_for_backward(x, z)
        ctx.weight, ctx.eps, ctx.num_groups = weight, eps, num_groups
        return hat.flatten(-2).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, z = ctx.saved_tensors
        wide_x, wide_z, dy = wide(x), wide(z), wide(dy)
        gate = torch.sigmoid(wide_z)
        silu = wide_z * gate
        gated = (wide_x * silu).unflatten(-1, (ctx.num_groups, -1))
        hat, inverse_rms = _normalize(gated, ctx.eps)
        dw = None
        if ctx.needs_input_grad[2]:
            dw = deliver_grad(ctx.weight, (dy * hat.flatten(-2)).flatten(0, -2).sum(0))
        d_hat = (dy * ctx.weight).unflatten(-1, (ctx.num_groups, -1))
        d_gated = _normalize_backward(d_hat, hat, inverse_rms).flatten(-2)
        dx = (d_gated * silu).to(x.dtype)
        # silu'(z) = sigmoid(z) + silu(z) (1 - sigmoid(z))
        d_silu = gate.addcmul_(silu, 1 - gate)
        dz = d_gated.mul_(wide_x).mul_(d_silu).to(z.dtype)
        return dx, dz, dw, None, None
