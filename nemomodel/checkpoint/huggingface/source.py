"""The published tensors of a checkpoint, whichever of the two formats it has."""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from nemomodel.checkpoint.files import CheckpointError, SafeReader, read_state, read_tensors
from nemomodel.checkpoint.huggingface.folder import (
    CONFIG,
    Folder,
    is_hf_folder,
    listed,
    open_folder,
    read_json,
)
from nemomodel.checkpoint.huggingface.names import Entry, Piece, plan, without_padding
from nemomodel.checkpoint.huggingface.side_files import (
    end_token_ids,
    find_carried,
    find_tokenizer,
    num_tokens,
)
from nemomodel.checkpoint.weights import find_checkpoint
from nemomodel.config.load import parse_model
from nemomodel.config.schema import weight_format
from nemomodel.model.nemotron import DTYPES


class Source(Protocol):
    entries: list[Entry]

    def tensors(self) -> Iterator[tuple[Piece, Tensor]]:
        """All published tensors in the order of `entries`, read one entry at a time."""


class Published:
    """A Hugging Face folder."""

    def __init__(self, folder: Folder):
        self.folder, self.entries = folder, folder.entries

    def tensors(self) -> Iterator[tuple[Piece, Tensor]]:
        for entry in self.entries:
            for piece in entry.pieces:
                yield piece, self.folder.tensors[piece.name].read()


class Checkpoint:
    """A checkpoint of ours: the newest intact one of a run folder, or one step folder."""

    def __init__(self, path: Path):
        self.path = find_checkpoint(path)
        self._reader = SafeReader(self.path)
        config = read_state(self.path)["config"]
        self.model = parse_model(config["model"], where=str(self.path))
        self.recipe = weight_format(config["precision"]["recipe"])
        self.seq_length = config.get("train", {}).get("seq_length")
        self.entries = plan(self.model, dtype=DTYPES[self.recipe])
        self._check()
        self.carried = find_carried(self.path)
        self.original_config = read_json(self.carried, CONFIG) if self.carried else {}
        self.vocab_size = self.model.vocab_size

    def cut_padding(self, vocab_size: int | None) -> None:
        """Leave out rows of embedding and head.

        Args:
            vocab_size: rows to keep; those of the folder that the checkpoint was imported from
                when not given, else all.

        Raises:
            CheckpointError: there are not so many rows, or the tokenizer has more tokens, or one
                that ends a text would have no row.
        """
        rows = self.model.vocab_size
        size = self.original_config.get("vocab_size", rows) if vocab_size is None else vocab_size
        if not 0 < size <= rows:
            raise CheckpointError(f"vocab_size={size}: {self.path} has {rows} rows")
        tokenizer = find_tokenizer(self.path)
        if tokenizer and num_tokens(tokenizer) > size:
            last = num_tokens(tokenizer) - 1
            raise CheckpointError(f"vocab_size={size}: {tokenizer} has tokens up to id {last}")
        if beyond := [end for end in end_token_ids(self.path) if end >= size]:
            raise CheckpointError(f"vocab_size={size}: token {beyond[0]} ends a text")
        self.vocab_size = size
        self.entries = without_padding(self.entries, size)

    def tensors(self) -> Iterator[tuple[Piece, Tensor]]:
        for entry in self.entries:
            tensor = torch.empty(entry.shape, dtype=entry.dtype)
            read_tensors(self.path, {f"model.{entry.name}": tensor}, reader=self._reader)
            yield from entry.split(tensor)

    def _check(self) -> None:
        metadata = self._reader.read_metadata().state_dict_metadata
        saved = {
            name.removeprefix("model."): (tuple(entry.size), entry.properties.dtype)
            for name, entry in metadata.items()
            if name.startswith("model.") and isinstance(entry, TensorStorageMetadata)
        }
        lines = []
        for entry in self.entries:
            found, needed = saved.pop(entry.name, None), (entry.shape, entry.dtype)
            if found is None:
                lines.append(f"model.{entry.name}: missing, the model needs {list(entry.shape)}")
            elif found != needed:
                lines.append(
                    f"model.{entry.name}: has {_words(found)}, the model needs {_words(needed)}"
                )
        lines += [f"model.{name}: extra, the model has no such tensor" for name in saved]
        if lines:
            raise listed(f"{self.path}: the tensors are not those of its config", lines)


def open_source(path: Path) -> Published | Checkpoint:
    """
    Raises:
        CheckpointError: neither of the two, or a damaged one.
        ConfigError: as `open_folder`.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    return Published(open_folder(path)) if is_hf_folder(path) else Checkpoint(path)


def _words(tensor: tuple[tuple[int, ...], torch.dtype]) -> str:
    shape, dtype = tensor
    return f"{list(shape)} {str(dtype).removeprefix('torch.')}"
