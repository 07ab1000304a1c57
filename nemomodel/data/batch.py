"""Batches as a pure function of the step: nothing to save, the same order for any ranks."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nemomodel.config.load import ConfigError
from nemomodel.config.schema import DataConfig, SourceConfig, TrainConfig
from nemomodel.data.corpus import ensure_corpus
from nemomodel.data.order import Blend, derive_key
from nemomodel.data.source import Source, TokenizerFile, open_sources

VALIDATION_SEED = 0
"""Not run.seed: runs that differ in their seed are compared on the same sequences."""


@dataclass(frozen=True)
class MicroBatch:
    """Sequences of one forward pass, on the CPU."""

    ids_BS: Tensor
    """int64 token ids."""
    labels_BS: Tensor
    """int64, the token after each."""
    loss_mask_BS: Tensor
    """bool, False where the label belongs to another document than the input."""
    document_BS: Tensor
    """int32 number of the document of each position, from 0 in every sequence."""

    def num_bytes(self, token_bytes: Tensor | None) -> int:
        """UTF-8 bytes that the targets stand for; 0 where it is not known.

        Args:
            token_bytes: [V] bytes of each token, on the CPU.
        """
        if token_bytes is None:
            return 0
        return int(token_bytes[self.labels_BS[self.loss_mask_BS]].sum())


class TokenStream:
    """A blend of sources as one endless list of samples."""

    def __init__(self, key: str, sources: list[Source], *, seq_length: int, seed: int):
        """
        Args:
            key: the config key of the list of sources, for messages.
        """
        self.sources = sources
        self._seq_length = seq_length
        self._seed = seed
        try:
            self._blend = Blend([source.weight for source in sources], seed=seed)
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from None

    def windows(self, samples: np.ndarray) -> list[tuple[int, int]]:
        """(source, window) of each global sample."""
        source, index = self._blend.locate(samples)
        window = np.empty_like(index)
        for s in np.unique(source):
            mine = source == s
            key = derive_key("source", self._seed, int(s))
            window[mine] = self.sources[s].windows(index[mine], key=key)
        return list(zip(source.tolist(), window.tolist(), strict=True))

    def micro_batches(
        self, samples: np.ndarray, *, size: int, num_batches: int
    ) -> list[MicroBatch]:
        """`samples` in pieces of `size`; what is left of `num_batches` pieces is fully masked."""
        shape = (num_batches * size, self._seq_length + 1)
        tokens = np.zeros(shape, dtype=np.int64)
        document = np.zeros(shape, dtype=np.int32)
        keep = np.zeros((shape[0], self._seq_length), dtype=np.bool_)
        for b, (source, window) in enumerate(self.windows(samples)):
            tokens[b], document[b] = self.sources[source].read(window)
            np.equal(document[b, :-1], document[b, 1:], out=keep[b])
        parts = (tokens[:, :-1], tokens[:, 1:], keep, document[:, :-1])
        pieces = [torch.from_numpy(np.ascontiguousarray(part)).split(size) for part in parts]
        return [MicroBatch(*piece) for piece in zip(*pieces, strict=True)]


class TokenData:
    """What a run reads: training batches and a fixed validation set."""

    def __init__(
        self,
        train: TokenStream,
        validation: TokenStream | None,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        validation_sequences: int,
        tokenizer: Path | None,
    ):
        self.tokenizer = tokenizer
        """tokenizer.json of the data, if known: makes bits per byte possible."""
        self._train = train
        self._validation = validation
        self._micro_batch_size = micro_batch_size
        self._global_batch_size = global_batch_size
        self._validation_sequences = validation_sequences

    @property
    def has_validation(self) -> bool:
        return self._validation is not None

    def batch(self, step: int, *, dp_rank: int, dp_size: int) -> list[MicroBatch]:
        """This rank's share of step `step` (from 0).

        The global batch is samples step * global_batch_size and on, whatever dp_size is; a rank
        takes a contiguous part of it.
        """
        size = self._global_batch_size
        assert size % (dp_size * self._micro_batch_size) == 0, (size, dp_size)
        per_rank = size // dp_size
        first = step * size + dp_rank * per_rank
        return self._train.micro_batches(
            np.arange(first, first + per_rank),
            size=self._micro_batch_size,
            num_batches=per_rank // self._micro_batch_size,
        )

    def validation(self, *, dp_rank: int, dp_size: int, multiple: int = 1) -> list[MicroBatch]:
        """This rank's part of the validation set.

        Together the ranks have the same sequences for any dp_size. Every rank has the same number
        of micro-batches, so that collectives meet; missing sequences are fully masked.

        Args:
            multiple: of which the number of micro-batches is one; interleaved stages need it.
        """
        assert self._validation is not None, "has_validation is False"
        size, total = self._micro_batch_size, self._validation_sequences
        num_batches = -(-total // (size * dp_size * multiple)) * multiple
        first = dp_rank * num_batches * size
        samples = np.arange(min(first, total), min(first + num_batches * size, total))
        return self._validation.micro_batches(samples, size=size, num_batches=num_batches)

    def describe(self) -> list[str]:
        """One line per token file, for the log of the run."""
        lines = []
        for key, stream in (("train", self._train), ("validation", self._validation)):
            sources = stream.sources if stream else []
            total = sum(source.weight for source in sources)
            lines += [
                f"data.{key} {source.file.prefix}: {len(source.file):,} tokens, "
                f"{source.file.num_documents:,} documents, {source.num_windows:,} sequences, "
                f"share {source.weight / total:.1%}"
                for source in sources
            ]
        return lines


def open_data(data: DataConfig, *, train: TrainConfig, vocab_size: int, seed: int) -> TokenData:
    """Open the token files of a run, or build the embedded corpus when none are given.

    Any number of processes may call this at once.

    Args:
        vocab_size: model.vocab_size; no token may reach it.
        seed: run.seed; the order of the training samples.

    Raises:
        ConfigError: naming every file that cannot be used, before any training starts.
    """
    train_sources, validation_sources, tokenizer_path = data.train, data.validation, data.tokenizer
    if not train_sources:
        corpus = ensure_corpus(Path(data.cache_dir), vocab_size=vocab_size)
        train_sources = (SourceConfig(path=str(corpus.train)),)
        validation_sources = (SourceConfig(path=str(corpus.validation)),)
        tokenizer_path = str(corpus.tokenizer)
    tokenizer = _read_tokenizer(tokenizer_path, vocab_size) if tokenizer_path else None

    streams, found = [], []
    for key, configs, stream_seed in (
        ("data.train", train_sources, seed),
        ("data.validation", validation_sources, VALIDATION_SEED),
    ):
        try:
            sources = open_sources(
                key,
                configs,
                seq_length=train.seq_length,
                vocab_size=vocab_size,
                tokenizer=tokenizer,
            )
            streams.append(
                TokenStream(key, sources, seq_length=train.seq_length, seed=stream_seed)
                if sources
                else None
            )
        except ConfigError as error:
            found.append(str(error))
    if found:
        raise ConfigError("\n".join(found))
    train_stream, validation_stream = streams
    if validation_stream:
        _check_validation(validation_stream, train.validation_sequences)
    return TokenData(
        train_stream,
        validation_stream,
        micro_batch_size=train.micro_batch_size,
        global_batch_size=train.global_batch_size,
        validation_sequences=train.validation_sequences,
        tokenizer=tokenizer.path if tokenizer else None,
    )


def _read_tokenizer(path: str, vocab_size: int) -> TokenizerFile:
    try:
        tokenizer = TokenizerFile.read(Path(path))
    except ValueError as error:
        raise ConfigError(f"data.tokenizer={path!r}: {error}") from None
    if tokenizer.vocab_size > vocab_size:
        raise ConfigError(
            f"data.tokenizer={path!r}: has {tokenizer.vocab_size} tokens, more than "
            f"model.vocab_size={vocab_size}; use at least {tokenizer.vocab_size}"
        )
    return tokenizer


def _check_validation(stream: TokenStream, wanted: int) -> None:
    """A window must not count twice, so the sequences have to fit in one pass over each file."""
    picked = [source for source, _ in stream.windows(np.arange(wanted))]
    for s, source in enumerate(stream.sources):
        if (count := picked.count(s)) > source.num_windows:
            raise ConfigError(
                f"train.validation_sequences={wanted}: takes {count} sequences of "
                f"{source.file.prefix}, which has {source.num_windows}; "
                f"use at most {wanted * source.num_windows // count}"
            )
