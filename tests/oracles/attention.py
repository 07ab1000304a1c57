"""Causal grouped-query attention without positional embedding."""

import math

import torch
from torch import Tensor


def attention_oracle(
    q_BSHP: Tensor, k_BSGP: Tensor, v_BSGP: Tensor, *, document_BS: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(P)) v over the earlier positions of the same document, and its own.

    KV group g serves the neighbouring query heads g * H/G to (g + 1) * H/G - 1.

    Returns:
        [B, S, H, P].
    """
    batch, length, heads, head_dim = q_BSHP.shape
    groups = k_BSGP.shape[2]
    rows_BSHP = []
    for b in range(batch):
        out_SHP = []
        for s in range(length):
            seen = [t for t in range(s + 1) if _same_document(document_BS, b, s, t)]
            out_HP = []
            for h in range(heads):
                g = h // (heads // groups)
                score = k_BSGP[b, seen, g] @ q_BSHP[b, s, h] / math.sqrt(head_dim)
                share = torch.exp(score - score.max())
                out_HP.append((share / share.sum()) @ v_BSGP[b, seen, g])
            out_SHP.append(torch.stack(out_HP))
        rows_BSHP.append(torch.stack(out_SHP))
    return torch.stack(rows_BSHP)


def _same_document(document_BS: Tensor | None, b: int, s: int, t: int) -> bool:
    return document_BS is None or bool(document_BS[b, s] == document_BS[b, t])
