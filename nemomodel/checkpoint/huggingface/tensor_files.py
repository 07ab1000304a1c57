"""safetensors files: headers checked before any data is read, tensors read and written one by one.

Both are done with plain file calls instead of the library, which maps whole files into memory:
so the memory of a conversion is that of one tensor, and what is read lies where it is needed.

    8 bytes: length n of the header, little endian | n bytes of JSON | data
    {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, ...}

Source of the format: github.com/huggingface/safetensors README.md, section Format.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from nemomodel.checkpoint.files import CheckpointError

DTYPES = {"BF16": torch.bfloat16, "F32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PACKED = ("U8", "I8", "I32", "F4", "F6_", "F8_")
MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, out: Tensor | None = None) -> Tensor:
        """The tensor; in `out`, contiguous and of as many elements of the same dtype, if given.

        Raises:
            CheckpointError: the file has become shorter.
        """
        tensor = torch.empty(self.shape, dtype=self.dtype) if out is None else out
        assert tensor.dtype == self.dtype
        assert tensor.nbytes == self.num_bytes
        view = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        with self.file.open("rb", buffering=0) as file:
            file.seek(self.offset)
            while view:
                count = file.readinto(view)
                if not count:
                    raise CheckpointError(f"{self.file}: ends within a tensor")
                view = view[count:]
        return tensor

    def rows(self) -> Iterator["Stored"]:
        """The tensors along the first dimension."""
        each = self.num_bytes // max(self.shape[0], 1)
        for row in range(self.shape[0]):
            yield Stored(self.file, self.dtype, self.shape[1:], self.offset + row * each)


def read_header(path: Path) -> dict[str, Stored]:
    """All tensors of a file.

    Raises:
        CheckpointError: the file is cut off, not of this format, or holds another dtype than
            BF16 and FP32.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise CheckpointError(f"{path}: is cut off, or no safetensors file")
            header = json.loads(file.read(length), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not readable: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not readable: no object of names")
    header.pop("__metadata__", None)
    tensors = {name: _stored(path, name, entry, 8 + length) for name, entry in header.items()}
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda t: (t.offset, t.num_bytes)):
        if tensor.offset != end:
            raise CheckpointError(f"{path}: tensors overlap or leave holes")
        end += tensor.num_bytes
    if end != size:
        raise CheckpointError(f"{path}: has {size} bytes, its header says {end}")
    return tensors


class Writer:
    """Writes a file of tensors that are known by shape and dtype before, in any order."""

    def __init__(self, path: Path, tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]):
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self._places: dict[str, Stored] = {}
        end = 0
        # Wide elements first: then every tensor starts at a multiple of its element size.
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda t: -t[1][0].itemsize):
            place = self._places[name] = Stored(path, dtype, shape, end)
            header[name] = {
                "dtype": NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [end, end := end + place.num_bytes],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("xb", buffering=0)
        self._start = self._write(len(text).to_bytes(8, "little") + text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            assert not self._places, f"not written: {', '.join(self._places)}"
            os.fsync(self._file.fileno())
        self._file.close()

    def write(self, name: str, tensor: Tensor) -> None:
        place = self._places.pop(name)
        assert (place.dtype, place.shape) == (tensor.dtype, tuple(tensor.shape)), name
        self._file.seek(self._start + place.offset)
        self._write(memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy()))

    def _write(self, data: bytes | memoryview) -> int:
        """All of it: one call writes 2 GiB at most."""
        view = memoryview(data)
        while view:
            view = view[self._file.write(view) :]
        return len(data)


def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` for JSON whose keys must differ; ValueError where they do not."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} stands twice")
        found[name] = value
    return found


def _stored(path: Path, name: str, entry: Any, start: int) -> Stored:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers_fine = all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        numbers_fine = False
    if not numbers_fine or not isinstance(dtype, str):
        raise CheckpointError(f"{path}: the header entry of {name} is not readable")
    if dtype.startswith(PACKED):
        raise CheckpointError(
            f"{path}: {name} is {dtype}: a packed (NVFP4, FP8 or INT) checkpoint cannot be "
            "converted; use the BF16 one of the same model"
        )
    if dtype not in DTYPES:
        raise CheckpointError(f"{path}: {name} is {dtype}; tensors are BF16 or F32")
    stored = Stored(path, DTYPES[dtype], tuple(shape), start + begin)
    if end - begin != stored.num_bytes:
        raise CheckpointError(
            f"{path}: {name} has {end - begin} bytes, {dtype} {shape} needs {stored.num_bytes}"
        )
    return stored
