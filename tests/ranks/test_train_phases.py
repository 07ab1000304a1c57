"""Precision phases through the public trainer: when they begin, and resuming at any edge."""

from collections.abc import Callable

import pytest

from tests.ranks.test_train import Result, assert_same_state
from tests.ranks.test_train import train as train  # the fixture

Train = Callable[..., Result]
BASE = ("precision.recipe=nvfp4", "train.validation_interval=3")
# A step has 128 tokens: the phases begin with steps 4 and 6.
PHASES = (
    *BASE,
    'precision.phases=[{from_tokens=300, recipe="nvfp4_super_backward_only", bf16_last_layers=1},'
    '{from_tokens=640, recipe="bf16"}]',
)


@pytest.mark.parametrize(
    ("world", "stops"), [(1, (2, 3, 4)), pytest.param(2, (3,), marks=pytest.mark.slow)], ids=str
)
def test_resumed_run_is_the_uninterrupted_one(
    train: Train, world: int, stops: tuple[int, ...]
) -> None:
    """Stops before, at and after the edges."""
    records, state = train("straight", *PHASES, world=world)
    for stop in stops:
        train("parts", *PHASES, f"train.stop_after={stop}", world=world)
    parts, parts_state = train("parts", *PHASES, world=world)
    assert parts == records
    assert_same_state(parts_state, state)


def test_a_phase_changes_the_steps_from_its_first_on(train: Train) -> None:
    with_phases, _ = train("phases", *PHASES)
    without, _ = train("base", *BASE)
    same = [a == b for a, b in zip(with_phases, without, strict=True)]
    # The validation after step 3 belongs to the phase of that step.
    assert same == [True] * 3 + [False] * 5
    assert "loss/validation" in with_phases[2]


def test_every_phase_is_announced_and_its_first_step_logged(
    train: Train, capfd: pytest.CaptureFixture[str]
) -> None:
    train("run", *PHASES, "train.stop_after=4")
    out = "".join(capfd.readouterr())
    for line in (
        "step 1 on: recipe nvfp4, from 0 tokens\n",
        "step 4 on: recipe nvfp4_super_backward_only, last 1 blocks BF16, from 300 tokens\n",
        "step 6 on: recipe bf16, from 640 tokens\n",
        "  emulated fprop BF16; dgrad nvfp4 1x16 SR x nvfp4 16x16; "
        "wgrad nvfp4 16x1 SR RHT x nvfp4 16x1 RHT: mamba.in_proj (1), ",
        "step 4 begins a precision phase: recipe nvfp4_super_backward_only, ",
    ):
        assert line in out
    assert "step 6 begins" not in out
    train("run", *PHASES)
    assert "step 6 begins a precision phase: recipe bf16" in "".join(capfd.readouterr())
