"""Mamba's convolution and recurrence for a few positions at a time, without gradients.

What decoding needs: the state after every position is kept, so that a pass can be rolled back.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def conv_step(inputs_SBC: Tensor, taps_WC: Tensor, bias: Tensor) -> Tensor:
    """`causal_conv` of all but the first W - 1 of the inputs, which only are looked back at.

    Args:
        taps_WC: the transposed conv weight, wide like `bias` [C].
    """
    W = taps_WC.shape[0]
    S = inputs_SBC.shape[0] - W + 1
    strides = inputs_SBC.stride()
    windows_SWBC = inputs_SBC.as_strided((S, W, *inputs_SBC.shape[1:]), (strides[0], *strides))
    acc_SBC = (windows_SWBC * taps_WC.unsqueeze(1)).sum(1)
    return F.silu(acc_SBC.add_(bias), inplace=True)


def ssd_step(
    x_SBHP: Tensor,
    dt_SBH: Tensor,
    A_H: Tensor,
    B_SBGN: Tensor,
    C_SBGN: Tensor,
    D_H: Tensor,
    state_BHPN: Tensor,
    states_SBHPN: Tensor,
) -> Tensor:
    """The recurrence of `ssd`, position by position, from a state; returns y_SBHP in dt's dtype.

    Args:
        states_SBHPN: becomes the state after each position. `state_BHPN` may be one of its rows.
    """
    S, B, H, P = x_SBHP.shape
    G, N = B_SBGN.shape[2:]
    heads, wide = (B, G, H // G), dt_SBH.dtype
    # h heads of one group: state [B, G, h, P, N], decay [.., 1, 1], x [.., P, 1], B [.., 1, N].
    decay = torch.mul(dt_SBH, A_H).exp_().view(S, *heads, 1, 1)
    added = torch.mul(x_SBHP, dt_SBH.unsqueeze(-1)).view(S, *heads, P, 1)
    B_wide = B_SBGN.to(wide).view(S, B, G, 1, 1, N)
    state = state_BHPN.view(*heads, P, N)
    states = states_SBHPN.view(S, *heads, P, N)
    for s in range(S):
        state = torch.mul(state, decay[s], out=states[s]).addcmul_(added[s], B_wide[s])
    C_wide = C_SBGN.to(wide).reshape(S * B * G, 1, N)
    y = torch.bmm(C_wide, states.view(S * B * G, -1, N).mT)
    return y.view(S, B, H, P).addcmul_(x_SBHP, D_H.view(H, 1))
