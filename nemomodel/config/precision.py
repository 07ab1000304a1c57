"""What the [precision] section means for a model: phases, layers, and rules between its keys."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from nemomodel.config.pattern import LayerKind
from nemomodel.config.recipe import RECIPES, Place, Recipe, Role, roles_of
from nemomodel.config.schema import Config, ModelConfig, PhaseConfig


@dataclass(frozen=True)
class Phase:
    """Steps of a run that share a recipe."""

    key: str
    """Of the config section that says so."""
    from_tokens: int
    first_step: int
    """The first step whose first token is that far; steps count from 1."""
    name: str
    last_layers: int | None

    @property
    def recipe(self) -> Recipe | None:
        """None quantises nothing."""
        return RECIPES.get(self.name)

    def __str__(self) -> str:
        last = "" if self.last_layers is None else f", last {self.last_layers} blocks BF16"
        return f"recipe {self.name}{last}, from {self.from_tokens:,} tokens"

    def format(self, place: Place) -> str | None:
        """Name of the format of a linear layer; None is not quantised."""
        recipe = self.recipe
        return recipe.format(place, last_layers=self.last_layers) if recipe else None


def phases(config: Config) -> tuple[Phase, ...]:
    """The phases of a run in order; the first one begins at step 1."""
    first = Phase("precision", 0, 1, config.precision.recipe, config.precision.bf16_last_layers)
    step_tokens = config.train.global_batch_size * config.train.seq_length
    return first, *(
        Phase(
            f"precision.phases.{i}",
            phase.from_tokens,
            1 + math.ceil(phase.from_tokens / step_tokens),
            phase.recipe,
            config.precision.bf16_last_layers if _inherits(phase) else phase.bf16_last_layers,
        )
        for i, phase in enumerate(config.precision.phases)
    )


def _inherits(phase: PhaseConfig) -> bool:
    """Whether a phase takes the section's number of last layers."""
    return phase.bf16_last_layers is None and phase.recipe in RECIPES


def places(model: ModelConfig) -> Iterator[Place]:
    """Every linear layer of the whole model; queries, keys and values count as one."""
    number = len(model.layers)
    for i, kind in enumerate(model.layers):
        yield from (Place(role, i, number, in_mtp=False) for role in _roles(model, kind))
    for _ in range(model.num_mtp_blocks):
        yield Place(Role.MTP_PROJ, 0, number, in_mtp=True)
        for i, kind in enumerate(model.mtp_layers):
            yield from (Place(role, i, number, in_mtp=True) for role in _roles(model, kind))


def _roles(model: ModelConfig, kind: LayerKind) -> Iterator[Role]:
    latent = model.moe is not None and model.moe.latent_size is not None
    for role in roles_of(kind):
        if latent or role not in (Role.LATENT_DOWN, Role.LATENT_UP):
            yield role


def describe(config: Config) -> list[dict[str, Any]]:
    """One entry per phase, as data for JSON: where it begins, and its linear layers by format."""
    return [
        {
            "from_step": phase.first_step,
            "from_tokens": phase.from_tokens,
            "recipe": phase.name,
            "linear_layers": _by_format(config, phase),
        }
        for phase in phases(config)
    ]


def _by_format(config: Config, phase: Phase) -> dict[str, dict[str, int]]:
    """Format -> role -> number of layers."""
    found: dict[str, Counter[str]] = {}
    for place, format in zip(places(config.model), _formats(config, phase), strict=True):
        found.setdefault(format or config.precision.weights, Counter())[place.role.value] += 1
    return {format: dict(roles) for format, roles in found.items()}


def _formats(config: Config, phase: Phase) -> list[str | None]:
    """Of every linear layer; what two phases with the same ones do is the same."""
    return [phase.format(place) for place in places(config.model)]


def problems(config: Config) -> Iterator[str]:
    """Every rule that the section breaks in a model whose patterns are right."""
    found = phases(config)
    for phase in found:
        yield from _selection(config, phase)
    yield from _sequence(config, found)
    yield from _executor(config, found)
    yield from _statistics(config, found)


