"""Write token files so that a reader sees all of them or none."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from nemomodel.data.indexed import IndexedWriter, file_of, token_dtype
from nemomodel.data.metadata import Metadata


@contextmanager
def staging_folder(final: Path) -> Iterator[Path]:
    """An empty folder FINAL.unfinished to write in, locked, and removed whatever happens.

    What a killed run left there is removed first.

    Raises:
        ValueError: if another process writes to the same place.
    """
    folder = file_of(final, ".unfinished")
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        if not _lock(lock, folder):
            raise ValueError(f"{final}: another process is writing it; wait for it")
        for path in folder.iterdir():
            path.unlink()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _lock(descriptor: int, folder: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another run may have finished, and removed the folder, between our open and our lock.
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except (BlockingIOError, FileNotFoundError):
        return False


def publish(moves: list[tuple[Path, Path]]) -> None:
    """Bring every file or folder of files to the disk, then move each to its name, in order."""
    for staged, _ in moves:
        for path in (*staged.glob("*"), staged):
            _sync(path)
    for staged, final in moves:
        staged.replace(final)
    for folder in {final.parent for _, final in moves}:
        _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass
class TokenPart:
    """One token file being written, with the counts of its metadata."""

    prefix: Path
    vocab_size: int
    eod_id: int
    tokenizer_sha256: str
    sources: tuple[str, ...]
    num_bytes: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.writer = IndexedWriter(self.prefix, dtype=token_dtype(self.vocab_size))

    def add(self, tokens: np.ndarray, *, num_bytes: int) -> None:
        self.writer.add(tokens)
        self.num_bytes += num_bytes

    def finish(self) -> Metadata:
        """Write the index and the metadata."""
        self.writer.finish()
        metadata = Metadata(
            tokens=self.writer.num_tokens,
            documents=self.writer.num_documents,
            bytes=self.num_bytes,
            vocab_size=self.vocab_size,
            eod_id=self.eod_id,
            tokenizer_sha256=self.tokenizer_sha256,
            sources=self.sources,
        )
        metadata.write(file_of(self.prefix, ".json"))
        return metadata
