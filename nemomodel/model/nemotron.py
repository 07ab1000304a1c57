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
from nemomodel.ops.loss import Targets, VocabShard, linear_cross_entropy
from nemomodel.ops.precision import accumulator
from nemomodel.parallel.exchange import attach, gather_positions, scatter_positions
from nemomodel.parallel.mesh import SINGLE, Mesh
from nemomodel.parallel.shard import parameter
from nemomodel.parallel.stage import Stage

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Dtype of weights and activations by `PrecisionConfig.weights`."""


class Losses(NamedTuple):
    """What one micro-batch adds to the global batch."""

    total: Tensor
    """Scalar to differentiate; over all micro-batches and ranks it sums to the global loss. Of a
    pipeline stage that is not the last: what the next one receives. Differentiating that runs
    the auxiliary loss of this stage too."""
    cross_entropy: Tensor
    """[1 + num_depths] sum over this rank's targets, in nats: the main head, then each MTP depth;
    zeros of a stage that is not the last."""
    balance: Tensor
    """Auxiliary loss of this rank's routers and positions as it enters the total."""
    count: Tensor
    """[routers, E] token copies per expert, in the order of `Nemotron.routers`."""


class Embedding(nn.Module):
    """tp cuts the rows: a rank looks up its own, and the sum over ranks has all."""

    def __init__(
        self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype, mesh: Mesh = SINGLE
    ):
        super().__init__()
        self.tp, self.rows = mesh.tp, mesh.tp.part(vocab_size)
        self.weight = parameter(vocab_size, hidden_size, dtype=dtype, rows=[self.rows])

    def forward(self, ids_SB: Tensor) -> Tensor:
        """[S / tp, B, D]: rank r of tp gets the r-th part of the positions."""
        if self.tp.size == 1:
            return embedding(ids_SB, self.weight)
        here = (ids_SB >= self.rows.start) & (ids_SB < self.rows.stop)
        row_SB = (ids_SB - self.rows.start).masked_fill(~here, 0)
        found = embedding(row_SB, self.weight)
        return scatter_positions(found * here.unsqueeze(-1).to(found.dtype), self.tp)


class Head(nn.Module):
    """Untied output projection; its loss never holds the logits of all tokens. tp cuts the rows."""

    def __init__(
        self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype, mesh: Mesh = SINGLE
    ):
        super().__init__()
        rows = mesh.tp.part(vocab_size)
        self.weight = parameter(vocab_size, hidden_size, dtype=dtype, rows=[rows])
        self.shard = VocabShard(rows.start, mesh.tp.group) if mesh.tp.size > 1 else None

    def forward(self, targets: list[Targets]) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(targets, self.weight, self.shard)

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.weight)


