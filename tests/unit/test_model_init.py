"""Initial weights: streams by name, the distribution of every kind, formats."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nemomodel.config.schema import AttentionConfig, MambaConfig, ModelConfig, MoeConfig, MtpConfig
from nemomodel.model.init import initialize
from nemomodel.model.nemotron import DTYPES, Nemotron

MODEL = ModelConfig(
    layer_pattern="ME*-MMM*",
    hidden_size=64,
    vocab_size=128,
    init_std=0.05,
    ffn_size=96,
    mamba=MambaConfig(num_heads=64, head_dim=2, num_groups=2, state_size=32),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16),
    moe=MoeConfig(num_experts=8, top_k=3, ffn_size=32, shared_ffn_size=48, latent_size=32),
    mtp=MtpConfig(num_depths=2, layer_pattern="M*E-", shared=False),
)
SIGMAS = 5
"""A correct draw is further off in one of 1.7 million checks; the seed is fixed."""


def build(
    config: ModelConfig = MODEL, *, seed: int = 1, dtype: torch.dtype = torch.float32
) -> Nemotron:
    model = Nemotron(config, dtype=dtype)
    initialize(model, seed=seed)
    return model


def leaf(name: str) -> str:
    return name.rpartition(".")[2]


def kind_of(name: str) -> str:
    if leaf(name) in ("A_log", "dt_bias", "D", "conv_weight", "conv_bias"):
        return leaf(name)
    if name.endswith("norm.weight"):
        return "norm"
    outputs = ("out_proj.weight", "fc2.weight", "experts.fc2", "latent_up.weight")
    return "output" if name.endswith(outputs) else "matrix"


def parameters(kind: str) -> dict[str, Tensor]:
    named = build().named_parameters()
    return {name: p.detach() for name, p in named if kind_of(name) == kind}


def assert_normal(value: Tensor, std: float, name: str) -> None:
    """Mean and variance within the spread that so many independent normal values have."""
    n = value.numel()
    assert abs(float(value.mean())) < SIGMAS * std / math.sqrt(n), name
    assert abs(float(value.var()) / std**2 - 1) < SIGMAS * math.sqrt(2 / n), name


def test_matrices_have_the_standard_deviation_of_the_config() -> None:
    named = parameters("matrix")
    assert {"embedding.weight", "lm_head.weight", "blocks.1.mixer.router.weight"} < named.keys()
    for name, value in named.items():
        assert_normal(value, 0.05, name)


def test_projections_into_the_residual_stream_are_smaller_by_the_root_of_the_layers() -> None:
    named = parameters("output")
    assert len(named) == 4 + 2 + 1 + 3 + 2 * (1 + 1 + 3 + 1)  # M, *, -, E; MTP: M, *, E, -
    for name, value in named.items():
        assert_normal(value, 0.05 / math.sqrt(8), name)


def test_norms_and_skips_are_one() -> None:
    named = parameters("norm") | parameters("D")
    assert all(bool((value == 1).all()) for value in named.values())


def test_decay_rates_are_uniform_between_1_and_16() -> None:
    for name, value in parameters("A_log").items():
        A_H = value.exp()
        assert float(A_H.min()) >= 1 - 1e-6, name
        assert float(A_H.max()) <= 16 * (1 + 1e-6), name
        assert float(A_H.max()) > 14, name  # of 64 draws: certain but for one in 15,000
        assert float(A_H.min()) < 3, name
        assert abs(float(A_H.mean()) - 8.5) < SIGMAS * 15 / math.sqrt(12 * 64), name


def test_time_steps_are_log_uniform_from_a_thousandth_to_a_tenth() -> None:
    for name, value in parameters("dt_bias").items():
        log_dt_H = torch.nn.functional.softplus(value.double()).log()
        assert math.log(1e-3) - 1e-4 <= float(log_dt_H.min()), name
        assert float(log_dt_H.max()) <= math.log(0.1) + 1e-4, name
        spread = math.log(100) / math.sqrt(12 * 64)
        assert abs(float(log_dt_H.mean()) - math.log(0.01)) < SIGMAS * spread, name


@pytest.mark.parametrize("kind", ["conv_weight", "conv_bias"])
@pytest.mark.parametrize("kernel", [2, 4])
def test_convolution_is_uniform_within_the_root_of_its_taps(kernel: int, kind: str) -> None:
    config = replace(MODEL, mamba=replace(MODEL.mamba, conv_kernel=kernel))
    bound = 1 / math.sqrt(kernel)
    for name, parameter in build(config).named_parameters():
        if leaf(name) != kind:
            continue
        value = parameter.detach()
        assert float(value.abs().max()) <= bound, name
        assert float(value.abs().max()) > 0.9 * bound, name
        spread = bound / math.sqrt(3)
        assert abs(float(value.mean())) < SIGMAS * spread / math.sqrt(value.numel()), name


def test_selection_biases_are_zero() -> None:
    buffers = dict(build().named_buffers())
    assert len(buffers) == 1 + 2
    assert all(bool((value == 0).all()) for value in buffers.values())


# --- streams -------------------------------------------------------------------------------


def test_the_seed_decides_every_weight() -> None:
    one, same, other = (build(seed=seed).state_dict() for seed in (1, 1, 2))
    for name, value in one.items():
        assert torch.equal(value, same[name]), name
        fixed = name.endswith(("norm.weight", ".D", "expert_bias"))
        assert torch.equal(value, other[name]) == fixed, name


def test_no_two_parameters_hold_the_same_values() -> None:
    drawn = [
        p.flatten()[:8].tolist()
        for name, p in build().named_parameters()
        if kind_of(name) not in ("norm", "D")
    ]
    assert len(drawn) == len({tuple(values) for values in drawn})


def test_values_do_not_depend_on_the_other_parameters() -> None:
    """Without MTP, with other later layers, after other random numbers: the same weights."""
    expected = build().state_dict()
    torch.rand(100)
    smaller = build(replace(MODEL, layer_pattern="ME*--MM*", mtp=None)).state_dict()
    common = [n for n in smaller if n in expected and not n.startswith("blocks.4.")]
    assert "lm_head.weight" in common
    assert "blocks.7.mixer.q_proj.weight" in common
    for name in common:
        assert torch.equal(smaller[name], expected[name]), name


def test_initialisation_leaves_the_global_random_stream_alone() -> None:
    state = torch.get_rng_state()
    build()
    assert torch.equal(torch.get_rng_state(), state)


def test_bf16_weights_are_the_fp32_ones_rounded() -> None:
    wide, narrow = build().state_dict(), build(dtype=torch.bfloat16).state_dict()
    for name, value in narrow.items():
        assert torch.equal(value, wide[name].to(value.dtype)), name


@pytest.mark.parametrize("recipe", DTYPES)
def test_what_enters_exponentials_and_the_selection_bias_are_fp32(recipe: str) -> None:
    for name, value in Nemotron(MODEL, dtype=DTYPES[recipe]).state_dict().items():
        wide = leaf(name) in ("A_log", "D", "dt_bias", "expert_bias")
        assert value.dtype == (torch.float32 if wide else DTYPES[recipe]), name
