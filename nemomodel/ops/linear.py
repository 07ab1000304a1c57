"""Matrix products with a weight: linear, FP32 linear, embedding look-up."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nemomodel.ops.precision import accumulator, wide
from nemomodel.ops.product import product
from nemomodel.ops.wgrad import accumulate_grad, deliver_grad


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """y = x W^T for x [..., D] and weight [F, D]; the weight gradient accumulates in FP32."""
    return _Linear.apply(x, weight)


def linear_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """`linear` computed in FP32 (FP64 for FP64 input) whatever the dtypes; keeps x as it is."""
    return _LinearFp32.apply(x, weight)


def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Rows of weight [V, D]; the gradient of repeated ids accumulates in FP32."""
    return _Embedding.apply(ids, weight)


def take_rows(weight: Tensor, rows: Sequence[range]) -> Tensor:
    """Some rows of a parameter [R, ...]; its gradient accumulates in FP32."""
    return _TakeRows.apply(weight, rows)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x)
        ctx.weight = weight
        return product(x, weight.T)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dx = product(dy, ctx.weight) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None
        dw = product(dy.flatten(0, -2).T, x.flatten(0, -2))
        return dx, deliver_grad(ctx.weight, dw)


class _LinearFp32(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x)
        ctx.weight = weight
        return product(wide(x), wide(weight).T)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dx = product(dy, wide(ctx.weight)).to(x.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None
        dw = product(dy.flatten(0, -2).T, wide(x).flatten(0, -2))
        return dx, deliver_grad(ctx.weight, dw)


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight):
        ctx.save_for_backward(ids)
        ctx.weight = weight
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx, dy):
        (ids,) = ctx.saved_tensors
        rows, weight = ids.flatten(), ctx.weight
        # Sorting by row first adds up a frequent token's gradient before it meets the table.
        unique, place = rows.unique(return_inverse=True)
        dw_rows = dy.new_zeros(len(unique), dy.shape[-1], dtype=accumulator(dy.dtype))
        dw_rows.index_add_(0, place, dy.flatten(0, -2).to(dw_rows.dtype))
        # The table may be the largest weight there is: nothing else of its size.
        return None, accumulate_grad(
            weight, lambda dw: dw.index_add_(0, unique, dw_rows.to(dw.dtype)), once=True
        )


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, rows):
        ctx.weight, ctx.rows = weight, rows
        return torch.cat([weight[r.start : r.stop] for r in rows])

    @staticmethod
    def backward(ctx, dy):
        dw = torch.zeros(ctx.weight.shape, dtype=accumulator(dy.dtype), device=dy.device)
        for r, part in zip(ctx.rows, dy.split([len(r) for r in ctx.rows]), strict=True):
            dw[r.start : r.stop] = part
        return deliver_grad(ctx.weight, dw), None
