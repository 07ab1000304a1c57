"""The random Hadamard transform: its definition, its inverse, what it leaves alone."""

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

from nemomodel.quant import quantize_nvfp4
from nemomodel.quant.hadamard import hadamard_matrix, transform_rows
from tests.close import rms_ratio
from tests.oracles.quant import hadamard_oracle

SIGNS = [1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1]
"""Of Transformer Engine, whose tensors ours must equal."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def transform_oracle(x_TC: Tensor, matrix: np.ndarray) -> np.ndarray:
    """x R in float64 for every group of rows, with the tokens as the last dimension of x^T."""
    size = len(matrix)
    x_CT = np.pad(x_TC.double().numpy(), ((0, -len(x_TC) % size), (0, 0))).T
    groups = x_CT.reshape(x_CT.shape[0], -1, size)
    return (groups @ matrix).reshape(x_CT.shape).T


def test_the_matrix_is_its_definition():
    matrix = hadamard_matrix()
    assert matrix.dtype == torch.float32
    np.testing.assert_array_equal(matrix.double().numpy(), hadamard_oracle(SIGNS))
    assert torch.equal(matrix.bfloat16().float(), matrix)


@pytest.mark.parametrize("size", [2, 4, 8, 16, 32, 64, 128])
def test_every_matrix_is_orthogonal_and_has_sylvesters_columns(size: int):
    for seed in (0, 1, 2):
        matrix = hadamard_matrix(size, seed).double()
        identity = torch.eye(size, dtype=torch.float64)
        assert rms_ratio(matrix @ matrix.T, identity) < 1e-6
        signs = matrix[:, 0].sign().int().tolist()
        expected = hadamard_oracle(signs).astype(np.float32)
        np.testing.assert_allclose(matrix.numpy(), expected, rtol=2.0**-23, atol=0)


def test_seeds_give_their_own_signs_again_and_again():
    matrices = [hadamard_matrix(16, seed) for seed in range(8)]
    signs = {tuple(m[:, 0].sign().tolist()) for m in matrices}
    assert len(signs) > 6
    hadamard_matrix.cache_clear()
    torch.manual_seed(5)
    assert all(torch.equal(hadamard_matrix(16, seed), m) for seed, m in enumerate(matrices))
    assert hadamard_matrix(16, 0).abs().eq(0.25).all()


@pytest.mark.parametrize(("size", "seed"), [(12, 0), (0, 0), (1, 0), (-16, 0), (32, None)])
def test_other_sizes_are_errors(size: int, seed: int | None):
    with pytest.raises(ValueError, match=f"size={size}"):
        hadamard_matrix(size, seed)


@pytest.mark.parametrize("shape", [(64, 24), (16, 1), (50, 7), (1, 5), (0, 4)], ids=str)
def test_rows_are_mixed_as_the_definition_says(shape: tuple[int, int]):
    x_TC = normal(*shape)
    expected = transform_oracle(x_TC, hadamard_oracle(SIGNS))
    actual = transform_rows(x_TC.double(), hadamard_matrix())
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("size", [4, 16, 32])
def test_the_exact_product_over_tokens_is_unchanged(size: int):
    matrix = hadamard_matrix(size, seed=1).double()
    for tokens in (64, 50):
        dy_TO, x_TI = normal(tokens, 12).double(), normal(tokens, 20, seed=1).double()
        mixed = transform_rows(dy_TO, matrix).T @ transform_rows(x_TI, matrix)
        # 1 / sqrt(32) is rounded to FP32 in the matrix, so its square is not quite 1 / 32.
        limit = 1e-14 if size in (4, 16) else 1e-7
        assert rms_ratio(mixed, dy_TO.T @ x_TI) < limit


@pytest.mark.parametrize(
    ("dtype", "narrow"),
    [(torch.bfloat16, ml_dtypes.bfloat16), (torch.float16, np.float16)],
    ids=["bf16", "fp16"],
)
def test_results_are_rounded_once(dtype: torch.dtype, narrow: type):
    """FP32 sums of 16 terms, then the narrow type: the bits of float64 rounded at the end."""
    x_TC = normal(512, 96).to(dtype)
    expected = transform_oracle(x_TC, hadamard_oracle(SIGNS)).astype(narrow)
    actual = transform_rows(x_TC, hadamard_matrix())
    assert actual.dtype == dtype
    np.testing.assert_array_equal(actual.view(torch.int16).numpy(), expected.view(np.int16))


def test_strided_input_gives_the_result_of_its_copy():
    x_CT = normal(24, 64).bfloat16()
    assert torch.equal(
        transform_rows(x_CT.T, hadamard_matrix()),
        transform_rows(x_CT.T.contiguous(), hadamard_matrix()),
    )


def test_an_outlier_is_spread_and_its_neighbours_survive():
    """What the transform is for: without it, values beside an outlier round to zero."""
    x_TC = normal(256, 64)
    x_TC[::16] *= 100
    plain = quantize_nvfp4(x_TC, (16, 1)).dequantize()
    mixed = quantize_nvfp4(transform_rows(x_TC, hadamard_matrix()), (16, 1)).dequantize()
    assert mixed.abs().max() < plain.abs().max() / 2
    assert (plain == 0).float().mean() > 0.5
    assert (mixed == 0).float().mean() < 0.1
