"""The three products of a quantised linear against float64 products of its operands."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from nemomodel.quant.formats import MXFP8_E4M3
from nemomodel.quant.hadamard import hadamard_matrix, transform_rows
from nemomodel.quant.linear import (
    LinearFormat,
    ProductFormat,
    QuantizedLinear,
    first_not_finite,
)
from nemomodel.quant.mx import quantize_mx
from nemomodel.quant.nvfp4 import quantize_nvfp4
from nemomodel.quant.operand import OperandFormat, product, quantize_operand
from nemomodel.quant.recipe import FORMATS as LINEAR_FORMATS
from nemomodel.quant.recipe import mxfp8_format, nvfp4_format
from tests.close import rms_ratio

BF16_STEP = 2.0**-8
NEAREST = nvfp4_format(stochastic=False)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def decoded(x: Tensor, format: OperandFormat) -> Tensor:
    """The values an operand stands for, by way of the packed form, in float64."""
    if format.hadamard:
        x = transform_rows(x, hadamard_matrix())
    if format.format == "mxfp8":
        t = x.T.contiguous() if format.along == "rows" else x
        values = quantize_mx(t, MXFP8_E4M3, "rceil").dequantize(torch.float64)
        return values.T if format.along == "rows" else values
    block = {"columns": (1, 16), "rows": (16, 1), "both": (16, 16)}[format.along]
    q = quantize_nvfp4(x, block)
    codes, scales = q.exact()
    return codes.double() * scales.double() * (q.amax.double() / 2688)


FORMATS = [
    OperandFormat("nvfp4", "columns"),
    OperandFormat("nvfp4", "rows"),
    OperandFormat("nvfp4", "both"),
    OperandFormat("nvfp4", "rows", hadamard=True),
    OperandFormat("mxfp8", "columns"),
    OperandFormat("mxfp8", "rows"),
]


@pytest.mark.parametrize("shape", [(48, 64), (33, 50), (1, 16), (16, 1)])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_operands_are_exact_in_bf16(format: OperandFormat, shape: tuple[int, int]) -> None:
    x = draw(*shape)
    operand = quantize_operand(x, format)
    assert operand.values.dtype == torch.bfloat16
    factor = 1.0 if operand.factor is None else operand.factor.double()
    expected = decoded(x, format)
    assert operand.values.shape == expected.shape
    assert rms_ratio(operand.values.double() * factor, expected) < 2e-7


@pytest.mark.parametrize(
    "format",
    [
        NEAREST,
        nvfp4_format(stochastic=False, hadamard=False),
        nvfp4_format(stochastic=False, square=False),
        mxfp8_format(),
        LINEAR_FORMATS["nvfp4_weights_only"],
        LINEAR_FORMATS["mxfp8_weights_only"],
        LINEAR_FORMATS["nvfp4_forward_only"],
        replace(NEAREST, fprop=None),
    ],
    ids=[
        *("nvfp4", "no-hadamard", "no-square", "mxfp8"),
        *("weights", "mxfp8-weights", "forward", "backward"),
    ],
)
@pytest.mark.parametrize(("tokens", "width", "out"), [(48, 64, 80), (33, 50, 17)])
def test_each_product_is_that_of_its_operands(
    format: LinearFormat, tokens: int, width: int, out: int
) -> None:
    x = draw(tokens, width, seed=1).requires_grad_()
    weight = nn.Parameter(draw(out, width, seed=2))
    dy = draw(tokens, out, seed=3)
    y = QuantizedLinear(format, name="layer", seed=0)(x, weight)
    y.backward(dy)

    def operands(product: ProductFormat | None, left: Tensor, right: Tensor) -> list[Tensor]:
        formats = (product.left, product.right) if product else (None, None)
        return [
            decoded(t.detach(), f) if f else t.detach().double()
            for t, f in zip((left, right), formats, strict=True)
        ]

    x_fprop, w_fprop = operands(format.fprop, x, weight)
    dy_dgrad, w_dgrad = operands(format.dgrad, dy, weight)
    dy_wgrad, x_wgrad = operands(format.wgrad, dy, x)
    fprop, dgrad, wgrad = x_fprop @ w_fprop.T, dy_dgrad @ w_dgrad, dy_wgrad.T @ x_wgrad
    for actual, expected in ((y, fprop), (x.grad, dgrad), (weight.grad, wgrad)):
        assert actual.dtype == torch.bfloat16
        # Rounded once, to BF16, after the FP32 factors.
        assert rms_ratio(actual, expected) < 0.5 * BF16_STEP * 1.01


def test_product_is_rounded_once() -> None:
    left, right = (quantize_operand(draw(64, 256, seed=s), FORMATS[0]) for s in (1, 2))
    right = replace(right, values=right.values.T)
    exact = left.values.double() @ right.values.double() * (left.factor * right.factor).double()
    assert (product(left, right) == exact.to(torch.bfloat16)).float().mean() > 0.999


def test_transform_cancels_in_wgrad() -> None:
    """Without quantisation the transformed product is the plain one."""
    dy, x = draw(48, 20, dtype=torch.float64), draw(48, 30, seed=1, dtype=torch.float64)
    matrix = hadamard_matrix()
    mixed = transform_rows(dy, matrix).T @ transform_rows(x, matrix)
    assert rms_ratio(mixed, dy.T @ x) < 1e-14


def test_square_blocks_serve_both_uses_of_a_weight() -> None:
    quantized = QuantizedLinear(NEAREST, name="layer", seed=0)
    weight = nn.Parameter(draw(32, 48))
    format = NEAREST.fprop.right
    assert format == NEAREST.dgrad.right
    first = quantized._weight(weight, format)
    assert quantized._weight(weight, format) is first
    with torch.no_grad():
        weight.mul_(2)
    quantized.begin(1, 0)
    assert quantized._weight(weight, format).factor_E == 2 * first.factor_E


def test_stochastic_gradients_are_unbiased_and_repeat_by_step() -> None:
    format = nvfp4_format()
    x, weight, dy = draw(32, 48, seed=1), nn.Parameter(draw(64, 48, seed=2)), draw(32, 64, seed=3)

    def gradient(quantized: QuantizedLinear, step: int) -> Tensor:
        quantized.begin(step, 0)
        leaf = x.clone().requires_grad_()
        quantized(leaf, weight).backward(dy)
        return leaf.grad.double()

    quantized = QuantizedLinear(format, name="layer", seed=0)
    first = gradient(quantized, 1)
    assert torch.equal(gradient(QuantizedLinear(format, name="layer", seed=0), 1), first)
    assert not torch.equal(gradient(quantized, 2), first)
    assert not torch.equal(gradient(QuantizedLinear(format, name="other", seed=0), 1), first)
    mean = torch.stack([gradient(quantized, step) for step in range(400)]).mean(0)
    exact = dy.double() @ decoded(weight.detach(), format.dgrad.right)
    single = (first - exact).norm() / exact.norm()
    # 400 draws shrink what has mean zero by 20; clamping at the largest code has not.
    assert (mean - exact).norm() / exact.norm() < single / 8


def test_micro_batches_draw_different_bits() -> None:
    quantized = QuantizedLinear(nvfp4_format(), name="layer", seed=0)
    weight, dy = nn.Parameter(draw(64, 48, seed=2)), draw(32, 64, seed=3)
    gradients = []
    for _ in range(2):
        leaf = draw(32, 48, seed=1).requires_grad_()
        quantized(leaf, weight).backward(dy)
        gradients.append(leaf.grad)
    assert not torch.equal(*gradients)


def test_weight_gradients_accumulate_in_fp32() -> None:
    weight = nn.Parameter(draw(16, 16))
    weight.main_grad = torch.zeros(16, 16)
    quantized = QuantizedLinear(NEAREST, name="layer", seed=0)
    for _ in range(2):
        quantized(draw(32, 16, seed=1), weight).backward(draw(32, 16, seed=2))
    assert weight.grad is None
    once = weight.main_grad / 2
    assert torch.equal(once.to(torch.bfloat16).float(), once)


def test_every_expert_is_a_linear_of_its_own() -> None:
    """Rows that hold no token take part in nothing; an expert without tokens has gradient 0."""
    rows_E, count_E = torch.tensor([32, 0, 64, 32]), torch.tensor([20, 0, 64, 1])
    x, dy = draw(128, 48, seed=1), draw(128, 40, seed=2)
    weight = nn.Parameter(draw(4, 40, 48, seed=3))
    leaf = x.clone().requires_grad_()
    grouped = QuantizedLinear(NEAREST, name="experts", seed=0)
    y = grouped.grouped(leaf, weight, rows_E, count_E)
    y.backward(dy)
    used = torch.zeros(128, dtype=torch.bool)
    for expert, start, count in ((0, 0, 20), (2, 32, 64), (3, 96, 1)):
        rows = slice(start, start + count)
        used[rows] = True
        own_x, own_w = x[rows].clone().requires_grad_(), nn.Parameter(weight[expert].detach())
        own_y = QuantizedLinear(NEAREST, name="experts", seed=0)(own_x, own_w)
        own_y.backward(dy[rows])
        assert torch.equal(y[rows], own_y)
        assert torch.equal(leaf.grad[rows], own_x.grad)
        assert torch.equal(weight.grad[expert], own_w.grad)
    assert not y[~used].any()
    assert not leaf.grad[~used].any()
    assert not weight.grad[1].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["x", "weight", "dy"])
def test_the_first_operand_that_is_not_finite_is_named(where: str, bad: float) -> None:
    x = draw(32, 48, seed=1).requires_grad_()
    weights = [nn.Parameter(draw(48, 48, seed=i)) for i in range(3)]
    if where == "x":
        x.data[5, 7] = bad
    elif where == "weight":
        weights[1].data[40, 3] = bad
    expected = {"x": "layer0: x", "weight": "layer1: weight", "dy": "layer1: dy"}[where]
    layers = [QuantizedLinear(nvfp4_format(), name=f"layer{i}", seed=0) for i in range(3)]
    for i, (layer, weight) in enumerate(zip(layers, weights, strict=True)):
        layer.begin(1, 0)
        x = layer(x, weight)
        if where == "dy" and i == 1:
            x.register_hook(lambda dy: dy.index_fill(0, torch.tensor(3), bad))
    x.sum().backward()
    assert first_not_finite(layers) == expected
    for layer in layers:
        layer.begin(2, 0)
    assert first_not_finite(layers) is None


def test_an_input_that_only_wgrad_quantises_is_named_before_what_it_led_to() -> None:
    x = draw(32, 48, seed=1).requires_grad_()
    x.data[5, 7] = float("nan")
    format = LINEAR_FORMATS["nvfp4_backward_only"]
    layers = [QuantizedLinear(format, name=name, seed=0) for name in ("first", "last")]
    for i, layer in enumerate(layers):
        layer.begin(1, 0)
        x = layer(x, nn.Parameter(draw(48, 48, seed=i)))
    x.sum().backward()
    assert first_not_finite(layers) == "first: x along tokens"


def test_bits_are_those_of_the_micro_batch_of_the_forward_pass() -> None:
    """Pipelines begin the next micro-batch before the backward pass of one."""
    weight, dy = nn.Parameter(draw(64, 48, seed=2)), draw(32, 64, seed=3)
    gradients = []
    for early in (False, True):
        quantized = QuantizedLinear(nvfp4_format(), name="layer", seed=0)
        quantized.begin(1, 0)
        leaf = draw(32, 48, seed=1).requires_grad_()
        y = quantized(leaf, weight)
        if early:
            quantized.begin(1, 1)
        y.backward(dy)
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
