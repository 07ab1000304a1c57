"""Read the weights and the config of a checkpoint in one process, without process groups."""

import logging
from pathlib import Path
from typing import Any

from torch import nn

from nemomodel.checkpoint.files import (
    FOLDER,
    MANIFEST,
    CheckpointError,
    check_shapes,
    damage,
    read_state,
    read_tensors,
    step_folders,
)

logger = logging.getLogger(__name__)


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

    It does not matter on how many ranks the checkpoint was written.

    Args:
        path: step folder, or run folder of which the newest intact checkpoint is taken.

    Returns:
        The step folder that was read.

    Raises:
        CheckpointError: no intact checkpoint, or one of another model.
    """
    folder = find_checkpoint(path)
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    check_shapes(folder, {name: list(tensor.shape) for name, tensor in tensors.items()})
    read_tensors(folder, tensors)
    return folder
