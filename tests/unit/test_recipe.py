"""Recipes: which linear layers of which model they quantise, and how."""

import json
import sys
import typing
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import train
from nemomodel.config.load import ConfigError, load_config
from nemomodel.config.precision import describe, phases, places
from nemomodel.config.recipe import RECIPES, Place, RecipeName, Role
from nemomodel.config.schema import Config
from nemomodel.model.nemotron import Nemotron
from nemomodel.model.quantize import Quantization, formats
from nemomodel.quant.linear import LinearFormat
from nemomodel.quant.operand import OperandFormat
from nemomodel.quant.recipe import FORMATS, mxfp8_format, nvfp4_format
from nemomodel.train.loop import run

CONFIGS = Path(__file__).parents[2] / "configs"
EVERY_PRODUCT = ("fprop", "dgrad", "wgrad")


def load(name: str, *overrides: str) -> Config:
    return load_config(CONFIGS / f"{name}.toml", overrides)


def build(config: Config) -> tuple[Nemotron, Quantization]:
    with torch.device("meta"):
        model = Nemotron(config.model, dtype=torch.bfloat16)
    return model, Quantization([model], phases(config), seed=0)


def operands(format: LinearFormat) -> dict[str, OperandFormat | None]:
    """By product and side, e.g. "fprop.left"."""
    found = {}
    for name in EVERY_PRODUCT:
        product = getattr(format, name)
        for side in ("left", "right"):
            found[f"{name}.{side}"] = product and getattr(product, side)
    return found


def changes(recipe: str, role: Role = Role.MAMBA_IN) -> dict[str, dict | None]:
    """What a recipe changes of nvfp4_super in a layer: operand -> changed keys, None is BF16."""
    place = Place(role, 20, 88, in_mtp=False)
    names = (RECIPES[name].format(place) for name in ("nvfp4_super", recipe))
    ours, theirs = (operands(FORMATS[name]) for name in names)
    found = {}
    for key, was in ours.items():
        now = theirs[key]
        if now != was:
            old, new = asdict(was), now and asdict(now)
            found[key] = new and {k: v for k, v in new.items() if old[k] != v}
    return found


def test_every_name_has_a_recipe_and_every_recipe_its_formats() -> None:
    assert {"bf16", "fp32", *RECIPES} == set(typing.get_args(RecipeName))
    used = {format for recipe in RECIPES.values() for format in recipe.formats.values()}
    assert used == set(FORMATS)
    assert all(recipe.name == name for name, recipe in RECIPES.items())


def test_super_recipe_says_what_the_paper_says() -> None:
    recipe = RECIPES["nvfp4_super"]

    def format(role: Role, layer: int = 0, *, in_mtp: bool = False) -> str | None:
        return recipe.format(Place(role, layer, 88, in_mtp), last_layers=14)

    kept = {Role.ATTENTION_QKV, Role.ATTENTION_OUT, Role.LATENT_DOWN, Role.LATENT_UP, Role.MTP_PROJ}
    for role in Role:
        expected = None if role in kept else "mxfp8" if role is Role.MAMBA_OUT else "nvfp4"
        assert format(role) == format(role, 73) == expected
        assert format(role, 74) is format(role, in_mtp=True) is None
    fp4 = FORMATS["nvfp4"]
    assert fp4 == nvfp4_format()
    assert FORMATS["mxfp8"] == mxfp8_format()
    assert (str(fp4.fprop.left), str(fp4.fprop.right)) == ("nvfp4 1x16", "nvfp4 16x16")
    assert (str(fp4.dgrad.left), str(fp4.dgrad.right)) == ("nvfp4 1x16 SR", "nvfp4 16x16")
    assert (str(fp4.wgrad.left), str(fp4.wgrad.right)) == ("nvfp4 16x1 SR RHT", "nvfp4 16x1 RHT")


