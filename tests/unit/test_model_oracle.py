"""The whole model against its oracle: logits of every head, loss, counts, all gradients."""

from collections import defaultdict
from dataclasses import replace
from statistics import median

import pytest
import torch
from torch import Tensor

from nemomodel.config.schema import AttentionConfig, MambaConfig, ModelConfig, MoeConfig, MtpConfig
from nemomodel.model.moe import LatentMoE, Router
from nemomodel.model.mtp import shift
from nemomodel.model.nemotron import Losses, Nemotron
from nemomodel.ops.documents import Documents
from tests.close import assert_close, rms_ratio
from tests.oracles import model as model_oracle
from tests.oracles.loss import mtp_targets_oracle
from tests.oracles.moe import bias_update_oracle, ffn_oracle, router_oracle

LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}
LENGTH = 7
DOCUMENT_BS = torch.tensor([[0, 0, 0, 1, 1, 1, 2], [0, 1, 1, 1, 1, 1, 1]])

MAMBA = MambaConfig(num_heads=4, head_dim=6, num_groups=2, state_size=5, chunk_size=3)
MOE = MoeConfig(
    num_experts=8,
    top_k=3,
    ffn_size=10,
    shared_ffn_size=14,
    latent_size=7,
    routed_scaling_factor=2.5,
    aux_loss_coeff=0.1,
)
MODEL = ModelConfig(
    layer_pattern="ME*-",
    hidden_size=16,
    vocab_size=23,
    ffn_size=20,
    mamba=MAMBA,
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=5),
    moe=MOE,
    mtp=MtpConfig(num_depths=2, layer_pattern="*E"),
)
GROUPS = replace(MOE, num_groups=4, top_groups=2)


def with_mtp(**changes: object) -> ModelConfig:
    return replace(MODEL, mtp=replace(MODEL.mtp, **changes))


CONFIGS = {
    "all-kinds": MODEL,
    "mamba": replace(MODEL, layer_pattern="MM", mtp=None),
    "attention": replace(MODEL, layer_pattern="*", mtp=None),
    "moe": replace(MODEL, layer_pattern="E", mtp=None),
    "mlp": replace(MODEL, layer_pattern="-", mtp=None),
    "without-latent": replace(MODEL, moe=replace(MOE, latent_size=None)),
    "group-limited": replace(MODEL, moe=GROUPS),
    "one-group-of-four": replace(MODEL, moe=replace(GROUPS, top_groups=1, top_k=2)),
    "raw-gates": replace(MODEL, moe=replace(MOE, normalize_gates=False)),
    "top-1": replace(MODEL, moe=replace(MOE, top_k=1)),
    "all-experts": replace(MODEL, moe=replace(MOE, top_k=8)),
    "without-balance": replace(MODEL, moe=replace(MOE, aux_loss_coeff=0.0)),
    "clamped-steps": replace(MODEL, mamba=replace(MAMBA, dt_min=0.3)),
    "kernel-2": replace(MODEL, mamba=replace(MAMBA, conv_kernel=2)),
    "one-group": replace(MODEL, mamba=replace(MAMBA, num_groups=1)),
    "without-mtp": replace(MODEL, mtp=None),
    "mtp-1": with_mtp(num_depths=1),
    "mtp-3-shared": with_mtp(num_depths=3),
    "mtp-3-separate": with_mtp(num_depths=3, shared=False),
    "mtp-of-all-kinds": with_mtp(layer_pattern="M*-E", loss_scale=0.7),
    "other-eps": replace(MODEL, norm_eps=1e-2),
}


def build(config: ModelConfig, params: dict[str, Tensor], dtype: torch.dtype) -> Nemotron:
    model = Nemotron(config, dtype=dtype)
    model.load_state_dict(params)
    return model


