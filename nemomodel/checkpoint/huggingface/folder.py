"""A Hugging Face model folder: what it holds, under published names, without reading weights.

Nothing outside the folder is read, whatever its index or its links say. The one exception is
the cache of the hub client, whose snapshots are links into the `blobs` beside them.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemomodel.checkpoint.files import CheckpointError
from nemomodel.checkpoint.huggingface.config import model_config
from nemomodel.checkpoint.huggingface.names import (
    Entry,
    plan,
    published_name,
    stacked_experts,
)
from nemomodel.checkpoint.huggingface.tensor_files import Stored, no_duplicates, read_header
from nemomodel.config.schema import ModelConfig
from nemomodel.model.nemotron import DTYPES

logger = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG = "config.json"
RECIPES = {dtype: recipe for recipe, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Folder:
    """A folder whose every tensor is one of the model, in shape and dtype."""

    path: Path
    config: ModelConfig
    recipe: str
    entries: list[Entry]
    tensors: dict[str, Stored]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def num_narrow_biases(self) -> int:
        """Router biases that are BF16 here and FP32 everywhere else."""
        stored = (self.tensors[p.name] for e in self.entries for p in e.pieces if p.is_router_bias)
        return sum(tensor.dtype == torch.bfloat16 for tensor in stored)

    def read(self, entry: Entry, out: Tensor) -> None:
        """Read one tensor of our model, piece by piece, into `out`, of any dtype and device."""
        for piece, part in entry.split(out):
            stored = self.tensors[piece.name]
            if part.dtype == stored.dtype and part.device.type == "cpu":
                stored.read(part)
            else:
                part.copy_(stored.read())


def is_hf_folder(path: Path) -> bool:
    """Whether weights in a format of Hugging Face lie in `path`, readable ones or not."""
    patterns = ("*.safetensors", INDEX, "pytorch_model*.bin*")
    return path.is_dir() and any(next(path.glob(pattern), None) for pattern in patterns)


def open_folder(path: Path) -> Folder:
    """
    Raises:
        CheckpointError: with all tensors that are missing, extra, misshapen or of a dtype that
            would be rounded; for files that are missing, damaged or outside the folder; for
            packed weights; for pickled ones.
        ConfigError: config.json contradicts itself, or says what our model cannot do.
    """
    config_json = read_json(path, CONFIG)
    refuse_packed(path, config_json)
    config = model_config(config_json, where=str(path / CONFIG))
    tensors = _published(path, _stored(path))
    recipe = _recipe(path, tensors)
    _warn_of_dtype(path, config_json, recipe)
    entries = plan(config, dtype=DTYPES[recipe])
    _compare(path, entries, tensors)
    return Folder(path, config, recipe, entries, tensors)


def read_json(path: Path, name: str) -> dict[str, Any]:
    """
    Raises:
        CheckpointError: the file is missing, outside the folder, no JSON object, or says a key
            twice.
    """
    try:
        text = contained(path, name).read_text(encoding="utf-8")
        value = json.loads(text, object_pairs_hook=no_duplicates)
    except OSError as error:
        raise CheckpointError(f"{path / name}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path / name}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path / name}: is not a JSON object")
    return value


def contained(folder: Path, name: str) -> Path:
    """The path of a file in `folder`.

    Raises:
        CheckpointError: `name` is more than a file name, or a link that leads out of the folder.
    """
    if not name or name in (".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise CheckpointError(f"{folder}: {name!r} is not the name of a file in this folder")
    try:
        root, target = folder.resolve(), (folder / name).resolve()
    except (OSError, RuntimeError, ValueError):
        raise CheckpointError(f"{folder}: {name!r} is a loop of links, or no file name") from None
    in_cache = root.parent.name == "snapshots" and target.parent == root.parents[1] / "blobs"
    if not target.is_relative_to(root) and not in_cache:
        raise CheckpointError(f"{folder / name}: is a link that leads out of the folder")
    return folder / name


def listed(head: str, lines: list[str]) -> CheckpointError:
    """One error of all lines; those that differ in the number of the expert only are one line."""
    count = f"{len(lines):,} problem{'s' if len(lines) > 1 else ''}"
    return CheckpointError("\n  ".join([f"{head}: {count}", *_folded(lines)]))


def _folded(lines: list[str]) -> Iterator[str]:
    """`a.experts.{0..2,5}.b: missing (4 tensors)` for four lines, where the first one stood."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for line in lines:
        before, number, after = re.fullmatch(r"(?:(.*?\.experts\.)(\d+))?(.*)", line, re.S).groups()
        groups.setdefault((before or "", after), []).append(int(number or 0))
    for (before, after), numbers in groups.items():
        if not before:
            yield after
        elif len(numbers) == 1:
            yield f"{before}{numbers[0]}{after}"
        else:
            yield f"{before}{{{_ranges(numbers)}}}{after} ({len(numbers)} tensors)"


def _ranges(numbers: list[int]) -> str:
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs)


