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

MARKER = "unfinished-conversion"
"""A file in every hidden folder of ours. What has none is never emptied."""


@contextmanager
def new_folder(target: Path, *, num_bytes: int) -> Iterator[Path]:
    """A hidden folder to write into; without an error it becomes `target` at the end.

    What a killed process left is removed by the next one. A second process that writes the same
    target at the same time is refused.

    Raises:
        CheckpointError: `target` exists, is being written, the disk has no room for `num_bytes`,
            or something that is not ours has the name of the hidden folder.
    """
    refuse_existing(target)
    partial = target.with_name(f".{target.name}.partial")
    lock = _open(partial)
    try:
        _lock(lock, target)
        _empty(partial)
        try:
            _check_room(partial, num_bytes)
            content = partial / target.name
            content.mkdir()
            yield content
            sync_folder(content)
            refuse_existing(target)
            content.rename(target)
            sync_folder(target.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(lock)


def refuse_existing(target: Path) -> None:
    if target.exists() or target.is_symlink():
        raise CheckpointError(f"{target}: exists; name a folder that does not")


def _open(partial: Path) -> int:
    """A descriptor of the hidden folder, which is made if nothing has its name."""
    if partial.is_symlink() or (partial.exists() and not partial.is_dir()):
        raise CheckpointError(f"{partial}: is no folder of a conversion; move it away")
    partial.mkdir(parents=True, exist_ok=True)
    return os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def _lock(descriptor: int, target: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CheckpointError(f"{target}: another process is writing it") from None


def _empty(partial: Path) -> None:
    """Remove what a killed conversion left; the marker stays, or is made."""
    found = list(partial.iterdir())
    if found and not (partial / MARKER).is_file():
        raise CheckpointError(
            f"{partial}: holds {found[0].name}, which no conversion left there; move it away"
        )
    (partial / MARKER).touch()
    for path in found:
        if path.name == MARKER:
            continue
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
