"""Every operation against its oracle: the result and all gradients, in every layout and format."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nemomodel.ops import loss as loss_module
from nemomodel.ops.activation import gated_squared_relu, squared_relu
from nemomodel.ops.attention import causal_attention
from nemomodel.ops.conv import causal_conv
from nemomodel.ops.documents import Documents
from nemomodel.ops.experts import (
    Permutation,
    add_copies,
    copy_tokens,
    grouped_linear,
    permute_gates,
)
from nemomodel.ops.linear import embedding, linear, linear_fp32
from nemomodel.ops.loss import Targets, linear_cross_entropy
from nemomodel.ops.norm import gated_group_rms_norm, rms_norm
from nemomodel.ops.ssd import ssd
from tests.close import assert_close, rms_ratio
from tests.oracles.attention import attention_oracle
from tests.oracles.conv import conv_oracle
from tests.oracles.loss import linear_cross_entropy_oracle
from tests.oracles.moe import ffn_oracle
from tests.oracles.norm import gated_group_rmsnorm_oracle, rmsnorm_oracle
from tests.oracles.ssd import ssd_oracle

LIMITS = {torch.float64: 1e-10, torch.float32: 1e-5}
EPS = 1e-5

Lengths = tuple[tuple[int, ...], ...]


class Case(NamedTuple):
    """An operation and its oracle as functions of the same tensors, each to be differentiated."""

    op: Callable[..., Tensor]
    oracle: Callable[..., Tensor]
    activations: dict[str, Tensor]
    weights: dict[str, Tensor] = {}  # noqa: RUF012
    wide: frozenset[str] = frozenset()  # FP32 in a BF16 model


@pytest.fixture(autouse=True)
def _fill_empty_with_nan():
    """torch.empty holds NaN: memory that is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def packed(lengths: Lengths | None) -> Tensor | None:
    """Document numbers [B, S] of rows that hold documents of these lengths."""
    if lengths is None:
        return None
    return torch.stack([torch.arange(len(r)).repeat_interleave(torch.tensor(r)) for r in lengths])


def batch_first(oracle: Callable[..., Tensor], *tensors: Tensor, **settings: object) -> Tensor:
    """The oracle, whose activations (all of three or more dims) start with B, S."""
    tensors = tuple(t.transpose(0, 1) if t.dim() > 2 else t for t in tensors)
    return oracle(*tensors, **settings).transpose(0, 1)


# --- cases ---------------------------------------------------------------------------------


def ssd_case(
    length: int = 11,
    *,
    heads: int = 4,
    groups: int = 2,
    width: int = 3,
    chunk: int = 4,
    lengths: Lengths | None = None,
    decay: tuple[float, ...] | None = None,
) -> Case:
    """`decay`: dt * A of the heads, the same at all positions."""
    dt_SBH, A_H = functional.softplus(draw(length, 2, heads)), -draw(heads).exp()
    if decay is not None:
        dt_SBH = 1 + 0.1 * torch.rand_like(dt_SBH)
        A_H = torch.tensor(decay, dtype=torch.float64)
    document_BS = packed(lengths)
    documents = None if document_BS is None else Documents.from_ids(document_BS)
    return Case(
        lambda x, B, C, dt, A, D: ssd(x, dt, A, B, C, D, chunk_size=chunk, documents=documents),
        lambda x, B, C, dt, A, D: batch_first(
            ssd_oracle, x, dt, A, B, C, D, document_BS=document_BS
        ),
        {
            "x": draw(length, 2, heads, width),
            "B": draw(length, 2, groups, 5),
            "C": draw(length, 2, groups, 5),
            "dt": dt_SBH,
        },
        {"A": A_H, "D": draw(heads)},
        frozenset({"dt", "A", "D"}),
    )


