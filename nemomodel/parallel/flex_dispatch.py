"""Tokens to their experts and back by fused kernels of a cluster: DeepEP and HybridEP.

The transport is that of megatron-core's flex dispatcher (core/transformer/moe/fused_a2a.py in
0.19.2). Its functions are called without the dispatcher around them: no `TransformerConfig` is
needed, and what lies between the two transfers is our own, order of rows, gates and experts.

No cluster has run this module. Tests run it, and megatron-core's part below it, over an all-to-all
in place of the kernels.

Rows of all ranks are mixed, which quantised experts do not want (`Experts.by_micro_batch`): only
BF16 recipes pass the checks of the config.

The ranks of ep and etp exchange as one group, etp running faster. Expert l of ep rank p has a place
on each of its etp ranks t, which hold a part of it: place (p * etp + t) * local + l.
"""

import torch
from torch import Tensor

from nemomodel.config.load import ConfigError
from nemomodel.ops.experts import Permutation, permute_gates
from nemomodel.ops.precision import wide
from nemomodel.parallel import cpu
from nemomodel.parallel.dispatch import Experts
from nemomodel.parallel.mesh import Mesh

cpu.install()  # before the first import of megatron

from megatron.core.transformer.moe import fused_a2a  # noqa: E402


def require(dispatcher: str, device: torch.device) -> None:
    """Check that this process has the kernels of `parallel.dispatcher`.

    Raises:
        ConfigError: it has not.
    """
    key, instead = f"parallel.dispatcher={dispatcher!r}", 'use "alltoall"'
    if device.type != "cuda":
        raise ConfigError(f"{key}: its kernels need GPUs, this process sees none; {instead}")
    if dispatcher == "deepep" and not fused_a2a.HAVE_DEEP_EP:
        raise ConfigError(f"{key}: the package deep_ep is not installed; install it, or {instead}")
    if dispatcher == "hybridep" and not fused_a2a.HAVE_HYBRIDEP:
        raise ConfigError(
            f"{key}: there is no deep_ep package with HybridEPBuffer; install DeepEP from its "
            f"branch hybrid-ep, or {instead}"
        )


def make(num_experts: int, mesh: Mesh) -> "DeepEpDispatch | HybridEpDispatch":
    """The dispatch of `mesh.dispatcher`."""
    kinds = {"deepep": DeepEpDispatch, "hybridep": HybridEpDispatch}
    return kinds[mesh.dispatcher](num_experts, mesh)


class _FlexDispatch:
    def __init__(self, num_experts: int, mesh: Mesh):
        self.num_experts, self.etp, self.group = num_experts, mesh.etp.size, mesh.experts.group
        self.num_local = num_experts // mesh.ep.size
        self.num_places = self.num_local * mesh.experts.size

    def _places(self, expert_TK: Tensor, gate_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Where copies go and their gates, [T, K * etp]: etp ranks add up what they make of one."""
        place_TK = expert_TK + expert_TK // self.num_local * (self.etp - 1) * self.num_local
        places = [place_TK + t * self.num_local for t in range(self.etp)]
        return torch.cat(places, 1), torch.cat([gate_TK.float()] * self.etp, 1)

    def _count(self, expert_TK: Tensor) -> Tensor:
        return torch.bincount(expert_TK.flatten(), minlength=self.num_experts)


class DeepEpDispatch(_FlexDispatch):
    """A token travels once to every rank that has one of its experts, and is copied there."""

    def __call__(
        self, z_TL: Tensor, expert_TK: Tensor, gate_TK: Tensor, experts: Experts
    ) -> tuple[Tensor, Tensor]:
        place_TK, place_gate_TK = self._places(expert_TK, gate_TK)
        arrived_TL, local_TK, local_gate_TK, _, handle = fused_a2a.fused_dispatch(
            z_TL, place_TK, place_gate_TK, self.num_places, self.group
        )
        y_TL = _pass_here(arrived_TL, local_TK, local_gate_TK, experts, self.num_local)
        y_TL, _ = fused_a2a.fused_combine(y_TL, self.group, handle)
        return y_TL, self._count(expert_TK)


class HybridEpDispatch(_FlexDispatch):
    """Rows arrive grouped by expert, and are added up on the way back."""

    def __call__(
        self, z_TL: Tensor, expert_TK: Tensor, gate_TK: Tensor, experts: Experts
    ) -> tuple[Tensor, Tensor]:
        place_TK, place_gate_TK = self._places(expert_TK, gate_TK)
        gate_TE = place_gate_TK.new_zeros(len(z_TL), self.num_places)
        z_RL, gate_R, _, rows_E, handle = fused_a2a.hybrid_ep_dispatch(
            z_TL.contiguous(),
            torch.zeros_like(gate_TE, dtype=torch.bool).scatter(1, place_TK, True),
            gate_TE.scatter(1, place_TK, place_gate_TK),
            self.group,
            self.num_local,
        )
        rows_E = rows_E.to(z_RL.device, torch.int64)
        here_R = torch.arange(len(z_RL), device=z_RL.device)
        order = Permutation(here_R, here_R.unsqueeze(1), rows_E, rows_E)
        y_RL = experts(z_RL, gate_R, order, ranks=[0])
        y_TL = fused_a2a.hybrid_ep_combine(y_RL.contiguous(), handle, len(z_RL), None)
        return y_TL, self._count(expert_TK)


def _pass_here(
    z_TL: Tensor, expert_TK: Tensor, gate_TK: Tensor, experts: Experts, num_local: int
) -> Tensor:
    """The sum over those experts of every token that are on this rank.

    Args:
        expert_TK: of the experts here; -1 where an expert is elsewhere.
    """
    token_R, k_R = (expert_TK >= 0).nonzero(as_tuple=True)
    expert_R, gate_R = expert_TK[token_R, k_R], gate_TK[token_R, k_R]
    order = Permutation.by_expert(expert_R.unsqueeze(1), num_local, dtype=z_TL.dtype)
    token_R = token_R[order.token_R]
    z_RL, gate_R = _CopyRows.apply(z_TL, token_R), permute_gates(gate_R.unsqueeze(1), order)
    y_RL = experts(z_RL, gate_R, order, ranks=[0])
    return _AddRows.apply(y_RL, token_R, len(z_TL))


def _add_rows(y_RL: Tensor, token_R: Tensor, T: int) -> Tensor:
    """The sum of every token's rows, which may be none; padding rows are 0."""
    y_RL, dtype = wide(y_RL), y_RL.dtype
    return y_RL.new_zeros(T, y_RL.shape[1]).index_add_(0, token_R, y_RL).to(dtype)


class _CopyRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, token_R):
        ctx.token_R, ctx.T = token_R, len(z)
        return z[token_R]

    @staticmethod
    def backward(ctx, dy):
        return _add_rows(dy, ctx.token_R, ctx.T), None


class _AddRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, token_R, T):
        ctx.token_R = token_R
        return _add_rows(y, token_R, T)

    @staticmethod
    def backward(ctx, dz):
        return dz[ctx.token_R], None, None
