"""What the model promises beyond its formula: causality, isolation, recomputation, precision."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nemomodel.config.pattern import LayerKind
from nemomodel.config.schema import AttentionConfig, MambaConfig, ModelConfig, MoeConfig, MtpConfig
from nemomodel.model.init import initialize
from nemomodel.model.nemotron import Losses, Nemotron
from nemomodel.ops.documents import Documents
from tests.close import assert_close, rms_ratio

MODEL = ModelConfig(
    layer_pattern="ME*-M",
    hidden_size=32,
    vocab_size=64,
    init_std=0.2,
    ffn_size=48,
    mamba=MambaConfig(num_heads=4, head_dim=8, num_groups=2, state_size=8, chunk_size=4),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8),
    moe=MoeConfig(
        num_experts=8, top_k=3, ffn_size=16, shared_ffn_size=24, latent_size=16, aux_loss_coeff=0.1
    ),
    mtp=MtpConfig(num_depths=3, layer_pattern="M*E-"),
)
DENSE = replace(MODEL, layer_pattern="M*-M", mtp=replace(MODEL.mtp, layer_pattern="M*-"))
MAMBA = replace(MODEL, layer_pattern="MM", mtp=None)
ATTENTION = replace(MODEL, layer_pattern="**", mtp=None)
MLP = replace(MODEL, layer_pattern="--", mtp=None)
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
LENGTH = 19


def build(
    config: ModelConfig,
    dtype: torch.dtype = torch.float32,
    recompute: frozenset[LayerKind] = frozenset(),
) -> Nemotron:
    model = Nemotron(config, dtype=dtype, recompute=recompute)
    initialize(model, seed=1)
    for router in model.routers().values():
        router.expert_bias.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    return model


def with_buffers(model: Nemotron) -> Nemotron:
    """Collect the gradients of all parameters as the data-parallel wrapper does: in FP32."""
    for parameter in model.parameters():
        parameter.main_grad = torch.zeros(parameter.shape)
    return model


def grads_of(model: Nemotron) -> dict[str, Tensor]:
    """Gradients by name; an FP32 parameter's may have come by autograd."""
    return {
        name: p.grad if p.grad is not None else p.main_grad for name, p in model.named_parameters()
    }


