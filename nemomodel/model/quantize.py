"""Give the linear layers of a model the formats of a recipe."""

from collections import Counter
from collections.abc import Iterator

from torch import nn

from nemomodel.config.pattern import LayerKind
from nemomodel.model.block import Block
from nemomodel.model.layers import Linear
from nemomodel.model.nemotron import Nemotron
from nemomodel.quant.linear import LinearFormat, QuantizedLinear
from nemomodel.quant.recipe import Place, Recipe, Role

ROLES = {
    LayerKind.MAMBA: {"in_proj": Role.MAMBA_IN, "out_proj": Role.MAMBA_OUT},
    LayerKind.ATTENTION: {"qkv_proj": Role.ATTENTION_QKV, "out_proj": Role.ATTENTION_OUT},
    LayerKind.MOE: {
        "latent_down": Role.LATENT_DOWN,
        "latent_up": Role.LATENT_UP,
        "shared_expert.fc1": Role.SHARED_FC1,
        "shared_expert.fc2": Role.SHARED_FC2,
        "experts.fc1": Role.EXPERT_FC1,
        "experts.fc2": Role.EXPERT_FC2,
    },
    LayerKind.MLP: {"fc1": Role.MLP_FC1, "fc2": Role.MLP_FC2},
}
"""Every linear layer of a mixer by its name there."""


class Quantization:
    """The quantised layers of a model.

    Args:
        recipe: None quantises nothing.
        last_layers: blocks at the end that are not quantised, in place of the recipe's share.
        seed: of stochastic rounding.
    """

    def __init__(
        self, model: Nemotron, recipe: Recipe | None, *, last_layers: int | None, seed: int
    ) -> None:
        self.layers: dict[str, QuantizedLinear] = {}
        self._count: Counter[tuple[Role, LinearFormat | None]] = Counter()
        if recipe is None:
            return
        for name, owner, attribute, place in _linears(model):
            format = recipe.format(place, last_layers=last_layers)
            self._count[place.role, format] += 1
            if format:
                self.layers[name] = QuantizedLinear(format, name=name, seed=seed)
                setattr(owner, attribute, self.layers[name])

    def begin(self, step: int, micro_batch: int) -> None:
        """Call before each forward pass; see `QuantizedLinear.begin`."""
        for layer in self.layers.values():
            layer.begin(step, micro_batch)

    def describe(self) -> list[str]:
        """One line per format: what the three products do, and how many layers of which roles."""
        roles: dict[LinearFormat | None, list[str]] = {}
        for (role, format), number in self._count.items():
            roles.setdefault(format, []).append(f"{role} ({number})")
        return [f"{format or 'BF16'}: {', '.join(names)}" for format, names in roles.items()]


def _linears(model: Nemotron) -> Iterator[tuple[str, nn.Module, str, Place]]:
    """Name, module and attribute that hold the quantised products, and place, of every linear."""
    num_layers = len(model.blocks)
    for i, block in enumerate(model.blocks):
        yield from _of_block(f"blocks.{i}", block, i, num_layers, in_mtp=False)
    for j, mtp_block in enumerate(model.mtp.blocks if model.mtp else ()):
        place = Place(Role.MTP_PROJ, 0, num_layers, in_mtp=True)
        yield f"mtp.blocks.{j}.eh_proj", mtp_block.eh_proj, "quantized", place
        for i, block in enumerate(mtp_block.layers):
            yield from _of_block(f"mtp.blocks.{j}.layers.{i}", block, i, num_layers, in_mtp=True)


def _of_block(
    name: str, block: Block, layer: int, num_layers: int, *, in_mtp: bool
) -> Iterator[tuple[str, nn.Module, str, Place]]:
    for path, role in ROLES[block.kind].items():
        place = Place(role, layer, num_layers, in_mtp)
        parent, _, attribute = path.rpartition(".")
        if parent == "experts":
            owner, holder = block.mixer.experts, f"quantized_{attribute}"
        else:
            owner, holder = block.mixer.get_submodule(path), "quantized"
            if not isinstance(owner, Linear):  # the plain MoE has no latent projections
                continue
        yield f"{name}.mixer.{path}", owner, holder, place
