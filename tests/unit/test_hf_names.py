"""The table of tensor names: complete, equal to transformers', and of the published size."""

from dataclasses import replace

import pytest
import torch

from nemomodel.checkpoint.huggingface.names import (
    LAYERS,
    Row,
    entries,
    plan,
    published_name,
    without_padding,
)
from nemomodel.config.load import load_config
from nemomodel.config.schema import AttentionConfig, MambaConfig, ModelConfig, MoeConfig, MtpConfig
from nemomodel.model.nemotron import Nemotron
from tests import hf_models

BF16 = torch.bfloat16
MODEL = ModelConfig(
    layer_pattern="ME*-ME",
    hidden_size=48,
    vocab_size=97,
    ffn_size=80,
    mamba=MambaConfig(num_heads=8, head_dim=8, num_groups=2, state_size=16),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16),
    moe=MoeConfig(num_experts=8, top_k=3, ffn_size=24, shared_ffn_size=40, latent_size=20),
    mtp=MtpConfig(num_depths=2, layer_pattern="*E-M", shared=False),
)
SIZES = {
    "hidden_size": 48,
    "vocab_size": 97,
    "intermediate_size": 80,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "ssm_state_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
    "moe_latent_size": 20,
}
"""Those of MODEL, as transformers calls them."""

PLAIN_MOE = replace(MODEL, moe=replace(MODEL.moe, latent_size=None), mtp=None)
DENSE = replace(MODEL, layer_pattern="M*-", moe=None, mtp=None)


@pytest.mark.parametrize("config", [MODEL, PLAIN_MOE, DENSE], ids=["all", "plain-moe", "dense"])
def test_every_tensor_of_the_model_is_in_one_row(config: ModelConfig) -> None:
    with torch.device("meta"):
        state = Nemotron(config, dtype=BF16).state_dict()
    found = entries(config, state)
    assert sorted(entry.name for entry in found) == sorted(state)
    assert all(entry.num_bytes == state[entry.name].nbytes for entry in found)
    names = [piece.name for entry in found for piece in entry.pieces]
    assert len(names) == len(set(names))


