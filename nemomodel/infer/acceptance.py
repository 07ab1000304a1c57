"""How many drafted tokens a model accepts, by category of prompts.

The reporting is that of SPEED-Bench (arXiv:2604.09557): an acceptance length per prompt, its mean
per category, and the mean of the categories.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from time import perf_counter
from typing import Any

from nemomodel.infer.generate import Generation, generate
from nemomodel.infer.sampling import Sampling
from nemomodel.model.nemotron import Nemotron

NO_CATEGORY = "none"


@dataclass(frozen=True)
class Prompt:
    text: str
    category: str = NO_CATEGORY


@dataclass(frozen=True)
class Measured:
    """One prompt and how its continuation went."""

    category: str
    generation: Generation
    seconds: float


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of JSON lines `{"prompt": text, "category": name}`; other keys are not looked at.

    Raises:
        ValueError: listing every line that is not such an object, or naming a file without any.
    """
    prompts, wrong = [], []
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                prompts.append(_parse(line))
            except ValueError as error:
                wrong.append(f"  {path}:{number}: {error}")
    if wrong:
        count = f"{len(wrong)} line{'s are' if len(wrong) > 1 else ' is'}"
        raise ValueError("\n".join([f"{path}: {count} wrong", *wrong]))
    if not prompts:
        raise ValueError(f"{path}: has no prompts")
    return prompts


def _lines(path: Path) -> list[str]:
    try:
        # Not splitlines: JSON strings may hold other line separators of Unicode.
        return path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8 text: {error}") from None


def _parse(line: str) -> Prompt:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"is a {type(record).__name__}, not an object with the key 'prompt'")
    if "prompt" not in record:
        raise ValueError(f"has no 'prompt', only {sorted(record)}")
    text, category = record["prompt"], record.get("category")
    if not isinstance(text, str) or not text:
        raise ValueError(f"'prompt' is {text!r}; it must be a text that is not empty")
    if category is None:
        return Prompt(text)
    if not isinstance(category, str) or not category:
        raise ValueError(f"'category' is {category!r}; it must be a name, or left out")
    return Prompt(text, category)


def measure(
    model: Nemotron,
    prompts: list[tuple[str, list[int]]],
    *,
    max_new_tokens: int,
    stop_ids: list[int],
    sampling: Sampling,
    draft_length: int,
    on_prompt: Callable[[], None] = lambda: None,
) -> list[Measured]:
    """Continue prompts one after another, each with random numbers of its own.

    Args:
        prompts: (category, token ids).

    Raises:
        ValueError: as `generate`.
    """
    measured = []
    for index, (category, ids) in enumerate(prompts):
        started = perf_counter()
        (generation,) = generate(
            model,
            [ids],
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            sampling=replace(sampling, seed=sampling.seed + index),
            draft_length=draft_length,
        )
        measured.append(Measured(category, generation, perf_counter() - started))
        on_prompt()
    return measured


def summarize(measured: list[Measured]) -> dict[str, Any]:
    """Plain data for JSON: `categories` by name in order, `all` prompts, and the `macro_average`,
    the mean acceptance length of the categories; see `_summary` for the other two.
    """
    names = sorted({m.category for m in measured})
    categories = {name: _summary([m for m in measured if m.category == name]) for name in names}
    lengths = [part["acceptance_length"] for part in categories.values()]
    return {
        "categories": categories,
        "all": _summary(measured),
        "macro_average": _mean(lengths),
    }


def _summary(measured: list[Measured]) -> dict[str, Any]:
    """
    Returns:
        acceptance_length: mean over prompts of tokens per verification pass, the model's own
            token included and the prompt's pass with its token not. Prompts that ended before
            any such pass do not count; None if all did.
        acceptance_rate: per draft position, the share of accepted drafts among the passes that
            accepted all drafts before it. A pass that drafted less, because no more tokens
            were wanted, counts as one that did not accept.
        joint_acceptance_rate: the share of passes with this position whose drafts up to it
            were all accepted. Both rates are pooled over prompts.
    """
    generations = [m.generation for m in measured]
    drafted = _sum_columns([g.drafted for g in generations])
    accepted = _sum_columns([g.accepted for g in generations])
    reached = [*drafted[:1], *accepted[:-1]]
    tokens, seconds = sum(len(g.tokens) for g in generations), sum(m.seconds for m in measured)
    return {
        "prompts": len(generations),
        "tokens": tokens,
        "passes": sum(g.passes for g in generations),
        "acceptance_length": _mean([g.acceptance_length for g in generations if g.passes]),
        "acceptance_rate": _ratios(accepted, reached),
        "joint_acceptance_rate": _ratios(accepted, drafted),
        "drafted": drafted,
        "accepted": accepted,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
    }


def _sum_columns(rows: list[list[int]]) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)]


def _ratios(parts: list[int], wholes: list[int]) -> list[float | None]:
    return [part / whole if whole else None for part, whole in zip(parts, wholes, strict=True)]


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
