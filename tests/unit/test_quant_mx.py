"""MX formats and shared microexponents: elements, exponents and values equal the enumeration."""

import importlib.util
import math

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from nemomodel.quant import formats, quantize_bdr, quantize_mx
from nemomodel.quant.formats import BDRFormat, MXFormat
from nemomodel.quant.mx import SCALE_RULES
from tests.oracles.quant import GRIDS, MANTISSA_BITS, dequantize_bdr_oracle, quantize_mx_oracle

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)

MX_FORMATS = [
    formats.MXFP4,
    formats.MXFP6_E2M3,
    formats.MXFP6_E3M2,
    formats.MXFP8_E4M3,
    formats.MXFP8_E5M2,
    formats.MXINT8,
]
BDR_FORMATS = [formats.MX9, formats.MX6, formats.MX4]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def borders_of_exponents() -> Tensor:
    """Blocks whose largest magnitude is at or beside every place where a scale rule changes."""
    starts = {1.0, 2.0}
    for name, grid in GRIDS.items():
        largest_in_one_to_two = 2 * math.frexp(grid[-1])[0]
        starts |= {2 - 2.0 ** -(MANTISSA_BITS[name] + 1), largest_in_one_to_two}
    at = torch.tensor(sorted(starts))
    amax = torch.cat([at, torch.nextafter(at, torch.zeros(())), torch.nextafter(at, 4 * at)])
    amax = torch.cat([amax * 2.0**e for e in (-40, -3, 0, 1, 30)])
    return amax[:, None] * torch.linspace(-1, 1, 32)


def every_power() -> Tensor:
    powers = torch.tensor([2.0**e for e in range(-149, 128)])
    return powers[:, None] * torch.linspace(-1, 1.99, 32)


def spread(blocks: int = 64) -> Tensor:
    """Values of many magnitudes in one block, zero blocks and zero pairs among them."""
    x = normal(blocks, 64) * 2.0 ** torch.randint(
        -12, 3, (blocks, 64), generator=torch.Generator().manual_seed(1)
    )
    x[::5, :32] = 0
    x[1::3, 4:8] = -0.0
    return x


CASES = {
    "normal": normal(32, 96),
    "odd sizes": normal(9, 77),
    "one value": normal(1, 1),
    "spread": spread(),
    "borders of exponents": borders_of_exponents(),
    "every power": every_power(),
    "denormals": normal(16, 32) * 1e-40,
    "smallest": normal(16, 32) * 2.0**-126,
    "largest": torch.linspace(-1, 1, 512).view(16, 32) * torch.finfo(torch.float32).max,
    "all zero": torch.zeros(3, 40),
}


