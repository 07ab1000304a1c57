"""Counts against the published totals, and against arithmetic done by hand."""

import json
import math
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nemomodel.config.load import load_config
from nemomodel.config.pattern import LayerKind
from nemomodel.config.schema import Config
from nemomodel.model.count import describe, layer_flops, parameter_shapes
from nemomodel.model.init import initialize
from nemomodel.model.nemotron import Nemotron
from nemomodel.ops import product
from nemomodel.ops.attention import CPU_BLOCK_BYTES

CONFIGS = Path(__file__).parents[2] / "configs"
NAMES = ["tiny", "small", "nano_30b", "nano_4b", "super_120b", "ultra_550b"]


def load(name: str, *overrides: str) -> Config:
    return load_config(CONFIGS / f"{name}.toml", overrides)


def count(name: str, *overrides: str) -> dict[str, Any]:
    return describe(load(name, *overrides))


# Nano, Super and Nano-4B equal the element counts of the released checkpoints; see
# Megatron-Bridge examples/model_verification_cards @ 067f987d.
@pytest.mark.parametrize(
    ("name", "backbone", "mtp", "biases"),
    [
        ("nano_30b", 31_577_937_344, 0, {"backbone": 23 * 128, "mtp": 0}),
        ("nano_4b", 3_973_556_832, 0, {"backbone": 0, "mtp": 0}),
        ("super_120b", 120_668_687_360, 2_942_324_736, {"backbone": 20_480, "mtp": 512}),
        ("ultra_550b", 549_308_968_960, 11_215_609_856, {"backbone": 24_576, "mtp": 512}),
        ("small", 1_031_967_872, 59_053_056, {"backbone": 768, "mtp": 64}),
    ],
)
def test_parameters_are_the_published_ones(
    name: str, backbone: int, mtp: int, biases: dict[str, int]
) -> None:
    counted = count(name)
    assert counted["parameters_backbone"] == backbone
    assert counted["parameters_mtp"] == mtp
    assert counted["parameters_total"] == backbone + mtp
    assert counted["router_biases"] == biases


def test_parameters_per_layer_of_super_are_the_published_ones() -> None:
    rows = {row["name"]: row for row in count("super_120b")["parameters_by_kind"]}
    per_layer = {name: (row["layers"], row["per_layer"]) for name, row in rows.items()}
    assert per_layer == {
        "embedding": (1, 131_072 * 4096),
        "mamba": (40, 109_640_064),
        "attention": (8, 35_655_680),
        "moe": (40, 2_873_102_336),
        "final_norm": (1, 4096),
        "head": (1, 131_072 * 4096),
        "mtp": (1, 2_942_324_736),
    }


@pytest.mark.parametrize(
    ("name", "both", "head_only", "none"),
    [
        ("nano_30b", 3.580, 3.228, 2.875),
        ("super_120b", 12.770, 12.233, 11.696),
        ("ultra_550b", 56.06, 54.99, 53.91),
        ("small", 0.503, 0.369, 0.235),
    ],
)
def test_active_parameters_by_each_convention(
    name: str, both: float, head_only: float, none: float
) -> None:
    counted = count(name)
    assert counted["parameters_active"] / 1e9 == pytest.approx(both, abs=0.006)
    without_input = counted["parameters_active_without_input_embedding"]
    assert without_input / 1e9 == pytest.approx(head_only, abs=0.006)
    assert counted["parameters_active_without_both_embeddings"] / 1e9 == pytest.approx(
        none, abs=0.006
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_parts_add_up(name: str) -> None:
    counted = count(name)
    model = load(name).model
    flops = counted["flops_per_token"]
    tables = 2 * model.vocab_size * model.hidden_size + model.hidden_size
    by_kind, rows, mtp = counted["parameters_by_kind"], counted["layers"], counted["mtp"]
    shapes = parameter_shapes(model)

    assert sum(math.prod(shape) for shape in shapes.values()) == counted["parameters_total"]
    assert sum(row["total"] for row in by_kind) == counted["parameters_total"]
    assert sum(row["parameters"] for row in rows) + tables == counted["parameters_backbone"]
    assert sum(row["parameters_active"] for row in rows) + tables == counted["parameters_active"]
    assert sum(flops["forward_by_kind"].values()) == flops["forward"]
    assert sum(flops["training_by_kind"].values()) == flops["training"] == 3 * flops["forward"]
    assert sum(flops["forward_mtp_by_kind"].values()) == flops["forward_by_kind"]["mtp"]
    layers = sum(row["flops_per_token"] for row in rows)
    head = flops["forward_by_kind"]["head"]
    assert layers + head + flops["forward_by_kind"]["mtp"] == flops["forward"]
    assert [row["index"] for row in rows] == list(range(len(model.layer_pattern)))
    assert (mtp is None) == (model.mtp is None)
    assert json.loads(json.dumps(counted)) == counted


# GFLOP per token of training from true shapes, computed apart from this code, scan counted as
# whole Q x Q products with Q = 128, the convolution left out.
@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("nano_30b", (), 20.80),
        ("nano_4b", ("model.mamba.chunk_size=128",), 22.26),
        ("super_120b", (), 85.56),
        ("small", (), 4.20),
    ],
)
def test_flops_per_token_are_the_known_ones(
    name: str, overrides: tuple[str, ...], expected: float
) -> None:
    flops = count(name, *overrides)["flops_per_token"]
    gflops = (flops["training"] - flops["training_by_kind"]["conv"]) / 1e9
    assert gflops == pytest.approx(expected, abs=0.0051)


