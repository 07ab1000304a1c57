"""A run in two parts is the run in one, bit for bit."""

from collections.abc import Callable

import pytest
import torch

from tests.ranks.test_train import OVERLAP, Result, assert_equal_up_to_rounding, assert_same_state
from tests.ranks.test_train import train as train  # the fixture

Train = Callable[..., Result]
COMMON = ("train.validation_interval=2",)
RECOMPUTE = 'train.recompute=["mamba", "attention", "moe", "mlp"]'


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        (1, ("precision.recipe=fp32",)),
        (1, ("precision.recipe=bf16", RECOMPUTE)),
        (2, ("precision.recipe=fp32", RECOMPUTE)),
        (2, ("precision.recipe=bf16", *OVERLAP)),
    ],
    ids=["1-fp32", "1-bf16-recompute", "2-fp32-recompute", "2-bf16-overlap"],
)
def test_run_in_two_parts_is_the_run_in_one(
    train: Train, world: int, overrides: tuple[str, ...]
) -> None:
    """All records (losses, validation, router loads, rates, tokens) and the whole state."""
    records, state = train("straight", *COMMON, *overrides, world=world)
    half_records, half_state = train(
        "parts", *COMMON, *overrides, "train.stop_after=3", world=world
    )
    assert half_records == records[:3]
    parts_records, parts_state = train("parts", *COMMON, *overrides, world=world)
    assert parts_records == records
    assert [record["step"] for record in records] == list(range(1, 9))
    assert ["loss/validation" in record for record in records] == [False, True] * 4
    assert_same_state(parts_state, state)
    biases = [name for name in state if name.endswith("expert_bias")]
    assert any(not torch.equal(half_state[name], state[name]) for name in biases)


def test_fewer_ranks_go_on(train: Train) -> None:
    """The data order does not depend on the number of ranks, the sums do in their last bits."""
    straight = train("straight", *COMMON)
    train("parts", *COMMON, "train.stop_after=3", world=2)
    assert_equal_up_to_rounding(train("parts", *COMMON), straight)


def test_more_ranks_go_on(train: Train) -> None:
    straight = train("straight", *COMMON)
    train("parts", *COMMON, "train.stop_after=3")
    assert_equal_up_to_rounding(train("parts", *COMMON, world=2), straight)