def finite(x: Tensor, dtype: torch.dtype) -> Tensor:
    x = x.to(dtype)
    return torch.where(x.isfinite(), x, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("fmt", MX_FORMATS, ids=lambda f: f.name)
def test_mx_is_equal_to_the_oracle(fmt: MXFormat, rule: str, dtype: torch.dtype):
    for case, wide in CASES.items():
        x = finite(wide, dtype)
        q = quantize_mx(x, fmt, rule)
        elements, exponents = quantize_mx_oracle(x.float().numpy(), fmt.element.name, rule)
        actual = q.exponents.squeeze(3).squeeze(1).numpy()
        np.testing.assert_array_equal(actual, exponents, err_msg=case)
        flat = q.elements.flatten(1)[:, : x.shape[1]].double().numpy()
        np.testing.assert_array_equal(flat, elements, err_msg=case)
        scales = np.repeat(2.0 ** exponents.astype(np.float64), 32, 1)[:, : x.shape[1]]
        with np.errstate(over="ignore"):  # an element may round up to 2^128
            value = (elements * scales).astype(np.float32)
        np.testing.assert_array_equal(q.dequantize().numpy(), value, err_msg=case)


@pytest.mark.parametrize("fmt", MX_FORMATS[:-1], ids=lambda f: f.name)
def test_mx_elements_and_scales_are_those_of_ml_dtypes(fmt: MXFormat):
    """An implementation without our oracle: casts of ml_dtypes, scales stored as E8M0."""
    dtype = {
        "MXFP4": ml_dtypes.float4_e2m1fn,
        "MXFP6_E2M3": ml_dtypes.float6_e2m3fn,
        "MXFP6_E3M2": ml_dtypes.float6_e3m2fn,
        "MXFP8_E4M3": ml_dtypes.float8_e4m3fn,
        "MXFP8_E5M2": ml_dtypes.float8_e5m2,
    }[fmt.name]
    x = spread(128)
    blocks = x.numpy().astype(np.float64).reshape(-1, 32)
    largest = float(ml_dtypes.finfo(dtype).max)
    with np.errstate(divide="ignore"):
        exponents = np.floor(np.log2(np.abs(blocks).max(1))) - np.floor(np.log2(largest))
    scales = (2.0 ** exponents.clip(-127, 127)).astype(ml_dtypes.float8_e8m0fnu)
    scales = scales.astype(np.float64)[:, None]
    elements = (blocks / scales).clip(-largest, largest).astype(np.float32).astype(dtype)
    expected = (elements.astype(np.float64) * scales).astype(np.float32).reshape(x.shape)
    np.testing.assert_array_equal(quantize_mx(x, fmt, "floor").dequantize().numpy(), expected)


@pytest.mark.parametrize("fmt", MX_FORMATS, ids=lambda f: f.name)
def test_rceil_never_saturates_and_floor_does(fmt: MXFormat):
    x = normal(64, 64)
    blocks = x.view(-1, 32)
    for rule in ("rceil", "floor"):
        exponents = quantize_mx(x, fmt, rule).exponents.flatten().unsqueeze(1)
        largest = (blocks.abs() * 2.0**-exponents).amax()
        assert (largest > fmt.element.max) == (rule == "floor"), rule


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("fmt", BDR_FORMATS, ids=lambda f: f.name)
def test_shared_microexponents_are_equal_to_the_oracle(fmt: BDRFormat, dtype: torch.dtype):
    for case, wide in CASES.items():
        x = finite(wide, dtype)
        expected = dequantize_bdr_oracle(x.float().numpy(), fmt.mantissa_bits)
        actual = quantize_bdr(x, fmt).dequantize().double().numpy()
        np.testing.assert_array_equal(actual, expected, err_msg=case)


def test_small_pairs_have_half_the_step_of_their_block():
    x = torch.tensor([[1.0, 0.6, 0.6, 0.3, 1.2, 0.3] + [0.0] * 10])
    # MX4: magnitudes of 2 bits. Steps are 1/2 in pairs that reach 1, else 1/4.
    assert quantize_bdr(x, formats.MX4).dequantize()[0, :6].tolist() == [1, 0.5, 0.5, 0.25, 1, 0.5]


def test_average_bits_are_those_of_the_names():
    for fmt, bits in zip(BDR_FORMATS, (9, 6, 4), strict=True):
        shared = 8 / fmt.block_size + 1 / fmt.pair_size
        assert 1 + fmt.mantissa_bits + shared == bits


def quantizers() -> list:
    bdr = [pytest.param(quantize_bdr, fmt, id=fmt.name) for fmt in BDR_FORMATS]
    return bdr + [pytest.param(quantize_mx, fmt, id=fmt.name) for fmt in MX_FORMATS]


@pytest.mark.parametrize(("quantize", "fmt"), quantizers())
def test_shapes_and_faults_of_the_input(quantize, fmt):
    x = normal(2, 3, 40)
    flat = quantize(x.view(6, 40), fmt).dequantize(torch.bfloat16)
    assert torch.equal(quantize(x, fmt).dequantize(torch.bfloat16), flat.view(2, 3, 40))
    strided = x[:, 1].T
    copy = strided.contiguous()
    assert torch.equal(quantize(strided, fmt).dequantize(), quantize(copy, fmt).dequantize())
    for shape in ((0, 32), (3, 0), (2, 0, 5)):
        assert quantize(torch.empty(shape), fmt).dequantize().shape == shape
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="infinities or NaN"):
            quantize(torch.tensor([[1.0, bad]]), fmt)
    with pytest.raises(ValueError, match="float64"):
        quantize(x.double(), fmt)
    with pytest.raises(ValueError, match="rounding="):
        quantize(x, fmt, rounding="up")


def test_a_format_has_a_name():
    x = normal(4, 64)
    by_name = quantize_mx(x, "MXFP8_E4M3", "rceil").dequantize()
    assert torch.equal(by_name, quantize_mx(x, formats.MXFP8_E4M3, "rceil").dequantize())
    by_name = quantize_bdr(x, "MX6").dequantize()
    assert torch.equal(by_name, quantize_bdr(x, formats.MX6).dequantize())


@pytest.mark.parametrize("bad", ["mxfp8", formats.MX9, formats.E4M3, None])
def test_what_is_no_format_is_an_error(bad: object):
    with pytest.raises(ValueError, match=r"format=.* use one of MXFP4, MXFP6_E2M3, .*, MXINT8$"):
        quantize_mx(normal(2, 32), bad)
    with pytest.raises(ValueError, match=r"format=.*: use one of MX9, MX6, MX4$"):
        quantize_bdr(normal(2, 32), formats.MXFP4)


def test_an_unknown_scale_rule_is_an_error():
    with pytest.raises(ValueError, match="scale_rule="):
        quantize_mx(normal(2, 32), formats.MXFP4, "round")


@needs_torchao
@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("fmt", MX_FORMATS[:-1], ids=lambda f: f.name)
def test_mx_is_that_of_torchao(fmt: MXFormat, rule: str):
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.constants import DTYPE_FP6_E2M3, DTYPE_FP6_E3M2
    from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx

    dtype = {
        "MXFP4": torch.float4_e2m1fn_x2,
        "MXFP6_E2M3": DTYPE_FP6_E2M3,
        "MXFP6_E3M2": DTYPE_FP6_E3M2,
        "MXFP8_E4M3": torch.float8_e4m3fn,
        "MXFP8_E5M2": torch.float8_e5m2,
    }[fmt.name]
    for case in ("normal", "spread", "borders of exponents"):
        x = CASES[case]
        if rule == "rceil":
            # torchao multiplies by fl(1 / max), which is off for FP32 one step above a power.
            x = x.bfloat16().float()
        scales, data = to_mx(x, dtype, 32, ScaleCalculationMode(rule))
        q = quantize_mx(x, fmt, rule)
        exponents = scales.view(torch.uint8).int() - 127
        assert torch.equal(q.exponents.flatten(), exponents.flatten()), case
        values = to_dtype(data, scales, dtype, 32, torch.float32)
        assert torch.equal(q.dequantize(), values), case
