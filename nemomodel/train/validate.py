"""Loss on the held-out sequences."""

import math

import torch
from torch import Tensor

from nemomodel.checkpoint.state import Engine
from nemomodel.data.batch import MicroBatch
from nemomodel.model.nemotron import Nemotron
from nemomodel.parallel.mcore import Ranks, global_sum
from nemomodel.parallel.pipeline import run_micro_batches
from nemomodel.train.step import DeviceBatch


@torch.no_grad()
def validate(
    engine: Engine, batches: list[MicroBatch], ranks: Ranks, *, token_bytes: Tensor | None
) -> dict[str, float]:
    """Cross-entropy per head in nats per token, and bits per byte of the main head.

    Args:
        batches: this rank's part; all ranks have equally many.
        token_bytes: [V] UTF-8 bytes of each token, on the CPU.
    """
    models: list[Nemotron] = [chunk.module for chunk in engine.chunks]
    on_device = [DeviceBatch.of(batch, ranks.device) for batch in batches]
    sums = []

    def forward(chunk: int, i: int, received: Tensor | None) -> Tensor:
        b = on_device[i]
        num_targets = models[0].num_targets(b.loss_mask_BS, b.documents)
        losses = models[chunk].losses(
            b.ids_BS,
            b.labels_BS,
            b.loss_mask_BS,
            b.documents,
            num_targets=torch.ones_like(num_targets),
            num_sequences=1,
            received=received,
        )
        num_bytes = num_targets.new_tensor([batches[i].num_bytes(token_bytes)])
        counts = torch.cat([num_targets, num_bytes]) * (ranks.counts and models[chunk].stage.last)
        # Every tp rank has the same cross-entropy.
        cross_entropy = losses.cross_entropy.double() * (ranks.mesh.tp.rank == 0)
        sums.append(torch.cat([cross_entropy, counts]))
        return losses.total

    shape = models[0].sent_shape(*batches[0].ids_BS.shape)
    run_micro_batches(
        engine.chunks, forward, len(batches), groups=ranks.groups, shape=shape, backward=False
    )
    totals = global_sum(torch.stack(sums).sum(0)).tolist()
    heads = len(totals) // 2
    cross_entropy, num_targets, num_bytes = totals[:heads], totals[heads:-1], totals[-1]
    losses = [ce / n if n else math.nan for ce, n in zip(cross_entropy, num_targets, strict=True)]
    values = {"loss/validation": losses[0]}
    values |= {f"loss/validation_mtp_{k}": loss for k, loss in enumerate(losses[1:], 1)}
    if num_bytes:
        values["loss/validation_bits_per_byte"] = cross_entropy[0] / math.log(2) / num_bytes
    return values
