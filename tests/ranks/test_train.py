"""The training run on several ranks, with pieces of batches, and twice: the same numbers."""

import gc
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner

from nemomodel.checkpoint.files import SafeReader, step_name
from nemomodel.checkpoint.state import Engine
from nemomodel.config.load import load_config
from nemomodel.config.schema import Config
from nemomodel.data.batch import TokenData, open_data
from nemomodel.data.indexed import IndexedWriter
from nemomodel.model.init import initialize
from nemomodel.model.nemotron import Nemotron
from nemomodel.parallel.mcore import Ranks, global_sum, start_ranks, stop_ranks
from nemomodel.train.loop import build_engine, run
from nemomodel.train.step import DeviceBatch, count_targets, forward_backward
from tests.close import assert_close
from tests.ranks.gradients import whole_gradients

VOCAB = 300
CONFIG = """
[run]
dir = "{path}/run"

[model]
layer_pattern = "ME*-"
hidden_size = 32
vocab_size = 300
ffn_size = 48

[model.mamba]
num_heads = 4
head_dim = 16
num_groups = 2
state_size = 8
chunk_size = 16

[model.attention]
num_heads = 4
num_kv_heads = 2
head_dim = 8

[model.moe]
num_experts = 4
top_k = 2
ffn_size = 24
latent_size = 16
shared_ffn_size = 48
routed_scaling_factor = 2.5

[model.mtp]
num_depths = 2

[precision]
recipe = "fp32"

[train]
steps = 8
global_batch_size = 4
seq_length = 32
validation_sequences = 6

[optim]
lr = 3e-3
min_lr = 3e-4

[schedule]
warmup_steps = 2
decay_steps = 3

[data]
train = [{{ path = "{path}/train" }}]
validation = [{{ path = "{path}/validation" }}]

[observe]
log_interval = 1
tensorboard = false
"""
OVERLAP = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")


def write_tokens(prefix: Path, *, documents: int, seed: int, vocab: int = VOCAB) -> None:
    """Documents of 1 to 60 tokens, each an arithmetic progression with noise, which is learnt."""
    generator = np.random.default_rng(seed)
    writer = IndexedWriter(prefix, dtype=np.dtype("<u2"))
    for length in generator.integers(1, 61, documents):
        start, noise = generator.integers(vocab), generator.integers(0, 2, length)
        writer.add((start + 3 * np.arange(length) + noise) % vocab)
    writer.finish()


def write_config(path: Path) -> Path:
    """The TOML file of a run in `path`, with its token files. Every window has many documents."""
    path.mkdir(parents=True, exist_ok=True)
    if not (path / "train.bin").exists():
        write_tokens(path / "train", documents=60, seed=1)
        write_tokens(path / "validation", documents=20, seed=2)
    file = path / "config.toml"
    file.write_text(CONFIG.format(path=path))
    return file


def make_config(path: Path, *overrides: str) -> Config:
    return load_config(write_config(path), overrides)


def read_records(run_dir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl but for speed, which is never the same twice."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("perf/")} for line in lines]


def read_state(run_dir: Path, step: int) -> dict[str, Tensor]:
    """Every tensor of a checkpoint: weights, router biases, master weights and moments."""
    folder = run_dir / "checkpoints" / step_name(step)
    entries = SafeReader(folder).read_metadata().state_dict_metadata
    state = {name: torch.empty(e.size, dtype=e.properties.dtype) for name, e in entries.items()}
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, storage_reader=SafeReader(folder), planner=planner, no_dist=True)
    return state


