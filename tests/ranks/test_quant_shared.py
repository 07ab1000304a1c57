"""Ranks that share a matrix quantise it as one rank does."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from nemomodel.quant.operand import OperandFormat, Place2D, quantize_operand, quantize_plain
from nemomodel.quant.rounding import stream_key

FORMATS = [
    OperandFormat("nvfp4", along, stochastic, hadamard)
    for along in ("columns", "rows", "both")
    for stochastic, hadamard in itertools.product((False, True), repeat=2)
]


@pytest.mark.parametrize("cut", ["rows", "columns"])
def test_pieces_have_the_codes_of_the_whole(run_ranks: Callable[..., None], cut: str) -> None:
    run_ranks(2, _compare, cut)


def _compare(cut: str) -> None:
    x = torch.randn(96, 80).bfloat16()
    x[3, 3] = 9  # what only rank 0 sees
    rank = dist.get_rank()
    own, columns = (slice(0, 32), slice(32, 96))[rank], (slice(0, 48), slice(48, 80))[rank]
    for format, quantize in itertools.product(FORMATS, (quantize_operand, quantize_plain)):
        key = stream_key(1) if format.stochastic else None
        whole = quantize(x, format, key=key)
        if cut == "rows":
            piece, expected, place = x[own], whole.values[own], Place2D(own.start, None, 80)
        else:
            ids = torch.arange(columns.start, columns.stop, dtype=torch.int32)
            piece, expected, place = x[:, columns], whole.values[:, columns], Place2D(0, ids, 80)
        part = quantize(piece, format, key=key, place=place, amax_group=dist.group.WORLD)
        assert torch.equal(part.values, expected), format
        assert torch.equal(part.factor, whole.factor), format


def test_what_is_not_a_number_reaches_every_rank(run_ranks: Callable[..., None]) -> None:
    run_ranks(2, _not_a_number)


def _not_a_number() -> None:
    x = torch.randn(32, 32)
    if dist.get_rank() == 1:  # the maximum of gloo takes what rank 0 has
        x[4, 7] = torch.nan
    for quantize in (quantize_operand, quantize_plain):
        operand = quantize(x, OperandFormat("nvfp4", "columns"), amax_group=dist.group.WORLD)
        assert operand.amax.isnan()
