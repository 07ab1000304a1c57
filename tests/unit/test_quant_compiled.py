"""The C++ quantiser has the bits of the plain one, and the plain one serves where there is none."""

import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nemomodel.quant import compiled
from nemomodel.quant.operand import (
    ExactOperand,
    OperandFormat,
    Place2D,
    quantize_groups,
    quantize_operand,
    quantize_plain,
)
from nemomodel.quant.rounding import stream_key

FORMATS = [
    OperandFormat(name, along, stochastic, hadamard)
    for name, along in [("nvfp4", a) for a in ("columns", "rows", "both")]
    + [("mxfp8", a) for a in ("columns", "rows")]
    for stochastic, hadamard in itertools.product((False, True), repeat=2)
]
SHAPES = [(80, 144), (33, 50), (1, 7)]
PLACE = Place2D(2**30 + 5, None, 123_457)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_ties(shape: tuple[int, int]) -> Tensor:
    """Normal data, multiples of 1/4, and zeros."""
    x = normal(*shape)
    x[:, ::2] = (x[:, ::2] * 8).round() / 4
    x[::3, :48] = 0
    return x


def all_exponents(shape: tuple[int, int]) -> Tensor:
    """Rows from the largest numbers down to denormals with few bits left."""
    return normal(*shape) * torch.linspace(124, -145, shape[0]).exp2()[:, None]


DATA = {
    "ties": with_ties,
    "exponents": all_exponents,
    "denormal": lambda shape: normal(*shape) * 2.0**-135,
}


def key_of(format: OperandFormat, seed: int = 0) -> tuple[int, int] | None:
    return stream_key(seed) if format.stochastic else None


def assert_same_bits(actual: ExactOperand, expected: ExactOperand) -> None:
    assert actual.values.shape == expected.values.shape
    assert actual.values.dtype == expected.values.dtype
    bits = {2: torch.int16, 4: torch.int32}[actual.values.element_size()]
    assert torch.equal(
        actual.values.contiguous().view(bits), expected.values.contiguous().view(bits)
    )
    assert (actual.factor is None) == (expected.factor is None)
    assert actual.factor is None or torch.equal(actual.factor, expected.factor)
    assert torch.equal(actual.amax, expected.amax)


@pytest.fixture(autouse=True)
def _there_is_a_compiler() -> None:
    assert compiled.takes(torch.zeros(1)), "these tests would compare the plain one with itself"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_bits_are_those_of_the_plain_one(
    format: OperandFormat, data: str, dtype: torch.dtype
) -> None:
    for shape in SHAPES:
        x = DATA[data](shape).to(dtype)
        key, shuffled = key_of(format), torch.randperm(shape[1]).int()
        for place in (None, PLACE, Place2D(-7, shuffled, 50_000))[: 3 if format.stochastic else 1]:
            expected = quantize_plain(x, format, key=key, place=place)
            assert_same_bits(quantize_operand(x, format, key=key, place=place), expected)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (16, 1)], ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_edges_are_quantised_too(format: OperandFormat, shape: tuple[int, int]) -> None:
    x, key = normal(*shape).bfloat16(), key_of(format)
    assert_same_bits(quantize_operand(x, format, key=key), quantize_plain(x, format, key=key))


@pytest.mark.parametrize("format", FORMATS[::3], ids=str)
def test_strides_and_threads_do_not_matter(format: OperandFormat) -> None:
    x = normal(450, 450).bfloat16()
    assert x[5:, 3:].numel() > compiled.ELEMENTS_PER_THREAD
    key, threads = key_of(format), torch.get_num_threads()
    for view, numbers in ((x, (1, 3)), (x[5:, 3:], (2,)), (x.T, (1,)), (x[:, ::2], (1,))):
        expected = quantize_plain(view.contiguous(), format, key=key)
        for number in numbers:
            torch.set_num_threads(number)
            actual = quantize_operand(view, format, key=key)
            torch.set_num_threads(threads)
            assert_same_bits(actual, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "plain"])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_every_group_is_quantised_by_itself(format: OperandFormat, dtype: torch.dtype) -> None:
    rows, counts = [32, 0, 64, 7, 32], [20, 0, 64, 7, 1]
    x = (normal(sum(rows), 48) * torch.arange(sum(rows))[:, None]).to(dtype)
    keys = [stream_key(e) for e in range(5)] if format.stochastic else None
    groups = quantize_groups(x, format, rows, counts, keys=keys)
    starts = itertools.accumulate([0, *rows[:-1]])
    for e, (start, group) in enumerate(zip(starts, groups, strict=True)):
        own = x[start : start + counts[e]].contiguous()
        expected = quantize_operand(own, format, key=keys and keys[e])
        M = len(expected.values)
        assert torch.equal(group.values[:M], expected.values)
        assert not group.values[M:].any()
        assert group.factor is None or torch.equal(group.factor, expected.factor)
        assert torch.equal(group.amax, expected.amax)


@pytest.mark.parametrize("quantize", [quantize_operand, quantize_plain], ids=["c++", "plain"])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_pieces_of_a_matrix_draw_the_bits_of_the_whole(
    format: OperandFormat, quantize: Callable[..., ExactOperand]
) -> None:
    """Every half holds the largest magnitude; of ranks, tests/ranks/test_quant_shared.py."""
    x = normal(128, 128).bfloat16()
    for row, column in itertools.product((0, 64), repeat=2):
        x[row : row + 16, column : column + 32] = 8 * normal(16, 32, seed=1)
    key = key_of(format)
    whole = quantize(x, format, key=key).values
    for half in (slice(64), slice(64, 128)):
        place = Place2D(half.start or 0, None, 128)
        assert torch.equal(quantize(x[half], format, key=key, place=place).values, whole[half])
        ids = torch.arange(128, dtype=torch.int32)[half]
        part = quantize(x[:, half], format, key=key, place=Place2D(0, ids, 128))
        assert torch.equal(part.values, whole[:, half])


@pytest.mark.parametrize("quantize", [quantize_operand, quantize_plain], ids=["c++", "plain"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_what_is_not_finite_stays_so(
    format: OperandFormat, bad: float, quantize: Callable[..., ExactOperand]
) -> None:
    x = normal(40, 200).bfloat16()
    x[37, 190] = bad
    operand = quantize(x, format, key=key_of(format))
    assert not operand.amax.isfinite()
    factor = 1 if operand.factor is None else operand.factor
    assert not (operand.values * factor).isfinite().all()


@pytest.fixture
def fresh() -> Iterator[None]:
    """A process that has not looked for the library yet."""
    caches = (compiled._library, compiled._cache_folder)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("broken", [False, True], ids=["no-compiler", "broken-compiler"])
def test_without_a_compiler_the_plain_one_serves(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    broken: bool,
) -> None:
    x, format = normal(32, 32).bfloat16(), FORMATS[0]
    expected = quantize_plain(x, format)
    if broken:
        (tmp_path / "g++").write_text("#!/bin/sh\necho cc1plus: no such file >&2\nexit 1\n")
        (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert_same_bits(quantize_operand(x, format), expected)
    (record,) = caplog.records
    assert "quantiser: plain PyTorch" in record.message
    assert ("cc1plus" if broken else "neither g++ nor clang++") in record.message


@pytest.mark.usefixtures("fresh")
def test_it_is_compiled_once_and_nothing_half_made_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    first = compiled._build()
    made = first.stat().st_mtime_ns
    assert first.is_relative_to(tmp_path)
    assert compiled._build() == first
    assert first.stat().st_mtime_ns == made
    assert list(first.parent.iterdir()) == [first]
