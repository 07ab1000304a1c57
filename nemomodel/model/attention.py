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

    Both together are [2, B, G, max_length, P], filled from the left; what is forgotten gets
    written over.
    """

    def __init__(self, mixer: Attention, *, batch_size: int, max_length: int):
        q_size, kv_size, _ = mixer.split
        self.head_dim, self.split = mixer.head_dim, [q_size, 2 * kv_size]
        self.heads_per_group, self.num_groups = q_size // kv_size, kv_size // mixer.head_dim
        self.qkv_proj = CachedLinear(mixer.qkv_proj.weight)
        self.out_proj = CachedLinear(mixer.out_proj.weight)
        shape = 2, batch_size, self.num_groups, max_length, mixer.head_dim
        self.kv = mixer.qkv_proj.weight.new_zeros(shape)

    def __call__(self, x_TD: Tensor, past: Past) -> Tensor:
        S, B, length, G, P = *past[:3], self.num_groups, self.head_dim
        q, kv = self.qkv_proj(x_TD).split_with_sizes(self.split, -1)
        kv = kv.view(S, B, 2, G, P)
        self.kv.narrow(3, length, S).copy_(kv.permute(2, 1, 3, 0, 4))
        if S > STEP_POSITIONS and length == 0:
            k_SBGP, v_SBGP = kv.unbind(2)
            y_SBHP = causal_attention(q.view(S, B, -1, P), k_SBGP, v_SBGP, past.documents)
            return self.out_proj(y_SBHP.reshape(S * B, -1))
        k, v = self.kv.narrow(3, 0, length + S).unbind()
        # The query heads of a group are rows of one product with its keys.
        rows = q.reshape(S, B, G, -1, P).permute(1, 2, 0, 3, 4).reshape(B, G, -1, P)
        rows = F.scaled_dot_product_attention(rows, k, v, attn_mask=past.sees)
        y_SBGhP = rows.reshape(B, G, S, -1, P).permute(2, 0, 1, 3, 4)
        return self.out_proj(y_SBGhP.reshape(S * B, -1))
