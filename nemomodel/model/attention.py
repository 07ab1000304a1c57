"""Grouped-query attention without positional embedding: order comes from the Mamba layers."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nemomodel.config.schema import AttentionConfig
from nemomodel.model.layers import CachedLinear, Linear
from nemomodel.model.past import STEP_POSITIONS, Past
from nemomodel.ops.attention import causal_attention
from nemomodel.ops.documents import Documents
from nemomodel.parallel.exchange import (
    gather_positions,
    heads_to_positions,
    positions_to_heads,
    scatter_positions,
)
from nemomodel.parallel.mesh import SINGLE, Mesh
from nemomodel.parallel.shard import relative, scaled, shared_by, stacked


class Attention(nn.Module):
    """out_proj(softmax(q k^T / sqrt(P)) v) over the earlier positions of the same document.

    tp and cp cut the heads. With more tp ranks than key/value heads each rank makes the keys and
    values of all heads, for its own positions; with more ranks than such heads in all, several
    work with the same ones.
    """

    def __init__(
        self, config: AttentionConfig, hidden_size: int, *, dtype: torch.dtype, mesh: Mesh = SINGLE
    ):
        super().__init__()
        H, G, P = config.num_heads, config.num_kv_heads, config.head_dim
        self.head_dim, self.tp, self.cp = P, mesh.tp, mesh.cp
        heads = mesh.tp.part(H)
        self.groups = shared_by(heads, H // G)
        self.kv_cut = G % mesh.tp.size == 0
        kv_rows = [scaled(self.groups, P)] if self.kv_cut else None
        self.q_proj = Linear(hidden_size, H * P, dtype=dtype, rows=[scaled(heads, P)])
        self.k_proj = Linear(hidden_size, G * P, dtype=dtype, rows=kv_rows)
        self.v_proj = Linear(hidden_size, G * P, dtype=dtype, rows=kv_rows)
        self.out_proj = Linear(H * P, hidden_size, dtype=dtype, columns=[scaled(heads, P)])
        # The channels of q | k | v that each cp rank works on.
        self.parts = []
        for each in mesh.cp.parts(heads):
            q, kv = relative(each, heads), relative(shared_by(each, H // G), self.groups)
            sizes = [(len(heads), q), (len(self.groups), kv), (len(self.groups), kv)]
            self.parts.append([scaled(part, P) for part in stacked(*sizes)])

    def forward(self, x_SBD: Tensor, documents: Documents | None) -> Tensor:
        whole_SBD = gather_positions(x_SBD, self.tp)
        q, k, v = self.q_proj(whole_SBD), *self._keys_and_values(x_SBD, whole_SBD)
        if self.cp.size > 1:
            qkv = positions_to_heads(torch.cat([q, k, v], -1), self.parts, self.cp)
            q, k, v = qkv.split([len(part) for part in self.parts[0]], -1)
        q_SBHP, k_SBGP, v_SBGP = (
            rearrange(t, "s b (h p) -> s b h p", p=self.head_dim) for t in (q, k, v)
        )
        y_SBHP = causal_attention(q_SBHP, k_SBGP, v_SBGP, documents)
        y_SBI = heads_to_positions(rearrange(y_SBHP, "s b h p -> s b (h p)"), self.cp)
        return scatter_positions(self.out_proj(y_SBI), self.tp)

    def _keys_and_values(self, x_SBD: Tensor, whole_SBD: Tensor) -> tuple[Tensor, ...]:
        if self.kv_cut:
            return self.k_proj(whole_SBD), self.v_proj(whole_SBD)
        kv = gather_positions(torch.cat([self.k_proj(x_SBD), self.v_proj(x_SBD)], -1), self.tp)
        mine = scaled(self.groups, self.head_dim)
        return tuple(t[..., mine.start : mine.stop] for t in kv.chunk(2, -1))


class CachedAttention:
    """The mixer over positions that follow earlier ones, and the keys and values of those.

    Both together are [2, B, G, max_length, P], filled from the left; what is forgotten gets
    written over.
    """

    def __init__(self, mixer: Attention, *, batch_size: int, max_length: int):
        q, k, v = (p.weight for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        self.head_dim, self.split = mixer.head_dim, [len(q), 2 * len(k)]
        self.heads_per_group, self.num_groups = len(q) // len(k), len(k) // mixer.head_dim
        self.qkv_proj = CachedLinear(torch.cat([q, k, v]))
        self.out_proj = CachedLinear(mixer.out_proj.weight)
        shape = 2, batch_size, self.num_groups, max_length, mixer.head_dim
        self.kv = q.new_zeros(shape)

    def __call__(self, x_TD: Tensor, past: Past) -> Tensor:
        S, B, length, Q, G, P = *past[:4], self.num_groups, self.head_dim
        q, kv = self.qkv_proj(x_TD).split_with_sizes(self.split, -1)
        kv = kv.view(S, B, 2, G, P)
        self.kv.narrow(3, length, S).copy_(kv.permute(2, 1, 3, 0, 4))
        if Q > STEP_POSITIONS and length == 0:
            k_SBGP, v_SBGP = kv.unbind(2)
            y_SBHP = causal_attention(q.view(S, B, -1, P), k_SBGP, v_SBGP, past.documents)
            return self.out_proj(y_SBHP.reshape(S * B, -1))
        k, v = self.kv.narrow(3, 0, length + S).unbind()
        if Q < S:
            q = q[(S - Q) * B :]
        # The query heads of a group are rows of one product with its keys.
        rows = q.reshape(Q, B, G, -1, P).permute(1, 2, 0, 3, 4).reshape(B, G, -1, P)
        rows = F.scaled_dot_product_attention(rows, k, v, attn_mask=past.sees)
        y_QBGhP = rows.reshape(B, G, Q, -1, P).permute(2, 0, 1, 3, 4)
        return self.out_proj(y_QBGhP.reshape(Q * B, -1))
