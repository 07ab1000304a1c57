"""The whole model: embedding, blocks, final norm, head, MTP, and its loss."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemomodel.config.pattern import LayerKind
from nemomodel.config.schema import ModelConfig
from nemomodel.model.block import Block, Load, run_blocks
from nemomodel.model.layers import RMSNorm
from nemomodel.model.moe import Router
from nemomodel.model.mtp import Mtp, shift
from nemomodel.ops.documents import Documents
from nemomodel.ops.linear import embedding
from nemomodel.ops.loss import Targets, linear_cross_entropy

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Dtype of weights and activations by `PrecisionConfig.weights`."""


class Losses(NamedTuple):
    """What one micro-batch adds to the global batch."""

    total: Tensor
    """Scalar to differentiate; over all micro-batches and ranks it sums to the global loss."""
    cross_entropy: Tensor
    """[1 + num_depths] sum over targets, in nats: the main head, then each MTP depth."""
    balance: Tensor
    """Auxiliary loss as it enters the total."""
    count: Tensor
    """[routers, E] token copies per expert, in the order of `Nemotron.routers`."""


class Embedding(nn.Module):
    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, dtype=dtype))

    def forward(self, ids: Tensor) -> Tensor:
        return embedding(ids, self.weight)


class Head(nn.Module):
    """Untied output projection; its loss never holds the logits of all tokens."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size, dtype=dtype))

    def forward(self, targets: list[Targets]) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(targets, self.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight)


class Nemotron(nn.Module):
    """Hybrid Mamba-2 / attention / LatentMoE language model with MTP heads.

    Parameters are created uninitialised: see `init.initialize`, or load a checkpoint.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        recompute: frozenset[LayerKind] = frozenset(),
    ):
        super().__init__()
        self.config = config
        self.quantization = None  # see quantize.py
        V, D = config.vocab_size, config.hidden_size
        self.embedding = Embedding(V, D, dtype=dtype)
        self.blocks = nn.ModuleList(
            Block(kind, config, dtype=dtype, recompute=kind in recompute) for kind in config.layers
        )
        self.final_norm = RMSNorm(D, eps=config.norm_eps, dtype=dtype)
        self.lm_head = Head(V, D, dtype=dtype)
        self.mtp = Mtp(config, dtype=dtype, recompute=recompute) if config.mtp else None

    def forward(self, ids_BS: Tensor, documents: Documents | None = None) -> Tensor:
        """Logits of the next token, [B, S, V]."""
        return self.lm_head.logits(self.hidden(ids_BS, documents)).transpose(0, 1)

    def hidden(self, ids_BS: Tensor, documents: Documents | None = None) -> Tensor:
        """[S, B, D] that `lm_head.logits` turns into logits, of all positions or of some."""
        hidden_SBD, _ = self._backbone(self.embedding(ids_BS.T), documents)
        return hidden_SBD

    def mtp_logits(self, ids_BS: Tensor, documents: Documents | None = None) -> list[Tensor]:
        """One [B, S, V] per depth: entry k - 1 at position i predicts token i + 1 + k.

        The last k positions have no token k further to start from; theirs mean nothing.
        """
        embedding_SBD = self.embedding(ids_BS.T)
        hidden_SBD, _ = self._backbone(embedding_SBD, documents)
        hiddens, _ = self._mtp(hidden_SBD, embedding_SBD, documents)
        return [self.lm_head.logits(h).transpose(0, 1) for h in hiddens]

    def loss(
        self,
        ids_BS: Tensor,
        labels_BS: Tensor,
        loss_mask_BS: Tensor,
        documents: Documents | None = None,
    ) -> Tensor:
        """Training loss of these sequences alone (scalar): main + MTP + auxiliary.

        Args:
            labels_BS: token to predict at each position, int64.
            loss_mask_BS: bool, False where there is nothing to predict.
        """
        targets = self.num_targets(loss_mask_BS, documents)
        return self.losses(
            ids_BS,
            labels_BS,
            loss_mask_BS,
            documents,
            num_targets=targets,
            num_sequences=len(ids_BS),
        ).total

    def num_targets(self, loss_mask_BS: Tensor, documents: Documents | None = None) -> Tensor:
        """[1 + num_depths] positions that each head has a target for, float64.

        Summed over micro-batches and ranks this is what `losses` divides by.
        """
        mask_SB = loss_mask_BS.T
        masks = [mask_SB, *(shift(mask_SB, k, documents) for k in self._depths)]
        return torch.stack([mask.sum(dtype=torch.float64) for mask in masks])

    def cross_entropy(
        self,
        ids_BS: Tensor,
        labels_BS: Tensor,
        loss_mask_BS: Tensor,
        documents: Documents | None = None,
    ) -> tuple[Tensor, Tensor]:
        """[1 + num_depths] per head, float64: the sum over its targets in nats, and their count."""
        num_targets = self.num_targets(loss_mask_BS, documents)
        losses = self.losses(
            ids_BS,
            labels_BS,
            loss_mask_BS,
            documents,
            num_targets=torch.ones_like(num_targets),
            num_sequences=1,
        )
        return losses.cross_entropy.double(), num_targets

    def losses(
        self,
        ids_BS: Tensor,
        labels_BS: Tensor,
        loss_mask_BS: Tensor,
        documents: Documents | None,
        *,
        num_targets: Tensor,
        num_sequences: int,
    ) -> Losses:
        """This micro-batch's part of

            CE_0 / N_0 + scale / depths * sum_k CE_k / N_k + coeff * balance / sequences

        where CE_k sums the cross-entropy of head k over its targets.

        Args:
            num_targets: N of the whole global batch, all ranks; a head with none adds 0.
            num_sequences: sequences of the whole global batch.
        """
        embedding_SBD = self.embedding(ids_BS.T)
        hidden_SBD, loads = self._backbone(embedding_SBD, documents)
        hiddens = [hidden_SBD]
        factors = [1.0]
        coeffs = [self._balance_coeff(1)] * len(loads)
        if self.mtp is not None:
            more_hiddens, more_loads = self._mtp(hidden_SBD, embedding_SBD, documents)
            hiddens += more_hiddens
            factors += [self.config.mtp.loss_scale / self.mtp.num_depths] * self.mtp.num_depths
            # A shared block passes every depth: its routers count once, like the others.
            passes = self.mtp.num_depths if self.config.mtp.shared else 1
            coeffs += [self._balance_coeff(passes)] * len(more_loads)
            loads = loads + more_loads

        targets = []
        for k, (hidden, factor) in enumerate(zip(hiddens, factors, strict=True)):
            label_SB, mask_SB = labels_BS.T, loss_mask_BS.T
            if k:
                label_SB, mask_SB = (shift(t, k, documents) for t in (label_SB, mask_SB))
            weight_SB = mask_SB * (factor / num_targets[k].clamp(min=1))
            targets.append(Targets(hidden.flatten(0, 1), label_SB.flatten(), weight_SB.flatten()))
        total, cross_entropy = self.lm_head(targets)

        balance, count = total.new_zeros(()), total.new_zeros((0, 0), dtype=torch.int64)
        if loads:
            terms = [
                c / num_sequences * load.balance for c, load in zip(coeffs, loads, strict=True)
            ]
            balance = torch.stack(terms).sum()
            count = torch.stack([load.count_E for load in loads])
        return Losses(total + balance, cross_entropy, balance.detach(), count)

    def routers(self) -> dict[str, Router]:
        """Every router by the name of its module: those of the blocks, then those of MTP."""
        return {name: m for name, m in self.named_modules() if isinstance(m, Router)}

    @property
    def _depths(self) -> range:
        return range(1, self.mtp.num_depths + 1) if self.mtp is not None else range(0)

    def _balance_coeff(self, passes: int) -> float:
        return self.config.moe.aux_loss_coeff / passes if self.config.moe else 0.0

    def _backbone(
        self, embedding_SBD: Tensor, documents: Documents | None
    ) -> tuple[Tensor, list[Load]]:
        x_SBD, loads = run_blocks(self.blocks, embedding_SBD, documents)
        return self.final_norm(x_SBD), loads

    def _mtp(
        self, hidden_SBD: Tensor, embedding_SBD: Tensor, documents: Documents | None
    ) -> tuple[list[Tensor], list[Load]]:
        if self.mtp is None:
            raise ValueError("model.mtp is not configured: this model has no MTP heads")
        return self.mtp(hidden_SBD, embedding_SBD, documents)