def conv_case(length: int = 9, *, width: int = 4, lengths: Lengths | None = None) -> Case:
    document_BS = packed(lengths)
    documents = None if document_BS is None else Documents.from_ids(document_BS)
    return Case(
        lambda x, weight, bias: causal_conv(x, weight, bias, documents),
        lambda x, weight, bias: batch_first(conv_oracle, x, weight, bias, document_BS=document_BS),
        {"x": draw(length, 2, 6)},
        {"weight": draw(6, width), "bias": draw(6)},
    )


def rms_norm_case(*shape: int) -> Case:
    return Case(
        lambda x, weight: rms_norm(x, weight, EPS),
        lambda x, weight: rmsnorm_oracle(x, weight, eps=EPS),
        {"x": draw(*shape)},
        {"weight": draw(shape[-1])},
    )


def gated_norm_case(num_groups: int) -> Case:
    return Case(
        lambda x, z, weight: gated_group_rms_norm(x, z, weight, EPS, num_groups),
        lambda x, z, weight: gated_group_rmsnorm_oracle(
            x, z, weight, eps=EPS, num_groups=num_groups
        ),
        {"x": draw(5, 2, 12), "z": draw(5, 2, 12)},
        {"weight": draw(12)},
    )


def attention_case(
    length: int = 9, *, heads: int = 4, groups: int = 2, lengths: Lengths | None = None
) -> Case:
    document_BS = packed(lengths)
    documents = None if document_BS is None else Documents.from_ids(document_BS)
    return Case(
        lambda q, k, v: causal_attention(q, k, v, documents),
        lambda q, k, v: batch_first(attention_oracle, q, k, v, document_BS=document_BS),
        {"q": draw(length, 2, heads, 5), "k": draw(length, 2, groups, 5)}
        | {"v": draw(length, 2, groups, 5)},
    )


def squared_relu_case() -> Case:
    return Case(squared_relu, lambda h: torch.relu(h) ** 2, {"h": draw(5, 2, 7)})


def gated_squared_relu_case() -> Case:
    return Case(
        gated_squared_relu,
        lambda h_RF, gate_R: gate_R[:, None] * torch.relu(h_RF) ** 2,
        {"h_RF": draw(6, 7), "gate_R": draw(6)},
        wide=frozenset({"gate_R"}),
    )


def linear_case(op: Callable[..., Tensor], *shape: int) -> Case:
    weight = {"weight": draw(4, shape[-1])}
    return Case(op, lambda x, weight: x @ weight.T, {"x": draw(*shape)}, weight)


def embedding_case() -> Case:
    ids_SB = torch.tensor([[3, 0], [3, 3], [8, 1], [0, 3]])
    return Case(
        lambda weight: embedding(ids_SB, weight),
        lambda weight: torch.stack([torch.stack([weight[i] for i in row]) for row in ids_SB]),
        {},
        {"weight": draw(9, 5)},
    )


def grouped_linear_case(*rows: int) -> Case:
    def oracle(x_RI: Tensor, weight: Tensor) -> Tensor:
        expert_R = [e for e, count in enumerate(rows) for _ in range(count)]
        return torch.stack([weight[e] @ x for e, x in zip(expert_R, x_RI, strict=True)])

    return Case(
        lambda x_RI, weight: grouped_linear(x_RI, weight, torch.tensor(rows)),
        oracle,
        {"x_RI": draw(sum(rows), 6)},
        {"weight": draw(len(rows), 4, 6)},
    )


CHOICES = {
    "spread": torch.tensor([[0, 3], [2, 0], [3, 1], [0, 2], [1, 3]]),
    "idle-experts": torch.tensor([[3, 1], [1, 3], [1, 3], [3, 1], [3, 1]]),
    "one-expert": torch.tensor([[2], [2], [2], [2], [2]]),
    "all-experts": torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2]]),
}
EXPERTS = 4


def row_order(expert_TK: Tensor) -> list[tuple[int, int]]:
    """(token, which of its choices) of every row, grouped by expert."""
    T, K = expert_TK.shape
    places = [(t, k) for t in range(T) for k in range(K)]
    return [(t, k) for e in range(EXPERTS) for t, k in places if expert_TK[t, k] == e]