def draw_ids(rows: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(MODEL.vocab_size, (rows, length))


def draw_batch() -> tuple[Tensor, Tensor, Tensor]:
    tokens = draw_ids(length=LENGTH + 1)
    return tokens[:, :-1], tokens[:, 1:], torch.rand(2, LENGTH) > 0.2


def run_losses(
    model: Nemotron, batch: tuple[Tensor, Tensor, Tensor], documents: Documents | None = None
) -> Losses:
    num_targets = model.num_targets(batch[2], documents)
    losses = model.losses(*batch, documents, num_targets=num_targets, num_sequences=2)
    losses.total.backward()
    return losses


@torch.no_grad()
def all_logits(model: Nemotron, ids_BS: Tensor, documents: Documents | None = None) -> list[Tensor]:
    """[B, S, V] of the main head and of each depth."""
    deeper = model.mtp_logits(ids_BS, documents) if model.mtp is not None else []
    return [model(ids_BS, documents), *deeper]


# --- causality and isolation ---------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 1, 4, 10, LENGTH - 1])
@pytest.mark.parametrize("dtype", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    "config", [MAMBA, ATTENTION, MLP, DENSE], ids=["mamba", "attention", "mlp", "with-mtp"]
)
def test_logits_before_a_changed_token_stay_the_same_bits(
    config: ModelConfig, dtype: torch.dtype, at: int
) -> None:
    """Depth k looks k tokens ahead, so there they stay the same before position at - k."""
    model, ids_BS = build(config, dtype), draw_ids()
    other_BS = ids_BS.clone()
    other_BS[:, at] = (other_BS[:, at] + 1) % config.vocab_size
    pairs = zip(all_logits(model, ids_BS), all_logits(model, other_BS), strict=True)
    for depth, (logits, other) in enumerate(pairs):
        first = max(at - depth, 0)
        assert torch.equal(logits[:, :first], other[:, :first]), f"depth {depth}"
        assert not torch.equal(logits[:, first], other[:, first]), f"depth {depth}"


@pytest.mark.parametrize("at", [1, 10])
def test_moe_model_is_causal(at: int) -> None:
    """A changed token moves the rows of its experts, so matrix products may round differently."""
    model, ids_BS = build(MODEL), draw_ids()
    other_BS = ids_BS.clone()
    other_BS[:, at] = (other_BS[:, at] + 1) % MODEL.vocab_size
    pairs = zip(all_logits(model, ids_BS), all_logits(model, other_BS), strict=True)
    for depth, (logits, other) in enumerate(pairs):
        first = max(at - depth, 0)
        if first:
            name = f"depth {depth}"
            assert_close(other[:, :first], logits[:, :first], limit=1e-6, name=name)
        assert rms_ratio(other[:, first], logits[:, first]) > 1e-3


def halves(border: int) -> Documents:
    return Documents.from_ids((torch.arange(LENGTH) >= border).long().expand(2, -1))


@pytest.mark.parametrize("changed_document", [0, 1], ids=["change-first", "change-second"])
@pytest.mark.parametrize("border", [1, 8, 10, LENGTH - 1])
@pytest.mark.parametrize("dtype", FORMATS.values(), ids=FORMATS)
def test_documents_of_a_row_do_not_touch_each_other(
    dtype: torch.dtype, border: int, changed_document: int
) -> None:
    model, ids_BS, documents = build(DENSE, dtype), draw_ids(), halves(border)
    parts = (slice(0, border), slice(border, LENGTH))
    theirs, own = parts[changed_document], parts[1 - changed_document]
    other_BS = ids_BS.clone()
    other_BS[:, theirs] = (other_BS[:, theirs] + 1) % MODEL.vocab_size
    pairs = zip(
        all_logits(model, ids_BS, documents), all_logits(model, other_BS, documents), strict=True
    )
    for depth, (logits, other) in enumerate(pairs):
        assert not torch.equal(logits[:, theirs], other[:, theirs]), f"depth {depth}"
        assert torch.equal(logits[:, own], other[:, own]), f"depth {depth}"


def test_documents_of_a_moe_model_do_not_touch_each_other() -> None:
    model, ids_BS, documents = build(MODEL), draw_ids(), halves(10)
    other_BS = ids_BS.clone()
    other_BS[:, :10] = (other_BS[:, :10] + 1) % MODEL.vocab_size
    pairs = zip(
        all_logits(model, ids_BS, documents), all_logits(model, other_BS, documents), strict=True
    )
    for depth, (logits, other) in enumerate(pairs):
        assert_close(other[:, 10:], logits[:, 10:], limit=1e-6, name=f"depth {depth}")


@pytest.mark.parametrize("config", [DENSE, MODEL], ids=["dense", "moe"])
def test_a_packed_document_has_the_logits_of_the_document_alone(config: ModelConfig) -> None:
    model, ids_BS, documents = build(config), draw_ids(), halves(8)
    packed = all_logits(model, ids_BS, documents)
    for start, end in ((0, 8), (8, LENGTH)):
        alone = all_logits(model, ids_BS[:, start:end])
        for depth, (together, single) in enumerate(zip(packed, alone, strict=True)):
            name = f"depth {depth} from {start}"
            assert_close(together[:, start:end], single, limit=1e-5, name=name)


# --- masked targets ------------------------------------------------------------------------


@pytest.mark.parametrize("config", [DENSE, MODEL], ids=["dense", "moe"])
def test_tokens_after_the_last_target_get_exactly_no_gradient(config: ModelConfig) -> None:
    """Ids from 40 on stand only where all targets are masked, and are no label either."""
    config = replace(config, moe=replace(config.moe, aux_loss_coeff=0.0))
    model = build(config)
    tokens = torch.randint(40, (2, LENGTH + 1))
    tokens[:, 12:] = torch.randint(40, 64, (2, LENGTH - 11))
    ids_BS, labels_BS = tokens[:, :-1], tokens[:, 1:]
    mask_BS = (torch.arange(LENGTH) < 11).expand(2, -1)
    assert int(labels_BS[mask_BS].max()) < 40
    run_losses(model, (ids_BS, labels_BS, mask_BS))
    grad = model.embedding.weight.grad
    seen = ids_BS[:, :11].unique()
    assert bool((grad[seen] != 0).any(-1).all())
    assert bool((grad[40:] == 0).all())


def test_masked_labels_do_not_matter() -> None:
    model = build(MODEL)
    ids_BS, labels_BS, mask_BS = draw_batch()
    other_BS = torch.where(mask_BS, labels_BS, (labels_BS + 1) % MODEL.vocab_size)
    assert not torch.equal(other_BS, labels_BS)
    results = []
    for labels in (labels_BS, other_BS):
        model.zero_grad()
        losses = run_losses(model, (ids_BS, labels, mask_BS))
        results.append((losses, {name: p.grad for name, p in model.named_parameters()}))
    (losses, grads), (other_losses, other_grads) = results
    assert torch.equal(losses.total, other_losses.total)
    assert torch.equal(losses.cross_entropy, other_losses.cross_entropy)
    for name, grad in grads.items():
        assert torch.equal(grad, other_grads[name]), name


# --- recomputation -------------------------------------------------------------------------


RECOMPUTE = {kind.name.lower(): frozenset({kind}) for kind in LayerKind}
RECOMPUTE["all"] = frozenset(LayerKind)


@pytest.mark.parametrize("dtype", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("kinds", RECOMPUTE.values(), ids=RECOMPUTE)
def test_recomputation_changes_no_bit(kinds: frozenset[LayerKind], dtype: torch.dtype) -> None:
    """Twice backward into the same buffers: what is computed again must not be added again."""
    batch, documents = draw_batch(), halves(8)
    results = []
    for recompute in (frozenset(), kinds):
        model = with_buffers(build(MODEL, dtype, recompute))
        losses = [run_losses(model, batch, documents) for _ in range(2)]
        results.append((losses, grads_of(model)))
    (losses, grads), (other_losses, other_grads) = results
    for one, other in zip(losses, other_losses, strict=True):
        assert torch.equal(one.total, other.total)
        assert torch.equal(one.count, other.count)
        assert int(other.count[0].sum()) == 2 * LENGTH * MODEL.moe.top_k
        assert int(other.count[1].sum()) == 3 * 2 * LENGTH * MODEL.moe.top_k  # three depths
    for name, grad in grads.items():
        assert torch.equal(grad, other_grads[name]), name


@pytest.mark.parametrize("kind", LayerKind, ids=lambda kind: kind.name.lower())
def test_recomputed_layers_run_again_in_the_backward_pass(kind: LayerKind) -> None:
    """Else the tests above compare a model with itself."""
    model = build(MODEL, recompute=frozenset({kind}))
    runs = []
    for block in (*model.blocks, *model.mtp.blocks[0].layers):
        if block.kind is kind:
            # Running again ends at the last tensor that is needed: before the mixer returns.
            block.mixer.register_forward_pre_hook(lambda *_: runs.append(kind))
    batch = draw_batch()
    losses = model.losses(*batch, None, num_targets=model.num_targets(batch[2]), num_sequences=2)
    forward_runs = len(runs)
    losses.total.backward()
    assert len(runs) == 2 * forward_runs > 0


# --- gradients in FP32 ---------------------------------------------------------------------


def test_shared_mtp_block_adds_up_its_depths_in_fp32() -> None:
    """The same weights once per depth: their gradients, added in FP32, are the shared one's."""
    free = replace(MODEL, moe=replace(MODEL.moe, aux_loss_coeff=0.0))
    shared = with_buffers(build(free, torch.bfloat16))
    separate = build(replace(free, mtp=replace(free.mtp, shared=False)), torch.bfloat16)
    state = shared.state_dict()
    for name in separate.state_dict():
        source = name if not name.startswith("mtp.") else f"mtp.blocks.0.{name.split('.', 3)[3]}"
        state[name] = state[source]
    separate.load_state_dict(state)
    with_buffers(separate)

    batch, documents = draw_batch(), halves(8)
    totals = [run_losses(model, batch, documents).total for model in (shared, separate)]
    assert torch.equal(*totals)
    grads, copies = grads_of(shared), grads_of(separate)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32, name
        if name.startswith("mtp."):
            tail = name.removeprefix("mtp.blocks.0.")
            alone = [copies[f"mtp.blocks.{k}.{tail}"] for k in range(3)]
            assert all(bool((part != 0).any()) for part in alone), name
            assert_close(grad, sum(alone), limit=1e-6, name=name)
        else:
            assert_close(grad, copies[name], limit=1e-6, name=name)


def test_head_adds_up_its_depths_in_fp32() -> None:
    """An MTP loss of weight 2^-12 is far below the BF16 resolution of the main head's gradient."""

    def head_grad(loss_scale: float) -> Tensor:
        config = replace(MODEL, mtp=replace(MODEL.mtp, loss_scale=loss_scale))
        model = with_buffers(build(config, torch.bfloat16))
        run_losses(model, batch)
        assert model.lm_head.weight.grad is None
        return model.lm_head.weight.main_grad.double()

    batch = draw_batch()
    main, faint, full = (head_grad(scale) for scale in (0.0, 2.0**-12, 1.0))
    assert_close((faint - main) * 2**12, full - main, limit=1e-2, name="MTP part")


def test_micro_batches_add_up_in_fp32() -> None:
    """16 micro-batches into one buffer, against the FP32 sum of each one alone."""
    batches = [draw_batch() for _ in range(16)]
    model = with_buffers(build(MODEL, torch.bfloat16))
    for batch in batches:
        run_losses(model, batch)
    total = {name: torch.zeros_like(p.main_grad) for name, p in model.named_parameters()}
    single = with_buffers(build(MODEL, torch.bfloat16))
    for batch in batches:
        for parameter in single.parameters():
            parameter.grad = None
            parameter.main_grad.zero_()
        run_losses(single, batch)
        for name, grad in grads_of(single).items():
            total[name] += grad
    for name, grad in grads_of(model).items():
        assert grad.dtype == torch.float32, name
        assert_close(grad, total[name], limit=1e-6, name=name)


def test_every_bf16_weight_collects_its_gradient_in_fp32() -> None:
    """One that went the way of autograd would be rounded to BF16 in every micro-batch."""
    model = with_buffers(build(MODEL, torch.bfloat16))
    run_losses(model, draw_batch(), halves(8))
    for name, parameter in model.named_parameters():
        if parameter.dtype == torch.bfloat16:
            assert parameter.grad is None, name
            assert bool((parameter.main_grad != 0).any()), name
        else:
            assert parameter.grad.dtype == torch.float32, name


# --- odds ----------------------------------------------------------------------------------


def test_a_frozen_model_part_lets_gradients_pass() -> None:
    """Frozen weights get none; all others get what they get without freezing."""
    batch = draw_batch()
    full = build(MODEL)
    run_losses(full, batch)
    part = build(MODEL)
    frozen = ("blocks.0.", "lm_head", "mtp.blocks.0.layers.2")
    for name, parameter in part.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen))
    run_losses(part, batch)
    expected = {name: p.grad for name, p in full.named_parameters()}
    for name, parameter in part.named_parameters():
        if name.startswith(frozen):
            assert parameter.grad is None, name
        else:
            assert torch.equal(parameter.grad, expected[name]), name


def test_validation_without_gradients_has_the_same_loss() -> None:
    model, batch = build(MODEL, recompute=frozenset(LayerKind)), draw_batch()
    loss = model.loss(*batch, halves(8))
    with torch.no_grad():
        assert torch.equal(model.loss(*batch, halves(8)), loss)


def test_one_step_along_the_gradient_lowers_the_loss() -> None:
    model, batch = build(MODEL), draw_batch()
    before = run_losses(model, batch).total
    with torch.no_grad():
        size = sum(float(p.grad.square().sum()) for p in model.parameters())
        for parameter in model.parameters():
            parameter -= 1e-3 * parameter.grad
        drop = float(before - model.loss(*batch))
    assert drop == pytest.approx(1e-3 * size, rel=0.2)
