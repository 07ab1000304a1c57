"""How a run ends other than by finishing: signals, faults, and the exit code of each."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from nemomodel.checkpoint.files import CheckpointError
from nemomodel.config.load import ConfigError
from nemomodel.data.source import DataError
from nemomodel.quant.selftest import SelfTestError

log = logging.getLogger(__name__)

EXIT_BAD_INPUT = 2
"""The config, a data file, the launch or the quantiser of the device is wrong; published
checkpoints are untouched."""
EXIT_NOT_FINITE = 3
"""A gradient was not finite; the last checkpoint is from before that step."""
EXIT_CHECKPOINT = 4
"""A checkpoint could not be written or none could be read; published ones are untouched."""
EXIT_IO = 5
"""A file could not be read or written, e.g. the disk is full; the message names it."""
EXIT_INTERRUPTED = 75
"""SIGTERM or SIGINT: a checkpoint was saved, the same command goes on from it."""


class NotFiniteError(ArithmeticError):
    """The gradient of a step is infinite or NaN."""


class StopRequest:
    """Whether a signal has asked this process to stop."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)
            log.warning("%s: stopping with a checkpoint after this step", self.signal.name)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Note SIGTERM and SIGINT instead of dying of them, until the block ends.

    A launcher may deliver both, and more than once: only the first one counts.
    """
    request = StopRequest()
    before = {s: signal.signal(s, request._ask) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_code_of(error: Exception) -> int | None:
    """The exit code of a fault whose message says all; None for a bug, which wants its trace."""
    if isinstance(error, ConfigError | DataError | SelfTestError):
        return EXIT_BAD_INPUT
    if isinstance(error, NotFiniteError):
        return EXIT_NOT_FINITE
    if isinstance(error, CheckpointError):
        return EXIT_CHECKPOINT
    if isinstance(error, OSError):
        return EXIT_IO
    return None
