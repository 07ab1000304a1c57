"""Causal depthwise convolution over time."""

import torch
from torch import Tensor


def conv_oracle(
    x_BSC: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    document_BS: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """Each channel is filtered by its own W taps; tap W-1 meets the current position.

        y_s = bias + sum_w weight[:, w] x_{s - (W - 1 - w)}, then y * sigmoid(y) with `silu`

    A position before the row or in another document counts as zero.

    Args:
        weight: [C, W].
        bias: [C].
    """
    width = weight.shape[1]
    out_BSC = []
    for s in range(x_BSC.shape[1]):
        y_BC = bias.expand(x_BSC.shape[0], -1)
        for back in range(min(width, s + 1)):
            tap_BC = x_BSC[:, s - back] * weight[:, width - 1 - back]
            if document_BS is not None:
                same_B = document_BS[:, s - back] == document_BS[:, s]
                tap_BC = torch.where(same_B[:, None], tap_BC, torch.zeros_like(tap_BC))
            y_BC = y_BC + tap_BC
        out_BSC.append(y_BC * torch.sigmoid(y_BC) if silu else y_BC)
    return torch.stack(out_BSC, dim=1)