def copy_tokens_case(choice: str) -> Case:
    rows = row_order(CHOICES[choice])
    order = Permutation.by_expert(CHOICES[choice], EXPERTS, dtype=torch.float32)
    return Case(
        lambda z_TL: copy_tokens(z_TL, order),
        lambda z_TL: torch.stack([z_TL[t] for t, _ in rows]),
        {"z_TL": draw(len(CHOICES[choice]), 6)},
    )


def add_copies_case(choice: str) -> Case:
    expert_TK = CHOICES[choice]
    rows = row_order(expert_TK)
    order = Permutation.by_expert(expert_TK, EXPERTS, dtype=torch.float32)

    def oracle(y_RL: Tensor) -> Tensor:
        return torch.stack(
            [
                sum(y for y, (row, _) in zip(y_RL, rows, strict=True) if row == t)
                for t in range(len(expert_TK))
            ]
        )

    return Case(lambda y_RL: add_copies(y_RL, order), oracle, {"y_RL": draw(len(rows), 6)})


def permute_gates_case(choice: str) -> Case:
    rows = row_order(CHOICES[choice])
    order = Permutation.by_expert(CHOICES[choice], EXPERTS, dtype=torch.float32)
    return Case(
        lambda gate_TK: permute_gates(gate_TK, order),
        lambda gate_TK: torch.stack([gate_TK[t, k] for t, k in rows]),
        {"gate_TK": draw(*CHOICES[choice].shape)},
        wide=frozenset({"gate_TK"}),
    )


