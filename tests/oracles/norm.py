"""RMSNorm, plain and gated per group of channels."""

import torch
from torch import Tensor


def rmsnorm_oracle(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim (arXiv:1910.07467)."""
    mean_square = (x * x).mean(dim=-1, keepdim=True)
    return x / torch.sqrt(mean_square + eps) * weight


def gated_group_rmsnorm_oracle(
    x: Tensor, z: Tensor, weight: Tensor, *, eps: float, num_groups: int
) -> Tensor:
    """Gate first, then normalise each group of neighbouring channels by itself.

        g = x * silu(z);   y = g / sqrt(mean over the channel's group of g^2 + eps) * weight

    Source: state-spaces/mamba mamba_ssm/ops/triton/layernorm_gated.py, norm_before_gate=False.
    """
    gated = x * (z * torch.sigmoid(z))
    size = x.shape[-1] // num_groups
    normed = []
    for start in range(0, x.shape[-1], size):
        group = gated[..., start : start + size]
        normed.append(group / torch.sqrt((group * group).mean(dim=-1, keepdim=True) + eps))
    return torch.cat(normed, dim=-1) * weight
