"""The executor `transformer_engine`, with a stand-in that computes what the emulation does."""

import importlib.metadata
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from dataclasses import fields
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nemomodel.quant.linear import LinearFormat, QuantizedLinear, Share
from nemomodel.quant.recipe import FORMATS, mxfp8_format, nvfp4_format
from nemomodel.quant.transformer_engine import TransformerEngineLinear
from nemomodel.quant.transformer_engine_recipe import SWITCHES, execution, make_recipe, require
from tests import fake_transformer_engine
from tests.close import rms_ratio

BF16_STEP = 2.0**-8
NEAREST = nvfp4_format(stochastic=False)
AGREEING = {
    "nvfp4": NEAREST,
    "no-rht": nvfp4_format(stochastic=False, hadamard=False),
    "no-2d": nvfp4_format(stochastic=False, square=False),
    "mxfp8": mxfp8_format(),
}
# As transformer_engine/common/recipe/__init__.py @ d0067d0d reads them.
VARIABLES = {
    "NVTE_NVFP4_DISABLE_RHT": "1",
    "NVTE_NVFP4_DISABLE_STOCHASTIC_ROUNDING": "1",
    "NVTE_NVFP4_DISABLE_2D_QUANTIZATION": "1",
    "NVTE_NVFP4_ROW_SCALED_ACTIVATION": "1",
    "NVTE_NVFP4_4OVER6": "all",
    "NVTE_NVFP4_4OVER6_E4M3_USE_256": "weights",
    "NVTE_NVFP4_4OVER6_ERR_MODE": "MSE",
    "NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1",
    "NVTE_BACKWARD_OVERRIDE": "dequantized",
}
PLACES = [(nvfp4_format(), (10, 0)), (mxfp8_format(), (10, 3)), (mxfp8_format(), (9, 0))]
needs_transformer_engine = pytest.mark.skipif(
    importlib.util.find_spec("transformer_engine") is None,
    reason="transformer_engine is not installed",
)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_transformer_engine.install(monkeypatch)


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).bfloat16()


