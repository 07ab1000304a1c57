"""Checkpoint folders on disk: layout, manifest, verification, reading without unpickling code.

    <run.dir>/checkpoints/latest                 name of the newest step folder
    <run.dir>/checkpoints/step_00000200/
        manifest.json                            written last: size and SHA-256 of every file
        state.json                               config, progress, optimizer and schedule steps
        rng_00000.pt                             random states of global rank 0
        .metadata, __0_0.distcp, ...             tensors, format of torch.distributed.checkpoint

This module imports no megatron: reading weights needs none.
"""

import hashlib
import json
import os
import pickle
import re
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

FORMAT = 1
FOLDER = "checkpoints"
LATEST = "latest"
MANIFEST = "manifest.json"
STATE = "state.json"

HASH_THREADS = min(8, os.cpu_count() or 1)

_STEP = re.compile(r"step_(\d{8,})")
_METADATA_CLASSES = {
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath"},
    "pathlib._local": {"PosixPath"},
    "torch": {"Size", "device"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "_MEM_FORMAT_ENCODING",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
    },
    "torch.serialization": {"_get_layout"},
}


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, found, or used by this run."""


class SafeReader(FileSystemReader):
    """Reads tensors; its index can name no class but those that describe tensors."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        self._metadata.storage_meta.load_id = self.load_id
        return self._metadata

    @cached_property
    def _metadata(self) -> Metadata:
        path = Path(self.path) / ".metadata"
        try:
            with path.open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except CheckpointError:
            raise
        except Exception as error:  # a damaged pickle can raise anything
            raise CheckpointError(f"{path}: is not readable: {error!r}") from None
        if not isinstance(metadata, Metadata):
            raise CheckpointError(f"{path}: is no index of tensors")
        return metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise CheckpointError(f"checkpoint index names {module}.{name}, which is not a tensor type")


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def step_folders(root: Path) -> list[Path]:
    """Published step folders, the one that `latest` names first, then from new to old."""
    if not root.is_dir():
        return []
    pointer = root / LATEST
    latest = pointer.read_text().strip() if pointer.is_file() else ""
    folders = [folder for folder in root.iterdir() if _STEP.fullmatch(folder.name)]
    return sorted(folders, key=lambda f: (f.name == latest, step_of(f)), reverse=True)


def step_of(folder: Path) -> int:
    match = _STEP.fullmatch(folder.name)
    assert match, f"{folder} is not a step folder"
    return int(match[1])


def describe_file(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"size": file.tell(), "sha256": digest}


def describe_files(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """`describe_file` of each, several at once: hashing runs outside Python's lock."""
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return list(pool.map(describe_file, paths))


def write_json(path: Path, value: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a crash, as fsync of a file does for its bytes."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Replace a small file in one step: readers see the old text or the new."""
    new = path.with_name(f".{path.name}.new")
    with new.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    sync_folder(path.parent)


def manifest_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Every file of the checkpoint with its size and SHA-256.

    Raises:
        CheckpointError: the manifest is missing or unreadable.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found, files = manifest["format"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: {_reason(error)}") from error
    if found != FORMAT:
        raise CheckpointError(f"{path}: format={found}; this version reads format {FORMAT}")
    if not isinstance(files, dict):
        raise CheckpointError(f"{path}: files is not a table of names")
    return files


def damage(folder: Path, *, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with the files of a checkpoint, or None.

    Args:
        share: look at every `shares`-th file only, from this one on; ranks split the work.
    """
    try:
        files = manifest_files(folder)
    except CheckpointError as error:
        return str(error)

    def wrong(name: str) -> str | None:
        path, expected = folder / name, files[name]
        try:
            if not isinstance(expected, dict) or expected.keys() != {"size", "sha256"}:
                return f"{folder / MANIFEST}: the entry of {name} is not readable"
            if (size := path.stat().st_size) != expected["size"]:
                return f"{path}: has {size} bytes, the manifest says {expected['size']}"
            if describe_file(path) != expected:
                return f"{path}: SHA-256 differs from the manifest"
        except OSError as error:
            return f"{path}: {_reason(error)}"
        return None

    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return next(filter(None, pool.map(wrong, sorted(files)[share::shares])), None)


def read_state(folder: Path) -> dict[str, Any]:
    """The plain data of a checkpoint: `config`, `step`, `tokens` and more.

    Raises:
        CheckpointError: the file is missing or no JSON, or its config has no model or no recipe.
    """
    path = folder / STATE
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        model, recipe = state["config"]["model"], state["config"]["precision"]["recipe"]
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {_reason(error)}") from None
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: has no config of a model: {error!r}") from None
    if not isinstance(model, dict) or not isinstance(recipe, str):
        raise CheckpointError(f"{path}: has no config of a model")
    return state


def read_tensors(
    folder: Path, tensors: dict[str, Tensor], *, reader: SafeReader | None = None
) -> None:
    """Read into `tensors` in place; each process by itself, whoever wrote them.

    Args:
        reader: of this folder; it spares many calls reading the index again.

    Raises:
        CheckpointError: a tensor cannot be read.
        KeyboardInterrupt, SystemExit: what interrupted the reading.
    """
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(
                tensors, storage_reader=reader or SafeReader(folder), planner=planner, no_dist=True
            )
        except CheckpointException as error:  # a BaseException, which nobody expects
            causes = [cause for cause, _ in error.failures.values()]
            for cause in causes:
                if not isinstance(cause, Exception):  # Ctrl-C, or a handler that ends the process
                    raise cause from None
            reasons = "; ".join(_reason(cause) for cause in causes)
            raise CheckpointError(f"{folder}: cannot be read: {reasons}") from error


def saved_shapes(folder: Path) -> dict[str, list[int]]:
    """Names and shapes of all tensors of a checkpoint."""
    metadata = SafeReader(folder).read_metadata()
    return {
        name: list(entry.size)
        for name, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }


def check_shapes(folder: Path, needed: dict[str, list[int]]) -> None:
    """Raise CheckpointError with all tensors that are missing or of another shape."""
    saved = saved_shapes(folder)
    lines = [
        f"tensor {name}: checkpoint has {saved.get(name, 'no such tensor')}, model needs {shape}"
        for name, shape in needed.items()
        if saved.get(name) != shape
    ]
    if lines:
        raise CheckpointError("\n  ".join([f"checkpoint {folder}: the models differ", *lines]))


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
