"""The oracles against facts they were not written from: closed forms, torch, transformers."""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nemomodel.config.schema import (
    AttentionConfig,
    MambaConfig,
    ModelConfig,
    MoeConfig,
    MtpConfig,
    ScheduleConfig,
)
from tests.close import assert_close, rms_ratio
from tests.oracles import model as model_oracle
from tests.oracles.adamw import adamw_oracle, clip_oracle
from tests.oracles.attention import attention_oracle
from tests.oracles.conv import conv_oracle
from tests.oracles.loss import linear_cross_entropy_oracle, mtp_targets_oracle
from tests.oracles.moe import bias_update_oracle, moe_oracle, router_oracle, seq_aux_loss_oracle
from tests.oracles.norm import gated_group_rmsnorm_oracle, rmsnorm_oracle
from tests.oracles.schedule import lr_oracle
from tests.oracles.ssd import ssd_oracle
from tools.bigram import bigram_nats_per_token, document_pairs

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)
DOCUMENT_BS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1, 1, 1, 1]])


@pytest.fixture
def draw() -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)


def model_config(**changes: object) -> ModelConfig:
    config = ModelConfig(
        layer_pattern="ME*-M",
        hidden_size=16,
        vocab_size=23,
        ffn_size=20,
        mamba=MambaConfig(
            num_heads=4, head_dim=6, num_groups=2, state_size=5, conv_kernel=4, chunk_size=4
        ),
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=5),
        moe=MoeConfig(
            num_experts=8,
            top_k=3,
            ffn_size=10,
            shared_ffn_size=14,
            latent_size=7,
            num_groups=4,
            top_groups=2,
            routed_scaling_factor=2.5,
            aux_loss_coeff=0.1,
        ),
        mtp=MtpConfig(num_depths=2, layer_pattern="*E"),
    )
    return replace(config, **changes)


