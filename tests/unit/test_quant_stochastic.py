"""Stochastic rounding: the two neighbours, the right odds, and random bits worth the name."""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from nemomodel.quant import formats, quantize_bdr, quantize_mx, quantize_nvfp4
from nemomodel.quant.formats import Element
from nemomodel.quant.rounding import random_bits, round_stochastic, stream_key
from tests.oracles.quant import GRIDS, fixed_grid, neighbours, quantize_nvfp4_oracle

BLOCKS = [(1, 16), (16, 1), (16, 16)]
CPU = torch.device("cpu")
GRID_OF_ELEMENT = [
    *((getattr(formats, name), grid) for name, grid in GRIDS.items()),
    *((fmt.element, fixed_grid(fmt.mantissa_bits)) for fmt in (formats.MX9, formats.MX6)),
]
ELEMENT_IDS = [*GRIDS, "MX9", "MX6"]
SIGMAS = 5
"""Distance from the expectation that passes: one test in 1.7 million fails by chance, once."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def bits_like(v: Tensor, *key: int | str) -> Tensor:
    return random_bits(tuple(v.shape), stream_key(*key), CPU)


def codes_of(x: Tensor, seed: int = 0, block: tuple[int, int] = (1, 16), **options) -> Tensor:
    q = quantize_nvfp4(x, block, "stochastic", seed=seed, **options)
    return torch.stack([q.packed & 15, q.packed >> 4], dim=-1).flatten(1)


def signed_values(codes: np.ndarray) -> np.ndarray:
    magnitude = GRIDS["E2M1"][codes & 7]
    return np.where(codes & 8, -magnitude, magnitude)


@pytest.mark.parametrize(("element", "grid"), GRID_OF_ELEMENT, ids=ELEMENT_IDS)
def test_only_the_two_neighbours_occur(element: Element, grid: np.ndarray):
    rng = np.random.default_rng(0)
    v = rng.standard_normal(4_000) * 2.0 ** rng.integers(-12, 12, 4_000)
    v = torch.from_numpy(v.astype(np.float32)).clamp(-2 * element.max, 2 * element.max)
    lower, upper = neighbours(v.double().numpy(), grid)
    seen_lower, seen_upper = np.zeros(4_000, bool), np.zeros(4_000, bool)
    for draw in range(16):
        result = round_stochastic(v, element, bits_like(v, draw)).double().numpy()
        seen_lower |= result == lower
        seen_upper |= result == upper
        assert ((result == lower) | (result == upper)).all()
    # Where the odds are near even, 16 draws show both but for one value in 30,000.
    with np.errstate(divide="ignore", invalid="ignore"):
        odds = (v.double().numpy() - lower) / (upper - lower)
    even = np.abs(odds - 0.5) < 0.02
    assert even.any()
    assert (seen_lower & seen_upper)[even].all()


@pytest.mark.parametrize(("element", "grid"), GRID_OF_ELEMENT, ids=ELEMENT_IDS)
@pytest.mark.parametrize("bits", [0, -1, 2**31 - 1, -(2**31), 0x55555555])
def test_values_of_the_format_stay_and_larger_ones_saturate(
    element: Element, grid: np.ndarray, bits: int
):
    v = torch.from_numpy(np.concatenate([grid, -grid])).float()
    drawn = torch.full(v.shape, bits, dtype=torch.int32)
    assert torch.equal(round_stochastic(v, element, drawn), v)
    ends = torch.tensor([1.01, 1.5, 1e3, 1e38 / element.max]) * element.max
    drawn = torch.full(ends.shape, bits, dtype=torch.int32)
    assert (round_stochastic(ends, element, drawn) == element.max).all()
    assert (round_stochastic(-ends, element, drawn) == -element.max).all()


@pytest.mark.parametrize(
    ("element", "v"),
    [
        (formats.E2M1, 5.999),
        (formats.E2M1, -2.7),
        (formats.E2M1, 1.1),
        (formats.E4M3, 300.3),
        (formats.E4M3, 0.017),
        (formats.INT8, 1.01),
    ],
    ids=lambda p: getattr(p, "name", str(p)),
)
def test_the_mean_over_every_pattern_of_bits_is_the_value(element: Element, v: float):
    """Every pattern of the bits that decide, once: no bias at all, not 0 to 1/256 of a step."""
    dropped = 23 - element.mantissa_bits
    patterns = torch.arange(2**dropped, dtype=torch.int32) << (32 - dropped)
    exact = torch.tensor(v)
    results = round_stochastic(exact.expand(len(patterns)), element, patterns)
    assert results.double().mean() == exact.double()


def test_below_the_smallest_exponent_the_bias_is_under_one_pattern():
    patterns = torch.arange(2**22, dtype=torch.int32) << 10
    for v in (1e-3, 0.1, -0.3, 0.7):
        results = round_stochastic(torch.tensor(v).expand(2**22), formats.E2M1, patterns)
        assert abs(float(results.double().mean()) - v) <= 0.5 * 2.0**-22


def between_values(v: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Where v is so far from both neighbours that 400 draws are about normal."""
    lower, upper = neighbours(v, grid)
    nearer = np.minimum(np.abs(v - lower), np.abs(upper - v))
    return (np.abs(v) < grid[-1]) & (nearer > 0.02 * np.abs(upper - lower))


