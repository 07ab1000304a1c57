"""NVFP4 has the bits of Transformer Engine's Python reference, which runs on a CPU too."""

import pytest
import torch
from torch import Tensor

from nemomodel.quant import NVFP4Tensor, quantize_nvfp4
from nemomodel.quant.hadamard import hadamard_matrix, transform_rows
from tests.unit.test_quant_nvfp4 import CASES, normal

pytest.importorskip("transformer_engine.pytorch", reason="needs transformer-engine")
reference = pytest.importorskip(
    "transformer_engine.pytorch.custom_recipes.reference_nvfp4",
    reason="needs a transformer-engine with custom recipes",
)

WHOLE = {  # its packed rows are cut to the width of the input, not to whole blocks
    name: x for name, x in CASES.items() if x.shape[0] % 16 == 0 and x.shape[1] % 16 == 0
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RUNS = [
    pytest.param(x.to(dtype), id=f"{name}, {short}")
    for name, x in WHOLE.items()
    for short, dtype in DTYPES.items()
    if x.to(dtype).isfinite().all()
]


def quantizer(block: tuple[int, int], *, rht: bool = False):
    from transformer_engine.pytorch.custom_recipes.reference_utils import Fp4Formats

    return reference.NVFP4QuantizerRef(Fp4Formats.E2M1, quant_tile_shape=block, with_rht=rht)


def assert_same_bits(q: NVFP4Tensor, data: Tensor, scale: Tensor, amax: Tensor) -> None:
    assert torch.equal(q.amax.view(1), amax)
    assert torch.equal(q.packed, data)
    rows = q.scales.view(torch.uint8).repeat_interleave(q.block[0], 0)  # one per row, there
    assert torch.equal(rows, scale.view(torch.uint8))


@pytest.mark.parametrize("block", [(1, 16), (16, 16)], ids=str)
@pytest.mark.parametrize("x", RUNS)
def test_rows_and_columns(x: Tensor, block: tuple[int, int]) -> None:
    q = quantizer(block).quantize(x)
    assert_same_bits(quantize_nvfp4(x, block), q.data, q.scale, q.global_amax_row)
    columns = quantize_nvfp4(x.T.contiguous(), block)
    assert_same_bits(columns, q.data_t, q.scale_t, q.global_amax_col)


def test_many_random_matrices() -> None:
    for seed in range(60):
        x = normal(64, 48, seed=seed) * torch.exp(2 * normal(64, 48, seed=1000 + seed))
        q = quantizer((1, 16)).quantize(x)
        assert_same_bits(quantize_nvfp4(x), q.data, q.scale, q.global_amax_row)


def test_hadamard_transform() -> None:
    """Of whole numbers, whose sums are exact: a product may add in another order than ours."""
    for dtype in DTYPES.values():
        x = (normal(64, 32) * 8).round().to(dtype)
        q = quantizer((1, 16), rht=True).quantize(x)
        mixed = transform_rows(x, hadamard_matrix()).T.contiguous()
        assert_same_bits(quantize_nvfp4(mixed), q.data_t, q.scale_t, q.global_amax_col)