def test_recipe_of_the_12b_model_keeps_2_first_and_8_last_of_62_blocks() -> None:
    recipe = RECIPES["nvfp4_12b"]
    kept = [
        layer
        for layer in range(62)
        if recipe.format(Place(Role.ATTENTION_QKV, layer, 62, in_mtp=False)) is None
    ]
    assert kept == [0, 1, *range(54, 62)]


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("no_rht", {"wgrad.left": {"hadamard": False}, "wgrad.right": {"hadamard": False}}),
        ("no_sr", {"dgrad.left": {"stochastic": False}, "wgrad.left": {"stochastic": False}}),
        ("no_2d", {"fprop.right": {"along": "columns"}, "dgrad.right": {"along": "rows"}}),
        ("all_layers", {}),
        ("first_layers", {}),
        ("fp4_out_proj", {}),
        (
            "weights_only",
            dict.fromkeys(("fprop.left", "dgrad.left", "wgrad.left", "wgrad.right")),
        ),
        (
            "forward_only",
            {
                "fprop.right": {"along": "columns"},
                **{f"{p}.{side}": None for p in ("dgrad", "wgrad") for side in ("left", "right")},
            },
        ),
        ("backward_only", {"fprop.left": None, "fprop.right": None}),
        (
            "sr_activations",
            {"fprop.left": {"stochastic": True}, "wgrad.right": {"stochastic": True}},
        ),
        ("sr_dgrad", {"wgrad.left": {"stochastic": False}}),
        ("sr_wgrad", {"dgrad.left": {"stochastic": False}}),
    ],
)
def test_an_ablation_changes_one_thing(recipe: str, expected: dict) -> None:
    assert changes(f"nvfp4_super_{recipe}") == expected


def test_ablations_of_the_layers() -> None:
    def quantised(recipe: str) -> list[int]:
        format = RECIPES[recipe].format
        return [n for n in range(20) if format(Place(Role.MAMBA_OUT, n, 20, in_mtp=False))]

    assert quantised("nvfp4_super") == list(range(17))
    assert quantised("nvfp4_super_all_layers") == list(range(20))
    assert quantised("nvfp4_super_first_layers") == list(range(3, 20))
    place = Place(Role.MAMBA_OUT, 5, 20, in_mtp=False)
    assert RECIPES["nvfp4_super_fp4_out_proj"].format(place) == "nvfp4"
    for what in ("weights_only", "forward_only", "backward_only"):
        assert RECIPES[f"nvfp4_super_{what}"].format(place) == f"mxfp8_{what}"


@pytest.mark.parametrize("name", ["tiny", "nano_30b", "super_120b"])
def test_a_model_has_the_linear_layers_that_its_config_says(name: str) -> None:
    config = load(name)
    _, quantization = build(config)
    built = {slot.place for slot in quantization._slots}
    assert built == set(places(config.model))
    for slot in quantization._slots:
        assert hasattr(slot.owner, slot.attribute)


def test_the_layers_of_a_phase_are_in_the_model_and_no_others() -> None:
    tables = (
        '{from_tokens=2048, recipe="nvfp4_super"}',
        '{from_tokens=4096, recipe="bf16"}',
    )
    overrides = ("precision.recipe=nvfp4", f"precision.phases=[{', '.join(tables)}]")
    config = load("tiny", *overrides)
    _, quantization = build(config)
    observer = quantization.observer = object()
    for step, phase in enumerate(phases(config), 1):
        quantization.begin(step, 0)
        for slot in quantization._slots:
            name, layer = phase.format(slot.place), getattr(slot.owner, slot.attribute)
            assert (layer and layer.format) == (FORMATS[name] if name else None)
            assert quantization.layers.get(slot.name) is layer
            assert layer is None or layer.observer is observer
    assert quantization.layers == {}
    quantization.begin_validation(1)
    assert len(quantization.layers) == len([s for s in quantization._slots if not s.place.in_mtp])


def test_validation_uses_the_weights_after_the_step_in_its_phase() -> None:
    config = load("tiny", "precision.recipe=nvfp4_super")
    _, quantization = build(config)
    layer = next(iter(quantization.layers.values()))
    quantization.begin(3, 0)
    assert layer.at.step == 3
    quantization.begin_validation(3)
    assert layer.at.step == 4


