"""config.json of a nemotron_h folder, from and to `ModelConfig`: the same tables both ways.

Keys that mean nothing to the model (rope_theta, sliding_window, token ids, ...) are not looked
at. `time_step_min` is the range of initial values only: the published model does not clamp dt,
although transformers 5.23 does.
"""

import json
import math
from typing import Any

from nemomodel.config.load import ConfigError, parse_model
from nemomodel.config.pattern import LayerKind
from nemomodel.config.schema import ModelConfig

REQUIRED = object()

MODEL = {
    "hidden_size": ("hidden_size", REQUIRED),
    "vocab_size": ("vocab_size", REQUIRED),
    "layer_norm_epsilon": ("norm_eps", 1e-5),
    "initializer_range": ("init_std", 0.02),
}
"""Published key -> ours, and the value that transformers takes where the key is missing."""

SECTIONS = {
    LayerKind.MAMBA: {
        "mamba_num_heads": ("num_heads", REQUIRED),
        "mamba_head_dim": ("head_dim", REQUIRED),
        "n_groups": ("num_groups", REQUIRED),
        "ssm_state_size": ("state_size", REQUIRED),
        "conv_kernel": ("conv_kernel", 4),
        "chunk_size": ("chunk_size", 128),
    },
    LayerKind.ATTENTION: {
        "num_attention_heads": ("num_heads", REQUIRED),
        "num_key_value_heads": ("num_kv_heads", REQUIRED),
        "head_dim": ("head_dim", REQUIRED),
    },
    LayerKind.MOE: {
        "n_routed_experts": ("num_experts", REQUIRED),
        "num_experts_per_tok": ("top_k", REQUIRED),
        "moe_intermediate_size": ("ffn_size", REQUIRED),
        "moe_shared_expert_intermediate_size": ("shared_ffn_size", REQUIRED),
        "moe_latent_size": ("latent_size", None),
        "n_group": ("num_groups", 1),
        "topk_group": ("top_groups", 1),
        "routed_scaling_factor": ("routed_scaling_factor", 1.0),
        "norm_topk_prob": ("normalize_gates", True),
    },
}
"""Sections of ModelConfig by the kind of layer that needs them."""

NAMES = {LayerKind.MAMBA: "mamba", LayerKind.ATTENTION: "attention", LayerKind.MOE: "moe"}

FIXED = {
    "model_type": "nemotron_h",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "use_bias": False,
    "mamba_proj_bias": False,
    "use_conv_bias": True,
    "mlp_hidden_act": "relu2",
    "mamba_hidden_act": "silu",
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "residual_in_fp32": False,
    # The one shared expert has the whole width; vLLM multiplies the two.
    "n_shared_experts": 1,
}
"""What our model always is. Written always; on input another value is an error."""

ABSENT = {
    "scoring_func": ("sigmoid",),
    "logits_scaling": (1,),
    "first_k_dense_replace": (0,),
}
"""Keys of other architectures, and the values that change nothing here."""

MAX_SIZE, MAX_COUNT, MAX_MTP_BLOCKS = 2**20, 2**16, 64
"""Of any width, of heads or experts, of MTP blocks: far above every known model."""

ALIASES = {
    "layer_types": "layers_block_type",
    "mtp_layer_types": "mtp_layers_block_type",
    "num_local_experts": "n_routed_experts",
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_chunk_size": "chunk_size",
    "mamba_dt_limit": "time_step_limit",
}
"""Other spellings that transformers reads."""

LETTERS = {
    "linear_attention": "M",
    "mamba": "M",
    "full_attention": "*",
    "attention": "*",
    "moe": "E",
    "mlp": "-",
}

NOT_WRITTEN = {
    *ALIASES,
    # Pattern strings say it; transformers refuses both where they differ, older readers the lists.
    "layers_block_type",
    "mtp_layers_block_type",
    "time_step_limit",  # Infinity is no JSON; without the key there is no limit
    "auto_map",  # the remote code is not shipped
    "torch_dtype",
    "transformers_version",
    "norm_eps",
    "quantization_config",
}


