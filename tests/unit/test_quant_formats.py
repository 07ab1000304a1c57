"""Element formats: the oracle against ml_dtypes, the rounding against both."""

import ml_dtypes
import numpy as np
import pytest
import torch

from nemomodel.quant import formats
from nemomodel.quant.formats import Element
from nemomodel.quant.rounding import power_of_two, round_nearest
from tests.oracles.quant import GRIDS, nearest_value

ML_DTYPES = {
    "E2M1": ml_dtypes.float4_e2m1fn,
    "E2M3": ml_dtypes.float6_e2m3fn,
    "E3M2": ml_dtypes.float6_e3m2fn,
    "E4M3": ml_dtypes.float8_e4m3fn,
    "E5M2": ml_dtypes.float8_e5m2,
}
BDR_ELEMENTS = {7: formats.MX9.element, 4: formats.MX6.element, 2: formats.MX4.element}


def hard_values(grid: np.ndarray) -> np.ndarray:
    """FP32: every grid value and midpoint with both neighbours, random ones, both ends of FP32."""
    midpoints = (grid[:-1] + grid[1:]) / 2
    exact = np.concatenate([grid, midpoints]).astype(np.float32)
    rng = np.random.default_rng(0)
    random = rng.standard_normal(20_000) * 2.0 ** rng.integers(-30, 18, 20_000)
    ends = np.float32([1e-45, 1.1754942e-38, 1.17549435e-38, 1e30, np.finfo(np.float32).max])
    magnitudes = np.concatenate(
        [
            exact,
            np.nextafter(exact, np.float32(np.inf)),
            np.nextafter(exact, np.float32(0)),
            random.astype(np.float32),
            ends,
        ]
    )
    return np.concatenate([magnitudes, -magnitudes])


@pytest.mark.parametrize("name", ML_DTYPES)
def test_the_enumerated_values_are_those_of_ml_dtypes(name: str):
    grid = GRIDS[name]
    codes = np.arange(len(grid), dtype=np.uint8)
    np.testing.assert_array_equal(codes.view(ML_DTYPES[name]).astype(np.float64), grid)


@pytest.mark.parametrize("name", ML_DTYPES)
def test_the_search_rounds_as_ml_dtypes_casts(name: str):
    values = hard_values(GRIDS[name])
    # Beyond the largest value the casts differ: some saturate, some do not.
    values = values[np.abs(values) <= GRIDS[name][-1]]
    expected = values.astype(ML_DTYPES[name]).astype(np.float64)
    np.testing.assert_array_equal(nearest_value(values.astype(np.float64), GRIDS[name]), expected)


@pytest.mark.parametrize("name", GRIDS)
def test_rounding_to_an_element_is_the_search(name: str):
    values = hard_values(GRIDS[name])
    element = getattr(formats, name)
    assert element.name == name
    actual = round_nearest(torch.from_numpy(values), element)
    expected = nearest_value(values.astype(np.float64), GRIDS[name])
    np.testing.assert_array_equal(actual.double().numpy(), expected)


@pytest.mark.parametrize(("bits", "element"), BDR_ELEMENTS.items(), ids=["MX9", "MX6", "MX4"])
def test_rounding_to_a_fixed_step_is_the_search(bits: int, element: Element):
    grid = np.arange(2**bits) / 2 ** (bits - 1)
    values = hard_values(grid)
    actual = round_nearest(torch.from_numpy(values), element)
    np.testing.assert_array_equal(
        actual.double().numpy(), nearest_value(values.astype(np.float64), grid)
    )


def test_a_rounded_zero_is_positive():
    tiny = torch.tensor([-0.0, 0.0, -1e-45, -1e-30, -0.25])
    assert not round_nearest(tiny, formats.E2M1).signbit().any()


def test_power_of_two_is_exact_next_to_every_power():
    powers = torch.tensor([2.0**e for e in range(-126, 128)])
    below = torch.nextafter(powers, torch.zeros(()))
    assert torch.equal(power_of_two(powers), powers)
    assert torch.equal(power_of_two(-powers), powers)
    assert torch.equal(power_of_two(below[1:]), powers[:-1])
    denormal_or_zero = torch.tensor([0.0, -0.0, 1e-45, 1.1754942e-38])
    assert not power_of_two(denormal_or_zero).any()


@pytest.mark.parametrize("name", GRIDS)
def test_max_exponent_is_that_of_the_largest_value(name: str):
    element = getattr(formats, name)
    assert element.max == GRIDS[name][-1]
    assert 2.0**element.max_exponent <= element.max < 2.0 ** (element.max_exponent + 1)