def assert_same_state(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert different == []


def run_to_end(config: Config) -> None:
    """For `run_ranks`."""
    assert run(config) == 0


Result = tuple[list[dict[str, float]], dict[str, Tensor]]


@pytest.fixture
def train(run_ranks: Callable, tmp_path: Path) -> Callable[..., Result]:
    """train(name, *overrides, world=1): a run in a folder of its own; its records and last state.

    A second call with the same name goes on.
    """

    def start(name: str, *overrides: str, world: int = 1) -> Result:
        config = make_config(tmp_path / "files", f"run.dir={tmp_path / name}", *overrides)
        # A process group that waits here for the collector would hang the child that collects it.
        gc.collect()
        run_ranks(world, run_to_end, config)
        last = config.train.stop_after or config.train.steps
        return read_records(tmp_path / name), read_state(tmp_path / name, last)

    return start


def assert_equal_up_to_rounding(actual: Result, expected: Result) -> None:
    """Losses, gradient norms and state of two runs that add up in another order."""
    (records, state), (expected_records, expected_state) = actual, expected
    assert [record.keys() for record in records] == [record.keys() for record in expected_records]
    for record, wanted in zip(records, expected_records, strict=True):
        for name, value in wanted.items():
            assert record[name] == pytest.approx(value, rel=1e-6), (name, wanted["step"])
    assert state.keys() == expected_state.keys()
    for name, value in expected_state.items():
        if name.endswith("expert_bias"):
            assert torch.equal(state[name], value), name
        else:
            # Gradients of A_log, D and dt_bias are small sums of large terms of both signs, which
            # rounds to 1e-6 of the sum; the moments are made of gradients alone.
            limit = 1e-5 if ".exp_avg" in name else 1e-6
            assert_close(state[name], value, limit=limit, name=name)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_train_as_one(train: Callable[..., Result], world: int) -> None:
    one = train("one", "train.stop_after=3")
    many = train("many", "train.stop_after=3", world=world)
    assert len(one[0]) == 3
    assert_equal_up_to_rounding(many, one)


def test_accumulated_pieces_train_as_the_whole_batch(train: Callable[..., Result]) -> None:
    # Larger weights, next to which the first, sign-like updates of AdamW round less.
    overrides = ("train.stop_after=3", "model.init_std=0.1")
    pieces = train("pieces", *overrides, "train.micro_batch_size=1")
    whole = train("whole", *overrides, "train.micro_batch_size=4")
    assert_equal_up_to_rounding(pieces, whole)


@pytest.mark.parametrize(
    ("recipe", "overlap"),
    [("fp32", OVERLAP[:1]), ("fp32", OVERLAP), ("bf16", OVERLAP)],
    ids=["fp32-reduce", "fp32-reduce_and_gather", "bf16-reduce_and_gather"],
)
def test_overlap_changes_nothing(
    train: Callable[..., Result], recipe: str, overlap: tuple[str, ...]
) -> None:
    common = ("train.steps=5", "train.validation_interval=2", f"precision.recipe={recipe}")
    records, state = train("plain", *common, world=2)
    overlap_records, overlap_state = train("overlap", *common, *overlap, world=2)
    assert overlap_records == records
    assert_same_state(overlap_state, state)


def _open(config: Config) -> TokenData:
    return open_data(config.data, train=config.train, vocab_size=VOCAB, seed=config.run.seed)


def backward(config: Config, engine: Engine, ranks: Ranks, step: int) -> Tensor:
    """Gradients of one global batch; returns the number of targets of each head."""
    pieces = _open(config).batch(step, dp_rank=ranks.dp_rank, dp_size=ranks.dp_size)
    batches = [DeviceBatch.of(piece, ranks.device) for piece in pieces]
    num_targets, _ = count_targets(batches, engine, ranks, stop=False)
    forward_backward(
        batches,
        engine,
        ranks,
        num_targets=num_targets,
        num_sequences=config.train.global_batch_size,
        step=step + 1,
    )
    return num_targets


def _save_gradients(config: Config, path: Path) -> None:
    ranks = start_ranks(config)
    engine = build_engine(config, ranks)
    num_targets = backward(config, engine, ranks, 0)
    torch.save((num_targets, whole_gradients(engine, ranks)), path)
    stop_ranks()


def test_every_gradient_is_that_of_the_loss_over_the_whole_batch(
    run_ranks: Callable, tmp_path: Path
) -> None:
    """One and two ranks against plain autograd of the model on one batch of all sequences."""
    config = make_config(tmp_path)
    (whole,) = _open(make_config(tmp_path, "train.micro_batch_size=4")).batch(
        0, dp_rank=0, dp_size=1
    )
    per_rank = whole.loss_mask_BS.view(2, -1).sum(1)
    assert per_rank[0] != per_rank[1], "ranks with equally many targets would hide a wrong divisor"
    for world in (1, 2):
        run_ranks(world, _save_gradients, config, tmp_path / f"gradients_{world}.pt")
    model = Nemotron(config.model, dtype=torch.float32)
    initialize(model, seed=config.run.seed)
    batch = DeviceBatch.of(whole, torch.device("cpu"))
    inputs = (batch.ids_BS, batch.labels_BS, batch.loss_mask_BS, batch.documents)
    names, params = zip(*model.named_parameters(), strict=True)
    expected = torch.autograd.grad(model.loss(*inputs), params)
    expected_targets = model.num_targets(batch.loss_mask_BS, batch.documents)
    for world in (1, 2):
        num_targets, gradients = torch.load(tmp_path / f"gradients_{world}.pt")
        assert torch.equal(num_targets, expected_targets)
        assert gradients.keys() == set(names)
        for name, gradient in zip(names, expected, strict=True):
            assert gradient.any(), name
            assert_close(gradients[name], gradient, limit=2e-6, name=f"{world} {name}")


def test_same_seed_twice_is_the_same_run(train: Callable[..., Result]) -> None:
    common = ("train.steps=5", "train.validation_interval=3", "precision.recipe=bf16")
    records, state = train("first", *common)
    again_records, again_state = train("again", *common)
    assert again_records == records
    assert_same_state(again_state, state)
    other_records, _ = train("other", *common, "run.seed=5")
    assert all(a["loss/lm"] != b["loss/lm"] for a, b in zip(records, other_records, strict=True))


def test_deterministic_kernels_and_recompute_change_nothing(train: Callable[..., Result]) -> None:
    records, state = train("plain", "train.stop_after=3")
    for name, override in {
        "deterministic": "run.deterministic=true",
        "recompute": 'train.recompute=["mamba", "attention", "moe", "mlp"]',
    }.items():
        other_records, other_state = train(name, "train.stop_after=3", override)
        assert other_records == records, name
        assert_same_state(other_state, state)


@pytest.mark.parametrize("world", [1, 2])
def test_router_biases_move_once_per_global_batch(train: Callable[..., Result], world: int) -> None:
    """After three updates each bias is a sum of three steps of the rate, up, down or none."""
    rate = 0.25
    _, state = train("run", "train.stop_after=3", f"model.moe.bias_update_rate={rate}", world=world)
    biases = {name: bias for name, bias in state.items() if name.endswith("expert_bias")}
    assert len(biases) == 2, "one of the main stack, one of the shared MTP block"
    for name, bias in biases.items():
        steps = bias / rate
        assert torch.equal(steps, steps.round()), name
        assert steps.abs().max() <= 3, name
        assert steps.any(), name


def _save_counts(config: Config, path: Path) -> None:
    ranks = start_ranks(config)
    model = build_engine(config, ranks).ddp.module
    count = 0
    for piece in _open(config).batch(0, dp_rank=ranks.dp_rank, dp_size=ranks.dp_size):
        batch = DeviceBatch.of(piece, ranks.device)
        count = (
            count
            + model.losses(
                batch.ids_BS,
                batch.labels_BS,
                batch.loss_mask_BS,
                batch.documents,
                num_targets=torch.ones(3),
                num_sequences=4,
            ).count
        )
    torch.save(global_sum(count), path)
    stop_ranks()


def test_router_biases_follow_the_load_over_all_ranks(
    run_ranks: Callable, train: Callable[..., Result], tmp_path: Path
) -> None:
    records, state = train("run", "train.stop_after=1", "model.moe.bias_update_rate=0.25", world=2)
    run_ranks(2, _save_counts, make_config(tmp_path / "files"), tmp_path / "count.pt")
    count = torch.load(tmp_path / "count.pt").double()
    # 4 sequences of 32 tokens, 2 experts each; both MTP depths pass the shared block.
    assert count.sum(1).tolist() == [4 * 32 * 2, 2 * 4 * 32 * 2]
    biases = [state[name] for name in sorted(state) if name.endswith("expert_bias")]
    for bias, load in zip(biases, count, strict=True):
        assert torch.equal(bias, 0.25 * (load.mean() - load).sign().float())
    violation = (load.max() / load.mean()).item()
    assert records[0]["moe/max_violation/mtp"] == pytest.approx(violation)
