"""Training for the Nemotron 3 Super architecture: Mamba-2, attention, LatentMoE and MTP."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from nemomodel.model.nemotron import Nemotron

__all__ = ["load_model"]


def load_model(
    path: "Path | str", *, dtype: "torch.dtype | None" = None, device: "torch.device | str" = "cpu"
) -> "Nemotron":
    """The model of a checkpoint, ready to use:

        model = nemomodel.load_model("runs/tiny")   or a Hugging Face nemotron_h folder
        model(ids_BS)                               logits [B, S, V]
        model.mtp_logits(ids_BS)                    one [B, S, V] per MTP depth
        model.loss(ids_BS, labels_BS, loss_mask_BS) training loss, scalar

    Args:
        path: a run folder (its newest intact checkpoint), one step folder, an imported
            checkpoint, or a Hugging Face folder with BF16 or FP32 weights.
        dtype: of weights and activations; that of the checkpoint when not given. A_log, D,
            dt_bias and the router biases are FP32 at least.

    Raises:
        CheckpointError: no intact checkpoint there; tensors that are missing, extra, misshapen or
            packed; files outside the folder.
        ConfigError: config.json says what this model cannot do.
        ValueError: another dtype than bfloat16, float32 or float64.
    """
    from nemomodel.checkpoint.load_model import load_model

    return load_model(path, dtype=dtype, device=device)