def model_config(raw: dict[str, Any], *, where: str) -> ModelConfig:
    """The model that a config.json describes.

    Args:
        raw: its content; where: its path, for messages.

    Raises:
        ConfigError: with every key that is missing, contradicts another, or asks for what our
            model cannot do.
    """
    found: list[str] = []
    raw = _without_aliases(raw, found)
    found += [
        f"{key}={_json(raw[key])}: this model has {_json(value)} there only"
        for key, value in FIXED.items()
        if key in raw and raw[key] != value
    ]
    if "model_type" not in raw:
        found.append('model_type: missing; "nemotron_h" is what can be read')
    architectures = raw.get("architectures")
    if architectures is not None and not _has_ours(architectures):
        found.append(
            f"architectures={_json(architectures)}: NemotronHForCausalLM is what can be read"
        )
    eps = 1e-5 if raw.get("layer_norm_epsilon") is None else raw["layer_norm_epsilon"]
    found += [
        f"{key}={_json(raw[key])}: asks for what this model does not have"
        for key, values in (ABSENT | {"rms_norm_eps": (eps,)}).items()
        if raw.get(key) is not None and raw[key] not in values
    ]
    if not _no_limit(raw.get("time_step_limit")):
        found.append(f"time_step_limit={_json(raw['time_step_limit'])}: only [0, inf] can be read")
    if "norm_eps" in raw and raw["norm_eps"] != eps:
        found.append("norm_eps and layer_norm_epsilon differ; only one epsilon is used")
    pattern, mtp = _patterns(raw, found)
    model: dict[str, Any] = {"layer_pattern": pattern, **_section(raw, MODEL, found)}
    blocks = raw.get("num_nextn_predict_layers") or 0
    if type(blocks) is int and blocks > MAX_MTP_BLOCKS:
        found.append(f"num_nextn_predict_layers={blocks}: at most {MAX_MTP_BLOCKS} can be read")
    if blocks:
        # One block may serve any number of depths; how many it was trained for is not said.
        model["mtp"] = {"num_depths": blocks, "layer_pattern": mtp, "shared": blocks == 1}
    used = pattern + (mtp if blocks else "")
    for kind, keys in SECTIONS.items():
        if kind.value in used:
            model[NAMES[kind]] = _section(raw, keys, found)
    if LayerKind.MLP.value in used:
        model |= _section(raw, {"intermediate_size": ("ffn_size", REQUIRED)}, found)
    if found:
        count = f"{len(found)} problem{'s' if len(found) > 1 else ''}"
        raise ConfigError("\n  ".join([f"{where}: {count}", *found]))
    return parse_model(model, where=where)


def config_json(
    model: ModelConfig, *, vocab_size: int, dtype: str, carried: dict[str, Any]
) -> dict[str, Any]:
    """The published config.json of a model.

    Args:
        vocab_size: rows of the embedding without padding.
        dtype: "bfloat16" or "float32".
        carried: the config.json that the model came with, or values for keys that our model does
            not know; the model's own values win. What is no JSON (Infinity, NaN) is left out.

    Raises:
        ConfigError: `model.mamba.dt_min` is not 0, which no key says.
    """
    if model.mamba and model.mamba.dt_min:
        raise ConfigError(
            f"model.mamba.dt_min={model.mamba.dt_min}: a nemotron_h folder cannot say that dt is "
            "clamped; only 0 can be exported"
        )
    raw = {k: v for k, v in carried.items() if k not in NOT_WRITTEN and _is_json(v)}
    raw |= {"architectures": ["NemotronHForCausalLM"], "dtype": dtype, **FIXED}
    raw |= {key: getattr(model, ours) for key, (ours, _) in MODEL.items()}
    raw["vocab_size"] = vocab_size
    raw["hybrid_override_pattern"] = model.letters
    raw["num_hidden_layers"] = len(model.layers)
    raw["num_nextn_predict_layers"] = model.num_mtp_blocks
    raw.pop("mtp_hybrid_override_pattern", None)
    if model.mtp:
        raw["mtp_hybrid_override_pattern"] = model.mtp.layer_pattern
    for kind, keys in SECTIONS.items():
        if section := getattr(model, NAMES[kind]):
            raw |= {key: getattr(section, ours) for key, (ours, _) in keys.items()}
    if model.ffn_size is not None:
        raw["intermediate_size"] = model.ffn_size
    return raw


