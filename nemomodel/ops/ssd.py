"""State-space duality (SSD): the Mamba-2 recurrence as chunked matrix products.

    h_s = exp(dt_s A) h_{s-1} + dt_s x_s B_s^T          (arXiv:2405.21060, scalar A per head)
    y_s = h_s C_s + D x_s

Within a chunk of Q positions this is y = (C B^T * L) (dt x) with L_ij = exp(sum of dt A over
i >= k > j); between chunks one state per head is handed on (section 6 of the paper). The heads
of a group share B and C, which are never copied per head. The backward pass recomputes every
intermediate from the inputs.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from nemomodel.ops.backend import kernel_takes
from nemomodel.ops.documents import Documents
from nemomodel.ops.ssd_passes import (
    exp_sums,
    hand_back,
    hand_on,
    sum_grads,
    sum_outputs,
    take_grads,
    take_steps,
    weigh_pairs,
    weigh_pairs_backward,
)

CPU_CHUNK = 64
"""Longest chunk on a CPU: the work within chunks grows with Q."""

BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**26}
"""Size of the largest intermediates, so that memory does not grow with the length."""


def ssd(
    x_SBHP: Tensor,
    dt_SBH: Tensor,
    A_H: Tensor,
    B_SBGN: Tensor,
    C_SBGN: Tensor,
    D_H: Tensor,
    *,
    chunk_size: int,
    documents: Documents | None = None,
) -> Tensor:
    """Run the recurrence over S, from a zero state at the start of every document.

    Args:
        dt_SBH: time steps after softplus, FP32 like A_H (negative) and D_H. Decays, states and
            their sums stay in that dtype; products run in x's dtype.
        chunk_size: changes speed and memory, not the result. S need not be a multiple.

    Returns:
        y_SBHP in x's dtype.
    """
    if x_SBHP.device.type == "cpu":
        chunk_size = min(chunk_size, CPU_CHUNK)
    id_SB = documents.id_SB if documents else None
    if kernel_takes("mamba_ssm", x_SBHP, dt_SBH, B_SBGN, C_SBGN):
        return _ssd_mamba_ssm(x_SBHP, dt_SBH, A_H, B_SBGN, C_SBGN, D_H, chunk_size, id_SB)
    return _SSD.apply(x_SBHP, dt_SBH, A_H, B_SBGN, C_SBGN, D_H, chunk_size, id_SB)


@torch.no_grad()
def ssd_from_state(
    x_SBHP: Tensor,
    dt_SBH: Tensor,
    A_H: Tensor,
    B_SBGN: Tensor,
    C_SBGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor,
    *,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """`ssd` over one document that goes on from a state; no gradients.

    Args:
        state_BHPN: h before the first position, in dt's dtype.

    Returns:
        y_SBHP, and h after the last position in the shape of `state_BHPN`.
    """
    if x_SBHP.device.type == "cpu":
        chunk_size = min(chunk_size, CPU_CHUNK)
    state = rearrange(state_BHPN, "b (g h) p n -> b g n h p", g=B_SBGN.shape[2])
    y_SBHP, states = _scan(x_SBHP, dt_SBH, A_H, B_SBGN, C_SBGN, D_H, chunk_size, None, state)
    return y_SBHP, rearrange(states[-1], "b g n h p -> b (g h) p n")


def _ssd_mamba_ssm(x, dt, A, B, C, D, chunk_size, id_SB) -> Tensor:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    x, dt, B, C = (t.transpose(0, 1) for t in (x, dt, B, C))
    seq_idx = id_SB.T.contiguous() if id_SB is not None else None
    return mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=D, seq_idx=seq_idx).transpose(
        0, 1
    )


# The sequence is worked off in blocks of J chunks, a state handed from each to the next: matrix
# products, and between them one pass over what they left. h counts the heads of one group, so that
# H = G * h.


class _Chunks(NamedTuple):
    """One block of the inputs, padded at the end with steps that change nothing (dt = 0)."""

    x: Tensor  # [J, B, G, Q, h, P], a view
    dt: Tensor  # [J, B, G, h, Q]
    B: Tensor  # [J, B, G, Q, N]
    C: Tensor  # [J, B, G, Q, N]
    sees: Tensor  # [J or 1, B or 1, 1, Q, Q], 1 where i >= j in the same document, else 0
    starts_here: Tensor | None  # [J, B, 1, 1, Q], no document border since the last chunk's end
    ends_here: Tensor | None  # [J, B, 1, 1, Q], no document border until the chunk's end


class _Decays(NamedTuple):
    """exp of sums of dt A, zero across document borders."""

    sums: Tensor  # [J, B, G, h, Q], sum of dt A from the start of the chunk or document
    from_start: Tensor  # [J, B, G, h, Q], from the state before the chunk to position i
    to_end: Tensor  # [J, B, G, h, Q], from position j to the state after the chunk
    whole: Tensor  # [J, B, G, h], from the state before the chunk to the state after it


_X = "(j q) b (g h) p -> j b g q h p"
_DT = "(j q) b (g h) -> j b g h q"
_BC = "(j q) b g n -> j b g q n"


def _blocks(x_SBHP: Tensor, Q: int) -> list[slice]:
    S, B, H, P = x_SBHP.shape
    chunks = max(1, BLOCK_ELEMENTS[x_SBHP.device.type] // (B * H * Q * max(P, Q)))
    return [slice(start, min(start + chunks * Q, S)) for start in range(0, S, chunks * Q)]


def _pad(t: Tensor, rows: slice, Q: int) -> Tensor:
    """Some rows, and zeros up to whole chunks."""
    padding = (rows.start - rows.stop) % Q
    return F.pad(t[rows], (0, 0) * (t.dim() - 1) + (0, padding)) if padding else t[rows]


def _cut(x, dt, B, C, id_SB, *, rows: slice, Q: int) -> _Chunks:
    G, padding = B.shape[2], (rows.start - rows.stop) % Q
    causal = torch.ones(Q, Q, dtype=dt.dtype, device=dt.device).tril_()
    sees, starts_here, ends_here = causal.expand(1, 1, 1, Q, Q), None, None
    if id_SB is not None:
        # Padding belongs to the last document: nothing comes after it.
        own, last = id_SB[rows], id_SB[rows.stop - 1 : rows.stop].expand(padding, -1)
        ids = rearrange(torch.cat([own, last]), "(j q) b -> j b 1 1 q", q=Q)
        sees = causal * (ids.unsqueeze(-1) == ids.unsqueeze(-2)).squeeze(3)
        first = id_SB[max(rows.start - 1, 0)].view(1, -1, 1, 1, 1)
        starts_here = ids == torch.cat([first, ids[:-1, ..., -1:]])
        ends_here = ids == ids[..., -1:]
    return _Chunks(
        x=rearrange(_pad(x, rows, Q), _X, q=Q, g=G),
        dt=rearrange(_pad(dt, rows, Q), _DT, q=Q, g=G).contiguous(),
        B=rearrange(_pad(B, rows, Q), _BC, q=Q).contiguous(),
        C=rearrange(_pad(C, rows, Q), _BC, q=Q).contiguous(),
        sees=sees,
        starts_here=starts_here,
        ends_here=ends_here,
    )


def _decays(c: _Chunks, A_H: Tensor) -> _Decays:
    steps = c.dt * A_H.view(c.dt.shape[2], -1, 1)
    # A product with a 0/1 matrix, not cumsum: a sum that starts at a document border then has
    # the same bits whatever the document before it holds.
    sums = steps @ c.sees.mT
    return _Decays(sums, *exp_sums(sums, c.starts_here, c.ends_here))


def _forward_block(c: _Chunks, A: Tensor, D: Tensor, state: Tensor, out: Tensor) -> Tensor:
    """The state after the block; y goes into `out`, a view like x."""
    h, P = c.x.shape[-2:]
    d = _decays(c, A)
    u, u_end = take_steps(c.x, c.dt, d.to_end)
    added = (c.B.mT @ u_end.flatten(-2)).unflatten(-1, (h, P))
    states, state = hand_on(added, d.whole, state)
    from_state = (c.C @ states.flatten(-2)).unflatten(-1, (h, P))
    within = weigh_pairs(d.sums, c.C @ c.B.mT, c.sees) @ u
    sum_outputs(out, from_state, d.from_start, within, c.x, D.view(-1, 1, h, 1))
    return state


def _backward_block(
    c: _Chunks, A: Tensor, D: Tensor, dy: Tensor, state: Tensor, d_state: Tensor, dx: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of one block: d_dt, dB, dC in chunks; dA, dD; and of the state before it.

    Args:
        state: before the block, as in the forward pass.
        d_state: gradient of the state after the block.
        dx: where the gradient of x goes, a view like x.
    """
    G, _, h, P = c.x.shape[2:]
    d = _decays(c, A)
    u, u_end = take_steps(c.x, c.dt, d.to_end)
    dy_heads, dy_start = take_grads(dy, d.from_start)
    u_end, dy_start = u_end.flatten(-2), dy_start.flatten(-2)

    # From chunk to chunk.
    states, _ = hand_on((c.B.mT @ u_end).unflatten(-1, (h, P)), d.whole, state)
    d_added = (c.C.mT @ dy_start).unflatten(-1, (h, P))
    d_after, d_whole, d_state = hand_back(d_added, d.whole, d_state, states)
    states, d_after = states.flatten(-2), d_after.flatten(-2)
    dC, dB = dy_start @ states.mT, u_end @ d_after.mT
    from_state = (c.C @ states).unflatten(-1, (h, P))
    to_state = (c.B @ d_after).unflatten(-1, (h, P))

    # Within the chunks.
    M, d_scores, d_log = weigh_pairs_backward(d.sums, c.C @ c.B.mT, c.sees, dy_heads @ u.mT)
    dC += d_scores @ c.B
    dB += d_scores.mT @ c.C
    d_dt, d_to_end, d_sums, x_dy = sum_grads(
        dx,
        c.x,
        dy,
        from_state,
        to_state,
        M.mT @ dy_heads,
        c.dt,
        d.from_start,
        d.to_end,
        D.view(G, 1, h, 1),
    )

    # The step at t is part of the decay from j to i where j < t <= i. Only those pairs are added:
    # sums over i less sums over j would cancel the others, which are larger, up to rounding.
    causal = torch.ones_like(c.sees[0, 0, 0]).tril_()  # [i, t], t <= i
    before = 1 - causal  # [j, t], j < t
    d_sums[..., -1] += d_whole
    d_steps = d_sums @ c.sees + d_to_end @ (c.sees.mT * before)
    d_steps += (d_log @ before).mul_(causal).sum(-2)
    d_dt = torch.addcmul(d_dt, d_steps, A.view(G, h, 1))
    dA = (d_steps * c.dt).sum((0, 1, 4)).flatten()
    return d_dt, dB, dC, dA, x_dy.sum((0, 1, 4)).flatten(), d_state


