"""From a Hugging Face folder to a checkpoint of ours.

CKPT_DIR/manifest.json, state.json, .metadata, *.distcp     as checkpoint/files.py says
CKPT_DIR/model.toml                                         to paste into a training config
CKPT_DIR/hf/                                                config, tokenizer and other files
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from nemomodel.checkpoint.files import FORMAT, MANIFEST, STATE, describe_files, write_json
from nemomodel.checkpoint.huggingface.folder import Folder, open_folder
from nemomodel.checkpoint.huggingface.names import Entry
from nemomodel.checkpoint.huggingface.progress import ByteProgress
from nemomodel.checkpoint.huggingface.side_files import CARRIED, check_carried, copy_carried
from nemomodel.checkpoint.huggingface.staging import new_folder, refuse_existing
from nemomodel.config.schema import ModelConfig

FILE_BYTES = 250_000_000
"""Tensors share a file up to this size; the writer holds those of one file in memory."""

MODEL_TOML = "model.toml"


def import_folder(source: Path, target: Path) -> Folder:
    """Convert `source`; `target` appears when everything is written and synced.

    Memory: one tensor of our model, or one file of small ones.

    Raises:
        CheckpointError: as `open_folder`, `check_carried` and `new_folder`.
        ConfigError: as `open_folder`.
    """
    refuse_existing(target)
    folder = open_folder(source)
    check_carried(source)
    with new_folder(target, num_bytes=folder.num_bytes) as partial:
        _write_tensors(folder, partial)
        (partial / CARRIED).mkdir()
        copy_carried(source, partial / CARRIED)
        text = model_toml(folder.config, folder.recipe)
        (partial / MODEL_TOML).write_text(text, encoding="utf-8")
        config = {"model": asdict(folder.config), "precision": {"recipe": folder.recipe}}
        write_json(partial / STATE, {"format": FORMAT, "step": 0, "tokens": 0, "config": config})
        paths = sorted(path for path in partial.rglob("*") if path.is_file())
        names = [str(path.relative_to(partial)) for path in paths]
        files = dict(zip(names, describe_files(paths), strict=True))
        write_json(
            partial / MANIFEST, {"format": FORMAT, "step": 0, "world_size": 1, "files": files}
        )
    return folder


def model_toml(model: ModelConfig, recipe: str) -> str:
    """The [model] and [precision] sections of a training config."""
    lines = [*_toml("model", asdict(model)), "", "[precision]", f'recipe = "{recipe}"']
    return "\n".join(lines) + "\n"


class _LazyPlanner(DefaultSavePlanner):
    """Plans with meta tensors and reads each tensor when it is its turn to be written."""

    def __init__(self, folder: Folder, progress: ByteProgress):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._folder, self._progress = folder, progress
        self._entries = {f"model.{entry.name}": entry for entry in folder.entries}
        self.set_up_planner(
            {
                name: torch.empty(entry.shape, dtype=entry.dtype, device="meta")
                for name, entry in self._entries.items()
            },
            is_coordinator=True,
        )

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        entry = self._entries[write_item.index.fqn]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        self._folder.read(entry, tensor)
        self._progress.advance(tensor.nbytes)
        return tensor


def _write_tensors(folder: Folder, partial: Path) -> None:
    """Write as so many ranks would that each of them has one file of moderate size."""
    writer = FileSystemWriter(partial, sync_files=True)
    writer.set_up_storage_writer(is_coordinator=True)
    with ByteProgress("import", folder.num_bytes) as progress:
        planner = _LazyPlanner(folder, progress)
        items = {item.index.fqn: item for item in planner.create_local_plan().items}
        local = [
            SavePlan([items[f"model.{entry.name}"] for entry in entries])
            for entries in _by_file(folder.entries)
        ]
        plans, metadata = planner.create_global_plan(local)
        results = [
            writer.write_data(plan, planner).value() for plan in writer.prepare_global_plan(plans)
        ]
    writer.finish(metadata, results)


def _by_file(entries: list[Entry]) -> Iterator[list[Entry]]:
    batch: list[Entry] = []
    size = 0
    for entry in entries:
        if batch and size + entry.num_bytes > FILE_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(entry)
        size += entry.num_bytes
    yield batch


def _toml(name: str, section: dict[str, Any]) -> Iterator[str]:
    yield f"[{name}]"
    for key, value in section.items():
        if isinstance(value, bool):
            yield f"{key} = {str(value).lower()}"
        elif value is not None and not isinstance(value, dict):
            # The letters of patterns need no escape.
            yield f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value}"
    for key, value in section.items():
        if isinstance(value, dict):
            yield ""
            yield from _toml(f"{name}.{key}", value)
