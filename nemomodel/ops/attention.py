"""Causal grouped-query attention without positional embedding."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from nemomodel.ops.documents import Documents


def causal_attention(
    q_SBHP: Tensor, k_SBGP: Tensor, v_SBGP: Tensor, documents: Documents | None
) -> Tensor:
    """softmax(q k^T / sqrt(P)) v over earlier positions of the same document; [S, B, H, P]."""
    q, k, v = (rearrange(t, "s b h p -> b h s p") for t in (q_SBHP, k_SBGP, v_SBGP))
    if documents is None or len(documents.spans) == q.shape[0]:
        return rearrange(_attend(q, k, v), "b h s p -> s b h p")
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return _attend_varlen(q_SBHP, k_SBGP, v_SBGP, documents)
    # One call per document: nothing to mask, and no work on pairs that cannot meet.
    y = torch.cat(
        [
            _attend(*(t[b : b + 1, :, start:end] for t in (q, k, v)))[0]
            for b, start, end in documents.spans
        ],
        dim=1,
    )
    return rearrange(y, "h (b s) p -> s b h p", s=q_SBHP.shape[0])


def _attend(q_BHSP: Tensor, k_BGSP: Tensor, v_BGSP: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q_BHSP, k_BGSP, v_BGSP, is_causal=True, enable_gqa=True)


def _attend_varlen(q_SBHP: Tensor, k_SBGP: Tensor, v_SBGP: Tensor, documents: Documents) -> Tensor:
    """All documents in one kernel; they lie one after another in "(b s)" order."""
    from torch.nn.attention.varlen import varlen_attn

    S, _, H, _ = q_SBHP.shape
    repeat = H // k_SBGP.shape[2]
    k_SBHP, v_SBHP = (t.repeat_interleave(repeat, dim=2) for t in (k_SBGP, v_SBGP))
    q, k, v = (rearrange(t, "s b h p -> (b s) h p").contiguous() for t in (q_SBHP, k_SBHP, v_SBHP))
    starts = [b * S + start for b, start, _ in documents.spans]
    borders = torch.tensor([*starts, len(q)], dtype=torch.int32).to(q.device, non_blocking=True)
    longest = max(end - start for _, start, end in documents.spans)
    causal = (-1, 0)
    y = varlen_attn(q, k, v, borders, borders, longest, longest, window_size=causal)
    return rearrange(y, "(b s) h p -> s b h p", s=S)
