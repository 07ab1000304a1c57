"""Kernels of a GPU against their plain twins and the loops they stand for."""

import importlib.util
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nemomodel.config.schema import AttentionConfig, MambaConfig, ModelConfig, MoeConfig, MtpConfig
from nemomodel.model.init import initialize
from nemomodel.model.nemotron import Nemotron
from nemomodel.ops import backend
from nemomodel.ops.attention import causal_attention
from nemomodel.ops.conv import causal_conv
from nemomodel.ops.documents import Documents
from nemomodel.ops.experts import grouped_linear
from nemomodel.ops.ssd import ssd
from tests.close import assert_close, rms_ratio

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed")


needs_mamba_ssm, needs_causal_conv1d = needs("mamba_ssm"), needs("causal_conv1d")
needs_hopper = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 9,
    reason="torch._grouped_mm of BF16 needs compute capability 9.0",
)

GPU = torch.device("cuda")
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
S, B = 300, 2
LENGTHS = ((100, 28, 1, 171), (256, 44))

Op = Callable[..., Tensor]
Results = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _no_tf32():
    """FP32 means FP32: TF32 has ten bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def packed(is_packed: bool) -> Documents | None:
    if not is_packed:
        return None
    rows = [torch.arange(len(r)).repeat_interleave(torch.tensor(r)) for r in LENGTHS]
    return Documents.from_ids(torch.stack(rows)).to(GPU)


def results(op: Op, inputs: dict[str, Tensor]) -> Results:
    """ "y" and the gradients of all inputs, for one fixed random upstream gradient."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in inputs.items()}
    y = op(**leaves)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator).bfloat16().to(y)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach()} | dict(zip(leaves, grads, strict=True))


def in_float64(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() for name, t in inputs.items()}


def check(kernel: Op, plain: Op, inputs: dict[str, Tensor], *, limit: float) -> None:
    """In FP32 within `limit` of the plain twin in FP64; in BF16 within twice the twin's error.

    FP64 always takes the plain path.
    """
    actual, exact = results(kernel, inputs), results(plain, in_float64(inputs))
    low = any(t.dtype == torch.bfloat16 for t in inputs.values())
    twin = results(plain, inputs) if low else {}
    for name, value in actual.items():
        assert value.isfinite().all(), name
        if low:
            error, twin_error = rms_ratio(value, exact[name]), rms_ratio(twin[name], exact[name])
            assert error <= 2 * twin_error + 1e-6, f"{name}: {error:.2e}, twin {twin_error:.2e}"
        else:
            assert_close(value, exact[name], limit=limit, name=name)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[Op], Op]:
    """The same operation as if no kernel's package were installed."""

    def plain(op: Op) -> Op:
        def run(**inputs: Tensor) -> Tensor:
            with monkeypatch.context() as patch:
                patch.setattr(backend, "_installed", lambda package: False)
                return op(**inputs)

        return run

    return plain


# --- scan and convolution ------------------------------------------------------------------