def test_flops_of_one_tiny_layer_by_hand() -> None:
    """Twice the multiply-adds, written out with the numbers of configs/tiny.toml."""
    model = load("tiny").model
    D, seq_length = 128, 256
    assert layer_flops(model, LayerKind.MAMBA, seq_length) == {
        "mamba_projections": 2 * D * (256 + 256 + 64 + 64 + 8) + 2 * 256 * D,
        "conv": 2 * 4 * (256 + 64 + 64),
        # C B^T (2 groups), its product with x, the states left, the states read (8 heads of 32).
        "ssd_core": 2 * 64 * 2 * 32 + 2 * 64 * 8 * 32 + 2 * 32 * 8 * 32 + 2 * 32 * 8 * 32,
    }
    assert layer_flops(model, LayerKind.ATTENTION, seq_length) == {
        "attention_projections": 2 * D * (4 + 2 + 2) * 32 + 2 * 4 * 32 * D,
        # 128 keys on average, for Q K^T and for the product with V, in 4 heads of 32.
        "attention_core": 2 * 2 * 128 * 4 * 32,
    }
    assert layer_flops(model, LayerKind.MOE, seq_length) == {
        "router": 2 * D * 8,
        "latent_projections": 2 * 2 * D * 32,
        "routed_experts": 2 * 2 * 2 * 32 * 128,
        "shared_expert": 2 * 2 * D * 256,
    }
    assert layer_flops(model, LayerKind.MLP, seq_length) == {"mlp": 2 * 2 * D * 256}


def test_mtp_passes_scale_with_depths_and_its_parameters_only_without_sharing() -> None:
    two, three = count("tiny"), count("tiny", "model.mtp.num_depths=3")
    apart = count("tiny", "model.mtp.shared=false")
    flops = [c["flops_per_token"]["forward_by_kind"]["mtp"] for c in (two, three, apart)]
    assert flops[1] * 2 == flops[0] * 3
    assert flops[2] == flops[0]
    assert three["parameters_mtp"] == two["parameters_mtp"]
    assert apart["parameters_mtp"] == 2 * two["parameters_mtp"]
    assert apart["router_biases"]["mtp"] == 2 * two["router_biases"]["mtp"]


def test_only_attention_depends_on_the_sequence_length() -> None:
    short, long = count("super_120b", "train.seq_length=4096"), count("super_120b")
    changed = {
        kind
        for kind, flops in long["flops_per_token"]["forward_by_kind"].items()
        if flops != short["flops_per_token"]["forward_by_kind"][kind]
    }
    assert changed == {"attention_core", "mtp"}


def test_memory_is_18_bytes_per_parameter_in_bf16_and_16_in_fp32() -> None:
    for recipe, per_parameter in (("bf16", 18), ("fp32", 16)):
        counted = count("tiny", f"precision.recipe={recipe}")
        memory = counted["memory_bytes"]
        assert memory["router_biases"] == 4 * (24 + 8)
        expected = per_parameter * counted["parameters_total"] + memory["router_biases"]
        assert memory["total"] == expected


@pytest.mark.parametrize("name", NAMES)
def test_names_and_shapes_are_those_of_the_built_model(name: str) -> None:
    config = load(name)
    with torch.device("meta"):
        model = Nemotron(config.model, dtype=torch.bfloat16)
    built = {name: tuple(value.shape) for name, value in model.named_parameters()}
    assert built == parameter_shapes(config.model)
    assert sum(b.numel() for b in model.buffers()) == sum(count(name)["router_biases"].values())


def added_flops(_, a: torch.Size, b: torch.Size, **__: Any) -> int:
    """Of a product that is added in place."""
    return 2 * math.prod(a) * b[-1]


