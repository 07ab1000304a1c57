"""The order of samples: permutations and blends."""

import numpy as np
import pytest

from nemomodel.data.order import BLOCK, Blend, derive_key, permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 4096, 5000, 65537])
def test_permute_is_a_bijection(size):
    out = permute(np.arange(size), size=size, key=7)
    assert np.array_equal(np.sort(out), np.arange(size))


def test_permute_depends_on_the_key_and_not_on_the_company():
    index = np.arange(1000)
    one, other = (permute(index, size=1000, key=key) for key in (1, 2))
    assert (one != other).mean() > 0.99
    assert permute(index[500:501], size=1000, key=1)[0] == one[500]


def test_permute_mixes():
    # Correlation of place and index, and of neighbours, is that of noise: below 4 / sqrt(n).
    out = permute(np.arange(10_000), size=10_000, key=3).astype(float)
    assert abs(np.corrcoef(out, np.arange(10_000))[0, 1]) < 0.04
    assert abs(np.corrcoef(out[1:], out[:-1])[0, 1]) < 0.04


def test_permute_keeps_its_values():
    # The order is part of a run: these numbers must never change.
    assert permute(np.arange(8), size=8, key=42).tolist() == [0, 2, 1, 3, 6, 7, 4, 5]
    big = permute(np.array([0, 1, 10**14]), size=10**15, key=42)
    assert big.tolist() == [431278731010025, 50735852339534, 4986371396121]


def test_derived_keys_differ():
    keys = {derive_key("epoch", s, e) for s in range(50) for e in range(50)}
    assert len(keys) == 2500


@pytest.mark.parametrize(
    "weights", [[1.0], [0.3, 0.7], [1, 1, 1], [0.1, 0.2, 0.3, 0.4], [4000.0, 1.0], [1e-9, 3e-9]]
)
def test_shares_are_met_within_one_sample_for_ever(weights):
    blend = Blend(weights, seed=0)
    shares = np.array(weights) / sum(weights)
    for blocks in [*range(1, 50), 10**6]:
        counts = blend.counts(blocks)
        assert counts.sum() == blocks * BLOCK
        # The second term is the error of the float product, for the largest number of blocks.
        assert np.abs(counts - shares * blocks * BLOCK).max() < 1 + 1e-15 * blocks * BLOCK
        assert (blend.counts(blocks + 1) >= counts).all()


def test_every_source_is_counted_without_gaps():
    blend = Blend([0.25, 0.6, 0.15], seed=5)
    source, index = blend.locate(np.arange(3 * BLOCK))
    for s in range(3):
        assert index[source == s].tolist() == list(range(int((source == s).sum())))
    assert np.bincount(source).tolist() == blend.counts(3).tolist()


def test_locate_does_not_depend_on_how_it_is_asked():
    whole = Blend([1, 2], seed=5).locate(np.arange(2 * BLOCK))
    blend = Blend([1, 2], seed=5)
    for sample in (BLOCK + 3, 0, BLOCK - 1, BLOCK, 17):
        source, index = blend.locate(np.array([sample]))
        assert (source[0], index[0]) == (whole[0][sample], whole[1][sample])


def test_sources_are_mixed_inside_a_block():
    source, _ = Blend([1, 1], seed=1).locate(np.arange(BLOCK))
    # Any 512 samples: 256 expected, 4 sigma of a draw without replacement is 42.
    assert all(214 <= source[i : i + 512].sum() <= 298 for i in range(0, BLOCK, 512))


def test_a_share_too_small_to_deal_is_an_error():
    with pytest.raises(ValueError, match=r"source 1: its share 0\.0002 is below 1/4096"):
        Blend([4999.0, 1.0], seed=0)