def _selection(config: Config, phase: Phase) -> Iterator[str]:
    """A recipe or a number of layers that has no effect in this model."""
    recipe, last, number = phase.recipe, phase.last_layers, len(config.model.layers)
    if recipe is None:
        inherited = phase.first_step == 1 and any(map(_inherits, config.precision.phases))
        if last is not None and not inherited:
            yield (
                f"{phase.key}.bf16_last_layers={last} has no effect with {phase.key}.recipe="
                f"{phase.name!r}; remove it, or use a recipe that quantises"
            )
        return

    def selects(last_layers: int | None) -> bool:
        return any(_formats(config, replace(phase, last_layers=last_layers)))

    if selects(last):
        yield from _ablation(config, phase, recipe.ablates)
        return
    possible = [n for n in range(number) if selects(n)]
    if last is not None and possible:
        yield (
            f"{phase.key}.bf16_last_layers={last} leaves no layer of the {number} of "
            f"model.layer_pattern to quantise; use at most {max(possible)}, or "
            f"{phase.key}.recipe='bf16'"
        )
    else:
        other = f"{phase.key}.bf16_last_layers={max(possible)}" if possible else "another recipe"
        yield (
            f"{phase.key}.recipe={phase.name!r} selects no linear layer of model.layer_pattern="
            f"{config.model.layer_pattern!r}; use {other}, or {phase.key}.recipe='bf16'"
        )


def _ablation(config: Config, phase: Phase, ablated: str | None) -> Iterator[str]:
    """An ablation of what this model does not have."""
    if ablated and _formats(config, phase) == _formats(config, replace(phase, name=ablated)):
        yield (
            f"{phase.key}.recipe={phase.name!r} is the same as {ablated!r} with this model; "
            f"use {phase.key}.recipe={ablated!r}"
        )


def _sequence(config: Config, found: tuple[Phase, ...]) -> Iterator[str]:
    """Phases that never run, or change nothing."""
    steps, batch = config.train.steps, config.train.global_batch_size * config.train.seq_length
    for before, phase in pairwise(found):
        key = f"{phase.key}.from_tokens={phase.from_tokens}"
        if "fp32" in (config.precision.recipe, phase.name) and phase.name != before.name:
            yield (
                f"{phase.key}.recipe={phase.name!r} cannot follow {before.name!r}: weights are "
                "FP32 with 'fp32' and BF16 with all others, in the whole run; use one kind"
            )
        elif phase.first_step > steps:
            yield (
                f"{key} is never reached: the last of train.steps={steps} begins with token "
                f"{(steps - 1) * batch}; use at most that"
            )
        elif phase.from_tokens <= before.from_tokens:
            yield (
                f"{key} is not after {before.key}.from_tokens={before.from_tokens}; "
                "list the phases in their order"
            )
        elif phase.first_step == before.first_step:
            yield (
                f"{key} leaves no step to {before.key}: both begin with step {phase.first_step}, "
                f"of {batch} tokens; use at least {before.first_step * batch - batch + 1}"
            )
        elif _formats(config, phase) == _formats(config, before):
            yield (
                f"{phase.key} has no effect: every layer has the format that it has with "
                f"{before.key}.recipe={before.name!r}; remove it, or use another recipe"
            )


def _executor(config: Config, found: tuple[Phase, ...]) -> Iterator[str]:
    executor = config.precision.executor
    if executor == "emulated":
        return
    if not any(phase.recipe for phase in found):
        yield (
            f"precision.executor={executor!r} has no effect with precision.recipe="
            f"{config.precision.recipe!r}; remove it, or use a recipe that quantises"
        )
    elif config.run.device == "cpu":
        yield (
            f"precision.executor={executor!r} needs a GPU, and run.device='cpu'; "
            "use precision.executor='emulated'"
        )


def _statistics(config: Config, found: tuple[Phase, ...]) -> Iterator[str]:
    interval = config.observe.quantization_interval
    if interval is None:
        return
    key = f"observe.quantization_interval={interval}"
    if not any(phase.recipe for phase in found):
        yield (
            f"{key} has no effect with precision.recipe={config.precision.recipe!r}; "
            "remove it, or use a recipe that quantises"
        )
    elif config.precision.executor != "emulated":
        yield (
            f"{key} has no effect with precision.executor={config.precision.executor!r}, which "
            "does not show its operands; remove it, or use 'emulated'"
        )
    elif interval > config.train.steps:
        yield f"{key} is never reached: train.steps={config.train.steps}; use at most that"
    elif not any(_sampled(config, found, interval)):
        yield (
            f"{key} has no effect: nothing is quantised in those of train.steps="
            f"{config.train.steps} that it divides; use a smaller one"
        )


def _sampled(config: Config, found: tuple[Phase, ...], interval: int) -> Iterator[bool]:
    """Of every phase, whether it quantises in a step that the interval divides."""
    ends = [phase.first_step for phase in found[1:]] + [config.train.steps + 1]
    for phase, end in zip(found, ends, strict=True):
        multiples = (end - 1) // interval - (phase.first_step - 1) // interval
        yield phase.recipe is not None and multiples > 0