def run_and_count_flops(config: Config, *, train: bool) -> dict[str, dict[str, float]]:
    """Module -> operator -> FLOPs per token that torch counts in one pass.

    The counter knows PyTorch's own matrix products, so oneDNN's are switched off; of this model's
    work it does not see the convolution, which is elementwise on a CPU. Products that add to
    something or scale the result count as the plain ones.
    """
    model = Nemotron(config.model, dtype=torch.float32)
    initialize(model, seed=0)
    shape = (2, config.train.seq_length)
    ids_BS = torch.randint(config.model.vocab_size, shape)
    without_onednn = mock.patch.object(product, "ONEDNN_MIN_PRODUCTS", math.inf)
    in_place = dict.fromkeys([torch.ops.aten.addmm_, torch.ops.aten.baddbmm_], added_flops)
    counter = FlopCounterMode(depth=4, display=False, custom_mapping=in_place)
    with without_onednn, counter:
        if train:
            model.loss(ids_BS, ids_BS.roll(-1), torch.ones(shape, dtype=torch.bool)).backward()
        else:
            model(ids_BS)
    plain = {
        "aten.addmm_": "aten.mm",
        "aten.baddbmm": "aten.bmm",
        "aten.baddbmm_": "aten.bmm",
    }
    counted: dict[str, dict[str, float]] = defaultdict(Counter)
    for module, ops in counter.flop_counts.items():
        for op, flops in ops.items():
            counted[module][plain.get(str(op), str(op))] += flops / ids_BS.numel()
    return counted


def attention_blocks(seq_length: int) -> float:
    """What causal attention by blocks of queries computes, over the exact triangle."""
    size = CPU_BLOCK_BYTES // 4  # FP32
    starts = range(0, seq_length, size)
    blocks = [(start, min(start + size, seq_length)) for start in starts]
    return 2 * sum((stop - start) * stop for start, stop in blocks) / seq_length**2


def test_forward_flops_are_those_torch_counts() -> None:
    config = load("tiny")
    counted = run_and_count_flops(config, train=False)
    for index, kind in enumerate(config.model.layers):
        expected = layer_flops(config.model, kind, config.train.seq_length)
        del expected["conv"]
        core = expected.pop("ssd_core", 0)
        core += expected.pop("attention_core", 0) * attention_blocks(config.train.seq_length)
        block = counted[f"Nemotron.blocks.{index}"]
        assert block["aten.mm"] == expected.total()
        # The states handed from chunk to chunk are products too in the plain code; not counted.
        assert core <= block.get("aten.bmm", 0) <= 1.02 * core


def test_training_flops_are_those_torch_counts() -> None:
    config = load("tiny", "model.layer_pattern=E*-E", "model.mamba=none")
    flops = count("tiny", "model.layer_pattern=E*-E", "model.mamba=none")["flops_per_token"]
    core = flops["forward_by_kind"]["attention_core"]
    core += flops["forward_mtp_by_kind"]["attention_core"]
    counted = run_and_count_flops(config, train=True)["Global"]
    # Two products forward; backward forms the scores again and has four of its own.
    products = 7 / 2 * core * attention_blocks(config.train.seq_length)
    assert counted == {"aten.mm": 3 * (flops["forward"] - core), "aten.bmm": products}


def test_names_and_shapes_of_the_tiny_model() -> None:
    shapes = parameter_shapes(load("tiny").model)
    assert shapes["embedding.weight"] == (2048, 128)
    assert shapes["blocks.0.norm.weight"] == (128,)
    assert shapes["blocks.0.mixer.in_proj.weight"] == (2 * 256 + 2 * 2 * 32 + 8, 128)
    assert shapes["blocks.0.mixer.conv_weight"] == (256 + 2 * 2 * 32, 4)
    assert shapes["blocks.1.mixer.experts.fc1"] == (8, 128, 32)
    assert shapes["blocks.1.mixer.experts.fc2"] == (8, 32, 128)
    assert shapes["blocks.3.mixer.q_proj.weight"] == (4 * 32, 128)
    assert shapes["blocks.3.mixer.k_proj.weight"] == (2 * 32, 128)
    assert shapes["blocks.4.mixer.fc1.weight"] == (256, 128)
    assert shapes["mtp.blocks.0.eh_proj.weight"] == (128, 256)
    assert shapes["mtp.blocks.0.layers.1.mixer.latent_up.weight"] == (128, 32)
    assert "mtp.blocks.1.eh_proj.weight" not in shapes
    assert not [name for name in shapes if "expert_bias" in name]
