"""Loss of a model on a stream of tokens: every token is scored once, in windows."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import batched, groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from nemomodel.data.batch import MicroBatch
from nemomodel.data.indexed import IndexedFile, file_of
from nemomodel.data.metadata import Metadata
from nemomodel.data.tokenizer import encode_documents
from nemomodel.model.nemotron import Nemotron
from nemomodel.ops.documents import Documents


class Stream(NamedTuple):
    """The tokens of documents, one after the other."""

    name: str
    tokens: np.ndarray
    documents: Callable[[int, int], np.ndarray]
    """(start, stop) to a number per position that is the same exactly within a document."""
    tokenizer_sha256: str | None = None
    """Of the tokenizer the tokens were made with, if that is known."""


class Window(NamedTuple):
    """Inputs at [start, stop) of a stream; the labels of those from `first` on are scored."""

    start: int
    first: int
    stop: int


@dataclass(frozen=True)
class Losses:
    """Of the main head, then of every MTP depth."""

    nats_per_token: tuple[float | None, ...]
    """Mean cross-entropy; None for a head that had no targets."""
    tokens: tuple[int, ...]
    """Targets of each head."""
    bytes: int | None
    """UTF-8 bytes that the targets of the main head stand for; None without a tokenizer."""

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats_per_token[0])

    @property
    def bits_per_byte(self) -> float | None:
        if not self.bytes:
            return None
        return self.nats_per_token[0] * self.tokens[0] / math.log(2) / self.bytes

    def record(self) -> dict[str, Any]:
        """As plain data for JSON."""
        depths = zip(self.nats_per_token[1:], self.tokens[1:], strict=True)
        return {
            "loss": self.nats_per_token[0],
            "perplexity": self.perplexity,
            "bits_per_byte": self.bits_per_byte,
            "tokens": self.tokens[0],
            "bytes": self.bytes,
            "mtp": [{"depth": k, "loss": x, "tokens": n} for k, (x, n) in enumerate(depths, 1)],
        }


def open_tokens(prefix: Path) -> Stream:
    """A token file as tools/prepare_data.py or megatron-core write it.

    Raises:
        ValueError: naming the file that is missing, damaged or of another run.
    """
    file, description = IndexedFile(prefix), file_of(prefix, ".json")
    sha256 = None
    if description.exists():
        metadata = Metadata.read(description)
        if metadata.tokens != len(file):
            raise ValueError(
                f"{description} describes {metadata.tokens:,} tokens, the files have "
                f"{len(file):,}; they are of different runs, prepare the data again"
            )
        sha256 = metadata.tokenizer_sha256
    return Stream(str(prefix), file.tokens, file.documents, sha256)


def encode_texts(name: str, texts: Iterable[str], tokenizer: Tokenizer, *, eod_id: int) -> Stream:
    """The stream that a token file of the same documents would have; empty ones are left out."""
    encoded = list(encode_documents(tokenizer, (text for text in texts if text), eod_id=eod_id))
    number = np.repeat(np.arange(len(encoded), dtype=np.int32), [len(ids) for ids in encoded])
    tokens = np.concatenate(encoded) if encoded else np.empty(0, np.int64)
    return Stream(name, tokens, lambda start, stop: number[start:stop])


def windows(num_targets: int, *, seq_length: int, stride: int) -> Iterator[Window]:
    """Windows of at most `seq_length` inputs that together score targets 1 .. num_targets once.

    Each window starts `stride` after the one before and scores what that one did not: behind
    the first window a target has seq_length - stride inputs before its own or more.
    """
    overlap = seq_length - stride
    for start in range(0, max(num_targets - overlap, 1), stride):
        first = start + overlap if start else 0
        yield Window(start, first, min(start + seq_length, num_targets))


@torch.no_grad()
def evaluate(
    model: Nemotron,
    stream: Stream,
    *,
    seq_length: int,
    stride: int,
    batch_size: int,
    max_tokens: int | None = None,
    token_bytes: Tensor | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> Losses:
    """Mean cross-entropy of every head over a stream whose documents do not see each other.

    Targets are all tokens but the first of each document, end tokens included. Depth k has one
    where the token k further than that of the main head is in the same window and document.
    With stride = seq_length these are the windows, masks and sums of validation in training.

    Args:
        stride: at most seq_length, see `windows`.
        max_tokens: score the first ones only, those without a target included.
        token_bytes: [V] UTF-8 bytes of each token, on the CPU.
        on_tokens: called after each batch with the tokens it went through for the first time.

    Raises:
        ValueError: an argument out of its range, a stream without targets, a token outside of
            the vocabulary, or a loss that is not finite.
    """
    num_targets = _check(model, stream, seq_length, stride, batch_size, max_tokens)
    device = model.lm_head.weight.device
    sums = 0
    for batch, num_positions in _micro_batches(stream, num_targets, seq_length, stride, batch_size):
        documents = Documents.from_ids(batch.document_BS).to(device)
        ids_BS, labels_BS, mask_BS = (
            t.to(device) for t in (batch.ids_BS, batch.labels_BS, batch.loss_mask_BS)
        )
        cross_entropy, targets = model.cross_entropy(ids_BS, labels_BS, mask_BS, documents)
        num_bytes = targets.new_tensor([batch.num_bytes(token_bytes)])
        sums = sums + torch.cat([cross_entropy, targets, num_bytes])
        if on_tokens:
            on_tokens(num_positions)
    *totals, num_bytes = sums.tolist()
    heads = len(totals) // 2
    return _losses(stream, totals[:heads], totals[heads:], token_bytes is not None, int(num_bytes))


def _losses(
    stream: Stream, sums: list[float], counts: list[float], has_bytes: bool, num_bytes: int
) -> Losses:
    if not counts[0]:
        raise ValueError(f"{stream.name}: no document has two tokens, so there is nothing to score")
    means = tuple(total / n if n else None for total, n in zip(sums, counts, strict=True))
    if not all(mean is None or math.isfinite(mean) for mean in means):
        raise ValueError(f"{stream.name}: losses {means} are not finite; try --dtype float32")
    return Losses(means, tuple(map(int, counts)), num_bytes if has_bytes else None)


def _check(
    model: Nemotron,
    stream: Stream,
    seq_length: int,
    stride: int,
    batch_size: int,
    max_tokens: int | None,
) -> int:
    """The number of targets to score, from the first on."""
    numbers = {"seq_length": seq_length, "stride": stride, "batch_size": batch_size}
    for name, value in {**numbers, "max_tokens": max_tokens}.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}: must be at least 1")
    if stride > seq_length:
        raise ValueError(f"stride={stride}: is more than seq_length={seq_length}; it skips tokens")
    num_targets = len(stream.tokens) - 1
    if num_targets < 1:
        raise ValueError(f"{stream.name}: has {num_targets + 1} tokens; at least 2 are needed")
    num_targets = min(num_targets, max_tokens or num_targets)
    used, V = stream.tokens[: num_targets + 1], model.config.vocab_size
    if used.max() >= V or used.min() < 0:
        at = int(np.flatnonzero((used >= V) | (used < 0))[0])
        raise ValueError(
            f"{stream.name}: token id {used[at]} at position {at} is outside of the model's "
            f"vocabulary of {V}; the tokens were made with another tokenizer"
        )
    return num_targets


def _micro_batches(
    stream: Stream, num_targets: int, seq_length: int, stride: int, batch_size: int
) -> Iterator[tuple[MicroBatch, int]]:
    """Batches of windows of one length, and the targets each has before documents are looked at.

    Only the last window of all may be shorter than the others.
    """
    every = windows(num_targets, seq_length=seq_length, stride=stride)
    for _, same in groupby(every, key=lambda w: w.stop - w.start):
        for batch in batched(same, batch_size):
            tokens = np.stack([stream.tokens[w.start : w.stop + 1] for w in batch])
            document = np.stack([stream.documents(w.start, w.stop + 1) for w in batch])
            keep = document[:, :-1] == document[:, 1:]
            for row, window in zip(keep, batch, strict=True):
                row[: window.first - window.start] = False
            parts = (tokens[:, :-1].astype(np.int64), tokens[:, 1:].astype(np.int64), keep)
            document = np.ascontiguousarray(document[:, :-1], dtype=np.int32)
            tensors = map(torch.from_numpy, (*parts, document))
            yield MicroBatch(*tensors), sum(w.stop - w.first for w in batch)
