"""Rules that join several config values. Each yields one sentence per problem:

key = value: what is wrong; what would be right.
"""

from collections.abc import Iterator

from nemomodel.config import precision
from nemomodel.config.layout import layout_problems, layout_rank_problems
from nemomodel.config.pattern import LayerKind, parse_pattern
from nemomodel.config.schema import Config, ModelConfig


def problems(config: Config) -> Iterator[str]:
    """Every rule that `config` breaks by itself (the number of ranks is checked at launch)."""
    yield from model_problems(config.model)
    if not list(_patterns(config.model)):
        yield from _recompute(config)
        yield from layout_problems(config)
        yield from precision.problems(config)
    yield from _train(config)
    yield from _schedule(config)
    yield from _data(config)


def model_problems(model: ModelConfig) -> Iterator[str]:
    """Every rule that the model breaks by itself."""
    yield from list(_patterns(model)) or _model(model)


def rank_problems(config: Config, world_size: int) -> Iterator[str]:
    """Rules that need the number of ranks."""
    p = config.parallel
    if found := list(layout_rank_problems(config, world_size)):
        yield from found
        return
    dp = world_size // (p.tp * p.pp * p.cp)
    micro_batches = config.train.global_batch_size // (config.train.micro_batch_size * dp)
    if p.vpp > 1 and micro_batches % p.pp:
        yield (
            f"parallel.vpp={p.vpp}: the {micro_batches} micro-batches of a rank are not divisible "
            f"by parallel.pp={p.pp}, which interleaving needs; use another "
            "train.global_batch_size or train.micro_batch_size, or parallel.vpp=1"
        )
    per_pass = config.train.micro_batch_size * dp
    if config.train.global_batch_size % per_pass:
        yield (
            f"train.global_batch_size={config.train.global_batch_size} is not divisible by "
            f"train.micro_batch_size={config.train.micro_batch_size} times the {dp} data-parallel "
            f"rank(s) of WORLD_SIZE={world_size}; use a multiple of {per_pass}"
        )


def _patterns(model: ModelConfig) -> Iterator[str]:
    patterns = {"model.layer_pattern": model.layer_pattern}
    if model.mtp:
        patterns["model.mtp.layer_pattern"] = model.mtp.layer_pattern
    for key, pattern in patterns.items():
        try:
            parse_pattern(pattern)
        except ValueError as error:
            yield f"{key}={pattern!r}: {error}"


def _model(model: ModelConfig) -> Iterator[str]:
    used = set(model.layers) | set(model.mtp_layers)
    sections = {
        LayerKind.MAMBA: ("model.mamba", model.mamba),
        LayerKind.ATTENTION: ("model.attention", model.attention),
        LayerKind.MOE: ("model.moe", model.moe),
        LayerKind.MLP: ("model.ffn_size", model.ffn_size),
    }
    for kind, (key, value) in sections.items():
        if kind in used and value is None:
            yield f"{key} is missing: the layer pattern has {kind.value!r}; give {key}"
        if kind not in used and value is not None:
            yield f"{key} has no effect: no layer pattern has {kind.value!r}; remove {key}"
    if mamba := model.mamba:
        yield from _divides(
            "model.mamba.num_heads", mamba.num_heads, "model.mamba.num_groups", mamba.num_groups
        )
    if attention := model.attention:
        yield from _divides(
            "model.attention.num_heads",
            attention.num_heads,
            "model.attention.num_kv_heads",
            attention.num_kv_heads,
        )
    if moe := model.moe:
        if moe.top_k > moe.num_experts:
            yield (
                f"model.moe.top_k={moe.top_k} is more than model.moe.num_experts="
                f"{moe.num_experts}; use at most {moe.num_experts}"
            )
        if moe.latent_size is not None and moe.latent_size >= model.hidden_size:
            yield (
                f"model.moe.latent_size={moe.latent_size} is not below model.hidden_size="
                f"{model.hidden_size}; use a smaller one, or none for the plain MoE"
            )
        if moe.num_experts % moe.num_groups:
            yield from _divides(
                "model.moe.num_experts", moe.num_experts, "model.moe.num_groups", moe.num_groups
            )
        elif moe.top_groups > moe.num_groups:
            yield (
                f"model.moe.top_groups={moe.top_groups} is more than model.moe.num_groups="
                f"{moe.num_groups}; use at most {moe.num_groups}"
            )
        elif moe.num_groups > 1 and moe.top_k > (
            reach := moe.top_groups * moe.num_experts // moe.num_groups
        ):
            yield (
                f"model.moe.top_k={moe.top_k} is more than the {reach} experts of "
                f"model.moe.top_groups={moe.top_groups} groups; use at most {reach}"
            )
        elif moe.num_groups > 1 and moe.num_experts // moe.num_groups < 2:
            yield (
                f"model.moe.num_groups={moe.num_groups} leaves one expert per group, groups are "
                f"ranked by their best two; use at most {moe.num_experts // 2}"
            )


