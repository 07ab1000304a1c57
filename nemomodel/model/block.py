"""One block: x + mixer(norm(x)), the mixer by its letter in the layer pattern."""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nemomodel.config.pattern import LayerKind
from nemomodel.config.schema import ModelConfig
from nemomodel.model.attention import Attention
from nemomodel.model.layers import MLP, RMSNorm
from nemomodel.model.mamba import Mamba
from nemomodel.model.moe import LatentMoE
from nemomodel.ops.documents import Documents
from nemomodel.parallel.mesh import Mesh
from nemomodel.quant.passes import Pass


class Load(NamedTuple):
    """How one MoE layer spread one micro-batch over its experts."""

    count_E: Tensor  # token copies per expert, int64
    balance: Tensor  # sequence-level auxiliary loss, summed over sequences, no coefficient


class Block(nn.Module):
    """Pre-norm residual block with a single mixer; the residual has the model's dtype."""

    def __init__(
        self,
        kind: LayerKind,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        recompute: bool,
        mesh: Mesh,
    ):
        super().__init__()
        self.kind, self.recompute = kind, recompute
        self.at = Pass()  # see model/quantize.py
        D = config.hidden_size
        self.norm = RMSNorm(D, eps=config.norm_eps, dtype=dtype)
        match kind:
            case LayerKind.MAMBA:
                self.mixer = Mamba(config.mamba, D, config.norm_eps, dtype=dtype, mesh=mesh)
            case LayerKind.ATTENTION:
                self.mixer = Attention(config.attention, D, dtype=dtype, mesh=mesh)
            case LayerKind.MOE:
                self.mixer = LatentMoE(config.moe, D, dtype=dtype, mesh=mesh)
            case LayerKind.MLP:
                self.mixer = MLP(D, config.ffn_size, dtype=dtype, mesh=mesh)

    def forward(self, x_SBD: Tensor, documents: Documents | None) -> tuple[Tensor, Load | None]:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(
                self._forward,
                x_SBD,
                documents,
                use_reentrant=False,
                context_fn=lambda: (nullcontext(), self.at.remember()),
            )
        return self._forward(x_SBD, documents)

    def _forward(self, x_SBD: Tensor, documents: Documents | None) -> tuple[Tensor, Load | None]:
        u_SBD = self.norm(x_SBD)
        if self.kind is LayerKind.MOE:
            y_SBD, count_E, balance = self.mixer(u_SBD)
            return x_SBD + y_SBD, Load(count_E, balance)
        if self.kind is LayerKind.MLP:
            return x_SBD + self.mixer(u_SBD), None
        return x_SBD + self.mixer(u_SBD, documents), None


def run_blocks(
    blocks: nn.ModuleList, x_SBD: Tensor, documents: Documents | None
) -> tuple[Tensor, list[Load]]:
    """Pass x through the blocks in order; the loads are those of the MoE blocks, in order."""
    loads = []
    for block in blocks:
        x_SBD, load = block(x_SBD, documents)
        if load is not None:
            loads.append(load)
    return x_SBD, loads
