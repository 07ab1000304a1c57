"""What operations promise beyond their formula: causality, document isolation, FP32 gradients."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nemomodel.ops.activation import gated_squared_relu
from nemomodel.ops.attention import causal_attention
from nemomodel.ops.backend import INT32_MAX, describe, kernel_takes
from nemomodel.ops.conv import causal_conv
from nemomodel.ops.documents import Documents
from nemomodel.ops.experts import grouped_linear
from nemomodel.ops.linear import embedding, linear, linear_fp32
from nemomodel.ops.loss import Targets, linear_cross_entropy
from nemomodel.ops.norm import gated_group_rms_norm, rms_norm
from nemomodel.ops.ssd import ssd
from nemomodel.ops.wgrad import widen
from tests.close import assert_close, rms_ratio

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
B = 2
# (length, border): the scan's chunks are 4 long and later 32. The long ones make several blocks,
# of the scan at 64 and 128 and of attention at 128.
BORDERS = {
    "inside-chunk": (21, 10),
    "chunk-border": (21, 12),
    "first": (21, 1),
    "last": (21, 20),
    "block-border": (150, 64),
    "inside-block": (150, 101),
    "second-block-border": (150, 128),
}


def in_order(
    run: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The result and the gradients of the inputs for one fixed random upstream gradient."""
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    y = run(leaves)
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator).to(y.dtype)
    return y.detach(), dict(
        zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True)
    )


