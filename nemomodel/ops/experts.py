"""Routed experts on one device: permutation of token copies and grouped matrix products."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nemomodel.ops.activation import gated_squared_relu
from nemomodel.ops.wgrad import deliver_grad

CPU_BF16_ROWS = 32
"""Rows per expert are a multiple of this for BF16 on a CPU, where oneDNN compiles a kernel for
every new number of rows (milliseconds) and keeps only the last thousand."""


@dataclass(frozen=True)
class Permutation:
    """Order that groups the K copies of every token by expert.

    R = T * K rows, plus padding after each expert's own. A padding row holds some token with
    gate 0, so it adds exactly nothing to any output or gradient.
    """

    token_R: Tensor  # which token a row is a copy of
    row_TK: Tensor  # which row is the copy of token t for its k-th expert
    count_E: Tensor  # token copies of each expert, int64
    rows_E: Tensor  # rows of each expert, padding included

    @staticmethod
    def by_expert(
        expert_TK: Tensor,
        num_experts: int,
        *,
        dtype: torch.dtype,
        order_T: Tensor | None = None,
    ) -> "Permutation":
        """Group by chosen expert, for products of `dtype`.

        Args:
            order_T: not negative; an expert's tokens stand by this, and those with the same one as
                they come. None: all as they come.
        """
        pad = dtype == torch.bfloat16 and not expert_TK.is_cuda
        return Permutation._by_expert(expert_TK, num_experts, pad=pad, order_T=order_T)

    @staticmethod
    def by_owner(expert_TK: Tensor, num_experts: int) -> "Permutation":
        """Group by chosen expert to send the copies away: without padding."""
        return Permutation._by_expert(expert_TK, num_experts, pad=False)

    @staticmethod
    def _by_expert(
        expert_TK: Tensor, num_experts: int, *, pad: bool, order_T: Tensor | None = None
    ) -> "Permutation":
        T, K = expert_TK.shape
        key_TK = expert_TK
        if order_T is not None and T:
            key_TK = expert_TK * (order_T.max() + 1) + order_T.unsqueeze(1)
        copy_R = key_TK.flatten().argsort(stable=True)
        expert_R = expert_TK.flatten()[copy_R]
        count_E = torch.bincount(expert_R, minlength=num_experts)
        place_R, rows_E, num_rows = torch.arange(T * K, device=expert_R.device), count_E, T * K
        if pad:
            rows_E = (count_E + CPU_BF16_ROWS - 1) // CPU_BF16_ROWS * CPU_BF16_ROWS
            num_rows = int(rows_E.sum())
            padding_before_E = (rows_E - count_E).cumsum(0) - (rows_E - count_E)
            place_R = place_R + padding_before_E[expert_R]
        token_R = torch.zeros(num_rows, dtype=torch.int64, device=expert_R.device)
        token_R[place_R] = copy_R // K
        row_TK = torch.empty_like(copy_R).index_copy_(0, copy_R, place_R).view(T, K)
        return Permutation(token_R, row_TK, count_E, rows_E)


def copy_tokens(z_TL: Tensor, order: Permutation) -> Tensor:
    """Row r is a copy of token token_R[r]: [R, L]."""
    return _CopyTokens.apply(z_TL, order)


def add_copies(y_RL: Tensor, order: Permutation) -> Tensor:
    """The sum of every token's K rows: [T, L]; the transpose of `copy_tokens`."""
    return _AddCopies.apply(y_RL, order)


def permute_gates(gate_TK: Tensor, order: Permutation) -> Tensor:
    """The gate of every row, 0 for padding: [R]."""
    return _PermuteGates.apply(gate_TK, order)


def expert_mlp(x_RL: Tensor, gate_R: Tensor, fc1: Tensor, fc2: Tensor, rows_E: Tensor) -> Tensor:
    """fc2_e (gate * relu(fc1_e x)^2) for the rows_E[e] consecutive rows of each expert e.

    Gates enter before fc2, which is linear.

    Args:
        fc1, fc2: [E, F, L] and [E, L, F]; their gradients accumulate in FP32.
    """
    if not x_RL.is_cuda:
        return _ExpertMlp.apply(x_RL, gate_R, fc1, fc2, rows_E)
    h_RF = gated_squared_relu(grouped_linear(x_RL, fc1, rows_E), gate_R)
    return grouped_linear(h_RF, fc2, rows_E)


def grouped_linear(x_RI: Tensor, weight: Tensor, rows_E: Tensor) -> Tensor:
    """y = x W_e^T for the rows_E[e] consecutive rows of each expert e.

    Args:
        weight: [E, O, I]; its gradient accumulates in FP32.
    """
    return _GroupedLinear.apply(x_RI, weight, rows_E)


def _sum_rows(y_RL: Tensor, order: Permutation) -> Tensor:
    if y_RL.is_cuda or y_RL.dtype == torch.bfloat16:  # embedding_bag rounds ties of BF16 up
        return F.embedding(order.row_TK, y_RL).sum(1)
    return F.embedding_bag(order.row_TK, y_RL, mode="sum")


