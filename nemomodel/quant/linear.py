"""A linear layer whose three products are quantised: fprop, dgrad, wgrad (arXiv:2509.25149).

    y = x W^T        dx = dy W        dW = dy^T x

Each operand is quantised from the high-precision tensor, never from another quantised copy.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemomodel.ops.wgrad import deliver_grad
from nemomodel.quant.operand import ExactOperand, OperandFormat, product, quantize_operand
from nemomodel.quant.rounding import stream_key
from nemomodel.quant.statistics import Observer


@dataclass(frozen=True)
class ProductFormat:
    """The two operands in the order they are multiplied."""

    left: OperandFormat | None
    """None is not quantised."""
    right: OperandFormat

    def __str__(self) -> str:
        return f"{self.left or 'BF16'} x {self.right}"


@dataclass(frozen=True)
class LinearFormat:
    """How the three products of a linear are quantised; None is not at all."""

    fprop: ProductFormat | None
    """x, W with blocks along the input width."""
    dgrad: ProductFormat | None
    """dy, W with blocks along the output width."""
    wgrad: ProductFormat | None
    """dy, x with blocks along the tokens."""

    def __str__(self) -> str:
        parts = {"fprop": self.fprop, "dgrad": self.dgrad, "wgrad": self.wgrad}
        return "; ".join(f"{name} {format or 'BF16'}" for name, format in parts.items())


class QuantizedLinear:
    """The quantised products of one linear layer, or of one for each of a layer's experts.

    Args:
        name: of the layer; with `seed`, the step, the micro-batch and the number of the call in it
            it names the streams of random bits.
    """

    def __init__(self, format: LinearFormat, *, name: str, seed: int) -> None:
        self.format, self.name, self.seed = format, name, seed
        self.observer: Observer | None = None
        """Is shown every operand; None costs nothing."""
        self._weights: dict[tuple[OperandFormat, int], ExactOperand] = {}
        self._step = self._micro_batch = self._calls = 0

    def begin(self, step: int, micro_batch: int) -> None:
        """Call before each forward pass.

        Args:
            step: the weight does not change within one.
            micro_batch: number in the global batch, whatever rank has it.
        """
        if step != self._step:
            self._weights.clear()
        self._step, self._micro_batch, self._calls = step, micro_batch, 0

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """y [..., O] = x [..., I] weight^T for weight [O, I]; its gradient accumulates in FP32."""
        return _Linear.apply(x, weight, self)

    def grouped(self, x_RI: Tensor, weight: Tensor, rows_E: Tensor, count_E: Tensor) -> Tensor:
        """y = x W_e^T for weight [E, O, I] and the rows_E[e] consecutive rows of each expert, of
        which the first count_E[e] hold tokens; every expert is quantised by itself, y is 0 in
        the other rows."""
        return _GroupedLinear.apply(x_RI, weight, rows_E, count_E, self)

    def next_call(self) -> int:
        self._calls += 1
        return self._calls

    def fprop(self, x_TI: Tensor, weight: Tensor, *, expert: int, call: int) -> Tensor:
        if (format := self.format.fprop) is None:
            return x_TI @ weight.T
        x = self._quantize(x_TI, format.left, "x", expert, call)
        return product(x, _transposed(self._weight(weight, format.right, expert)))

    def dgrad(self, dy_TO: Tensor, weight: Tensor, *, expert: int, call: int) -> Tensor:
        if (format := self.format.dgrad) is None:
            return dy_TO @ weight
        dy = self._quantize(dy_TO, format.left, "dy", expert, call)
        return product(dy, self._weight(weight, format.right, expert))

    def wgrad(self, dy_TO: Tensor, x_TI: Tensor, *, expert: int, call: int) -> Tensor:
        if (format := self.format.wgrad) is None:
            return dy_TO.T @ x_TI
        dy = self._quantize(dy_TO, format.left, "dy along tokens", expert, call)
        return product(
            _transposed(dy), self._quantize(x_TI, format.right, "x along tokens", expert, call)
        )

    def _weight(self, weight: Tensor, format: OperandFormat, expert: int) -> ExactOperand:
        """The quantised weight [O, I], made once per step."""
        if (found := self._weights.get((format, expert))) is None:
            found = self._weights[format, expert] = quantize_operand(weight.detach(), format)
        return self._shown("weight", weight, format, found)

    def _quantize(
        self, x_TC: Tensor, format: OperandFormat | None, operand: str, expert: int, call: int
    ) -> ExactOperand:
        if format is None:
            return ExactOperand(x_TC, None)
        key = None
        if format.stochastic:
            place = self._step, self._micro_batch, self.name, operand, expert, call
            key = stream_key(self.seed, *place)
        return self._shown(operand, x_TC, format, quantize_operand(x_TC, format, key=key))

    def _shown(
        self, operand: str, x_MK: Tensor, format: OperandFormat, exact: ExactOperand
    ) -> ExactOperand:
        if self.observer is not None:
            self.observer.see(self.name, operand, x_MK, format, exact)
        return exact


def _transposed(operand: ExactOperand) -> ExactOperand:
    return ExactOperand(operand.values.T, operand.factor)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, quantized):
        ctx.save_for_backward(x)
        ctx.weight, ctx.quantized, ctx.call = weight, quantized, quantized.next_call()
        y_TO = quantized.fprop(x.flatten(0, -2), weight, expert=0, call=ctx.call)
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dy_TO, stream = dy.flatten(0, -2), {"expert": 0, "call": ctx.call}
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = ctx.quantized.dgrad(dy_TO, ctx.weight, **stream).view_as(x)
        if ctx.needs_input_grad[1]:
            dw = ctx.quantized.wgrad(dy_TO, x.flatten(0, -2), **stream)
            dw = deliver_grad(ctx.weight, dw)
        return dx, dw, None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, rows_E, count_E, quantized):
        ctx.save_for_backward(x)
        ctx.weight, ctx.quantized, ctx.call = weight, quantized, quantized.next_call()
        ctx.rows = _token_rows(rows_E, count_E)
        y = x.new_zeros(len(x), weight.shape[1])
        for expert, rows in ctx.rows:
            y[rows] = quantized.fprop(x[rows], weight[expert], expert=expert, call=ctx.call)
        return y

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        weight, quantized = ctx.weight, ctx.quantized
        need_x, need_weight, *_ = ctx.needs_input_grad
        dx = torch.zeros_like(x) if need_x else None
        dw = torch.zeros_like(weight, requires_grad=False) if need_weight else None
        for expert, rows in ctx.rows:
            stream = {"expert": expert, "call": ctx.call}
            if need_x:
                dx[rows] = quantized.dgrad(dy[rows], weight[expert], **stream)
            if need_weight:
                dw[expert] = quantized.wgrad(dy[rows], x[rows], **stream)
        return dx, deliver_grad(weight, dw) if need_weight else None, None, None, None


def _token_rows(rows_E: Tensor, count_E: Tensor) -> list[tuple[int, slice]]:
    """The rows that hold tokens, of every expert that has some."""
    found, start = [], 0
    for expert, (rows, count) in enumerate(zip(rows_E.tolist(), count_E.tolist(), strict=True)):
        if count:
            found.append((expert, slice(start, start + count)))
        start += rows
    return found
