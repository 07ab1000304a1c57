"""Compiled quantisation has the bits of the eager one."""

import pytest
import torch
from torch import Tensor

from nemomodel.quant.nvfp4 import encode
from nemomodel.quant.rounding import stream_key
from nemomodel.quant.tiles import to_tiles

BLOCKS = [(1, 16), (16, 1), (16, 16)]


def rows_of_every_size() -> Tensor:
    """Normal data, ties and zeros; from row 64 on down to denormals that have few bits left."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((128, 256), generator=generator)
    x[:, :64] = torch.randint(-24, 25, (128, 64), generator=generator) * 0.25
    x[::7, 64:96] = 0
    x[64:] *= 2.0 ** torch.linspace(12, -145, 64)[:, None]
    return x


@pytest.mark.slow  # compiling takes tens of seconds
@pytest.mark.parametrize("key", [None, stream_key(0)], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_compiled_codes_and_scales_have_the_eager_bits(
    block: tuple[int, int], key: tuple[int, int] | None
):
    compiled = torch.compile(encode, fullgraph=True, dynamic=False)
    x = rows_of_every_size()
    tiny = x * 2.0**-130
    for data in (x, tiny, torch.zeros_like(x)):
        tiles = to_tiles(data, block)
        amax = tiles.abs().amax()
        for actual, expected in zip(
            compiled(tiles, amax, key=key), encode(tiles, amax, key=key), strict=True
        ):
            assert actual.shape == expected.shape
            assert torch.equal(actual.view(torch.int32), expected.view(torch.int32))
    # A compiler that treats denormals as zero would do so in eager code of this process too.
    assert (torch.tensor([1e-40]) * 0.5 > 0).all()
