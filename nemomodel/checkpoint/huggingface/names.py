"""The one table of tensor names: ours on the left, those of published nemotron_h folders right.

It is read in both directions. Every row says the same thing: the bytes of our tensor are those of
the published tensors, one after the other. So one row holds the three projections that our
attention keeps as rows q | k | v of one matrix, or all experts of a layer, which ours stacks.

Source of the published names: transformers 5.23 models/nemotron_h; for MTP vLLM
model_executor/models/nemotron_h_mtp.py @ 01ca2773 and Megatron-Bridge
models/nemotronh/nemotron_h_bridge.py @ 067f987d.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

import torch
from torch import Tensor

from nemomodel.config.pattern import LayerKind
from nemomodel.config.schema import ModelConfig
from nemomodel.model.nemotron import Nemotron

Shape = tuple[int, ...]


class Cut(Enum):
    """How the published tensors of a row lie in ours."""

    WHOLE = auto()  # one tensor of the same shape
    CONV = auto()  # [C, W] is published as [C, 1, W], the weight of a grouped nn.Conv1d
    EXPERTS = auto()  # [E, ...] is published as E tensors


class Row(NamedTuple):
    ours: str
    theirs: str  # {} is the number of the expert
    cut: Cut = Cut.WHOLE


MODEL = (
    Row("embedding.weight", "backbone.embeddings.weight"),
    Row("final_norm.weight", "backbone.norm_f.weight"),
    Row("lm_head.weight", "lm_head.weight"),
)

NORM = Row("norm.weight", "norm.weight")

LAYERS = {
    LayerKind.MAMBA: (
        NORM,
        Row("mixer.in_proj.weight", "mixer.in_proj.weight"),
        Row("mixer.conv_weight", "mixer.conv1d.weight", Cut.CONV),
        Row("mixer.conv_bias", "mixer.conv1d.bias"),
        Row("mixer.A_log", "mixer.A_log"),
        Row("mixer.D", "mixer.D"),
        Row("mixer.dt_bias", "mixer.dt_bias"),
        Row("mixer.norm.weight", "mixer.norm.weight"),
        Row("mixer.out_proj.weight", "mixer.out_proj.weight"),
    ),
    LayerKind.ATTENTION: (
        NORM,
        Row("mixer.q_proj.weight", "mixer.q_proj.weight"),
        Row("mixer.k_proj.weight", "mixer.k_proj.weight"),
        Row("mixer.v_proj.weight", "mixer.v_proj.weight"),
        Row("mixer.out_proj.weight", "mixer.o_proj.weight"),
    ),
    LayerKind.MOE: (
        NORM,
        Row("mixer.router.weight", "mixer.gate.weight"),
        Row("mixer.router.expert_bias", "mixer.gate.e_score_correction_bias"),
        # These two exist in a model with a latent width only.
        Row("mixer.latent_down.weight", "mixer.fc1_latent_proj.weight"),
        Row("mixer.latent_up.weight", "mixer.fc2_latent_proj.weight"),
        Row("mixer.experts.fc1", "mixer.experts.{}.up_proj.weight", Cut.EXPERTS),
        Row("mixer.experts.fc2", "mixer.experts.{}.down_proj.weight", Cut.EXPERTS),
        Row("mixer.shared_expert.fc1.weight", "mixer.shared_experts.up_proj.weight"),
        Row("mixer.shared_expert.fc2.weight", "mixer.shared_experts.down_proj.weight"),
    ),
    LayerKind.MLP: (
        NORM,
        Row("mixer.fc1.weight", "mixer.up_proj.weight"),
        Row("mixer.fc2.weight", "mixer.down_proj.weight"),
    ),
}

# What an MTP block has beside its layers is published within its first and its last layer.
MTP_FIRST = (
    Row("embedding_norm.weight", "enorm.weight"),
    Row("hidden_norm.weight", "hnorm.weight"),
    Row("eh_proj.weight", "eh_proj.weight"),
)
MTP_LAST = (Row("final_norm.weight", "final_layernorm.weight"),)

KEPT_WIDE = ("mixer.A_log", "mixer.D", "mixer.dt_bias")
"""Parameters that are FP32 in our models and BF16 in published ones."""

ROUTER_BIAS = "mixer.gate.e_score_correction_bias"
"""FP32 in both."""


class Piece(NamedTuple):
    """One published tensor."""

    name: str
    shape: Shape

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def is_router_bias(self) -> bool:
        return self.name.endswith(ROUTER_BIAS)

    @property
    def may_be_wide(self) -> bool:
        return self.name.endswith((*KEPT_WIDE, ROUTER_BIAS))


@dataclass(frozen=True)
class Entry:
    """One tensor of our model, and the published tensors that hold its bytes in order."""

    name: str
    shape: Shape
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def split(self, tensor: Tensor) -> Iterator[tuple[Piece, Tensor]]:
        """The published tensors as views of `tensor`, which is contiguous and of `shape`."""
        flat, start = tensor.view(-1), 0
        for piece in self.pieces:
            yield piece, flat[start : start + piece.numel].view(piece.shape)
            start += piece.numel


def plan(config: ModelConfig, *, dtype: torch.dtype) -> list[Entry]:
    """Every tensor of the model in order, from meta tensors: no weight is made."""
    with torch.device("meta"):
        return entries(config, Nemotron(config, dtype=dtype).state_dict())


def entries(config: ModelConfig, state: Mapping[str, Tensor]) -> list[Entry]:
    """As `plan`, for the state dict of a model that is already built."""
    found = [
        Entry(row.ours, tuple(tensor.shape), tensor.dtype, tuple(_pieces(row, tensor, config)))
        for row in table(config)
        if (tensor := state.get(row.ours)) is not None
    ]
    unknown = state.keys() - {entry.name for entry in found}
    assert not unknown, f"in no row of the table: {', '.join(sorted(unknown))}"
    return found


def table(config: ModelConfig) -> Iterator[Row]:
    """The rows with full names. Ours: mtp.blocks.j.layers.l; theirs: mtp.layers.(j * L + l)."""
    yield from MODEL
    for i, kind in enumerate(config.layers):
        yield from _under(f"blocks.{i}", f"backbone.layers.{i}", LAYERS[kind])
    per_block = len(config.mtp_layers)
    for j in range(config.num_mtp_blocks):
        first = j * per_block
        yield from _under(f"mtp.blocks.{j}", f"mtp.layers.{first}", MTP_FIRST)
        for i, kind in enumerate(config.mtp_layers):
            yield from _under(f"mtp.blocks.{j}.layers.{i}", f"mtp.layers.{first + i}", LAYERS[kind])
        yield from _under(f"mtp.blocks.{j}", f"mtp.layers.{first + per_block - 1}", MTP_LAST)


def without_padding(entries: list[Entry], vocab_size: int) -> list[Entry]:
    """The same entries, with the published embedding and head cut to `vocab_size` rows."""
    padded = ("embedding.weight", "lm_head.weight")
    return [
        Entry(
            e.name,
            e.shape,
            e.dtype,
            tuple(Piece(p.name, (vocab_size, *p.shape[1:])) for p in e.pieces),
        )
        if e.name in padded
        else e
        for e in entries
    ]


def published_name(name: str) -> str:
    """The published spelling of a name: transformers' and older ones differ in the prefix only."""
    name = re.sub(r"^model\.(?=(backbone|mtp|lm_head)\.)", "", name)
    name = re.sub(r"^model\.", "backbone.", name)
    return re.sub(r"^backbone\.(embedding|embed_tokens)\.", "backbone.embeddings.", name)


def stacked_experts(name: str) -> str | None:
    """The published name, with {} for the expert, of a tensor of all experts; None if it is none.

    transformers holds the experts of a layer in one tensor [E, ...], and some tools save that.
    """
    match = re.fullmatch(r"(.*\.mixer\.experts)\.(up_proj|down_proj)(\.weight)?", name)
    return f"{match[1]}.{{}}.{match[2]}.weight" if match else None


def _under(ours: str, theirs: str, rows: tuple[Row, ...]) -> Iterator[Row]:
    for row in rows:
        yield Row(f"{ours}.{row.ours}", f"{theirs}.{row.theirs}", row.cut)


def _pieces(row: Row, tensor: Tensor, config: ModelConfig) -> Iterator[Piece]:
    shape = tuple(tensor.shape)
    match row.cut:
        case Cut.WHOLE:
            yield Piece(row.theirs, shape)
        case Cut.CONV:
            yield Piece(row.theirs, (shape[0], 1, shape[1]))
        case Cut.EXPERTS:
            for expert in range(shape[0]):
                yield Piece(row.theirs.format(expert), shape[1:])
