"""One optimizer step: forward and backward over the micro-batches, update, router biases."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nemomodel.checkpoint.state import Engine
from nemomodel.data.batch import MicroBatch
from nemomodel.model.nemotron import Losses, Nemotron, router_names
from nemomodel.ops.documents import Documents
from nemomodel.parallel.mcore import Ranks, finish_gradients, global_sum
from nemomodel.parallel.optimizer import step_optimizer
from nemomodel.parallel.pipeline import run_micro_batches
from nemomodel.train.faults import NotFiniteError


@dataclass(frozen=True)
class DeviceBatch:
    """A micro-batch where the model is."""

    ids_BS: Tensor
    labels_BS: Tensor
    loss_mask_BS: Tensor
    documents: Documents

    @staticmethod
    def of(batch: MicroBatch, device: torch.device) -> "DeviceBatch":
        documents = Documents.from_ids(batch.document_BS)
        tensors = (batch.ids_BS, batch.labels_BS, batch.loss_mask_BS)
        return DeviceBatch(
            *(t.to(device, non_blocking=True) for t in tensors), documents.to(device)
        )


def count_targets(
    batches: list[DeviceBatch], engine: Engine, ranks: Ranks, *, stop: bool
) -> tuple[Tensor, bool]:
    """Targets of the whole global batch per head, and whether any rank wants to stop.

    Known before the forward pass, so every micro-batch is divided by global counts at once.
    """
    model: Nemotron = engine.chunks[0].module
    local = sum(model.num_targets(b.loss_mask_BS, b.documents) for b in batches)
    # The wish to stop travels along: ranks agree on it without a message of its own.
    totals = global_sum(torch.cat([local * ranks.counts, local.new_tensor([float(stop)])]))
    return totals[:-1], bool(totals[-1] > 0)


def forward_backward(
    batches: list[DeviceBatch],
    engine: Engine,
    ranks: Ranks,
    *,
    num_targets: Tensor,
    num_sequences: int,
    step: int,
) -> Losses:
    """Accumulate the gradient of the global loss; returns the sums over this rank's batches, with
    the counts of all routers of the whole model."""
    models: list[Nemotron] = [chunk.module for chunk in engine.chunks]
    first = ranks.dp_rank * len(batches)
    results: list[list[Losses]] = [[] for _ in models]

    def forward(chunk: int, i: int, received: Tensor | None) -> Tensor:
        batch = batches[i]
        engine.quantization.begin(step, first + i, per_rank=len(batches))
        losses = models[chunk].losses(
            batch.ids_BS,
            batch.labels_BS,
            batch.loss_mask_BS,
            batch.documents,
            num_targets=num_targets,
            num_sequences=num_sequences,
            received=received,
        )
        zero = losses.total.new_zeros(())  # in place of what leads back
        results[chunk].append(Losses(zero, *(t.detach() for t in losses[1:])))
        return losses.total

    for ddp in engine.chunks:
        ddp.zero_grad_buffer()
    shape = models[0].sent_shape(*batches[0].ids_BS.shape)
    run_micro_batches(engine.chunks, forward, len(batches), groups=ranks.groups, shape=shape)
    finish_gradients(engine.chunks, ranks)
    of_chunks = [_sum(parts, model) for parts, model in zip(results, models, strict=True)]
    return Losses(*(torch.stack(parts).sum(0) for parts in zip(*of_chunks, strict=True)))


def _sum(micro_batches: list[Losses], model: Nemotron) -> Losses:
    """Over micro-batches, with counts of 0 for the routers of other stages."""
    total, cross_entropy, balance, own = map(torch.stack, zip(*micro_batches, strict=True))
    names, moe = router_names(model.config), model.config.moe
    count = own.new_zeros(len(names), moe.num_experts if moe else 0)
    for name, count_E in zip(model.routers(), own.sum(0), strict=True):
        count[names.index(name)] = count_E
    # In FP64, that the order of stages and micro-batches does not show in what is logged.
    return Losses(total.sum(0), cross_entropy.double().sum(0), balance.double().sum(0), count)


def update(losses: Losses, engine: Engine, *, step: int) -> tuple[float, Tensor]:
    """Optimizer, schedule and router biases; returns the gradient norm and, for every router of
    the whole model, token copies per expert over the global batch.

    Raises:
        NotFiniteError: the gradient is not finite; nothing has been changed.
    """
    grad_norm = step_optimizer(engine.optimizer)
    if not math.isfinite(grad_norm):
        operand = engine.quantization.first_not_finite()
        where = f" (first in {operand} of a quantised layer)" if operand else ""
        raise NotFiniteError(
            f"step {step}: gradient norm is {grad_norm}{where}; the weights were not updated. "
            "Resume from the last checkpoint with a lower optim.lr or other data"
        )
    engine.scheduler.step(1)
    count = global_sum(losses.count)
    for chunk in engine.chunks:
        model: Nemotron = chunk.module
        names = router_names(model.config)
        for name, router in model.routers().items():
            router.update_bias(count[names.index(name)])
    return grad_norm, count
