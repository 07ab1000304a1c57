"""How far a conversion is, for people."""

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

LINE_INTERVAL = 10.0
"""Seconds between plain lines."""


class ByteProgress:
    """A bar on a terminal, plain lines elsewhere; both on standard error."""

    def __init__(self, what: str, num_bytes: int):
        self._what, self._total, self._done = what, num_bytes, 0
        self._started = self._last = time.monotonic()
        self._bar = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(what, total=num_bytes)

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

    def advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        now = time.monotonic()
        if self._bar:
            self._bar.update(self._task, completed=self._done)
        elif now - self._last > LINE_INTERVAL:
            self._last = now
            print(self._line(), file=sys.stderr, flush=True)

    def _line(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-3)
        line = f"{self._what}: {self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB"
        line += f", {self._done / seconds / 1e6:.0f} MB/s, {seconds:.0f} s"
        if 0 < self._done < self._total:
            line += f", {seconds * (self._total / self._done - 1):.0f} s left"
        return line
