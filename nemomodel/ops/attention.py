"""Causal grouped-query attention without positional embedding."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from nemomodel.ops.documents import Documents
from nemomodel.ops.precision import accumulator
from nemomodel.ops.product import add_product, scaled_product


def causal_attention(
    q_SBHP: Tensor, k_SBGP: Tensor, v_SBGP: Tensor, documents: Documents | None
) -> Tensor:
    """softmax(q k^T / sqrt(P)) v over earlier positions of the same document; [S, B, H, P]."""
    q, k, v = (rearrange(t, "s b h p -> b h s p") for t in (q_SBHP, k_SBGP, v_SBGP))
    if documents is None or len(documents.spans) == len(q):
        return rearrange(_attend(q, k, v), "b h s p -> s b h p")
    if q.is_cuda and q.dtype == torch.bfloat16:
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
    if q_BHSP.is_cuda:
        return F.scaled_dot_product_attention(
            q_BHSP, k_BGSP, v_BGSP, is_causal=True, enable_gqa=True
        )
    return _BlockedAttention.apply(q_BHSP, k_BGSP, v_BGSP)


CPU_BLOCK_BYTES = 256
"""Queries at a time on a CPU, times the size of a number: few enough that their scores stay in
cache, enough for fast products."""


class _BlockedAttention(torch.autograd.Function):
    """Causal attention by blocks of queries, each against the keys up to its last one.

    Faster than PyTorch's kernel for a CPU (docs/performance.md). The query heads of a group are
    rows of one product with its keys, which are never repeated. Keeps the inputs alone; scores are
    formed again in the backward pass.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        B = len(q)
        q, k, v = _fold(q, k, v)
        y = torch.empty_like(q)
        for start, stop in _blocks(q):
            p = _probabilities(q, k, start, stop, dtype=v.dtype)
            y[:, :, start:stop] = (p.flatten(1, 2) @ v[:, :stop]).view_as(y[:, :, start:stop])
        return _unfold(y, B)

    @staticmethod
    def backward(ctx, dy):
        saved = ctx.saved_tensors
        q, k, v = _fold(*saved)
        dy, _, _ = _fold(dy, *saved[1:])
        wide, scale = accumulator(q.dtype), q.shape[-1] ** -0.5
        dq = torch.empty_like(q)
        dk, dv = (torch.zeros_like(t, dtype=wide) for t in (k, v))
        for start, stop in _blocks(q):
            q_block, dy_block = (t[:, :, start:stop].flatten(1, 2) for t in (q, dy))
            p = _probabilities(q, k, start, stop, dtype=wide).flatten(1, 2)
            add_product(dv[:, :stop], p.to(dy.dtype).mT, dy_block)
            dp = (dy_block @ v[:, :stop].mT).to(wide)
            ds = torch._softmax_backward_data(dp, p, -1, wide).to(q.dtype)
            dq_block = scaled_product(ds, k[:, :stop], scale)
            dq[:, :, start:stop] = dq_block.view_as(dq[:, :, start:stop])
            add_product(dk[:, :stop], ds.mT, q_block, scale)
        dk, dv = (d.to(k.dtype).view_as(t) for d, t in zip((dk, dv), saved[1:], strict=True))
        return _unfold(dq, len(saved[0])), dk, dv


# Below, the leading dimension is B * G and h counts the query heads of one group.


def _fold(q_BHSP: Tensor, k_BGSP: Tensor, v_BGSP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q as [B * G, h, S, P]; k and v as [B * G, S, P]."""
    q = rearrange(q_BHSP, "b (g h) s p -> (b g) h s p", g=k_BGSP.shape[1])
    k, v = (rearrange(t, "b g s p -> (b g) s p").contiguous() for t in (k_BGSP, v_BGSP))
    return q.contiguous(), k, v


def _unfold(q: Tensor, B: int) -> Tensor:
    return rearrange(q, "(b g) h s p -> b (g h) s p", b=B)


def _blocks(q: Tensor) -> list[tuple[int, int]]:
    S, size = q.shape[2], CPU_BLOCK_BYTES // q.element_size()
    return [(start, min(start + size, S)) for start in range(0, S, size)]


def _probabilities(q: Tensor, k: Tensor, start: int, stop: int, *, dtype: torch.dtype) -> Tensor:
    """softmax(q k^T / sqrt(P)) of queries start..stop: [B * G, h, stop - start, stop]."""
    q_block = q[:, :, start:stop]
    scores = scaled_product(q_block.flatten(1, 2), k[:, :stop].mT, q.shape[-1] ** -0.5)
    scores = scores.view(*q_block.shape[:3], stop)
    later = torch.ones(stop - start, stop - start, dtype=torch.bool).triu_(1)
    scores[..., start:].masked_fill_(later, -torch.inf)
    return scores.softmax(-1, dtype=dtype)  # wide inside


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
