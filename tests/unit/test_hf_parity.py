"""Hugging Face folders against transformers: logits, loss, every gradient, every byte.

The oracle is transformers' own code and the weights are random, so that no tensor can be swapped,
transposed or left out unnoticed.
"""

import copy
import gc
import json
import multiprocessing as mp
import os
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nemomodel
from tests import hf_models
from tests.conftest import fork_safely
from tests.hf_models import HfModel
from tests.ranks.test_train import write_tokens
from tests.unit.test_train_process import run_program

ROOT = Path(__file__).parents[2]
LOGITS, GRADIENTS = 5e-6, 2e-5
"""Largest error relative to the largest value, both in FP32."""
TIMEOUT = 120
"""Seconds; only a conversion that hangs takes so long."""

FULL = {"pattern": "MEM*E-M", "mtp_blocks": 1}
WIDE = {"pattern": "EM*E", "moe_latent_size": None, "mamba_num_heads": 6, "mamba_head_dim": 20}
SUPER = {"pattern": "ME*E", "n_routed_experts": 64, "num_experts_per_tok": 22, "mtp_blocks": 1}
GROUPS = {"pattern": "EE*M", "n_routed_experts": 16, "n_group": 4, "topk_group": 2}
VARIANTS = {
    "all-kinds": FULL,
    "mamba": {"pattern": "MM"},
    "attention": {"pattern": "**"},
    "moe": {"pattern": "EE"},
    "mlp": {"pattern": "--"},
    "one-layer": {"pattern": "M"},
    "without-latent": {"pattern": "ME*-", "moe_latent_size": None, "mtp_blocks": 1},
    "group-limited": GROUPS,
    "one-group-of-four": GROUPS | {"topk_group": 1},
    "top-22": SUPER,
    "top-22-group-limited": SUPER | {"n_routed_experts": 72, "n_group": 8, "topk_group": 4},
    "raw-gates": {"pattern": "ME*E", "norm_topk_prob": False},
    "top-1-raw-gates": {"pattern": "E*E", "norm_topk_prob": False, "num_experts_per_tok": 1},
    "top-1": {"pattern": "E*E", "num_experts_per_tok": 1},
    "unscaled-gates": {"pattern": "ME*E", "routed_scaling_factor": 1.0},
    "one-mamba-group": {"pattern": "M*M", "n_groups": 1},
    "mamba-group-per-head": {"pattern": "M*M", "n_groups": 16, "mamba_head_dim": 16},
    "wide-mamba": WIDE | {"n_groups": 3},
    "other-kernel": {"pattern": "M*M", "conv_kernel": 2},
    "one-kv-head": {"pattern": "*M*", "num_key_value_heads": 1},
    "as-many-kv-heads": {"pattern": "*M*", "num_key_value_heads": 4, "head_dim": 20},
    "other-eps": {"pattern": "ME*-", "layer_norm_epsilon": 1e-2, "mtp_blocks": 1},
    "two-mtp-blocks": {"pattern": "ME*-", "mtp_blocks": 2},
    "mtp-of-all-kinds": {"pattern": "ME", "mtp_blocks": 2, "mtp_pattern": "*M-E"},
    "mtp-of-one-layer": {"pattern": "M", "mtp_blocks": 1, "mtp_pattern": "*"},
}
ROUND_TRIPS = {
    "all-kinds": FULL,
    "group-limited": GROUPS,
    "wide-without-latent": WIDE,
    "two-mtp-blocks": {"pattern": "M-", "mtp_blocks": 2, "mtp_pattern": "*ME-"},
}
ALIASES = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_chunk_size": "chunk_size",
    "num_local_experts": "n_routed_experts",
}
"""Other names of config keys that transformers reads."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

CANCELLED = {
    "top-1": r"blocks\.[02]\.mixer\.router\.weight",
    "length 1": r".*\.mixer\.[qk]_proj\.weight",
}
"""Gradients that are 0 in exact arithmetic: a single gate divided by its own sum is always 1, and
so is the weight of a single key."""


class Pair(NamedTuple):
    oracle: HfModel
    model: nn.Module
    name: str


def load_ours(path: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Without the auxiliary loss, which transformers does not have."""
    model = nemomodel.load_model(path, dtype=dtype)
    if model.config.moe:
        model.config = replace(model.config, moe=replace(model.config.moe, aux_loss_coeff=0.0))
    return model


