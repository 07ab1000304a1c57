"""Which product of which linear layer is quantised, and how: a recipe as plain data."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from nemomodel.quant.linear import LinearFormat, ProductFormat
from nemomodel.quant.operand import OperandFormat


class Role(StrEnum):
    """What a linear layer is in its block."""

    MAMBA_IN = "mamba.in_proj"
    MAMBA_OUT = "mamba.out_proj"
    ATTENTION_QKV = "attention.qkv_proj"
    ATTENTION_OUT = "attention.out_proj"
    LATENT_DOWN = "moe.latent_down"
    LATENT_UP = "moe.latent_up"
    EXPERT_FC1 = "moe.experts.fc1"
    EXPERT_FC2 = "moe.experts.fc2"
    SHARED_FC1 = "moe.shared_expert.fc1"
    SHARED_FC2 = "moe.shared_expert.fc2"
    MLP_FC1 = "mlp.fc1"
    MLP_FC2 = "mlp.fc2"
    MTP_PROJ = "mtp.eh_proj"


@dataclass(frozen=True)
class Place:
    """Where a linear layer is: its role, and its block's index in the backbone or in MTP."""

    role: Role
    layer: int
    num_layers: int
    in_mtp: bool


def nvfp4_format(
    *, stochastic: bool = True, hadamard: bool = True, square: bool = True
) -> LinearFormat:
    """All three products in NVFP4 (arXiv:2509.25149 section 4; TransformerEngine @ d0067d0d).

    Args:
        stochastic: round gradients stochastically.
        hadamard: transform both operands of wgrad along the tokens.
        square: blocks of 16 x 16 for weights, so that both their uses see the same values.
    """
    rows = OperandFormat("nvfp4", "rows", hadamard=hadamard)
    gradient = OperandFormat("nvfp4", "columns", stochastic=stochastic)
    weight, weight_t = (
        OperandFormat("nvfp4", "both" if square else along) for along in ("columns", "rows")
    )
    return LinearFormat(
        fprop=ProductFormat(OperandFormat("nvfp4", "columns"), weight),
        dgrad=ProductFormat(gradient, weight_t),
        wgrad=ProductFormat(replace(rows, stochastic=stochastic), rows),
    )


def mxfp8_format() -> LinearFormat:
    """All three products in MXFP8: E4M3 everywhere, blocks along the summed dimension."""
    columns, rows = OperandFormat("mxfp8", "columns"), OperandFormat("mxfp8", "rows")
    return LinearFormat(
        fprop=ProductFormat(columns, columns),
        dgrad=ProductFormat(columns, rows),
        wgrad=ProductFormat(rows, rows),
    )


@dataclass(frozen=True)
class Recipe:
    """Formats by role in the backbone; what has none, or is excepted, is not quantised."""

    name: str
    formats: Mapping[Role, LinearFormat]
    last_share: float = 0.0
    """Share of the backbone's blocks, counted from the last, that is not quantised."""

    def format(self, place: Place, *, last_layers: int | None = None) -> LinearFormat | None:
        """
        Args:
            last_layers: blocks at the end that are not quantised, in place of `last_share`.
        """
        if place.in_mtp:
            return None
        kept = round(self.last_share * place.num_layers) if last_layers is None else last_layers
        return self.formats.get(place.role) if place.layer < place.num_layers - kept else None


_PROJECTIONS = {Role.ATTENTION_QKV, Role.ATTENTION_OUT, Role.LATENT_DOWN, Role.LATENT_UP}
_SUPER = {role: nvfp4_format() for role in set(Role) - _PROJECTIONS - {Role.MTP_PROJ}}
_SUPER[Role.MAMBA_OUT] = mxfp8_format()

RECIPES = {
    recipe.name: recipe
    for recipe in (
        # Nemotron 3 Super, table 3: the last 15 % of layers, attention, latent projections, MTP,
        # embeddings and head in BF16, Mamba's out_proj in MXFP8.
        Recipe("nvfp4_super", _SUPER, last_share=0.15),
        # Every linear of the backbone.
        Recipe("nvfp4", {role: nvfp4_format() for role in Role}),
        Recipe("mxfp8", {role: mxfp8_format() for role in Role}),
    )
}