def _without_aliases(raw: dict[str, Any], found: list[str]) -> dict[str, Any]:
    raw = dict(raw)
    for alias, key in ALIASES.items():
        if alias not in raw:
            continue
        value = raw.pop(alias)
        if raw.setdefault(key, value) != value:
            found.append(f"{alias}={_json(value)}: {key} is {_json(raw[key])}; give one of them")
    return raw


def _section(raw: dict[str, Any], keys: dict[str, Any], found: list[str]) -> dict[str, Any]:
    section = {}
    for key, (ours, default) in keys.items():
        value = raw.get(key)
        if value is None:  # null groups and latent widths mean none, as a missing key does
            value = default
        if value is REQUIRED:
            found.append(f"{key}: missing")
        elif isinstance(value, float) and not math.isfinite(value):
            found.append(f"{key}={value}: is not finite")
        elif type(value) is int and value > (limit := _limit(key)):
            found.append(f"{key}={value}: at most {limit} can be read")
        elif value is not None:
            section[ours] = value
    return section


def _limit(key: str) -> int:
    return MAX_COUNT if key.startswith(("n_", "num_", "mamba_num_")) else MAX_SIZE


def _has_ours(architectures: Any) -> bool:
    return isinstance(architectures, list) and any(
        isinstance(name, str) and name.startswith("NemotronH") for name in architectures
    )


def _patterns(raw: dict[str, Any], found: list[str]) -> tuple[str, str]:
    """Letters of the backbone, and of one MTP block ("*E" where the config does not say)."""
    main, *depths = _letters(raw, "hybrid_override_pattern", "layers_block_type", found).split("/")
    mtp = _letters(raw, "mtp_hybrid_override_pattern", "mtp_layers_block_type", found)
    if len({*depths, *([mtp] if mtp else [])}) > 1:
        found.append(f"hybrid_override_pattern: its MTP parts are not {mtp or 'equal'}")
    if not main:
        found.append("hybrid_override_pattern: missing, and so is layers_block_type")
    layers = raw.get("num_hidden_layers")
    if layers is not None and main and layers != len(main):
        found.append(f"num_hidden_layers={_json(layers)}: the pattern has {len(main)} layers")
    return main, mtp or (depths[0] if depths else "*E")


def _letters(raw: dict[str, Any], string_key: str, list_key: str, found: list[str]) -> str:
    """The pattern of one or both keys; `|` marks borders of pipeline stages only."""
    string, names = raw.get(string_key), raw.get(list_key)
    if string is not None and not isinstance(string, str):
        found.append(f"{string_key}={_json(string)}: is not a string")
    string = string.replace("|", "") if isinstance(string, str) else ""
    if names is None:
        return string
    if not isinstance(names, list):
        found.append(f"{list_key}={_json(names)}: is not a list")
        return string
    known = tuple(LETTERS)  # a tuple compares even what is not hashable
    unknown = [n for n in names if n not in known]
    if unknown:
        found.append(f"{list_key}: {_json(unknown[0])} is none of {', '.join(LETTERS)}")
        return string
    letters = "".join(LETTERS[name] for name in names)
    if string and string.split("/")[0] != letters:
        found.append(f"{list_key} and {string_key} differ; give one of them")
    return letters


def _no_limit(limit: Any) -> bool:
    """Whether a time_step_limit is none: null or [0, inf], infinity in any spelling."""
    if isinstance(limit, list | tuple) and len(limit) == 2:
        low, high = limit
        if isinstance(high, dict):  # as transformers writes it
            high = high.get("__float__")
        return low == 0 and str(high).lower() in ("inf", "infinity")
    return limit is None


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except ValueError:
        return False
    return True


def _json(value: Any) -> str:
    return json.dumps(value, default=str)
