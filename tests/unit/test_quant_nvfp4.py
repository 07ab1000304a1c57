"""NVFP4 to nearest: codes, scales and values bit for bit those of the enumerating oracle."""

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from nemomodel.quant import NVFP4Tensor, quantize_nvfp4
from tests.oracles.quant import GRIDS, quantize_nvfp4_oracle

BLOCKS = [(1, 16), (16, 1), (16, 16)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MIDPOINTS = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def code_ties() -> Tensor:
    """Codes on every midpoint and next to it: blocks of scale 2^i, tensor factor 1."""
    values = torch.tensor([6.0, *MIDPOINTS, -6.0, *(-v for v in MIDPOINTS)])
    scales = torch.tensor([448.0, *(2.0**e for e in range(8, -7, -1))])
    ties = values * scales[:, None]
    beside = torch.nextafter(ties, torch.tensor(math.inf))
    below = torch.nextafter(ties, torch.tensor(-math.inf))
    largest = ties.abs().amax(1, keepdim=True)
    return torch.cat([ties, beside.clamp(-largest, largest), below.clamp(-largest, largest)])


def scale_ties() -> Tensor:
    """Largest magnitudes of blocks at every E4M3 value and midpoint times 6, tensor factor 1."""
    grid = GRIDS["E4M3"]
    amax = torch.from_numpy(6 * np.concatenate([grid, (grid[:-1] + grid[1:]) / 2])).float()
    amax = torch.cat([amax, torch.tensor([2688.0])])
    shares = torch.linspace(-1, 1, 16)
    return torch.where(amax[:, None] <= 2688, amax[:, None] * shares, 0.0)


def every_power() -> Tensor:
    """Rows around every power of two of FP32, with their own magnitude as the largest."""
    powers = torch.tensor([2.0**e for e in range(-149, 128)])
    return powers[:, None] * torch.linspace(-1, 1, 16)


def outliers() -> Tensor:
    x = normal(48, 64) * torch.exp(3 * normal(48, 64, seed=1))
    x[:, 5] *= 100
    return x


def gaps() -> Tensor:
    """Zero blocks, blocks whose scale rounds to 0, signed zeros, the smallest scales."""
    x = normal(64, 64)
    x[:16, :16] = 0
    x[16:32, :16] = -0.0
    x[:16, 16:32] *= 1e-7
    x[:16, 32:48] *= 2.0 ** -torch.arange(10.0, 26.0)[:, None]
    x[32:, ::3] = -0.0
    return x


CASES = {
    "normal": normal(32, 64),
    "odd sizes": normal(35, 51),
    "one row": normal(1, 7),
    "one column": normal(7, 1),
    "one value": normal(1, 1),
    "uniform": torch.linspace(-3, 3, 40 * 48).view(40, 48),
    "code ties": code_ties(),
    "scale ties": scale_ties(),
    "every power": every_power(),
    "outliers": outliers(),
    "gaps": gaps(),
    "all zero": torch.zeros(20, 20),
    "negative zeros": torch.full((20, 20), -0.0),
    "denormals": normal(32, 32) * 1e-41,
    "smallest denormal": torch.full((16, 16), 1e-45),
    "amax 1e-37": normal(32, 32) * 1e-37,
    "amax at overflow of 2688 / amax": torch.linspace(-7.9e-36, 7.9e-36, 512).view(16, 32),
    "amax over overflow of 2688 / amax": torch.linspace(-8e-36, 8e-36, 512).view(16, 32),
    "amax 1e36": torch.linspace(-1e36, 1e36, 512).view(16, 32),
    "largest FP32": torch.linspace(-1, 1, 512).view(16, 32) * torch.finfo(torch.float32).max,
    "one FP32 maximum": torch.cat([torch.full((1, 16), 3.4e38), normal(31, 16)]),
}


def unpack(q: NVFP4Tensor) -> Tensor:
    return torch.stack([q.packed & 15, q.packed >> 4], dim=-1).flatten(1)


def assert_bit_equal(x: Tensor, block: tuple[int, int], q: NVFP4Tensor) -> None:
    expected = quantize_nvfp4_oracle(x.float().numpy(), block)
    assert q.packed.dtype == torch.uint8
    assert q.scales.dtype == torch.float8_e4m3fn
    assert q.amax.dtype == torch.float32
    assert q.amax.shape == ()
    np.testing.assert_array_equal(q.amax.numpy(), expected.amax)
    np.testing.assert_array_equal(q.scales.view(torch.uint8).numpy(), expected.scale_codes)
    np.testing.assert_array_equal(q.packed.numpy(), expected.packed())
    values = q.dequantize()
    assert values.shape == x.shape
    np.testing.assert_array_equal(
        values.view(torch.int32).numpy(), expected.dequantize().view(np.int32)
    )
    for dtype, narrow in ((torch.bfloat16, ml_dtypes.bfloat16), (torch.float16, np.float16)):
        with np.errstate(over="ignore"):
            rounded = expected.dequantize().astype(narrow)
        np.testing.assert_array_equal(
            q.dequantize(dtype).view(torch.int16).numpy(), rounded.view(np.int16)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_nvfp4_is_bit_equal_to_the_oracle(case: str, block: tuple[int, int], dtype: torch.dtype):
    x = CASES[case].to(dtype)
    x = torch.where(x.isfinite(), x, 0)  # FP16 overflows
    assert_bit_equal(x, block, quantize_nvfp4(x, block=block))


def test_every_finite_fp16_value_is_bit_equal():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(torch.float16)
    x = values[values.isfinite()].view(-1, 16)
    assert_bit_equal(x, (1, 16), quantize_nvfp4(x))
    mixed = x.flatten()[torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))]
    mixed = mixed.view(-1, 64)[:512]
    assert_bit_equal(mixed, (1, 16), quantize_nvfp4(mixed))