def refuse_packed(path: Path, config_json: dict[str, Any]) -> None:
    if config_json.get("quantization_config") or (path / "hf_quant_config.json").exists():
        raise CheckpointError(
            f"{path}: the weights are packed (quantization_config); only BF16 and FP32 "
            "checkpoints can be converted"
        )


def _stored(path: Path) -> dict[str, Stored]:
    """All tensors under the names in the files."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder")
    has_index, has_single = (path / INDEX).exists(), (path / SINGLE).exists()
    if has_index and has_single:
        raise CheckpointError(f"{path}: has {SINGLE} and {INDEX}; remove the one that is stale")
    if has_single:
        return read_header(contained(path, SINGLE))
    if not has_index:
        found = next(iter(sorted(path.glob("pytorch_model*.bin*"))), None)
        if found:
            raise CheckpointError(
                f"{found}: pickled weights are not read, because that can run code; "
                "save the model as safetensors"
            )
        raise CheckpointError(f"{path}: has neither {SINGLE} nor {INDEX}")
    return _indexed(path)


def _indexed(path: Path) -> dict[str, Stored]:
    weight_map = read_json(path, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise CheckpointError(f"{path / INDEX}: weight_map is not a table of file names")
    files = {file: contained(path, file) for file in sorted(set(weight_map.values()))}
    tensors: dict[str, Stored] = {}
    unnamed = sorted({p.name for p in path.glob("*.safetensors")} - files.keys())
    lines = [f"{file}: extra, the index does not name this file" for file in unnamed]
    for file, where in files.items():
        for name, stored in read_header(where).items():
            if weight_map.get(name) == file:
                tensors[name] = stored
            else:
                lines.append(f"{name}: is in {file}, the index says {weight_map.get(name)}")
    lines += [
        f"{name}: is not in {file}, where the index says"
        for name, file in weight_map.items()
        if name not in tensors
    ]
    if lines:
        raise listed(f"{path / INDEX}: does not agree with the files", lines)
    return tensors


def _published(path: Path, stored: dict[str, Stored]) -> dict[str, Stored]:
    """The same tensors under published names, one per expert."""
    tensors: dict[str, Stored] = {}
    for old, tensor in stored.items():
        name = published_name(old)
        pattern = stacked_experts(name)
        if pattern and len(tensor.shape) == 3:
            new = {pattern.format(i): row for i, row in enumerate(tensor.rows())}
        else:
            new = {name: tensor}
        for twice in new.keys() & tensors.keys():
            raise CheckpointError(f"{path}: {twice} is there twice, once as {old}")
        tensors |= new
    return tensors


def _recipe(path: Path, tensors: dict[str, Stored]) -> str:
    """By the dtype that most bytes have: some vectors are FP32 in some BF16 folders."""
    num_bytes = Counter[torch.dtype]()
    for tensor in tensors.values():
        num_bytes[tensor.dtype] += tensor.num_bytes
    if not num_bytes:
        raise CheckpointError(f"{path}: the files hold no tensors")
    return RECIPES[num_bytes.most_common(1)[0][0]]


def _warn_of_dtype(path: Path, config_json: dict[str, Any], recipe: str) -> None:
    actual = str(DTYPES[recipe]).removeprefix("torch.")
    for key in ("dtype", "torch_dtype"):
        said = config_json.get(key)
        if said is not None and str(said).removeprefix("torch.") != actual:
            logger.warning("%s: %s=%s, but the tensors are %s", path / CONFIG, key, said, actual)


def _compare(path: Path, entries: list[Entry], tensors: dict[str, Stored]) -> None:
    lines = list(_differences(entries, tensors))
    if not lines:
        return
    error = listed(f"{path}: the tensors are not those of config.json", lines)
    names = {piece.name for entry in entries for piece in entry.pieces}
    if any(n.startswith("mtp.") for n in names) and not any(n.startswith("mtp.") for n in tensors):
        raise CheckpointError(
            f"{error}\n  No mtp.* tensor is there, as when transformers saved the model; to go "
            "without MTP, set num_nextn_predict_layers to 0 in config.json."
        )
    raise error


def _differences(entries: list[Entry], tensors: dict[str, Stored]) -> Iterator[str]:
    extra = dict.fromkeys(tensors)
    for entry in entries:
        for piece in entry.pieces:
            stored = tensors.get(piece.name)
            extra.pop(piece.name, None)
            if stored is None:
                yield f"{piece.name}: missing, the model needs {list(piece.shape)}"
            elif stored.shape != piece.shape:
                yield f"{piece.name}: has {list(stored.shape)}, the model needs {list(piece.shape)}"
            elif stored.dtype.itemsize > entry.dtype.itemsize:
                yield f"{piece.name}: is FP32, the other weights are BF16; it would be rounded"
            elif stored.dtype != entry.dtype and not piece.may_be_wide:
                yield f"{piece.name}: is BF16, the other weights are FP32"
    for name in extra:
        yield f"{name}: extra, the model has no such tensor"