@needs_mamba_ssm
@pytest.mark.parametrize("is_packed", [False, True], ids=["one-document", "packed"])
@pytest.mark.parametrize("dtype", FORMATS.values(), ids=FORMATS)
def test_scan_kernel_equals_its_twin(
    dtype: torch.dtype, is_packed: bool, without_kernels: Callable[[Op], Op]
) -> None:
    H, P, G, N = 8, 64, 2, 128
    documents = packed(is_packed)
    inputs = {
        "x": torch.randn(S, B, H, P, device=GPU).to(dtype),
        "dt": functional.softplus(torch.randn(S, B, H, device=GPU) - 3),
        "A": -torch.empty(H, device=GPU).uniform_(1, 16),
        "B": torch.randn(S, B, G, N, device=GPU).to(dtype),
        "C": torch.randn(S, B, G, N, device=GPU).to(dtype),
        "D": torch.randn(H, device=GPU),
    }
    assert backend.kernel_takes("mamba_ssm", *inputs.values())

    def op(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        return ssd(x, dt, A, B, C, D, chunk_size=128, documents=documents)

    # The kernel multiplies FP32 as TF32 whatever torch is told: 2^-11 per factor.
    check(op, without_kernels(op), inputs, limit=5e-3)


@needs_causal_conv1d
@pytest.mark.parametrize("is_packed", [False, True], ids=["one-document", "packed"])
@pytest.mark.parametrize("dtype", FORMATS.values(), ids=FORMATS)
def test_convolution_kernel_equals_its_twin(
    dtype: torch.dtype, is_packed: bool, without_kernels: Callable[[Op], Op]
) -> None:
    C, documents = 768, packed(is_packed)
    inputs = {
        "x": torch.randn(S, B, C, device=GPU).to(dtype),
        "weight": torch.randn(C, 4, device=GPU).to(dtype),
        "bias": torch.randn(C, device=GPU).to(dtype),
    }
    assert backend.kernel_takes("causal_conv1d", inputs["x"])

    def op(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv(x, weight, bias, documents)

    check(op, without_kernels(op), inputs, limit=1e-5)


@needs_causal_conv1d
def test_convolution_kernel_takes_a_slice_of_the_input_projection(
    without_kernels: Callable[[Op], Op],
) -> None:
    """In the mixer x is the middle of a wider tensor."""
    inputs = {
        "wide": torch.randn(S, B, 1024, device=GPU).bfloat16(),
        "weight": torch.randn(768, 4, device=GPU).bfloat16(),
        "bias": torch.randn(768, device=GPU).bfloat16(),
    }

    def op(wide: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv(wide[..., 128:896], weight, bias, None)

    check(op, without_kernels(op), inputs, limit=1e-5)


@needs_mamba_ssm
@needs_causal_conv1d
@pytest.mark.parametrize("name", ["scan", "convolution"])
def test_kernels_keep_documents_apart(name: str) -> None:
    """What a document holds changes no bit of the next one, nor of the one before it."""
    document_BS = (torch.arange(S) >= 100).long().expand(B, S)
    documents = Documents.from_ids(document_BS).to(GPU)
    x_SBC = torch.randn(S, B, 512, device=GPU).bfloat16()
    weight, bias = (torch.randn(shape, device=GPU).bfloat16() for shape in ((512, 4), (512,)))
    dt_SBH, A_H, D_H = torch.rand(S, B, 8, device=GPU), -torch.ones(8, device=GPU), bias[:8].float()
    B_SBGN, C_SBGN = torch.randn(2, S, B, 1, 64, device=GPU).bfloat16()

    def run(x: Tensor) -> Tensor:
        if name == "convolution":
            return causal_conv(x, weight, bias, documents)
        heads = x.unflatten(-1, (8, 64))
        return ssd(heads, dt_SBH, A_H, B_SBGN, C_SBGN, D_H, chunk_size=128, documents=documents)

    y = run(x_SBC)
    for theirs, own in ((slice(0, 100), slice(100, S)), (slice(100, S), slice(0, 100))):
        changed = x_SBC.clone()
        changed[theirs] *= 3
        other = run(changed)
        assert not torch.equal(other[theirs], y[theirs])
        assert torch.equal(other[own], y[own])


@needs_causal_conv1d
@pytest.mark.parametrize("dtype", FORMATS.values(), ids=FORMATS)
def test_convolution_kernel_delivers_gradients_in_fp32(dtype: torch.dtype) -> None:
    x_SBC = torch.randn(S, B, 512, device=GPU).to(dtype)
    values = [torch.randn(shape, device=GPU).to(dtype) for shape in ((512, 4), (512,))]

    def collected(*scales: float) -> list[Tensor]:
        parameters = [nn.Parameter(value) for value in values]
        for parameter in parameters:
            parameter.main_grad = torch.zeros(parameter.shape, device=GPU)
        for scale in scales:
            y = causal_conv(x_SBC, *parameters, None)
            y.backward(torch.full_like(y, scale))
        assert all(parameter.grad is None for parameter in parameters)
        return [parameter.main_grad for parameter in parameters]

    for both, large in zip(collected(1.0, 2.0**-12), collected(1.0), strict=True):
        small = 2.0**12 * (both.double() - large.double())
        assert_close(small, large, limit=5e-3, name="the small one")


# --- experts and attention -----------------------------------------------------------------


def per_expert(x_RI: Tensor, weight: Tensor, rows: list[int]) -> Tensor:
    parts = x_RI.split(rows)
    return torch.cat([part @ w.T for part, w in zip(parts, weight, strict=True)])


@needs_hopper
@pytest.mark.parametrize(
    "rows", [[100, 0, 37, 1], [0, 0, 138, 0], [34, 35, 36, 33]], ids=["idle", "one", "spread"]
)
def test_grouped_product_equals_a_loop_over_experts(rows: list[int]) -> None:
    rows_E = torch.tensor(rows, device=GPU)
    inputs = {
        "x_RI": torch.randn(sum(rows), 64, device=GPU).bfloat16(),
        "weight": torch.randn(4, 96, 64, device=GPU).bfloat16(),
    }
    check(
        lambda x_RI, weight: grouped_linear(x_RI, weight, rows_E),
        lambda x_RI, weight: per_expert(x_RI, weight, rows),
        inputs,
        limit=1e-5,
    )


@needs_hopper
def test_weight_gradient_of_an_idle_expert_is_zero() -> None:
    weight = nn.Parameter(torch.randn(4, 96, 64, device=GPU).bfloat16())
    x_RI = torch.randn(138, 64, device=GPU).bfloat16()
    grouped_linear(x_RI, weight, torch.tensor([100, 0, 38, 0], device=GPU)).sum().backward()
    assert bool((weight.grad[[1, 3]] == 0).all())
    assert bool((weight.grad[[0, 2]] != 0).any())


def per_document(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Attention of each document by itself, from the plain formula."""
    repeat = q.shape[2] // k.shape[2]
    k, v = (t.repeat_interleave(repeat, dim=2) for t in (k, v))
    y_SBHP = torch.zeros_like(q)
    for b, start, end in documents.spans:
        score_HST = torch.einsum("shp,thp->hst", q[start:end, b], k[start:end, b])
        score_HST = score_HST / q.shape[-1] ** 0.5
        later_ST = torch.ones_like(score_HST[0], dtype=torch.bool).triu(1)
        share_HST = score_HST.masked_fill(later_ST, -torch.inf).softmax(-1)
        own_SHP = torch.einsum("hst,thp->shp", share_HST, v[start:end, b])
        y_SBHP[start:end, b] = own_SHP
    return y_SBHP


@pytest.mark.parametrize("is_packed", [False, True], ids=["one-document", "packed"])
@pytest.mark.parametrize("dtype", FORMATS.values(), ids=FORMATS)
def test_attention_equals_a_loop_over_documents(dtype: torch.dtype, is_packed: bool) -> None:
    documents = packed(is_packed)
    shapes = {"q": (S, B, 8, 64), "k": (S, B, 2, 64), "v": (S, B, 2, 64)}
    inputs = {name: torch.randn(s, device=GPU).to(dtype) for name, s in shapes.items()}
    whole_rows = Documents.from_ids(torch.zeros(B, S))
    check(
        lambda q, k, v: causal_attention(q, k, v, documents),
        lambda q, k, v: per_document(q, k, v, documents or whole_rows),
        inputs,
        limit=1e-5,
    )


# --- whole model ---------------------------------------------------------------------------

MODEL = ModelConfig(
    layer_pattern="ME*-M",
    hidden_size=128,
    vocab_size=512,
    init_std=0.1,
    ffn_size=192,
    mamba=MambaConfig(num_heads=8, head_dim=32, num_groups=2, state_size=32, chunk_size=64),
    attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32),
    moe=MoeConfig(num_experts=8, top_k=2, ffn_size=64, shared_ffn_size=96, latent_size=64),
    mtp=MtpConfig(num_depths=2, layer_pattern="*E"),
)
DENSE = replace(MODEL, layer_pattern="M*-M", mtp=replace(MODEL.mtp, layer_pattern="*-"))


def loss_and_grads(
    config: ModelConfig, device: torch.device, dtype: torch.dtype, *, is_packed: bool
) -> Results:
    with torch.device(device):
        model = Nemotron(config, dtype=dtype)
    initialize(model, seed=1)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (B, S + 1), generator=generator)
    mask_BS = torch.rand(B, S, generator=generator) > 0.2
    documents = packed(is_packed)
    if documents is not None:
        documents = documents.to(device)
    batch = (t.to(device) for t in (tokens[:, :-1], tokens[:, 1:], mask_BS))
    loss = model.loss(*batch, documents)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("is_packed", [False, True], ids=["one-document", "packed"])
def test_fp32_model_equals_the_cpu(is_packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without other packages' kernels, which round products to TF32."""
    monkeypatch.setattr(backend, "_installed", lambda package: False)
    actual = loss_and_grads(MODEL, GPU, torch.float32, is_packed=is_packed)
    cpu = torch.device("cpu")
    expected = loss_and_grads(MODEL, cpu, torch.float32, is_packed=is_packed)
    for name, value in actual.items():
        assert_close(value, expected[name], limit=1e-4, name=name)


@pytest.mark.parametrize("is_packed", [False, True], ids=["one-document", "packed"])
def test_bf16_model_error_is_at_most_twice_that_of_the_cpu(is_packed: bool) -> None:
    """With the kernels that are installed. No MoE: BF16 may flip a token's routing."""
    actual = loss_and_grads(DENSE, GPU, torch.bfloat16, is_packed=is_packed)
    cpu = torch.device("cpu")
    plain = loss_and_grads(DENSE, cpu, torch.bfloat16, is_packed=is_packed)
    exact = loss_and_grads(DENSE, cpu, torch.float32, is_packed=is_packed)
    for name, value in actual.items():
        error, plain_error = rms_ratio(value, exact[name]), rms_ratio(plain[name], exact[name])
        assert error <= 2 * plain_error + 1e-4, f"{name}: {error:.2e}, CPU {plain_error:.2e}"


def test_bf16_moe_model_runs_with_finite_gradients() -> None:
    for name, value in loss_and_grads(MODEL, GPU, torch.bfloat16, is_packed=True).items():
        assert bool(value.isfinite().all()), name
