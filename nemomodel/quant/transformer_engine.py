"""The executor `transformer_engine`: quantised linear layers by Transformer Engine.

Its quantisers and matrix products around our parameters; what they do is in
`transformer_engine_recipe.py`.

Written against Transformer Engine 2.20.2 and tested with a stand-in of the same signatures. No
GPU has run this file yet, neither Blackwell nor Hopper.
"""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemomodel.ops.wgrad import accumulate_grad
from nemomodel.quant.linear import LinearFormat, Share
from nemomodel.quant.passes import InPass, Use
from nemomodel.quant.rounding import stream_key
from nemomodel.quant.statistics import Observer
from nemomodel.quant.transformer_engine_recipe import EXECUTOR, INSTEAD, execution, make_recipe


class TransformerEngineLinear(InPass):
    """`QuantizedLinear` by Transformer Engine; the same face, and weights are quantised once per
    step too.

    Random bits are those of Transformer Engine's generator. It is started from (seed, step,
    micro-batch, name, call), so that a resumed run draws those of the uninterrupted one; they
    depend on how ranks share a tensor. Values that are not finite have no error of their own here.

    Raises:
        ValueError: as `execution`.
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
        from transformer_engine.pytorch.quantization import RecipeState

        self.format, self.name, self.seed = format, name, seed
        shares = shares or {}
        self.execution = execution(format, torch.cuda.get_device_capability())
        self.observer: Observer | None = None
        self.amax: dict[str, Tensor] = {}
        """Both there for the face of `QuantizedLinear`: operands stay inside Transformer Engine."""
        recipe = make_recipe(self.execution)
        forward = RecipeState.create(recipe, mode="forward", num_quantizers=2)
        backward = RecipeState.create(recipe, mode="backward", num_quantizers=1)
        self.input, self.weight = forward.make_quantizers()
        (self.grad,) = backward.make_quantizers()
        for quantizer in (self.input, self.weight, self.grad):
            quantizer.internal = True  # no tensor subclass: nobody else sees them
        for quantizer in (self.input, self.grad):
            quantizer.optimize_for_gemm = True
        for operand, quantizer in (("x", self.input), ("weight", self.weight), ("dy", self.grad)):
            if operand in shares and hasattr(quantizer, "with_amax_reduction"):
                quantizer.with_amax_reduction = True
                quantizer.amax_reduction_group = shares[operand].group
        gradient = shares.get("dy")
        # Ranks round different tokens, and different experts, with different bits.
        self._part = first_expert, gradient.token_rank if gradient else 0
        self._weights: dict[int, Any] = {}
        super().__init__()

    def new_step(self) -> None:
        """Call when the weight has changed."""
        self._weights.clear()

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """y [..., O] = x [..., I] weight^T for weight [O, I]; its gradient accumulates in FP32.

        Raises:
            ValueError: x is not BF16, or the weight has widths that the format cannot cut.
        """
        self._check(x, weight)
        return _Linear.apply(x, weight, self)

    def grouped(self, x_RI: Tensor, weight: Tensor, rows_E: Tensor, count_E: Tensor) -> Tensor:
        """As `QuantizedLinear.grouped`; raises as a call."""
        self._check(x_RI, weight)
        return _GroupedLinear.apply(x_RI, weight, rows_E, count_E, self)

    def quantized_weight(self, weight: Tensor, expert: int = 0) -> Any:
        """Of a matrix [O, I], made once per step, for fprop and dgrad."""
        if (found := self._weights.get(expert)) is None:
            self.weight.set_usage(rowwise=True, columnwise=True)
            found = self._weights[expert] = self.weight(weight.detach())
        return found

    @contextmanager
    def random_stream(self, device: torch.device, use: Use) -> Iterator[None]:
        """For the gradients of a use. Everybody else's stream goes on afterwards as if nothing
        had been drawn."""
        assert self.format.dgrad
        if not self.format.dgrad.left.stochastic:
            yield
            return
        generator = torch.cuda.default_generators[device.index or 0]
        before = generator.get_state()
        high, low = stream_key(self.seed, *use, self.name, *self._part)
        generator.manual_seed((high % 2**31) << 32 | low % 2**32)
        yield
        generator.set_state(before)

    def _check(self, x: Tensor, weight: Tensor) -> None:
        multiple = self.execution.width_multiple
        O, I = weight.shape[-2:]
        if O % multiple or I % multiple:
            raise ValueError(
                f"{EXECUTOR}: {self.name} has a weight of {O} x {I}, {self.execution.scheme} needs "
                f"multiples of {multiple}; {INSTEAD}"
            )
        if x.dtype != torch.bfloat16:
            raise ValueError(f"{EXECUTOR}: {self.name} has {x.dtype}, needs BF16; {INSTEAD}")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, layer):
        from transformer_engine.pytorch.cpp_extensions import general_gemm
        from transformer_engine.pytorch.quantized_tensor import prepare_for_saving

        x_TI = x.flatten(0, -2)
        ctx.weight, ctx.layer, ctx.use, ctx.rows = (
            weight,
            layer,
            layer.at.use(layer.name),
            len(x_TI),
        )
        _use(layer.input, rows=True, columns=weight.requires_grad)
        operand = layer.input(_pad_rows(x_TI, layer))
        y, *_ = general_gemm(
            layer.quantized_weight(weight), operand, out_dtype=x.dtype, use_split_accumulator=True
        )
        if weight.requires_grad:
            operand.update_usage(rowwise_usage=False, columnwise_usage=True)
            tensors, ctx.operands = prepare_for_saving(operand)
            ctx.save_for_backward(*tensors)
        return y[: len(x_TI)].view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        from transformer_engine.pytorch.cpp_extensions import general_gemm
        from transformer_engine.pytorch.quantized_tensor import restore_from_saved

        layer, weight, (need_x, need_weight, _) = ctx.layer, ctx.weight, ctx.needs_input_grad
        _use(layer.grad, rows=need_x, columns=need_weight)
        with layer.random_stream(dy.device, ctx.use):
            operand = layer.grad(_pad_rows(dy.flatten(0, -2), layer))
        options = {"grad": True, "use_split_accumulator": True}
        dx = dw = None
        if need_x:
            w = layer.quantized_weight(weight)
            dx, *_ = general_gemm(w, operand, out_dtype=dy.dtype, layout="NN", **options)
            dx = dx[: ctx.rows].view(*dy.shape[:-1], -1)
        if need_weight:
            (x,) = restore_from_saved(ctx.operands, ctx.saved_tensors)

            def add(main_grad: Tensor) -> None:
                general_gemm(
                    *(x, operand),
                    out=main_grad,
                    out_dtype=main_grad.dtype,
                    accumulate=True,
                    layout="NT",
                    **options,
                )

            dw = accumulate_grad(weight, add)
        return dx, dw, None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, rows_E, count_E, layer):
        from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm
        from transformer_engine.pytorch.quantized_tensor import prepare_for_saving

        ctx.groups = groups = _Groups.of(rows_E, count_E, layer.execution.row_multiple, x.device)
        ctx.weight, ctx.layer, ctx.use = weight, layer, layer.at.use(layer.name)
        if not groups.experts:
            return x.new_zeros(len(x), weight.shape[1])
        _use(layer.input, rows=True, columns=weight.requires_grad)
        operands = _quantize_groups(groups.padded(x), groups, layer.input)
        weights = [layer.quantized_weight(weight[e], e) for e in groups.experts]
        y = x.new_empty(sum(groups.padded_rows), weight.shape[1])
        general_grouped_gemm(
            *(weights, operands, [y], [None] * len(operands), x.dtype),
            m_splits=groups.padded_rows,
            single_output=True,
            use_split_accumulator=True,
        )
        if weight.requires_grad:
            for operand in operands:
                operand.update_usage(rowwise_usage=False, columnwise_usage=True)
            tensors, ctx.operands = prepare_for_saving(*operands)
            ctx.save_for_backward(*tensors)
        return groups.cut(y, len(x))

    @staticmethod
    def backward(ctx, dy):
        from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm
        from transformer_engine.pytorch.quantized_tensor import restore_from_saved

        layer, weight, groups = ctx.layer, ctx.weight, ctx.groups
        need_x, need_weight, *_ = ctx.needs_input_grad
        I, experts = weight.shape[2], groups.experts
        operands = []
        if experts:
            _use(layer.grad, rows=need_x, columns=need_weight)
            with layer.random_stream(dy.device, ctx.use):
                operands = _quantize_groups(groups.padded(dy), groups, layer.grad)
        options = {"grad": True, "use_split_accumulator": True, "m_splits": groups.padded_rows}
        none = [None] * len(operands)
        dx = dw = None
        if need_x:
            dx = dy.new_empty(sum(groups.padded_rows), I)
            if experts:
                weights = [layer.quantized_weight(weight[e], e) for e in experts]
                general_grouped_gemm(
                    *(weights, operands, [dx], none, dy.dtype),
                    layout="NN",
                    single_output=True,
                    **options,
                )
            dx = groups.cut(dx, len(dy))
        if need_weight:

            def add(main_grad: Tensor) -> None:
                if experts:
                    x = restore_from_saved(ctx.operands, ctx.saved_tensors)
                    out = [main_grad[e] for e in experts]
                    general_grouped_gemm(
                        *(x, operands, out, none, main_grad.dtype),
                        layout="NT",
                        accumulate=True,
                        **options,
                    )

            dw = accumulate_grad(weight, add)
        return dx, dw, None, None, None


@dataclass(frozen=True)
class _Groups:
    """The rows of the experts that have tokens, each padded to whole blocks."""

    experts: list[int]
    padded_rows: list[int]
    source: Tensor
    """Of every token, its row without the padding, and in it:"""
    target: Tensor

    @staticmethod
    def of(rows_E: Tensor, count_E: Tensor, multiple: int, device: torch.device) -> "_Groups":
        rows, counts = rows_E.tolist(), count_E.tolist()
        experts = [e for e, count in enumerate(counts) if count]
        starts = [0, *itertools.accumulate(rows)]
        padded = [-(-counts[e] // multiple) * multiple for e in experts]
        outs = [0, *itertools.accumulate(padded)]
        source = [torch.arange(starts[e], starts[e] + counts[e]) for e in experts]
        target = [torch.arange(o, o + counts[e]) for o, e in zip(outs, experts, strict=False)]
        empty = torch.empty(0, dtype=torch.int64)
        places = (torch.cat([empty, *t]).to(device) for t in (source, target))
        return _Groups(experts, padded, *places)

    def padded(self, x_RC: Tensor) -> Tensor:
        room = x_RC.new_zeros(sum(self.padded_rows), x_RC.shape[1])
        return room.index_copy_(0, self.target, x_RC[self.source])

    def cut(self, x_RC: Tensor, rows: int) -> Tensor:
        return x_RC.new_zeros(rows, x_RC.shape[1]).index_copy_(0, self.source, x_RC[self.target])


def _quantize_groups(x_RC: Tensor, groups: _Groups, quantizer: Any) -> list[Any]:
    import transformer_engine_torch

    quantizers = [quantizer.copy() for _ in groups.experts]
    return transformer_engine_torch.split_quantize(x_RC, groups.padded_rows, quantizers)


def _use(quantizer: Any, *, rows: bool, columns: bool) -> None:
    """Which copies to make: for the sum over columns, or over rows."""
    quantizer.set_usage(rowwise=rows, columnwise=columns)


def _pad_rows(x_TC: Tensor, layer: TransformerEngineLinear) -> Tensor:
    """Zeros change no largest magnitude and no sum."""
    padding = -len(x_TC) % layer.execution.row_multiple
    return F.pad(x_TC, (0, 0, 0, padding)) if padding else x_TC.contiguous()
