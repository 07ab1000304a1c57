"""The self-test of the quantiser: what it knows is right, and every fault stops the run."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nemomodel.quant import compiled, selftest
from nemomodel.quant.hadamard import SIGNS
from nemomodel.quant.linear import Call, LinearFormat, QuantizedLinear
from nemomodel.quant.operand import (
    ExactOperand,
    GroupedOperand,
    OperandFormat,
    quantize_groups,
    quantize_operand,
)
from nemomodel.quant.recipe import FORMATS
from nemomodel.quant.selftest import (
    FEW,
    MANY,
    MXFP8_VECTORS,
    NVFP4_VECTORS,
    Block,
    SelfTestError,
    self_test,
    self_test_layers,
)
from nemomodel.train.faults import EXIT_BAD_INPUT, exit_code_of
from nemomodel.train.loop import run
from tests.oracles.quant import GRIDS, nearest_value, quantize_nvfp4_oracle
from tests.ranks.test_train import make_config

CPU = torch.device("cpu")
Quantizer = Callable[..., ExactOperand]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_it_passes(dtype: torch.dtype) -> None:
    self_test(CPU, dtype, draws=FEW)


def _compiled() -> None:
    assert compiled.takes(torch.empty(len(SIGNS), MANY))
    self_test(CPU)
    self_test_layers(make_layer, FORMATS.values(), CPU)


@pytest.mark.slow
def test_compiled_code_passes(run_ranks: Callable) -> None:
    """In a process of its own: one that compiles in a backward pass cannot fork others."""
    if not shutil.which("g++"):  # `compiled.takes` would compile
        pytest.skip("no C++ compiler here")
    run_ranks(1, _compiled)


def test_groups_are_tested_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def quantize(x: Tensor, format: OperandFormat, *rows: list[int], **kw) -> GroupedOperand:
        grouped = quantize_groups(x, format, *rows, **kw)
        return replace(grouped, values=grouped.values.roll(1, 0))

    monkeypatch.setattr(selftest, "quantize_groups", quantize)
    with pytest.raises(SelfTestError, match=r"mxfp8 1x32 in groups: .* known values differ"):
        self_test(CPU, draws=FEW)


def columns(blocks: tuple[Block, ...], field: str) -> np.ndarray:
    return np.array([getattr(block, field) for block in blocks], np.float32)


@pytest.mark.parametrize("blocks", NVFP4_VECTORS, ids=["amax-2688", "amax-7.375"])
def test_known_nvfp4_vectors_are_those_of_the_oracle(blocks: tuple[Block, ...]) -> None:
    x = columns(blocks, "elements")
    oracle = quantize_nvfp4_oracle(np.concatenate([x, -x], 1), (1, 16))
    scales = GRIDS["E4M3"][oracle.scale_codes][:, 0]
    assert scales.tolist() == columns(blocks, "scale").tolist()
    values = (columns(blocks, "codes") * scales[:, None]).tolist()
    assert oracle.coded()[:, :8].tolist() == values
    assert oracle.coded()[:, 8:].tolist() == [[-v for v in row] for row in values]


def test_known_mxfp8_vectors_are_those_of_the_oracle() -> None:
    for block in MXFP8_VECTORS:
        assert block.scale == 2.0 ** np.ceil(np.log2(max(block.elements) / 448))
        codes = nearest_value(np.array(block.elements) / block.scale, GRIDS["E4M3"])
        assert codes.tolist() == list(block.codes)


def test_inputs_are_bf16_numbers() -> None:
    blocks = [block for group in NVFP4_VECTORS for block in group] + list(MXFP8_VECTORS)
    x = torch.tensor([block.elements for block in blocks])
    assert torch.equal(x.bfloat16().float(), x)


def changed(
    change: Callable[[Tensor], Tensor], which: Callable[[OperandFormat], bool]
) -> Quantizer:
    """The quantiser with other values in some formats."""

    def quantize(x: Tensor, format: OperandFormat, **options: object) -> ExactOperand:
        operand = quantize_operand(x, format, **options)
        return replace(operand, values=change(operand.values)) if which(format) else operand

    return quantize


def called(**other: object) -> Quantizer:
    """The quantiser with other arguments, where they are given at all."""

    def quantize(x: Tensor, format: OperandFormat, *, key: object = None) -> ExactOperand:
        return quantize_operand(x, format, key=key and other["key"]())

    return quantize


def without(**field: bool) -> Quantizer:
    """The quantiser that forgets a part of a format."""

    def quantize(x: Tensor, format: OperandFormat, *, key: object = None) -> ExactOperand:
        format = replace(format, **field)
        return quantize_operand(x, format, key=key if format.stochastic else None)

    return quantize


def one_code_off(values: Tensor) -> Tensor:
    values = values.clone()
    values[0, 0] += 8
    return values


def rounded_up(values: Tensor) -> Tensor:
    """A little too often: a quarter of what became 1 is 1.5."""
    values = values.clone()
    ones = ((values / 448).abs() == 1).nonzero()[::4]
    values[tuple(ones.T)] *= 1.5
    return values


keys = iter(range(10_000))
FAULTS = {
    "known vector": (
        changed(one_code_off, lambda f: f == OperandFormat("nvfp4", "both")),
        "nvfp4 16x16: 1 of ",
    ),
    "known mxfp8 vector": (
        changed(one_code_off, lambda f: f == OperandFormat("mxfp8", "rows")),
        "mxfp8 32x1: 1 of ",
    ),
    "no transform": (without(hadamard=False), "is not the Hadamard matrix"),
    "another transform": (
        changed(lambda v: v * 2, lambda f: f.hadamard and not f.stochastic),
        "the transform is not orthogonal",
    ),
    "all gradients zero": (
        changed(torch.zeros_like, lambda f: f.stochastic),
        "the largest code did not stay",
    ),
    "nearest": (without(stochastic=False), "two streams of random bits gave the same codes"),
    "truncation": (
        changed(lambda v: torch.where(v.abs() > 448 * 4.5, v, 448.0), lambda f: f.stochastic),
        "became something else than",
    ),
    "bias": (
        changed(rounded_up, lambda f: f == OperandFormat("nvfp4", "rows", stochastic=True)),
        "nvfp4 16x1 SR: 1.375 became 1.5 in ",
    ),
    "not repeatable": (called(key=lambda: (next(keys), 7)), "gave other codes the second time"),
    "one stream": (called(key=lambda: (3, 7)), "two streams of random bits gave the same codes"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_named(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    broken, message = FAULTS[fault]
    monkeypatch.setattr(selftest, "quantize_operand", broken)
    with pytest.raises(SelfTestError, match="self-test of the quantiser on cpu failed") as caught:
        self_test(CPU, draws=FEW)
    assert message in str(caught.value)
    assert "precision.recipe='bf16'" in str(caught.value)


def test_layers_of_every_format_pass() -> None:
    self_test_layers(make_layer, FORMATS.values(), CPU, draws=FEW)


def make_layer(format: LinearFormat) -> QuantizedLinear:
    return QuantizedLinear(format, name="self-test", seed=0)


class Broken(QuantizedLinear):
    """As a device whose stochastic rounding gives zeros, and whose outputs are doubled."""

    def _operand(self, name: str, x: Tensor, format: OperandFormat, call: Call) -> GroupedOperand:
        operand = super()._operand(name, x, format, call)
        return replace(operand, values=operand.values * (0 if format.stochastic else 2))


class WithoutWgrad(QuantizedLinear):
    """As a device whose transform along the tokens gives zeros."""

    def wgrad(self, *args: Any) -> Tensor:
        return torch.zeros_like(super().wgrad(*args))


def test_a_wrong_weight_gradient_is_named() -> None:
    format = FORMATS["nvfp4"]
    with pytest.raises(SelfTestError, match="a weight gradient is wrong by 100%"):
        self_test_layers(
            lambda f: WithoutWgrad(f, name="self-test", seed=0), [format], CPU, draws=FEW
        )


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8"])
def test_faults_of_a_layer_are_named(name: str) -> None:
    format = FORMATS[name]
    with pytest.raises(SelfTestError) as caught:
        self_test_layers(lambda f: Broken(f, name="self-test", seed=0), [format], CPU, draws=FEW)
    message = str(caught.value)
    assert f"{format.fprop}: the output is not the product of the known operands" in message
    assert ("1.375 became something else than 1.0 or 1.5" in message) is (name == "nvfp4")


def _run_and_fail(config: object) -> None:
    """For `run_ranks`."""
    with pytest.raises(SelfTestError) as caught:
        run(config)
    assert exit_code_of(caught.value) == EXIT_BAD_INPUT


def test_a_run_stops_before_it_writes_anything(
    run_ranks: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "quantize_operand", FAULTS["all gradients zero"][0])
    config = make_config(tmp_path, "precision.recipe=nvfp4")
    run_ranks(1, _run_and_fail, config)
    assert not Path(config.run.dir).exists()
    # Nothing is quantised, so nothing is tested.
    run_ranks(1, run, make_config(tmp_path, "train.steps=6", "train.stop_after=1"))
    assert Path(config.run.dir).exists()
