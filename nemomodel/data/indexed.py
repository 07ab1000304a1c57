"""Token files in megatron-core's indexed format, version 1, byte for byte.

PREFIX.bin holds all tokens back to back. PREFIX.idx holds, little endian:

    "MMIDIDX\\0\\0"  version u64 = 1  dtype code u8  sequences n u64  documents + 1 u64
    lengths  int32[n]               tokens per sequence
    pointers int64[n]               byte offset of every sequence in PREFIX.bin
    borders  int64[documents + 1]   first sequence of every document, and n at the end

The format is read here and not through megatron.core.datasets because that import takes seconds
and loads the whole engine.
"""

import struct
from array import array
from bisect import bisect_right
from pathlib import Path

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPE_OF_CODE = {
    code: np.dtype(name)
    for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()
}
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}


def token_dtype(vocab_size: int) -> np.dtype:
    """What megatron-core takes for a vocabulary of this size (DType.optimal_dtype)."""
    return np.dtype("<u2" if vocab_size < 65500 else "<i4")


def file_of(prefix: Path, suffix: str) -> Path:
    """PREFIX + suffix; `Path.with_suffix` would cut a prefix that has a dot in its name."""
    return prefix.with_name(prefix.name + suffix)


class IndexedWriter:
    """Streams documents to PREFIX.bin and writes PREFIX.idx at the end.

    Keeps 4 bytes per document in memory.
    """

    def __init__(self, prefix: Path, *, dtype: np.dtype):
        self.prefix = prefix
        self.dtype = dtype
        self.num_tokens = 0
        self._lengths = array("i")
        self._bin = file_of(prefix, ".bin").open("wb", buffering=1 << 20)

    @property
    def num_documents(self) -> int:
        return len(self._lengths)

    def add(self, tokens: np.ndarray) -> None:
        """Append one document, written as one sequence."""
        self._bin.write(tokens.astype(self.dtype, copy=False).tobytes())
        self._lengths.append(len(tokens))
        self.num_tokens += len(tokens)

    def finish(self) -> None:
        """Close PREFIX.bin and write PREFIX.idx."""
        self._bin.close()
        lengths = np.asarray(self._lengths, dtype="<i4")
        pointers = np.zeros(len(lengths), dtype="<i8")
        np.cumsum(lengths[:-1], dtype="<i8", out=pointers[1:])
        pointers *= self.dtype.itemsize
        borders = np.arange(len(lengths) + 1, dtype="<i8")
        with file_of(self.prefix, ".idx").open("wb") as idx:
            code = CODE_OF_DTYPE[self.dtype]
            idx.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(borders)))
            for values in (lengths, pointers, borders):
                idx.write(values.tobytes())


class IndexedFile:
    """One token file, memory-mapped: a stream of tokens and the borders of its documents."""

    def __init__(self, prefix: Path):
        """Map PREFIX.idx and PREFIX.bin.

        Raises:
            ValueError: naming the file that is missing, cut short or of another format.
        """
        self.prefix = prefix
        self._read_index(file_of(prefix, ".idx"))
        self._map_tokens(file_of(prefix, ".bin"))

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self._borders) - 1

    def documents(self, start: int, stop: int) -> np.ndarray:
        """Number of the document of every position in [start, stop), counted from 0 at `start`.

        Found by bisection in the mapped index: its int64 arrays are not aligned, and
        `np.searchsorted` would copy the whole of them on every call.
        """
        itemsize = self.tokens.dtype.itemsize
        first, last = (
            bisect_right(self._borders, bisect_right(self._pointers, position * itemsize) - 1) - 1
            for position in (start, stop - 1)
        )
        # Documents without tokens share their start with the next one and do not count.
        starts = np.unique(self._pointers[self._borders[first + 1 : last + 1]]) // itemsize
        ids = np.zeros(stop - start, dtype=np.int32)
        ids[starts - start] = 1
        return np.cumsum(ids, dtype=np.int32)

    def _read_index(self, path: Path) -> None:
        data = _map(path)
        if len(data) < HEADER.size or bytes(data[: len(MAGIC)]) != MAGIC:
            raise ValueError(
                f"{path}: is not an index of tokens (it does not start with {MAGIC[:7].decode()}); "
                "write it with tools/prepare_data.py"
            )
        _, version, code, num_sequences, num_borders = HEADER.unpack(bytes(data[: HEADER.size]))
        if version != 1 or code not in DTYPE_OF_CODE:
            raise ValueError(
                f"{path}: version {version}, dtype code {code}; readable are version 1 and the "
                f"codes {', '.join(map(str, DTYPE_OF_CODE))}"
            )
        # Multimodal files of megatron-core append one byte per sequence, which is not read.
        size = HEADER.size + 12 * num_sequences + 8 * num_borders
        if len(data) not in (size, size + num_sequences):
            raise ValueError(
                f"{path}: has {len(data):,} bytes, its header asks for {size:,}; "
                "it was cut short or damaged, prepare the data again"
            )
        self._dtype = DTYPE_OF_CODE[code]
        self._lengths = np.frombuffer(data, "<i4", num_sequences, HEADER.size)
        self._pointers = np.frombuffer(
            data, "<i8", num_sequences, HEADER.size + self._lengths.nbytes
        )
        offset = HEADER.size + self._lengths.nbytes + self._pointers.nbytes
        self._borders = np.frombuffer(data, "<i8", num_borders, offset)
        if not num_sequences or not num_borders:
            raise ValueError(f"{path}: holds no documents; prepare the data again")
        if self._pointers[0] or self._borders[0] or self._borders[-1] != num_sequences:
            raise ValueError(
                f"{path}: its offsets do not span its {num_sequences:,} sequences; "
                "it is damaged, prepare the data again"
            )

    def _map_tokens(self, path: Path) -> None:
        data = _map(path)
        size = int(self._pointers[-1]) + int(self._lengths[-1]) * self._dtype.itemsize
        if len(data) != size:
            raise ValueError(
                f"{path}: has {len(data):,} bytes, {file_of(self.prefix, '.idx').name} describes "
                f"{size:,}; it was cut short or belongs to another index, prepare the data again"
            )
        self.tokens = np.frombuffer(data, self._dtype)


def _map(path: Path) -> np.ndarray:
    """The bytes of a file; a plain array, because indexing an np.memmap is ten times slower."""
    try:
        if path.stat().st_size == 0:
            return np.empty(0, np.uint8)
        return np.asarray(np.memmap(path, np.uint8, mode="r"))
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no such file; write it with tools/prepare_data.py, or correct the prefix"
        ) from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror or error}") from None
