"""Log-probabilities of given continuations, for tasks that compare or sum them."""

from collections.abc import Callable, Iterator
from itertools import batched
from typing import NamedTuple

import torch
from torch import Tensor

from nemomodel.model.nemotron import Nemotron
from nemomodel.ops.loss import CHUNK_TOKENS
from nemomodel.ops.precision import accumulator

Pair = tuple[list[int], list[int]]
"""Token ids of a context and of what is to follow it."""


class Score(NamedTuple):
    log_probability: float
    """Of the whole continuation, in nats."""
    is_greedy: bool
    """Whether each of its tokens is the most likely one."""


@torch.inference_mode()
def score_continuations(
    model: Nemotron,
    pairs: list[Pair],
    *,
    batch_size: int,
    max_length: int,
    on_pair: Callable[[int, Score], None] = lambda index, score: None,
) -> list[Score]:
    """The score of every pair, whatever their order and lengths.

    Of a context that is too long the end is kept, so that model inputs are at most `max_length`.
    Sequences go in batches from the longest to the shortest, padded at the right, which a
    causal model does not see; pairs whose inputs are the same share one row.

    Args:
        on_pair: called with (index, score) as soon as each is known.

    Raises:
        ValueError: an empty context, or a continuation longer than `max_length`.
    """
    rows: dict[tuple[int, ...], list[int]] = {}
    for index, (context, continuation) in enumerate(pairs):
        if not context:
            raise ValueError("a context is empty; give at least one token to start from")
        if len(continuation) > max_length:
            raise ValueError(
                f"a continuation has {len(continuation):,} tokens, more than "
                f"max_length={max_length}; its score would leave some out"
            )
        inputs = (*context, *continuation)[:-1] if continuation else tuple(context)
        rows.setdefault(inputs[-max_length:], []).append(index)

    scores: dict[int, Score] = {}
    longest_first = sorted(rows.items(), key=lambda row: -len(row[0]))
    for batch in batched(longest_first, batch_size):
        hidden_SBD = model.hidden(_pad_right([inputs for inputs, _ in batch], model))
        for b, (inputs, indices) in enumerate(batch):
            for index in indices:
                continuation = pairs[index][1]
                hidden_TD = hidden_SBD[len(inputs) - len(continuation) : len(inputs), b]
                scores[index] = _score(model, hidden_TD, continuation)
                on_pair(index, scores[index])
    return [scores[index] for index in range(len(pairs))]


def rolling_windows(ids: list[int], *, prefix_id: int, max_length: int) -> Iterator[Pair]:
    """Pairs that together score every token of a text once, the first one after `prefix_id`.

    Each window but the first starts with one token of context; the last one is filled up with
    context to `max_length`. Source: the contract of `LM.loglikelihood_rolling` in
    EleutherAI/lm-evaluation-harness lm_eval/api/model.py, version 0.4.13.
    """
    whole = [prefix_id, *ids]  # the inputs of target i are whole[: i + 1]
    for start in range(0, len(ids), max_length):
        stop = min(start + max_length, len(ids))
        yield whole[max(stop - max_length, 0) : start + 1], ids[start:stop]


def _pad_right(rows: list[tuple[int, ...]], model: Nemotron) -> Tensor:
    ids_BS = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for b, row in enumerate(rows):
        ids_BS[b, : len(row)] = torch.tensor(row)
    return ids_BS.to(model.lm_head.weight.device)


def _score(model: Nemotron, hidden_TD: Tensor, tokens: list[int]) -> Score:
    """Log-softmax in FP32 or wider, of some tokens at a time."""
    chunk = CHUNK_TOKENS[hidden_TD.device.type]
    label_T = torch.tensor(tokens, dtype=torch.int64, device=hidden_TD.device)
    total, is_greedy = 0.0, True
    for hidden, label in zip(hidden_TD.split(chunk), label_T.split(chunk), strict=True):
        logits = model.lm_head.logits(hidden)
        log_p = logits.to(accumulator(logits.dtype)).log_softmax(-1)
        total += float(log_p.gather(-1, label.unsqueeze(-1)).sum(dtype=torch.float64))
        is_greedy = is_greedy and bool((log_p.argmax(-1) == label).all())
    return Score(total, is_greedy)
