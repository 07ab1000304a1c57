"""Linear head and cross-entropy in chunks of tokens: no whole logits, no second pass."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nemomodel.ops.precision import accumulator
from nemomodel.ops.product import add_product, product
from nemomodel.ops.wgrad import deliver_grad

CHUNK_TOKENS = {"cpu": 256, "cuda": 2048}
"""Tokens whose FP32 logits exist at one time: a CPU's fit its cache, a GPU's fill its cores."""

CPU_NARROW_TOKENS = 1024
"""Tokens whose narrow logits exist at one time on a CPU, where adding a narrow product to the wide
gradient of the head takes two passes over its size."""


class Targets(NamedTuple):
    """What one head is to predict from hidden_TD."""

    hidden_TD: Tensor
    label_T: Tensor
    """int64 token ids."""
    weight_T: Tensor
    """Factor of each token's cross-entropy in the total; 0 where there is no target."""


class VocabShard(NamedTuple):
    """The rows of the head that this rank has; the ranks of `group` have the others."""

    first: int
    group: dist.ProcessGroup


def linear_cross_entropy(
    heads: list[Targets], weight: Tensor, shard: VocabShard | None = None
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropy of several hidden states under one head `weight` [V, D].

    Args:
        shard: where `weight` is a part of the head, and every rank has the same hidden states.
            Gradients of the hidden states are then this rank's part of a sum over ranks.

    Returns:
        total: sum of weight_T * cross-entropy over all heads (scalar, differentiable with
            respect to the hidden states and the head weight);
        sums: unweighted sum of the cross-entropy where weight_T is not 0, one per head.

    The gradients are formed in the forward pass, while a chunk's probabilities exist. The head
    gradient is summed in FP32 over chunks and heads, so small MTP terms are not lost to rounding.
    """
    hiddens = [head.hidden_TD for head in heads]
    labels = [head.label_T for head in heads]
    weights = [head.weight_T for head in heads]
    # Inside a Function gradients are always off, and needs_input_grad ignores no_grad.
    with_grad = torch.is_grad_enabled()
    return _LinearCrossEntropy.apply(weight, labels, weights, shard, with_grad, *hiddens)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, labels, weights, shard, with_grad, *hiddens):
        wide, rows = accumulator(weight.dtype), _rows(weight)
        chunk = CHUNK_TOKENS[weight.device.type]
        need_hidden = with_grad and any(ctx.needs_input_grad[5:])
        need_weight = with_grad and ctx.needs_input_grad[0]
        need_grad, dw = need_hidden or need_weight, None
        d_hiddens = [torch.empty_like(h) if need_hidden else None for h in hiddens]
        sums = torch.zeros(len(hiddens), dtype=wide, device=weight.device)
        total = torch.zeros((), dtype=wide, device=weight.device)
        for i, hidden in enumerate(hiddens):
            for start in range(0, len(hidden), rows):
                these = slice(start, start + rows)
                h, label, factor = hidden[these], labels[i][these], weights[i][these].to(wide)
                logits = product(h, weight.T)
                by_chunk = (t.split(chunk) for t in (logits, label, factor))
                for logits_c, label_c, factor_c in zip(*by_chunk, strict=True):
                    loss = _cross_entropy(logits_c, label_c, factor_c, shard, need_grad)
                    sums[i] += loss.sum()
                    total += loss @ factor_c
                d_logits = logits  # which they have become
                if need_hidden:
                    d_hiddens[i][these] = product(d_logits, weight)
                if need_weight:
                    dw = _add_product(dw, d_logits.T, h)
        if need_weight and dw is None:
            dw = torch.zeros_like(weight)
        ctx.weight = weight
        ctx.save_for_backward(dw, *d_hiddens)
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    def backward(ctx, d_total, _):
        dw, *d_hiddens = ctx.saved_tensors
        d_weight = None if dw is None else deliver_grad(ctx.weight, dw, d_total)
        scaled = (d * d_total.to(d.dtype) if d is not None else None for d in d_hiddens)
        return d_weight, None, None, None, None, *scaled


def _rows(weight: Tensor) -> int:
    """Tokens whose logits exist at one time in the dtype of `weight`."""
    if weight.is_cuda or weight.dtype == accumulator(weight.dtype):
        return CHUNK_TOKENS[weight.device.type]
    return CPU_NARROW_TOKENS


def _cross_entropy(
    logits_TV: Tensor, label_T: Tensor, factor_T: Tensor, shard: VocabShard | None, need_grad: bool
) -> Tensor:
    """The cross-entropy of each token, in the dtype of its factor, and 0 where that is 0.

    Overwrites the logits: where gradients are needed, by that of the weighted sum.
    """
    label = label_T.masked_fill(factor_T == 0, 0)  # may be a filler like -100
    label, here = _own_rows(label, logits_TV.shape[1], shard)
    logits = logits_TV.to(factor_T.dtype)
    at_label = logits.gather(-1, label) * here
    top = logits.amax(-1, keepdim=True)
    if shard:
        dist.all_reduce(top, op=dist.ReduceOp.MAX, group=shard.group)
    exp = logits.sub_(top).exp_()
    norm = exp.sum(-1, keepdim=True)
    if shard:
        norm, at_label = _sum_ranks(norm, at_label, shard)
    if need_grad:
        factor = factor_T.unsqueeze(-1)
        logits_TV.copy_(exp.mul_(factor / norm).scatter_add_(-1, label, -factor * here))
    return (norm.log() + top - at_label).squeeze(-1).masked_fill_(factor_T == 0, 0)


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b, wide from the second product on."""
    if total is None:
        return product(a, b)
    total = total.to(accumulator(a.dtype))
    add_product(total, a, b)
    return total


def _own_rows(
    label_T: Tensor, num_rows: int, shard: VocabShard | None
) -> tuple[Tensor, Tensor | float]:
    """[T, 1] the row of each label on this rank, and where it is on this rank at all."""
    label_T1 = label_T.unsqueeze(-1)
    if shard is None:
        return label_T1, 1.0
    label_T1 = label_T1 - shard.first
    here = (label_T1 >= 0) & (label_T1 < num_rows)
    return label_T1.masked_fill(~here, 0), here


def _sum_ranks(a: Tensor, b: Tensor, shard: VocabShard) -> tuple[Tensor, ...]:
    both = torch.stack([a, b])
    dist.all_reduce(both, group=shard.group)
    return both.unbind()
