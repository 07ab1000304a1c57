"""Rules of the parallel layout. Each yields one sentence per problem, as in `checks`."""

import math
from collections.abc import Iterator

from nemomodel.config.pattern import CUT, LayerKind
from nemomodel.config.precision import phases, places
from nemomodel.config.recipe import Role
from nemomodel.config.schema import Config

DEEPEP_TOP_K = 32
"""One lane of a warp per expert: EP_DEVICE_ASSERT(num_topk <= 32) in the kernels of DeepEP."""

SMALLEST_BLOCK, LARGEST_BLOCK = 16, 32
"""Elements that share a scale in NVFP4, and in MXFP8."""


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
    if not recipes:
        return
    yield from _blocks(config)
    if shared == 1:
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
            f"train.seq_length * train.micro_batch_size that {LARGEST_BLOCK * shared} divides"
        )


def _blocks(config: Config) -> Iterator[str]:
    """A block of a quantised weight, or of what it makes, must not lie on two ranks."""
    blocks: dict[Role, int] = {}
    for phase in phases(config):
        for place in places(config.model):
            if format := phase.format(place):
                block = LARGEST_BLOCK if "mxfp8" in format else SMALLEST_BLOCK
                blocks[place.role] = max(block, blocks.get(place.role, 0))
    for role, block in sorted(blocks.items()):
        name, widths = _cut_widths(config, role)
        ranks = getattr(config.parallel, name)
        if any(width % ranks == 0 and width // ranks % block for width in widths):
            good = [n for n in range(1, 65) if all(w % (n * block) == 0 for w in widths)]
            shown = f"use {name} in {{{', '.join(map(str, good))}}}, or" if good else "use"
            yield (
                f"parallel.{name}={ranks} cuts {role} into pieces of "
                f"{min(width // ranks for width in widths)}, whose blocks have {block}; {shown} a "
                "recipe that does not quantise it"
            )


def _cut_widths(config: Config, role: Role) -> tuple[str, list[int]]:
    """The axis that cuts a linear layer, and the widths of its parts that are cut; [] if none."""
    model = config.model
    mamba, attention, moe = model.mamba, model.attention, model.moe
    if role in (Role.EXPERT_FC1, Role.EXPERT_FC2) and moe:
        return "etp", [moe.ffn_size] if config.parallel.etp > 1 else []
    if config.parallel.tp == 1:
        return "tp", []
    widths: list[int] = []
    if role in (Role.MAMBA_IN, Role.MAMBA_OUT) and mamba:
        widths = [mamba.num_heads * mamba.head_dim]
        if role is Role.MAMBA_IN:
            widths += [mamba.num_groups * mamba.state_size, mamba.num_heads]
    elif role in (Role.ATTENTION_QKV, Role.ATTENTION_OUT) and attention:
        widths = [attention.num_heads * attention.head_dim]
        if role is Role.ATTENTION_QKV and attention.num_kv_heads % config.parallel.tp == 0:
            widths += [attention.num_kv_heads * attention.head_dim]
    elif role in (Role.SHARED_FC1, Role.SHARED_FC2) and moe:
        widths = [moe.shared_ffn_size]
    elif role in (Role.MLP_FC1, Role.MLP_FC2) and model.ffn_size:
        widths = [model.ffn_size]
    return "tp", widths


def layout_rank_problems(config: Config, world_size: int) -> Iterator[str]:
    """Rules that need the number of ranks."""
    p, fewest = config.parallel, fewest_ranks(config)
    dense, expert = p.tp * p.cp * p.pp, p.etp * p.ep * p.pp
    for name, ranks in (("tp*cp*pp", dense), ("etp*ep*pp", expert)):
        if world_size % ranks:
            yield (
                f"parallel: {name}={ranks} does not divide WORLD_SIZE={world_size}; "
                f"use a multiple of {fewest} ranks, or a smaller product"
            )


def fewest_ranks(config: Config) -> int:
    """The smallest number of ranks that the degrees of `config.parallel` allow."""
    p = config.parallel
    return p.pp * math.lcm(p.tp * p.cp, p.etp * p.ep)


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
