"""From a checkpoint to a model, in one process."""

from pathlib import Path

import torch

from nemomodel.checkpoint.files import read_state
from nemomodel.checkpoint.huggingface.folder import is_hf_folder, open_folder
from nemomodel.checkpoint.weights import copy_checkpoint, copy_folder, find_checkpoint
from nemomodel.config.load import parse_model
from nemomodel.config.schema import ModelConfig, weight_format
from nemomodel.model.nemotron import DTYPES, Nemotron


def load_model(
    path: Path | str, *, dtype: torch.dtype | None, device: torch.device | str
) -> Nemotron:
    """See `nemomodel.load_model`."""
    if dtype is not None and dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(
            f"dtype={dtype!r}: weights have no such format; "
            "use torch.bfloat16, torch.float32 or torch.float64"
        )

    def build(config: ModelConfig, recipe: str) -> Nemotron:
        with torch.device(device):
            return Nemotron(config, dtype=dtype or DTYPES[recipe])

    path = Path(path)
    if is_hf_folder(path):
        folder = open_folder(path)
        model = build(folder.config, folder.recipe)
        copy_folder(folder, model)
    else:
        step = find_checkpoint(path)
        config = read_state(step)["config"]
        model = build(
            parse_model(config["model"], where=str(step)),
            weight_format(config["precision"]["recipe"]),
        )
        copy_checkpoint(step, model)
    return model.eval()
