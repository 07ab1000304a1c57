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
from einops import rearrange
from torch import Tensor

from nemomodel.ops.backend import kernel_takes
from nemomodel.ops.documents import Documents


CPU_CHUNK = 64
"""Longest chunk on a CPU: work within chunks grows with Q, and its squares should stay in cache."""


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


def _ssd_mamba_ssm(x, dt, A, B, C, D, chunk_size, id_SB) -> Tensor:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    x, dt, B, C = (t.transpose(0, 1) for t in (x, dt, B, C))
    seq_idx = id_SB.T.contiguous() if id_SB is not None else None
    return mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=D, seq_idx=seq_idx).transpose(
        0, 1
    )


# Shapes below: J chunks; h heads of one group, so that H = G * h; X = h * P.


class _Chunks(NamedTuple):
    """The inputs cut into chunks, padded at the end with steps that change nothing (dt = 0)."""

    x: Tensor  # [J, B, G, Q, h, P]
    dt: Tensor  # [J, B, G, h, Q]
    B: Tensor  # [J, B, G, Q, N]
    C: Tensor  # [J, B, G, Q, N]
    sees: Tensor  # [J or 1, B or 1, 1, Q, Q], 1 where i >= j in the same document, else 0
    starts_here: Tensor | None  # [J, B, 1, 1, Q], True where no document border lies since
    # the end of the last chunk
    ends_here: Tensor | None  # [J, B, 1, 1, Q], True where none lies until the chunk's end


class _Decays(NamedTuple):
    """exp of sums of dt A, zero across document borders."""

    sums: Tensor  # [J, B, G, h, Q], sum of dt A from the start of the chunk or document
    from_start: Tensor  # [J, B, G, h, Q], from the state before the chunk to position i
    to_end: Tensor  # [J, B, G, h, Q], from position j to the state after the chunk
    whole: Tensor  # [J, B, G, h], from the state before the chunk to the state after it


def _cut(x, dt, B, C, Q, id_SB) -> _Chunks:
    S, G = x.shape[0], B.shape[2]
    padding = -S % Q

    def pad(t, value=0):
        return torch.nn.functional.pad(t, (0, 0) * (t.dim() - 1) + (0, padding), value=value)

    if padding:
        x, dt, B, C = (pad(t) for t in (x, dt, B, C))
    causal = torch.ones(Q, Q, dtype=dt.dtype, device=dt.device).tril_()
    sees, starts_here, ends_here = causal.expand(1, 1, 1, Q, Q), None, None
    if id_SB is not None:
        # Padding belongs to the last document: nothing comes after it.
        id_ = torch.cat([id_SB, id_SB[-1:].expand(padding, -1)]) if padding else id_SB
        id_ = rearrange(id_, "(j q) b -> j b 1 1 q", q=Q)
        sees = causal * (id_.unsqueeze(-1) == id_.unsqueeze(-2)).squeeze(3)
        before = torch.cat([id_[:1, ..., :1], id_[:-1, ..., -1:]])
        starts_here, ends_here = id_ == before, id_ == id_[..., -1:]
    return _Chunks(
        x=rearrange(x, "(j q) b (g h) p -> j b g q h p", q=Q, g=G).contiguous(),
        dt=rearrange(dt, "(j q) b (g h) -> j b g h q", q=Q, g=G).contiguous(),
        B=rearrange(B, "(j q) b g n -> j b g q n", q=Q).contiguous(),
        C=rearrange(C, "(j q) b g n -> j b g q n", q=Q).contiguous(),
        sees=sees,
        starts_here=starts_here,
        ends_here=ends_here,
    )


def _decays(c: _Chunks, A_H: Tensor) -> _Decays:
    steps = c.dt * A_H.view(c.dt.shape[2], -1, 1)
    # A product with a 0/1 matrix, not cumsum: a sum that starts at a document border then has
    # the same bits whatever the document before it holds.
    sums = steps @ c.sees.mT.to(steps.dtype)
    from_start, to_end = sums.clamp(min=-80).exp_(), (sums[..., -1:] - sums).clamp_(-80, 0).exp_()
    whole = from_start[..., -1].clone()
    if c.starts_here is not None:
        from_start = from_start * c.starts_here
        to_end = to_end.masked_fill_(~c.ends_here, 0)
        whole = whole * c.starts_here[..., -1]
    return _Decays(sums, from_start, to_end, whole)


def _within(d: _Decays, head: int) -> Tensor:
    """L of one head of every group, [J, B, G, Q, Q]; pairs that `sees` excludes are not 0 here.

    Clamped: a decay of exp(-80) is nothing, but denormal results make exp ten times slower, and
    above the diagonal it would overflow.
    """
    sums = d.sums[:, :, :, head]
    return (sums.unsqueeze(-1) - sums.unsqueeze(-2)).clamp_(-80, 0).exp_()


def _scores(c: _Chunks) -> Tensor:
    """C B^T of pairs that see each other, else 0: shared by the heads of a group."""
    return (c.C @ c.B.mT).mul_(c.sees)


def _scale(t_JBGQhP: Tensor, by_JBGhQ: Tensor) -> Tensor:
    return t_JBGQhP * by_JBGhQ.mT.unsqueeze(-1).to(t_JBGQhP.dtype)