def draw_batch(config: ModelConfig, length: int = LENGTH) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, labels, and a mask that leaves the two rows unequal numbers of targets."""
    tokens = torch.randint(config.vocab_size, (2, length + 1))
    mask_BS = torch.rand(2, length) > 0.3
    mask_BS[1, length // 2 :] = False
    return tokens[:, :-1], tokens[:, 1:], mask_BS


def documents_of(document_BS: Tensor | None) -> Documents | None:
    return None if document_BS is None else Documents.from_ids(document_BS)


def run_losses(
    model: Nemotron,
    batch: tuple[Tensor, Tensor, Tensor],
    documents: Documents | None,
) -> Losses:
    return model.losses(
        *batch,
        documents,
        num_targets=model.num_targets(batch[2], documents),
        num_sequences=len(batch[0]),
    )


def check_against_oracle(
    config: ModelConfig,
    batch: tuple[Tensor, Tensor, Tensor],
    document_BS: Tensor | None,
    dtype: torch.dtype = torch.float64,
) -> None:
    limit, documents = LIMITS[dtype], documents_of(document_BS)
    params = model_oracle.random_params(config, seed=1, dtype=dtype)
    model = build(config, params, dtype)
    exact = {name: value.double().requires_grad_() for name, value in params.items()}
    terms = model_oracle.loss_terms(exact, config, *batch, document_BS)

    logits_BSV = model(batch[0], documents)
    assert_close(logits_BSV, terms["logits_BSV"], limit=limit, name="logits")
    if config.mtp:
        pairs = zip(model.mtp_logits(batch[0], documents), terms["mtp_logits"], strict=True)
        for depth, (actual, expected) in enumerate(pairs, 1):
            assert_close(actual, expected, limit=limit, name=f"logits of depth {depth}")

    assert model.num_targets(batch[2], documents).tolist() == terms["num_targets"]
    losses = run_losses(model, batch, documents)
    assert_close(losses.total, terms["total"], limit=limit, name="loss")
    assert_close(model.loss(*batch, documents), terms["total"], limit=limit, name="loss()")
    for head, (actual, expected) in enumerate(
        zip(losses.cross_entropy, terms["ce_sums"], strict=True)
    ):
        assert_close(actual, expected, limit=limit, name=f"cross-entropy of head {head}")
    assert_close(losses.balance, terms["aux_sum"] / len(batch[0]), limit=limit, name="balance")
    for name, count_E in zip(model.routers(), losses.count, strict=True):
        assert count_E.tolist() == terms["counts"].pop(name).tolist(), name
    assert not terms["counts"]

    losses.total.backward()
    terms["total"].backward()
    for name, parameter in model.named_parameters():
        expected = exact[name].grad
        assert_close(parameter.grad, expected, limit=limit, name=f"gradient of {name}")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_model_equals_the_oracle(config: ModelConfig) -> None:
    check_against_oracle(config, draw_batch(config), DOCUMENT_BS)


@pytest.mark.parametrize("name", ["all-kinds", "mamba", "attention", "mtp-3-separate"])
def test_model_without_documents_equals_the_oracle(name: str) -> None:
    check_against_oracle(CONFIGS[name], draw_batch(CONFIGS[name]), None)


@pytest.mark.parametrize("name", ["all-kinds", "group-limited", "clamped-steps"])
def test_fp32_model_equals_the_oracle(name: str) -> None:
    """Random routing is far from a tie: the nearest two scores differ by more than rounding."""
    config = CONFIGS[name]
    check_against_oracle(config, draw_batch(config), DOCUMENT_BS, torch.float32)


@pytest.mark.parametrize("length", [1, 2, 3, 6, 8])
def test_model_of_any_length_equals_the_oracle(length: int) -> None:
    """The scan's chunk has 3 positions, the convolution 4 taps, the deepest head looks 3 ahead."""
    config = CONFIGS["mtp-3-shared"]
    ids_BS, labels_BS, _ = draw_batch(config, length)
    batch = (ids_BS, labels_BS, torch.ones_like(ids_BS, dtype=torch.bool))
    check_against_oracle(config, batch, None)


