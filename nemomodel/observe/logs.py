"""Log lines for people: rank 0 says what happens, other ranks only what is wrong."""

import logging
import sys


class _PlainFormatter(logging.Formatter):
    """Time and message; the level where it is not INFO, the rank where it is not 0."""

    def __init__(self, rank: int) -> None:
        super().__init__("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
        self.rank = rank

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (name of logging)
        rank = f"rank {self.rank}: " if self.rank else ""
        level = "" if record.levelno == logging.INFO else f"{record.levelname}: "
        return f"{record.asctime} {rank}{level}{record.message}"


def setup_logging(rank: int) -> None:
    """Send log lines to standard output: this package's INFO on rank 0, WARNING elsewhere.

    Other packages are heard from WARNING on. A second call replaces the first.
    """
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_PlainFormatter(rank))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("nemomodel").setLevel(logging.INFO if rank == 0 else logging.WARNING)