def _whole_chunks(like: Tensor, Q: int) -> Tensor:
    """Empty, long enough for the padding of the last chunk."""
    return like.new_empty(-(-len(like) // Q) * Q, *like.shape[1:])


def _with_padding(t: Tensor, rows: slice, Q: int) -> Tensor:
    """Some rows of what `_whole_chunks` made."""
    return t[rows.start : rows.stop + (rows.start - rows.stop) % Q]


def _scan(x, dt, A, B, C, D, Q, id_SB, state: Tensor) -> tuple[Tensor, list[Tensor]]:
    """y, and the states [B, G, N, h, P] before each block and after the last one."""
    y, states = _whole_chunks(x, Q), [state]
    for rows in _blocks(x, Q):
        c = _cut(x, dt, B, C, id_SB, rows=rows, Q=Q)
        y_block = rearrange(_with_padding(y, rows, Q), _X, q=Q, g=B.shape[2])
        states.append(_forward_block(c, A, D, states[-1], y_block))
    return y[: len(x)], states


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, Q, id_SB):
        G, N = B.shape[2:]
        state = dt.new_zeros(x.shape[1], G, N, x.shape[2] // G, x.shape[3])
        y, states = _scan(x, dt, A, B, C, D, Q, id_SB, state)
        ctx.save_for_backward(x, dt, A, B, C, D, id_SB, *states[:-1])
        ctx.Q = Q
        return y

    @staticmethod
    def backward(ctx, dy):
        x, dt, A, B, C, D, id_SB, *states = ctx.saved_tensors
        Q, G = ctx.Q, B.shape[2]
        dx, d_dt, dB, dC = (_whole_chunks(t, Q) for t in (x, dt, B, C))
        dA, dD = torch.zeros_like(A), torch.zeros_like(D)
        d_state = torch.zeros_like(states[0])
        for rows, state in reversed(list(zip(_blocks(x, Q), states, strict=True))):
            c = _cut(x, dt, B, C, id_SB, rows=rows, Q=Q)
            dy_block = rearrange(_pad(dy, rows, Q), _X, q=Q, g=G)
            dx_block = rearrange(_with_padding(dx, rows, Q), _X, q=Q, g=G)
            d_dt_block, dB_block, dC_block, dA_block, dD_block, d_state = _backward_block(
                c, A, D, dy_block, state, d_state, dx_block
            )
            rearrange(_with_padding(d_dt, rows, Q), _DT, q=Q, g=G).copy_(d_dt_block)
            rearrange(_with_padding(dB, rows, Q), _BC, q=Q).copy_(dB_block)
            rearrange(_with_padding(dC, rows, Q), _BC, q=Q).copy_(dC_block)
            dA += dA_block
            dD += dD_block
        dx, d_dt, dB, dC = (t[: len(x)] for t in (dx, d_dt, dB, dC))
        return dx, d_dt, dA, dB, dC, dD, None, None