def mean_error_in_sigmas(results: np.ndarray, v: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """(mean over dim 0 - v) over its standard deviation; v within the format, not on its grid."""
    lower, upper = neighbours(v, grid)
    odds = (v - lower) / (upper - lower)
    sigma = np.abs(upper - lower) * np.sqrt(odds * (1 - odds) / len(results))
    return np.abs(results.mean(0) - v) / sigma


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_the_mean_of_many_nvfp4_draws_is_the_value(block: tuple[int, int]):
    x = normal(16, 64)
    oracle = quantize_nvfp4_oracle(x.numpy(), block)
    draws = np.stack([signed_values(codes_of(x, seed, block).numpy()) for seed in range(400)])
    scaled = oracle.scaled.astype(np.float64)
    between = between_values(scaled, GRIDS["E2M1"])
    assert between.mean() > 0.8
    errors = mean_error_in_sigmas(draws[:, between], scaled[between], GRIDS["E2M1"])
    assert errors.max() < SIGMAS
    assert 0.9 < np.sqrt((errors**2).mean()) < 1.1, "the spread is that of independent draws"
    saturated = np.abs(scaled) >= 6
    assert saturated.any()
    assert (draws[:, saturated] == 6 * np.sign(scaled[saturated])).all()


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_nvfp4_draws_are_neighbours_and_scales_are_not_drawn(block: tuple[int, int]):
    x = normal(37, 50)
    oracle = quantize_nvfp4_oracle(x.numpy(), block)
    lower, upper = neighbours(oracle.scaled.astype(np.float64), GRIDS["E2M1"])
    rows, columns = lower.shape
    for seed in range(8):
        q = quantize_nvfp4(x, block, "stochastic", seed=seed)
        drawn = codes_of(x, seed, block).numpy()
        values = signed_values(drawn)[:rows, :columns]
        assert ((values == lower) | (values == upper)).all()
        np.testing.assert_array_equal(drawn[:rows, :columns] & 8, oracle.codes & 8)
        np.testing.assert_array_equal(q.scales.view(torch.uint8).numpy(), oracle.scale_codes)


def test_zeros_stay_zero():
    x = normal(16, 32)
    x[:, ::2] = torch.tensor([0.0, -0.0]).repeat(8)
    assert not codes_of(x)[:, ::2].any()
    assert not codes_of(torch.zeros(4, 16)).any()


@pytest.mark.parametrize(
    ("quantize", "fmt", "grid"),
    [
        (quantize_mx, formats.MXFP4, GRIDS["E2M1"]),
        (quantize_mx, formats.MXFP8_E5M2, GRIDS["E5M2"]),
        (quantize_mx, formats.MXINT8, GRIDS["INT8"]),
        (quantize_bdr, formats.MX9, fixed_grid(7)),
        (quantize_bdr, formats.MX4, fixed_grid(2)),
    ],
    ids=["MXFP4", "MXFP8_E5M2", "MXINT8", "MX9", "MX4"],
)
def test_the_mean_of_draws_of_the_other_formats_is_the_value(quantize: Callable, fmt, grid):
    x = normal(2, 64)
    powers = torch.exp2(quantize(x, fmt).exponents.float())
    v = (x.view(2, 1, -1, fmt.block_size) / powers).double().numpy()
    draws = [quantize(x, fmt, rounding="stochastic", seed=seed) for seed in range(400)]
    results = np.stack([q.elements.double().numpy() for q in draws])
    lower, upper = neighbours(v, grid)
    assert ((results == lower) | (results == upper)).all()
    between = between_values(v, grid)
    assert mean_error_in_sigmas(results[:, between], v[between], grid).max() < SIGMAS


def test_errors_of_a_sum_grow_as_those_of_independent_draws():
    """What a product of matrices needs: errors along rows and along columns do not add up."""
    v = (normal(512, 512).abs() % 1) + 2  # step 1
    error = (round_stochastic(v, formats.E2M1, bits_like(v, "sum")) - v).double()
    odds = (v - 2).double()
    variance = odds * (1 - odds)
    for dim in (0, 1):
        normalised = error.sum(dim) / variance.sum(dim).sqrt()
        # The mean square of 512 standard normals is 1 with a deviation of sqrt(2 / 512).
        assert abs(float(normalised.square().mean()) - 1) < SIGMAS * math.sqrt(2 / 512)
        assert abs(float(normalised.mean())) < SIGMAS / math.sqrt(512)


def test_a_seed_repeats_its_codes_and_another_one_does_not():
    x = normal(64, 64)
    assert torch.equal(codes_of(x, seed=3), codes_of(x, seed=3))
    assert not torch.equal(codes_of(x, seed=3), codes_of(x, seed=4))
    torch.manual_seed(99)
    assert torch.equal(codes_of(x, seed=3), codes_of(x, seed=3)), "torch's generator plays no part"


def test_codes_do_not_depend_on_the_shape():
    x = normal(32, 64)
    assert torch.equal(codes_of(x).flatten(), codes_of(x.view(64, 32)).flatten())
    assert torch.equal(codes_of(x).flatten(), codes_of(x.view(2, 4, 256)).flatten())
    assert torch.equal(codes_of(x)[:8], codes_of(x[:8], amax=x.abs().amax()))
    bits = random_bits((4096,), stream_key(0), CPU)
    assert torch.equal(bits, random_bits((16, 4, 64), stream_key(0), CPU).flatten())
    assert torch.equal(bits[:100], random_bits((100,), stream_key(0), CPU))


def test_codes_do_not_depend_on_the_number_of_threads():
    x = normal(512, 512)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(codes_of(x, seed=7))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in pairwise(results))


