"""Multi-token prediction: depth k predicts the token k further than the main head.

    u_k = eh_proj [embedding_norm(e_{i+k}), hidden_norm(h_{k-1,i})]
    h_k = final_norm(layers(u_k))             h_0: the backbone after its final norm

Source: arXiv:2412.19437 section 2.2 with the block of arXiv:2604.12374; order of the halves as
Megatron-LM core/transformer/multi_token_prediction.py @ d98e8a64. Embedding and head are those
of the backbone.
"""

import torch
from torch import Tensor, nn

from nemomodel.config.pattern import LayerKind
from nemomodel.config.schema import ModelConfig
from nemomodel.model.block import Block, Load, run_blocks
from nemomodel.model.layers import Linear, RMSNorm
from nemomodel.ops.documents import Documents
from nemomodel.parallel.mesh import SINGLE, Mesh


class MtpBlock(nn.Module):
    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        recompute: frozenset[LayerKind],
        mesh: Mesh = SINGLE,
    ):
        super().__init__()
        D, eps = config.hidden_size, config.norm_eps
        self.embedding_norm = RMSNorm(D, eps=eps, dtype=dtype)
        self.hidden_norm = RMSNorm(D, eps=eps, dtype=dtype)
        self.eh_proj = Linear(2 * D, D, dtype=dtype)
        self.layers = nn.ModuleList(
            Block(kind, config, dtype=dtype, recompute=kind in recompute, mesh=mesh)
            for kind in config.mtp_layers
        )
        self.final_norm = RMSNorm(D, eps=eps, dtype=dtype)

    def forward(
        self, hidden_SBD: Tensor, embedding_SBD: Tensor, documents: Documents | None
    ) -> tuple[Tensor, list[Load]]:
        halves = [self.embedding_norm(embedding_SBD), self.hidden_norm(hidden_SBD)]
        x_SBD = self.eh_proj(torch.cat(halves, dim=-1))
        x_SBD, loads = run_blocks(self.layers, x_SBD, documents)
        return self.final_norm(x_SBD), loads


class Mtp(nn.Module):
    """All depths: one physical block at every depth, or one block per depth."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        recompute: frozenset[LayerKind],
        mesh: Mesh = SINGLE,
    ):
        super().__init__()
        self.num_depths, self.positions = config.mtp.num_depths, mesh.positions
        self.blocks = nn.ModuleList(
            MtpBlock(config, dtype=dtype, recompute=recompute, mesh=mesh)
            for _ in range(config.num_mtp_blocks)
        )

    def forward(
        self, hidden_SBD: Tensor, window_SBD: Tensor, documents: Documents | None
    ) -> tuple[list[Tensor], list[Load]]:
        """Returns h_1 .. h_depths and the load of every physical MoE layer, depths added up.

        Args:
            window_SBD: embeddings of the positions of `hidden_SBD` and of num_depths more.
        """
        S = len(hidden_SBD)
        hiddens: list[Tensor] = []
        loads: list[list[Load]] = [[] for _ in self.blocks]
        for k in range(1, self.num_depths + 1):
            which = min(k, len(self.blocks)) - 1
            there_SB1 = has_ahead(S * self.positions.size, k, documents, hidden_SBD.device)
            mine = self.positions.part(len(there_SB1))
            there_SB1 = there_SB1[mine.start : mine.stop].to(window_SBD.dtype)
            hidden_SBD, new = self.blocks[which](
                hidden_SBD, window_SBD[k : k + S] * there_SB1, documents
            )
            hiddens.append(hidden_SBD)
            old = loads[which]
            loads[which] = [_add(a, b) for a, b in zip(old, new, strict=True)] if old else new
        return hiddens, [load for block in loads for load in block]


def _add(a: Load, b: Load) -> Load:
    return Load(a.count_E + b.count_E, a.balance + b.balance)


def has_ahead(S: int, k: int, documents: Documents | None, device: torch.device) -> Tensor:
    """[S, B, 1] or [S, 1, 1]: whether position s + k exists and is in the same document."""
    if documents is None:
        return (torch.arange(S, device=device) < S - k).view(S, 1, 1)
    there = torch.zeros_like(documents.id_SB, dtype=torch.bool)
    there[:-k] = documents.id_SB[k:] == documents.id_SB[:-k]
    return there.unsqueeze(-1)


def shift(t_SB: Tensor, k: int, documents: Documents | None) -> Tensor:
    """t at position s + k, or 0 where that is past the sequence or in another document.

    Args:
        t_SB: [S, B]; 0 < k.
    """
    ahead = torch.zeros_like(t_SB)
    ahead[:-k] = t_SB[k:]
    return ahead * has_ahead(len(t_SB), k, documents, t_SB.device).squeeze(-1).to(t_SB.dtype)
