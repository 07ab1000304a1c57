"""Text until a stop string: what generation tasks of an evaluation ask for."""

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from nemomodel.infer.generate import generate
from nemomodel.infer.sampling import Sampling
from nemomodel.model.nemotron import Nemotron

MAX_TOKENS_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of one setting; the first that is there counts."""
OTHER_KEYS = ("until", "do_sample", "temperature", "top_p")


@dataclass(frozen=True)
class Settings:
    """How the requests of one batch go on."""

    until: tuple[str, ...]
    """The text ends before the first of these strings that comes."""
    max_new_tokens: int
    temperature: float
    top_p: float


def parse_settings(gen_kwargs: Mapping[str, Any], *, default_max_new_tokens: int) -> Settings:
    """The generation arguments of an lm-eval task.

    Without `do_sample: true` or a temperature above 0 decoding is greedy; with `do_sample: true`
    alone the temperature is 1.

    Raises:
        ValueError: listing arguments that this model does not know.
    """
    neutral = {"num_beams": 1, "num_return_sequences": 1}
    unknown = {
        key: value
        for key, value in gen_kwargs.items()
        if key not in (*MAX_TOKENS_KEYS, *OTHER_KEYS) and neutral.get(key) != value
    }
    if unknown:
        raise ValueError(
            f"generation arguments {unknown} are not supported; use "
            f"{', '.join((*OTHER_KEYS, MAX_TOKENS_KEYS[0]))}"
        )
    until = gen_kwargs.get("until") or []
    until = [until] if isinstance(until, str) else until
    do_sample = gen_kwargs.get("do_sample")
    temperature = float(gen_kwargs.get("temperature", 1.0 if do_sample else 0.0))
    top_p = float(gen_kwargs.get("top_p", 1.0))
    limits = (gen_kwargs.get(key) for key in MAX_TOKENS_KEYS)
    limit = next((int(n) for n in limits if n is not None), default_max_new_tokens)
    if do_sample is False or not temperature:  # tasks state top_p beside it
        temperature, top_p = 0.0, 1.0
    return Settings(tuple(text for text in until if text), limit, temperature, top_p)


def generate_until(
    model: Nemotron,
    prompts: list[list[int]],
    settings: Settings,
    *,
    decode: Callable[[list[int]], str],
    stop_ids: Collection[int],
    seed: int,
) -> list[str]:
    """Continue prompts together until each has a stop string, a stop token or its limit.

    Returns:
        the new text of each, without what stopped it.
    """
    tokens: list[list[int]] = [[] for _ in prompts]
    open_prompts = set(range(len(prompts)))
    # A stop string in the text began at most so many tokens ago.
    tail = max((len(text.encode()) for text in settings.until), default=0) + 1

    def add(index: int, token: int) -> None:
        if index not in open_prompts:
            return
        if token in stop_ids:
            open_prompts.discard(index)
        else:
            tokens[index].append(token)
            recent = decode(tokens[index][-tail:]) if settings.until else ""
            if any(text in recent for text in settings.until):
                open_prompts.discard(index)
        if not open_prompts:
            raise _AllStopped

    with suppress(_AllStopped):
        generate(
            model,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            stop_ids=stop_ids,
            sampling=Sampling(settings.temperature, settings.top_p, seed),
            on_token=add,
        )
    return [cut(decode(ids), settings.until) for ids in tokens]


def cut(text: str, until: tuple[str, ...]) -> str:
    """The text before the first stop string."""
    return text[: min((at for stop in until if (at := text.find(stop)) >= 0), default=None)]


class _AllStopped(Exception):  # noqa: N818
    """Nothing more is wanted of a batch; `generate` itself only knows stop tokens."""