def batch(config: ModelConfig, *, rows: int = 2, length: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (rows, length + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


# --- close ---------------------------------------------------------------------------------


def test_ratio_is_relative_to_the_expected_size() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert rms_ratio(expected * 1.25, expected) == pytest.approx(0.25)
    assert rms_ratio(torch.zeros(2), torch.zeros(2)) == 0
    assert rms_ratio(torch.ones(2), torch.zeros(2)) == math.inf
    assert math.isnan(rms_ratio(torch.tensor([math.nan, 4.0]), expected))


@pytest.mark.parametrize(
    ("actual", "expected", "words"),
    [
        ([1.0, 2.0], [1.0, 2.5], r"1\.857e-01.*limit 1\.0e-06.*5\.000e-01 at \(1,\)"),
        ([1.0, math.nan], [1.0, 2.0], r"actual value has a NaN at \(1,\)"),
        ([1.0, 2.0], [1.0, math.nan], r"expected value has a NaN"),
        ([1.0, math.inf], [1.0, math.inf], r"actual value has an infinity"),
        ([0.0, 1e-30], [0.0, 0.0], r"RMS ratio inf"),
        ([1.0], [1.0, 1.0], r"shape \(1,\) is not the expected \(2,\)"),
    ],
    ids=["far", "nan", "nan-expected", "infinity", "expected-zero", "shape"],
)
def test_close_refuses(actual: list[float], expected: list[float], words: str) -> None:
    with pytest.raises(AssertionError, match=f"thing: .*{words}"):
        assert_close(torch.tensor(actual), torch.tensor(expected), limit=1e-6, name="thing")


def test_equal_infinities_pass_where_infinities_are_allowed() -> None:
    masked = torch.tensor([1.0, -math.inf])
    assert_close(masked, masked.clone(), limit=0, name="thing", finite=False)
    with pytest.raises(AssertionError, match="thing"):
        assert_close(-masked, masked, limit=1, name="thing", finite=False)


# --- mixers' operations --------------------------------------------------------------------


def ssd_inputs(draw: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    x_BSHP, B_BSGN, C_BSGN = draw(2, 9, 4, 3), draw(2, 9, 2, 5), draw(2, 9, 2, 5)
    return x_BSHP, functional.softplus(draw(2, 9, 4)), -draw(4).exp(), B_BSGN, C_BSGN, draw(4)


@pytest.mark.parametrize("document_BS", [None, DOCUMENT_BS], ids=["one-document", "packed"])
def test_ssd_equals_its_quadratic_form(draw: Callable, document_BS: Tensor | None) -> None:
    """y_s = sum_{t <= s} (C_s . B_t) exp(sum_{t < u <= s} dt_u A) dt_t x_t + D x_s."""
    x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H = ssd_inputs(draw)
    total_BSH = (dt_BSH * A_H).cumsum(1)
    decay_BSTH = (total_BSH[:, :, None] - total_BSH[:, None]).exp()
    seen_BST = torch.ones(9, 9).tril().bool().expand(2, 9, 9)
    if document_BS is not None:
        seen_BST = seen_BST & (document_BS[:, :, None] == document_BS[:, None])
    B_BSHN, C_BSHN = (v.repeat_interleave(2, dim=2) for v in (B_BSGN, C_BSGN))
    score_BSTH = torch.einsum("bshn,bthn->bsth", C_BSHN, B_BSHN) * decay_BSTH
    score_BSTH = score_BSTH * seen_BST[..., None]
    expected = torch.einsum("bsth,bth,bthp->bshp", score_BSTH, dt_BSH, x_BSHP)
    expected = expected + D_H[:, None] * x_BSHP
    actual = ssd_oracle(x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H, document_BS=document_BS)
    assert_close(actual, expected, limit=1e-13, name="y")


def test_ssd_of_constant_input_is_the_geometric_sum() -> None:
    """One channel and state, all inputs 1: y_s = dt (1 + q + ... + q^s) + D with q = exp(dt A)."""
    one_BS11 = torch.ones(1, 6, 1, 1, dtype=torch.float64)
    dt, A, D = 0.3, -0.7, 2.0
    actual = ssd_oracle(
        one_BS11,
        torch.full((1, 6, 1), dt, dtype=torch.float64),
        torch.tensor([A], dtype=torch.float64),
        one_BS11,
        one_BS11,
        torch.tensor([D], dtype=torch.float64),
    )
    q = math.exp(dt * A)
    expected = [dt * (1 - q ** (s + 1)) / (1 - q) + D for s in range(6)]
    assert actual.flatten().tolist() == pytest.approx(expected, rel=1e-13)


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "linear"])
def test_conv_equals_conv1d(draw: Callable, silu: bool) -> None:
    x_BSC, weight, bias = draw(2, 9, 6), draw(6, 4), draw(6)
    expected = functional.conv1d(
        functional.pad(x_BSC.transpose(1, 2), (3, 0)), weight[:, None], bias, groups=6
    ).transpose(1, 2)
    expected = functional.silu(expected) if silu else expected
    assert_close(conv_oracle(x_BSC, weight, bias, silu=silu), expected, limit=1e-14, name="y")


def test_packed_conv_equals_conv_of_each_document(draw: Callable) -> None:
    x_BSC, weight, bias = draw(2, 9, 6), draw(6, 4), draw(6)
    packed = conv_oracle(x_BSC, weight, bias, document_BS=DOCUMENT_BS)
    for b, start, end in [(0, 0, 3), (0, 3, 8), (0, 8, 9), (1, 0, 1), (1, 1, 9)]:
        alone = conv_oracle(x_BSC[b : b + 1, start:end], weight, bias)
        assert_close(packed[b : b + 1, start:end], alone, limit=0, name=f"row {b} from {start}")


def test_norms_equal_torch(draw: Callable) -> None:
    x, z, weight = draw(2, 3, 12), draw(2, 3, 12), draw(12)
    expected = functional.rms_norm(x, (12,), weight, eps=1e-5)
    assert_close(rmsnorm_oracle(x, weight, eps=1e-5), expected, limit=1e-14, name="plain")
    gated = (x * functional.silu(z)).unflatten(-1, (3, 4))
    expected = functional.rms_norm(gated, (4,), eps=1e-5).flatten(-2) * weight
    actual = gated_group_rmsnorm_oracle(x, z, weight, eps=1e-5, num_groups=3)
    assert_close(actual, expected, limit=1e-14, name="gated")


@pytest.mark.parametrize("document_BS", [None, DOCUMENT_BS], ids=["one-document", "packed"])
def test_attention_equals_torch(draw: Callable, document_BS: Tensor | None) -> None:
    q_BSHP, k_BSGP, v_BSGP = draw(2, 9, 6, 5), draw(2, 9, 2, 5), draw(2, 9, 2, 5)
    seen_BST = torch.ones(9, 9).tril().bool().expand(2, 9, 9)
    if document_BS is not None:
        seen_BST = seen_BST & (document_BS[:, :, None] == document_BS[:, None])
    q, k, v = (t.transpose(1, 2) for t in (q_BSHP, k_BSGP, v_BSGP))
    expected = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen_BST[:, None], enable_gqa=True
    ).transpose(1, 2)
    actual = attention_oracle(q_BSHP, k_BSGP, v_BSGP, document_BS=document_BS)
    assert_close(actual, expected, limit=1e-13, name="y")


