"""Statistics of quantisation in the metrics of a run."""

from collections.abc import Callable

import pytest

from tests.ranks.test_layouts import QUANTIZED
from tests.ranks.test_train import Result
from tests.ranks.test_train import train as train  # the fixture

SUPER = ("precision.recipe=nvfp4_super", "precision.bf16_last_layers=1")


def quantised(record: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in record.items() if name.startswith("quant/")}


def test_sampled_steps_have_them_and_nothing_else_changes(train: Callable[..., Result]) -> None:
    steps = ("train.stop_after=3", "train.validation_interval=1")
    plain, _ = train("plain", *SUPER, *steps)
    observed, _ = train("observed", *SUPER, *steps, "observe.quantization_interval=2")
    assert [bool(quantised(record)) for record in observed] == [False, True, False]
    found = quantised(observed[1])
    assert [{k: v for k, v in r.items() if k not in found} for r in observed] == plain

    operands = ("x", "weight", "dy", "x_along_tokens", "dy_along_tokens")
    places = [name.rpartition("/")[0] for name in found if name.endswith("/sqnr_db")]
    roles = {"mamba.in_proj": 0, "mamba.out_proj": 0, "moe.experts.fc1": 1, "moe.experts.fc2": 1}
    roles |= {"moe.shared_expert.fc1": 1, "moe.shared_expert.fc2": 1}
    wanted = {f"quant/{role}/{o}" for role in roles for o in operands}
    wanted |= {f"quant/{role}/{layer}/{o}" for role, layer in roles.items() for o in operands}
    mxfp8_out_proj = {f"quant/mamba.out_proj{layer}/weight_along_outputs" for layer in ("", "/0")}
    assert set(places) == wanted | mxfp8_out_proj
    for where in places:
        decibels = found[f"{where}/sqnr_db"]
        low, high = (25, 45) if "out_proj" in where else (12, 30)
        assert low < decibels < high, where
        assert 0 <= found[f"{where}/underflow"] < 0.5


@pytest.mark.parametrize("axis", ["dp", "pp", "ep"])
def test_two_ranks_record_what_one_does(train: Callable[..., Result], axis: str) -> None:
    """The same operands of the same layers, whatever rank has them: gradients differ in the order
    of sums only."""
    overrides = (*SUPER, "train.stop_after=1", "observe.quantization_interval=1")
    layout = () if axis == "dp" else (f"parallel.{axis}=2",)
    one = quantised(train("one", *overrides)[0][0])
    two = quantised(train("two", *overrides, *layout, world=2)[0][0])
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-3, abs=1e-4), name


def test_ranks_that_share_operands_record_the_whole(train: Callable[..., Result]) -> None:
    """Sums over tensor-parallel ranks are rounded to BF16 elsewhere, which moves some codes."""
    overrides = (*QUANTIZED, "train.stop_after=1", "observe.quantization_interval=1")
    one = quantised(train("one", *overrides)[0][0])
    two = quantised(train("two", *overrides, "parallel.tp=2", "parallel.ep=2", world=2)[0][0])
    assert one.keys() == two.keys()
    for name, value in one.items():
        if "/0/x/" in name or "/weight/" in name:  # what no sum came before
            assert two[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name
        elif name.endswith(("sqnr_db", "underflow", "saturation")):  # others are of one element
            assert two[name] == pytest.approx(value, rel=0.1, abs=0.05), name
