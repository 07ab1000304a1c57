"""Text from a model: cached decoding, with drafts of its MTP depths where asked for."""

import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch

from nemomodel.infer.draft import Drafter
from nemomodel.infer.sampling import Sampling, chooser
from nemomodel.model.cache import CachedModel
from nemomodel.model.nemotron import Nemotron
from nemomodel.model.past import STEP_POSITIONS

MAX_DRAFT_LENGTH = STEP_POSITIONS - 1

OnToken = Callable[[int, int], None]
"""Called with (number of the prompt, token) for every token as soon as it is certain."""


@dataclass
class Generation:
    """What one prompt was continued with, and the work that took."""

    tokens: list[int] = field(default_factory=list)
    """New tokens; the last is the stop token if one came."""
    stopped: bool = False
    """Whether a stop token came."""
    passes: int = 0
    """Passes of the backbone after that over the prompt, which gives the first token."""
    drafted: list[int] = field(default_factory=list)
    """Drafts checked at each draft position."""
    accepted: list[int] = field(default_factory=list)
    """Those of them that were accepted, and all before them too."""

    @property
    def acceptance_length(self) -> float:
        """Tokens per pass: 1 without drafts, at most 1 + the draft length."""
        return (len(self.tokens) - 1) / self.passes if self.passes else 1.0


def generate(
    model: Nemotron,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    draft_length: int = 0,
    on_token: OnToken | None = None,
) -> list[Generation]:
    """Continue each prompt until a stop token or `max_new_tokens`.

    Without drafts all prompts go together, the shorter ones padded at the left, which changes
    no result beyond rounding. With drafts they go one after another. Each prompt has its own
    random numbers, given by the seed and its place.

    Args:
        draft_length: tokens the MTP depths draft for each pass of the backbone to check; 0 is
            none. The output is that without drafts: the same tokens if greedy, the same
            distribution if not. (Logits that differ by rounding alone may tie differently.)
            Beyond the number of depths the last block is applied further, with a warning.

    Raises:
        ValueError: no prompt, an empty one, an id outside the vocabulary, a number out of its
            range, or drafts from a model without MTP.
    """
    _check(model, prompts, max_new_tokens, stop_ids, draft_length)
    report = on_token or (lambda index, token: None)
    with torch.inference_mode():
        if not draft_length:
            return _decode(model, prompts, max_new_tokens, stop_ids, sampling, report)
        return [
            _decode_drafted(
                model, prompt, index, max_new_tokens, stop_ids, sampling, draft_length, report
            )
            for index, prompt in enumerate(prompts)
        ]


def _decode(
    model: Nemotron,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling,
    report: OnToken,
) -> list[Generation]:
    """All prompts together, token by token; one that has stopped is carried along."""
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    cache = CachedModel(
        model,
        batch_size=len(prompts),
        max_length=longest + max_new_tokens - 1,
        padding=padding,
    )
    choosers = [chooser(sampling, stream=index) for index in range(len(prompts))]
    results = [Generation() for _ in prompts]
    next_BS = [[0] * n + prompt for n, prompt in zip(padding, prompts, strict=True)]
    for step in range(max_new_tokens):
        hidden_SBD = cache.extend(torch.tensor(next_BS, device=model.lm_head.weight.device))
        logits_BV = cache.logits(hidden_SBD[-1])
        for index, result in enumerate(results):
            if result.stopped:
                continue
            (token,) = choosers[index].verify(logits_BV[index : index + 1], [], [])
            result.tokens.append(token)
            result.stopped, result.passes = token in stop_ids, step
            report(index, token)
        if all(result.stopped for result in results):
            break
        next_BS = [[result.tokens[-1]] for result in results]
    return results


def _decode_drafted(
    model: Nemotron,
    prompt: list[int],
    index: int,
    max_new_tokens: int,
    stop_ids: Collection[int],
    sampling: Sampling,
    draft_length: int,
    report: OnToken,
) -> Generation:
    """One prompt: draft, check all drafts in one pass of the backbone, keep what is accepted."""
    device = model.lm_head.weight.device
    max_length = len(prompt) + max_new_tokens - 1
    cache = CachedModel(model, batch_size=1, max_length=max_length)
    drafter = Drafter(model, cache, length=draft_length, max_length=max_length)
    choose = chooser(sampling, stream=index)
    result = Generation(drafted=[0] * draft_length, accepted=[0] * draft_length)
    ids = list(prompt)  # of them the cache holds all but the last
    hidden_SBD = cache.extend(torch.tensor([prompt], device=device))
    new = choose.verify(cache.logits(hidden_SBD[-1]), [], [])
    while True:
        for token in new:
            ids.append(token)
            result.tokens.append(token)
            report(index, token)
            if token in stop_ids:
                result.stopped = True
                return result
        left = max_new_tokens - len(result.tokens)
        if not left:
            return result
        drafts, q = drafter.draft(hidden_SBD, ids, min(draft_length, left - 1), choose)
        hidden_SBD = cache.extend(torch.tensor([[ids[-1], *drafts]], device=device))
        new = choose.verify(cache.logits(hidden_SBD[:, 0]), drafts, q)
        result.passes += 1
        for position in range(len(drafts)):
            result.drafted[position] += 1
            result.accepted[position] += position < len(new) - 1
        hidden_SBD = hidden_SBD[: len(new)]
        cache.crop(len(ids) + len(new) - 1)
        drafter.accept(ids + new[:-1])


def _check(
    model: Nemotron,
    prompts: list[list[int]],
    max_new_tokens: int,
    stop_ids: Collection[int],
    draft_length: int,
) -> None:
    V, mtp = model.config.vocab_size, model.config.mtp
    if not prompts:
        raise ValueError("prompts: there is none; give at least one")
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompts[{index}] is empty; give at least one token")
        if outside := [token for token in prompt if not 0 <= token < V]:
            raise ValueError(
                f"prompts[{index}]: token {outside[0]} is outside the vocabulary of {V} tokens"
            )
    if outside := [token for token in stop_ids if not 0 <= token < V]:
        raise ValueError(f"stop_ids: token {outside[0]} is outside the vocabulary of {V} tokens")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 1")
    if not 0 <= draft_length <= MAX_DRAFT_LENGTH:
        raise ValueError(f"draft_length={draft_length}: must be in 0 .. {MAX_DRAFT_LENGTH}")
    if draft_length and mtp is None:
        raise ValueError(
            f"draft_length={draft_length}: this model has no MTP heads to draft with; use 0"
        )
    if mtp is not None and draft_length > mtp.num_depths:
        warnings.warn(
            f"draft_length={draft_length} is more than model.mtp.num_depths={mtp.num_depths}; "
            "the last MTP block is applied further",
            stacklevel=3,
        )
