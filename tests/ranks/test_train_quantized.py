"""Training with a recipe that quantises: repeatable, resumable, the same on one rank as on two."""

from collections.abc import Callable

import pytest
from torch.multiprocessing import ProcessRaisedException

from tests.ranks.test_train import Result, assert_same_state
from tests.ranks.test_train import train as train  # the fixture

Train = Callable[..., Result]
SUPER = ("precision.recipe=nvfp4_super", "precision.bf16_last_layers=1")


@pytest.mark.parametrize("world", [1, 2])
def test_run_in_two_parts_is_the_run_in_one(train: Train, world: int) -> None:
    """Random bits are a function of seed, step and micro-batch: nothing has to be saved."""
    records, state = train("straight", *SUPER, "train.validation_interval=2", world=world)
    train("parts", *SUPER, "train.validation_interval=2", "train.stop_after=3", world=world)
    parts, parts_state = train("parts", *SUPER, "train.validation_interval=2", world=world)
    assert parts == records
    assert_same_state(parts_state, state)


def test_two_ranks_round_as_one(train: Train) -> None:
    """The first step's gradient differs in the order of sums only: every micro-batch has its own
    bits whatever rank has it. Later steps part, because a last bit can move a code."""
    one, _ = train("one", *SUPER, "train.stop_after=1")
    two, _ = train("two", *SUPER, "train.stop_after=1", world=2)
    for key in ("loss/lm", "loss/mtp_1", "optim/grad_norm"):
        assert two[0][key] == pytest.approx(one[0][key], rel=1e-5), key


def test_recipe_changes_loss_and_gradient_a_little(train: Train) -> None:
    plain, _ = train("plain", "precision.recipe=bf16", "train.stop_after=1")
    quantized, _ = train("quantized", *SUPER, "train.stop_after=1")
    assert quantized[0]["loss/lm"] != plain[0]["loss/lm"]
    assert quantized[0]["loss/lm"] == pytest.approx(plain[0]["loss/lm"], rel=2e-2)
    assert quantized[0]["optim/grad_norm"] == pytest.approx(plain[0]["optim/grad_norm"], rel=0.2)


def test_it_learns(train: Train) -> None:
    records, _ = train("all", "precision.recipe=nvfp4")
    plain, _ = train("plain", "precision.recipe=bf16")
    assert records[-1]["loss/lm"] < records[0]["loss/lm"]
    fall = [r[0]["loss/lm"] - r[-1]["loss/lm"] for r in (records, plain)]
    assert fall[0] > 0.7 * fall[1]


def test_what_is_not_finite_is_named(train: Train) -> None:
    """The first update makes weights that overflow; the second step finds the first of them."""
    with pytest.raises(
        ProcessRaisedException,
        match=r"NotFiniteError: step 2: gradient norm is nan"
        r" \(first in blocks\.0\.mixer\.in_proj: (x|weight) of a quantised layer\)",
    ):
        train("run", "precision.recipe=nvfp4", "optim.lr=1e38", "schedule.warmup_steps=1")