def test_operations_have_their_gradients(draw: Callable) -> None:
    def inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.clone().requires_grad_() for tensor in tensors)

    x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H = (
        v[:1, :3, :2] if v.dim() > 1 else v[:2] for v in ssd_inputs(draw)
    )
    document_BS = torch.tensor([[0, 0, 1]])
    assert torch.autograd.gradcheck(
        lambda *a: ssd_oracle(*a, document_BS=document_BS),
        inputs(x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H),
    )
    assert torch.autograd.gradcheck(
        lambda *a: conv_oracle(*a, document_BS=document_BS),
        inputs(draw(1, 3, 2), draw(2, 4), draw(2)),
    )
    assert torch.autograd.gradcheck(
        lambda *a: gated_group_rmsnorm_oracle(*a, eps=1e-5, num_groups=2),
        inputs(draw(2, 4), draw(2, 4), draw(4)),
    )
    assert torch.autograd.gradcheck(
        attention_oracle, inputs(draw(1, 3, 2, 2), draw(1, 3, 1, 2), draw(1, 3, 1, 2))
    )


# --- mixture of experts --------------------------------------------------------------------


def test_choosing_all_experts_is_the_dense_mixture(draw: Callable) -> None:
    config = MoeConfig(
        num_experts=4, top_k=4, ffn_size=5, shared_ffn_size=3, routed_scaling_factor=2.0
    )
    params = {
        "router.weight": draw(4, 6),
        "router.expert_bias": draw(4),
        "experts.fc1": draw(4, 5, 6),
        "experts.fc2": draw(4, 6, 5),
        "shared_expert.fc1.weight": draw(3, 6),
        "shared_expert.fc2.weight": draw(6, 3),
    }
    x_BSD = draw(2, 5, 6)
    y_BSD, count_E, aux = moe_oracle(x_BSD, params, config, aux_loss_coeff=0.01)
    gate_BSE = torch.sigmoid(x_BSD @ params["router.weight"].T)
    gate_BSE = 2 * gate_BSE / gate_BSE.sum(-1, keepdim=True)
    inner = torch.einsum("efd,bsd->bsef", params["experts.fc1"], x_BSD).relu().square()
    expected = torch.einsum("bse,edf,bsef->bsd", gate_BSE, params["experts.fc2"], inner)
    shared = (x_BSD @ params["shared_expert.fc1.weight"].T).relu().square()
    expected = expected + shared @ params["shared_expert.fc2.weight"].T
    assert_close(y_BSD, expected, limit=1e-13, name="y")
    assert count_E.tolist() == [10] * 4
    # Equal counts make every f_e one, and the P_e add up to one: coeff per sequence.
    assert float(aux) == pytest.approx(2 * 0.01, rel=1e-13)


def test_router_follows_bias_and_groups_but_weighs_without_bias() -> None:
    """Four groups of two. By score group 0 is best; the bias brings groups 2 and 3 forward."""
    score = torch.tensor([0.9, 0.8, 0.5, 0.1, 0.4, 0.3, 0.6, 0.2], dtype=torch.float64)
    bias = torch.tensor([-1.0, -1.0, 0, 0, 0.5, 0.5, 0.5, 0], dtype=torch.float64)
    # Biased: 0: -.1 -.2 | 1: .5 .1 | 2: .9 .8 | 3: 1.1 .2, groups rank -.3, .6, 1.7, 1.3.
    gate_TK, expert_TK, score_TE = router_oracle(
        torch.ones(1, 1, dtype=torch.float64),
        torch.logit(score)[:, None],
        bias,
        top_k=3,
        num_groups=4,
        top_groups=2,
        normalize_gates=True,
        routed_scaling_factor=5.0,
    )
    assert expert_TK.tolist() == [[6, 4, 5]]
    assert gate_TK[0].tolist() == pytest.approx([5 * s / 1.3 for s in (0.6, 0.4, 0.3)], rel=1e-12)
    assert_close(score_TE[0], score, limit=1e-14, name="score")


