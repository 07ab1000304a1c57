"""From a checkpoint to a model, in one process."""

from pathlib import Path

import torch

from nemomodel.checkpoint.weights import find_checkpoint, load_weights, read_config
from nemomodel.config.load import parse_config
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
    folder = find_checkpoint(path)
    config = parse_config(read_config(folder), where=str(folder))
    with torch.device(device):
        model = Nemotron(config.model, dtype=dtype or DTYPES[config.precision.recipe])
    load_weights(folder, model)
    return model.eval()
