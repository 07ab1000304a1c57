"""Bytes that a rank sends to others in one training step, by axis and purpose, from the config.

Among n ranks, with `size` the bytes of the whole, a rank sends

    all-gather, reduce-scatter    size (n - 1) / n        whole: the gathered, the summed tensor
    all-to-all                    size (n - 1) / n        whole: what a rank hands in
    all-reduce                    2 size (n - 1) / n      a reduce-scatter and an all-gather
    point to point                size

Routing is taken as even; over all ranks together what the dispatch hands in is the same for any
routing. The dispatcher is "alltoall": the fused ones send less. Left out: numbers of a few bytes,
and what is exchanged at the start, in validation and to log. docs/parallelism.md has the formulas
in one table.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from nemomodel.config.pattern import LayerKind
from nemomodel.model.count import router_biases
from nemomodel.model.portion import FP32, FP64, INT64, Portion
from nemomodel.parallel.stage import Stage

Traffic = dict[str, dict[str, float]]
"""Axis -> purpose -> bytes."""


class Exchange(NamedTuple):
    """One collective."""

    axis: str
    purpose: str
    size: int
    """Bytes of the whole; twice those of an all-reduce."""
    backward: bool = True
    """Whether gradients go the way back, in as many bytes."""
    again: bool = True
    """Whether recomputation repeats it: not what nothing kept for the backward pass follows."""


def step_traffic(portion: Portion, stages: Sequence[Stage]) -> Traffic:
    """Of a rank that has `stages`, but for axes of one rank.

    Axes: tp_cp is tp and cp together, dp the ranks that share weights (data parallel times cp),
    expert_dp those that share experts, all is every rank.
    """
    recomputed = {LayerKind[name.upper()] for name in portion.config.train.recompute}
    sizes: Counter[tuple[str, str]] = Counter()

    def add(exchange: Exchange, times: int, recompute: bool) -> None:
        passes = 1 + exchange.backward + (exchange.again and recompute)
        sizes[exchange.axis, exchange.purpose] += times * passes * exchange.size

    for stage in stages:
        for kind in portion.passes(stage):
            for exchange in _mixer(portion, kind):
                add(exchange, portion.micro_batches, kind in recomputed)
        for exchange in _ends(portion, stage):
            add(exchange, portion.micro_batches, False)
    for exchange in _per_step(portion, stages):
        add(exchange, 1, False)

    traffic: Traffic = {}
    for (axis, purpose), size in sizes.items():
        if (n := portion.degree(axis)) > 1 and size:
            traffic.setdefault(axis, {})[purpose] = size * (n - 1) / n
    if neighbours := sum(2 - stage.first - stage.last for stage in stages):
        size = portion.micro_batches * pipeline_bytes(portion) * neighbours
        traffic["pp"] = {"hidden states and embeddings": float(size)}
    return traffic


def pipeline_bytes(portion: Portion) -> int:
    """Of what a stage sends the next for one micro-batch, and gets the gradient of.

    The embeddings travel along where MTP needs them, with those of the tokens that it looks
    ahead to.
    """
    train = portion.config.train
    rows = portion.tokens
    if portion.heads > 1:
        rows += portion.tokens + (portion.heads - 1) * train.micro_batch_size
    return rows * portion.config.model.hidden_size * portion.width


def buffer_elements(elements: list[int], ranks: int) -> int:
    """Of megatron-core's buffer of parameters, which `ranks` cut evenly.

    Parameters begin at multiples of 64 elements; the end is one of 128 and of the ranks. With
    overlap_grad_reduce the first stage cuts it into buckets, each with such an end.
    Source: core/optimizer/param_layout.py of megatron-core 0.19.2.
    """
    aligned = sum(_up(n, 64) for n in elements)
    return _up(aligned, math.lcm(ranks, 128))


def _mixer(portion: Portion, kind: LayerKind) -> Iterator[Exchange]:
    """The forward pass of one micro-batch through the mixer of one block."""
    hidden = portion.gathered * portion.config.model.hidden_size * portion.width
    yield Exchange("tp", "gather positions", hidden)
    yield Exchange("tp", "scatter positions", hidden, again=False)
    if kind is LayerKind.MAMBA:
        inner, state, heads = portion.mamba_widths()
        yield from _heads(portion, inner + state + heads, inner)
    elif kind is LayerKind.ATTENTION:
        yield from _attention(portion)
    elif kind is LayerKind.MOE:
        yield from _experts(portion)


def _heads(portion: Portion, channels: int, inner: int) -> Iterator[Exchange]:
    """Positions for heads, and back: `channels` of a rank go in, `inner` come out."""
    positions = portion.gathered * portion.config.parallel.cp  # of the whole sequences
    yield Exchange("cp", "positions to heads", positions * channels * portion.width)
    yield Exchange("cp", "heads to positions", positions * inner * portion.width)


def _attention(portion: Portion) -> Iterator[Exchange]:
    attention = portion.config.model.attention
    assert attention is not None
    q, kv = portion.attention_widths()
    yield from _heads(portion, q + kv, q)
    if not portion.kv_cut:
        width = 2 * attention.num_kv_heads * attention.head_dim
        yield Exchange("tp", "gather keys and values", portion.gathered * width * portion.width)


def _experts(portion: Portion) -> Iterator[Exchange]:
    """Token copies at the width the experts work at, FP32 gates, INT64 counts per expert."""
    moe, p = portion.config.model.moe, portion.config.parallel
    assert moe is not None
    copies = portion.tokens * moe.top_k
    size = copies * (moe.latent_size or portion.config.model.hidden_size) * portion.width
    load = portion.config.train.micro_batch_size * moe.num_experts
    yield Exchange("tp_cp", "router loads", 2 * load * FP32, backward=False)
    # Every rank of etp hands in its own copies, or gets the sum of its own, etp times.
    for axis, times in (("ep", 1), ("etp", p.etp)):
        yield Exchange(axis, "tokens to experts", times * size)
        yield Exchange(axis, "gates", times * copies * FP32)
        yield Exchange(axis, "experts to tokens", times * size)
        yield Exchange(axis, "counts", times * moe.num_experts * INT64, backward=False)


def _ends(portion: Portion, stage: Stage) -> Iterator[Exchange]:
    """Embedding and heads, for one micro-batch."""
    train, p = portion.config.train, portion.config.parallel
    row = portion.config.model.hidden_size * portion.width
    if stage.first:
        ahead = (portion.heads - 1) * train.micro_batch_size * p.tp
        yield Exchange("tp", "embeddings", (portion.gathered + ahead) * row)
    if stage.last:
        yield Exchange("tp", "hidden states to the head", portion.heads * portion.gathered * row)
        # Of every token the largest logit, the sum of exponentials and the logit of the label.
        sums = 3 * portion.heads * portion.gathered * FP32
        yield Exchange("tp", "cross-entropy", 2 * sums, backward=False)


def _per_step(portion: Portion, stages: Sequence[Stage]) -> Iterator[Exchange]:
    """Gradients, weights and counts."""
    load = sum(router_biases(portion.config.model).values())
    yield Exchange("all", "tokens per expert", 2 * load * INT64, backward=False)
    # And whether a rank wants to stop.
    yield Exchange("all", "targets", 2 * (portion.heads + 1) * FP64, backward=False)
    held = [list(portion.parameters(stage)) for stage in stages]
    everything = list(chain.from_iterable(held))
    uncut = sum(p.elements for p in everything if not p.cut and not p.expert)
    yield Exchange("tp", "gradients of uncut parameters", 2 * uncut * FP32, backward=False)
    for parameters in held:
        for axis, expert in (("dp", False), ("expert_dp", True)):
            for width in sorted({portion.width, FP32}):
                buffer = buffer_elements(
                    [p.elements for p in parameters if (p.expert, p.bytes_each) == (expert, width)],
                    portion.degree(axis),
                )
                yield Exchange(axis, "gradients", buffer * FP32, backward=False)
                yield Exchange(axis, "weights", buffer * width, backward=False)


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
