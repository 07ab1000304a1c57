"""How far a long evaluation is, for people."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

LINE_INTERVAL = 10.0
"""Seconds between plain lines."""


class CountProgress:
    """A bar on a terminal, plain lines elsewhere; both on standard error."""

    def __init__(self, what: str, total: int, *, unit: str):
        self._what, self._total, self._unit, self._done = what, total, unit, 0
        self._started = self._last = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            left = (TextColumn(f"{unit}, left"), TimeRemainingColumn())
            self._bar = Bar(*columns, *left, console=Console(stderr=True))
            self._task = self._bar.add_task(what, total=total)

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
            self._bar.stop()
        elif error is None:
            print(self._line(), file=sys.stderr)

    def advance(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=self._done)
        elif now - self._last > LINE_INTERVAL:
            self._last = now
            print(self._line(), file=sys.stderr, flush=True)

    def _line(self) -> str:
        seconds = time.monotonic() - self._started
        line = f"{self._what}: {self._done:,} of {self._total:,} {self._unit}, {seconds:.0f} s"
        if 0 < self._done < self._total:
            line += f", {seconds * (self._total / self._done - 1):.0f} s left"
        return line