def test_description_counts_every_linear_layer_of_every_phase() -> None:
    phase = '[{from_tokens=5000, recipe="nvfp4_super_all_layers"}]'
    six_layers = "model.layer_pattern=ME*-ME"
    config = load("tiny", six_layers, "precision.recipe=nvfp4_super", f"precision.phases={phase}")
    first, second = describe(config)
    assert first == {
        "from_step": 1,
        "from_tokens": 0,
        "recipe": "nvfp4_super",
        # ME*-ME with its last block and the MTP block (*E) in BF16.
        "linear_layers": {
            "nvfp4": {
                "mamba.in_proj": 2,
                "moe.experts.fc1": 1,
                "moe.experts.fc2": 1,
                "moe.shared_expert.fc1": 1,
                "moe.shared_expert.fc2": 1,
                "mlp.fc1": 1,
                "mlp.fc2": 1,
            },
            "mxfp8": {"mamba.out_proj": 2},
            "bf16": {
                "moe.latent_down": 3,
                "moe.latent_up": 3,
                "attention.qkv_proj": 2,
                "attention.out_proj": 2,
                "moe.experts.fc1": 2,
                "moe.experts.fc2": 2,
                "moe.shared_expert.fc1": 2,
                "moe.shared_expert.fc2": 2,
                "mtp.eh_proj": 1,
            },
        },
    }
    assert (second["from_step"], second["recipe"]) == (4, "nvfp4_super_all_layers")
    assert second["linear_layers"]["nvfp4"]["moe.experts.fc1"] == 2
    config = load("tiny")
    assert [list(row["linear_layers"]) for row in describe(config)] == [["fp32"]]


def test_describe_shows_the_phases(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("train.py", str(CONFIGS / "super_120b.toml"), "--describe")
    monkeypatch.setattr(sys, "argv", list(arguments))
    assert train.main() == 0
    (phase,) = json.loads(capsys.readouterr().out)["precision"]
    layers = phase.pop("linear_layers")
    assert phase == {"from_step": 1, "from_tokens": 0, "recipe": "nvfp4_super"}
    # Of 40 Mamba and 40 MoE blocks the last 14 blocks have 6 and 7; MTP has one of MoE.
    assert layers["mxfp8"] == {"mamba.out_proj": 34}
    assert layers["nvfp4"] == {
        "mamba.in_proj": 34,
        **{f"moe.{name}": 33 for name in ("experts.fc1", "experts.fc2")},
        **{f"moe.shared_expert.{name}": 33 for name in ("fc1", "fc2")},
    }
    assert layers["bf16"]["attention.qkv_proj"] == 9
    assert layers["bf16"]["moe.experts.fc1"] == 8


def test_the_announcement_counts_what_the_description_counts() -> None:
    config = load("tiny", "precision.recipe=nvfp4_super_weights_only")
    _, quantization = build(config)
    (phase,) = phases(config)
    lines = quantization.describe(phase)
    (counts,) = (row["linear_layers"] for row in describe(config))
    assert len(lines) == len(counts) == 3
    for line, (format, roles) in zip(lines, counts.items(), strict=True):
        wanted = f"emulated {FORMATS[format]}" if format in FORMATS else "not quantised"
        assert line == f"{wanted}: {', '.join(f'{role} ({n})' for role, n in roles.items())}"
    assert lines[0].startswith(
        "emulated fprop BF16 x nvfp4 16x16; dgrad BF16 x nvfp4 16x16; wgrad BF16: mamba.in_proj (4)"
    )


def test_formats_of_a_run_are_those_of_all_its_phases() -> None:
    phase = '[{from_tokens=5000, recipe="nvfp4_super_no_rht"}]'
    config = load("tiny", "precision.recipe=mxfp8", f"precision.phases={phase}")
    assert formats(config) == {FORMATS["mxfp8"], FORMATS["nvfp4_no_rht"]}
    assert formats(load("tiny")) == set()


def _run_without_hardware(config: Config) -> None:
    """For `run_ranks`."""
    with pytest.raises(ConfigError, match=r'use precision\.executor="emulated"'):
        run(config)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there may be such hardware")
def test_transformer_engine_without_its_hardware_is_an_error_at_start(
    run_ranks: Callable, tmp_path: Path
) -> None:
    overrides = ("precision.recipe=nvfp4_super", "precision.executor=transformer_engine")
    config = load("tiny", *overrides, f"run.dir={tmp_path}/run", f"data.cache_dir={tmp_path}/data")
    run_ranks(1, _run_without_hardware, config)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "data").exists()