def test_auxiliary_loss_of_a_collapsed_router() -> None:
    """All of a sequence's tokens at one expert with score share p: coeff * E * p."""
    score_BSE = torch.tensor([0.6, 0.1, 0.1], dtype=torch.float64).expand(2, 5, 3)
    loss = seq_aux_loss_oracle(score_BSE, torch.zeros(2, 5, 1, dtype=torch.int64), coeff=0.1)
    assert float(loss) == pytest.approx(2 * 0.1 * 3 * 0.75, rel=1e-13)


def test_bias_moves_towards_balance() -> None:
    bias = bias_update_oracle(torch.ones(4), torch.tensor([0, 4, 8, 4]), rate=0.25)
    assert bias.tolist() == [1.25, 1.0, 0.75, 1.0]


# --- loss ----------------------------------------------------------------------------------


def test_cross_entropy_equals_torch(draw: Callable) -> None:
    x_TD, head = draw(6, 4), 30 * draw(9, 4)
    label_T, weight_T = torch.tensor([0, 8, 3, -100, 1, 1]), torch.tensor([1, 2, 1, 0, 0.5, 1])
    each = functional.cross_entropy(x_TD @ head.T, label_T, reduction="none", ignore_index=-100)
    actual = linear_cross_entropy_oracle(x_TD, head, label_T, weight_T)
    assert_close(actual, (each * weight_T).sum(), limit=1e-13, name="loss")


def test_mtp_targets_stay_in_row_mask_and_document() -> None:
    labels_BS = torch.arange(10, 19)[None]
    mask_BS = torch.ones(1, 9, dtype=torch.bool)
    mask_BS[0, 5] = False
    label_BS, valid_BS = mtp_targets_oracle(
        labels_BS, mask_BS, depth=2, document_BS=DOCUMENT_BS[:1]
    )
    assert valid_BS.long().tolist() == [[1, 0, 0, 0, 1, 1, 0, 0, 0]]
    assert label_BS[valid_BS].tolist() == [12, 16, 17]
    label_BS, valid_BS = mtp_targets_oracle(labels_BS, mask_BS, depth=0)
    assert torch.equal(valid_BS, mask_BS)
    assert torch.equal(label_BS[mask_BS], labels_BS[mask_BS])


# --- whole model ---------------------------------------------------------------------------


def transformers_model(config: ModelConfig, params: dict[str, Tensor]) -> torch.nn.Module:
    """NemotronHForCausalLM in float64 with our weights, without MTP and without its dt clamp."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    m, a, e = config.mamba, config.attention, config.moe
    model = NemotronHForCausalLM(
        NemotronHConfig(
            hybrid_override_pattern=config.layer_pattern,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.ffn_size,
            num_attention_heads=a.num_heads,
            num_key_value_heads=a.num_kv_heads,
            head_dim=a.head_dim,
            ssm_state_size=m.state_size,
            mamba_num_heads=m.num_heads,
            mamba_head_dim=m.head_dim,
            n_groups=m.num_groups,
            conv_kernel=m.conv_kernel,
            chunk_size=m.chunk_size,
            n_routed_experts=e.num_experts,
            num_experts_per_tok=e.top_k,
            moe_intermediate_size=e.ffn_size,
            moe_shared_expert_intermediate_size=e.shared_ffn_size,
            moe_latent_size=e.latent_size,
            routed_scaling_factor=e.routed_scaling_factor,
            n_group=e.num_groups,
            topk_group=e.top_groups,
            norm_topk_prob=e.normalize_gates,
            layer_norm_epsilon=config.norm_eps,
            experts_implementation="eager",
        )
    ).double()
    model.load_state_dict(transformers_names(config, params))
    for layer in model.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (0.0, math.inf)
    return model.eval()


def transformers_names(config: ModelConfig, params: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "embedding.weight": "model.embeddings.weight",
        "final_norm.weight": "model.norm_f.weight",
        "lm_head.weight": "lm_head.weight",
    }
    tails = {
        "fc1.weight": "up_proj.weight",
        "fc2.weight": "down_proj.weight",
        "conv_bias": "conv1d.bias",
        "router.weight": "gate.weight",
        "router.expert_bias": "gate.e_score_correction_bias",
        "latent_down.weight": "fc1_latent_proj.weight",
        "latent_up.weight": "fc2_latent_proj.weight",
        "experts.fc1": "experts.up_proj",
        "experts.fc2": "experts.down_proj",
        "shared_expert.fc1.weight": "shared_experts.up_proj.weight",
        "shared_expert.fc2.weight": "shared_experts.down_proj.weight",
    }
    state = {}
    for name, value in params.items():
        if name in names:
            state[names[name]] = value
            continue
        head, tail = name.split(".mixer.") if ".mixer." in name else (name, None)
        at = head.replace("blocks.", "model.layers.")
        if tail is None:
            state[at] = value
        elif tail == "conv_weight":
            state[f"{at}.mixer.conv1d.weight"] = value[:, None]
        elif tail == "out_proj.weight" and f"{head}.mixer.q_proj.weight" in params:
            state[f"{at}.mixer.o_proj.weight"] = value
        else:
            state[f"{at}.mixer.{tails.get(tail, tail)}"] = value
    return state


class Float64Torch:
    """The torch module with float32 meaning float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> object:
        return getattr(torch, name)