def test_a_parameter_in_no_row_is_found() -> None:
    with torch.device("meta"):
        model = Nemotron(MODEL, dtype=BF16)
        model.blocks[0].mixer.gamma = torch.nn.Parameter(torch.empty(3))
        model.blocks[1].mixer.router.register_buffer("count", torch.empty(3))
    with pytest.raises(AssertionError) as error:
        entries(MODEL, model.state_dict())
    assert "blocks.0.mixer.gamma, blocks.1.mixer.router.count" in str(error.value)


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_of_a_layer_name_each_tensor_once(kind: str) -> None:
    rows: tuple[Row, ...] = LAYERS[kind]
    assert len({row.ours for row in rows}) == len({row.theirs for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("pattern", "changes"),
    [("ME*-ME", {}), ("ME*-", {"moe_latent_size": None}), ("M*-M", {})],
    ids=["latent", "plain-moe", "dense"],
)
def test_names_and_shapes_are_those_of_transformers(pattern: str, changes: dict) -> None:
    hf_config = hf_models.make_config(pattern, **(SIZES | changes))
    with torch.device("meta"):
        theirs = hf_models.NemotronHForCausalLM(hf_config).state_dict()
    expected = {
        published_name(leaf): tuple(piece.shape)
        for name, value in theirs.items()
        for leaf, piece in hf_models.unstack(name, value)
    }
    ours = {"latent": MODEL, "plain-moe": PLAIN_MOE, "dense": DENSE}
    kind = "dense" if "E" not in pattern else "plain-moe" if changes else "latent"
    config = replace(ours[kind], layer_pattern=pattern, mtp=None)
    found = {p.name: p.shape for entry in plan(config, dtype=BF16) for p in entry.pieces}
    assert found == expected


def test_mtp_names_are_those_of_the_published_layout() -> None:
    model = hf_models.make_model("M*", mtp_blocks=2, mtp_pattern="*E-M", **SIZES)
    expected = {name: tuple(v.shape) for name, v in hf_models.mtp_tensors(model).items()}
    found = {
        piece.name: piece.shape
        for entry in plan(MODEL, dtype=BF16)
        for piece in entry.pieces
        if piece.name.startswith("mtp.")
    }
    assert found == expected
    # Written out once: the layers of all blocks are counted on, the extras sit at both ends.
    for name in (
        "mtp.layers.0.enorm.weight",
        "mtp.layers.0.hnorm.weight",
        "mtp.layers.0.eh_proj.weight",
        "mtp.layers.0.mixer.q_proj.weight",
        "mtp.layers.1.mixer.experts.7.down_proj.weight",
        "mtp.layers.3.final_layernorm.weight",
        "mtp.layers.4.enorm.weight",
        "mtp.layers.7.mixer.A_log",
        "mtp.layers.7.final_layernorm.weight",
    ):
        assert name in found


@pytest.mark.parametrize(
    ("config", "mtp", "tensors", "elements", "biases"),
    [
        ("super_120b", None, 42_683, 123_611_033_088, 41),
        # Nemotron 3.5 Lightning: Nano 30B with an MTP block.
        ("nano_30b", MtpConfig(num_depths=2), 6_513, 32_913_266_240, 24),
        ("nano_4b", None, 263, 3_973_556_832, 0),
    ],
)
def test_full_size_plans_have_the_published_totals(
    config: str, mtp: MtpConfig | None, tensors: int, elements: int, biases: int
) -> None:
    model = load_config(f"configs/{config}.toml").model
    found = plan(replace(model, mtp=mtp or model.mtp), dtype=BF16)
    pieces = [piece for entry in found for piece in entry.pieces]
    assert len(pieces) == tensors
    assert sum(piece.numel for piece in pieces) == elements
    wide = [entry for entry in found if any(piece.is_router_bias for piece in entry.pieces)]
    assert len(wide) == biases
    assert {entry.dtype for entry in wide} <= {torch.float32}


def test_splitting_keeps_every_byte_in_order() -> None:
    by_name = {entry.name: entry for entry in plan(MODEL, dtype=torch.float32)}
    experts = by_name["blocks.1.mixer.experts.fc2"]
    value = torch.arange(8 * 20 * 24.0).view(8, 20, 24)
    for number, (piece, part) in enumerate(experts.split(value)):
        assert piece.name == f"backbone.layers.1.mixer.experts.{number}.down_proj.weight"
        assert torch.equal(part, value[number])
    conv = by_name["blocks.0.mixer.conv_weight"]
    value = torch.arange(128 * 4.0).view(128, 4)
    ((piece, part),) = conv.split(value)
    assert piece.shape == (128, 1, 4)
    assert torch.equal(part[:, 0], value)


def test_padding_of_the_vocabulary_is_left_out() -> None:
    by_name = {entry.name: entry for entry in without_padding(plan(MODEL, dtype=BF16), 90)}
    value = torch.randn(97, 48)
    for name in ("embedding.weight", "lm_head.weight"):
        ((piece, part),) = by_name[name].split(value)
        assert piece.shape == (90, 48)
        assert torch.equal(part, value[:90])


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("model.layers.3.mixer.D", "backbone.layers.3.mixer.D"),
        ("model.backbone.norm_f.weight", "backbone.norm_f.weight"),
        ("model.lm_head.weight", "lm_head.weight"),
        ("model.mtp.layers.0.enorm.weight", "mtp.layers.0.enorm.weight"),
        ("backbone.embedding.weight", "backbone.embeddings.weight"),
        ("model.embed_tokens.weight", "backbone.embeddings.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_other_spellings_are_read(name: str, published: str) -> None:
    assert published_name(name) == published
