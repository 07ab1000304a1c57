"""A stand-in for Transformer Engine 2.20.2 on a CPU: the parts and the signatures that we call.

Quantisers and products are those of our emulation, so layers of both executors have to agree.
Defaults of recipes come from the environment, as they do there.
"""

import os
import sys
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from nemomodel.quant.operand import ExactOperand, OperandFormat, product, quantize_operand


def recipes() -> ModuleType:
    """transformer_engine.common.recipe, read again from today's environment."""
    module = ModuleType("transformer_engine.common.recipe")

    def flag(name: str) -> Any:
        return field(default=os.getenv(name, "0") == "1")

    @dataclass(frozen=True)
    class MMParams:
        use_split_accumulator: bool = True

    @dataclass(frozen=True)
    class QParams:
        power_2_scale: bool = False
        amax_epsilon: float = 0.0

    by_environment = QParams(os.getenv("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "0") != "1")
    override = os.getenv("NVTE_BACKWARD_OVERRIDE", None)

    class Format(Enum):
        E2M1 = 6
        E4M3 = 448

    @dataclass
    class NVFP4BlockScaling:
        disable_rht: bool = flag("NVTE_NVFP4_DISABLE_RHT")
        disable_stochastic_rounding: bool = flag("NVTE_NVFP4_DISABLE_STOCHASTIC_ROUNDING")
        disable_2d_quantization: bool = flag("NVTE_NVFP4_DISABLE_2D_QUANTIZATION")
        row_scaled_activation: bool = flag("NVTE_NVFP4_ROW_SCALED_ACTIVATION")
        nvfp4_4over6: str = os.getenv("NVTE_NVFP4_4OVER6", "none")
        nvfp4_4over6_e4m3_use_256: str = os.getenv("NVTE_NVFP4_4OVER6_E4M3_USE_256", "all")
        nvfp4_4over6_err_mode: str = os.getenv("NVTE_NVFP4_4OVER6_ERR_MODE", "MAE")
        fp4_format: Format = Format.E2M1
        fp8_format: Format = Format.E4M3
        fp8_dpa: bool = False
        fp8_mha: bool = False
        backward_override: str | None = override

    @dataclass
    class MXFP8BlockScaling:
        margin: int = 0
        fp8_format: Format = Format.E4M3
        fp8_dpa: bool = False
        fp8_mha: bool = False
        backward_override: str | None = override
        enable_2d_quantization: bool = False

    @dataclass
    class Float8BlockScaling:
        use_f32_scales: bool = flag("NVTE_FP8_BLOCK_SCALING_FP32_SCALES")
        fp8_format: Format = Format.E4M3
        fp8_quant_fwd_inp = by_environment
        fp8_quant_fwd_weight = by_environment
        fp8_quant_bwd_grad = by_environment
        x_block_scaling_dim: int = 1
        w_block_scaling_dim: int = 2
        grad_block_scaling_dim: int = 1
        fp8_gemm_fprop: MMParams = MMParams()
        fp8_gemm_dgrad: MMParams = MMParams()
        fp8_gemm_wgrad: MMParams = MMParams()
        fp8_dpa: bool = False
        fp8_mha: bool = False
        backward_override: str | None = override

    for made in (
        *(MMParams, QParams, Format, NVFP4BlockScaling, MXFP8BlockScaling, Float8BlockScaling),
    ):
        setattr(module, made.__name__, made)
    return module


class Quantized:
    """A tensor for the sum over its columns (rowwise), or over its rows (columnwise)."""

    def __init__(self, rowwise: ExactOperand | None, columnwise: ExactOperand | None) -> None:
        self.rowwise, self.columnwise = rowwise, columnwise

    def update_usage(self, rowwise_usage: bool, columnwise_usage: bool) -> None:
        self.rowwise = self.rowwise if rowwise_usage else None
        self.columnwise = self.columnwise if columnwise_usage else None


class Quantizer:
    """Of the input, the weight or the gradient of one recipe."""

    def __init__(self, recipe: Any, what: str) -> None:
        self.recipe, self.what = recipe, what
        self.internal = self.optimize_for_gemm = False
        self.rows = self.columns = True
        self.number_of_calls = 0
        self.with_amax_reduction, self.amax_reduction_group = False, None

    def copy(self) -> "Quantizer":
        made = Quantizer(self.recipe, self.what)
        made.set_usage(rowwise=self.rows, columnwise=self.columns)
        return made

    def set_usage(self, *, rowwise: bool | None = None, columnwise: bool | None = None) -> None:
        self.rows = self.rows if rowwise is None else rowwise
        self.columns = self.columns if columnwise is None else columnwise

    def __call__(self, x: Tensor) -> Quantized:
        assert x.is_contiguous()
        self.number_of_calls += 1
        rowwise, columnwise = self._formats()
        # The bits of the generator; what matters here is when they differ.
        key = (int(torch.cuda.default_generators[0].initial_seed()) % 2**31, 1)
        made = [
            quantize_operand(x, format, key=key if format.stochastic else None) if wanted else None
            for format, wanted in ((rowwise, self.rows), (columnwise, self.columns))
        ]
        return Quantized(*made)

    def _formats(self) -> tuple[OperandFormat, OperandFormat]:
        if not hasattr(self.recipe, "disable_rht"):
            return OperandFormat("mxfp8", "columns"), OperandFormat("mxfp8", "rows")
        if self.what == "weight" and not self.recipe.disable_2d_quantization:
            return OperandFormat("nvfp4", "both"), OperandFormat("nvfp4", "both")
        rounds = self.what == "grad" and not self.recipe.disable_stochastic_rounding
        mixes = self.what != "weight" and not self.recipe.disable_rht
        return (
            OperandFormat("nvfp4", "columns", rounds),
            OperandFormat("nvfp4", "rows", rounds, mixes),
        )


class RecipeState:
    @staticmethod
    def create(
        recipe: Any, *, mode: str, num_quantizers: int = 1, device: Any = None, roles: Any = None
    ) -> "RecipeState":
        state = RecipeState()
        names = {"forward": ["input", "weight"], "backward": ["grad"]}[mode]
        state.made = [Quantizer(recipe, name) for name in names[:num_quantizers]]
        return state

    def make_quantizers(self) -> list[Quantizer]:
        return self.made


def general_gemm(
    A: Quantized,
    B: Quantized,
    out_dtype: torch.dtype | None = None,
    quantization_params: Any = None,
    *,
    accumulate: bool = False,
    layout: str = "TN",
    out: Tensor | None = None,
    use_split_accumulator: bool = False,
    grad: bool = False,
) -> tuple[Tensor, None, None, None]:
    """B op A^T in row-major terms, as there: TN y = x W^T, NN dx = dy W, NT dW = dy^T x."""
    if layout == "TN":
        left, right = B.rowwise, ExactOperand(A.rowwise.values.T, A.rowwise.factor)
    elif layout == "NN":
        left, right = B.rowwise, A.columnwise
    else:
        left = ExactOperand(B.columnwise.values.T, B.columnwise.factor)
        right = A.columnwise
    result = product(*(ExactOperand(side.values.float(), side.factor) for side in (left, right)))
    if out is None:
        return result.to(out_dtype), None, None, None
    assert out.dtype == out_dtype
    assert out.is_contiguous()
    return (out.add_(result) if accumulate else out.copy_(result)), None, None, None


def general_grouped_gemm(
    A: list[Quantized],
    B: list[Quantized],
    out: list[Tensor],
    quantization_params: list[None],
    out_dtype: torch.dtype,
    layout: str = "TN",
    m_splits: list[int] | None = None,
    *,
    grad: bool = False,
    accumulate: bool = False,
    use_split_accumulator: bool = False,
    single_output: bool = False,
) -> None:
    assert len(A) == len(B) == len(quantization_params) == len(m_splits)
    targets = out[0].split(m_splits) if single_output else out
    for a, b, target in zip(A, B, targets, strict=True):
        dtype = target.dtype
        general_gemm(a, b, dtype, accumulate=accumulate, layout=layout, out=target)


def split_quantize(
    tensor: Tensor,
    split_sections: list[int],
    quantizer_list: list[Quantizer],
    disable_bulk_allocation: bool = False,
) -> list[Quantized]:
    parts = tensor.split(split_sections)
    return [q(part) for q, part in zip(quantizer_list, parts, strict=True)]


def prepare_for_saving(*tensors: Quantized) -> tuple[list[Tensor], list[Quantized]]:
    return [t.columnwise.values for t in tensors], list(tensors)


def restore_from_saved(tensors: list[Quantized], saved_tensors: Any) -> list[Quantized]:
    for t, values in zip(tensors, saved_tensors, strict=True):
        t.columnwise = ExactOperand(values, t.columnwise.factor)
    return tensors


def install(monkeypatch: pytest.MonkeyPatch, *, capability: tuple[int, int] = (10, 0)) -> None:
    """Let imports find this, on a GPU of this capability."""
    parts = {
        "transformer_engine": {},
        "transformer_engine.common": {},
        "transformer_engine.pytorch": {},
        "transformer_engine.pytorch.cpp_extensions": {
            "general_gemm": general_gemm,
            "general_grouped_gemm": general_grouped_gemm,
        },
        "transformer_engine.pytorch.quantization": {"RecipeState": RecipeState},
        "transformer_engine.pytorch.quantized_tensor": {
            "prepare_for_saving": prepare_for_saving,
            "restore_from_saved": restore_from_saved,
        },
        "transformer_engine_torch": {"split_quantize": split_quantize},
    }
    for name, members in parts.items():
        module = ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)
    recipe = recipes()
    monkeypatch.setitem(sys.modules, recipe.__name__, recipe)
    sys.modules["transformer_engine.common"].recipe = recipe
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: capability)
    monkeypatch.setattr(torch.cuda, "default_generators", (torch.Generator(),))
