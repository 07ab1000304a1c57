"""A linear layer whose three products are quantised: fprop, dgrad, wgrad (arXiv:2509.25149).

    y = x W^T        dx = dy W        dW = dy^T x

Each operand is quantised from the high-precision tensor, never from another quantised copy.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nemomodel.ops.wgrad import deliver_grad
from nemomodel.quant.operand import (
    ExactOperand,
    GroupedOperand,
    OperandFormat,
    Place2D,
    product,
    quantize_groups,
)
from nemomodel.quant.passes import InPass, Use
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


@dataclass(frozen=True)
class Share:
    """The part of a tensor that this rank has, when others have the rest."""

    group: dist.ProcessGroup
    """Over whose ranks the largest magnitude is taken."""
    token_rank: int = 0
    """Number of equal parts of the tokens that come before this one."""
    columns: Tensor | None = None
    """int32, the places of its columns in the whole; None: it has all of them."""
    width: int | None = None
    """Columns of the whole; needed where `columns` is."""


class Call(NamedTuple):
    """One use of a layer: which rows belong together, and what names its random bits."""

    rows: list[int]
    counts: list[int]
    """Rows that hold tokens, the first ones of every group."""
    use: Use


class QuantizedLinear(InPass):
    """The quantised products of one linear layer, or of one for each of a layer's experts.

    Args:
        name: of the layer; with `seed`, the step, the micro-batch and the number of the call in it
            it names the streams of random bits.
        shares: of "x", "dy" and "weight", where ranks share them.
        first_expert: number of this rank's first expert in the whole layer.
    """

    def __init__(
        self,
        format: LinearFormat,
        *,
        name: str,
        seed: int,
        shares: Mapping[str, Share] | None = None,
        first_expert: int = 0,
    ) -> None:
        self.format, self.name, self.seed = format, name, seed
        self.shares, self.first_expert = shares or {}, first_expert
        self.observer: Observer | None = None
        """Is shown every operand; None costs nothing."""
        self.amax: dict[str, Tensor] = {}
        """FP32 scalars, the largest magnitude of every operand in this step."""
        self._weights: dict[OperandFormat, GroupedOperand] = {}
        super().__init__()

    def new_step(self) -> None:
        """Call when the weight has changed."""
        self._weights.clear()
        self.amax.clear()

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """y [..., O] = x [..., I] weight^T for weight [O, I]; its gradient accumulates in FP32."""
        x_TI = x.flatten(0, -2)
        call = self._call([len(x_TI)], [len(x_TI)])
        return _Linear.apply(x_TI, weight, self, call).view(*x.shape[:-1], -1)

    def grouped(self, x_RI: Tensor, weight: Tensor, rows_E: Tensor, count_E: Tensor) -> Tensor:
        """y = x W_e^T for weight [E, O, I] and the rows_E[e] consecutive rows of each expert, of
        which the first count_E[e] hold tokens; every expert is quantised by itself. What the other
        rows of y and of the gradient of x hold is 0 where x and dy are quantised."""
        return _Linear.apply(x_RI, weight, self, self._call(rows_E.tolist(), count_E.tolist()))

    def fprop(self, x_RI: Tensor, weight: Tensor, call: Call) -> Tensor:
        left, right = _formats(self.format.fprop)
        xs, ws = self._operand("x", x_RI, left, call), self._weight(weight, right)
        y = x_RI.new_empty(len(x_RI), weight.shape[-2])
        for y_e, x_e, w_e in zip(y.split(call.rows), xs, ws, strict=True):
            product(x_e, _transposed(w_e), out=y_e)
        return y

    def dgrad(self, dy_RO: Tensor, weight: Tensor, call: Call) -> Tensor:
        left, right = _formats(self.format.dgrad)
        dys, ws = self._operand("dy", dy_RO, left, call), self._weight(weight, right)
        dx = dy_RO.new_empty(len(dy_RO), weight.shape[-1])
        for dx_e, dy_e, w_e in zip(dx.split(call.rows), dys, ws, strict=True):
            product(dy_e, w_e, out=dx_e)
        return dx

    def wgrad(self, dy_RO: Tensor, x_RI: Tensor, weight: Tensor, call: Call) -> Tensor:
        left, right = _formats(self.format.wgrad)
        dys = self._operand("dy along tokens", dy_RO, left, call)
        xs = self._operand("x along tokens", x_RI, right, call)
        # Summed in FP32; a CPU has no product of BF16 with such an output.
        dw = dy_RO.new_empty(weight.shape, dtype=torch.float32 if dy_RO.is_cuda else None)
        for dw_e, dy_e, x_e in zip(_matrices(dw), dys, xs, strict=True):
            product(_transposed(dy_e), x_e, out=dw_e)
        return dw

    def _call(self, rows: list[int], counts: list[int]) -> Call:
        return Call(rows, counts, self.at.use(self.name))

    def _weight(self, weight: Tensor, format: OperandFormat | None) -> Iterable[ExactOperand]:
        """The quantised weight, of every expert; made once per step."""
        matrices = _matrices(weight.detach())
        if format is None:
            return [ExactOperand(matrix, None) for matrix in matrices]
        E, O, I = matrices.shape
        if (found := self._weights.get(format)) is None:
            share = self.shares.get("weight")
            found = self._weights[format] = quantize_groups(
                matrices.reshape(E * O, I),
                format,
                [O] * E,
                [O] * E,
                amax_group=share and share.group,
            )
            self._keep_amax("weight", found)
        self._show("weight", matrices, format, found)
        return found

    def _operand(
        self, name: str, x_RK: Tensor, format: OperandFormat | None, call: Call
    ) -> Iterable[ExactOperand]:
        rows, counts, use = call
        if format is None:
            return [ExactOperand(matrix, None) for matrix in x_RK.split(rows)]
        keys = None
        if format.stochastic:
            of_layer = self.seed, use.step, use.micro_batch, self.name, name
            experts = range(self.first_expert, self.first_expert + len(rows))
            keys = [stream_key(*of_layer, expert, use.number) for expert in experts]
        share = self.shares.get(name.partition(" ")[0])
        operand = quantize_groups(
            x_RK,
            format,
            rows,
            counts,
            keys=keys,
            place=share and _place(share, x_RK, format),
            amax_group=share and share.group,
        )
        self._keep_amax(name, operand)
        matrices = [x[:count] for x, count in zip(x_RK.split(rows), counts, strict=True)]
        self._show(name, matrices, format, operand)
        return operand

    def _keep_amax(self, name: str, operand: GroupedOperand) -> None:
        """For `first_not_finite`; nothing waits for the device."""
        amax = operand.amax_E.amax()
        known = self.amax.get(name)
        self.amax[name] = amax if known is None else torch.maximum(known, amax)

    def _show(
        self, name: str, matrices: Iterable[Tensor], format: OperandFormat, operand: GroupedOperand
    ) -> None:
        if self.observer is None:
            return
        for x_MK, exact in zip(matrices, operand, strict=True):
            own = replace(exact, values=exact.values[: format.rows_of(len(x_MK))])
            self.observer.see(self.name, name, x_MK, format, own)


def first_not_finite(layers: Iterable[QuantizedLinear]) -> str | None:
    """Which operand of this step was the first with infinities or NaN, of layers in the order of
    the forward pass; None: every one was finite. Waits for the device once."""
    layers = list(layers)
    # What wgrad sees of x was there before any dy, and may be all that is quantised of x.
    forward = [(layer, name) for layer in layers for name in ("x", "weight", "x along tokens")]
    backward = [(layer, name) for layer in reversed(layers) for name in ("dy", "dy along tokens")]
    seen = [(layer, name) for layer, name in forward + backward if name in layer.amax]
    if not seen:
        return None
    amax = torch.stack([layer.amax[name] for layer, name in seen])
    bad = (~amax.isfinite()).nonzero().flatten().tolist()
    return f"{seen[bad[0]][0].name}: {seen[bad[0]][1]}" if bad else None


def _formats(product: ProductFormat | None) -> tuple[OperandFormat | None, OperandFormat | None]:
    return (product.left, product.right) if product else (None, None)


def _matrices(weight: Tensor) -> Tensor:
    """[E, O, I] of the weight of a linear, or of experts."""
    return weight if weight.dim() == 3 else weight.unsqueeze(0)


def _place(share: Share, x_RK: Tensor, format: OperandFormat) -> Place2D:
    block = format.block[1]
    width = share.width or -(-x_RK.shape[1] // block) * block
    return Place2D(share.token_rank * len(x_RK), share.columns, width)


def _transposed(operand: ExactOperand) -> ExactOperand:
    return ExactOperand(operand.values.T, operand.factor)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, quantized, call):
        ctx.save_for_backward(x)
        ctx.weight, ctx.quantized, ctx.call = weight, quantized, call
        return quantized.fprop(x, weight, call)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        weight, quantized, call = ctx.weight, ctx.quantized, ctx.call
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = quantized.dgrad(dy, weight, call)
        if ctx.needs_input_grad[1]:
            dw = deliver_grad(weight, quantized.wgrad(dy, x, weight, call))
        return dx, dw, None, None
