"""Loss on the held-out sequences."""

import math

import torch
from torch import Tensor

from nemomodel.data.batch import MicroBatch
from nemomodel.model.nemotron import Nemotron
from nemomodel.parallel.mcore import Ranks, global_sum
from nemomodel.train.step import DeviceBatch


@torch.no_grad()
def validate(
    model: Nemotron, batches: list[MicroBatch], ranks: Ranks, *, token_bytes: Tensor | None
) -> dict[str, float]:
    """Cross-entropy per head in nats per token, and bits per byte of the main head.

    Args:
        batches: this rank's part; all ranks have equally many.
        token_bytes: [V] UTF-8 bytes of each token, on the CPU.
    """
    sums = 0
    for batch in batches:
        b = DeviceBatch.of(batch, ranks.device)
        cross_entropy, num_targets = model.cross_entropy(
            b.ids_BS, b.labels_BS, b.loss_mask_BS, b.documents
        )
        num_bytes = num_targets.new_tensor([batch.num_bytes(token_bytes)])
        sums = sums + torch.cat([cross_entropy, num_targets, num_bytes])
    totals = global_sum(sums, ranks).tolist()
    heads = len(totals) // 2
    cross_entropy, num_targets, num_bytes = totals[:heads], totals[heads:-1], totals[-1]
    losses = [ce / n if n else math.nan for ce, n in zip(cross_entropy, num_targets, strict=True)]
    values = {"loss/validation": losses[0]}
    values |= {f"loss/validation_mtp_{k}": loss for k, loss in enumerate(losses[1:], 1)}
    if num_bytes:
        values["loss/validation_bits_per_byte"] = cross_entropy[0] / math.log(2) / num_bytes
    return values