def _states(c: _Chunks, d: _Decays, u: Tensor) -> Tensor:
    """State before each chunk, [J, B, G, X, N], from u = dt x."""
    added = _scale(u, d.to_end).flatten(-2).mT @ c.B
    states = torch.zeros_like(added, dtype=d.sums.dtype)
    by_head = states.unflatten(3, (u.shape[4], -1))
    for j in range(len(states) - 1):
        by_head[j + 1] = added[j].view_as(by_head[j])
        by_head[j + 1].addcmul_(by_head[j], d.whole[j, ..., None, None])
    return states


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, Q, id_SB):
        ctx.save_for_backward(x, dt, A, B, C, D, id_SB)
        ctx.Q = Q
        c = _cut(x, dt, B, C, Q, id_SB)
        d = _decays(c, A)
        u = _scale(c.x, c.dt)
        states = _states(c, d, u)
        y = (c.C @ states.to(c.C.dtype).mT).view_as(u)
        y = y.mul_(d.from_start.mT.unsqueeze(-1).to(y.dtype))
        scores = _scores(c)
        for head in range(u.shape[4]):
            M = _within(d, head).mul_(scores).to(u.dtype)
            y[..., head, :] += M @ u[..., head, :]
        y += c.x * D.view(y.shape[2], 1, -1, 1).to(y.dtype)
        return rearrange(y, "j b g q h p -> (j q) b (g h) p")[: len(x)]

    @staticmethod
    def backward(ctx, dy):
        x, dt, A, B, C, D, id_SB = ctx.saved_tensors
        S, Q, wide = len(x), ctx.Q, dt.dtype
        c = _cut(x, dt, B, C, Q, id_SB)
        dy = _cut(dy, dt, B, C, Q, None).x
        d = _decays(c, A)
        u = _scale(c.x, c.dt)
        states = _states(c, d, u).to(u.dtype)
        G, heads = u.shape[2], u.shape[4]

        # From the state before the chunk to the outputs.
        dy_start = _scale(dy, d.from_start).flatten(-2)  # [J, B, G, Q, X]
        dC = dy_start @ states
        d_states = (dy_start.mT @ c.C).to(wide)  # of the outputs alone, so far
        from_state = (c.C @ states.mT).view_as(dy)
        d_sums = d.from_start * _dot(dy, from_state, wide)

        # From chunk to chunk, last to first: afterwards d_after[j] meets the state after chunk j.
        d_after = torch.zeros_like(d_states)
        by_head = d_after.unflatten(3, (heads, -1))
        d_whole = torch.zeros_like(d.whole)
        for j in range(len(states) - 2, -1, -1):
            torch.add(
                d_states[j + 1].view_as(by_head[j]),
                by_head[j + 1] * d.whole[j + 1, ..., None, None],
                out=by_head[j],
            )
            d_whole[j] = (by_head[j] * states[j].view_as(by_head[j])).sum((-2, -1)) * d.whole[j]
        d_sums[..., -1] += d_whole

        # From the inputs of the chunk to the state after it.
        d_after = d_after.to(u.dtype)
        du = (c.B @ d_after.mT).view_as(u).mul_(d.to_end.mT.unsqueeze(-1).to(u.dtype))
        dB = _scale(u, d.to_end).flatten(-2) @ d_after
        to_state = c.dt * _dot(c.x, du, wide)
        d_sums[..., -1] += to_state.sum(-1)
        d_sums -= to_state

        # Within the chunk.
        scores = _scores(c)
        d_scores = torch.zeros_like(scores, dtype=wide)
        for head in range(heads):
            L = _within(d, head)
            dM = dy[..., head, :] @ u[..., head, :].mT
            L_dM = L * dM
            d_scores += L_dM
            # Row and column sums come from the same products, so that what enters both (the
            # diagonal, the largest part under strong decay) cancels to the last bit.
            L_dM *= scores
            d_sums[:, :, :, head] += L_dM.sum(-1) - L_dM.sum(-2)
            M = L.mul_(scores).to(u.dtype)
            du[..., head, :] += M.mT @ dy[..., head, :]
        d_scores = d_scores.mul_(c.sees).to(c.C.dtype)
        dC += d_scores @ c.B
        dB += d_scores.mT @ c.C

        d_steps = d_sums @ c.sees.to(wide)
        d_dt = _dot(c.x, du, wide) + d_steps * A.view(G, heads, 1)
        dA = (d_steps * c.dt).sum((0, 1, 4)).flatten()
        dD = _dot(c.x, dy, wide).sum((0, 1, 4)).flatten()
        dx = _scale(du, c.dt) + dy * D.view(G, 1, heads, 1).to(dy.dtype)
        return (
            rearrange(dx, "j b g q h p -> (j q) b (g h) p")[:S],
            rearrange(d_dt, "j b g h q -> (j q) b (g h)")[:S],
            dA,
            rearrange(dB, "j b g q n -> (j q) b g n")[:S],
            rearrange(dC, "j b g q n -> (j q) b g n")[:S],
            dD,
            None,
            None,
        )


def _dot(a_JBGQhP: Tensor, b_JBGQhP: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over P, as [J, B, G, h, Q]."""
    return torch.linalg.vecdot(a_JBGQhP.to(dtype), b_JBGQhP.to(dtype)).mT