def sequence_op(
    name: str, dtype: torch.dtype, documents: Documents | None, *, length: int = 21
) -> tuple[Callable[[dict[str, Tensor]], Tensor], dict[str, Tensor]]:
    """An operation that mixes positions, and its activations; the weights are fixed."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(length, B, *shape).to(dtype)

    if name == "conv":
        weight, bias = (nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((6, 4), (6,)))
        return lambda t: causal_conv(t["x"], weight, bias, documents), {"x": draw(6)}
    if name == "attention":
        inputs = {"q": draw(4, 8), "k": draw(2, 8), "v": draw(2, 8)}
        return lambda t: causal_attention(t["q"], t["k"], t["v"], documents), inputs
    heads, width, chunk = (4, 3, 4) if length < 100 else (16, 64, 32)
    A, D = -torch.rand(heads) - 0.1, torch.randn(heads)
    inputs = {"x": draw(heads, width), "B": draw(2, 5), "C": draw(2, 5)}
    inputs["dt"] = functional.softplus(torch.randn(length, B, heads))
    return (
        lambda t: ssd(t["x"], t["dt"], A, t["B"], t["C"], D, chunk_size=chunk, documents=documents),
        inputs,
    )


OPS = ("conv", "ssd", "attention")


@pytest.mark.parametrize(("length", "border"), BORDERS.values(), ids=BORDERS)
@pytest.mark.parametrize("dtype", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", OPS)
def test_results_before_a_changed_position_stay_the_same_bits(
    name: str, dtype: torch.dtype, length: int, border: int
) -> None:
    run, inputs = sequence_op(name, dtype, None, length=length)
    changed = {n: t.clone() for n, t in inputs.items()}
    for value in changed.values():
        value[border] = value[border] * 3 + 1
    y, other = run(inputs), run(changed)
    assert torch.equal(y[:border], other[:border])
    assert not torch.equal(y[border], other[border])


@pytest.mark.parametrize("changed_document", [0, 1], ids=["change-first", "change-second"])
@pytest.mark.parametrize(("length", "border"), BORDERS.values(), ids=BORDERS)
@pytest.mark.parametrize("dtype", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", OPS)
def test_documents_of_a_row_do_not_touch_each_other(
    name: str, dtype: torch.dtype, length: int, border: int, changed_document: int
) -> None:
    """Results and gradients of one document are the same bits whatever the other one holds."""
    document_BS = (torch.arange(length) >= border).long().expand(B, length)
    run, inputs = sequence_op(name, dtype, Documents.from_ids(document_BS), length=length)
    parts = (slice(0, border), slice(border, length))
    theirs, own = parts[changed_document], parts[1 - changed_document]
    changed = {n: t.clone() for n, t in inputs.items()}
    for value in changed.values():
        value[theirs] = value[theirs] * 30 + 1
    (y, grads), (other_y, other_grads) = (in_order(run, t) for t in (inputs, changed))
    assert not torch.equal(y[theirs], other_y[theirs])
    assert torch.equal(y[own], other_y[own])
    for n, grad in grads.items():
        assert torch.equal(grad[own], other_grads[n][own]), f"gradient of {n}"


@pytest.mark.parametrize("dtype", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("name", OPS)
def test_later_gradients_do_not_reach_another_document(name: str, dtype: torch.dtype) -> None:
    """A loss of the second document alone leaves exactly zero in the first, and the reverse."""
    document_BS = (torch.arange(21) >= 10).long().expand(B, 21)
    run, inputs = sequence_op(name, dtype, Documents.from_ids(document_BS))
    for own, other in ((slice(10, 21), slice(0, 10)), (slice(0, 10), slice(10, 21))):
        leaves = {n: t.clone().requires_grad_() for n, t in inputs.items()}
        y = run(leaves)[own]
        y.backward(torch.randn(y.shape).to(dtype))
        for n, leaf in leaves.items():
            assert leaf.grad[own].abs().sum() > 0, n
            assert leaf.grad[other].abs().sum() == 0, n


@pytest.mark.parametrize("name", OPS)
def test_rows_of_a_batch_do_not_touch_each_other(name: str) -> None:
    run, inputs = sequence_op(name, torch.float32, None)
    changed = {n: t.clone() for n, t in inputs.items()}
    for value in changed.values():
        value[:, 0] = value[:, 0] * 3 + 1
    (y, grads), (other_y, other_grads) = (in_order(run, t) for t in (inputs, changed))
    assert not torch.equal(y[:, 0], other_y[:, 0])
    assert torch.equal(y[:, 1], other_y[:, 1])
    for n, grad in grads.items():
        assert torch.equal(grad[:, 1], other_grads[n][:, 1]), f"gradient of {n}"


def test_chunk_size_does_not_change_the_scan() -> None:
    """128 and 256 are the sizes of published models; 300 positions are no multiple of any."""
    length, heads = 300, 2
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = {"x": draw(length, 1, heads, 4), "B": draw(length, 1, 1, 8)}
    inputs |= {"C": draw(length, 1, 1, 8), "dt": functional.softplus(draw(length, 1, heads) - 4)}
    inputs |= {"A": -draw(heads).exp(), "D": draw(heads)}
    documents = Documents.from_ids(torch.arange(length).ge(140).long().expand(1, -1))

    def result(chunk: int) -> tuple[Tensor, dict[str, Tensor]]:
        return in_order(
            lambda t: ssd(
                t["x"], t["dt"], t["A"], t["B"], t["C"], t["D"],
                chunk_size=chunk, documents=documents,
            ),
            inputs,
        )  # fmt: skip

    y, grads = result(16)
    for chunk in (1, 7, 128, 256, 512):
        other_y, other_grads = result(chunk)
        assert_close(other_y, y, limit=1e-12, name=f"chunk {chunk}")
        for name, grad in grads.items():
            assert_close(other_grads[name], grad, limit=1e-11, name=f"chunk {chunk}: {name}")


def test_document_borders() -> None:
    documents = Documents.from_ids(torch.tensor([[4, 4, 7, 7, 7], [0, 1, 2, 2, 2]]))
    assert documents.spans == ((0, 0, 2), (0, 2, 5), (1, 0, 1), (1, 1, 2), (1, 2, 5))
    assert documents.id_SB.dtype == torch.int32
    assert documents.id_SB.T.tolist() == [[4, 4, 7, 7, 7], [0, 1, 2, 2, 2]]
    moved = documents.to(torch.device("meta"))
    assert moved.id_SB.is_meta
    assert moved.spans == documents.spans


# --- gradients of weights ------------------------------------------------------------------


def weighted_op(name: str) -> tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]:
    """Shape of the weight, and the operation on 12 tokens of width 8 with that weight."""
    ids_T = torch.arange(12) % 5
    rows_E = torch.tensor([4, 0, 8])
    weight_T = torch.ones(12)

    def head(x_TD: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy([Targets(x_TD, ids_T, weight_T)], weight)[0]

    taps, bias = torch.ones(8, 4), torch.zeros(8)
    return {
        "linear": ((6, 8), linear),
        "linear_fp32": ((6, 8), linear_fp32),
        "embedding": ((9, 8), lambda x_TD, weight: embedding(ids_T, weight) * x_TD),
        "rms_norm": ((8,), lambda x_TD, weight: rms_norm(x_TD, weight, 1e-5)),
        "gated_norm": (
            (8,),
            lambda x_TD, weight: gated_group_rms_norm(x_TD, x_TD, weight, 1e-5, 2),
        ),
        "conv-weight": (
            (8, 4),
            lambda x_TD, w: causal_conv(x_TD[:, None], w, nn.Parameter(bias.to(w)), None),
        ),
        "conv-bias": (
            (8,),
            lambda x_TD, b: causal_conv(x_TD[:, None], nn.Parameter(taps.to(b)), b, None),
        ),
        "grouped_linear": ((3, 6, 8), lambda x_TD, weight: grouped_linear(x_TD, weight, rows_E)),
        "cross_entropy": ((9, 8), head),
    }[name]


WEIGHTED = (
    "linear", "linear_fp32", "embedding", "rms_norm", "gated_norm", "conv-weight", "conv-bias",
    "grouped_linear", "cross_entropy",
)  # fmt: skip


def collecting(shape: tuple[int, ...]) -> nn.Parameter:
    """A BF16 weight whose gradient is collected in FP32, as the data-parallel wrapper sets up."""
    weight = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(2)).bfloat16())
    weight.main_grad = torch.zeros(shape)
    return weight


def backward(op: Callable, weight: Tensor, x_TD: Tensor, scale: float) -> None:
    y = op(x_TD.clone().requires_grad_(), weight)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3))
    y.backward((scale * dy).to(y.dtype))


@pytest.mark.parametrize("name", WEIGHTED)
def test_gradients_of_bf16_weights_add_up_in_fp32(name: str) -> None:
    """Three uses, the last two far below the BF16 resolution of the first one's gradient."""
    shape, op = weighted_op(name)
    uses = [(torch.randn(12, 8).bfloat16(), scale) for scale in (1.0, 2.0**-12, 2.0**-13)]
    weight = collecting(shape)
    for x_TD, scale in uses:
        backward(op, weight, x_TD, scale)
    assert weight.grad is None
    assert weight.grad_added_to_main_grad

    alone = []
    for x_TD, scale in uses:
        single = collecting(shape)
        backward(op, single, x_TD, scale)
        alone.append(single.main_grad)
    assert_close(weight.main_grad, sum(alone), limit=1e-7, name="sum")
    # What the small ones added is still there; rounding to BF16 would leave nothing of them.
    small = weight.main_grad.double() - alone[0].double()
    assert_close(small, alone[1] + alone[2], limit=5e-3, name="small parts")
    rounded = alone[0].bfloat16() + alone[1].bfloat16() + alone[2].bfloat16()
    assert rms_ratio(rounded - alone[0].bfloat16(), alone[1] + alone[2]) > 0.1


