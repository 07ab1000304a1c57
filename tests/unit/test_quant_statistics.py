"""Statistics of quantised operands against exact fractions and float64."""

import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nemomodel.config.load import ConfigError
from nemomodel.observe.metrics import check_names
from nemomodel.quant.formats import MXFP8_E4M3
from nemomodel.quant.hadamard import hadamard_matrix, transform_rows
from nemomodel.quant.linear import QuantizedLinear
from nemomodel.quant.mx import quantize_mx
from nemomodel.quant.nvfp4 import quantize_nvfp4
from nemomodel.quant.operand import OperandFormat, quantize_operand
from nemomodel.quant.recipe import nvfp4_format
from nemomodel.quant.rounding import stream_key
from nemomodel.quant.statistics import Observer
from tests.ranks.test_train import make_config

CPU = torch.device("cpu")
FORMATS = [
    OperandFormat("nvfp4", "columns"),
    OperandFormat("nvfp4", "columns", stochastic=True),
    OperandFormat("nvfp4", "rows"),
    OperandFormat("nvfp4", "both"),
    OperandFormat("nvfp4", "rows", hadamard=True),
    OperandFormat("mxfp8", "columns"),
    OperandFormat("mxfp8", "rows"),
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    """BF16 with blocks of zeros, of numbers that get no scale, and outliers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    x *= torch.exp(2 * torch.randn(*shape, generator=generator))
    x[: shape[0] // 3, :16] = 0
    x[shape[0] // 3 :, -16:] *= 1e-9
    return x.to(torch.bfloat16)


def scales_by_element(x: Tensor, format: OperandFormat) -> list[list[Fraction]]:
    """The stored scale of the block of every element, by way of the packed forms."""
    if format.format == "mxfp8":
        t = x.T.contiguous() if format.along == "rows" else x
        exponents = quantize_mx(t, MXFP8_E4M3, "rceil").exponents[:, 0, :, 0]
        blocks = torch.pow(2.0, exponents.double()).repeat_interleave(32, 1)[:, : t.shape[1]]
        scales = blocks.T if format.along == "rows" else blocks
    else:
        block = {"columns": (1, 16), "rows": (16, 1), "both": (16, 16)}[format.along]
        _, scales = quantize_nvfp4(x, block).exact()
    return [[Fraction(s) for s in row] for row in scales.tolist()]


def oracle(x: Tensor, format: OperandFormat, q: Tensor) -> dict[str, float]:
    """Element by element, in exact arithmetic but for the logarithms.

    Args:
        x: after the transform.
        q: what became of it, float64.
    """
    scales = scales_by_element(x, format)
    amax = max(abs(Fraction(v)) for v in x.flatten().tolist())
    largest = Fraction(448) if format.format == "mxfp8" else 6 * amax / 2688
    signal = noise = Fraction(0)
    underflows = saturated = not_zero = 0
    of_blocks = set()
    for x_row, q_row, s_row in zip(x.tolist(), q.tolist(), scales, strict=True):
        for value, quantized, scale in zip(x_row, q_row, s_row, strict=True):
            signal += Fraction(value) ** 2
            noise += (Fraction(quantized) - Fraction(value)) ** 2
            not_zero += value != 0
            underflows += value != 0 and quantized == 0
            saturated += scale > 0 and abs(Fraction(value)) > scale * largest
            if scale > Fraction(2) ** -127:  # an MX block of zeros has this one
                of_blocks.add(scale)
    return {
        "sqnr_db": 10 * math.log10(signal / noise),
        "underflow": underflows / not_zero,
        "saturation": saturated / x.numel(),
        "scale_min": float(min(of_blocks)),
        "scale_max": float(max(of_blocks)),
        "scale_range_log2": math.log2(max(of_blocks) / min(of_blocks)),
        "amax": float(amax),
    }


@pytest.mark.parametrize("shape", [(48, 64), (33, 50)])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_statistics_are_those_of_exact_arithmetic(
    format: OperandFormat, shape: tuple[int, int]
) -> None:
    x = draw(*shape)
    exact = quantize_operand(x, format, key=stream_key(3) if format.stochastic else None)
    observer = Observer({"blocks.2.mixer.in_proj": "mamba.in_proj"}, CPU)
    observer.see("blocks.2.mixer.in_proj", "dy along tokens", x, format, exact)
    values = observer.read()
    check_names(values)
    transformed = transform_rows(x, hadamard_matrix()) if format.hadamard else x
    q = exact.values.double() * (1 if exact.factor is None else exact.factor.double())
    expected = oracle(transformed, format, q)
    for where in ("mamba.in_proj/2", "mamba.in_proj"):
        for name, value in expected.items():
            found = values.pop(f"quant/{where}/dy_along_tokens/{name}")
            assert found == pytest.approx(value, rel=1e-9), (where, name)
    assert values == {}
    if format.format == "nvfp4":
        assert expected["saturation"] > 0
        assert expected["underflow"] > 0


def test_calls_of_a_step_add_up_and_reading_starts_anew() -> None:
    format = FORMATS[0]
    first, second = draw(32, 48, seed=1), draw(16, 48, seed=2)
    observer = Observer({"blocks.0.mixer.fc1": "mlp.fc1"}, CPU)
    assert observer.read() == {}
    parts = []
    for x in (first, second):
        exact = quantize_operand(x, format)
        observer.see("blocks.0.mixer.fc1", "x", x, format, exact)
        q = exact.values.double() * exact.factor.double()
        parts.append((x.double(), q))
    values = observer.read()
    assert observer.read() == {}
    x, q = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    sqnr = 10 * torch.log10(x.square().sum() / (q - x).square().sum()).item()
    assert values["quant/mlp.fc1/0/x/sqnr_db"] == pytest.approx(sqnr, rel=1e-12)
    underflow = ((x != 0) & (q == 0)).sum() / (x != 0).sum()
    assert values["quant/mlp.fc1/0/x/underflow"] == pytest.approx(underflow.item(), rel=1e-6)
    assert values["quant/mlp.fc1/0/x/amax"] == x.abs().max().item()


def test_zeros_have_no_noise_and_no_scale() -> None:
    observer = Observer({"blocks.0.mixer.fc1": "mlp.fc1"}, CPU)
    for format in (FORMATS[0], FORMATS[-2]):
        x = torch.zeros(16, 32, dtype=torch.bfloat16)
        observer.see("blocks.0.mixer.fc1", "x", x, format, quantize_operand(x, format))
        found = observer.read()
        for where in ("mlp.fc1/0", "mlp.fc1"):
            names = ("underflow", "saturation", "amax")
            assert [found.pop(f"quant/{where}/x/{name}") for name in names] == [0, 0, 0]
        assert found == {}


def test_layer_shows_all_its_operands_and_experts_add_up() -> None:
    """Of rows that hold no token nothing is seen."""
    rows_E, count_E = torch.tensor([32, 64, 32]), torch.tensor([20, 64, 1])
    x, dy = draw(128, 48, seed=1), draw(128, 40, seed=2)
    weight = nn.Parameter(draw(3, 40, 48, seed=3))
    format, name = nvfp4_format(stochastic=False), "blocks.1.mixer.experts.fc1"
    layer = QuantizedLinear(format, name=name, seed=0)
    layer.observer = Observer({name: "moe.experts.fc1"}, CPU)
    layer.grouped(x.requires_grad_(), weight, rows_E, count_E).backward(dy)
    values = layer.observer.read()

    expected = Observer({name: "moe.experts.fc1"}, CPU)
    products = (format.fprop, format.dgrad, format.wgrad)
    for expert, start, count in ((0, 0, 20), (1, 32, 64), (2, 96, 1)):
        own_x, own_dy = (t.detach()[start : start + count] for t in (x, dy))
        w = weight.detach()[expert]
        for operand, tensor, operand_format in (
            ("x", own_x, products[0].left),
            ("weight", w, products[0].right),
            ("dy", own_dy, products[1].left),
            ("dy_along_tokens", own_dy, products[2].left),
            ("x_along_tokens", own_x, products[2].right),
        ):
            exact = quantize_operand(tensor, operand_format)
            expected.see(name, operand, tensor, operand_format, exact)
    expected = expected.read()
    assert values.keys() == expected.keys()
    assert {key.split("/")[-2] for key in values} == {
        "x",
        "weight",
        "dy",
        "dy_along_tokens",
        "x_along_tokens",
    }
    for key, value in expected.items():
        assert values[key] == pytest.approx(value, rel=1e-12), key


def test_weights_have_a_name_for_each_direction() -> None:
    format, name = nvfp4_format(stochastic=False, square=False), "blocks.1.mixer.fc1"
    layer = QuantizedLinear(format, name=name, seed=0)
    layer.observer = Observer({name: "mlp.fc1"}, CPU)
    weight = nn.Parameter(draw(40, 48, seed=3))
    layer(draw(32, 48).requires_grad_(), weight).backward(draw(32, 40))
    values = layer.observer.read()
    found = {key.split("/")[-2] for key in values}
    assert {"weight", "weight_along_outputs"} <= found
    names = ("weight", "weight_along_outputs")
    assert len({values[f"quant/mlp.fc1/1/{n}/sqnr_db"] for n in names}) == 2


SHARED = "blocks.0.mixer.fc1"
OWN = ("mtp.blocks.0.layers.0.mixer.fc1", "mtp.blocks.0.layers.1.mixer.fc1")


def _show(observer: Observer, rank: int) -> None:
    """A half of one layer, and the whole of another one."""
    half = draw(32, 48)[16 * rank :][:16]
    exact = quantize_operand(half, FORMATS[0])
    observer.see(SHARED, "x", half, FORMATS[0], exact)
    observer.see(OWN[rank], "dy", half, FORMATS[0], exact)


def _assert_all_ranks_read(expected: dict[str, float]) -> None:
    rank = torch.distributed.get_rank()
    observer = Observer({SHARED: "mlp.fc1", OWN[rank]: "mlp.fc2"}, CPU)
    for _ in range(2):
        _show(observer, rank)
        found = observer.read()
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=1e-12), key


def test_ranks_read_what_all_have_seen(run_ranks: Callable[..., None]) -> None:
    """With layers that only one of them has, as stages of a pipeline do."""
    observer = Observer({SHARED: "mlp.fc1", OWN[0]: "mlp.fc2", OWN[1]: "mlp.fc2"}, CPU)
    for rank in range(2):
        _show(observer, rank)
    expected = observer.read()
    assert {"quant/mlp.fc1/0/x/amax", "quant/mlp.fc2/mtp.0.1/dy/amax"} <= expected.keys()
    run_ranks(2, _assert_all_ranks_read, expected)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("precision.recipe=bf16",), "has no effect with precision.recipe='bf16'"),
        (("precision.recipe=nvfp4", "observe.quantization_interval=9"), "is never reached"),
        (
            ("precision.recipe=nvfp4", "precision.executor=transformer_engine"),
            "has no effect with precision.executor",
        ),
    ],
)
def test_interval_without_effect_is_an_error(
    tmp_path: Path, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"observe.quantization_interval=[0-9] {message}"):
        make_config(tmp_path, "observe.quantization_interval=2", *overrides)
