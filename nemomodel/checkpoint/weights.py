"""Read the weights and the config of a checkpoint in one process, without process groups."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nemomodel.checkpoint.files import (
    FOLDER,
    MANIFEST,
    CheckpointError,
    SafeReader,
    check_shapes,
    damage,
    read_state,
    read_tensors,
    step_folders,
)
from nemomodel.checkpoint.huggingface.folder import Folder, is_hf_folder, open_folder
from nemomodel.config.load import parse_model
from nemomodel.config.pattern import CUT
from nemomodel.config.schema import ModelConfig
from nemomodel.model.nemotron import Nemotron
from nemomodel.parallel.shard import shard_of

logger = logging.getLogger(__name__)

SAME_MODEL = {
    "init_std",
    "mamba.chunk_size",
    "moe.bias_update_rate",
    "moe.aux_loss_coeff",
    "mtp.loss_scale",
}
"""Keys of the model section that change speed, the start or the loss, but not the model."""

# The same weights also serve other numbers of depths: how many blocks there are is compared.
_SAME_WEIGHTS = SAME_MODEL | {"mtp.num_depths", "mtp.shared"}


def find_checkpoint(path: Path | str) -> Path:
    """The step folder that `path` is, or the newest intact one of the run folder `path`.

    Raises:
        CheckpointError: there is none, or none is intact.
    """
    path = Path(path)
    is_step = (path / MANIFEST).is_file()
    folders = [path] if is_step else step_folders(path / FOLDER) or step_folders(path)
    if not folders:
        raise CheckpointError(f"{path}: no checkpoint here; give a run folder or a step folder")
    found = []
    for folder in folders:
        if (wrong := damage(folder)) is None:
            return folder
        logger.warning("checkpoint %s is damaged (%s)", folder, wrong)
        found.append(wrong)
    raise CheckpointError("\n  ".join([f"{path}: no intact checkpoint", *found]))


def read_config(path: Path | str) -> dict[str, Any]:
    """The config of a checkpoint as plain data, for `config.load.parse_config`."""
    return read_state(find_checkpoint(path))["config"]


def load_weights(path: Path | str, model: nn.Module) -> Path:
    """Copy the weights of a checkpoint into `model`, which keeps its dtypes and devices.

    It does not matter on how many ranks the checkpoint was written, nor which part of each tensor
    `model` holds. Memory beside the model: one tensor.

    Args:
        path: step folder, run folder of which the newest intact checkpoint is taken, or Hugging
            Face folder (a `Nemotron` only).

    Returns:
        The folder that was read.

    Raises:
        CheckpointError: no intact checkpoint, or one of another model: another shape, or another
            setting that changes what the weights mean.
        ConfigError: as `huggingface.folder.open_folder`.
    """
    path = Path(path)
    if is_hf_folder(path):
        copy_folder(open_folder(path), model)
        return path
    folder = find_checkpoint(path)
    copy_checkpoint(folder, model)
    return folder


def copy_checkpoint(folder: Path, model: nn.Module) -> None:
    """`load_weights` from a step folder that `find_checkpoint` has verified."""
    if isinstance(model, Nemotron):
        saved = parse_model(read_state(folder)["config"]["model"], where=str(folder))
        _check_config(folder, saved, model.config)
    tensors = {f"model.{n}": t for n, t in model.state_dict(keep_vars=True).items()}
    check_shapes(folder, {name: list(shard_of(t).shape) for name, t in tensors.items()})
    reader = SafeReader(folder)
    for name, tensor in tensors.items():
        with _whole(tensor) as out:
            read_tensors(folder, {name: out}, reader=reader)


def copy_folder(folder: Folder, model: Nemotron) -> None:
    """`load_weights` from a Hugging Face folder."""
    _check_config(folder.path, folder.config, model.config)
    tensors = model.state_dict(keep_vars=True)
    for entry in folder.entries:
        if entry.name in tensors:  # a pipeline stage has some of them
            with _whole(tensors[entry.name]) as out:
                folder.read(entry, out)


@contextmanager
def _whole(tensor: Tensor) -> Iterator[Tensor]:
    """Where to read a whole tensor to, of which a rank may hold a part: `tensor`."""
    shard = shard_of(tensor)
    if shard.local_shape == shard.shape:
        yield tensor.detach()
        return
    whole = torch.empty(shard.shape, dtype=tensor.dtype)
    yield whole
    tensor.detach().copy_(shard.cut(whole))


def _check_config(folder: Path, saved: ModelConfig, ours: ModelConfig) -> None:
    lines = list(_differences(asdict(saved), asdict(ours)))
    if saved.mtp and ours.mtp and saved.num_mtp_blocks != ours.num_mtp_blocks:
        lines.append(
            f"model.mtp.shared={_word(ours.mtp.shared)} with num_depths={ours.mtp.num_depths}: "
            f"the checkpoint has {saved.num_mtp_blocks} MTP blocks, the model {ours.num_mtp_blocks}"
        )
    if lines:
        raise CheckpointError("\n  ".join([f"checkpoint {folder}: the models differ", *lines]))


def _differences(saved: dict[str, Any], ours: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key in ours:
        name, a, b = prefix + key, saved[key], ours[key]
        if key == "layer_pattern":
            a, b = a.replace(CUT, ""), b.replace(CUT, "")
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{name}.")
        elif a != b and name not in _SAME_WEIGHTS:
            yield f"model.{name}: the checkpoint has {_word(a)}, the model {_word(b)}"


def _word(value: Any) -> str:
    return "such a section" if isinstance(value, dict) else json.dumps(value)
