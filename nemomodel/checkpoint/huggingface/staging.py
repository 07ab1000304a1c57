"""Folders that appear whole or not at all, with room on the disk checked before."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemomodel.checkpoint.files import CheckpointError, sync_folder

SPARE_BYTES = 50_000_000
"""For the files beside the weights."""


@contextmanager
def new_folder(target: Path, *, num_bytes: int) -> Iterator[Path]:
    """A hidden folder to write into; without an error it becomes `target` at the end.

    What a killed process left is removed by the next one. A second process that writes the same
    target at the same time is refused.

    Raises:
        CheckpointError: `target` exists, is being written, or the disk has no room for
            `num_bytes`.
    """
    refuse_existing(target)
    partial = target.with_name(f".{target.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        _lock(lock, target)
        _empty(partial)
        try:
            _check_room(partial, num_bytes)
            yield partial
            sync_folder(partial)
            refuse_existing(target)
            partial.rename(target)
            sync_folder(target.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def refuse_existing(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"{target}: exists; name a folder that does not")


def _lock(descriptor: int, target: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(f"{target}: another process is writing it") from None


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _check_room(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes + SPARE_BYTES:
        raise CheckpointError(
            f"{folder.parent}: the conversion needs {(num_bytes + SPARE_BYTES) / 1e9:.3f} GB, "
            f"the disk has {free / 1e9:.3f} GB free"
        )
