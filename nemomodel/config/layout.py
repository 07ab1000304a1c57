"""Rules of the parallel layout. Each yields one sentence per problem, as in `checks`."""

from collections.abc import Iterator

from nemomodel.config.pattern import CUT, LayerKind
from nemomodel.config.schema import Config

DEEPEP_TOP_K = 32
"""One lane of a warp per expert: EP_DEVICE_ASSERT(num_topk <= 32) in the kernels of DeepEP."""

LARGEST_BLOCK = 32
"""Elements that share a scale in MXFP8; 16 in NVFP4."""


def layout_problems(config: Config) -> Iterator[str]:
    """Every rule that `config.parallel` breaks, whatever the number of ranks."""
    p = config.parallel
    yield from _cuts(config)
    yield from _stages(config)
    yield from _experts(config)
    yield from _quantized(config)
    if p.overlap_param_gather and not p.overlap_grad_reduce:
        yield (
            "parallel.overlap_param_gather=true needs parallel.overlap_grad_reduce=true; "
            "set both or neither"
        )


def _quantized(config: Config) -> Iterator[str]:
    """Ranks that share a quantised tensor cut it between blocks, and experts see whole
    micro-batches, or its codes would depend on the layout."""
    p, precision, train = config.parallel, config.precision, config.train
    recipes = {precision.recipe, *(phase.recipe for phase in precision.phases)} - {"bf16", "fp32"}
    shared = p.tp * p.cp
    if not recipes or shared == 1:
        return
    recipe = ", ".join(sorted(recipes))
    if config.model.moe and (p.etp * p.ep) % shared:
        yield (
            f"parallel: etp*ep={p.etp * p.ep} is not a multiple of tp*cp={shared}, which precision "
            f"recipe {recipe} needs: an expert would see parts of a micro-batch; use a multiple of "
            f"{shared}"
        )
    tokens = train.seq_length * train.micro_batch_size
    if train.seq_length % shared == 0 and tokens // shared % LARGEST_BLOCK:
        yield (
            f"parallel: tp*cp={shared} leaves {tokens // shared} tokens of a micro-batch to a "
            f"rank, which precision recipe {recipe} wants in multiples of {LARGEST_BLOCK}; use a "
            "larger train.seq_length or train.micro_batch_size"
        )


def layout_rank_problems(config: Config, world_size: int) -> Iterator[str]:
    """Rules that need the number of ranks."""
    p = config.parallel
    dense, expert = p.tp * p.cp * p.pp, p.etp * p.ep * p.pp
    for name, ranks in (("tp*cp*pp", dense), ("etp*ep*pp", expert)):
        if world_size % ranks:
            yield (
                f"parallel: {name}={ranks} does not divide WORLD_SIZE={world_size}; "
                f"use a multiple of {ranks} ranks, or a smaller product"
            )


def _cuts(config: Config) -> Iterator[str]:
    """What tp and cp cut has to be divisible by them."""
    p, model = config.parallel, config.model
    used = {*model.layers, *model.mtp_layers}
    yield from _cut_by("tp", p.tp, "model.vocab_size", model.vocab_size)
    if LayerKind.MLP in used and model.ffn_size:
        yield from _cut_by("tp", p.tp, "model.ffn_size", model.ffn_size)
    if model.moe:
        yield from _cut_by("tp", p.tp, "model.moe.shared_ffn_size", model.moe.shared_ffn_size)
    if mamba := model.mamba:
        yield from _cut_by("tp*cp", p.tp * p.cp, "model.mamba.num_heads", mamba.num_heads)
        yield from _cut_by("tp", p.tp, "model.mamba.num_groups", mamba.num_groups)
        yield from _shared_heads(config, "model.mamba", mamba.num_heads, mamba.num_groups)
    if attention := model.attention:
        heads, groups = attention.num_heads, attention.num_kv_heads
        yield from _cut_by("tp*cp", p.tp * p.cp, "model.attention.num_heads", heads)
        yield from _shared_heads(config, "model.attention", heads, groups)
    yield from _cut_by("tp*cp", p.tp * p.cp, "train.seq_length", config.train.seq_length)


