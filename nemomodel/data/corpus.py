"""The embedded corpus: the Python standard library's own source, for runs without data files."""

import fcntl
import platform
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from nemomodel.config.load import ConfigError
from nemomodel.data.metadata import sha256_of
from nemomodel.data.staging import TokenPart, publish, staging_folder
from nemomodel.data.tokenizer import (
    MIN_VOCAB_SIZE,
    encode_documents,
    end_token_id,
    train_tokenizer,
    vocab_size_of,
)

BUILDER_VERSION = 1
"""Part of the folder name: raise it with every change of what is built."""

SKIPPED = frozenset(
    {
        "site-packages",
        "dist-packages",
        # Tests, a third of all the text, and tables of numbers teach a model little.
        "test",
        "tests",
        "idle_test",
        "encodings",
        "pydoc_data",
    }
)

VALIDATION_STRIDE = 20
"""Every 20th file is held out: 5 % of the files, spread over the library."""


@dataclass(frozen=True)
class Corpus:
    train: Path
    """Prefix of the training tokens."""
    validation: Path
    tokenizer: Path


def ensure_corpus(cache_dir: Path, *, vocab_size: int) -> Corpus:
    """The corpus for this Python and vocabulary; built by the first process that asks for it.

    Raises:
        ConfigError: if `vocab_size` is too small for a byte-level tokenizer, this Python comes
            without its sources, or `cache_dir` cannot be written.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"model.vocab_size={vocab_size}: the embedded corpus needs 256 bytes, an end token "
            f"and some words; use at least {MIN_VOCAB_SIZE}, or give data.train"
        )
    name = f"python-{platform.python_version()}-vocab-{vocab_size}-v{BUILDER_VERSION}"
    folder = cache_dir / name
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _lock(cache_dir / f"{name}.lock"):
            if not folder.exists():
                _build(folder, vocab_size)
    except OSError as error:
        raise ConfigError(
            f"data.cache_dir={str(cache_dir)!r}: cannot hold the embedded corpus: {error}"
        ) from None
    return Corpus(folder / "train", folder / "validation", folder / "tokenizer.json")


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Wait until no other process holds `path`; a killed one lets go of it by itself."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(folder: Path, vocab_size: int) -> None:
    texts = _read_library(Path(sysconfig.get_path("stdlib")))
    with staging_folder(folder) as staged:
        tokenizer = train_tokenizer(texts, vocab_size=vocab_size)
        path = staged / "tokenizer.json"
        path.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        eod_id = end_token_id(tokenizer, name=None)
        train, validation = (
            TokenPart(
                staged / part,
                vocab_size_of(tokenizer),
                eod_id,
                sha256_of(path),
                (f"Python {platform.python_version()} standard library, {part} part",),
            )
            for part in ("train", "validation")
        )
        encoded = encode_documents(tokenizer, texts, eod_id=eod_id)
        for i, (text, tokens) in enumerate(zip(texts, encoded, strict=True)):
            part = validation if i % VALIDATION_STRIDE == VALIDATION_STRIDE // 2 else train
            part.add(tokens, num_bytes=len(text.encode()))
        train.finish()
        validation.finish()
        publish([(staged, folder)])


def _read_library(root: Path) -> list[str]:
    """Text of every source file in the order of their names, which is the same everywhere."""
    texts = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        name = path.relative_to(root)
        if SKIPPED.isdisjoint(name.parts):
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue  # a few files are samples of other encodings
            if text:
                texts.append(text)
    if len(texts) < 2 * VALIDATION_STRIDE:
        raise ConfigError(
            f"data.train is empty, and {root} has no Python sources for the embedded corpus; "
            "give data.train"
        )
    return texts
