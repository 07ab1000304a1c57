"""config.json to ModelConfig and back."""

import json
import tomllib
from dataclasses import asdict
from pathlib import Path

import pytest

from nemomodel.checkpoint.huggingface.config import FIXED, config_json, model_config
from nemomodel.checkpoint.huggingface.importing import model_toml
from nemomodel.config.load import ConfigError, load_config, parse_model
from nemomodel.config.schema import ModelConfig

CONFIGS = [p.stem for p in sorted(Path("configs").glob("*.toml"))]

# What a folder says beside the model, as in the published Super.
PUBLISHED = {
    "rope_theta": 10000,
    "partial_rotary_factor": 1.0,
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "time_step_floor": 1e-4,
    "norm_eps": 1e-5,
    "moe_shared_expert_overlap": False,
    "max_position_embeddings": 262144,
    "sliding_window": None,
}


def base(**changes: object) -> dict[str, object]:
    model = load_config("configs/tiny.toml", ["model.layer_pattern=ME*-ME"]).model
    raw = config_json(model, vocab_size=2048, dtype="bfloat16", carried=PUBLISHED)
    return {key: value for key, value in (raw | changes).items() if value is not ...}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_survives_the_way_there_and_back(name: str) -> None:
    model = load_config(f"configs/{name}.toml").model
    raw = config_json(model, vocab_size=model.vocab_size, dtype="bfloat16", carried={})
    again = model_config(json.loads(json.dumps(raw)), where=name)
    assert _without_training(again) == _without_training(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_model_toml_can_be_pasted(name: str) -> None:
    model = load_config(f"configs/{name}.toml").model
    raw = tomllib.loads(model_toml(model, "bf16"))
    assert parse_model(raw["model"], where=name) == model
    assert raw["precision"] == {"recipe": "bf16"}


def test_published_style_is_complete() -> None:
    raw = config_json(
        load_config("configs/super_120b.toml").model,
        vocab_size=131072,
        dtype="bfloat16",
        carried=PUBLISHED | {"auto_map": {"AutoConfig": "code.py"}, "layers_block_type": ["moe"]},
    )
    assert raw["model_type"] == "nemotron_h"
    assert raw["architectures"] == ["NemotronHForCausalLM"]
    assert raw["num_hidden_layers"] == len(raw["hybrid_override_pattern"]) == 88
    # One physical block serves both depths: engines refuse 2.
    assert raw["num_nextn_predict_layers"] == 1
    assert raw["mtp_hybrid_override_pattern"] == "*E"
    assert (raw["n_shared_experts"], raw["n_group"], raw["topk_group"]) == (1, 1, 1)
    assert raw["moe_shared_expert_intermediate_size"] == 5376
    assert raw["max_position_embeddings"] == 262144
    assert raw["rope_theta"] == 10000
    assert not raw.keys() & {"auto_map", "layers_block_type", "time_step_limit", "torch_dtype"}
    assert json.loads(json.dumps(raw, allow_nan=False)) == raw


def test_transformers_reads_what_is_written() -> None:
    from transformers import NemotronHConfig

    raw = base()
    config = NemotronHConfig(**raw)
    assert config.hybrid_override_pattern == "ME*-ME"
    assert config.mtp_hybrid_override_pattern == "*E"
    for key in raw.keys() - {"architectures", "dtype"}:
        assert getattr(config, key) == raw[key], key


def test_what_transformers_saves_is_read(tmp_path: Path) -> None:
    from transformers import NemotronHConfig

    raw = base()
    NemotronHConfig(**raw).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "hybrid_override_pattern" not in saved
    assert saved["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    assert model_config(saved, where="saved") == model_config(raw, where="published")


@pytest.mark.parametrize(
    "spelling",
    [
        {"hybrid_override_pattern": "ME*|-ME"},
        {"hybrid_override_pattern": "ME*-ME/*E/*E", "mtp_hybrid_override_pattern": ...},
        {"hybrid_override_pattern": ..., "layer_types": ["mamba", "moe", "attention", "mlp"]},
        {"n_groups": ..., "mamba_n_groups": 2, "chunk_size": ..., "mamba_chunk_size": 64},
        {"conv_kernel": ..., "mamba_d_conv": 4, "use_conv_bias": ..., "mamba_conv_bias": True},
        {"n_routed_experts": ..., "num_local_experts": 8},
        {"n_group": None, "topk_group": None},
        {"time_step_limit": [0.0, float("inf")]},
        {"time_step_limit": [0, "Infinity"]},
        {"conv_kernel": ..., "layer_norm_epsilon": ..., "norm_topk_prob": ...},
        {"scoring_func": "sigmoid", "logits_scaling": 1.0, "first_k_dense_replace": 0},
        {"rms_norm_eps": 1e-5, "architectures": ["NemotronHModel"], "some_new_key": [3]},
        {"num_hidden_layers": None, "mtp_layers_block_type": ["attention", "moe"]},
        {key: ... for key in FIXED if key != "model_type"},
    ],
    ids=lambda spelling: next(iter(spelling)),
)
def test_other_spellings_say_the_same(spelling: dict[str, object]) -> None:
    if "layer_types" in spelling:
        spelling = spelling | {"num_hidden_layers": 4}
        expected = base(hybrid_override_pattern="ME*-", num_hidden_layers=4)
    else:
        expected = base()
    assert model_config(base(**spelling), where="a") == model_config(expected, where="b")


def test_time_step_min_is_no_clamp() -> None:
    assert model_config(base(time_step_min=0.5), where="a").mamba.dt_min == 0


@pytest.mark.parametrize(("blocks", "shared"), [(1, True), (2, False)])
def test_mtp_blocks_are_physical(blocks: int, shared: bool) -> None:
    mtp = model_config(base(num_nextn_predict_layers=blocks), where="a").mtp
    assert (mtp.num_depths, mtp.shared, mtp.layer_pattern) == (blocks, shared, "*E")


@pytest.mark.parametrize("none", [0, None, ...])
def test_no_mtp(none: object) -> None:
    assert model_config(base(num_nextn_predict_layers=none), where="a").mtp is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, 'model_type="llama": this model has "nemotron_h"'),
        ({"model_type": ...}, "model_type: missing"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=true: this model has false"),
        ({"use_bias": True}, "use_bias=true: this model has false"),
        ({"mamba_conv_bias": False, "use_conv_bias": ...}, "use_conv_bias=false"),
        ({"mlp_hidden_act": "silu"}, 'mlp_hidden_act="silu": this model has "relu2"'),
        ({"n_shared_experts": 2}, "n_shared_experts=2: this model has 1"),
        ({"residual_in_fp32": True}, "residual_in_fp32=true"),
        ({"time_step_limit": [0.001, float("inf")]}, "time_step_limit=[0.001, Infinity]: only"),
        ({"norm_eps": 1e-6}, "norm_eps and layer_norm_epsilon differ"),
        ({"num_hidden_layers": 5}, "num_hidden_layers=5: the pattern has 6 layers"),
        ({"layers_block_type": ["moe"] * 6}, "layers_block_type and hybrid_override_pattern"),
        ({"layers_block_type": ["moe", ["x"]]}, 'layers_block_type: ["x"] is none of'),
        ({"hybrid_override_pattern": ...}, "hybrid_override_pattern: missing"),
        ({"hybrid_override_pattern": "MEX", "num_hidden_layers": 3}, "unknown letter(s) X"),
        ({"hybrid_override_pattern": "ME*-ME/E"}, "its MTP parts are not *E"),
        ({"hybrid_override_pattern": 7}, "hybrid_override_pattern=7: is not a string"),
        ({"mtp_hybrid_override_pattern": ["E"]}, 'mtp_hybrid_override_pattern=["E"]: is not a'),
        ({"layers_block_type": "ME*-ME"}, 'layers_block_type="ME*-ME": is not a list'),
        ({"mtp_layers_block_type": {}}, "mtp_layers_block_type={}: is not a list"),
        ({"architectures": ["LlamaForCausalLM"]}, "NemotronHForCausalLM is what can be read"),
        ({"architectures": "NemotronHForCausalLM"}, "NemotronHForCausalLM is what can be read"),
        ({"hidden_size": 2**31}, "hidden_size=2147483648: at most 1048576 can be read"),
        ({"n_routed_experts": 2**20}, "n_routed_experts=1048576: at most 65536 can be read"),
        ({"num_nextn_predict_layers": 65}, "num_nextn_predict_layers=65: at most 64 can be"),
        ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor=nan: is not finite"),
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps=1e-06: asks for what this model does not have"),
        ({"scoring_func": "softmax"}, 'scoring_func="softmax": asks for what'),
        ({"logits_scaling": 2.0}, "logits_scaling=2.0: asks for what"),
        ({"first_k_dense_replace": 3}, "first_k_dense_replace=3: asks for what"),
        ({"num_local_experts": 9}, "num_local_experts=9: n_routed_experts is 8"),
        ({"hidden_size": ..., "mamba_num_heads": ...}, "hidden_size: missing\n  mamba_num_heads"),
        ({"hidden_size": "wide"}, 'model.hidden_size="wide": is not allowed; use a whole number'),
        ({"num_experts_per_tok": 9}, "model.moe.top_k=9 is more than model.moe.num_experts=8"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_the_model_cannot_be_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        model_config(base(**changes), where="folder/config.json")
    assert str(error.value).startswith("folder/config.json: ")
    assert message in str(error.value)


def test_what_is_no_json_is_not_written() -> None:
    carried = PUBLISHED | {"a": float("inf"), "b": [{"c": float("nan")}], "d": [1.5]}
    model = load_config("configs/tiny.toml").model
    raw = config_json(model, vocab_size=8, dtype="bfloat16", carried=carried)
    assert raw["d"] == [1.5]
    assert not raw.keys() & {"a", "b"}
    json.dumps(raw, allow_nan=False)


def test_a_clamp_cannot_be_exported() -> None:
    model = load_config("configs/tiny.toml", ["model.mamba.dt_min=0.001"]).model
    with pytest.raises(ConfigError, match=r"dt_min=0\.001: a nemotron_h folder cannot say"):
        config_json(model, vocab_size=8, dtype="bfloat16", carried={})


def _without_training(model: ModelConfig) -> dict[str, object]:
    """The keys of a model that a folder can say."""
    raw = asdict(model)
    for section, keys in {
        "moe": ("bias_update_rate", "aux_loss_coeff"),
        "mtp": ("num_depths", "loss_scale"),
    }.items():
        for key in keys:
            if raw[section]:
                del raw[section][key]
    return raw