def test_ties_of_the_cases_really_occur():
    """The tie cases are worth nothing if the products do not hit the midpoints."""
    x = code_ties()[:16]
    q = quantize_nvfp4(x)
    magnitudes = GRIDS["E2M1"][(unpack(q) & 7).numpy()]
    tied = magnitudes[:, 1:8]
    assert (tied == [0, 1, 1, 2, 2, 4, 4]).all()
    scales = quantize_nvfp4(scale_ties()).scales.float().numpy()[:, 0]
    on_grid, on_ties = scales[:127], scales[127:-1]
    np.testing.assert_array_equal(on_grid, GRIDS["E4M3"])
    even = np.where(np.arange(126) % 2 == 0, GRIDS["E4M3"][:-1], GRIDS["E4M3"][1:])
    assert (on_ties == even).mean() > 0.9  # fl(1/6) moves a few off their midpoint


def test_signed_zeros_and_small_negatives_have_their_codes():
    x = torch.tensor([[6.0, -0.0, 0.0, -1e-3, 1e-3, -0.25, -0.26, -6.0] + [0.0] * 8])
    codes = unpack(quantize_nvfp4(x))[0, :8].tolist()
    assert codes == [7, 0, 0, 8, 0, 8, 9, 15]


def test_the_even_column_is_in_the_low_four_bits():
    x = torch.tensor([[0.5, 6.0, -6.0, 1.0] + [0.0] * 12])
    assert quantize_nvfp4(x).packed[0, :2].tolist() == [0x71, 0x2F]


def test_a_block_whose_scale_rounds_to_zero_saturates_and_decodes_to_zero():
    x = torch.cat([torch.full((1, 16), 6.0), torch.full((1, 16), -1e-7)])
    q = quantize_nvfp4(x)
    assert q.scales.float().flatten().tolist() == [448.0, 0.0]
    assert (unpack(q)[1] == 15).all()
    assert not q.dequantize()[1].any()


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_values_are_within_rounding_of_the_exact_product(block: tuple[int, int]):
    """Two FP32 roundings after the exact code * scale; the factor keeps huge values finite."""
    for case in ("normal", "outliers", "amax 1e36", "largest FP32"):
        q = quantize_nvfp4(CASES[case], block=block)
        oracle = quantize_nvfp4_oracle(CASES[case].numpy(), block)
        exact = oracle.coded() * np.float64(oracle.amax) / 2688
        error = np.abs(q.dequantize().double().numpy() - exact)
        assert (error <= 3 * 2.0**-24 * np.abs(exact)).all()


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("shape", [(0, 16), (3, 0), (0, 0), (0,), (2, 0, 5)], ids=str)
def test_an_empty_tensor_has_no_codes(shape: tuple[int, ...], block: tuple[int, int]):
    q = quantize_nvfp4(torch.empty(shape), block=block)
    assert q.amax == 0
    assert q.packed.numel() == q.scales.numel() == 0
    assert q.dequantize(torch.bfloat16).shape == shape


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_leading_dimensions_are_rows(block: tuple[int, int]):
    x = normal(3, 5, 7, 18)
    q, flat = quantize_nvfp4(x, block=block), quantize_nvfp4(x.view(105, 18), block=block)
    assert torch.equal(q.packed, flat.packed)
    assert torch.equal(q.scales.view(torch.uint8), flat.scales.view(torch.uint8))
    assert torch.equal(q.dequantize(), flat.dequantize().view(3, 5, 7, 18))
    vector = quantize_nvfp4(x[0, 0, 0], block=block)
    assert torch.equal(
        vector.dequantize(), quantize_nvfp4(x[0, 0, :1], block=block).dequantize()[0]
    )


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_strided_input_gives_the_codes_of_its_copy(block: tuple[int, int]):
    x = normal(70, 90)
    for view in (x.T, x[3:50:2, 1:60:3], x[:, 0:1].expand(-1, 20)):
        assert torch.equal(
            quantize_nvfp4(view, block=block).packed,
            quantize_nvfp4(view.contiguous(), block=block).packed,
        )