def test_head_without_a_target_adds_nothing() -> None:
    """Targets at the first position alone: the main head has some, the deeper ones none."""
    config = CONFIGS["mtp-3-separate"]
    batch = draw_batch(config)
    batch[2][:] = False
    batch[2][:, 0] = True
    check_against_oracle(config, batch, None)
    model = build(config, model_oracle.random_params(config, seed=1), torch.float64)
    assert model.num_targets(batch[2]).tolist() == [2, 0, 0, 0]


def test_batch_without_a_target_has_a_finite_loss_and_no_gradient() -> None:
    config = replace(MODEL, moe=replace(MOE, aux_loss_coeff=0.0))
    ids_BS, labels_BS, mask_BS = draw_batch(config)
    model = build(config, model_oracle.random_params(config, seed=1), torch.float64)
    loss = model.loss(ids_BS, labels_BS, torch.zeros_like(mask_BS))
    loss.backward()
    assert float(loss.detach()) == 0
    for name, parameter in model.named_parameters():
        assert bool((parameter.grad == 0).all()), name


def test_bf16_error_is_at_most_twice_that_of_plain_bf16() -> None:
    """Plain is the oracle with every tensor in BF16. No MoE: BF16 may flip a token's routing.

    Medians over batches: a single one's error in a vector of four values is luck.
    """
    config = replace(MODEL, layer_pattern="M*-M", mtp=replace(MODEL.mtp, layer_pattern="*-"))
    documents = Documents.from_ids(DOCUMENT_BS)
    errors, plain_errors = defaultdict(list), defaultdict(list)
    for seed in range(9):
        params = model_oracle.random_params(config, seed=seed, dtype=torch.bfloat16)
        batch = draw_batch(config)
        exact, plain = (
            oracle_results(config, params, batch, dtype)
            for dtype in (torch.float64, torch.bfloat16)
        )
        model = build(config, params, torch.bfloat16)
        loss = model.loss(*batch, documents)
        loss.backward()
        actual = {"loss": loss, "logits": model(batch[0], documents)}
        actual |= {name: parameter.grad for name, parameter in model.named_parameters()}
        assert actual["logits"].dtype == torch.bfloat16
        for name, value in actual.items():
            errors[name].append(rms_ratio(value, exact[name]))
            plain_errors[name].append(rms_ratio(plain[name], exact[name]))
    for name in errors:
        error, limit = median(errors[name]), 2 * median(plain_errors[name]) + 1e-6
        assert error <= limit, f"{name}: error {error:.2e}, twice the plain one {limit:.2e}"


