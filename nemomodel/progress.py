"""How far long work of a tool is, for people."""

import sys
import time
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

BAR_INTERVAL, LINE_INTERVAL = 0.1, 10.0
"""Seconds between updates of the bar, and between plain lines."""


class Report(ABC):
    """A bar on a terminal, plain lines elsewhere; both on standard error.

    A subclass counts, calls `moved` after that, and says the rest.

    Args:
        columns: of the bar, between the bar itself and the time left.
    """

    def __init__(self, what: str, *columns: ProgressColumn):
        self.what = what
        self._started = self._last = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            ends = (TextColumn("{task.description}"), BarColumn())
            left = (TextColumn("left"), TimeRemainingColumn())
            self._bar = Progress(*ends, *columns, *left, console=Console(stderr=True))
            self._task = self._bar.add_task(what, **self.state())

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """`completed`, `total` (None: not known) and fields that the columns show."""

    @abstractmethod
    def rate(self) -> str:
        """What a plain line says."""

    @property
    def seconds(self) -> float:
        """Since the start; not 0."""
        return max(time.monotonic() - self._started, 1e-3)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.update(self._task, **self.state())
            self._bar.stop()
        elif error is None:
            print(self._line(), file=sys.stderr)

    def moved(self) -> None:
        """Show the new state, if it is time to."""
        now = time.monotonic()
        if now - self._last <= (BAR_INTERVAL if self._bar else LINE_INTERVAL):
            return
        self._last = now
        if self._bar:
            self._bar.update(self._task, **self.state())
        else:
            print(self._line(), file=sys.stderr, flush=True)

    def _line(self) -> str:
        state, line = self.state(), f"{self.what}: {self.rate()}"
        done, total = state["completed"], state["total"]
        if total and 0 < done < total:
            line += f", {self.seconds * (total / done - 1):.0f} s left"
        return line
