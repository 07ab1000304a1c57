"""Triton kernels of the quantiser: the bits of the plain one, and code for every target.

A process of its own runs them in Triton's interpreter, which has to be chosen before Triton is
imported: `python -m tests.unit.test_quant_kernels FILE`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemomodel.quant.operand import OperandFormat, Place2D, quantize_plain
from nemomodel.quant.rounding import stream_key

pytest.importorskip("triton", reason="Triton comes with PyTorch on Linux only")

FORMATS = [
    OperandFormat("nvfp4", "columns"),
    OperandFormat("nvfp4", "rows"),
    OperandFormat("nvfp4", "both"),
    OperandFormat("nvfp4", "columns", stochastic=True),
    OperandFormat("nvfp4", "rows", stochastic=True, hadamard=True),
    OperandFormat("mxfp8", "columns"),
    OperandFormat("mxfp8", "rows", stochastic=True),
]
STOCHASTIC = [format for format in FORMATS if format.stochastic]
ROWS, COUNTS = [0, 17, 0, 32, 1, 30], [0, 17, 0, 20, 1, 16]


def normal(rows: int, columns: int) -> Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(0))


def edges() -> Tensor:
    """Ties of codes and scales, signed zeros and blocks of them, and every magnitude down to
    denormals, in one matrix whose largest is exactly 6 * 448."""
    x = normal(64, 96)
    x[:, :32] = torch.randint(-24, 25, (64, 32), generator=torch.Generator().manual_seed(1)) * 0.25
    x[16:] *= 2.0 ** torch.linspace(11, -149, 48).round()[:, None]
    x[0, 0], x[:16, 32:48], x[5, 48:80] = 6 * 448, 0, -0.0
    return x


INPUTS = {
    "normal": normal(33, 50),
    "wide": normal(3, 300),
    "one row": normal(1, 16),
    "one column": normal(17, 1),
    "edges": edges(),
    "zeros": torch.zeros(16, 32),
    "tiny": normal(16, 32) * 2.0**-140,
    "overflowing encode scale": normal(16, 32) * 2.0**-118,
    "huge": normal(16, 32).clamp(-1, 1) * 2.0**125,
    "bf16": normal(33, 70).bfloat16(),
    "transposed": normal(50, 40).T,
    "not finite": normal(3, 300).index_fill(1, torch.tensor([7, 290]), torch.nan),
}


FAR = Place2D(row=2**31 - 8, columns=None, width=2**20 + 16)


def key_of(format: OperandFormat, *names: int) -> tuple[int, int] | None:
    return stream_key("kernels", *names) if format.stochastic else None


def part() -> tuple[Tensor, Place2D, tuple]:
    """A matrix, and the place of a part of it that holds its largest value: 32 rows from 16 on
    of two blocks of columns."""
    x = normal(64, 160)
    ids = torch.cat([torch.arange(96, 128), torch.arange(32, 64)])
    x[20, 100] = 9.0
    place = Place2D(row=16, columns=ids.to(torch.int32), width=160)
    return x, place, (slice(16, 48), ids)


def interpreted() -> dict[str, Any]:
    """What the kernels make of everything above; CPU tensors in the interpreter."""
    from nemomodel.quant import kernels

    def quantize(x: Tensor, format: OperandFormat, place: Any = None) -> tuple:
        key = key_of(format)
        made = kernels.quantize_matrix(x, format, key=key, place=place, amax_group=None)
        return made.values, made.factor, made.amax

    found: dict[str, Any] = {}
    for format in FORMATS:
        for name, x in INPUTS.items():
            found[f"{format} {name}"] = quantize(x, format)
        keys = [stream_key("kernels", e) for e in range(len(ROWS))] if format.stochastic else None
        made = kernels.quantize_groups(
            normal(80, 70), format, ROWS, COUNTS, keys=keys, place=None, amax_group=None
        )
        found[f"{format} groups"] = made.values, made.factor_E, made.amax_E, made.rows
    x, place, at = part()
    for format in STOCHASTIC:
        found[f"{format} part"] = quantize(x[at], format, place)
        keys = [key_of(format), stream_key("other")]
        for rows in ([40], [24, 16]):
            made = kernels.quantize_groups(
                *(normal(40, 40), format, rows, rows),
                keys=keys[: len(rows)],
                place=FAR,
                amax_group=None,
            )
            found[f"{format} {rows} far"] = made.values, made.factor_E, made.amax_E
        found[f"{format} far"] = quantize(normal(20, 40), format, FAR)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    file = tmp_path_factory.mktemp("kernels") / "results.pt"
    subprocess.run(
        [sys.executable, "-m", "tests.unit.test_quant_kernels", str(file)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        check=True,
    )
    return torch.load(file)


def assert_same_bits(actual: Tensor | None, expected: Tensor | None) -> None:
    if actual is None or expected is None:
        assert actual is expected
        return
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    bits = torch.int16 if actual.dtype == torch.bfloat16 else torch.int32
    assert torch.equal(actual.contiguous().view(bits), expected.contiguous().view(bits))


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_kernels_have_the_plain_bits(
    format: OperandFormat, name: str, results: dict[str, Any]
) -> None:
    values, factor, amax = results[f"{format} {name}"]
    expected = quantize_plain(INPUTS[name], format, key=key_of(format))
    if name == "not finite":
        assert amax.isnan()
        return
    assert_same_bits(values, expected.values)
    assert_same_bits(factor, expected.factor)
    assert_same_bits(amax, expected.amax)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_every_group_is_a_matrix_of_its_own(format: OperandFormat, results: dict[str, Any]) -> None:
    """Rows without tokens are zeros, unless a transform mixes them with others."""
    values, factor_E, amax_E, out_rows = results[f"{format} groups"]
    x, start, out = normal(80, 70), 0, 0
    assert out_rows == [format.rows_of(n) for n in ROWS]
    for e, (rows, count) in enumerate(zip(ROWS, COUNTS, strict=True)):
        own = values[out : out + out_rows[e]]
        expected = quantize_plain(x[start : start + count], format, key=key_of(format, e))
        assert_same_bits(own[: len(expected.values)], expected.values)
        assert not own[len(expected.values) :].any()
        assert_same_bits(amax_E[e], expected.amax)
        if factor_E is not None:
            assert_same_bits(factor_E[e], expected.factor)
        start, out = start + rows, out + out_rows[e]
    assert out == len(values)


@pytest.mark.parametrize("format", STOCHASTIC, ids=str)
def test_a_part_has_the_bits_of_the_whole(format: OperandFormat, results: dict[str, Any]) -> None:
    x, _, at = part()
    values, *_ = results[f"{format} part"]
    assert_same_bits(values, quantize_plain(x, format, key=key_of(format)).values[at])


@pytest.mark.parametrize("format", STOCHASTIC, ids=str)
def test_counters_wrap_around(format: OperandFormat, results: dict[str, Any]) -> None:
    values, *_ = results[f"{format} far"]
    expected = quantize_plain(normal(20, 40), format, key=key_of(format), place=FAR)
    assert_same_bits(values, expected.values)
    keys = [key_of(format), stream_key("other")]
    for rows in ([40], [24, 16]):
        values, factor_E, amax_E = results[f"{format} {rows} far"]
        out = 0
        for e, x in enumerate(normal(40, 40).split(rows)):
            expected = quantize_plain(x, format, key=keys[e], place=FAR)
            assert_same_bits(values[out : out + len(expected.values)], expected.values)
            assert_same_bits(amax_E[e], expected.amax)
            assert_same_bits(None if factor_E is None else factor_E[e], expected.factor)
            out += len(expected.values)
        assert out == len(values)


@pytest.fixture
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Compile what is launched, for a GPU that is not there, and launch nothing."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from nemomodel.quant import kernels

    capability: int = request.param
    absent = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: capability,
        get_current_stream=lambda device: 0,
    )
    compiled = []

    def compile_only(kernel: Any) -> Any:
        run = kernel.run
        return lambda *args, **options: compiled.append(run(*args, **options | {"warmup": True}))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", absent)
    for kernel in (kernels._amax, kernels._quantize):
        monkeypatch.setattr(kernel, "run", compile_only(kernel))
    return compiled


@pytest.mark.parametrize("target", [90, 100, 120], indirect=True, ids=lambda c: f"sm_{c}")
def test_kernels_compile_for_every_target(target: list[Any]) -> None:
    from nemomodel.quant import kernels

    x, half = torch.zeros(64, 256), torch.zeros(64, 256, dtype=torch.bfloat16)
    place = Place2D(row=0, columns=torch.zeros(256, dtype=torch.int32), width=256)
    columns = OperandFormat("nvfp4", "columns", stochastic=True)
    kernels.quantize_matrix(x, columns, key=(1, 2), place=place, amax_group=None)
    rows = OperandFormat("nvfp4", "rows", stochastic=True, hadamard=True)
    experts, keys = [16, 48], [(1, 2), (3, 4)]
    kernels.quantize_groups(half, rows, experts, experts, keys=keys, place=None, amax_group=None)
    mx = OperandFormat("mxfp8", "rows")
    kernels.quantize_matrix(half, mx, key=None, place=None, amax_group=None)
    assert len(target) == 5
    for kernel in target:
        # Fused operations and flushed denormals have other bits.
        assert not re.search(r"\bfma\b|\.ftz\b", kernel.asm["ptx"])


if __name__ == "__main__":
    torch.save(interpreted(), sys.argv[1])
