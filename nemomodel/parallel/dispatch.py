"""Tokens to the ranks that hold their experts, and back.

A dispatch is a function of tokens, chosen experts and gates; it calls the experts of this rank with
rows grouped by expert, and returns for every token the sum over its experts. What travels has the
width the experts work at: L / D of the bytes of a plain MoE.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from nemomodel.ops.experts import Permutation, add_copies, copy_tokens, permute_gates
from nemomodel.parallel.mesh import Axis, Mesh

Experts = Callable[[Tensor, Tensor, Permutation], Tensor]
"""y_RL of rows z_RL with gates gate_R, in an order by expert."""


class Dispatch(Protocol):
    def __call__(
        self, z_TL: Tensor, expert_TK: Tensor, gate_TK: Tensor, experts: Experts
    ) -> tuple[Tensor, Tensor]:
        """
        Args:
            expert_TK: of all experts of the layer, whoever holds them.

        Returns:
            y_TL, and the copies [E] that this rank's tokens sent to each expert.
        """


def make_dispatch(num_experts: int, mesh: Mesh) -> Dispatch:
    if mesh.ep.size == mesh.etp.size == 1:
        return LocalDispatch(num_experts)
    return AllToAllDispatch(num_experts, ep=mesh.ep, etp=mesh.etp)


class LocalDispatch:
    """All experts are here."""

    def __init__(self, num_experts: int):
        self.num_experts = num_experts

    def __call__(
        self, z_TL: Tensor, expert_TK: Tensor, gate_TK: Tensor, experts: Experts
    ) -> tuple[Tensor, Tensor]:
        order = Permutation.by_expert(expert_TK, self.num_experts, dtype=z_TL.dtype)
        return _pass(z_TL, gate_TK, experts, order), order.count_E


class AllToAllDispatch:
    """Rank p of ep holds the p-th part of the experts; etp ranks hold a part of each of those.

    The rows of an expert arrive ordered by the rank they come from, and there by token. The ranks
    of etp have different tokens, so each passes its own on to the others.
    """

    def __init__(self, num_experts: int, *, ep: Axis, etp: Axis):
        self.num_experts, self.ep, self.etp = num_experts, ep, etp

    def __call__(
        self, z_TL: Tensor, expert_TK: Tensor, gate_TK: Tensor, experts: Experts
    ) -> tuple[Tensor, Tensor]:
        order = Permutation.by_owner(expert_TK, self.num_experts)
        sent_PE = order.count_E.view(self.ep.size, -1)
        received_PE = torch.empty_like(sent_PE)
        dist.all_to_all_single(received_PE, sent_PE, group=self.ep.group)
        send, receive = sent_PE.sum(1).tolist(), received_PE.sum(1).tolist()

        z_RL = _all_to_all(copy_tokens(z_TL, order), receive, send, self.ep)
        gate_R = _all_to_all(permute_gates(gate_TK, order), receive, send, self.ep)
        blocks = _gather_counts(received_PE.flatten(), self.etp)
        rows = [int(block.sum()) for block in blocks]
        z_RL, gate_R = _gather(z_RL, rows, self.etp), _gather(gate_R, rows, self.etp)
        expert_E = torch.arange(received_PE.shape[1], device=z_TL.device)
        expert_R = expert_E.repeat(self.ep.size * self.etp.size).repeat_interleave(
            torch.cat(blocks)
        )

        local = Permutation.by_expert(expert_R.unsqueeze(1), len(expert_E), dtype=z_TL.dtype)
        y_RL = _pass(z_RL, gate_R.unsqueeze(1), experts, local)
        y_RL = _all_to_all(_scatter(y_RL, rows, self.etp), send, receive, self.ep)
        return add_copies(y_RL, order), order.count_E


def _pass(z_TL: Tensor, gate_TK: Tensor, experts: Experts, order: Permutation) -> Tensor:
    y_RL = experts(copy_tokens(z_TL, order), permute_gates(gate_TK, order), order)
    return add_copies(y_RL, order)


def _all_to_all(t: Tensor, receive: Sequence[int], send: Sequence[int], axis: Axis) -> Tensor:
    if axis.size == 1:
        return t
    from megatron.core.tensor_parallel import mappings

    return mappings.all_to_all(axis.group, t, list(receive), list(send))


def _gather_counts(count: Tensor, etp: Axis) -> list[Tensor]:
    """The counts of every rank."""
    if etp.size == 1:
        return [count]
    counts = [torch.empty_like(count) for _ in range(etp.size)]
    dist.all_gather(counts, count, group=etp.group)
    return counts


def _gather(t: Tensor, rows: Sequence[int], etp: Axis) -> Tensor:
    """The rows of every rank, which are not equally many; gradients are summed over ranks."""
    if etp.size == 1:
        return t
    return _all_to_all(torch.cat([t] * etp.size), rows, [len(t)] * etp.size, etp)


def _scatter(t: Tensor, rows: Sequence[int], etp: Axis) -> Tensor:
    """The sum over ranks, of which each gets its own rows."""
    if etp.size == 1:
        return t
    mine = rows[etp.rank]
    return _all_to_all(t, [mine] * etp.size, rows, etp).view(etp.size, mine, -1).sum(0)
