"""Causal depthwise convolution with SiLU, sequence first."""

import torch
import torch.nn.functional as F
from torch import Tensor

from nemomodel.ops.backend import kernel_takes
from nemomodel.ops.documents import Documents
from nemomodel.ops.fused import compiling, fused, sum_rows
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


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, id_SB):
        ctx.save_for_backward(x, id_SB)
        ctx.weight, ctx.bias = weight, bias
        taps = _taps(weight)
        links = _links(id_SB, len(taps))
        y = _forward(_pad_start(x, taps), taps, wide(bias.detach()), links)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, id_SB = ctx.saved_tensors
        taps = _taps(ctx.weight)
        xp, links = _pad_start(x, taps), _links(id_SB, len(taps))
        d_acc = xp.new_empty(xp.shape, dtype=taps.dtype)
        d_acc[len(x) :] = 0
        _backward_silu(d_acc[: len(x)], dy, xp, taps, wide(ctx.bias.detach()), links)
        dx, d_taps = _backward_taps(d_acc, xp, taps, links)
        d_taps, d_bias = d_taps.sum((1, 2)), d_acc[: len(x)].sum((0, 1))
        d_weight = deliver_grad(ctx.weight, d_taps.T) if ctx.needs_input_grad[1] else None
        d_bias = deliver_grad(ctx.bias, d_bias) if ctx.needs_input_grad[2] else None
        return dx.to(x.dtype), d_weight, d_bias, None


# Below, xp [W - 1 + S, B, C] is x behind zeros; taps [W, C] are wide, the last one is that of the
# current position; links [W, S + W - 1, B, 1] are where the position w before is in the same
# document, and None where there is one.


def _taps(weight: Tensor) -> Tensor:
    return wide(weight.detach()).T.contiguous()


def _pad_start(x_SBC: Tensor, taps: Tensor) -> Tensor:
    zeros = len(taps) - 1
    # Not compiled, every tap would widen it again.
    dtype = x_SBC.dtype if compiling() else taps.dtype
    xp = x_SBC.new_empty(zeros + len(x_SBC), *x_SBC.shape[1:], dtype=dtype)
    xp[:zeros] = 0
    xp[zeros:] = x_SBC
    return xp


def _links(id_SB: Tensor | None, W: int) -> Tensor | None:
    if id_SB is None:
        return None
    ids = F.pad(id_SB, (0, 0, W - 1, W - 1), value=-1)
    here = ids[W - 1 :]
    return torch.stack([ids[W - 1 - w :][: len(here)] == here for w in range(W)]).unsqueeze(-1)


def _sum_taps(xp: Tensor, taps: Tensor, bias: Tensor, links: Tensor | None) -> Tensor:
    W, S, acc = len(taps), len(xp) - len(taps) + 1, None
    for w in range(W):
        x = wide(xp[W - 1 - w : W - 1 - w + S])
        x = x * links[w, :S] if w and links is not None else x
        tap = taps[W - 1 - w]
        acc = torch.addcmul(bias, x, tap) if acc is None else acc.addcmul_(x, tap)
    return acc


@fused
def _forward(xp: Tensor, taps: Tensor, bias: Tensor, links: Tensor | None) -> Tensor:
    return F.silu(_sum_taps(xp, taps, bias, links), inplace=True).to(xp.dtype)


@fused
def _backward_silu(
    out: Tensor, dy: Tensor, xp: Tensor, taps: Tensor, bias: Tensor, links: Tensor | None
) -> None:
    """Gradient of the sum of taps, into `out`."""
    acc = _sum_taps(xp, taps, bias, links)
    torch.ops.aten.silu_backward.grad_input(wide(dy), acc, grad_input=out)


@fused
def _backward_taps(
    d_acc: Tensor, xp: Tensor, taps: Tensor, links: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradient of x; and of the taps, as sums over some rows.

    Args:
        d_acc: gradient of the sum of taps, W - 1 rows of zeros after it.
    """
    W, S = len(taps), len(d_acc) - len(taps) + 1
    dx, d_taps = None, []
    for w in range(W):
        linked = d_acc * links[w] if w and links is not None else d_acc
        d, tap = linked[w : w + S], taps[W - 1 - w]
        dx = d * tap if dx is None else dx.addcmul_(d, tap)
        d_taps.append(sum_rows(linked[:S] * wide(xp[W - 1 - w : W - 1 - w + S])))
    return dx.to(xp.dtype), torch.stack(d_taps[::-1])