def draw_ids(batch: int, length: int) -> Tensor:
    return torch.randint(hf_models.BASE["vocab_size"], (batch, length))


def assert_near(actual: Tensor, expected: Tensor, *, limit: float, name: str) -> None:
    """Largest error over largest expected value; what is all 0 has to be 0."""
    assert actual.shape == expected.shape, f"{name}: {actual.shape} and {expected.shape}"
    assert actual.isfinite().all(), f"{name}: not finite"
    actual, expected = actual.detach().double(), expected.detach().double()
    error, size = float((actual - expected).abs().max()), float(expected.abs().max())
    assert error <= limit * size, f"{name}: error {error:.2e} of {size:.2e}, limit {limit:.0e}"


def assert_same_bytes(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    forms = {name: (t.dtype, t.shape) for name, t in actual.items()}
    assert forms == {name: (t.dtype, t.shape) for name, t in expected.items()}
    different = [
        name
        for name, value in expected.items()
        if not torch.equal(actual[name].view(torch.uint8), value.view(torch.uint8))
    ]
    assert different == []


def assert_same_weights(model: nn.Module, expected: dict[str, Tensor]) -> None:
    """Names of all parameters and router biases, and their values to the last bit."""
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    assert [n for n, value in expected.items() if not torch.equal(actual[n], value)] == []


def assert_same_logits(pair: Pair, ids_BS: Tensor) -> None:
    expected = pair.oracle(ids_BS)
    actual = [pair.model(ids_BS)]
    if pair.oracle.mtp:
        actual += pair.model.mtp_logits(ids_BS)
    assert len(actual) == len(expected)
    for k, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert_near(ours, theirs, limit=LOGITS, name=f"logits of depth {k}")


def assert_same_gradients(pair: Pair, ours: Tensor, theirs: Tensor) -> None:
    """Of two losses that have to be equal: the gradient of every parameter."""
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for module, loss in ((pair.model, ours), (pair.oracle, theirs)):
        for parameter in module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        loss.backward()
    expected = hf_models.as_ours(pair.oracle, gradients=True)
    actual = {name: parameter.grad for name, parameter in pair.model.named_parameters()}
    assert actual.keys() == expected.keys()
    for name in [n for n in expected if re.fullmatch(CANCELLED.get(pair.name, ""), n)]:
        assert max(float(g.pop(name).abs().max()) for g in (actual, expected)) < 1e-7
    for name, gradient in expected.items():
        assert_near(actual[name], gradient, limit=GRADIENTS, name=f"gradient of {name}")


def training_loss(oracle: HfModel, ids_BS: Tensor, labels_BS: Tensor, scale: float) -> Tensor:
    """CE_0 + scale / depths * sum_k CE_k; depth k predicts the label k further on."""
    logits = oracle(ids_BS)
    length, depths = ids_BS.shape[1], len(logits) - 1
    loss = F.cross_entropy(logits[0].flatten(0, 1), labels_BS.flatten())
    for k in range(1, min(depths, length - 1) + 1):
        depth_loss = F.cross_entropy(
            logits[k][:, : length - k].flatten(0, 1), labels_BS[:, k:].flatten()
        )
        loss = loss + scale / depths * depth_loss
    return loss


def compare_training(pair: Pair, ids_BS: Tensor, labels_BS: Tensor) -> None:
    mtp = pair.model.config.mtp
    everywhere = torch.ones_like(labels_BS, dtype=torch.bool)
    ours = pair.model.loss(ids_BS, labels_BS, everywhere)
    theirs = training_loss(pair.oracle, ids_BS, labels_BS, mtp.loss_scale if mtp else 0.0)
    assert_same_gradients(pair, ours, theirs)


@pytest.fixture(scope="module", params=VARIANTS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """One variant in transformers, and loaded by us from the folder that transformers wrote."""
    oracle = hf_models.make_model(**VARIANTS[request.param])
    folder = hf_models.save(oracle, tmp_path_factory.mktemp("hf"))
    return Pair(oracle, load_ours(folder), request.param)


def test_every_weight_arrives(pair: Pair) -> None:
    assert_same_weights(pair.model, hf_models.as_ours(pair.oracle))


def test_logits_of_every_head(pair: Pair) -> None:
    assert_same_logits(pair, draw_ids(2, 17))


def test_loss_and_every_gradient(pair: Pair) -> None:
    compare_training(pair, draw_ids(2, 17), draw_ids(2, 17))


def test_every_gradient_of_the_logits(pair: Pair) -> None:
    """The way through forward(), whose head is another than that of the training loss."""
    ids_BS, label_T = draw_ids(2, 17), draw_ids(2, 17).flatten()
    ours, theirs = (
        F.cross_entropy(logits_BSV.flatten(0, 1), label_T)
        for logits_BSV in (pair.model(ids_BS), pair.oracle(ids_BS)[0])
    )
    assert_same_gradients(pair, ours, theirs)


@pytest.mark.parametrize(("length", "chunk_size"), [(1, 8), (3, 8), (8, 8), (130, 8), (130, 128)])
def test_any_length(length: int, chunk_size: int, tmp_path: Path) -> None:
    oracle = hf_models.make_model(**FULL, chunk_size=chunk_size)
    model = load_ours(hf_models.save(oracle, tmp_path))
    assert model.config.mamba.chunk_size == chunk_size
    pair = Pair(oracle, model, f"length {length}")
    assert_same_logits(pair, draw_ids(2, length))
    compare_training(pair, draw_ids(2, length), draw_ids(2, length))


def test_mtp_against_float64(tmp_path: Path) -> None:
    """Norms, router and scan of transformers stay in FP32; all sums around them do not."""
    oracle = hf_models.make_model("ME*-", mtp_blocks=2)
    model = load_ours(hf_models.save(oracle, tmp_path))
    ids_BS = draw_ids(2, 33)
    expected = copy.deepcopy(oracle).double()(ids_BS)
    for k, logits_BSV in enumerate(model.mtp_logits(ids_BS), 1):
        assert expected[k].dtype == torch.float64
        assert_near(logits_BSV, expected[k], limit=LOGITS, name=f"logits of depth {k}")


def test_bf16_is_as_near_to_the_truth_as_transformers(tmp_path: Path) -> None:
    """Two BF16 programs round at different places, so neither is the other's reference. Both are
    held against FP32 arithmetic on the same BF16 weights, by the median over positions: where
    rounding makes a router choose another expert, the error is large and says nothing.
    """
    oracle = hf_models.make_model("MEM*E-")
    folder = hf_models.save(oracle, tmp_path, dtype=torch.bfloat16)
    ids_BS = draw_ids(8, 64)
    with torch.no_grad():
        exact = hf_models.load(folder, dtype=torch.float32).model(ids_BS).logits
        theirs = hf_models.load(folder, dtype=torch.bfloat16).model(ids_BS).logits
        ours = load_ours(folder, torch.bfloat16)(ids_BS)
    assert ours.dtype == torch.bfloat16
    our_error, their_error = (
        float((logits.float() - exact).square().mean(-1).median()) ** 0.5
        for logits in (ours, theirs)
    )
    assert 0 < our_error <= 1.2 * their_error
    assert_near(load_ours(folder)(ids_BS), exact, limit=LOGITS, name="FP32 on BF16 weights")


@pytest.fixture(scope="module")
def convert(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Run `tools/convert.py` with these arguments in a forked process; what it printed."""
    folder = tmp_path_factory.mktemp("output")
    calls = iter(range(1_000))

    def run(*arguments: object, code: int = 0) -> str:
        gc.collect()  # see the fixture `train` of test_train.py
        words, output = [str(argument) for argument in arguments], folder / str(next(calls))
        with fork_safely():
            process = mp.get_context("fork").Process(
                target=_convert, args=(output, words), daemon=True
            )
            process.start()
        process.join(TIMEOUT)
        printed = output.read_text()
        assert process.exitcode == code, f"convert.py {words[0]}: {process.exitcode}\n{printed}"
        return printed

    return run


def _convert(output: Path, arguments: list[str]) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        setattr(sys, name, os.fdopen(number, "w", closefd=False, buffering=1))
    torch.set_num_threads(1)
    sys.argv = ["convert.py", *arguments]
    sys.path.insert(0, str(ROOT / "tools"))
    runpy.run_path(str(ROOT / "tools/convert.py"), run_name="__main__")


def reshard(folder: Path, oracle: HfModel) -> None:
    hf_models.save(oracle, folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 5


def name_as_in_memory(folder: Path, oracle: HfModel) -> None:
    """`model.` prefix and stacked experts, as a state dict that was saved by hand has them."""
    hf_models.save(oracle, folder)
    mtp = hf_models.mtp_tensors(oracle)
    hf_models.write_tensors(folder, oracle.trunk.state_dict() | mtp)
    assert "model.layers.1.mixer.experts.up_proj" in hf_models.read_tensors(folder)


def publish_config(folder: Path, oracle: HfModel) -> None:
    """The keys of the published models: pattern strings in place of lists of layer types."""
    hf_models.save(oracle, folder)
    config = json.loads((folder / "config.json").read_text())
    for key in ("layers_block_type", "mtp_layers_block_type", "time_step_limit"):
        del config[key]
    config["hybrid_override_pattern"] = oracle.trunk.config.hybrid_override_pattern
    config["mtp_hybrid_override_pattern"] = oracle.trunk.config.mtp_hybrid_override_pattern
    config["num_hidden_layers"] = len(oracle.trunk.model.layers)
    config |= {"norm_eps": config["layer_norm_epsilon"], "rope_theta": 10000}
    (folder / "config.json").write_text(json.dumps(config))


def name_layers_as_before(folder: Path, oracle: HfModel) -> None:
    hf_models.save(oracle, folder)
    text = (folder / "config.json").read_text()
    text = text.replace("linear_attention", "mamba").replace("full_attention", "attention")
    (folder / "config.json").write_text(text)


def use_alias_keys(folder: Path, oracle: HfModel) -> None:
    hf_models.save(oracle, folder)
    config = json.loads((folder / "config.json").read_text())
    for alias, key in ALIASES.items():
        config[alias] = config.pop(key)
    (folder / "config.json").write_text(json.dumps(config))


STYLES = [reshard, name_as_in_memory, publish_config, name_layers_as_before, use_alias_keys]


@pytest.mark.parametrize("write", STYLES, ids=lambda write: write.__name__)
def test_every_style_gives_the_same_model(
    write: Callable[[Path, HfModel], None], tmp_path: Path, convert: Callable
) -> None:
    oracle = hf_models.make_model(**FULL)
    plain = hf_models.save(oracle, tmp_path / "plain")
    write(tmp_path / "styled", oracle)
    convert("import", tmp_path / "styled", tmp_path / "checkpoint")
    expected = load_ours(plain)
    for path in (tmp_path / "styled", tmp_path / "checkpoint"):
        model = load_ours(path)
        assert model.config == expected.config
        assert_same_weights(model, hf_models.as_ours(oracle))
    convert("export", tmp_path / "checkpoint", tmp_path / "back")
    assert_same_bytes(hf_models.read_tensors(tmp_path / "back"), hf_models.read_tensors(plain))


class Trip(NamedTuple):
    """HF folder, our checkpoint made of it, and the HF folder made of that."""

    oracle: HfModel
    dtype: torch.dtype
    source: Path
    checkpoint: Path
    back: Path


@pytest.fixture(scope="module", params=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return DTYPES[request.param]


@pytest.fixture(scope="module", params=ROUND_TRIPS)
def trip(
    request: pytest.FixtureRequest,
    dtype: torch.dtype,
    tmp_path_factory: pytest.TempPathFactory,
    convert: Callable,
) -> Trip:
    path = tmp_path_factory.mktemp("trip")
    oracle = hf_models.make_model(**ROUND_TRIPS[request.param])
    source = hf_models.save(oracle, path / "source", dtype=dtype)
    convert("import", source, path / "checkpoint")
    convert("export", path / "checkpoint", path / "back")
    return Trip(oracle, dtype, source, path / "checkpoint", path / "back")


def test_round_trip_gives_every_byte_back(trip: Trip) -> None:
    source, back = (hf_models.read_tensors(folder) for folder in (trip.source, trip.back))
    assert_same_bytes(back, source)
    wide = {name for name, tensor in back.items() if tensor.dtype == torch.float32}
    if trip.dtype == torch.bfloat16:
        assert wide == {name for name in back if name.endswith("e_score_correction_bias")}


def test_checkpoint_is_the_folder_it_was_made_of(trip: Trip) -> None:
    for path in (trip.source, trip.checkpoint, trip.back):
        rounded = {
            name: value if name.endswith("expert_bias") else value.to(trip.dtype).float()
            for name, value in hf_models.as_ours(trip.oracle).items()
        }
        assert_same_weights(load_ours(path), rounded)
        assert nemomodel.load_model(path).lm_head.weight.dtype == trip.dtype


def test_transformers_loads_what_we_export(trip: Trip) -> None:
    ids_BS = draw_ids(2, 17)
    source, back = (hf_models.load(path, dtype=trip.dtype) for path in (trip.source, trip.back))
    assert back.complaints == {}
    expected, actual = (loaded.model(ids_BS, use_cache=False).logits for loaded in (source, back))
    assert torch.equal(actual, expected)
    settings = ("chunk_size", "num_nextn_predict_layers", "dtype", "vocab_size")
    if trip.oracle.mtp:
        settings += ("mtp_layers_block_type",)
    for key in settings:
        assert getattr(back.model.config, key) == getattr(source.model.config, key), key


def test_export_has_the_published_config(trip: Trip) -> None:
    """Readers other than transformers know the pattern strings alone and no null or Infinity."""
    text = (trip.back / "config.json").read_text()
    config = json.loads(text, parse_constant=pytest.fail)
    expected = trip.oracle.trunk.config
    assert config["hybrid_override_pattern"] == expected.hybrid_override_pattern
    assert config["num_hidden_layers"] == len(expected.layers_block_type)
    assert config["num_nextn_predict_layers"] == len(trip.oracle.mtp)
    assert (config["n_group"], config["topk_group"]) == (expected.n_group, expected.topk_group)
    assert config["n_shared_experts"] == 1
    assert "layers_block_type" not in config
    if trip.oracle.mtp:
        assert config["mtp_hybrid_override_pattern"] == expected.mtp_hybrid_override_pattern


def test_verify_tells_equal_folders_from_different_ones(
    trip: Trip, convert: Callable, tmp_path: Path
) -> None:
    convert("verify", trip.source, trip.back)
    tensors = hf_models.read_tensors(trip.source)
    name = "backbone.layers.1.norm.weight"
    tensors[name][3] *= 2
    changed = shutil.copytree(trip.source, tmp_path / "changed")
    hf_models.write_tensors(changed, tensors)
    assert name in convert("verify", trip.source, changed, code=1)


def test_trained_model_is_the_same_in_transformers(tmp_path: Path, convert: Callable) -> None:
    """Three steps of the tiny config, whose two MTP depths share one physical block."""
    for number, name in enumerate(("train", "validation")):
        write_tokens(tmp_path / name, documents=60, seed=number, vocab=2048)
    code, _, stderr = run_program(
        tmp_path,
        str(ROOT / "configs/tiny.toml"),
        f"run.dir={tmp_path / 'run'}",
        f'data.train=[{{path="{tmp_path}/train"}}]',
        f'data.validation=[{{path="{tmp_path}/validation"}}]',
        "train.stop_after=3",
        "train.seq_length=64",
        "train.validation_sequences=8",
    )
    assert code == 0, stderr
    convert("export", tmp_path / "run", tmp_path / "hf")
    model = load_ours(tmp_path / "run")
    loading = hf_models.load(tmp_path / "hf")
    assert loading.complaints == {}
    ids_BS = torch.randint(2048, (2, 50))
    name = "logits in transformers"
    assert_near(model(ids_BS), loading.model(ids_BS).logits, limit=LOGITS, name=name)
    with_mtp = hf_models.load_with_mtp(tmp_path / "hf", depths=2)
    assert len(with_mtp.mtp) == 2
    assert_same_logits(Pair(with_mtp, model, "trained"), ids_BS)
    assert loading.model.config.num_nextn_predict_layers == 1