def experts_case(choice: str, *, padded: bool = False) -> Case:
    """All routed experts: sum_k gate_k expert_k(z)."""
    expert_TK = CHOICES[choice]
    dtype = torch.bfloat16 if padded else torch.float32
    order = Permutation.by_expert(expert_TK, EXPERTS, dtype=dtype)

    def op(z_TL: Tensor, gate_TK: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
        gate_R = permute_gates(gate_TK, order)
        h_RF = grouped_linear(copy_tokens(z_TL, order), fc1, order.rows_E)
        h_RF = gated_squared_relu(h_RF, gate_R)
        return add_copies(grouped_linear(h_RF, fc2, order.rows_E), order)

    def oracle(z_TL: Tensor, gate_TK: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
        return torch.stack(
            [
                sum(
                    gate * ffn_oracle(z_L, fc1[e], fc2[e])
                    for gate, e in zip(gate_K, expert_K, strict=True)
                )
                for z_L, gate_K, expert_K in zip(z_TL, gate_TK, expert_TK, strict=True)
            ]
        )

    return Case(
        op,
        oracle,
        {"z_TL": draw(len(expert_TK), 6), "gate_TK": draw(*expert_TK.shape)},
        {"fc1": draw(EXPERTS, 7, 6), "fc2": draw(EXPERTS, 6, 7)},
        frozenset({"gate_TK"}),
    )


def cross_entropy_case(
    heads: int = 1, *, tokens: int = 10, masked: tuple[int, ...] = (), scale: float = 1.0
) -> Case:
    """`masked`: tokens of weight 0 in every head."""
    label_T = torch.randint(13, (tokens,))
    weight_T = torch.rand(tokens, dtype=torch.float64) + 0.1
    weight_T[list(masked)] = 0
    factors = [weight_T * 0.5**head for head in range(heads)]

    def op(weight: Tensor, **hiddens: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        targets = [
            Targets(hidden, label_T, factor.to(wide))
            for hidden, factor in zip(hiddens.values(), factors, strict=True)
        ]
        return linear_cross_entropy(targets, weight)[0]

    def oracle(weight: Tensor, **hiddens: Tensor) -> Tensor:
        return sum(
            linear_cross_entropy_oracle(hidden, weight, label_T, factor)
            for hidden, factor in zip(hiddens.values(), factors, strict=True)
        )

    hiddens = {f"hidden_{head}": scale * draw(tokens, 6) for head in range(heads)}
    return Case(op, oracle, hiddens, {"weight": draw(13, 6)})


ORDINARY = {
    "ssd": ssd_case,
    "ssd-packed": partial(ssd_case, lengths=((3, 5, 1, 2), (1, 1, 9))),
    "conv": conv_case,
    "conv-packed": partial(conv_case, lengths=((3, 5, 1), (1, 2, 6))),
    "rms_norm": partial(rms_norm_case, 5, 2, 12),
    "gated_norm": partial(gated_norm_case, 3),
    "attention": attention_case,
    "attention-packed": partial(attention_case, lengths=((3, 5, 1), (1, 1, 7))),
    "squared_relu": squared_relu_case,
    "gated_squared_relu": gated_squared_relu_case,
    "linear": partial(linear_case, linear, 5, 2, 6),
    "linear_fp32": partial(linear_case, linear_fp32, 5, 2, 6),
    "embedding": embedding_case,
    "grouped_linear": partial(grouped_linear_case, 3, 0, 4, 1),
    "copy_tokens": partial(copy_tokens_case, "spread"),
    "add_copies": partial(add_copies_case, "spread"),
    "permute_gates": partial(permute_gates_case, "spread"),
    "experts": partial(experts_case, "spread"),
    "cross_entropy": partial(cross_entropy_case, 3, masked=(0, 4, 9)),
}
SPECIAL = {
    "ssd-whole-chunks": partial(ssd_case, 8),
    "ssd-one-chunk": partial(ssd_case, 4),
    "ssd-shorter-than-chunk": partial(ssd_case, 3, chunk=8),
    "ssd-length-1": partial(ssd_case, 1),
    "ssd-length-1-chunk-1": partial(ssd_case, 1, chunk=1),
    "ssd-one-group": partial(ssd_case, groups=1),
    "ssd-group-per-head": partial(ssd_case, heads=3, groups=3),
    "ssd-one-head": partial(ssd_case, heads=1, groups=1),
    "ssd-three-heads-per-group": partial(ssd_case, heads=6, groups=2),
    "ssd-mixed-decay": partial(ssd_case, decay=(-50.0, -1e-3, -1.0, -200.0)),
    "ssd-documents-at-chunk-borders": partial(ssd_case, lengths=((4, 4, 3), (8, 3))),
    "ssd-documents-of-length-1": partial(ssd_case, lengths=((1,) * 11, (4, 1, 1, 1, 1, 3))),
    "ssd-document-over-many-chunks": partial(ssd_case, 13, chunk=2, lengths=((1, 12), (11, 2))),
    # Wide enough that the sequence is worked off in several blocks of two chunks.
    "ssd-blocks": partial(ssd_case, 150, heads=16, width=64, chunk=32),
    "ssd-blocks-packed": partial(
        ssd_case, 150, heads=16, width=64, chunk=32, lengths=((64, 86), (10, 54, 1, 63, 22))
    ),
    "ssd-one-document-per-row": partial(ssd_case, lengths=((11,), (11,))),
    **{f"ssd-chunk-{Q}": partial(ssd_case, chunk=Q) for Q in (1, 2, 3, 5, 11, 16, 64)},
    **{
        f"ssd-packed-chunk-{Q}": partial(ssd_case, chunk=Q, lengths=((3, 5, 1, 2), (1, 1, 9)))
        for Q in (1, 2, 3, 5, 11, 16)
    },
    "conv-shorter-than-kernel": partial(conv_case, 2),
    "conv-length-1": partial(conv_case, 1),
    "conv-kernel-length": partial(conv_case, 4),
    "conv-kernel-1": partial(conv_case, width=1),
    "conv-kernel-1-packed": partial(conv_case, width=1, lengths=((3, 6), (9,))),
    "conv-kernel-2": partial(conv_case, width=2),
    "conv-shorter-than-kernel-packed": partial(conv_case, 3, lengths=((1, 2), (2, 1))),
    "conv-documents-of-length-1": partial(conv_case, lengths=((1,) * 9, (9,))),
    "rms_norm-rows": partial(rms_norm_case, 7, 4),
    "rms_norm-one-row": partial(rms_norm_case, 1, 1, 6),
    "gated_norm-one-group": partial(gated_norm_case, 1),
    "gated_norm-group-per-channel": partial(gated_norm_case, 12),
    "attention-length-1": partial(attention_case, 1),
    "attention-one-group": partial(attention_case, groups=1),
    "attention-no-sharing": partial(attention_case, groups=4),
    # More than one block of queries.
    "attention-blocks": partial(attention_case, 150, heads=2, groups=1),
    "attention-blocks-packed": partial(
        attention_case, 150, heads=2, groups=1, lengths=((3, 147), (129, 21))
    ),
    "attention-one-document-per-row": partial(attention_case, lengths=((9,), (9,))),
    "attention-documents-of-length-1": partial(attention_case, lengths=((1,) * 9, (9,))),
    "linear-rows": partial(linear_case, linear, 7, 6),
    "linear-one-row": partial(linear_case, linear, 1, 1, 6),
    "grouped_linear-one-expert": partial(grouped_linear_case, 8),
    "grouped_linear-all-at-one": partial(grouped_linear_case, 0, 0, 8, 0),
    "grouped_linear-last-idle": partial(grouped_linear_case, 2, 6, 0),
    **{f"copy_tokens-{choice}": partial(copy_tokens_case, choice) for choice in CHOICES},
    **{f"add_copies-{choice}": partial(add_copies_case, choice) for choice in CHOICES},
    **{f"permute_gates-{choice}": partial(permute_gates_case, choice) for choice in CHOICES},
    **{f"experts-{choice}": partial(experts_case, choice) for choice in CHOICES},
    **{
        f"experts-{choice}-padded": partial(experts_case, choice, padded=True) for choice in CHOICES
    },
    "cross_entropy-one-head": cross_entropy_case,
    "cross_entropy-one-token": partial(cross_entropy_case, tokens=1),
    "cross_entropy-all-masked-but-one": partial(cross_entropy_case, 2, masked=tuple(range(9))),
    "cross_entropy-large-logits": partial(cross_entropy_case, 2, scale=300.0),
}


# --- running a case ------------------------------------------------------------------------


def run(
    function: Callable[..., Tensor],
    inputs: dict[str, Tensor],
    dy: Tensor | None = None,
    *,
    layout: Callable[[Tensor], Tensor] = lambda t: t,
    sliced: frozenset[str] = frozenset(),
) -> tuple[Tensor, dict[str, Tensor]]:
    """The result and the gradients of `inputs`; those named in `sliced` enter in `layout`."""
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    y = function(**{n: layout(t) if n in sliced else t for n, t in leaves.items()})
    dy = gradient_of(y) if dy is None else dy.to(y.dtype)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return y.detach(), dict(zip(leaves, grads, strict=True))


def gradient_of(y: Tensor) -> Tensor:
    """The same random values in every format."""
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    return dy.to(torch.bfloat16).to(y.dtype)


def in_format(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    wide = torch.promote_types(dtype, torch.float32)
    inputs = case.activations | case.weights
    return {name: t.to(wide if name in case.wide else dtype) for name, t in inputs.items()}


def in_float64(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t.double() for name, t in inputs.items()}


def assert_same(
    actual: tuple[Tensor, dict[str, Tensor]],
    expected: tuple[Tensor, dict[str, Tensor]],
    *,
    limit: float,
) -> None:
    assert_close(actual[0], expected[0], limit=limit, name="result")
    for name, grad in actual[1].items():
        assert_close(grad, expected[1][name], limit=limit, name=f"gradient of {name}")


# --- tests ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", LIMITS, ids=["fp64", "fp32"])
@pytest.mark.parametrize(
    "build", [*ORDINARY.values(), *SPECIAL.values()], ids=[*ORDINARY, *SPECIAL]
)
def test_op_and_gradients_equal_the_oracle(build: Callable[[], Case], dtype: torch.dtype) -> None:
    case = build()
    inputs = in_format(case, dtype)
    actual = run(case.op, inputs)
    assert actual[0].dtype == dtype
    assert_same(actual, run(case.oracle, in_float64(inputs)), limit=LIMITS[dtype])


@pytest.mark.parametrize("dtype", LIMITS, ids=["fp64", "fp32"])
@pytest.mark.parametrize(
    "lengths", [None, ((3, 5, 1, 2), (1, 1, 9))], ids=["one-document", "packed"]
)
def test_ssd_forgets_everything_under_strong_decay(
    lengths: Lengths | None, dtype: torch.dtype
) -> None:
    """exp(-50) = 2e-22 is all that passes from one position to the next, and all A can feel.

    The terms of A's gradient are as large as those of D's and cancel to that, so its error is
    measured against D's.
    """
    case = ssd_case(lengths=lengths, decay=(-50.0,) * 4)
    inputs = in_format(case, dtype)
    y, grads = run(case.op, inputs)
    exact_y, exact_grads = run(case.oracle, in_float64(inputs))
    grads["A"], exact_grads["A"] = (g["A"] + g["D"] for g in (grads, exact_grads))
    assert_same((y, grads), (exact_y, exact_grads), limit=LIMITS[dtype])


def slice_of_wider(t: Tensor) -> Tensor:
    other = torch.full_like(t[..., :1], 7.0).detach()
    return torch.cat([other, t, other], dim=-1)[..., 1:-1]


def batch_major(t: Tensor) -> Tensor:
    return t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 1 else t


@pytest.mark.parametrize("layout", [slice_of_wider, batch_major], ids=["slice", "batch-major"])
@pytest.mark.parametrize("build", ORDINARY.values(), ids=ORDINARY)
def test_op_takes_any_layout(build: Callable[[], Case], layout: Callable) -> None:
    case = build()
    expected = run(case.oracle, case.activations | case.weights)
    dy = layout(gradient_of(expected[0])) if expected[0].dim() else None
    actual = run(
        case.op,
        case.activations | case.weights,
        dy,
        layout=layout,
        sliced=frozenset(case.activations),
    )
    assert_same(actual, expected, limit=1e-10)


@pytest.mark.parametrize("build", ORDINARY.values(), ids=ORDINARY)
def test_op_takes_the_gradient_of_a_sum_and_leaves_its_inputs_alone(
    build: Callable[[], Case],
) -> None:
    """That gradient is one number expanded over the shape: writing into it is an error."""
    case = build()
    inputs = case.activations | case.weights
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    y = case.op(**leaves)
    value = y.detach().clone()
    dy = torch.full((), 0.5, dtype=y.dtype).expand_as(y)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    assert torch.equal(y, value), "the backward pass changed the result"
    assert bool((dy == 0.5).all()), "the backward pass changed the gradient it was given"
    for name, leaf in leaves.items():
        assert torch.equal(leaf, inputs[name]), f"{name} was changed"
    expected = run(case.oracle, inputs, dy)
    assert_same((y, dict(zip(leaves, grads, strict=True))), expected, limit=1e-10)


@pytest.mark.parametrize("build", ORDINARY.values(), ids=ORDINARY)
def test_bf16_error_is_at_most_twice_that_of_plain_bf16(build: Callable[[], Case]) -> None:
    """Plain is the oracle with every tensor and every step in BF16, differentiated by autograd."""
    case = build()
    inputs = in_format(case, torch.bfloat16)
    y, grads = run(case.op, inputs)
    exact_y, exact_grads = run(case.oracle, in_float64(inputs))
    plain = {name: t.bfloat16() for name, t in inputs.items()}
    plain_y, plain_grads = run(case.oracle, plain)
    results = {"result": (y, plain_y, exact_y)}
    results |= {name: (grads[name], plain_grads[name], exact_grads[name]) for name in grads}
    for name, (actual, plain_value, exact) in results.items():
        error, limit = rms_ratio(actual, exact), 2 * rms_ratio(plain_value, exact) + 1e-6
        assert error <= limit, f"{name}: error {error:.2e}, twice the plain one {limit:.2e}"


ONE_ROUNDING = 3e-3
"""RMS of rounding to BF16 is at most 2^-9 = 2.0e-3; the rest is for the FP32 sum before it."""


@pytest.mark.parametrize(
    "name", ["conv", "conv-packed", "rms_norm", "gated_norm", "linear", "embedding"]
)
def test_bf16_result_and_gradients_are_rounded_once(name: str) -> None:
    case = ORDINARY[name]()
    inputs = in_format(case, torch.bfloat16)
    assert_same(run(case.op, inputs), run(case.oracle, in_float64(inputs)), limit=ONE_ROUNDING)


def test_linear_fp32_of_bf16_has_fp32_error() -> None:
    case = linear_case(linear_fp32, 5, 2, 6)
    inputs = in_format(case, torch.bfloat16)
    y, _ = run(case.op, inputs)
    assert y.dtype == torch.float32
    assert_close(y, run(case.oracle, in_float64(inputs))[0], limit=1e-6, name="result")


# --- routed experts ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["plain", "padded"])
@pytest.mark.parametrize("choice", CHOICES)
def test_rows_are_grouped_by_expert(choice: str, dtype: torch.dtype) -> None:
    expert_TK = CHOICES[choice]
    order = Permutation.by_expert(expert_TK, EXPERTS, dtype=dtype)
    rows = row_order(expert_TK)
    count = [sum(int(expert_TK[t, k]) == e for t, k in rows) for e in range(EXPERTS)]
    assert order.count_E.tolist() == count
    multiple = 32 if dtype == torch.bfloat16 else 1
    assert order.rows_E.tolist() == [-(-n // multiple) * multiple for n in count]
    assert len(order.token_R) == sum(order.rows_E)
    border_E = [0, *order.rows_E.cumsum(0).tolist()]
    for e in range(EXPERTS):
        own = [(t, k) for t, k in rows if expert_TK[t, k] == e]
        start = border_E[e]
        assert order.token_R[start : start + len(own)].tolist() == [t for t, _ in own]
        for row, (t, k) in enumerate(own, start):
            assert order.row_TK[t, k] == row


def test_padding_rows_add_exactly_nothing() -> None:
    """Token 0, which all padding holds, is at expert 0 alone: 1 to 3 must not feel its value."""
    expert_TK = torch.tensor([[0], [1], [2], [3], [1]])
    order = Permutation.by_expert(expert_TK, EXPERTS, dtype=torch.bfloat16)
    assert len(order.token_R) == 4 * 32
    z_TL, gate_TK = draw(5, 6).bfloat16(), torch.rand(5, 1)
    fc1, fc2 = draw(EXPERTS, 7, 6).bfloat16(), draw(EXPERTS, 6, 7).bfloat16()

    def op(z_TL: Tensor, gate_TK: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
        h_RF = grouped_linear(copy_tokens(z_TL, order), fc1, order.rows_E)
        h_RF = gated_squared_relu(h_RF, permute_gates(gate_TK, order))
        return add_copies(grouped_linear(h_RF, fc2, order.rows_E), order)

    other_TL = z_TL.clone()
    other_TL[0] = 1000 * other_TL[0]
    inputs = {"gate_TK": gate_TK, "fc1": fc1, "fc2": fc2}
    (y, grads), (other_y, other_grads) = (run(op, {"z_TL": z} | inputs) for z in (z_TL, other_TL))
    assert not torch.equal(y[0], other_y[0])
    assert torch.equal(y[1:], other_y[1:])
    for name in inputs:
        assert not torch.equal(grads[name][0], other_grads[name][0])
        assert torch.equal(grads[name][1:], other_grads[name][1:]), f"gradient of {name}"


def test_weight_gradient_of_an_idle_expert_is_zero() -> None:
    case = grouped_linear_case(3, 0, 4, 1)
    _, grads = run(case.op, case.activations | case.weights)
    assert torch.equal(grads["weight"][1], torch.zeros(4, 6, dtype=torch.float64))


# --- cross-entropy -------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3, 4, 10], ids=lambda n: f"{n}-tokens")
def test_cross_entropy_in_chunks_equals_the_oracle(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loss_module.CHUNK_TOKENS, "cpu", chunk)
    case = cross_entropy_case(3, masked=(0, 4, 9))
    inputs = case.activations | case.weights
    assert_same(run(case.op, inputs), run(case.oracle, inputs), limit=1e-10)


@pytest.mark.parametrize("rows", [4, 7, 10], ids=lambda n: f"{n}-tokens")
def test_narrow_cross_entropy_by_several_products(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each product of the head is for some tokens, and the FP32 logits for fewer."""
    monkeypatch.setattr(loss_module, "CPU_NARROW_TOKENS", rows)
    monkeypatch.setitem(loss_module.CHUNK_TOKENS, "cpu", 3)
    case = cross_entropy_case(3, masked=(0, 4, 9))
    inputs = in_format(case, torch.bfloat16)
    assert_same(run(case.op, inputs), run(case.oracle, in_float64(inputs)), limit=1e-2)


def test_cross_entropy_sums_are_unweighted_and_per_head() -> None:
    hidden_TD, weight, label_T = draw(2, 6, 4), draw(9, 4), torch.randint(9, (6,))
    factors = torch.tensor([[2.0, 0, 0.5, 1, 0, 3], [0, 0, 0, 0, 0, 0.1]]).double()
    heads = [Targets(h, label_T, f) for h, f in zip(hidden_TD, factors, strict=True)]
    weight.requires_grad_()
    total, sums = linear_cross_entropy(heads, weight)
    assert not sums.requires_grad
    for i, hidden in enumerate(hidden_TD):
        counted = (factors[i] != 0).double()
        expected = linear_cross_entropy_oracle(hidden, weight, label_T, counted)
        assert_close(sums[i], expected, limit=1e-12, name=f"sum of head {i}")
    with torch.no_grad():
        again = linear_cross_entropy(heads, weight)
    assert torch.equal(again[0], total)
    assert torch.equal(again[1], sums)


@pytest.mark.parametrize("frozen", ["weight", "hidden_0", "hidden_1", "both-hiddens"])
def test_cross_entropy_of_frozen_inputs(frozen: str) -> None:
    case = cross_entropy_case(2, masked=(3,))
    inputs = case.activations | case.weights
    still = {"hidden_0", "hidden_1"} if frozen == "both-hiddens" else {frozen}
    leaves = {n: t.clone().requires_grad_(n not in still) for n, t in inputs.items()}
    (1.7 * case.op(**leaves)).backward()
    _, expected = run(case.oracle, inputs, torch.tensor(1.7, dtype=torch.float64))
    for name, leaf in leaves.items():
        if name in still:
            assert leaf.grad is None
        else:
            assert_close(leaf.grad, expected[name], limit=1e-10, name=f"gradient of {name}")


def test_masked_targets_give_exactly_no_gradient() -> None:
    """Their hidden states enter neither their own gradient nor that of the head."""
    case = cross_entropy_case(1, masked=(2, 5))
    inputs = case.activations | case.weights
    _, grads = run(case.op, inputs)
    assert torch.equal(grads["hidden_0"][[2, 5]], torch.zeros(2, 6, dtype=torch.float64))
    inputs["hidden_0"][[2, 5]] *= 50
    _, other = run(case.op, inputs)
    assert torch.equal(grads["weight"], other["weight"])
