"""Grouped-query attention without positional embedding: order comes from the Mamba layers."""

import torch
from einops import rearrange
from torch import Tensor, nn

from nemomodel.config.schema import AttentionConfig
from nemomodel.model.layers import Linear
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