class _CopyTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, order):
        ctx.order = order
        return F.embedding(order.token_R, z)

    @staticmethod
    def backward(ctx, dy):
        return _sum_rows(dy, ctx.order), None


class _AddCopies(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, order):
        ctx.order = order
        return _sum_rows(y, order)

    @staticmethod
    def backward(ctx, dz):
        return F.embedding(ctx.order.token_R, dz), None


class _PermuteGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, order):
        ctx.row_TK = order.row_TK
        gate_R = gate.new_zeros(len(order.token_R))
        return gate_R.index_copy_(0, order.row_TK.flatten(), gate.flatten())

    @staticmethod
    def backward(ctx, d_gate_R):
        return d_gate_R[ctx.row_TK], None


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, rows_E):
        ctx.save_for_backward(x, rows_E)
        ctx.weight = weight
        return _grouped(x, weight.mT, rows_E)

    @staticmethod
    def backward(ctx, dy):
        x, rows_E = ctx.saved_tensors
        dx = _grouped(dy, ctx.weight, rows_E) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None, None
        return dx, deliver_grad(ctx.weight, _grouped_wgrad(dy, x, rows_E)), None


class _ExpertMlp(torch.autograd.Function):
    """Each expert as a whole, so that what lies between its products stays in a CPU's cache."""

    @staticmethod
    def forward(ctx, x, gate, fc1, fc2, rows_E):
        rows = rows_E.tolist()
        narrow = gate.to(x.dtype).unsqueeze(-1)
        relu, y = x.new_empty(len(x), fc1.shape[1]), torch.empty_like(x)
        for x_e, gate_e, relu_e, y_e, fc1_e, fc2_e in zip(
            *(t.split(rows) for t in (x, narrow, relu, y)), fc1, fc2, strict=True
        ):
            if len(x_e):
                torch.mm(x_e, fc1_e.T, out=relu_e).relu_()
                torch.mm(relu_e.square().mul_(gate_e), fc2_e.T, out=y_e)
        ctx.save_for_backward(x, gate, relu)
        ctx.fc1, ctx.fc2, ctx.rows = fc1, fc2, rows
        return y

    @staticmethod
    def backward(ctx, dy):
        x, gate, relu = ctx.saved_tensors
        fc1, fc2, rows = ctx.fc1, ctx.fc2, ctx.rows
        narrow = gate.to(x.dtype).unsqueeze(-1)
        dx, d_gate = torch.empty_like(x), torch.empty_like(gate)
        d_fc1, d_fc2 = (torch.empty_like(w, requires_grad=False) for w in (fc1, fc2))
        by_expert = [t.split(rows) for t in (x, narrow, relu, dy, dx, d_gate)]
        for x_e, gate_e, relu_e, dy_e, dx_e, d_gate_e, fc1_e, fc2_e, d_fc1_e, d_fc2_e in zip(
            *by_expert, fc1, fc2, d_fc1, d_fc2, strict=True
        ):
            # No rows: zero weight gradients.
            torch.mm(dy_e.T, relu_e.square().mul_(gate_e), out=d_fc2_e)
            dh_e = (dy_e @ fc2_e).mul_(relu_e)
            torch.sum(dh_e * relu_e, -1, dtype=gate.dtype, out=d_gate_e)
            dh_e.mul_(2 * gate_e)
            torch.mm(dh_e, fc1_e, out=dx_e)
            torch.mm(dh_e.T, x_e, out=d_fc1_e)
        _, _, *wanted, _ = ctx.needs_input_grad
        d_weights = zip(wanted, (fc1, fc2), (d_fc1, d_fc2), strict=True)
        d_fc1, d_fc2 = (deliver_grad(w, dw) if want else None for want, w, dw in d_weights)
        return dx, d_gate, d_fc1, d_fc2, None


def _has_kernel(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16 and torch.cuda.get_device_capability()[0] >= 9


def _grouped(x_RI: Tensor, weight_EIO: Tensor, rows_E: Tensor) -> Tensor:
    if _has_kernel(x_RI):
        return torch._grouped_mm(x_RI, weight_EIO, offs=rows_E.cumsum(0, dtype=torch.int32))
    y_RO = x_RI.new_empty(len(x_RI), weight_EIO.shape[-1])
    start = 0
    for e, count in enumerate(rows_E.tolist()):
        if count:
            rows = slice(start, start + count)
            torch.mm(x_RI[rows], weight_EIO[e], out=y_RO[rows])
        start += count
    return y_RO


def _grouped_wgrad(dy_RO: Tensor, x_RI: Tensor, rows_E: Tensor) -> Tensor:
    if _has_kernel(x_RI):
        return torch._grouped_mm(dy_RO.mT, x_RI, offs=rows_E.cumsum(0, dtype=torch.int32))
    dw_EOI = x_RI.new_empty(len(rows_E), dy_RO.shape[1], x_RI.shape[1])
    start = 0
    for e, count in enumerate(rows_E.tolist()):
        rows = slice(start, start + count)
        torch.mm(dy_RO[rows].mT, x_RI[rows], out=dw_EOI[e])  # no rows: zeros
        start += count
    return dw_EOI
