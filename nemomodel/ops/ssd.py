"""State-space duality (SSD): the Mamba-2 recurrence as chunked matrix products.

    h_s = exp(dt_s A) h_{s-1} + dt_s x_s B_s^T          (arXiv:2405.21060, scalar A per head)
    y_s = h_s C_s + D x_s

Within a chunk of Q positions this is y = (C B^T * L) (dt x) with L_ij = exp(sum of dt A over
i >= k > j); between chunks one state per head is handed on (section 6 of the paper). The heads
of a group share B and C, which are never copied per head. The backward pass recomputes every
intermediate from the inputs.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from nemomodel.ops.backend import kernel_takes
from nemomodel.ops.documents import Documents

CPU_CHUNK = 64
"""Longest chunk on a CPU: the work within chunks grows with Q."""

BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}
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
    state = rearrange(state_BHPN, "b (g h) p n -> b g (h p) n", g=B_SBGN.shape[2])
    y_SBHP, states = _scan(x_SBHP, dt_SBH, A_H, B_SBGN, C_SBGN, D_H, chunk_size, None, state)
    return y_SBHP, states[-1].reshape(state_BHPN.shape)


def _ssd_mamba_ssm(x, dt, A, B, C, D, chunk_size, id_SB) -> Tensor:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    x, dt, B, C = (t.transpose(0, 1) for t in (x, dt, B, C))
    seq_idx = id_SB.T.contiguous() if id_SB is not None else None
    return mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D=D, seq_idx=seq_idx).transpose(
        0, 1
    )


# The sequence is worked off in blocks of J chunks, a state handed from each to the next. Shapes:
# h heads of one group, so that H = G * h; X = h * P.


class _Chunks(NamedTuple):
    """One block of the inputs, padded at the end with steps that change nothing (dt = 0)."""

    x: Tensor  # [J, B, G, Q, h, P]
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


def _blocks(x_SBHP: Tensor, Q: int) -> list[slice]:
    S, B, H, P = x_SBHP.shape
    chunks = max(1, BLOCK_ELEMENTS[x_SBHP.device.type] // (B * H * Q * max(P, Q)))
    return [slice(start, min(start + chunks * Q, S)) for start in range(0, S, chunks * Q)]


def _cut(x, dt, B, C, id_SB, *, rows: slice, Q: int) -> _Chunks:
    G, padding = B.shape[2], (rows.start - rows.stop) % Q

    def pad(t):
        t = t[rows]
        return F.pad(t, (0, 0) * (t.dim() - 1) + (0, padding)) if padding else t

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
        x=rearrange(pad(x), "(j q) b (g h) p -> j b g q h p", q=Q, g=G).contiguous(),
        dt=rearrange(pad(dt), "(j q) b (g h) -> j b g h q", q=Q, g=G).contiguous(),
        B=rearrange(pad(B), "(j q) b g n -> j b g q n", q=Q).contiguous(),
        C=rearrange(pad(C), "(j q) b g n -> j b g q n", q=Q).contiguous(),
        sees=sees,
        starts_here=starts_here,
        ends_here=ends_here,
    )


def _decays(c: _Chunks, A_H: Tensor) -> _Decays:
    steps = c.dt * A_H.view(c.dt.shape[2], -1, 1)
    # A product with a 0/1 matrix, not cumsum: a sum that starts at a document border then has
    # the same bits whatever the document before it holds.
    sums = steps @ c.sees.mT
    from_start, to_end = _exp(sums), _exp(sums[..., -1:] - sums)
    whole = from_start[..., -1].clone()
    if c.starts_here is not None:
        from_start = from_start * c.starts_here
        to_end = to_end * c.ends_here
        whole = whole * c.starts_here[..., -1]
    return _Decays(sums, from_start, to_end, whole)


LOWEST = -40.0
"""exp of less adds nothing to terms near 1, but its products are denormal numbers, which make
every operation on a CPU more than ten times slower."""


def _exp(sums: Tensor) -> Tensor:
    return sums.clamp(LOWEST, 0).exp_().mul_(sums > LOWEST)


def _within(d: _Decays) -> Tensor:
    """L, [J, B, G, h, Q, Q]; pairs that `sees` excludes are not 0 here, nor overflow."""
    return (d.sums.unsqueeze(-1) - d.sums.unsqueeze(-2)).clamp_(LOWEST, 0).exp_()


def _scores(c: _Chunks) -> Tensor:
    """C B^T of pairs that see each other, else 0: shared by the heads of a group."""
    return (c.C @ c.B.mT).to(c.dt.dtype).mul_(c.sees)


def _scale(t_JBGQhP: Tensor, by_JBGhQ: Tensor) -> Tensor:
    return t_JBGQhP * by_JBGhQ.mT.unsqueeze(-1).to(t_JBGQhP.dtype)


def _dot(a_JBGQhP: Tensor, b_JBGQhP: Tensor) -> Tensor:
    """Sum over P, as [J, B, G, h, Q]."""
    return torch.linalg.vecdot(a_JBGQhP, b_JBGQhP).mT


def _heads(t_JBGQhP: Tensor) -> Tensor:
    """[J, B, G, h, Q, P], and back."""
    return t_JBGQhP.transpose(3, 4)


def _hand_on(t: Tensor, whole: Tensor, order: Iterable[tuple[int, int]]) -> None:
    """t[to] += t[before] decayed over the chunk between the two, for each (before, to) in turn.

    Args:
        t: at the borders of chunks, [J + 1, B, G, X, N].
    """
    by_head = t.unflatten(3, (whole.shape[3], -1))
    for before, to in order:
        by_head[to].addcmul_(by_head[before], whole[min(before, to), ..., None, None])


def _states(c: _Chunks, d: _Decays, u: Tensor, state: Tensor) -> Tensor:
    """State before each chunk and after the last one, [J + 1, B, G, X, N], from u = dt x.

    Args:
        state: [B, G, X, N] before the first chunk.
    """
    added = _scale(u, d.to_end).flatten(-2).mT @ c.B
    states = torch.cat([state.unsqueeze(0), added.to(state.dtype)])
    _hand_on(states, d.whole, ((j, j + 1) for j in range(len(added))))
    return states


def _forward_block(c: _Chunks, A: Tensor, D: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """y [J, B, G, Q, h, P], and the state after the block."""
    d = _decays(c, A)
    u = _scale(c.x, c.dt)
    states = _states(c, d, u, state)
    from_state = (c.C @ states[:-1].to(u.dtype).mT).view_as(u)
    y = from_state.mul_(d.from_start.mT.unsqueeze(-1).to(u.dtype))
    M = _within(d).mul_(_scores(c).unsqueeze(3)).to(u.dtype)
    y += _heads(M @ _heads(u))
    y.addcmul_(c.x, D.view(y.shape[2], 1, -1, 1).to(y.dtype))
    return y, states[-1].clone()  # not a view of all of them


def _backward_block(
    c: _Chunks, A: Tensor, D: Tensor, dy: Tensor, state: Tensor, d_state: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of one block: dx, d_dt, dB, dC in chunks; dA, dD; and of the state before it.

    Args:
        state: before the block, as in the forward pass.
        d_state: gradient of the state after the block.
    """
    G, heads, wide = c.dt.shape[2], c.dt.shape[3], c.dt.dtype
    d = _decays(c, A)
    u = _scale(c.x, c.dt)
    states = _states(c, d, u, state)[:-1]
    narrow = states.to(u.dtype)
    wide_x, wide_dy = c.x.to(wide), dy.to(wide)

    # From the state before each chunk to the outputs.
    dy_start = _scale(dy, d.from_start).flatten(-2)  # [J, B, G, Q, X]
    dC = dy_start @ narrow
    from_state = (c.C @ narrow.mT).view_as(dy).to(wide)
    d_sums = d.from_start * _dot(wide_dy, from_state)

    # From chunk to chunk, last to first.
    d_states = torch.cat([(dy_start.mT @ c.C).to(wide), d_state.unsqueeze(0)])
    _hand_on(d_states, d.whole, ((j + 1, j) for j in reversed(range(len(states)))))
    d_state, d_after = d_states[0].clone(), d_states[1:]
    by_head = (t.unflatten(3, (heads, -1)).flatten(-2) for t in (d_after, states))
    d_sums[..., -1] += torch.linalg.vecdot(*by_head) * d.whole

    # From the inputs of each chunk to the state after it.
    narrow = d_after.to(u.dtype)
    du = (c.B @ narrow.mT).view_as(u).mul_(d.to_end.mT.unsqueeze(-1).to(u.dtype))
    dB = _scale(u, d.to_end).flatten(-2) @ narrow
    to_state = c.dt * _dot(wide_x, du.to(wide))

    # Within the chunks.
    scores, L = _scores(c).unsqueeze(3), _within(d)
    dy_h, u_h = _heads(dy).contiguous(), _heads(u).contiguous()
    L_dM = (dy_h @ u_h.mT).to(wide).mul_(L)
    M = L.mul_(scores)
    du += _heads(M.to(u.dtype).mT @ dy_h)
    d_scores = L_dM.sum(3).mul_(c.sees).to(c.C.dtype)
    dC += d_scores @ c.B
    dB += d_scores.mT @ c.C
    L_dM *= scores

    # The step at t is part of the decay from j to i where j < t <= i. Only those pairs are added:
    # sums over i less sums over j would cancel the others, which are larger, up to rounding.
    causal = torch.ones_like(c.sees[0, 0, 0]).tril_()  # [i, t], t <= i
    before = 1 - causal  # [j, t], j < t
    d_steps = d_sums @ c.sees + to_state @ (c.sees.mT * before)
    d_steps += (L_dM @ before).mul_(causal).sum(-2)
    d_dt = _dot(wide_x, du.to(wide)).addcmul_(d_steps, A.view(G, heads, 1))
    dA = (d_steps * c.dt).sum((0, 1, 4)).flatten()
    dD = _dot(wide_x, wide_dy).sum((0, 1, 4)).flatten()
    dx = _scale(du, c.dt).addcmul_(dy, D.view(G, 1, heads, 1).to(dy.dtype))
    return dx, d_dt, dB, dC, dA, dD, d_state


