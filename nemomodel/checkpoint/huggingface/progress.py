"""How far a conversion is, for people."""

from typing import Any

from rich.progress import DownloadColumn, TransferSpeedColumn

from nemomodel.progress import Report


class ByteProgress(Report):
    """Of a known number of bytes."""

    def __init__(self, what: str, num_bytes: int):
        self._total, self._done = num_bytes, 0
        super().__init__(what, DownloadColumn(), TransferSpeedColumn())

    def advance(self, num_bytes: int) -> None:
        self._done += num_bytes
        self.moved()

    def state(self) -> dict[str, Any]:
        return {"completed": self._done, "total": self._total}

    def rate(self) -> str:
        parts = f"{self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB"
        return f"{parts}, {self._done / self.seconds / 1e6:.0f} MB/s, {self.seconds:.0f} s"
