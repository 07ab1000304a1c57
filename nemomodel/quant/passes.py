"""Which forward pass it is: that names the random bits of stochastic rounding."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Use(NamedTuple):
    """One use of a layer. Others may begin before its backward pass: it is kept until then."""

    step: int
    micro_batch: int
    number: int
    """Of the use in the pass of this micro-batch, from 1."""


class Pass:
    """The forward pass of one micro-batch, shared by the layers that are in it."""

    def __init__(self) -> None:
        self.step = self.micro_batch = 0
        self.per_rank = 1
        self._uses: Counter[tuple[str, int]] = Counter()

    def begin(self, step: int, micro_batch: int, *, per_rank: int = 1) -> None:
        """
        Args:
            micro_batch: number in the global batch, whatever rank has it.
            per_rank: micro-batches of each data-parallel rank.
        """
        self.step, self.micro_batch, self.per_rank = step, micro_batch, per_rank
        self._uses = Counter()

    def use(self, layer: str) -> Use:
        self._uses[layer, self.micro_batch] += 1
        return Use(self.step, self.micro_batch, self._uses[layer, self.micro_batch])

    @contextmanager
    def of_rank(self, distance: int) -> Iterator[None]:
        """Uses are of the micro-batch that the data-parallel rank `distance` further is at."""
        own = self.micro_batch
        self.micro_batch = own + distance * self.per_rank
        yield
        self.micro_batch = own

    def remember(self) -> "Replay":
        return Replay(self, self.micro_batch, self._uses.copy())


class Replay:
    """A context in which a pass is again where it was: what is recomputed there names its uses as
    before, whatever pass has begun in between."""

    def __init__(self, of: Pass, micro_batch: int, uses: Counter[tuple[str, int]]) -> None:
        self._pass, self._state = of, (micro_batch, uses)

    def __enter__(self) -> None:
        self._exchange()

    def __exit__(self, *_: object) -> None:
        self._exchange()

    def _exchange(self) -> None:
        at = self._pass
        before = at.micro_batch, at._uses
        at.micro_batch, at._uses = self._state
        self._state = before


class InPass(ABC):
    """A layer whose random bits are named by the pass it is in."""

    def __init__(self) -> None:
        self.at = Pass()
        """Where the run is; several layers may share it."""

    def begin(self, step: int, micro_batch: int) -> None:
        """Of a layer that is alone in its pass: the next use is in this step and micro-batch."""
        if step != self.at.step:
            self.new_step()
        self.at.begin(step, micro_batch)

    @abstractmethod
    def new_step(self) -> None:
        """Call when the weight has changed."""
