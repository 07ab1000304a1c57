"""The Mamba-2 recurrence, one time step at a time."""

import torch
from torch import Tensor


def ssd_oracle(
    x_BSHP: Tensor,
    dt_BSH: Tensor,
    A_H: Tensor,
    B_BSGN: Tensor,
    C_BSGN: Tensor,
    D_H: Tensor,
    *,
    document_BS: Tensor | None = None,
) -> Tensor:
    """State-space recurrence with one scalar decay per head and step.

        h_s = exp(dt_s A) h_{s-1} + dt_s x_s B_s^T        h = 0 before a document's first position
        y_s = h_s C_s + D x_s

    dt is the positive time step (after softplus), A is negative. Heads h of one group are
    neighbours: group g serves heads g * H/G to (g + 1) * H/G - 1.

    Source: arXiv:2405.21060 (SSD, scalar A per head).
    """
    batch, length, heads, head_dim = x_BSHP.shape
    groups, states = B_BSGN.shape[2:]
    out_BSHP = []
    state_BHPN = x_BSHP.new_zeros(batch, heads, head_dim, states)
    for s in range(length):
        if document_BS is not None and s > 0:
            keep_B = document_BS[:, s] == document_BS[:, s - 1]
            state_BHPN = torch.where(
                keep_B[:, None, None, None], state_BHPN, torch.zeros_like(state_BHPN)
            )
        y_HBP, state_HBPN = [], []
        for h in range(heads):
            g = h // (heads // groups)
            dt_B = dt_BSH[:, s, h]
            decay_B = torch.exp(dt_B * A_H[h])
            x_BP, B_BN, C_BN = x_BSHP[:, s, h], B_BSGN[:, s, g], C_BSGN[:, s, g]
            inject_BPN = dt_B[:, None, None] * x_BP[:, :, None] * B_BN[:, None, :]
            new_BPN = decay_B[:, None, None] * state_BHPN[:, h] + inject_BPN
            y_HBP.append((new_BPN * C_BN[:, None, :]).sum(-1) + D_H[h] * x_BP)
            state_HBPN.append(new_BPN)
        out_BSHP.append(torch.stack(y_HBP, dim=1))
        state_BHPN = torch.stack(state_HBPN, dim=1)
    return torch.stack(out_BSHP, dim=1)