@pytest.mark.parametrize("name", WEIGHTED)
def test_collected_gradient_equals_the_one_of_autograd(name: str) -> None:
    """With and without `main_grad` a weight gets the same gradient, in FP32 to the last bit."""
    shape, op = weighted_op(name)
    x_TD = torch.randn(12, 8)
    values = torch.randn(shape)
    plain, collected = nn.Parameter(values.clone()), nn.Parameter(values.clone())
    collected.main_grad = torch.zeros(shape)
    for weight in (plain, collected):
        backward(op, weight, x_TD, 1.0)
    assert not hasattr(plain, "grad_added_to_main_grad")
    assert collected.grad is None
    assert torch.equal(plain.grad, collected.main_grad)


@pytest.mark.parametrize("name", WEIGHTED)
def test_bf16_gradient_without_a_buffer_has_the_dtype_of_the_weight(name: str) -> None:
    shape, op = weighted_op(name)
    weight = nn.Parameter(torch.randn(shape).bfloat16())
    backward(op, weight, torch.randn(12, 8).bfloat16(), 1.0)
    assert weight.grad.dtype == torch.bfloat16


def test_gradient_of_a_frequent_token_adds_up_in_fp32() -> None:
    """4096 ones; a BF16 sum stops growing at 256."""
    weight = nn.Parameter(torch.zeros(3, 2).bfloat16())
    embedding(torch.full((64, 64), 1), weight).sum().backward()
    assert weight.grad.tolist() == [[0, 0], [4096, 4096], [0, 0]]


