"""Linear head and cross-entropy in chunks of tokens: no whole logits, no second pass."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nemomodel.ops.precision import accumulator
from nemomodel.ops.product import add_product, product
from nemomodel.ops.wgrad import accumulate_grad

CHUNK_TOKENS = {"cpu": 256, "cuda": 2048}
"""Tokens whose FP32 logits exist at one time: a CPU's fit its cache, a GPU's fill its cores."""


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
        wide = accumulator(weight.dtype)
        chunk = CHUNK_TOKENS[weight.device.type]
        need_hidden = with_grad and any(ctx.needs_input_grad[5:])
        need_weight = with_grad and ctx.needs_input_grad[0]
        dw = torch.zeros_like(weight, dtype=wide) if need_weight else None
        d_hiddens = [torch.empty_like(h) if need_hidden else None for h in hiddens]
        sums = torch.zeros(len(hiddens), dtype=wide, device=weight.device)
        total = torch.zeros((), dtype=wide, device=weight.device)
        for i, hidden in enumerate(hiddens):
            for start in range(0, len(hidden), chunk):
                part = slice(start, start + chunk)
                h, factor = hidden[part], weights[i][part].to(wide)
                label = labels[i][part].masked_fill(factor == 0, 0)  # may be a filler like -100
                logits = product(h, weight.T).to(wide)
                label, here = _own_rows(label, len(weight), shard)
                at_label = logits.gather(-1, label) * here
                top = logits.amax(-1, keepdim=True)
                if shard:
                    dist.all_reduce(top, op=dist.ReduceOp.MAX, group=shard.group)
                exp = logits.sub_(top).exp_()
                norm = exp.sum(-1, keepdim=True)
                if shard:
                    norm, at_label = _sum_ranks(norm, at_label, shard)
                loss = (norm.log() + top - at_label).squeeze(-1).masked_fill_(factor == 0, 0)
                sums[i] += loss.sum()
                total += loss @ factor
                if not (need_hidden or need_weight):
                    continue
                factor = factor.unsqueeze(-1)
                d_logits = exp.mul_(factor / norm).scatter_add_(-1, label, -factor * here)
                d_logits = d_logits.to(h.dtype)
                if need_hidden:
                    d_hiddens[i][part] = product(d_logits, weight)
                if need_weight:
                    add_product(dw, d_logits.T, h)
        ctx.weight = weight
        ctx.save_for_backward(dw, *d_hiddens)
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    def backward(ctx, d_total, _):
        dw, *d_hiddens = ctx.saved_tensors
        d_weight = None
        if dw is not None:
            d_weight = accumulate_grad(ctx.weight, lambda grad: grad.addcmul_(dw, d_total))
        scaled = (d * d_total.to(d.dtype) if d is not None else None for d in d_hiddens)
        return d_weight, None, None, None, None, *scaled


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
