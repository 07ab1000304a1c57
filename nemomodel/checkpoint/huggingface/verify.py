"""Whether two checkpoints hold the same tensors, whatever their formats."""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from nemomodel.checkpoint.huggingface.names import Piece
from nemomodel.checkpoint.huggingface.source import Checkpoint, Source, open_source
from nemomodel.checkpoint.huggingface.tensor_files import NAMES


class Digest(NamedTuple):
    """A published tensor in one dtype."""

    sha256: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.sha256} {self.dtype:4} {list(self.shape)}"


class Line(NamedTuple):
    """One tensor name of either side; None where a side does not have it."""

    name: str
    a: Digest | None
    b: Digest | None

    @property
    def equal(self) -> bool:
        return self.a == self.b


def verify(a: Path, b: Path, *, vocab_size: int | None = None) -> Iterator[Line]:
    """Name, shape, dtype and bytes of all tensors of both, under published names.

    A parameter that our model holds in FP32 and published folders in BF16 (A_log, D, dt_bias)
    is equal when BF16 holds it exactly. Router biases, which some folders have in BF16, are
    compared as FP32.

    Args:
        a, b: run folder, step folder, imported checkpoint or Hugging Face folder.
        vocab_size: rows of our embedding and head that count, as in `export_checkpoint`.

    Raises:
        CheckpointError, ConfigError: as `open_source`, before the first line.
    """
    sources = [open_source(path) for path in (a, b)]
    for source in sources:
        if isinstance(source, Checkpoint):
            source.cut_padding(vocab_size)
    left, right = ({p.name: d for p, d in _digests(source)} for source in sources)
    return (_line(name, left.get(name, []), right.get(name, [])) for name in {**left, **right})


def _digests(source: Source) -> Iterator[tuple[Piece, list[Digest]]]:
    for piece, tensor in source.tensors():
        forms = [_digest(tensor)]
        if piece.is_router_bias and tensor.dtype == torch.bfloat16:
            forms.append(_digest(tensor.float()))
        elif isinstance(source, Checkpoint) and piece.may_be_wide and not piece.is_router_bias:
            narrow = tensor.to(torch.bfloat16)
            if torch.equal(narrow.float(), tensor):
                forms.append(_digest(narrow))
        yield piece, forms


def _line(name: str, left: list[Digest], right: list[Digest]) -> Line:
    common = next((digest for digest in left if digest in right), None)
    if common:
        return Line(name, common, common)
    return Line(name, left[0] if left else None, right[0] if right else None)


def _digest(tensor: Tensor) -> Digest:
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return Digest(hashlib.sha256(data).hexdigest(), NAMES[tensor.dtype], tuple(tensor.shape))
