"""A linear layer whose three products are quantised: fprop, dgrad, wgrad (arXiv:2509.25149).

    y = x W^T        dx = dy W        dW = dy^T x

Each operand is quantised from the high-precision tensor, never from another quantised copy.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from nemomodel.ops.wgrad import deliver_grad
from nemomodel.quant.operand import ExactOperand, OperandFormat, product, quantize_operand
from nemomodel.quant.rounding import stream_key


@dataclass(frozen=True)
class ProductFormat:
    """The two operands in the order they are multiplied."""

    left: OperandFormat
    right: OperandFormat


@dataclass(frozen=True)
class LinearFormat:
    """How the three products of a linear are quantised; None is not at all."""

    fprop: ProductFormat | None
    """x, W with blocks along the input width."""
    dgrad: ProductFormat | None
    """dy, W with blocks along the output width."""
    wgrad: ProductFormat | None
    """dy, x with blocks along the tokens."""


class QuantizedLinear:
    """The quantised products of one linear layer, and its weight in the form they need.

    Args:
        name: of the layer; with `seed` and the step it names the streams of random bits.
    """

    def __init__(self, format: LinearFormat, *, name: str, seed: int) -> None:
        self.format, self.name, self.seed = format, name, seed
        self._weights: dict[OperandFormat, ExactOperand] = {}
        self._step = 0
        self._calls = itertools.count()

    def new_step(self, step: int) -> None:
        """Call when the weight has changed, with the number of the step that now begins."""
        self._weights.clear()
        self._step, self._calls = step, itertools.count()

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """y [..., O] = x [..., I] weight^T; the weight gradient accumulates in FP32."""
        return _Linear.apply(x, weight, self)

    def weight(self, weight: Tensor, format: OperandFormat) -> ExactOperand:
        """The quantised weight [O, I], made once per step."""
        if format not in self._weights:
            self._weights[format] = quantize_operand(weight.detach(), format)
        return self._weights[format]

    def quantize(
        self, x_TC: Tensor, format: OperandFormat, operand: str, call: int
    ) -> ExactOperand:
        key = None
        if format.stochastic:
            key = stream_key(self.seed, self._step, self.name, operand, call)
        return quantize_operand(x_TC, format, key=key)


def _transposed(operand: ExactOperand) -> ExactOperand:
    return ExactOperand(operand.values.T, operand.factor)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, quantized):
        ctx.save_for_backward(x)
        ctx.weight, ctx.quantized = weight, quantized
        ctx.call = next(quantized._calls)
        x_TI, format = x.flatten(0, -2), quantized.format.fprop
        if format is None:
            return x @ weight.T
        left = quantized.quantize(x_TI, format.left, "x", ctx.call)
        right = _transposed(quantized.weight(weight, format.right))
        return product(left, right).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        weight, quantized, call = ctx.weight, ctx.quantized, ctx.call
        dy_TO, x_TI = dy.flatten(0, -2), x.flatten(0, -2)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            if format := quantized.format.dgrad:
                left = quantized.quantize(dy_TO, format.left, "dy", call)
                dx = product(left, quantized.weight(weight, format.right)).view_as(x)
            else:
                dx = dy @ weight
        if ctx.needs_input_grad[1]:
            if format := quantized.format.wgrad:
                left = quantized.quantize(dy_TO, format.left, "dy along tokens", call)
                right = quantized.quantize(x_TI, format.right, "x along tokens", call)
                dw = product(_transposed(left), right)
            else:
                dw = dy_TO.T @ x_TI
            dw = deliver_grad(weight, dw)
        return dx, dw, None
