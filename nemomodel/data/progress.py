"""How far a long reading of inputs is, for people."""

from typing import Any

from rich.progress import TextColumn, TimeElapsedColumn

from nemomodel.data.readers import Input
from nemomodel.progress import Report


class Progress(Report):
    """Of the bytes, or rows, of all inputs together."""

    def __init__(self, what: str, inputs: list[Input]):
        self._inputs = inputs
        self._documents = self._bytes = self._tokens = 0
        self._position = 0.0
        super().__init__(what, TextColumn("{task.fields[rate]}"), TimeElapsedColumn())

    def advance(self, position: float, *, num_bytes: int, num_tokens: int = 0) -> None:
        """Count one document that ends at `position` of all inputs."""
        self._position = position
        self._documents += 1
        self._bytes += num_bytes
        self._tokens += num_tokens
        self.moved()

    def state(self) -> dict[str, Any]:
        # A dataset knows its size once it is opened.
        sizes = [source.size for source in self._inputs]
        total = None if None in sizes else sum(sizes)
        return {"completed": self._position, "total": total, "rate": self._counts()}

    def rate(self) -> str:
        total = self.state()["total"]
        known = total and 0 < self._position < total
        return self._counts() + (f", {self._position / total:.0%}" if known else "")

    def _counts(self) -> str:
        counts = [f"{self._documents:,} documents", f"{self._bytes / self.seconds / 1e6:.1f} MB/s"]
        if self._tokens:
            counts.append(f"{self._tokens / self.seconds / 1e6:.2f} M tokens/s")
        return ", ".join(counts)
