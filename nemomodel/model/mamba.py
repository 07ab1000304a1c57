"""Mamba-2 mixer (arXiv:2405.21060), as Nemotron 3 uses it."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nemomodel.config.schema import MambaConfig
from nemomodel.model.layers import Linear
from nemomodel.ops.conv import causal_conv
from nemomodel.ops.documents import Documents
from nemomodel.ops.norm import gated_group_rms_norm
from nemomodel.ops.precision import accumulator
from nemomodel.ops.ssd import ssd


class GatedNorm(nn.Module):
    """Group RMSNorm of x * silu(z)."""

    def __init__(self, size: int, *, num_groups: int, eps: float, dtype: torch.dtype):
        super().__init__()
        self.num_groups, self.eps = num_groups, eps
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype))

    def forward(self, x_SBI: Tensor, z_SBI: Tensor) -> Tensor:
        return gated_group_rms_norm(x_SBI, z_SBI, self.weight, self.eps, self.num_groups)


class Mamba(nn.Module):
    """z, x, B, C, dt = in_proj(u); y = out_proj(norm(ssd(conv(x, B, C), dt) * silu(z))).

    The inner width I is num_heads * head_dim. A_log, D and dt_bias are FP32 in every precision:
    they enter exponentials.
    """

    def __init__(self, config: MambaConfig, hidden_size: int, eps: float, *, dtype: torch.dtype):
        super().__init__()
        self.config = config
        inner_size = config.num_heads * config.head_dim
        state_width = config.num_groups * config.state_size
        wide = accumulator(dtype)
        # Rows of in_proj in this order; the middle three pass the convolution together.
        self.split = [inner_size, inner_size, state_width, state_width, config.num_heads]
        conv_size = sum(self.split[1:4])
        self.in_proj = Linear(hidden_size, sum(self.split), dtype=dtype)
        self.conv_weight = nn.Parameter(torch.empty(conv_size, config.conv_kernel, dtype=dtype))
        self.conv_bias = nn.Parameter(torch.empty(conv_size, dtype=dtype))
        self.A_log = nn.Parameter(torch.empty(config.num_heads, dtype=wide))
        self.D = nn.Parameter(torch.empty(config.num_heads, dtype=wide))
        self.dt_bias = nn.Parameter(torch.empty(config.num_heads, dtype=wide))
        self.norm = GatedNorm(inner_size, num_groups=config.num_groups, eps=eps, dtype=dtype)
        self.out_proj = Linear(inner_size, hidden_size, dtype=dtype)

    def forward(self, x_SBD: Tensor, documents: Documents | None) -> Tensor:
        z, xBC, dt = self.in_proj(x_SBD).split(
            [self.split[0], sum(self.split[1:4]), self.split[4]], dim=-1
        )
        xBC = causal_conv(xBC, self.conv_weight, self.conv_bias, documents)
        x, B, C = xBC.split(self.split[1:4], dim=-1)
        dt_SBH = F.softplus(dt.to(self.dt_bias.dtype) + self.dt_bias)
        if self.config.dt_min:
            dt_SBH = dt_SBH.clamp(min=self.config.dt_min)
        y_SBHP = ssd(
            rearrange(x, "s b (h p) -> s b h p", p=self.config.head_dim),
            dt_SBH,
            -self.A_log.exp(),
            rearrange(B, "s b (g n) -> s b g n", n=self.config.state_size),
            rearrange(C, "s b (g n) -> s b g n", n=self.config.state_size),
            self.D,
            chunk_size=self.config.chunk_size,
            documents=documents,
        )
        return self.out_proj(self.norm(rearrange(y_SBHP, "s b h p -> s b (h p)"), z))