@pytest.mark.parametrize("dtype", FORMATS.values(), ids=FORMATS)
def test_a_weight_widened_for_a_kernel_collects_its_gradient_in_fp32(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.randn(6, 8).to(dtype))
    weight.main_grad = torch.zeros(6, 8)
    for scale in (1.0, 2.0**-12):
        wide = widen(weight)
        assert wide.dtype == torch.float32
        assert torch.equal(wide, weight.float())
        wide.backward(torch.full((6, 8), scale))
    assert weight.grad is None
    assert torch.equal(weight.main_grad, torch.full((6, 8), 1 + 2.0**-12))


def test_a_dummy_gradient_wakes_autograd_when_asked_for() -> None:
    """The data-parallel wrapper reduces a gradient early when autograd's hook of it runs."""
    weight = collecting((6, 8))
    weight.needs_dummy_grad = True
    backward(linear, weight, torch.randn(12, 8).bfloat16(), 1.0)
    assert weight.grad.shape == weight.shape
    assert weight.main_grad.abs().sum() > 0


@pytest.mark.parametrize("name", [name for name in WEIGHTED if name != "cross_entropy"])
def test_frozen_weight_lets_the_gradient_pass(name: str) -> None:
    shape, op = weighted_op(name)
    values, x_TD = torch.randn(shape), torch.randn(12, 8)
    grads = []
    for weight in (nn.Parameter(values), nn.Parameter(values, requires_grad=False)):
        x = x_TD.clone().requires_grad_()
        y = op(x, weight)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)))
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_gate_of_a_row_scales_it_in_its_own_precision() -> None:
    """The gradient of an FP32 gate is formed in FP32 from BF16 rows."""
    h_RF, gate_R = torch.randn(5, 64).bfloat16(), torch.rand(5).requires_grad_()
    dy_RF = torch.randn(5, 64).bfloat16()
    y_RF = gated_squared_relu(h_RF, gate_R)
    assert y_RF.dtype == torch.bfloat16
    y_RF.backward(dy_RF)
    assert gate_R.grad.dtype == torch.float32
    exact_R = (dy_RF.double() * h_RF.double().relu() ** 2).sum(-1)
    assert_close(gate_R.grad, exact_R, limit=5e-3, name="gate")


# --- kernels -------------------------------------------------------------------------------


def on_gpu(
    shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype = torch.bfloat16
) -> SimpleNamespace:
    """What a kernel is chosen by, of a tensor that need not exist."""
    return SimpleNamespace(is_cuda=True, dtype=dtype, shape=shape, stride=lambda: stride)


WIDE = 1 << 16
FITS = on_gpu((1 << 15, WIDE), (WIDE, 1))  # the last offset is 2^31 - 1
PASSES = on_gpu((1 << 15, WIDE + 1), (WIDE + 1, 1))


def test_kernel_takes_up_to_the_last_int32_offset() -> None:
    """ "torch" stands for a kernel's package: it is installed for certain."""
    assert kernel_takes("torch", FITS)
    assert not kernel_takes("torch", on_gpu((2, 1), (INT32_MAX + 1, 1)))
    assert kernel_takes("torch", on_gpu((2, 1), (INT32_MAX, 1)))
    assert not kernel_takes("torch", PASSES)
    assert not kernel_takes("torch", FITS, FITS, PASSES)


def test_kernel_counts_offsets_not_elements() -> None:
    """A slice of a wide projection has few elements that lie far apart."""
    far = on_gpu((3, 8), (1 << 30, 1))
    assert not kernel_takes("torch", far)
    assert kernel_takes("torch", on_gpu((2, 8), (1 << 30, 1)))
    expanded = on_gpu((1 << 40, 8), (0, 1))
    assert kernel_takes("torch", expanded)


def test_kernel_refuses_other_devices_formats_and_missing_packages() -> None:
    small = on_gpu((4,), (1,))
    assert kernel_takes("torch", small)
    assert not kernel_takes("torch", torch.zeros(4))
    assert not kernel_takes("torch", small, torch.zeros(4, device="meta"))
    assert not kernel_takes("torch", on_gpu((4,), (1,), torch.float64))
    assert not kernel_takes("a_package_that_is_not_installed", small)


def test_backend_says_what_runs_on_a_cpu() -> None:
    assert describe(torch.device("cpu")) == [
        "scan: plain PyTorch (no GPU)",
        "convolution: plain PyTorch (no GPU)",
    ]
