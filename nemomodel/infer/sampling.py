"""How the next token is chosen from logits, and how drafted tokens are checked against them."""

import random
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """
    Raises:
        ValueError: a value is out of its range.
    """

    temperature: float = 0.0
    """Logits are divided by it; 0 is greedy: the most likely token, always."""
    top_p: float = 1.0
    """Draw from the fewest tokens that together are at least this likely, in (0, 1]."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: must be at least 0 and finite")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0 and at most 1")
        if not self.temperature and self.top_p != 1:
            raise ValueError(
                f"top_p={self.top_p} has no effect with temperature=0, which draws nothing; "
                "give a temperature above 0"
            )


class Chooser(Protocol):
    """The choices of one sequence."""

    def draft(self, logits_V: Tensor) -> tuple[int, Tensor | None]:
        """A draft token, and the distribution q_V it was drawn from (None: no chance in it)."""

    def verify(self, logits_SV: Tensor, drafts: list[int], q: list[Tensor | None]) -> list[int]:
        """Tokens from logits_SV of the position before each of the S - 1 drafts and after them.

        The accepted drafts, first to last, then one token of the model's own. Distributed as
        without drafts.
        """


def chooser(sampling: Sampling, *, stream: int) -> Chooser:
    """
    Args:
        stream: number of the sequence; each has random numbers of its own.
    """
    return Drawn(sampling, stream=stream) if sampling.temperature else Greedy()


class Greedy:
    """The most likely token; a draft is accepted when it is that one."""

    def draft(self, logits_V: Tensor) -> tuple[int, None]:
        return int(logits_V.argmax()), None

    def verify(self, logits_SV: Tensor, drafts: list[int], q: list[Tensor | None]) -> list[int]:
        best = logits_SV.argmax(-1).tolist()
        for i, token in enumerate(drafts):
            if token != best[i]:
                return best[: i + 1]
        return best


class Drawn:
    """Tokens drawn at random; a draft x is accepted with probability min(1, p(x) / q(x)).

    A draft that is not is replaced by a draw from the positive part of p - q. The token is then
    distributed as p, whatever q. Source: arXiv:2211.17192 section 2.3.
    """

    def __init__(self, sampling: Sampling, *, stream: int):
        self.sampling = sampling
        self.random = random.Random(f"sample/{sampling.seed}/{stream}")

    def draft(self, logits_V: Tensor) -> tuple[int, Tensor]:
        q_V = probabilities(logits_V, self.sampling)
        return self._draw(q_V), q_V

    def verify(self, logits_SV: Tensor, drafts: list[int], q: list[Tensor | None]) -> list[int]:
        p_SV = probabilities(logits_SV, self.sampling)
        for i, (token, q_V) in enumerate(zip(drafts, q, strict=True)):
            if self.random.random() * float(q_V[token]) >= float(p_SV[i, token]):
                return [*drafts[:i], self._draw(residual(p_SV[i], q_V))]
        return [*drafts, self._draw(p_SV[-1])]

    def _draw(self, p_V: Tensor) -> int:
        cumulative_V = p_V.cumsum(0)
        mark = self.random.random() * cumulative_V[-1]
        return int(torch.searchsorted(cumulative_V, mark, right=True))


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Distribution over the last dimension, float64; temperature is not 0."""
    logits = logits.double()
    # The largest becomes 0 first: divided by a tiny temperature it would overflow.
    p = ((logits - logits.amax(-1, keepdim=True)) / sampling.temperature).softmax(-1)
    if sampling.top_p == 1:
        return p
    ordered, index = p.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    kept = ordered.masked_fill_(before >= sampling.top_p, 0)
    kept /= kept.sum(-1, keepdim=True)
    return torch.empty_like(p).scatter_(-1, index, kept)


def residual(p_V: Tensor, q_V: Tensor) -> Tensor:
    """The positive part of p - q, normalised."""
    rest_V = (p_V - q_V).clamp_(min=0)
    total = rest_V.sum()
    # Where p and q differ by rounding alone, nothing may be left; then p will do.
    return rest_V / total if total > 0 else p_V