def _shared_heads(config: Config, section: str, heads: int, groups: int) -> Iterator[str]:
    """Ranks get whole groups of heads, or parts of one."""
    p = config.parallel
    for name, ranks in (("tp", p.tp), ("tp*cp", p.tp * p.cp)):
        if groups % ranks and ranks % groups and heads % ranks == 0:
            key = "num_groups" if section == "model.mamba" else "num_kv_heads"
            yield (
                f"parallel: {name}={ranks} and {section}.{key}={groups} do not divide one "
                f"another; use a divisor or a multiple of {groups}"
            )


def _experts(config: Config) -> Iterator[str]:
    p, moe = config.parallel, config.model.moe
    yield from _dispatcher(config)
    if moe is None:
        for key in ("ep", "etp"):
            if (value := getattr(p, key)) != 1:
                yield f"parallel.{key}={value} has no effect: the model has no experts; use 1"
        return
    yield from _cut_by("ep", p.ep, "model.moe.num_experts", moe.num_experts)
    yield from _cut_by("etp", p.etp, "model.moe.ffn_size", moe.ffn_size)


def _dispatcher(config: Config) -> Iterator[str]:
    p, moe = config.parallel, config.model.moe
    if p.dispatcher == "alltoall":
        return
    precision = config.precision
    recipes = [precision.recipe, *(phase.recipe for phase in precision.phases)]
    key, instead = f"parallel.dispatcher={p.dispatcher!r}", 'use "alltoall"'
    if p.ep * p.etp == 1:
        yield f"{key} has no effect: parallel.ep=1 and parallel.etp=1, no token travels; {instead}"
    elif recipe := next((r for r in recipes if r != "bf16"), None):
        why = "has FP32" if recipe == "fp32" else "quantises every micro-batch apart"
        yield (
            f"{key} mixes BF16 tokens of several micro-batches, precision recipe {recipe} {why}; "
            f"{instead}, or the recipe bf16"
        )
    elif p.dispatcher == "deepep" and moe and moe.top_k * p.etp > DEEPEP_TOP_K:
        yield (
            f"{key} takes {DEEPEP_TOP_K} experts per token, model.moe.top_k={moe.top_k} times "
            f"parallel.etp={p.etp} is more; {instead}, or a smaller parallel.etp"
        )


def _stages(config: Config) -> Iterator[str]:
    p, pattern = config.parallel, config.model.layer_pattern
    name, number = ("pp*vpp", p.pp * p.vpp) if p.vpp > 1 else ("pp", p.pp)
    if p.vpp > 1 and p.pp == 1:
        yield f"parallel.vpp={p.vpp} has no effect with parallel.pp=1; use 1"
    if config.model.mtp and CUT in config.model.mtp.layer_pattern:
        yield (
            f"model.mtp.layer_pattern={config.model.mtp.layer_pattern!r}: MTP is on the last "
            f"pipeline stage; remove the {CUT}"
        )
    if CUT in pattern:
        stages = pattern.split(CUT)
        if not all(stages):
            yield f"model.layer_pattern={pattern!r}: a pipeline stage is empty; remove a {CUT}"
        elif len(stages) != number:
            yield (
                f"model.layer_pattern={pattern!r} has {len(stages)} pipeline stages, parallel."
                f"{name}={number}; use parallel.{name}={len(stages)}, or another number of {CUT}"
            )
    elif number > len(pattern):
        yield (
            f"parallel.{name}={number} is more than the {len(pattern)} blocks of "
            f"model.layer_pattern; use at most {len(pattern)}"
        )


def _cut_by(name: str, ranks: int, key: str, value: int) -> Iterator[str]:
    if value % ranks:
        divisors = [n for n in range(1, min(value, 1024) + 1) if value % n == 0]
        shown = ", ".join(map(str, divisors[:12])) + (", ..." if len(divisors) > 12 else "")
        yield (f"parallel: {name}={ranks} does not divide {key}={value}; use {name} in {{{shown}}}")
