"""Causal depthwise convolution with SiLU, sequence first."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nemomodel.ops.backend import kernel_takes
from nemomodel.ops.documents import Documents
from nemomodel.ops.precision import wide
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


def _accumulate(
    x_SBC: Tensor, weight: Tensor, bias: Tensor, id_SB: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """bias + sum of taps; with x and the taps [W, C] it was made of, all wide."""
    x_SBC, taps = wide(x_SBC), wide(weight).T.contiguous()
    acc = torch.addcmul(wide(bias), x_SBC, taps[-1])
    for w in range(1, min(len(taps), len(x_SBC))):
        acc[w:].addcmul_(_same_document(x_SBC[:-w], id_SB, w), taps[-1 - w])
    return acc, x_SBC, taps


def _same_document(x_SBC: Tensor, id_SB: Tensor | None, distance: int) -> Tensor:
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
        return F.silu(acc, inplace=True).to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, id_SB = ctx.saved_tensors
        acc, wide_x, taps = _accumulate(x, ctx.weight, ctx.bias, id_SB)
        d_acc = torch.ops.aten.silu_backward(wide(dy), acc)
        dx = d_acc * taps[-1]
        dw = torch.zeros_like(taps)
        dw[-1] = (d_acc * wide_x).sum((0, 1))
        for w in range(1, min(len(taps), len(x))):
            d_tap = _same_document(d_acc[w:], id_SB, w)
            dx[:-w].addcmul_(d_tap, taps[-1 - w])
            dw[-1 - w] = (d_tap * wide_x[:-w]).sum((0, 1))
        d_weight = deliver_grad(ctx.weight, dw.T) if ctx.needs_input_grad[1] else None
        d_bias = deliver_grad(ctx.bias, d_acc.sum((0, 1))) if ctx.needs_input_grad[2] else None
        return dx.to(x.dtype), d_weight, d_bias, None