def _scan(x, dt, A, B, C, D, Q, id_SB, state: Tensor) -> tuple[Tensor, list[Tensor]]:
    """y, and the states [B, G, X, N] before each block and after the last one."""
    y, states = torch.empty_like(x, memory_format=torch.contiguous_format), [state]
    for rows in _blocks(x, Q):
        c = _cut(x, dt, B, C, id_SB, rows=rows, Q=Q)
        y_JBGQhP, state = _forward_block(c, A, D, state)
        y[rows] = _join(y_JBGQhP, rows)
        states.append(state)
    return y, states


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, Q, id_SB):
        G = B.shape[2]
        state = dt.new_zeros(x.shape[1], G, x.shape[2] // G * x.shape[3], B.shape[3])
        y, states = _scan(x, dt, A, B, C, D, Q, id_SB, state)
        ctx.save_for_backward(x, dt, A, B, C, D, id_SB, *states[:-1])
        ctx.Q = Q
        return y

    @staticmethod
    def backward(ctx, dy):
        x, dt, A, B, C, D, id_SB, *states = ctx.saved_tensors
        dx, d_dt, dB, dC = (
            torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, B, C)
        )
        dA, dD = torch.zeros_like(A), torch.zeros_like(D)
        d_state = torch.zeros_like(states[0])
        for rows, state in reversed(list(zip(_blocks(x, ctx.Q), states, strict=True))):
            c = _cut(x, dt, B, C, id_SB, rows=rows, Q=ctx.Q)
            dy_block = _cut(dy, dt, B, C, None, rows=rows, Q=ctx.Q).x
            *parts, dA_block, dD_block, d_state = _backward_block(c, A, D, dy_block, state, d_state)
            dx[rows], dB[rows], dC[rows] = (_join(parts[i], rows) for i in (0, 2, 3))
            d_dt[rows] = rearrange(parts[1], "j b g h q -> (j q) b (g h)")[: rows.stop - rows.start]
            dA += dA_block
            dD += dD_block
        return dx, d_dt, dA, dB, dC, dD, None, None


def _join(t: Tensor, rows: slice) -> Tensor:
    """Chunks back to positions: [S, B, H, P] of [J, B, G, Q, h, P], [S, B, G, N] of B or C."""
    pattern = "j b g q h p -> (j q) b (g h) p" if t.dim() == 6 else "j b g q n -> (j q) b g n"
    return rearrange(t, pattern)[: rows.stop - rows.start]
