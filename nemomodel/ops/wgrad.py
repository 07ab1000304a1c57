"""Where a hand-written backward pass puts the gradient of a weight."""

from collections.abc import Callable

import torch
from torch import Tensor

from nemomodel.ops.precision import accumulator


def deliver_grad(weight: Tensor, grad: Tensor, factor: Tensor | None = None) -> Tensor | None:
    """Hand `grad`, times a scalar, to `weight`, and return what `backward` returns for it.

    A parameter with an FP32 `main_grad` buffer (given by the data-parallel wrapper) collects
    its gradient there, over micro-batches and repeated uses, so no gradient is rounded to the
    weight's dtype. Without that buffer the gradient goes the way of autograd.

    Every use of a weight in one model must deliver the same way: the wrapper drops the autograd
    gradient of a weight whose `grad_added_to_main_grad` is set. Keep the parameter itself on
    `ctx` (`ctx.weight = weight`): recomputation unpacks saved tensors as detached copies, which
    have lost these attributes.
    """
    assert weight.requires_grad, "deliver_grad: needs the parameter itself, not a detached copy"
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return (grad if factor is None else grad * factor).to(weight.dtype)
    if factor is None:
        main_grad.add_(grad)  # accumulates in FP32 whatever the dtype of grad
    else:
        main_grad.addcmul_(grad, factor)
    return _delivered(weight)


def accumulate_grad(
    weight: Tensor, add: Callable[[Tensor], None], *, once: bool = False
) -> Tensor | None:
    """`deliver_grad` for what adds to a buffer in weight's shape by itself.

    Args:
        once: to no element twice, so that the buffer need not be wide.
    """
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        dtype = weight.dtype if once else accumulator(weight.dtype)
        grad = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
        add(grad)
        return grad.to(weight.dtype)
    add(main_grad)
    return _delivered(weight)


def _delivered(weight: Tensor) -> Tensor | None:
    weight.grad_added_to_main_grad = True
    if getattr(weight, "needs_dummy_grad", False):
        # Overlapped reduction starts when autograd delivers something; nobody reads the values.
        return torch.empty_like(weight)
    return None


def widen(weight: Tensor) -> Tensor:
    """`weight` in FP32 for another package's kernel; its gradient is delivered in FP32."""
    return _Widen.apply(weight)


class _Widen(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight):
        ctx.weight = weight
        return weight.float()

    @staticmethod
    def backward(ctx, grad):
        return deliver_grad(ctx.weight, grad)