def _recompute(config: Config) -> Iterator[str]:
    used = {kind.name.lower() for kind in (*config.model.layers, *config.model.mtp_layers)}
    for name in config.train.recompute:
        if name not in used:
            yield (
                f"train.recompute={name!r} has no effect: the model has no such layer; "
                f"use some of {', '.join(sorted(used))}"
            )


def _train(config: Config) -> Iterator[str]:
    train = config.train
    yield from _divides(
        "train.global_batch_size",
        train.global_batch_size,
        "train.micro_batch_size",
        train.micro_batch_size,
    )
    if train.stop_after is not None and train.stop_after > train.steps:
        yield (
            f"train.stop_after={train.stop_after} is more than train.steps={train.steps}; "
            f"use at most {train.steps}"
        )
    if config.model.mtp and config.model.mtp.num_depths >= train.seq_length:
        yield (
            f"model.mtp.num_depths={config.model.mtp.num_depths} is not below train.seq_length="
            f"{train.seq_length}; no token that far ahead is in a sequence"
        )


def _schedule(config: Config) -> Iterator[str]:
    schedule, steps = config.schedule, config.train.steps
    if config.optim.min_lr > config.optim.lr:
        yield (
            f"optim.min_lr={config.optim.min_lr} is more than optim.lr={config.optim.lr}; "
            "use a smaller one"
        )
    if schedule.kind == "constant" and config.optim.min_lr:
        yield "optim.min_lr has no effect with schedule.kind='constant'; remove it"
    if schedule.kind != "wsd" and schedule.decay_steps is not None:
        yield (
            f"schedule.decay_steps={schedule.decay_steps} has no effect with schedule.kind="
            f"{schedule.kind!r}; remove it, or use 'wsd'"
        )
    if schedule.kind == "wsd" and schedule.decay_steps is None:
        yield f"schedule.decay_steps is missing; with schedule.kind='wsd' use 1 to {steps}"
    total = schedule.warmup_steps + (schedule.decay_steps or 0)
    if total > steps:
        yield (
            f"schedule.warmup_steps={schedule.warmup_steps} plus schedule.decay_steps="
            f"{schedule.decay_steps or 0} is more than train.steps={steps}; use {steps} or less"
        )


def _data(config: Config) -> Iterator[str]:
    data = config.data
    if not data.train and data.validation:
        yield "data.validation is given without data.train; give both or neither"
    if not data.train and data.tokenizer is not None:
        yield (
            f"data.tokenizer={data.tokenizer!r} has no effect: the embedded corpus trains its "
            "own; give data.train, or remove it"
        )
    if data.train and not data.validation and config.train.validation_interval is not None:
        yield (
            f"train.validation_interval={config.train.validation_interval} has no effect: "
            "data.validation is empty; give data.validation, or remove it"
        )


def _divides(key: str, value: int, by_key: str, by: int) -> Iterator[str]:
    if value % by:
        divisors = [n for n in range(1, value + 1) if value % n == 0]
        yield (
            f"{key}={value} is not divisible by {by_key}={by}; "
            f"use {by_key} in {{{', '.join(map(str, divisors))}}}"
        )
