"""Give the linear layers of a model the formats of a recipe, phase by phase."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nemomodel.config.pattern import LayerKind
from nemomodel.config.precision import Phase, phases, places
from nemomodel.config.recipe import Place, Role
from nemomodel.config.schema import Config, Executor
from nemomodel.model.block import Block
from nemomodel.model.layers import Linear
from nemomodel.model.moe import Experts
from nemomodel.model.nemotron import Nemotron
from nemomodel.model.shares import first_expert, shares
from nemomodel.quant.linear import LinearFormat, QuantizedLinear, first_not_finite
from nemomodel.quant.passes import Pass
from nemomodel.quant.recipe import FORMATS
from nemomodel.quant.statistics import Observer
from nemomodel.quant.transformer_engine import TransformerEngineLinear
from nemomodel.quant.transformer_engine_recipe import execution

ROLES = {
    LayerKind.MAMBA: {"in_proj": Role.MAMBA_IN, "out_proj": Role.MAMBA_OUT},
    LayerKind.ATTENTION: {
        "q_proj": Role.ATTENTION_QKV,
        "k_proj": Role.ATTENTION_QKV,
        "v_proj": Role.ATTENTION_QKV,
        "out_proj": Role.ATTENTION_OUT,
    },
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


LAYERS = {"emulated": QuantizedLinear, "transformer_engine": TransformerEngineLinear}
"""By precision.executor."""


class Slot(NamedTuple):
    """Where the quantised products of a linear layer go."""

    name: str
    place: Place
    owner: nn.Module
    attribute: str

    @property
    def weight(self) -> Tensor:
        if isinstance(self.owner, Experts):
            return getattr(self.owner, self.attribute.removeprefix("quantized_"))
        return self.owner.weight


class Quantization:
    """The quantised layers of a model, or of stages of one, in every phase of its run.

    Args:
        phases: in order; the first one holds from the start.
        seed: of stochastic rounding.
    """

    def __init__(
        self,
        models: Sequence[Nemotron],
        phases: Sequence[Phase],
        *,
        seed: int,
        executor: Executor = "emulated",
    ) -> None:
        self.layers: dict[str, QuantizedLinear | TransformerEngineLinear] = {}
        """By name, in the phase of the last `begin`."""
        self.observer: Observer | None = None
        """Given to every layer by `begin`; None observes nothing."""
        self._config = models[0].config
        self._slots = [slot for model in models for slot in _slots(model)]
        self.roles = {slot.name: slot.place.role for slot in self._slots}
        """Of every linear layer of this rank, quantised or not."""
        self._mesh, self.at = models[0].mesh, Pass()
        """The forward pass that all layers are in."""
        self._phases, self._seed, self._executor = tuple(phases), seed, executor
        for module in (module for model in models for module in model.modules()):
            if isinstance(module, Block):
                module.at = self.at
        self._enter(self._phases[0])

    def begin(self, step: int, micro_batch: int, *, per_rank: int = 1) -> None:
        """Call before each forward pass; see `Pass.begin`."""
        self._begin(self.phase(step), step, micro_batch, per_rank)

    def begin_validation(self, step: int) -> None:
        """Call before a validation after `step`: in its phase, with the weights it has made."""
        self._begin(self.phase(step), step + 1, 0, 1)

    def first_not_finite(self) -> str | None:
        """The first layer and operand of this step with infinities or NaN; see quant/linear.py."""
        return first_not_finite(self.layers.values())

    def phase(self, step: int) -> Phase:
        """The one a step is in, whatever step was last."""
        return [phase for phase in self._phases if phase.first_step <= step][-1]

    def describe(self, phase: Phase) -> list[str]:
        """One line per format: what the three products do, and how many layers of which roles the
        whole model has."""
        roles: dict[LinearFormat | None, Counter[Role]] = {}
        for place in places(self._config):
            roles.setdefault(_format(phase, place), Counter())[place.role] += 1
        return [
            f"{self._executed(format) if format else 'not quantised'}: "
            + ", ".join(f"{role} ({number})" for role, number in counts.items())
            for format, counts in roles.items()
        ]

    def _executed(self, format: LinearFormat) -> str:
        if self._executor == "emulated":
            return f"emulated {format}"
        return f"{execution(format, torch.cuda.get_device_capability())}, {format}"

    def _begin(self, phase: Phase, step: int, micro_batch: int, per_rank: int) -> None:
        if phase != self._phase:
            self._enter(phase)
        for layer in self.layers.values():
            layer.observer = self.observer
            if step != self.at.step:
                layer.new_step()
        self.at.begin(step, micro_batch, per_rank=per_rank)

    def _enter(self, phase: Phase) -> None:
        self._phase, self.layers = phase, {}
        for slot in self._slots:
            layer = None
            if format := _format(phase, slot.place):
                layer = LAYERS[self._executor](
                    format,
                    name=slot.name,
                    seed=self._seed,
                    shares=shares(slot.weight, self._mesh, format, name=slot.name),
                    first_expert=first_expert(slot.weight),
                )
                layer.at = self.at
                self.layers[slot.name] = layer
            setattr(slot.owner, slot.attribute, layer)


def formats(config: Config) -> set[LinearFormat]:
    """Every format that some phase gives some layer."""
    found = {_format(phase, place) for phase in phases(config) for place in places(config.model)}
    return {format for format in found if format}


def _format(phase: Phase, place: Place) -> LinearFormat | None:
    name = phase.format(place)
    return FORMATS[name] if name else None


def _slots(model: Nemotron) -> Iterator[Slot]:
    num_layers = len(model.config.layers)
    # A pipeline stage has some of the blocks, under the names that they have in the whole model.
    for i, block in model.blocks.named_children():
        yield from _of_block(f"blocks.{i}", block, int(i), num_layers, in_mtp=False)
    for j, mtp_block in enumerate(model.mtp.blocks if model.mtp else ()):
        place = Place(Role.MTP_PROJ, 0, num_layers, in_mtp=True)
        yield Slot(f"mtp.blocks.{j}.eh_proj", place, mtp_block.eh_proj, "quantized")
        for i, block in enumerate(mtp_block.layers):
            yield from _of_block(f"mtp.blocks.{j}.layers.{i}", block, i, num_layers, in_mtp=True)


def _of_block(
    name: str, block: Block, layer: int, num_layers: int, *, in_mtp: bool
) -> Iterator[Slot]:
    found: dict[str, tuple[nn.Module, str]] = {}
    for path, module in block.mixer.named_modules():
        if isinstance(module, Linear):
            found[path] = module, "quantized"
        if isinstance(module, Experts):
            found |= {f"{path}.{fc}": (module, f"quantized_{fc}") for fc in ("fc1", "fc2")}
    for path, (owner, attribute) in found.items():
        place = Place(ROLES[block.kind][path], layer, num_layers, in_mtp)
        yield Slot(f"{name}.mixer.{path}", place, owner, attribute)