def oracle_results(
    config: ModelConfig,
    params: dict[str, Tensor],
    batch: tuple[Tensor, Tensor, Tensor],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Loss, logits and all gradients of packed documents."""
    leaves = {name: value.to(dtype).requires_grad_() for name, value in params.items()}
    terms = model_oracle.loss_terms(leaves, config, *batch, DOCUMENT_BS)
    terms["total"].backward()
    grads = {name: leaf.grad for name, leaf in leaves.items()}
    return {"loss": terms["total"], "logits": terms["logits_BSV"]} | grads


def test_mtp_logits_without_mtp_are_refused() -> None:
    config = CONFIGS["without-mtp"]
    model = build(config, model_oracle.random_params(config, seed=1), torch.float64)
    with pytest.raises(ValueError, match=r"model\.mtp is not configured"):
        model.mtp_logits(draw_batch(config)[0])


@pytest.mark.parametrize("document_BS", [None, DOCUMENT_BS], ids=["one-document", "packed"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_shifted_labels_and_mask_are_the_targets_of_a_depth(
    depth: int, document_BS: Tensor | None
) -> None:
    _, labels_BS, mask_BS = draw_batch(MODEL)
    documents = documents_of(document_BS)
    label_BS, valid_BS = mtp_targets_oracle(
        labels_BS, mask_BS, depth=depth, document_BS=document_BS
    )
    assert torch.equal(shift(mask_BS.T, depth, documents).T, valid_BS)
    assert torch.equal(shift(labels_BS.T, depth, documents).T[valid_BS], label_BS[valid_BS])


# --- parts of a batch ----------------------------------------------------------------------


@pytest.mark.parametrize("document_BS", [None, DOCUMENT_BS], ids=["one-document", "packed"])
def test_losses_of_the_parts_add_up_to_the_whole(document_BS: Tensor | None) -> None:
    """Micro-batches with unequal numbers of targets, divided by those of the whole batch."""
    config = CONFIGS["mtp-3-shared"]
    batch = draw_batch(config)
    model = build(config, model_oracle.random_params(config, seed=1), torch.float64)
    whole = run_losses(model, batch, documents_of(document_BS))
    whole.total.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()

    num_targets = model.num_targets(batch[2], documents_of(document_BS))
    assert num_targets.tolist() != (2 * model.num_targets(batch[2][:1])).tolist()
    parts = []
    for row in (slice(0, 1), slice(1, 2)):
        documents = documents_of(None if document_BS is None else document_BS[row])
        part = model.losses(
            *(t[row] for t in batch), documents, num_targets=num_targets, num_sequences=2
        )
        part.total.backward()
        parts.append(part)
    assert_close(sum(p.total for p in parts), whole.total, limit=1e-12, name="total")
    assert_close(sum(p.balance for p in parts), whole.balance, limit=1e-12, name="balance")
    ce = sum(p.cross_entropy for p in parts)
    assert_close(ce, whole.cross_entropy, limit=1e-12, name="cross-entropy")
    assert torch.equal(sum(p.count for p in parts), whole.count)
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name], limit=1e-10, name=f"gradient of {name}")


# --- router and experts --------------------------------------------------------------------


def router_of(config: MoeConfig) -> Router:
    router = Router(config, 16, dtype=torch.float64)
    torch.nn.init.normal_(router.weight)
    router.expert_bias.normal_(std=0.2)
    return router


MOES = {
    "plain": MOE,
    "group-limited": GROUPS,
    "one-group-of-four": replace(GROUPS, top_groups=1, top_k=2),
    "raw-gates": replace(MOE, normalize_gates=False),
    "all-experts": replace(MOE, top_k=8),
}


@pytest.mark.parametrize("config", MOES.values(), ids=MOES)
def test_router_chooses_and_weighs_like_the_oracle(config: MoeConfig) -> None:
    router = router_of(config)
    x_SBD = torch.randn(20, 3, 16, dtype=torch.float64)
    routing = router(x_SBD)
    gate_TK, expert_TK, _ = router_oracle(
        x_SBD.flatten(0, 1),
        router.weight,
        router.expert_bias,
        top_k=config.top_k,
        num_groups=config.num_groups,
        top_groups=config.top_groups,
        normalize_gates=config.normalize_gates,
        routed_scaling_factor=config.routed_scaling_factor,
    )
    # The order of a token's choices means nothing.
    order, their_order = routing.expert_TK.argsort(), expert_TK.argsort()
    assert torch.equal(routing.expert_TK.gather(1, order), expert_TK.gather(1, their_order))
    actual, expected = routing.gate_TK.gather(1, order), gate_TK.gather(1, their_order)
    assert_close(actual, expected, limit=1e-12, name="gates")


def test_bias_moves_the_choice_but_has_no_gradient() -> None:
    router = router_of(MOE)
    x_SBD = torch.randn(20, 3, 16, dtype=torch.float64)
    router.expert_bias[5] = 10.0
    routing = router(x_SBD)
    assert bool((routing.expert_TK == 5).any(-1).all())
    assert not router.expert_bias.requires_grad
    total_T = routing.gate_TK.detach().sum(-1)
    assert_close(total_T, torch.full_like(total_T, 2.5), limit=1e-12, name="sum of gates")


def test_bf16_router_scores_in_fp32() -> None:
    router = Router(MOE, 16, dtype=torch.bfloat16)
    torch.nn.init.normal_(router.weight)
    router.expert_bias.zero_()
    routing = router(torch.randn(20, 3, 16).bfloat16())
    assert routing.gate_TK.dtype == torch.float32
    assert routing.balance.dtype == torch.float32


@pytest.mark.parametrize("rate", [1e-3, 0.25])
def test_bias_update_equals_the_oracle(rate: float) -> None:
    router = router_of(replace(MOE, bias_update_rate=rate))
    count_E = torch.tensor([10, 0, 25, 12, 13, 12, 11, 13])  # the mean is 12
    before = router.expert_bias.clone()
    router.update_bias(count_E)
    expected = bias_update_oracle(before, count_E, rate=rate)
    assert torch.equal(router.expert_bias, expected)
    moved = (router.expert_bias - before).sign().tolist()
    assert moved == [1, 1, -1, 0, -1, 0, 1, -1]


def moe_of(config: MoeConfig) -> LatentMoE:
    moe = LatentMoE(config, 16, dtype=torch.float64)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    moe.router.expert_bias.normal_(std=0.2)
    return moe


@pytest.mark.parametrize("config", MOES.values(), ids=MOES)
def test_counts_add_up_to_the_copies_of_all_tokens(config: MoeConfig) -> None:
    _, count_E, _ = moe_of(config)(torch.randn(7, 3, 16, dtype=torch.float64))
    assert int(count_E.sum()) == 21 * config.top_k
    assert count_E.dtype == torch.int64


def test_choosing_all_experts_is_the_dense_mixture() -> None:
    moe = moe_of(replace(MOE, top_k=8))
    x_SBD = torch.randn(7, 3, 16, dtype=torch.float64)
    y_SBD, count_E, balance = moe(x_SBD)
    gate_SBE = torch.sigmoid(x_SBD @ moe.router.weight.T)
    gate_SBE = MOE.routed_scaling_factor * gate_SBE / gate_SBE.sum(-1, keepdim=True)
    z_SBL = x_SBD @ moe.latent_down.weight.T
    mixed_SBL = sum(
        gate_SBE[..., e, None] * ffn_oracle(z_SBL, moe.experts.fc1[e], moe.experts.fc2[e])
        for e in range(8)
    )
    shared = moe.shared_expert
    expected = mixed_SBL @ moe.latent_up.weight.T
    expected = expected + ffn_oracle(x_SBD, shared.fc1.weight, shared.fc2.weight)
    assert_close(y_SBD, expected, limit=1e-12, name="y")
    assert count_E.tolist() == [21] * 8
    assert float(balance.detach()) == pytest.approx(3, rel=1e-12)  # one per sequence


def relabelled(moe: LatentMoE, order: list[int]) -> LatentMoE:
    other = LatentMoE(moe.router.config, 16, dtype=torch.float64)
    state = moe.state_dict()
    for name in ("router.weight", "router.expert_bias", "experts.fc1", "experts.fc2"):
        state[name] = state[name][order]
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize(
    ("config", "order"),
    [(MOE, [3, 0, 7, 1, 6, 2, 5, 4]), (GROUPS, [5, 4, 0, 1, 7, 6, 3, 2])],
    ids=["plain", "whole-groups"],
)
def test_names_of_experts_mean_nothing(config: MoeConfig, order: list[int]) -> None:
    moe = moe_of(config)
    other = relabelled(moe, order)
    x_SBD = torch.randn(7, 3, 16, dtype=torch.float64)
    y_SBD, count_E, balance = moe(x_SBD)
    other_y_SBD, other_count_E, other_balance = other(x_SBD)
    assert_close(other_y_SBD, y_SBD, limit=1e-12, name="y")
    assert torch.equal(other_count_E, count_E[order])
    assert_close(other_balance, balance, limit=1e-12, name="balance")
