"""Mamba-2 mixer (arXiv:2405.21060), as Nemotron 3 uses it."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nemomodel.config.schema import MambaConfig
from nemomodel.model.layers import CachedLinear, CachedNorm, Linear
from nemomodel.model.past import STEP_POSITIONS, Past
from nemomodel.ops.conv import causal_conv
from nemomodel.ops.documents import Documents
from nemomodel.ops.linear import take_rows
from nemomodel.ops.norm import gated_group_rms_norm
from nemomodel.ops.precision import accumulator, wide
from nemomodel.ops.ssd import ssd, ssd_from_state
from nemomodel.ops.step import conv_step, ssd_step
from nemomodel.parallel.exchange import (
    gather_positions,
    heads_to_positions,
    positions_to_heads,
    scatter_positions,
)
from nemomodel.parallel.mesh import SINGLE, Mesh
from nemomodel.parallel.shard import parameter, relative, scaled, shared_by, stacked


class GatedNorm(nn.Module):
    """Group RMSNorm of x * silu(z).

    Args:
        channels: those of `size` that this rank has, in `num_groups` groups.
    """

    def __init__(
        self, size: int, *, channels: range, num_groups: int, eps: float, dtype: torch.dtype
    ):
        super().__init__()
        self.num_groups, self.eps = num_groups, eps
        self.weight = parameter(size, dtype=dtype, rows=[channels])

    def forward(self, x_SBI: Tensor, z_SBI: Tensor) -> Tensor:
        return gated_group_rms_norm(x_SBI, z_SBI, self.weight, self.eps, self.num_groups)


class Mamba(nn.Module):
    """z, x, B, C, dt = in_proj(u); y = out_proj(norm(ssd(conv(x, B, C), dt) * silu(z))).

    The inner width I is num_heads * head_dim. A_log, D and dt_bias are FP32 in every precision:
    they enter exponentials. tp and cp cut heads and groups; with more cp ranks than groups are
    left several work with the same B and C.
    """

    def __init__(
        self,
        config: MambaConfig,
        hidden_size: int,
        eps: float,
        *,
        dtype: torch.dtype,
        mesh: Mesh = SINGLE,
    ):
        super().__init__()
        self.config, self.tp, self.cp = config, mesh.tp, mesh.cp
        H, P, G, N = config.num_heads, config.head_dim, config.num_groups, config.state_size
        wide = accumulator(dtype)
        heads, groups = mesh.tp.part(H), mesh.tp.part(G)
        inner, state = scaled(heads, P), scaled(groups, N)
        # Rows of in_proj in this order; the middle three pass the convolution together.
        rows = stacked((H * P, inner), (H * P, inner), (G * N, state), (G * N, state), (H, heads))
        conv_rows = stacked((H * P, inner), (G * N, state), (G * N, state))
        conv_size = H * P + 2 * G * N
        self.split = [len(part) for part in rows]
        self.in_proj = Linear(hidden_size, H * P + conv_size + H, dtype=dtype, rows=rows)
        taps = config.conv_kernel
        self.conv_weight = parameter(conv_size, taps, dtype=dtype, rows=conv_rows)
        self.conv_bias = parameter(conv_size, dtype=dtype, rows=conv_rows)
        self.A_log = parameter(H, dtype=wide, rows=[heads])
        self.D = parameter(H, dtype=wide, rows=[heads])
        self.dt_bias = parameter(H, dtype=wide, rows=[heads])
        self.norm = GatedNorm(H * P, channels=inner, num_groups=len(groups), eps=eps, dtype=dtype)
        self.out_proj = Linear(H * P, hidden_size, dtype=dtype, columns=[inner])
        # The channels of x | B | C | dt that each cp rank works on.
        self.parts = []
        for each in mesh.cp.parts(heads):
            own = relative(each, heads)
            own_groups = scaled(relative(shared_by(each, H // G), groups), N)
            x, B, C, dt = self.split[1:]
            self.parts.append(
                stacked((x, scaled(own, P)), (B, own_groups), (C, own_groups), (dt, own))
            )

    def forward(self, x_SBD: Tensor, documents: Documents | None) -> Tensor:
        zxBCdt = self.in_proj(gather_positions(x_SBD, self.tp))
        z, xBCdt = zxBCdt.split([self.split[0], sum(self.split[1:])], dim=-1)
        *conv_split, heads = (len(part) for part in self.parts[self.cp.rank])
        xBC, dt = positions_to_heads(xBCdt, self.parts, self.cp).split(
            [sum(conv_split), heads], dim=-1
        )
        conv_weight, conv_bias, dt_bias, A_log, D = self._own_weights()
        xBC = causal_conv(xBC, conv_weight, conv_bias, documents)
        x, B, C = xBC.split(conv_split, dim=-1)
        dt_SBH = F.softplus(dt.to(dt_bias.dtype) + dt_bias)
        if self.config.dt_min:
            dt_SBH = dt_SBH.clamp(min=self.config.dt_min)
        y_SBHP = ssd(
            rearrange(x, "s b (h p) -> s b h p", p=self.config.head_dim),
            dt_SBH,
            -A_log.exp(),
            rearrange(B, "s b (g n) -> s b g n", n=self.config.state_size),
            rearrange(C, "s b (g n) -> s b g n", n=self.config.state_size),
            D,
            chunk_size=self.config.chunk_size,
            documents=documents,
        )
        y_SBI = heads_to_positions(rearrange(y_SBHP, "s b h p -> s b (h p)"), self.cp)
        return scatter_positions(self.out_proj(self.norm(y_SBI, z)), self.tp)

    def _own_weights(self) -> list[Tensor]:
        """Of the channels and heads that this cp rank works on."""
        weights = [self.conv_weight, self.conv_bias, self.dt_bias, self.A_log, self.D]
        if self.cp.size == 1:
            return weights
        *conv, heads = self.parts[self.cp.rank]
        heads = relative(heads, range(sum(self.split[1:4]), heads.stop))
        return [
            take_rows(weight, rows)
            for weight, rows in zip(weights, [conv] * 2 + [[heads]] * 3, strict=True)
        ]


class CachedMamba:
    """The mixer over positions that follow earlier ones, and what it remembers of those.

    That is the last W - 1 inputs of the convolution and the state [B, H, P, N] in FP32. Of the
    last pass, if it was short, it has both after every position.
    """

    def __init__(self, mixer: Mamba, *, batch_size: int):
        self.mixer, self.split, c = mixer, mixer.split, mixer.config
        self.split_in = [self.split[0], sum(self.split[1:4]), self.split[4]]
        self.in_proj = CachedLinear(mixer.in_proj.weight)
        self.out_proj = CachedLinear(mixer.out_proj.weight)
        self.norm = CachedNorm(mixer.norm.weight.unflatten(0, (c.num_groups, -1)), mixer.norm.eps)
        self.taps_WC, self.conv_bias = wide(mixer.conv_weight).T.contiguous(), wide(mixer.conv_bias)
        self.A_H, self.D_H, self.dt_bias = -mixer.A_log.exp(), mixer.D, mixer.dt_bias
        self.inputs_SBC = mixer.conv_weight.new_zeros(
            c.conv_kernel - 1, batch_size, mixer.conv_weight.shape[0]
        )
        # After each position of the last pass, as far as it was short.
        self.states_SBHPN = self.A_H.new_zeros(1, batch_size, c.num_heads, c.head_dim, c.state_size)
        self.kept = 0  # positions of the last pass; the state after them is [kept - 1]

    def __call__(self, u_TD: Tensor, past: Past) -> Tensor:
        S, B, _, c, W = *past[:3], self.mixer.config, self.taps_WC.shape[0]
        zxBCdt = self.in_proj(u_TD).view(S, B, -1)
        z, xBC, dt = zxBCdt.split_with_sizes(self.split_in, -1)
        dt_SBH = F.softplus(dt + self.dt_bias)
        if c.dt_min:
            dt_SBH = dt_SBH.clamp_(min=c.dt_min)
        if past.real_SB1 is not None:
            # Padding is like nothing at all: no input to the convolution, no step of the state.
            xBC, dt_SBH = xBC * past.real_SB1, dt_SBH * past.real_SB1
        self.inputs_SBC = torch.cat([self.inputs_SBC[self.kept : self.kept + W - 1], xBC])
        state_BHPN = self.states_SBHPN[max(self.kept - 1, 0)]
        if S <= STEP_POSITIONS:
            xBC = conv_step(self.inputs_SBC, self.taps_WC, self.conv_bias).to(u_TD.dtype)
        else:
            weights = self.mixer.conv_weight, self.mixer.conv_bias
            xBC = causal_conv(self.inputs_SBC, *weights, None)[W - 1 :]
        x, B_, C = xBC.split_with_sizes(self.split[1:4], -1)
        x_SBHP = x.view(S, B, c.num_heads, c.head_dim)
        B_SBGN = B_.view(S, B, c.num_groups, c.state_size)
        C_SBGN = C.view(S, B, c.num_groups, c.state_size)
        inputs = x_SBHP, dt_SBH, self.A_H, B_SBGN, C_SBGN, self.D_H, state_BHPN
        if S <= STEP_POSITIONS:
            if self.states_SBHPN.shape[0] < S:
                self.states_SBHPN = state_BHPN.new_empty(S, *state_BHPN.shape)
            y_SBHP = ssd_step(*inputs, self.states_SBHPN[:S])
            self.kept = S
        else:
            y_SBHP, state_BHPN = ssd_from_state(*inputs, chunk_size=c.chunk_size)
            self.states_SBHPN = state_BHPN.unsqueeze(0)
            self.inputs_SBC, self.kept = self.inputs_SBC[S:].clone(), 0
        gated = F.silu(wide(z)).mul_(y_SBHP.flatten(-2)).view(S * B, c.num_groups, -1)
        return self.out_proj(self.norm(gated).flatten(1).to(u_TD.dtype))

    def keep(self, count: int) -> None:
        """Forget the positions of the last pass but its first `count`, at least 1."""
        self.kept = count

    def reset(self) -> None:
        """Forget everything."""
        self.inputs_SBC = torch.zeros_like(self.inputs_SBC[: len(self.taps_WC) - 1])
        self.states_SBHPN = torch.zeros_like(self.states_SBHPN[:1])
        self.kept = 0