@pytest.fixture
def transformers_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code casts to float32 in norms, router and scan; there the casts go to float64."""
    from transformers.models.nemotron_h import modeling_nemotron_h

    monkeypatch.setattr(modeling_nemotron_h, "torch", Float64Torch())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


VARIANTS = {
    "latent": {},
    "plain-moe": {"latent_size": None, "num_groups": 1, "top_groups": 1, "top_k": 2},
    "raw-gates": {"normalize_gates": False, "num_groups": 2, "top_groups": 1},
}


@needs_transformers
@pytest.mark.usefixtures("transformers_in_float64")
@pytest.mark.parametrize("moe_changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_model_and_gradients_equal_transformers(moe_changes: dict) -> None:
    config = model_config(mtp=None)
    config = replace(config, moe=replace(config.moe, **moe_changes))
    params = model_oracle.random_params(config, seed=2)
    ids_BS, labels_BS = batch(config, length=11)
    theirs = transformers_model(config, params)
    logits = theirs(ids_BS, use_cache=False).logits
    for value in params.values():
        value.requires_grad_()
    ours = model_oracle.forward(params, config, ids_BS)
    assert_close(ours["logits_BSV"], logits, limit=1e-10, name="logits")
    assert sum(ours["counts"]["blocks.1.mixer.router"]) == ids_BS.numel() * config.moe.top_k

    functional.cross_entropy(logits.flatten(0, 1), labels_BS.flatten()).backward()
    functional.cross_entropy(ours["logits_BSV"].flatten(0, 1), labels_BS.flatten()).backward()
    their_grads = {name: value.grad for name, value in theirs.named_parameters()}
    our_grads = {name: v.grad for name, v in params.items() if not name.endswith("expert_bias")}
    for name, grad in transformers_names(config, our_grads).items():
        assert_close(grad, their_grads.pop(name), limit=1e-10, name=f"gradient of {name}")
    assert not their_grads


@needs_transformers
def test_model_equals_unchanged_transformers() -> None:
    config = model_config(mtp=None)
    params = model_oracle.random_params(config, seed=2)
    ids_BS, _ = batch(config, length=11)
    logits = transformers_model(config, params)(ids_BS, use_cache=False).logits
    ours = model_oracle.forward(params, config, ids_BS)["logits_BSV"]
    assert_close(ours, logits, limit=1e-5, name="logits")


@needs_transformers
@pytest.mark.usefixtures("transformers_in_float64")
@pytest.mark.parametrize("moe_changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_router_and_moe_equal_transformers(draw: Callable, moe_changes: dict) -> None:
    config = model_config(mtp=None)
    config = replace(config, moe=replace(config.moe, **moe_changes))
    params = model_oracle.random_params(config, seed=3)
    theirs = transformers_model(config, params).model.layers[1].mixer
    ours = {
        name.removeprefix("blocks.1.mixer."): value
        for name, value in params.items()
        if name.startswith("blocks.1.mixer.")
    }
    x_BSD, e = draw(4, 20, config.hidden_size), config.moe
    gate_TK, expert_TK, _ = router_oracle(
        x_BSD.flatten(0, 1),
        ours["router.weight"],
        ours["router.expert_bias"],
        top_k=e.top_k,
        num_groups=e.num_groups,
        top_groups=e.top_groups,
        normalize_gates=e.normalize_gates,
        routed_scaling_factor=e.routed_scaling_factor,
    )
    _, weights, indices = theirs.gate(x_BSD)
    order, their_order = expert_TK.argsort(dim=1), indices.argsort(dim=1)
    assert torch.equal(expert_TK.gather(1, order), indices.gather(1, their_order))
    assert_close(
        gate_TK.gather(1, order), weights.gather(1, their_order), limit=1e-13, name="gates"
    )
    y_BSD, count_E, _ = moe_oracle(x_BSD, ours, e, aux_loss_coeff=0.0)
    assert_close(y_BSD, theirs(x_BSD), limit=1e-12, name="y")
    assert torch.equal(count_E, indices.flatten().bincount(minlength=e.num_experts))


def test_softplus_equals_torch_with_its_gradient() -> None:
    x = torch.tensor([-40.0, -1.0, 0.0, 1.0, 15.0], dtype=torch.float64, requires_grad=True)
    ours, theirs = model_oracle.softplus(x), functional.softplus(x)
    assert_close(ours, theirs, limit=1e-14, name="value")
    (ours_grad,) = torch.autograd.grad(ours.sum(), x)
    assert_close(ours_grad, torch.sigmoid(x), limit=1e-14, name="gradient")


def test_time_step_clamp_changes_small_steps_only() -> None:
    config = model_config(layer_pattern="M", moe=None, attention=None, ffn_size=None, mtp=None)
    params = model_oracle.random_params(config, seed=4)
    ids_BS, _ = batch(config)

    def logits(dt_min: float, dt_bias: float) -> Tensor:
        changed = replace(config, mamba=replace(config.mamba, dt_min=dt_min))
        bias = {"blocks.0.mixer.dt_bias": torch.full((4,), dt_bias, dtype=torch.float64)}
        return model_oracle.forward(params | bias, changed, ids_BS)["logits_BSV"]

    assert torch.equal(logits(1e-3, 10.0), logits(0.0, 10.0))
    assert rms_ratio(logits(1e-3, -20.0), logits(0.0, -20.0)) > 1e-4
    assert torch.equal(logits(1e-3, -30.0), logits(1e-3, -40.0))


def test_packed_documents_equal_documents_alone() -> None:
    config = model_config()
    params = model_oracle.random_params(config, seed=5)
    ids_BS, _ = batch(config, rows=1)
    packed = model_oracle.forward(params, config, ids_BS, DOCUMENT_BS[:1])
    for start, end in [(0, 3), (3, 8), (8, 9)]:
        alone = model_oracle.forward(params, config, ids_BS[:, start:end])
        pairs = zip(
            [packed["logits_BSV"], *packed["mtp_logits"]],
            [alone["logits_BSV"], *alone["mtp_logits"]],
            strict=True,
        )
        for depth, (together, single) in enumerate(pairs):
            name = f"depth {depth} from {start}"
            assert_close(together[:, start:end], single, limit=1e-12, name=name)


def test_mtp_depth_sees_exactly_its_tokens_ahead() -> None:
    config = model_config()
    params = model_oracle.random_params(config, seed=6)
    ids_BS, _ = batch(config, rows=1)
    other_BS = ids_BS.clone()
    other_BS[0, 6] = (other_BS[0, 6] + 1) % config.vocab_size
    before = model_oracle.forward(params, config, ids_BS)
    after = model_oracle.forward(params, config, other_BS)
    heads = zip(
        [before["logits_BSV"], *before["mtp_logits"]],
        [after["logits_BSV"], *after["mtp_logits"]],
        strict=True,
    )
    for depth, (old_BSV, new_BSV) in enumerate(heads):
        same_S = (old_BSV == new_BSV).all(dim=-1)[0]
        assert same_S.tolist() == [i < 6 - depth for i in range(9)], f"depth {depth}"


def test_mtp_block_by_hand() -> None:
    """Mixers silenced (zero output projections), the block is two norms, eh_proj and a norm."""
    config = model_config(mtp=MtpConfig(num_depths=2, layer_pattern="*-", shared=False))
    params = model_oracle.random_params(config, seed=7)
    for name in params:
        if name.startswith("mtp.") and name.endswith(("out_proj.weight", "fc2.weight")):
            params[name] = torch.zeros_like(params[name])
    ids_BS, _ = batch(config)
    result = model_oracle.forward(params, config, ids_BS)
    h_BSD = result["hidden_BSD"]
    for k in (1, 2):
        at = f"mtp.blocks.{k - 1}."
        ahead_BSD = functional.pad(params["embedding.weight"][ids_BS[:, k:]], (0, 0, 0, k))
        e_BSD = functional.rms_norm(
            ahead_BSD, (16,), params[at + "embedding_norm.weight"], eps=1e-5
        )
        n_BSD = functional.rms_norm(h_BSD, (16,), params[at + "hidden_norm.weight"], eps=1e-5)
        from_e, from_h = params[at + "eh_proj.weight"].split(16, dim=1)
        u_BSD = e_BSD @ from_e.T + n_BSD @ from_h.T
        h_BSD = functional.rms_norm(u_BSD, (16,), params[at + "final_norm.weight"], eps=1e-5)
        assert_close(result["mtp_hidden"][k - 1], h_BSD, limit=1e-12, name=f"h_{k}")
        logits_BSV = h_BSD @ params["lm_head.weight"].T
        assert_close(result["mtp_logits"][k - 1], logits_BSV, limit=1e-12, name=f"logits {k}")


def test_shared_mtp_block_equals_copies_of_it() -> None:
    shared = model_config()
    copies = model_config(mtp=replace(shared.mtp, shared=False))
    params = model_oracle.random_params(shared, seed=8)
    doubled = params | {
        name.replace("mtp.blocks.0.", "mtp.blocks.1."): value
        for name, value in params.items()
        if name.startswith("mtp.")
    }
    assert doubled.keys() == model_oracle.param_shapes(copies).keys()
    ids_BS, _ = batch(shared)
    one = model_oracle.forward(params, shared, ids_BS)
    two = model_oracle.forward(doubled, copies, ids_BS)
    for ours, theirs in zip(one["mtp_logits"], two["mtp_logits"], strict=True):
        assert torch.equal(ours, theirs)
    name, other = (f"mtp.blocks.{j}.layers.1.mixer.router" for j in (0, 1))
    assert torch.equal(one["counts"][name], two["counts"][name] + two["counts"][other])
    # A shared block's coefficient is divided by the number of depths.
    assert_close(
        2 * one["aux"][name], two["aux"][name] + two["aux"][other], limit=1e-13, name="aux"
    )


def test_loss_of_a_silent_head_is_log_vocab() -> None:
    config = model_config()
    params = model_oracle.random_params(config, seed=9)
    params["lm_head.weight"] = torch.zeros_like(params["lm_head.weight"])
    ids_BS, labels_BS = batch(config)
    mask_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    mask_BS[1, 3:] = False
    terms = model_oracle.loss_terms(params, config, ids_BS, labels_BS, mask_BS, DOCUMENT_BS)
    # Row 0 has documents of 3, 5 and 1 positions; row 1 of 1 and 8, its mask ends at 3.
    assert terms["num_targets"] == [9 + 3, 2 + 4 + 1, 1 + 3]
    expected = math.log(config.vocab_size) * (1 + config.mtp.loss_scale)
    assert float(terms["total"] - terms["aux_sum"] / 2) == pytest.approx(expected, rel=1e-12)
    total = model_oracle.loss(params, config, ids_BS, labels_BS, mask_BS, DOCUMENT_BS)
    assert torch.equal(total, terms["total"])


def test_depth_without_targets_adds_nothing() -> None:
    config = model_config(mtp=MtpConfig(num_depths=2, layer_pattern="*", shared=False))
    params = model_oracle.random_params(config, seed=10)
    for value in params.values():
        value.requires_grad_()
    ids_BS, labels_BS = batch(config, length=2)
    terms = model_oracle.loss_terms(params, config, ids_BS, labels_BS, torch.ones(2, 2))
    assert terms["num_targets"] == [4, 2, 0]
    expected = terms["ce_sums"][0] / 4 + 0.3 / 2 * terms["ce_sums"][1] / 2 + terms["aux_sum"] / 2
    assert_close(terms["total"], expected, limit=1e-14, name="loss")
    terms["total"].backward()
    assert not params["mtp.blocks.1.eh_proj.weight"].grad.any()
    assert params["mtp.blocks.0.eh_proj.weight"].grad.any()


def test_loss_has_its_gradient() -> None:
    """Along one random direction through all parameters, against a central difference."""
    config = model_config()
    params = model_oracle.random_params(config, seed=11)
    ids_BS, labels_BS = batch(config, rows=2, length=6)
    mask_BS = torch.ones_like(ids_BS)
    direction = model_oracle.random_params(config, seed=12)

    def loss_at(distance: float) -> Tensor:
        moved = {
            name: value if name.endswith("expert_bias") else value + distance * direction[name]
            for name, value in params.items()
        }
        return model_oracle.loss(moved, config, ids_BS, labels_BS, mask_BS, DOCUMENT_BS[:, :6])

    distance = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss_at(distance).backward()
    with torch.no_grad():
        slope = (loss_at(1e-6) - loss_at(-1e-6)) / 2e-6
    assert float(distance.grad) == pytest.approx(float(slope), rel=1e-6)


# --- optimizer, schedule, bigram -----------------------------------------------------------


def test_adamw_equals_torch(draw: Callable) -> None:
    start = {"matrix": draw(3, 4), "vector": draw(5)}
    steps = [{"matrix": draw(3, 4), "vector": draw(5)} for _ in range(6)]
    rates = [0.1, 0.2, 0.3, 0.2, 0.1, 0.05]
    theirs = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    groups = [
        {"params": [theirs["matrix"]], "weight_decay": 0.1},
        {"params": [theirs["vector"]], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for grads, lr in zip(steps, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr
        for name, param in theirs.items():
            param.grad = grads[name].clone()
        torch.nn.utils.clip_grad_norm_(theirs.values(), 3.0)
        optimizer.step()
    ours = adamw_oracle(
        start,
        steps,
        lr=rates,
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        weight_decay=0.1,
        grad_clip=3.0,
    )
    for name, param in theirs.items():
        assert_close(ours[name], param, limit=1e-13, name=name)


def test_clipping_leaves_small_gradients_alone() -> None:
    grads = {"a": torch.tensor([3.0], dtype=torch.float64), "b": torch.tensor([[4.0]]).double()}
    same, norm = clip_oracle(grads, max_norm=10.0)
    assert norm == 5
    assert same == grads
    clipped, _ = clip_oracle(grads, max_norm=1.0)
    assert float(clipped["b"]) == pytest.approx(0.8, rel=1e-6)
    assert clip_oracle(grads, max_norm=None)[0] == grads


def test_schedules_at_known_steps() -> None:
    def rates(kind: str, decay_steps: int | None, *at: int) -> list[float]:
        schedule = ScheduleConfig(kind=kind, warmup_steps=4, decay_steps=decay_steps)
        return [lr_oracle(n, schedule, max_lr=1.0, min_lr=0.2, steps=20) for n in at]

    assert rates("wsd", 4, 1, 2, 4, 5, 16) == [0.25, 0.5, 1, 1, 1]
    assert rates("wsd", 4, 17, 20) == pytest.approx([0.2 + 0.8 * 0.5, 0.2])
    assert rates("wsd", 16, 4, 8, 20) == pytest.approx([1, 0.2 + 0.8 * 0.5, 0.2])
    assert rates("cosine", None, 2, 4, 12, 20) == pytest.approx([0.5, 1, 0.6, 0.2])
    assert rates("constant", None, 1, 4, 20) == [0.25, 1, 1]


def test_bigram_pairs_stop_at_document_ends() -> None:
    first, second = document_pairs(np.arange(6, dtype=np.uint16), np.array([3, 0, 1, 2]))
    assert first.tolist() == [0, 1, 4]
    assert second.tolist() == [1, 2, 5]


def test_bigram_finds_the_entropy_of_a_markov_chain() -> None:
    """Each token has two equally likely successors: log 2 nats, and log V without context."""
    rng = np.random.default_rng(0)
    V, length = 50, 200_000
    coins = rng.integers(0, 2, length)
    ids = np.cumsum(1 + 6 * coins) % V
    lengths = np.full(length // 100, 100)
    half, documents = length // 2, len(lengths) // 2
    nats = bigram_nats_per_token(
        ids[:half], lengths[:documents], ids[half:], lengths[documents:], vocab_size=V
    )
    assert math.log(2) - 0.002 < nats < math.log(2) + 0.005
    noise = rng.integers(0, V, length)
    nats = bigram_nats_per_token(
        noise[:half], lengths[:documents], noise[half:], lengths[documents:], vocab_size=V
    )
    assert math.log(V) - 0.005 < nats < math.log(V) + 0.005
