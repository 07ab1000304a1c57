"""Documents out of text files, JSON lines, Parquet files and Hugging Face datasets."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
TABLE_SUFFIXES = (*JSON_SUFFIXES, ".parquet", ".arrow", ".csv")


@dataclass(frozen=True)
class Document:
    text: str
    position: float
    """How far its input is read now, in units of the input's size."""


class Input(Protocol):
    name: str
    size: float | None
    """Bytes of a file or rows of a dataset, for progress only; none: not known."""

    def documents(self) -> Iterator[Document]:
        """All documents in order; an empty one has an empty text."""


def open_inputs(
    names: list[str], *, text_key: str, split: str, subset: str | None, streaming: bool
) -> list[Input]:
    """Decide for each name how it is read. Nothing is read yet.

    Raises:
        ValueError: if a name is neither a file, nor a folder with documents, nor a dataset.
    """
    inputs: list[Input] = []
    for name in names:
        path = Path(name)
        if path.is_file():
            inputs.append(_open_file(path, text_key))
        elif path.is_dir() and not _is_dataset(path):
            inputs += [TextFile(file) for file in _text_files(path)]
        elif path.is_dir() or _may_be_on_the_hub(name):
            inputs.append(HubDataset(name, text_key, split, subset, streaming))
        else:
            raise ValueError(f"{name}: no such file or folder")
    return inputs


def _open_file(path: Path, text_key: str) -> Input:
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSIONS]
    if suffixes and suffixes[-1] in JSON_SUFFIXES:
        return JsonLines(path, text_key)
    if suffixes and suffixes[-1] == ".parquet":
        return ParquetFile(path, text_key)
    return TextFile(path)


def _is_dataset(folder: Path) -> bool:
    """Saved by datasets.save_to_disk, or table files that datasets.load_dataset understands."""
    return any(set(path.suffixes) & set(TABLE_SUFFIXES) for path in folder.rglob("*"))


def _text_files(folder: Path) -> list[Path]:
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    visible = [name for name in names if not name.startswith(".") and "/." not in name]
    files = [folder / name for name in visible if (folder / name).is_file()]
    if not files:
        raise ValueError(f"{folder}: the folder has no files")
    return files


def _may_be_on_the_hub(name: str) -> bool:
    """owner/name or name, as the hub spells it: no path-like start, no file suffix we know."""
    parts = name.split("/")
    return (
        len(parts) <= 2
        and all(part and not part.startswith((".", "~")) for part in parts)
        and not set(Path(name).suffixes) & {*TABLE_SUFFIXES, *COMPRESSIONS, ".txt"}
    )


class TextFile:
    """One document: the whole file, in UTF-8."""

    def __init__(self, path: Path):
        self.name = str(path)
        self.size = path.stat().st_size
        self._path = path

    def documents(self) -> Iterator[Document]:
        with open_stream(self._path) as (stream, _):
            try:
                # Not in text mode, which would turn "\r\n" into "\n".
                yield Document(stream.read().decode("utf-8"), self.size)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{self.name}: is not UTF-8 text (byte {error.start}); convert it, or leave "
                    "it out"
                ) from None


class JsonLines:
    """One JSON object per line.

    Read line by line and not with `datasets`, which turns text that looks like a date into a date
    and fails when a key that is not used changes its type.
    """

    def __init__(self, path: Path, text_key: str):
        self.name = str(path)
        self.size = path.stat().st_size
        self._path = path
        self._text_key = text_key

    def documents(self) -> Iterator[Document]:
        with open_stream(self._path) as (stream, file):
            for number, line in enumerate(stream, start=1):
                if not line.strip():
                    continue
                where = f"{self.name} line {number}"
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise ValueError(
                        f"{where}: is not JSON ({error}); use one object per line"
                    ) from None
                if not isinstance(record, dict):
                    raise ValueError(
                        f"{where}: is a JSON {type(record).__name__}; use one object per line"
                    )
                text = _text_of(record, self._text_key, where)
                # JSON can spell half of a surrogate pair, which is no character.
                if b"\\ud" in line and any("\ud800" <= c <= "\udfff" for c in text):
                    raise ValueError(f"{where}: {self._text_key!r} has half a surrogate pair")
                yield Document(text, file.tell())


