"""How far a long reading of inputs is, for people."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from nemomodel.data.readers import Input

LINE_INTERVAL = 10.0
"""Seconds between plain lines."""


class Progress:
    """A bar on a terminal, plain lines elsewhere; both on standard error."""

    def __init__(self, what: str, inputs: list[Input]):
        self._what = what
        self._inputs = inputs
        self._documents = self._bytes = self._tokens = 0
        self._position = 0.0
        self._started = self._last = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(what, total=self._total(), rate="")

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
            self._show_bar()
            self._bar.stop()
        elif error is None:
            print(self._line(), file=sys.stderr)

    def advance(self, position: float, *, num_bytes: int, num_tokens: int = 0) -> None:
        """Count one document that ends at `position` of all inputs."""
        self._position = position
        self._documents += 1
        self._bytes += num_bytes
        self._tokens += num_tokens
        now = time.monotonic()
        if self._bar and now - self._last > 0.1:
            self._last = now
            self._show_bar()
        elif not self._bar and now - self._last > LINE_INTERVAL:
            self._last = now
            print(self._line(), file=sys.stderr, flush=True)

    def _total(self) -> float | None:
        """None while the size of an input is not known; a dataset knows it once it is opened."""
        sizes = [source.size for source in self._inputs]
        return None if None in sizes else sum(sizes)

    def _show_bar(self) -> None:
        self._bar.update(
            self._task, completed=self._position, total=self._total(), rate=self._rate()
        )

    def _rate(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-3)
        rates = [f"{self._documents:,} documents", f"{self._bytes / seconds / 1e6:.1f} MB/s"]
        if self._tokens:
            rates.append(f"{self._tokens / seconds / 1e6:.2f} M tokens/s")
        return ", ".join(rates)

    def _line(self) -> str:
        line = f"{self._what}: {self._rate()}"
        total, seconds = self._total(), time.monotonic() - self._started
        if total and 0 < self._position < total:
            left = seconds * (total / self._position - 1)
            line += f", {self._position / total:.0%}, {left:.0f} s left"
        return line
