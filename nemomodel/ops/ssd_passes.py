"""The passes of `ssd` between its matrix products; shapes as there.

Decays, states and their sums are wide, what enters a product is narrow (x's dtype).
"""

import torch
from torch import Tensor

from nemomodel.ops.fused import fused
from nemomodel.ops.precision import wide

LOWEST = -40.0
"""exp of less adds nothing to terms near 1, but its products are denormal numbers, which make
every operation on a CPU more than ten times slower."""


def _exp(sums: Tensor) -> Tensor:
    return sums.clamp(LOWEST, 0).exp_().mul_(sums > LOWEST)


@fused
def exp_sums(
    sums: Tensor, starts_here: Tensor | None, ends_here: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    from_start, to_end = _exp(sums), _exp(sums[..., -1:] - sums)
    whole = from_start[..., -1].clone()
    if starts_here is not None and ends_here is not None:
        from_start = from_start * starts_here
        to_end = to_end * ends_here
        whole = whole * starts_here[..., -1]
    return from_start, to_end, whole


def _within(sums: Tensor) -> Tensor:
    """L, [J, B, G, h, Q, Q]; pairs that `sees` excludes are not 0 here, nor overflow."""
    return (sums.unsqueeze(-1) - sums.unsqueeze(-2)).clamp_(LOWEST, 0).exp_()


def _scores(CB: Tensor, sees: Tensor) -> Tensor:
    """C B^T of pairs that see each other, else 0: shared by the heads of a group."""
    return wide(CB).mul(sees).unsqueeze(3)


def _per_head(t_JBGhQ: Tensor, dtype: torch.dtype) -> Tensor:
    """As a factor of [J, B, G, Q, h, P]."""
    return t_JBGhQ.mT.unsqueeze(-1).to(dtype)


def _dot(a_JBGQhP: Tensor, b_JBGQhP: Tensor) -> Tensor:
    """Sum over P, as [J, B, G, h, Q]."""
    return torch.linalg.vecdot(a_JBGQhP, b_JBGQhP).mT


def _heads(t_JBGQhP: Tensor) -> Tensor:
    """[J, B, G, h, Q, P], and back."""
    return t_JBGQhP.transpose(3, 4)


@fused
def take_steps(x: Tensor, dt: Tensor, to_end: Tensor) -> tuple[Tensor, Tensor]:
    """u = dt x by head, and u decayed to the end of the chunk."""
    u = x * _per_head(dt, x.dtype)
    return _heads(u).contiguous(), u.mul(_per_head(to_end, x.dtype)).contiguous()


@fused
def hand_on(added: Tensor, whole: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """From chunk to chunk: the state before each, narrow, and the one after the last.

    Args:
        added: what each chunk adds, [J, B, G, N, h, P].
    """
    before = []
    for chunk, decay in zip(added, whole, strict=True):
        before.append(state.to(added.dtype))
        state = torch.addcmul(wide(chunk), state, decay[:, :, None, :, None])
    return torch.stack(before), state


@fused
def weigh_pairs(sums: Tensor, CB: Tensor, sees: Tensor) -> Tensor:
    """C B^T * L."""
    return _within(sums).mul_(_scores(CB, sees)).to(CB.dtype)


@fused
def sum_outputs(
    out: Tensor, from_state: Tensor, from_start: Tensor, within: Tensor, x: Tensor, D: Tensor
) -> None:
    y = from_state * _per_head(from_start, x.dtype)
    out.copy_(y.add_(_heads(within)).addcmul_(x, D.to(x.dtype)))


@fused
def take_grads(dy: Tensor, from_start: Tensor) -> tuple[Tensor, Tensor]:
    """dy by head, and dy decayed back to the start of the chunk."""
    return _heads(dy).contiguous(), dy.mul(_per_head(from_start, dy.dtype)).contiguous()


@fused
def hand_back(
    added: Tensor, whole: Tensor, d_state: Tensor, states: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`hand_on` of gradients, last chunk to first: of the state after each chunk, narrow; of the
    decay of each whole chunk, times that decay; and of the state before the first.

    Args:
        states: before each chunk.
    """
    after, d_whole = [], []
    for j in reversed(range(len(added))):
        after.append(d_state.to(added.dtype))
        # In two steps: compiled, one over both would go down the heads with a stride.
        d_whole.append((d_state * wide(states[j])).sum(-1).sum(-2).mul_(whole[j]))
        d_state = torch.addcmul(wide(added[j]), d_state, whole[j, :, :, None, :, None])
    return torch.stack(after[::-1]), torch.stack(d_whole[::-1]), d_state


@fused
def weigh_pairs_backward(
    sums: Tensor, CB: Tensor, sees: Tensor, dM: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """M = C B^T * L, the gradient of C B^T, and that of log L."""
    scores, L = _scores(CB, sees), _within(sums)
    L_dM = wide(dM).mul(L)
    d_scores = L_dM.sum(3).mul_(sees).to(CB.dtype)
    return L.mul_(scores).to(CB.dtype), d_scores, L_dM.mul_(scores)


@fused
def sum_grads(
    dx: Tensor,
    x: Tensor,
    dy: Tensor,
    from_state: Tensor,
    to_state: Tensor,
    within: Tensor,
    dt: Tensor,
    from_start: Tensor,
    to_end: Tensor,
    D: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradient of x, into `dx`; sums over P for those of dt in u, log to_end, log from_start and D.

    Args:
        from_state: what the state before the chunk gives to y, not decayed.
        to_state: gradient of u by way of the state after the chunk, not decayed.
        within: gradient of u within the chunk, by head.
    """
    du_state = to_state * _per_head(to_end, x.dtype)
    du = du_state + _heads(within)
    dx.copy_((du * _per_head(dt, x.dtype)).addcmul_(dy, D.to(dy.dtype)))
    wide_x, wide_dy = wide(x), wide(dy)
    return (
        _dot(wide_x, wide(du)),
        dt * _dot(wide_x, wide(du_state)),
        from_start * _dot(wide_dy, wide(from_state)),
        _dot(wide_x, wide_dy),
    )