def test_rounding_errors_of_two_seeds_are_uncorrelated():
    x = normal(256, 256)
    exact = quantize_nvfp4_oracle(x[:16].numpy(), (1, 16), x.abs().amax().numpy()).scaled
    errors = []
    for seed in range(6):
        values = signed_values(codes_of(x, seed)[:16].numpy())
        errors.append(np.where(np.abs(exact) < 6, values - exact, 0).flatten())
    correlation = np.corrcoef(errors)
    off_diagonal = correlation[~np.eye(6, dtype=bool)]
    assert np.abs(off_diagonal).max() < SIGMAS / math.sqrt(exact.size)


def assert_uniform(indices: np.ndarray, bins: int, what: str) -> None:
    """Chi-square of counts, from both sides: bits that are too even are not random either."""
    counts = np.bincount(indices.flatten(), minlength=bins)
    assert len(counts) == bins
    expected = indices.size / bins
    freedom = bins - 1
    distance = ((counts - expected) ** 2 / expected).sum() - freedom
    assert abs(distance) < SIGMAS * math.sqrt(2 * freedom), f"{what}: chi-square off by {distance}"


def unsigned(bits: Tensor) -> np.ndarray:
    return bits.numpy().view(np.uint32).astype(np.int64)


@pytest.mark.parametrize("key", [(0,), (1,), ("layer", 3)], ids=str)
def test_random_bits_pass_chi_square(key: tuple):
    bits = unsigned(random_bits((2**18,), stream_key(*key), CPU))
    for shift in (24, 16, 10):  # 22 bits decide at most: the lowest ten are not looked at
        assert_uniform((bits >> shift) & 255, 256, f"byte at bit {shift}")
    for lag in (1, 2, 3, 16, 17, 64, 256, 1024, 4096, 2**15, 2**16):
        pairs = (bits[:-lag] >> 28) * 16 + (bits[lag:] >> 28)
        assert_uniform(pairs, 256, f"top bits {lag} apart")
    triples = (bits[:-2] >> 29) * 64 + (bits[1:-1] >> 29) * 8 + (bits[2:] >> 29)
    assert_uniform(triples, 512, "three in a row")


def test_random_bits_of_many_seeds_pass_chi_square():
    """The same elements under 4,096 seeds in a row: seeds are steps, layers and operands."""
    bits = np.stack([unsigned(random_bits((64,), stream_key(s), CPU)) for s in range(4096)])
    for shift in (24, 16, 10):
        assert_uniform((bits >> shift) & 255, 256, f"byte at bit {shift}")
    for element in (0, 1, 63):
        assert_uniform(bits[:, element] >> 27, 32, f"element {element}")
    assert_uniform((bits[:-1] >> 28) * 16 + (bits[1:] >> 28), 256, "seeds one apart")


def test_every_bit_of_the_counter_changes_half_of_the_upper_bits():
    """Elements whose numbers differ in one bit; a bit that changed nothing would repeat rows."""
    key = stream_key("avalanche")
    bits = unsigned(random_bits((2**18,), key, CPU))
    index = np.arange(2**18)
    for flipped in range(18):
        changed = bits ^ bits[index ^ (1 << flipped)]
        for upper in range(24, 32):
            share = ((changed >> upper) & 1).mean()
            # Every pair is counted twice: half as many draws as elements.
            assert abs(share - 0.5) < SIGMAS * 0.5 / math.sqrt(2**17), (flipped, upper, share)


def test_keys_are_distinct_and_name_what_they_are_made_of():
    parts = [(0,), (1,), ("1",), (1, 2), (12,), (2, 1), ("a", 1), ("a1",), (-1,), ((1, 2),)]
    keys = [stream_key(*p) for p in parts]
    assert len(set(keys)) == len(keys)
    assert stream_key("layer", 3) == stream_key("layer", 3)
    assert all(-(2**31) <= half < 2**31 for key in keys for half in key)
