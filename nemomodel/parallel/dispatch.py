"""Tokens to the ranks that hold their experts, and back.

A dispatch is a function of tokens, chosen experts and gates; it calls the experts of this rank with
rows grouped by expert, and returns for every token the sum over its experts. What travels has the
width the experts work at: L / D of the bytes of a plain MoE.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from nemomodel.ops.experts import Permutation, add_copies, copy_tokens, permute_gates
from nemomodel.parallel.mesh import Axis, Mesh


class Experts(Protocol):
    """The experts of this rank."""

    @property
    def by_micro_batch(self) -> bool:
        """Whether they want the rows of different micro-batches apart."""

    def __call__(
        self, z_RL: Tensor, gate_R: Tensor, order: Permutation, *, ranks: Sequence[int]
    ) -> Tensor:
        """y_RL of rows with their gates, in an order by expert; or, where they want that, by
        micro-batch and in it by expert.

        Args:
            ranks: of each micro-batch, how much further the data-parallel rank is that it is of.
        """


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
    if mesh.dispatcher != "alltoall":
        from nemomodel.parallel import flex_dispatch  # needs megatron-core

        return flex_dispatch.make(num_experts, mesh)
    return AllToAllDispatch(num_experts, ep=mesh.ep, etp=mesh.etp, positions=mesh.positions)


class LocalDispatch:
    """All experts are here."""

    def __init__(self, num_experts: int):
        self.num_experts = num_experts

    def __call__(
        self, z_TL: Tensor, expert_TK: Tensor, gate_TK: Tensor, experts: Experts
    ) -> tuple[Tensor, Tensor]:
        order = Permutation.by_expert(expert_TK, self.num_experts, dtype=z_TL.dtype)
        return _pass(z_TL, gate_TK, experts, order, ranks=[0]), order.count_E


class AllToAllDispatch:
    """Rank p of ep holds the p-th part of the experts; etp ranks hold a part of each of those.

    The ranks of etp have different tokens, so each passes what it received on to the others. An
    expert's rows stand by the rank they come from, and there by token.

    Args:
        positions: consecutive ranks share a micro-batch.
    """

    def __init__(self, num_experts: int, *, ep: Axis, etp: Axis, positions: Axis):
        self.num_experts, self.ep, self.etp, self.positions = num_experts, ep, etp, positions

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
        count_QPE = _gather_counts(received_PE, self.etp)
        rows = count_QPE.sum((1, 2)).tolist()
        z_RL, gate_R = _gather(z_RL, rows, self.etp), _gather(gate_R, rows, self.etp)

        local, ranks = self._by_expert(count_QPE, experts.by_micro_batch, z_TL.dtype)
        y_RL = _pass(z_RL, gate_R.unsqueeze(1), experts, local, ranks=ranks)
        y_RL = _all_to_all(_scatter(y_RL, rows, self.etp), send, receive, self.ep)
        return add_copies(y_RL, order), order.count_E

    def _by_expert(
        self, count_QPE: Tensor, by_micro_batch: bool, dtype: torch.dtype
    ) -> tuple[Permutation, list[int]]:
        """The order of the rows of this rank's experts.

        Args:
            count_QPE: rows by rank of etp, rank of ep, and expert, as they lie.
        """
        Q, P, E = count_QPE.shape
        place = torch.arange(Q * P * E, device=count_QPE.device).view(Q, P, E)
        q, p, e = place // (P * E), place // E % P, place % E
        rank = p * Q + q  # as ranks are numbered: etp runs faster
        micro_batch = rank // self.positions.size if by_micro_batch else torch.zeros_like(rank)
        group_R, rank_R = (
            t.flatten().repeat_interleave(count_QPE.flatten()) for t in (micro_batch * E + e, rank)
        )
        number = -(-Q * P // self.positions.size) if by_micro_batch else 1
        order = Permutation.by_expert(group_R.unsqueeze(1), number * E, dtype=dtype, order_T=rank_R)
        own = (self.ep.rank * Q + self.etp.rank) // self.positions.size if by_micro_batch else 0
        return order, [m - own for m in range(number)]


def _pass(
    z_TL: Tensor, gate_TK: Tensor, experts: Experts, order: Permutation, *, ranks: Sequence[int]
) -> Tensor:
    z_RL, gate_R = copy_tokens(z_TL, order), permute_gates(gate_TK, order)
    return add_copies(experts(z_RL, gate_R, order, ranks=ranks), order)


def _all_to_all(t: Tensor, receive: Sequence[int], send: Sequence[int], axis: Axis) -> Tensor:
    if axis.size == 1:
        return t
    from megatron.core.tensor_parallel import mappings

    return mappings.all_to_all(axis.group, t, list(receive), list(send))


def _gather_counts(count_PE: Tensor, etp: Axis) -> Tensor:
    """[Q, P, E] of the Q ranks of etp."""
    if etp.size == 1:
        return count_PE.unsqueeze(0)
    counts = [torch.empty_like(count_PE) for _ in range(etp.size)]
    dist.all_gather(counts, count_PE, group=etp.group)
    return torch.stack(counts)


def _gather(t: Tensor, rows: Sequence[int], etp: Axis) -> Tensor:
    """The rows of every rank, which are not equally many; gradients are summed over ranks.

    An all-to-all, because gloo gathers equal parts only.
    """
    if etp.size == 1:
        return t
    return _all_to_all(torch.cat([t] * etp.size), rows, [len(t)] * etp.size, etp)


def _scatter(t: Tensor, rows: Sequence[int], etp: Axis) -> Tensor:
    """The sum over ranks, of which each gets its own rows."""
    if etp.size == 1:
        return t
    mine = rows[etp.rank]
    return _all_to_all(t, [mine] * etp.size, rows, etp).view(etp.size, mine, t.shape[-1]).sum(0)