def test_square_blocks_commute_with_the_transpose():
    for seed, shape in enumerate([(64, 48), (33, 70), (16, 16)]):
        w = normal(*shape, seed=seed)
        q, q_t = quantize_nvfp4(w, block=(16, 16)), quantize_nvfp4(w.T, block=(16, 16))
        assert torch.equal(unpack(q).T, unpack(q_t))
        assert torch.equal(q.scales.float().T, q_t.scales.float())
        assert torch.equal(q.dequantize().T, q_t.dequantize())


def test_column_blocks_are_row_blocks_of_the_transpose():
    x = normal(48, 34)
    q, q_t = quantize_nvfp4(x, block=(16, 1)), quantize_nvfp4(x.T, block=(1, 16))
    assert torch.equal(unpack(q).T, unpack(q_t))
    assert torch.equal(q.scales.float().T, q_t.scales.float())


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_powers_of_two_and_signs_pass_through(block: tuple[int, int]):
    x = normal(48, 64)
    values = quantize_nvfp4(x, block=block).dequantize()
    assert torch.equal(quantize_nvfp4(8 * x, block=block).dequantize(), 8 * values)
    assert torch.equal(quantize_nvfp4(-x, block=block).dequantize(), -values)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_the_amax_of_a_group_replaces_that_of_the_tensor(block: tuple[int, int]):
    whole = normal(64, 64) * torch.linspace(0.1, 1, 64)[:, None]
    part = whole[:32]
    amax = whole.abs().amax()
    assert amax > part.abs().amax()
    q = quantize_nvfp4(part, block=block, amax=amax)
    expected = quantize_nvfp4_oracle(part.numpy(), block, amax.numpy())
    np.testing.assert_array_equal(q.packed.numpy(), expected.packed())
    np.testing.assert_array_equal(q.scales.view(torch.uint8).numpy(), expected.scale_codes)
    assert torch.equal(q.dequantize(), quantize_nvfp4(whole, block=block).dequantize()[:32])


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_errors(bad: float, dtype: torch.dtype):
    x = normal(17, 33).to(dtype)
    x[16, 32] = bad
    with pytest.raises(ValueError, match="infinities or NaN"):
        quantize_nvfp4(x)


def test_other_faults_of_the_input_are_errors():
    with pytest.raises(ValueError, match="float64"):
        quantize_nvfp4(normal(4, 16).double())
    with pytest.raises(ValueError, match="shape"):
        quantize_nvfp4(torch.tensor(1.0))
    with pytest.raises(ValueError, match="block="):
        quantize_nvfp4(normal(4, 16), block=(2, 16))
    with pytest.raises(ValueError, match=r"block=16: use one of \(1, 16\)"):
        quantize_nvfp4(normal(4, 16), block=16)
    with pytest.raises(ValueError, match="x is a list"):
        quantize_nvfp4([[1.0, 2.0]])
    with pytest.raises(ValueError, match="rounding="):
        quantize_nvfp4(normal(4, 16), rounding="up")


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_code_times_scale_is_exact_in_bf16(block: tuple[int, int]):
    q = quantize_nvfp4(outliers(), block=block)
    values, scales = q.exact()
    product = values * scales
    assert torch.equal(product.bfloat16().float(), product)
    oracle = quantize_nvfp4_oracle(outliers().numpy(), block)
    np.testing.assert_array_equal(product.double().numpy(), oracle.coded())


def test_every_code_times_every_scale_is_exact_in_bf16():
    product = np.multiply.outer(GRIDS["E2M1"], GRIDS["E4M3"])
    np.testing.assert_array_equal(product.astype(ml_dtypes.bfloat16).astype(np.float64), product)


def test_negative_product_that_underflows_has_code_0():
    """Transformer Engine takes the sign from the scaled value, which is -0.0 here."""
    x = torch.tensor([[1e30, -1e-38] + [0.0] * 14])
    assert quantize_nvfp4(x).packed[0, 0] == 0x07


@pytest.mark.parametrize("amax", [float("nan"), float("inf"), -1.0, [1.0, 2.0]])
def test_an_amax_that_is_no_magnitude_is_refused(amax: object) -> None:
    with pytest.raises(ValueError, match="use one finite number of at least 0"):
        quantize_nvfp4(torch.ones(2, 16), amax=torch.tensor(amax))


def test_an_amax_of_any_dtype_is_taken() -> None:
    x = torch.randn(4, 32).bfloat16()
    expected = quantize_nvfp4(x)
    found = quantize_nvfp4(x, amax=x.abs().amax())
    assert torch.equal(found.packed, expected.packed)
    assert found.amax.dtype == torch.float32
