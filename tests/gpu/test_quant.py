"""The quantiser's kernels on a GPU have the bits of a CPU; Transformer Engine where it can run."""

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nemomodel.quant.linear import LinearFormat, QuantizedLinear
from nemomodel.quant.operand import (
    OperandFormat,
    Place2D,
    quantize_groups,
    quantize_operand,
    quantize_plain,
)
from nemomodel.quant.recipe import mxfp8_format, nvfp4_format
from nemomodel.quant.rounding import stream_key
from tests.close import rms_ratio

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

GPU = torch.device("cuda")
FORMATS = [
    OperandFormat("nvfp4", "columns"),
    OperandFormat("nvfp4", "both"),
    OperandFormat("nvfp4", "columns", stochastic=True),
    OperandFormat("nvfp4", "rows", hadamard=True),
    OperandFormat("nvfp4", "rows", stochastic=True, hadamard=True),
    OperandFormat("mxfp8", "columns"),
    OperandFormat("mxfp8", "rows", stochastic=True),
]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def normal(rows: int, columns: int) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(0))


def edges() -> Tensor:
    """Normal data, ties and zeros; from row 64 on down to denormals that have few bits left."""
    x = normal(128, 256)
    x[:, :64] = torch.randint(-24, 25, (128, 64), generator=torch.Generator().manual_seed(1)) * 0.25
    x[::7, 64:96] = 0
    x[64:] *= 2.0 ** torch.linspace(12, -145, 64)[:, None]
    return x


INPUTS = {"large": normal(1000, 3000), "edges": edges(), "tiny": edges() * 2.0**-130}


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    bits = torch.int16 if actual.dtype == torch.bfloat16 else torch.int32
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    return torch.equal(actual.cpu().view(bits), expected.contiguous().view(bits))


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_matrices_have_the_bits_of_a_cpu(
    format: OperandFormat, dtype: torch.dtype, name: str
) -> None:
    x, key = INPUTS[name].to(dtype), stream_key(0) if format.stochastic else None
    actual = quantize_operand(x.to(GPU), format, key=key)
    expected = quantize_plain(x, format, key=key)
    assert same_bits(actual.values, expected.values)
    assert same_bits(actual.amax, expected.amax)
    if expected.factor is not None:
        assert same_bits(actual.factor, expected.factor)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_groups_have_the_bits_of_a_cpu(format: OperandFormat) -> None:
    rows, counts = [0, 17, 0, 100, 1, 30], [0, 17, 0, 90, 1, 16]
    keys = [stream_key(e) for e in range(6)] if format.stochastic else None
    columns = torch.randperm(300, generator=torch.Generator().manual_seed(0)).to(torch.int32)
    found = []
    for device in (GPU, torch.device("cpu")):
        x = normal(148, 300).bfloat16().to(device)
        place = Place2D(2**31 - 40, columns.to(device), 2**20)
        found.append(quantize_groups(x, format, rows, counts, keys=keys, place=place))
    actual, expected = found
    assert actual.rows == expected.rows
    assert same_bits(actual.values, expected.values)
    assert same_bits(actual.amax_E, expected.amax_E)


def test_a_matrix_of_more_than_2_31_elements_is_quantised_to_its_end() -> None:
    rows, columns = 2**16 + 16, 2**15
    if torch.cuda.mem_get_info()[0] < 5 * rows * columns:
        pytest.skip("needs 11 GiB of free memory")
    x = torch.zeros(rows, columns, dtype=torch.bfloat16, device=GPU)
    end = normal(16, columns).bfloat16()
    x[-16:] = end.to(GPU)
    actual = quantize_operand(x, FORMATS[0])
    assert same_bits(actual.values[-16:], quantize_plain(end, FORMATS[0]).values)
    assert not actual.values[:-16].any()


def test_largest_magnitudes_show_what_is_not_finite() -> None:
    for bad in (torch.nan, torch.inf):
        for format in FORMATS:
            x = normal(64, 300).to(GPU)
            x[40, 200] = bad
            key = stream_key(0) if format.stochastic else None
            assert not quantize_operand(x, format, key=key).amax.isfinite()


def capability() -> int:
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0


@pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None,
    reason="transformer_engine is not installed",
)
@pytest.mark.parametrize("experts", [False, True], ids=["linear", "experts"])
@pytest.mark.parametrize(
    ("format", "majors"),
    [
        (nvfp4_format(stochastic=False), (10,)),
        (nvfp4_format(), (10,)),
        (mxfp8_format(), (9, 10)),
    ],
    ids=["nvfp4-nearest", "nvfp4", "mxfp8"],
)
def test_transformer_engine_agrees_with_the_emulation(
    format: LinearFormat, majors: tuple[int, ...], experts: bool
) -> None:
    if capability() not in majors:
        pytest.skip(f"compute capability {capability()}.x has no such products")
    from nemomodel.quant.transformer_engine import TransformerEngineLinear

    x, dy = normal(300, 256).bfloat16().to(GPU), normal(300, 384).bfloat16().to(GPU)
    rows = [torch.tensor([100, 0, 137, 63], device=GPU)] * 2 if experts else []
    shape = (4, 384, 256) if experts else (384, 256)
    weight = normal(4 * 384, 256).bfloat16()[: 384 * (4 if experts else 1)].view(shape).to(GPU)

    def results(kind: Callable[..., Any]) -> list[Tensor]:
        leaf, parameter = x.clone().requires_grad_(), nn.Parameter(weight.clone())
        layer = kind(format, name="layer", seed=0)
        y = layer.grouped(leaf, parameter, *rows) if experts else layer(leaf, parameter)
        y.backward(dy)
        return [y.detach(), leaf.grad, parameter.grad]

    # The same codes but for stochastic rounding; on Hopper the blocks differ.
    limits = (0.01, 0.01, 0.01)
    if format == nvfp4_format():
        limits = (0.01, 0.3, 0.3)
    elif capability() == 9:
        limits = (0.1, 0.1, 0.1)
    both = zip(results(TransformerEngineLinear), results(QuantizedLinear), limits, strict=True)
    for actual, expected, limit in both:
        assert rms_ratio(actual, expected) < limit