class ParquetFile:
    """One row per document; only the text column is read."""

    def __init__(self, path: Path, text_key: str):
        self.name = str(path)
        self.size = path.stat().st_size
        self._path = path
        self._text_key = text_key

    def documents(self) -> Iterator[Document]:
        import pyarrow
        import pyarrow.parquet

        try:
            with pyarrow.parquet.ParquetFile(self._path) as file:
                num_rows, row = file.metadata.num_rows, 0
                _check_key(self._text_key, file.schema_arrow.names, self.name)
                for batch in file.iter_batches(batch_size=1024, columns=[self._text_key]):
                    for record in batch.to_pylist():
                        row += 1
                        text = _text_of(record, self._text_key, f"{self.name} row {row}")
                        yield Document(text, self.size * row / num_rows)
        except pyarrow.ArrowException as error:
            raise ValueError(f"{self.name}: is not readable as Parquet: {error}") from None


class HubDataset:
    """A dataset of the Hugging Face hub, a local copy of one, or a folder of save_to_disk."""

    def __init__(self, name: str, text_key: str, split: str, subset: str | None, streaming: bool):
        self.name = name
        self.size: float | None = None
        self._text_key = text_key
        self._split = split
        self._subset = subset
        self._streaming = streaming

    def documents(self) -> Iterator[Document]:
        rows = self._load()
        self.size = _num_rows(rows, self._split)
        if rows.column_names:
            _check_key(self._text_key, rows.column_names, self.name)
            rows = rows.select_columns([self._text_key])
        for number, record in enumerate(rows, start=1):
            text = _text_of(record, self._text_key, f"{self.name} row {number}")
            yield Document(text, number)

    def _load(self) -> Any:
        import datasets

        folder = Path(self.name)
        try:
            if (folder / "state.json").exists():
                return datasets.load_from_disk(self.name)
            if (folder / "dataset_dict.json").exists():
                splits = datasets.load_from_disk(self.name)
                if self._split not in splits:
                    raise ValueError(f"unknown split {self._split!r}, it has {', '.join(splits)}")
                return splits[self._split]
            return datasets.load_dataset(
                self.name, self._subset, split=self._split, streaming=self._streaming
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{self.name}: no such file, and not readable as a dataset: {reason}"
                if not folder.exists()
                else f"{self.name}: is not readable as a dataset: {reason}"
            ) from None


def _num_rows(rows: Any, split: str) -> int | None:
    if hasattr(rows, "__len__"):
        return len(rows)
    splits = rows.info.splits or {}  # a streamed dataset knows its length only by description
    return splits[split].num_examples if split in splits else None


def _check_key(key: str, available: list[str], where: str) -> None:
    if key not in available:
        raise ValueError(
            f"{where}: no key {key!r}, it has {', '.join(available)}; choose one with --text-key"
        )


def _text_of(record: dict[str, Any], key: str, where: str) -> str:
    _check_key(key, list(record), where)
    text = record[key]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise ValueError(
            f"{where}: {key!r} is a {type(text).__name__}, not text; choose another --text-key"
        )
    return text


@contextmanager
def open_stream(path: Path) -> Iterator[tuple[io.BufferedReader, io.BufferedReader]]:
    """The decompressed content, and the file itself, whose position is the progress."""
    with path.open("rb") as file:
        compression = COMPRESSIONS.get(path.suffix)
        if compression is None:
            yield file, file
            return
        import pyarrow

        try:
            yield io.BufferedReader(pyarrow.CompressedInputStream(file, compression)), file
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"{path}: is not readable as {compression}: {error}") from None
