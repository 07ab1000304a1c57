"""Grouped-query attention without positional embedding: order comes from the Mamba layers."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from nemomodel.config.schema import AttentionConfig
from nemomodel.model.layers import Linear
from nemomodel.model.past import STEP_POSITIONS, Past
from nemomodel.ops.attention import causal_attention
from nemomodel.ops.documents import Documents


class Attention(nn.Module):
    """out_proj(softmax(q k^T / sqrt(P)) v) over the earlier positions of the same document."""

    def __init__(self, config: AttentionConfig, hidden_size: int, *, dtype: torch.dtype):
        super().__init__()
        self.head_dim = config.head_dim
        q_size, kv_size = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        self.split = [q_size, kv_size, kv_size]
        self.qkv_proj = Linear(hidden_size, sum(self.split), dtype=dtype)  # rows q | k | v
        self.out_proj = Linear(q_size, hidden_size, dtype=dtype)

    def forward(self, x_SBD: Tensor, documents: Documents | None) -> Tensor:
        q, k, v = self.qkv_proj(x_SBD).split(self.split, dim=-1)
        q_SBHP, k_SBGP, v_SBGP = (
            rearrange(t, "s b (h p) -> s b h p", p=self.head_dim) for t in (q, k, v)
        )
        y_SBHP = causal_attention(q_SBHP, k_SBGP, v_SBGP, documents)
        return self.out_proj(rearrange(y_SBHP, "s b h p -> s b (h p)"))


class CachedAttention:
    """The mixer over positions that follow earlier ones, and the keys and values of those.

    Both are [B, G, max_length, P], filled from the left.
    """

    def __init__(self, mixer: Attention, *, batch_size: int, max_length: int):
        self.head_dim, self.split = mixer.head_dim, mixer.split
        self.qkv_proj, self.out_proj = mixer.qkv_proj.weight, mixer.out_proj.weight
        self.heads_per_group = self.split[0] // self.split[1]
        G = self.split[1] // self.head_dim
        self.k, self.v = self.qkv_proj.new_zeros(2, batch_size, G, max_length, self.head_dim)

    def __call__(self, x_SBD: Tensor, past: Past) -> Tensor:
        S, B, _ = x_SBD.shape
        G, P = self.k.shape[1], self.head_dim
        q, k, v = F.linear(x_SBD, self.qkv_proj).split_with_sizes(self.split, -1)
        k_SBGP, v_SBGP = k.view(S, B, G, P), v.view(S, B, G, P)
        stop = past.length + S
        self.k[:, :, past.length : stop] = k_SBGP.permute(1, 2, 0, 3)
        self.v[:, :, past.length : stop] = v_SBGP.permute(1, 2, 0, 3)
        if S > STEP_POSITIONS and past.length == 0:
            y_SBHP = causal_attention(q.view(S, B, -1, P), k_SBGP, v_SBGP, past.documents)
            return F.linear(y_SBHP.flatten(-2), self.out_proj)
        # The query heads of a group are rows of one product with its keys.
        rows = q.reshape(S, B, G, -1, P).permute(1, 2, 0, 3, 4).reshape(B, G, -1, P)
        rows = F.scaled_dot_product_attention(
            rows, self.k[:, :, :stop], self.v[:, :, :stop], attn_mask=past.sees
        )
        y_SBGhP = rows.reshape(B, G, S, -1, P).permute(2, 0, 1, 3, 4)
        return F.linear(y_SBGhP.reshape(S, B, -1), self.out_proj)