class Nemotron(nn.Module):
    """Hybrid Mamba-2 / attention / LatentMoE language model with MTP heads.

    Parameters are created uninitialised: see `init.initialize`, or load a checkpoint.

    Args:
        mesh: ranks that share the work; each holds a part of the parameters. Every rank is given
            whole sequences, and works on its positions.
        stage: the blocks of a pipeline stage; by default all. Names are those of the whole model.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: torch.dtype,
        recompute: frozenset[LayerKind] = frozenset(),
        mesh: Mesh = SINGLE,
        stage: Stage | None = None,
    ):
        super().__init__()
        self.config, self.mesh = config, mesh
        self.stage = stage or Stage(range(len(config.layers)), len(config.layers))
        V, D = config.vocab_size, config.hidden_size
        self.embedding = self.final_norm = self.lm_head = self.mtp = None
        if self.stage.first:
            self.embedding = Embedding(V, D, dtype=dtype, mesh=mesh)
        self.blocks = nn.ModuleList()
        for i in self.stage.blocks:
            kind = config.layers[i]
            block = Block(kind, config, dtype=dtype, recompute=kind in recompute, mesh=mesh)
            self.blocks.add_module(str(i), block)
        if self.stage.last:
            self.final_norm = RMSNorm(D, eps=config.norm_eps, dtype=dtype)
            self.lm_head = Head(V, D, dtype=dtype, mesh=mesh)
            if config.mtp:
                self.mtp = Mtp(config, dtype=dtype, recompute=recompute, mesh=mesh)

    def forward(self, ids_BS: Tensor, documents: Documents | None = None) -> Tensor:
        """Logits of the next token, [B, S, V]."""
        return self.lm_head.logits(self.hidden(ids_BS, documents)).transpose(0, 1)

    def hidden(self, ids_BS: Tensor, documents: Documents | None = None) -> Tensor:
        """[S, B, D] that `lm_head.logits` turns into logits, of all positions or of some."""
        hidden_SBD, _ = self._backbone(self._embed(ids_BS)[: ids_BS.shape[1]], documents)
        return hidden_SBD

    def mtp_logits(self, ids_BS: Tensor, documents: Documents | None = None) -> list[Tensor]:
        """One [B, S, V] per depth: entry k - 1 at position i predicts token i + 1 + k.

        The last k positions have no token k further to start from; theirs mean nothing.
        """
        window_SBD = self._embed(ids_BS)
        hidden_SBD, _ = self._backbone(window_SBD[: ids_BS.shape[1]], documents)
        hiddens, _ = self._mtp(hidden_SBD, window_SBD, documents)
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
        received: Tensor | None = None,
    ) -> Losses:
        """This micro-batch's part of

            CE_0 / N_0 + scale / depths * sum_k CE_k / N_k + coeff * balance / sequences

        where CE_k sums the cross-entropy of head k over its targets.

        Args:
            num_targets: N of the whole global batch, all ranks; a head with none adds 0.
            num_sequences: sequences of the whole global batch.
            received: `total` of the stage before; for the first stage None.
        """
        S = ids_BS.shape[1] // self.mesh.positions.size
        window_SBD = self._embed(ids_BS) if received is None else received[S:]
        x_SBD = window_SBD[:S] if received is None else received[:S]
        x_SBD, loads = run_blocks(self.blocks, x_SBD, documents)
        coeffs = [self._balance_coeff(1)] * len(loads)
        if not self.stage.last:
            balance, count = self._balance(loads, coeffs, num_sequences, x_SBD)
            # The last stage needs the embeddings too: MTP starts from those of later tokens.
            sent = torch.cat([x_SBD, window_SBD]) if self.config.mtp else x_SBD
            none = num_targets.new_zeros(len(num_targets), dtype=balance.dtype)
            return Losses(attach(sent, balance), none, balance.detach(), count)

        hidden_SBD = self.final_norm(x_SBD)
        hiddens = [hidden_SBD]
        factors = [1.0]
        if self.mtp is not None:
            more_hiddens, more_loads = self._mtp(hidden_SBD, window_SBD, documents)
            hiddens += more_hiddens
            factors += [self.config.mtp.loss_scale / self.mtp.num_depths] * self.mtp.num_depths
            # A shared block passes every depth: its routers count once, like the others.
            passes = self.mtp.num_depths if self.config.mtp.shared else 1
            coeffs += [self._balance_coeff(passes)] * len(more_loads)
            loads = loads + more_loads
        total, cross_entropy = self.lm_head(
            [
                self._targets(k, hidden, factor, labels_BS, loss_mask_BS, documents, num_targets)
                for k, (hidden, factor) in enumerate(zip(hiddens, factors, strict=True))
            ]
        )
        balance, count = self._balance(loads, coeffs, num_sequences, total)
        return Losses(total + balance, cross_entropy, balance.detach(), count)

    def _targets(
        self,
        k: int,
        hidden_SBD: Tensor,
        factor: float,
        labels_BS: Tensor,
        loss_mask_BS: Tensor,
        documents: Documents | None,
        num_targets: Tensor,
    ) -> Targets:
        """What head k is to predict: every tp rank for all positions of its cp rank."""
        hidden_SBD = gather_positions(hidden_SBD, self.mesh.tp)
        label_SB, mask_SB = labels_BS.T, loss_mask_BS.T
        if k:
            label_SB, mask_SB = (shift(t, k, documents) for t in (label_SB, mask_SB))
        mine = self.mesh.cp.part(len(label_SB))
        label_SB, mask_SB = (t[mine.start : mine.stop] for t in (label_SB, mask_SB))
        weight_SB = mask_SB * (factor / num_targets[k].clamp(min=1))
        return Targets(hidden_SBD.flatten(0, 1), label_SB.flatten(), weight_SB.flatten())

    def _balance(
        self, loads: list[Load], coeffs: list[float], num_sequences: int, like: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The auxiliary loss, and the copies per expert of every router."""
        if not loads:
            wide = accumulator(like.dtype)
            return like.new_zeros((), dtype=wide), like.new_zeros((0, 0), dtype=torch.int64)
        terms = [c / num_sequences * load.balance for c, load in zip(coeffs, loads, strict=True)]
        return torch.stack(terms).sum(), torch.stack([load.count_E for load in loads])

    def sent_shape(self, num_sequences: int, seq_length: int) -> tuple[int, int, int]:
        """Of what pipeline stages send each other for a micro-batch."""
        S = seq_length // self.mesh.positions.size
        rows = 2 * S + len(self._depths) if self.config.mtp else S
        return rows, num_sequences, self.config.hidden_size

    def routers(self) -> dict[str, Router]:
        """Every router here by the name of its module: those of blocks, then those of MTP."""
        return {name: m for name, m in self.named_modules() if isinstance(m, Router)}

    @property
    def _depths(self) -> range:
        return range(1, self.config.mtp.num_depths + 1) if self.config.mtp else range(0)

    def _balance_coeff(self, passes: int) -> float:
        return self.config.moe.aux_loss_coeff / passes if self.config.moe else 0.0

    def _embed(self, ids_BS: Tensor) -> Tensor:
        """Embeddings of this rank's positions, and of as many more as MTP looks ahead."""
        positions, tp = self.mesh.positions, self.mesh.tp
        ids_SB = F.pad(ids_BS.T, (0, 0, 0, len(self._depths)))
        # The tp ranks of this cp rank look up together, each its rows for all of them.
        parts = positions.parts(range(ids_BS.shape[1]))[positions.rank - tp.rank :][: tp.size]
        windows = [ids_SB[part.start : part.stop + len(self._depths)] for part in parts]
        return self.embedding(torch.cat(windows) if len(windows) > 1 else windows[0])

    def _backbone(self, x_SBD: Tensor, documents: Documents | None) -> tuple[Tensor, list[Load]]:
        x_SBD, loads = run_blocks(self.blocks, x_SBD, documents)
        return self.final_norm(x_SBD), loads

    def _mtp(
        self, hidden_SBD: Tensor, window_SBD: Tensor, documents: Documents | None
    ) -> tuple[list[Tensor], list[Load]]:
        if self.mtp is None:
            raise ValueError("model.mtp is not configured: this model has no MTP heads")
        return self.mtp(hidden_SBD, window_SBD, documents)


def router_names(config: ModelConfig) -> list[str]:
    """Names of all routers of a model, in the order of `Nemotron.routers`."""
    layers = [f"blocks.{i}" for i, kind in enumerate(config.layers) if kind is LayerKind.MOE]
    for block in range(config.num_mtp_blocks):
        kinds = enumerate(config.mtp_layers)
        layers += [f"mtp.blocks.{block}.layers.{i}" for i, kind in kinds if kind is LayerKind.MOE]
    return [f"{layer}.mixer.router" for layer in layers]
