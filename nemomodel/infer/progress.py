"""How far a long evaluation is, for people."""

from typing import Any

from rich.progress import MofNCompleteColumn, TextColumn

from nemomodel.progress import Report


class CountProgress(Report):
    """Of a known number of `unit`, e.g. tokens."""

    def __init__(self, what: str, total: int, *, unit: str):
        self._total, self._unit, self._done = total, unit, 0
        super().__init__(what, MofNCompleteColumn(), TextColumn(f"{unit},"))

    def advance(self, count: int) -> None:
        self._done += count
        self.moved()

    def state(self) -> dict[str, Any]:
        return {"completed": self._done, "total": self._total}

    def rate(self) -> str:
        return f"{self._done:,} of {self._total:,} {self._unit}, {self.seconds:.0f} s"
