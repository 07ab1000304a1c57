"""From a checkpoint of ours to a Hugging Face folder in published style.

One tensor per expert, BF16 (or FP32) except router biases, shards with an index, config.json
with pattern strings, tokenizer files, generation settings.
"""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nemomodel.checkpoint.huggingface.config import config_json
from nemomodel.checkpoint.huggingface.folder import CONFIG, INDEX
from nemomodel.checkpoint.huggingface.names import Entry, Piece
from nemomodel.checkpoint.huggingface.progress import ByteProgress
from nemomodel.checkpoint.huggingface.side_files import (
    GENERATION,
    TOKENIZER,
    TOKENIZER_CONFIG,
    check_carried,
    copy_carried,
    end_token_ids,
    find_tokenizer,
    has_own_tokenizer,
    tokenizer_config,
)
from nemomodel.checkpoint.huggingface.source import Checkpoint
from nemomodel.checkpoint.huggingface.staging import new_folder, refuse_existing
from nemomodel.checkpoint.huggingface.tensor_files import Writer
from nemomodel.model.nemotron import DTYPES

SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Exported:
    """What an export did."""

    num_tensors: int
    num_bytes: int
    num_shards: int
    rounded: list[str]
    """Published names of FP32 parameters whose values BF16 does not hold."""
    own_tokenizer: bool
    """The tokenizer of the run is there, and none of the folder that the run started from."""


def export_checkpoint(
    source: Path,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    vocab_size: int | None = None,
) -> Exported:
    """Convert `source`; `target` appears when everything is written and synced.

    Memory: one tensor of our model, twice.

    Args:
        dtype: bfloat16 or float32; that of the checkpoint's recipe when not given.
        shard_bytes: a file ends before it would be larger, unless one tensor is.
        vocab_size: rows of embedding and head to keep; those of the folder that the checkpoint
            was imported from when not given, else all.

    Raises:
        CheckpointError: as `Checkpoint`, `check_carried` and `new_folder`, or `vocab_size` does
            not fit.
        ConfigError: as `config_json`.
    """
    refuse_existing(target)
    checkpoint = Checkpoint(source)
    checkpoint.cut_padding(vocab_size)
    if checkpoint.carried:
        check_carried(checkpoint.carried)
    dtype = dtype or DTYPES[checkpoint.recipe]
    config = config_json(
        checkpoint.model,
        vocab_size=checkpoint.vocab_size,
        dtype=str(dtype).removeprefix("torch."),
        carried=checkpoint.original_config | _own_ids(checkpoint),
    )
    shards = list(plan_shards(checkpoint.entries, dtype=dtype, shard_bytes=shard_bytes))
    num_bytes = sum(_num_bytes(shard, dtype) for shard in shards)
    with new_folder(target, num_bytes=num_bytes) as partial:
        rounded = _write_tensors(checkpoint, shards, partial, dtype=dtype, num_bytes=num_bytes)
        _write_side_files(checkpoint, config, partial)
        _sync_files(partial)
    own = has_own_tokenizer(checkpoint.path)
    return Exported(sum(map(len, shards)), num_bytes, len(shards), rounded, own)


def published_dtype(piece: Piece, dtype: torch.dtype) -> torch.dtype:
    """Router biases are FP32 in every published folder."""
    return torch.float32 if piece.is_router_bias else dtype


def plan_shards(
    entries: list[Entry], *, dtype: torch.dtype, shard_bytes: int
) -> Iterator[list[Piece]]:
    """The tensors of each file, in order."""
    shard: list[Piece] = []
    size = 0
    for entry in entries:
        for piece in entry.pieces:
            num_bytes = _num_bytes([piece], dtype)
            if shard and size + num_bytes > shard_bytes:
                yield shard
                shard, size = [], 0
            shard.append(piece)
            size += num_bytes
    yield shard


def _num_bytes(pieces: list[Piece], dtype: torch.dtype) -> int:
    return sum(piece.numel * published_dtype(piece, dtype).itemsize for piece in pieces)


def _write_tensors(
    checkpoint: Checkpoint,
    shards: list[list[Piece]],
    partial: Path,
    *,
    dtype: torch.dtype,
    num_bytes: int,
) -> list[str]:
    count = len(shards)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    tensors = checkpoint.tensors()
    rounded = []
    with ByteProgress("export", num_bytes) as progress:
        for name, shard in zip(names, shards, strict=True):
            header = {piece.name: (published_dtype(piece, dtype), piece.shape) for piece in shard}
            with Writer(partial / name, header) as writer:
                for expected in shard:
                    piece, value = next(tensors)
                    assert piece == expected
                    new = value.to(published_dtype(piece, dtype))
                    if new.dtype != value.dtype and not torch.equal(new.to(value.dtype), value):
                        rounded.append(piece.name)
                    writer.write(piece.name, new)
                    progress.advance(new.nbytes)
    weight_map = {p.name: name for name, s in zip(names, shards, strict=True) for p in s}
    index = {"metadata": {"total_size": num_bytes}, "weight_map": weight_map}
    _write_json(partial / INDEX, index)
    return rounded


def _write_side_files(checkpoint: Checkpoint, config: dict[str, Any], partial: Path) -> None:
    if checkpoint.carried:
        own = has_own_tokenizer(checkpoint.path)
        copy_carried(checkpoint.carried, partial, of_tokenizer=not own)
    tokenizer = find_tokenizer(checkpoint.path)
    if tokenizer and not (partial / TOKENIZER).exists():
        shutil.copyfile(tokenizer, partial / TOKENIZER)
    if tokenizer and not (partial / TOKENIZER_CONFIG).exists():
        settings = tokenizer_config(tokenizer, max_length=config.get("max_position_embeddings"))
        _write_json(partial / TOKENIZER_CONFIG, settings)
    _write_json(partial / CONFIG, config)
    if not (partial / GENERATION).exists():
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        ids = {key: config[key] for key in keys if config.get(key) is not None}
        _write_json(partial / GENERATION, {"_from_model_config": True, **ids})


def _own_ids(checkpoint: Checkpoint) -> dict[str, Any]:
    """What config.json says beside the model, for a model that was trained on our own tokens."""
    if checkpoint.original_config and not has_own_tokenizer(checkpoint.path):
        return {}
    ends = end_token_ids(checkpoint.path)
    end = ends[0] if ends else None
    ids = {"bos_token_id": None, "eos_token_id": end, "pad_token_id": end}
    if checkpoint.seq_length and not checkpoint.original_config:
        ids["max_position_embeddings"] = checkpoint.seq_length
    return ids


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _sync_files(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
