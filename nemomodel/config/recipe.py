"""Recipes as plain data: which linear layers are quantised, and in which format.

A format's name is explained, product by product and operand by operand, in quant/recipe.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType
from typing import Literal

from nemomodel.config.pattern import LayerKind

RecipeName = Literal[
    "bf16",
    "fp32",
    "nvfp4_super",
    "nvfp4_12b",
    "nvfp4",
    "mxfp8",
    "nvfp4_super_no_rht",
    "nvfp4_super_no_sr",
    "nvfp4_super_no_2d",
    "nvfp4_super_all_layers",
    "nvfp4_super_first_layers",
    "nvfp4_super_fp4_out_proj",
    "nvfp4_super_weights_only",
    "nvfp4_super_forward_only",
    "nvfp4_super_backward_only",
    "nvfp4_super_sr_activations",
    "nvfp4_super_sr_dgrad",
    "nvfp4_super_sr_wgrad",
]


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


def roles_of(kind: LayerKind) -> tuple[Role, ...]:
    """The linear layers of a mixer; without a latent width a MoE has no latent projections."""
    return tuple(role for role in Role if role.startswith(f"{kind.name.lower()}."))


@dataclass(frozen=True)
class Place:
    """Where a linear layer is: its role, and its block's index in the backbone or in MTP."""

    role: Role
    layer: int
    num_layers: int
    """Blocks of the backbone."""
    in_mtp: bool


@dataclass(frozen=True)
class Recipe:
    """Formats by role in the backbone; what has none, or is excepted, stays BF16."""

    name: str
    formats: Mapping[Role, str]
    first_layers: int = 0
    """Blocks of the backbone, counted from the first, that stay BF16."""
    last_layers: int = 0
    """The same, counted from the last."""
    first_share: float = 0.0
    """Share of the backbone's blocks in place of `first_layers`."""
    last_share: float = 0.0
    """Share of the backbone's blocks in place of `last_layers`."""
    ablates: str | None = None
    """The recipe that this one is with something left out or elsewhere."""

    def format(self, place: Place, *, last_layers: int | None = None) -> str | None:
        """Name of the format of a linear layer; None is BF16.

        Args:
            last_layers: in place of the recipe's own.
        """
        first = self.first_layers or round(self.first_share * place.num_layers)
        if last_layers is None:
            last_layers = self.last_layers or round(self.last_share * place.num_layers)
        if place.in_mtp or not first <= place.layer < place.num_layers - last_layers:
            return None
        return self.formats.get(place.role)


_PROJECTIONS = {Role.ATTENTION_QKV, Role.ATTENTION_OUT, Role.LATENT_DOWN, Role.LATENT_UP}
_BACKBONE = set(Role) - {Role.MTP_PROJ}


def _every(format: str) -> Mapping[Role, str]:
    """One format for every linear layer of the backbone."""
    return MappingProxyType(dict.fromkeys(_BACKBONE, format))


def _super(nvfp4: str = "nvfp4", out_proj: str = "mxfp8") -> Mapping[Role, str]:
    """The roles of Nemotron 3 Super, with other formats in place of its two."""
    formats = dict.fromkeys(_BACKBONE - _PROJECTIONS, nvfp4)
    return MappingProxyType(formats | {Role.MAMBA_OUT: out_proj})


# Nemotron 3 Super, table 3: the last 15 % of layers, attention, latent projections, MTP,
# embeddings and head in BF16, Mamba's out_proj in MXFP8.
_SUPER = Recipe("nvfp4_super", _super(), last_share=0.15)


def _ablation(
    what: str,
    nvfp4: str = "nvfp4",
    out_proj: str = "mxfp8",
    *,
    first_share: float = _SUPER.first_share,
    last_share: float = _SUPER.last_share,
) -> Recipe:
    return Recipe(
        name=f"{_SUPER.name}_{what}",
        formats=_super(nvfp4, out_proj),
        first_share=first_share,
        last_share=last_share,
        ablates=_SUPER.name,
    )


RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _SUPER,
        # arXiv:2509.25149 section 3 and appendix A: 62 blocks, of which 10 stay BF16.
        Recipe("nvfp4_12b", _every("nvfp4"), first_layers=2, last_layers=8),
        Recipe("nvfp4", _every("nvfp4")),
        Recipe("mxfp8", _every("mxfp8")),
        # Without one part each; what the paper says of them (section 4) is in docs/numerics.md.
        _ablation("no_rht", "nvfp4_no_rht"),
        _ablation("no_sr", "nvfp4_no_sr"),
        _ablation("no_2d", "nvfp4_no_2d"),
        _ablation("all_layers", last_share=0.0),
        _ablation("first_layers", first_share=0.15, last_share=0.0),
        _ablation("fp4_out_proj", out_proj="nvfp4"),
        # Some products or operands alone.
        _ablation("weights_only", "nvfp4_weights_only", "mxfp8_weights_only"),
        _ablation("forward_only", "nvfp4_forward_only", "mxfp8_forward_only"),
        _ablation("backward_only", "nvfp4_backward_only", "mxfp8_backward_only"),
        # Stochastic rounding elsewhere.
        _ablation("sr_activations", "nvfp4_sr_activations"),
        _ablation("sr_dgrad", "nvfp4_sr_dgrad"),
        _ablation("sr_wgrad", "nvfp4_sr_wgrad"),
    )
}
"""By name; `bf16` and `fp32`, which quantise nothing, are not in here."""
