"""Causal depthwise convolution with SiLU, sequence first."""

import torch
from torch import Tensor

from nemomodel.ops.backend import kernel_takes
from nemomodel.ops.documents import Documents
from nemomodel.ops.wgrad import deliver_grad, widen


def causal_conv(x_SBC: Tensor, weight: Tensor, bias: Tensor, documents: Documents | None) -> Tensor:
    """y_s = silu(bias + sum_w weight[:, W-1-w] x_{s-w}); taps from another document count as 0.

    Args:
        weight: [C, W]; the last column meets the current position.

    Accumulates in FP32 and keeps only x for the backward pass.
    """
    id_SB = documents.id_SB if documents else None
    if kernel_takes("causal_conv1d", x_SBC):
        return _conv_causal_conv1d(x_SBC, widen(weight), widen(bias), id_SB)
    return _CausalConv.apply(x_SBC, weight, bias, id_SB)


def _conv_causal_conv1d(x, weight, bias, id_SB) -> Tensor:
    from causal_conv1d import causal_conv1d_fn

    seq_idx = id_SB.T.contiguous() if id_SB is not None else None
    y = causal_conv1d_fn(x.permute(1, 2, 0), weight, bias, seq_idx=seq_idx, activation="silu")
    return y.permute(2, 0, 1)


def _accumulate(x_SBC, weight, bias, id_SB):
    """bias + sum of taps, wide."""
    wide = x_SBC if x_SBC.dtype == torch.float64 else x_SBC.float()
    taps = weight.to(wide.dtype).T.contiguous()  # [W, C]
    acc = torch.addcmul(bias.to(wide.dtype), wide, taps[-1])
    for w in range(1, min(len(taps), len(wide))):
        acc[w:].addcmul_(_same_document(wide[:-w], id_SB, w), taps[-1 - w])
    return acc, wide, taps


def _same_document(x_SBC, id_SB, distance):
    """x of positions whose successor at `distance` is in the same document, else 0."""
    if id_SB is None:
        return x_SBC
    return x_SBC * (id_SB[:-distance] == id_SB[distance:]).unsqueeze(-1)


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, id_SB):
        acc, _, _ = _accumulate(x, weight, bias, id_SB)
        ctx.save_for_backward(x, id_SB)
        ctx.weight, ctx.bias = weight, bias
        return torch.nn.functional.silu(acc, inplace=True).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, id_SB = ctx.saved_tensors
        acc, wide, taps = _accumulate(x, ctx.weight, ctx.bias, id_SB)
        d_acc = torch.ops.aten.silu_backward(dy.to(acc.dtype), acc)
        dx = d_acc * taps[-1]
        dw = torch.empty_like(taps)
        dw[-1] = (d_acc * wide).sum((0, 1))
        for w in range(1, len(taps)):
            if w >= len(wide):
                dw[-1 - w] = 0
                continue
            d_tap = _same_document(d_acc[w:], id_SB, w)
            dx[:-w].addcmul_(d_tap, taps[-1 - w])
            dw[-1 - w] = (d_tap * wide[:-w]).sum((0, 1))
        d_weight = deliver_grad(ctx.weight, dw.T) if ctx.needs_input_grad[1] else None
        d_bias = deliver_grad(ctx.bias, d_acc.sum((0, 1))) if ctx.needs_input_grad[2] else None
        return dx.to(x.dtype), d_weight, d_bias, None