def by_both(
    format: LinearFormat, x: Tensor, weight: Tensor, dy: Tensor, *rows: Tensor
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """y, dx and dW by Transformer Engine, and emulated."""
    found = []
    for kind in (TransformerEngineLinear, QuantizedLinear):
        layer = kind(format, name="layer", seed=0)
        leaf, parameter = x.clone().requires_grad_(), nn.Parameter(weight.clone())
        y = layer.grouped(leaf, parameter, *rows) if rows else layer(leaf, parameter)
        y.backward(dy)
        found.append((y.detach(), leaf.grad, parameter.grad))
    return found


def assert_agree(results: list[tuple[Tensor, Tensor, Tensor]]) -> None:
    for actual, expected in zip(*results, strict=True):
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        assert rms_ratio(actual, expected) < BF16_STEP


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("shape", [(33,), (3, 50), (128,)], ids=str)
@pytest.mark.parametrize("format", AGREEING.values(), ids=AGREEING)
def test_a_layer_agrees_with_the_emulation(format: LinearFormat, shape: tuple[int, ...]) -> None:
    x, weight, dy = draw(*shape, 64), draw(96, 64, seed=1), draw(*shape, 96, seed=2)
    assert_agree(by_both(format, x, weight, dy))


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("counts", [(20, 0, 64, 1), (0, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("format", AGREEING.values(), ids=AGREEING)
def test_experts_agree_with_the_emulation(format: LinearFormat, counts: tuple[int, ...]) -> None:
    rows = torch.tensor([32, 0, 64, 32]), torch.tensor(counts)
    x, weight, dy = draw(128, 64), draw(4, 96, 64, seed=1), draw(128, 96, seed=2)
    assert_agree(by_both(format, x, weight, dy, *rows))


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("experts", [False, True], ids=["linear", "experts"])
def test_gradients_add_up_in_fp32_and_weights_are_quantised_once_a_step(experts: bool) -> None:
    layer = TransformerEngineLinear(NEAREST, name="layer", seed=0)
    rows = [torch.tensor([16, 16])] * 2 if experts else []
    weight = nn.Parameter(draw(2, 32, 32) if experts else draw(32, 32))
    weight.main_grad = torch.zeros(weight.shape)
    for step in (1, 2):
        for micro_batch in (0, 1):
            layer.begin(step, micro_batch)
            leaf = draw(32, 32, seed=1).requires_grad_()
            y = layer.grouped(leaf, weight, *rows) if experts else layer(leaf, weight)
            y.backward(draw(32, 32, seed=2))
    assert layer.weight.number_of_calls == (4 if experts else 2)
    assert weight.grad is None
    assert weight.grad_added_to_main_grad
    quarter = weight.main_grad / 4
    assert not torch.equal(quarter.bfloat16().float(), quarter)
    single = nn.Parameter(weight.detach().clone())
    single.main_grad = torch.zeros(weight.shape)
    layer.begin(3, 0)
    y = layer.grouped(leaf, single, *rows) if experts else layer(leaf, single)
    y.backward(draw(32, 32, seed=2))
    assert rms_ratio(quarter, single.main_grad) < 1e-6


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("experts", [False, True], ids=["linear", "experts"])
def test_random_bits_are_named_by_their_forward_pass(experts: bool) -> None:
    """Also when, as in a pipeline, the next one begins before the backward pass."""
    weight, dy = nn.Parameter(draw(64, 64, seed=1)), draw(32, 64, seed=2)
    rows = [torch.tensor([32])] * 2

    def gradient(seed: int, micro_batch: int, *, name: str = "a", later: bool = False) -> Tensor:
        layer = TransformerEngineLinear(nvfp4_format(), name=name, seed=seed)
        layer.begin(1, micro_batch)
        leaf = draw(32, 64).requires_grad_()
        y = layer.grouped(leaf, weight[None], *rows) if experts else layer(leaf, weight)
        if later:
            layer.begin(1, micro_batch + 1)
        y.backward(dy)
        return leaf.grad

    state = torch.cuda.default_generators[0].get_state()
    first = gradient(0, 0)
    assert torch.equal(first, gradient(0, 0))
    assert torch.equal(first, gradient(0, 0, later=True))
    for other in (gradient(1, 0), gradient(0, 1), gradient(0, 0, name="b")):
        assert not torch.equal(first, other)
    assert torch.equal(torch.cuda.default_generators[0].get_state(), state)


@pytest.mark.usefixtures("engine")
def test_ranks_that_share_a_tensor_share_its_largest_magnitude() -> None:
    group: Any = object()
    shares = {"x": Share(group), "dy": Share(group, token_rank=1)}
    layer = TransformerEngineLinear(NEAREST, name="layer", seed=0, shares=shares)
    for quantizer, shared in ((layer.input, True), (layer.grad, True), (layer.weight, False)):
        assert quantizer.with_amax_reduction == shared
        assert (quantizer.amax_reduction_group is group) == shared


@pytest.mark.parametrize(("format", "capability"), PLACES, ids=["nvfp4", "mxfp8", "hopper"])
def test_the_environment_changes_no_recipe(
    format: LinearFormat, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def made() -> dict[str, Any]:
        fake_transformer_engine.install(monkeypatch, capability=capability)
        recipe = make_recipe(execution(format, capability))
        scales = {name: getattr(recipe, name, None) for name in dir(recipe) if "_quant_" in name}
        return {k: str(v) for k, v in {**scales, **vars(recipe)}.items()}

    before = made()
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    after = made()
    assert after == before


@pytest.mark.usefixtures("engine")
def test_switches_are_those_of_the_format() -> None:
    assert len(SWITCHES) == 8
    recipe = make_recipe(execution(nvfp4_format(hadamard=False), (10, 0)))
    assert (recipe.disable_rht, recipe.disable_stochastic_rounding) == (True, False)
    assert not recipe.disable_2d_quantization
    assert str(execution(nvfp4_format(square=False), (10, 0))) == (
        "Transformer Engine NVFP4BlockScaling without 2d_quantization"
    )


@pytest.mark.parametrize(
    "name",
    [name for name, format in FORMATS.items() if format not in {*SWITCHES, mxfp8_format()}],
)
def test_formats_without_a_switch_are_errors(name: str) -> None:
    with pytest.raises(ValueError, match=r"no switch for the format fprop .*emulated") as error:
        execution(FORMATS[name], (10, 0))
    assert str(FORMATS[name]) in str(error.value)


@pytest.mark.parametrize(
    ("format", "capability", "message"),
    [
        (nvfp4_format(), (9, 0), "NVFP4 needs compute capability 10.x, this GPU has 9.0"),
        (nvfp4_format(), (12, 0), "NVFP4 needs compute capability 10.x, this GPU has 12.0"),
        (mxfp8_format(), (12, 1), "MXFP8 needs compute capability 10.x, FP8 9.x, this GPU has 12"),
        (mxfp8_format(), (8, 9), "this GPU has 8.9"),
    ],
)
def test_other_gpus_are_errors(
    format: LinearFormat, capability: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        execution(format, capability)
    assert 'use precision.executor="emulated"' in str(error.value)


def test_what_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def error(**environment: str) -> str:
        with pytest.raises(ValueError, match=r"precision\.executor=.emulated.") as caught:
            require([nvfp4_format()], environment=environment)
        return str(caught.value)

    there = importlib.util.find_spec("json")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "transformer_engine is not installed" in error()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: there)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.9.1")
    assert "needs version 2.20, 2.9.1 is installed" in error()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "2.20.2+x")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a GPU, there is none" in error()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    fake_transformer_engine.install(monkeypatch, capability=(12, 0))
    assert "NVTE_USE_FAST_MATH is set" in error(NVTE_USE_FAST_MATH="1")
    assert "this GPU has 12.0" in error(NVTE_USE_FAST_MATH="0")
    fake_transformer_engine.install(monkeypatch)
    require([nvfp4_format(), mxfp8_format()], environment={})


@pytest.mark.usefixtures("engine")
def test_inputs_that_it_cannot_cut_are_errors() -> None:
    layer = TransformerEngineLinear(NEAREST, name="blocks.3.fc1", seed=0)
    with pytest.raises(ValueError, match=r"blocks\.3\.fc1 has a weight of 40 x 64, .* of 32"):
        layer(draw(16, 64), nn.Parameter(draw(40, 64)))
    with pytest.raises(ValueError, match=r"blocks\.3\.fc1 has torch\.float32, needs BF16"):
        layer(draw(16, 64).float(), nn.Parameter(draw(64, 64)))


# --- against the package itself -----------------------------------------------------------------

PROGRAM = """
import json, sys
from nemomodel.quant.recipe import FORMATS
from nemomodel.quant.transformer_engine_recipe import execution, make_recipe
made = [make_recipe(execution(FORMATS[n], (c, 0))) for n, c in
        (("nvfp4", 10), ("nvfp4_no_rht", 10), ("mxfp8", 10), ("mxfp8", 9))]
json.dump([{k: str(getattr(r, k)) for k in dir(r) if not k.startswith("_")
            and not callable(getattr(r, k))} for r in made], sys.stdout)
"""


@needs_transformer_engine
@pytest.mark.slow  # imports the package twice
def test_the_environment_changes_no_recipe_of_the_package() -> None:
    def made(**environment: str) -> Any:
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(run.stdout)

    assert made(**VARIABLES) == made()


@needs_transformer_engine
def test_the_stand_in_has_the_signatures_of_the_package() -> None:
    from transformer_engine.common import recipe
    from transformer_engine.pytorch import cpp_extensions, quantization, quantized_tensor, tensor

    fake = fake_transformer_engine

    def same(ours: Any, theirs: Any) -> None:
        names = list(inspect.signature(theirs).parameters)
        for name, parameter in inspect.signature(ours).parameters.items():
            assert name in names, (ours, name)
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
                position = list(inspect.signature(ours).parameters).index(name)
                assert names.index(name) == position, (ours, name)

    same(fake.general_gemm, cpp_extensions.general_gemm)
    same(fake.general_grouped_gemm, cpp_extensions.general_grouped_gemm)
    same(fake.RecipeState.create, quantization.RecipeState.create)
    same(fake.prepare_for_saving, quantized_tensor.prepare_for_saving)
    same(fake.restore_from_saved, quantized_tensor.restore_from_saved)
    same(fake.Quantizer.set_usage, quantized_tensor.Quantizer.set_usage)
    same(fake.Quantized.update_usage, quantized_tensor.QuantizedTensorStorage.update_usage)
    for kind in (tensor.NVFP4Quantizer, tensor.MXFP8Quantizer, tensor.Float8BlockQuantizer):
        same(fake.Quantizer.copy, kind.copy)
    module: ModuleType = fake.recipes()
    for name in ("NVFP4BlockScaling", "MXFP8BlockScaling", "Float8BlockScaling"):
        ours, theirs = ({f.name for f in fields(getattr(m, name))} for m in (module, recipe))
        assert ours == theirs, "a new field needs a value of ours"
