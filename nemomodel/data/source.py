"""One token file cut into training windows, and the checks before the first one is read."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nemomodel.config.load import ConfigError
from nemomodel.config.schema import SourceConfig
from nemomodel.data.indexed import IndexedFile, file_of
from nemomodel.data.metadata import Metadata, sha256_of
from nemomodel.data.order import derive_key, permute
from nemomodel.data.tokenizer import load_tokenizer, vocab_size_of


class DataError(ValueError):
    """A token file holds what the model cannot take, found while training reads it."""


@dataclass(frozen=True)
class TokenizerFile:
    path: Path
    sha256: str
    vocab_size: int

    @staticmethod
    def read(path: Path) -> "TokenizerFile":
        return TokenizerFile(
            path, vocab_size=vocab_size_of(load_tokenizer(path)), sha256=sha256_of(path)
        )


class Source:
    """The token stream of one file, in windows of seq_length + 1 at a stride of seq_length.

    Windows cross document borders; the last tokens that fill no window are never read.
    """

    def __init__(self, file: IndexedFile, *, seq_length: int, vocab_size: int, weight: float):
        self.file = file
        self.weight = weight
        self.num_windows = (len(file) - 1) // seq_length
        self._seq_length = seq_length
        self._vocab_size = vocab_size

    def windows(self, index: np.ndarray, *, key: int) -> np.ndarray:
        """The window of each sample: every epoch visits all, in an order of its own."""
        epoch, place = np.divmod(index, self.num_windows)
        window = np.empty_like(index)
        for e in np.unique(epoch):
            here = epoch == e
            window[here] = permute(
                place[here], size=self.num_windows, key=derive_key("epoch", key, int(e))
            )
        return window

    def read(self, window: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [seq_length + 1] of one window and the number of each one's document.

        Raises:
            DataError: if a token is outside of the model's vocabulary.
        """
        start = window * self._seq_length
        stop = start + self._seq_length + 1
        tokens = self.file.tokens[start:stop]
        if tokens.max() >= self._vocab_size or tokens.min() < 0:
            outside = np.flatnonzero((tokens >= self._vocab_size) | (tokens < 0))[0]
            raise DataError(
                f"{file_of(self.file.prefix, '.bin')}: token id {tokens[outside]} at position "
                f"{start + outside} is outside of model.vocab_size={self._vocab_size}; "
                "the data were made with another tokenizer, or are damaged"
            )
        return tokens, self.file.documents(start, stop)


def open_sources(
    key: str,
    configs: tuple[SourceConfig, ...],
    *,
    seq_length: int,
    vocab_size: int,
    tokenizer: TokenizerFile | None,
) -> list[Source]:
    """Open and check every file of one list.

    Args:
        key: the config key of the list, for messages.

    Raises:
        ConfigError: with one line per file that cannot be used.
    """
    sources, found = [], []
    for i, config in enumerate(configs):
        try:
            sources.append(_open(config, seq_length, vocab_size, tokenizer))
        except ValueError as error:
            found.append(f"{key}.{i}.path={config.path!r}: {error}")
    if found:
        raise ConfigError("\n".join(found))
    return sources


def _open(
    config: SourceConfig, seq_length: int, vocab_size: int, tokenizer: TokenizerFile | None
) -> Source:
    prefix = Path(config.path)
    file = IndexedFile(prefix)
    path = file_of(prefix, ".json")
    # megatron-core's own preprocessing writes no metadata; then every window read is the check.
    if path.exists():
        _check_metadata(path, file, vocab_size, tokenizer)
    if len(file) <= seq_length:
        raise ValueError(
            f"{file_of(prefix, '.bin')} has {len(file):,} tokens, less than one window of "
            f"train.seq_length={seq_length} plus 1; use at most {max(len(file) - 1, 0)}, or more "
            "data"
        )
    return Source(file, seq_length=seq_length, vocab_size=vocab_size, weight=config.weight)


def _check_metadata(
    path: Path, file: IndexedFile, vocab_size: int, tokenizer: TokenizerFile | None
) -> None:
    metadata = Metadata.read(path)
    if metadata.tokens != len(file):
        raise ValueError(
            f"{path} describes {metadata.tokens:,} tokens, the files have {len(file):,}; they are "
            "of different runs, prepare the data again"
        )
    if metadata.vocab_size > vocab_size:
        raise ValueError(
            f"{path}: its tokenizer has {metadata.vocab_size} tokens, more than "
            f"model.vocab_size={vocab_size}; use at least {metadata.vocab_size}"
        )
    if tokenizer and tokenizer.sha256 != metadata.tokenizer_sha256:
        raise ValueError(
            f"{path}: made with a tokenizer of {metadata.vocab_size} tokens and SHA-256 "
            f"{metadata.tokenizer_sha256[:12]}, data.tokenizer={str(tokenizer.path)!r} has "
            f"{tokenizer.vocab_size} tokens and {tokenizer.sha256[:12]}; use the one next to the "
            "data"
        )
