"""The compiled quantiser has the bits of the plain one, which serves where there is no compiler."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nemomodel.quant import compiled
from nemomodel.quant.formats import E2M1
from nemomodel.quant.operand import (
    ExactOperand,
    OperandFormat,
    Place2D,
    quantize_groups,
    quantize_operand,
    quantize_plain,
)
from nemomodel.quant.rounding import random_bits, round_nearest, round_stochastic, stream_key

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


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same passes, not compiled: seconds instead of minutes."""
    monkeypatch.setattr(compiled, "WORTH_A_CALL", 1)
    monkeypatch.setattr(compiled, "has_compiler", lambda: True)
    monkeypatch.setattr(compiled, "_run", lambda function, *args: function(*args))


def compare(format: OperandFormat, dtype: torch.dtype) -> None:
    for data, shape in itertools.product(DATA.values(), SHAPES):
        x = data(shape).to(dtype)
        key, shuffled = key_of(format), torch.randperm(shape[1]).int()
        for place in (None, PLACE, Place2D(-7, shuffled, 50_000))[: 3 if format.stochastic else 1]:
            expected = quantize_plain(x, format, key=key, place=place)
            assert_same_bits(quantize_operand(x, format, key=key, place=place), expected)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_passes_have_the_bits_of_the_plain_one(format: OperandFormat, dtype: torch.dtype) -> None:
    compare(format, dtype)


def _compile_small_matrices() -> None:
    """In a process of its own, for one that has compiled cannot fork others; small matrices too,
    or the plain one would be compared with itself."""
    compiled.WORTH_A_CALL = 1
    assert compiled.takes(torch.zeros(1, dtype=torch.bfloat16))


def _compare_compiled() -> None:
    _compile_small_matrices()
    for format in FORMATS:
        compare(format, torch.bfloat16)
    # A compiler that treats denormals as zero would do so in eager code of this process too.
    assert (torch.tensor([1e-40]) * 0.5 > 0).all()


@pytest.mark.slow  # compiling takes most of a minute
def test_compiled_passes_have_the_bits_of_the_plain_one(run_ranks: Callable) -> None:
    run_ranks(1, _compare_compiled)


def _count_graphs() -> None:
    _compile_small_matrices()
    format = OperandFormat("nvfp4", "columns")
    torch._dynamo.reset()
    compiled._graph.cache_clear()
    torch._dynamo.utils.counters.clear()
    for rows, columns in ((80, 144), (96, 160), (500, 48), (33, 64), (7, 1040)):
        whole = normal(2 * rows, columns).bfloat16()
        for x in (whole[rows:], whole[:rows].clone(), whole.view(2, rows, columns)[1]):
            quantize_operand(x, format)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 5
    # Peaks, scales and values; those that see x twice, for the start of a storage and the rest.


@pytest.mark.slow
def test_sizes_share_a_graph(run_ranks: Callable) -> None:
    """Not one for every shape: at most one for sizes in general, and one each for 1 and 16."""
    run_ranks(1, _count_graphs)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("format", FORMATS[::3], ids=str)
def test_strides_do_not_matter(format: OperandFormat) -> None:
    x, key = normal(48, 64).bfloat16(), key_of(format)
    for view in (x.T, x[5:, 3:], x[:, ::2], x[:, 16:48]):
        expected = quantize_plain(view.contiguous(), format, key=key)
        assert_same_bits(quantize_operand(view, format, key=key), expected)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (16, 1)], ids=str)
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_edges_are_quantised_too(format: OperandFormat, shape: tuple[int, int]) -> None:
    operand = quantize_operand(normal(*shape).bfloat16(), format, key=key_of(format))
    assert operand.values.shape == (format.rows_of(shape[0]), shape[1])
    assert operand.amax.isfinite()


@pytest.fixture(params=["passes", "plain"])
def either(request: pytest.FixtureRequest) -> None:
    if request.param == "passes":
        request.getfixturevalue("interpreted")


@pytest.mark.usefixtures("either")
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_every_group_is_quantised_by_itself(format: OperandFormat) -> None:
    rows, counts = [32, 0, 64, 7, 32], [20, 0, 64, 7, 1]
    x = (normal(sum(rows), 48) * torch.arange(sum(rows))[:, None]).bfloat16()
    keys = [stream_key(e) for e in range(5)] if format.stochastic else None
    groups = quantize_groups(x, format, rows, counts, keys=keys)
    starts = itertools.accumulate([0, *rows[:-1]])
    for e, (start, group) in enumerate(zip(starts, groups, strict=True)):
        own = x[start : start + counts[e]].contiguous()
        expected = quantize_plain(own, format, key=keys and keys[e])
        M = len(expected.values)
        assert torch.equal(group.values[:M], expected.values)
        assert not group.values[M:].any()
        assert group.factor is None or torch.equal(group.factor, expected.factor)
        assert torch.equal(group.amax, expected.amax)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("quantize", [quantize_operand, quantize_plain], ids=["passes", "plain"])
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


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("quantize", [quantize_operand, quantize_plain], ids=["passes", "plain"])
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


def test_elements_of_e2m1_are_rounded_as_any_other() -> None:
    """Around every number where a comparison decides, and with the bits that decide last."""
    edges = torch.tensor([0.0, 0.25, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7])
    near = edges.view(torch.int32)[:, None] + torch.arange(-64, 65, dtype=torch.int32)
    v = torch.cat([near.clamp(min=0).view(torch.float32).flatten(), normal(10_000) * 3])
    v = torch.cat([v, -v])
    assert torch.equal(compiled._nearest_e2m1(v), round_nearest(v, E2M1))
    drawn = random_bits(tuple(v.shape), stream_key(0), v.device)
    for bits in (drawn, drawn & 1023, drawn | -1024, drawn << 10, drawn << 30):
        assert torch.equal(compiled._stochastic_e2m1(v, bits), round_stochastic(v, E2M1, bits))


@pytest.mark.slow  # imports the compiler in a process of its own
def test_without_a_compiler_the_plain_one_serves(tmp_path: Path) -> None:
    code = """
import logging, torch
from nemomodel.quant.operand import OperandFormat, quantize_operand, quantize_plain
logging.basicConfig()
x, format = torch.randn(512, 512).bfloat16(), OperandFormat("nvfp4", "columns")
for _ in range(2):
    assert torch.equal(quantize_operand(x, format).values, quantize_plain(x, format).values)
"""
    environment = os.environ | {"PATH": "", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stderr.splitlines() if "nemomodel" in line]
    assert "torch.compile does not work here" in line
    assert "compiler" in line
