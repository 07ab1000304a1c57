"""Every parallel layout trains as one rank: losses, gradients, and the state after three steps."""

import gc
import multiprocessing as mp
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nemomodel.config.schema import Config
from nemomodel.train import loop
from tests.close import assert_close
from tests.conftest import fork_safely
from tests.ranks.gradients import whole_gradients
from tests.ranks.test_train import (
    assert_same_state,
    backward,
    make_config,
    read_records,
    read_state,
    run_to_end,
)

STEPS = (
    "train.stop_after=3",
    "checkpoint.interval=1",
    "checkpoint.keep=3",
    "train.validation_interval=3",
    "train.validation_sequences=5",
)
# As many heads, groups and letters as eight ranks need.
MODEL = (
    'model.layer_pattern="MEM*-E"',
    "model.mamba.num_heads=8",
    "model.mamba.num_groups=4",
    "model.attention.num_heads=8",
    "model.init_std=0.1",  # gradients of A_log far above the rounding of their terms
    "train.micro_batch_size=1",
)
OVERLAP = "overlap_grad_reduce=true overlap_param_gather=true"
LAYOUTS = {
    "tp2": (2, "tp=2"),
    "tp4": (4, "tp=4"),
    "cp2": (2, "cp=2"),
    "cp4": (4, "cp=4"),
    "ep2": (2, "ep=2"),
    "ep4": (4, "ep=4"),
    "etp2": (2, "etp=2"),
    "etp4": (4, "etp=4"),
    "pp2": (2, "pp=2"),
    "pp4": (4, "pp=4"),
    "pp2 vpp2": (2, "pp=2 vpp=2"),
    "pp2 vpp3 dp2": (4, "pp=2 vpp=3"),
    "tp2 etp2 ep2": (4, "tp=2 etp=2 ep=2"),
    "tp2 pp2 ep2": (8, "tp=2 pp=2 ep=2"),
    "tp2 cp2 ep4": (4, "tp=2 cp=2 ep=4"),
    "tp2 cp2 ep2 dp2": (8, "tp=2 cp=2 ep=2"),
    "pp2 ep2 dp2": (4, "pp=2 ep=2"),
    "dp2 overlap": (2, OVERLAP),
    "tp2 ep2 dp2 overlap": (4, f"tp=2 ep=2 {OVERLAP}"),
    "pp2 dp2 overlap": (4, f"pp=2 {OVERLAP}"),
}


def run_layout(run_ranks: Callable, path: Path, name: str, world: int, layout: str) -> Path:
    overrides = [f"parallel.{axis}" for axis in layout.split()]
    run_dir = path / name.replace(" ", "_")
    config = make_config(path / "files", f"run.dir={run_dir}", *STEPS, *MODEL, *overrides)
    gc.collect()
    run_ranks(world, run_to_end, config)
    return run_dir


def one_rank_run(path: Path, *overrides: str) -> Path:
    """The run folder of a run in one forked process."""
    run_dir = path / "one"
    config = make_config(path / "files", f"run.dir={run_dir}", *overrides)
    run_forked(run_to_end, config)
    return run_dir


def run_forked(fn: Callable[..., None], *args: object) -> None:
    """As `run_ranks` of one rank, for fixtures that live longer."""
    gc.collect()
    process = mp.get_context("fork").Process(target=_on_one_thread, args=(fn, *args))
    with fork_safely():
        process.start()
    process.join()
    assert process.exitcode == 0


def _on_one_thread(fn: Callable[..., None], *args: object) -> None:
    torch.set_num_threads(1)  # a fork does not copy the threads of its parent
    fn(*args)


def assert_same_records(actual: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    for record, wanted in zip(actual, expected, strict=True):
        assert record == pytest.approx(wanted, rel=1e-6)


def assert_equal_state(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Weights, router biases, master weights and moments of checkpoints."""
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        found = actual[key]
        if key.endswith("expert_bias"):
            assert torch.equal(found, value), key
            continue
        if ".exp_avg_sq." in key:  # of squares: the relative error is twice that of gradients
            value, found = value.sqrt(), found.sqrt()
        assert_close(found, value, limit=1e-5, name=key)


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that all others have to equal."""
    return one_rank_run(tmp_path_factory.mktemp("layouts"), *STEPS, *MODEL)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_as_one_rank(
    name: str, one_rank: Path, run_ranks: Callable, tmp_path: Path
) -> None:
    run_dir = run_layout(run_ranks, tmp_path, name, *LAYOUTS[name])
    assert_same_records(read_records(run_dir), read_records(one_rank))
    # The first moment after one step is a tenth of the (clipped) gradient.
    for step in (1, 3):
        assert_equal_state(read_state(run_dir, step), read_state(one_rank, step))


QUANTIZED = (
    *MODEL,
    "precision.recipe=nvfp4",
    "model.hidden_size=128",
    "model.ffn_size=128",
    "model.mamba.num_heads=32",
    "model.mamba.head_dim=4",
    "model.mamba.state_size=16",
    "model.attention.head_dim=16",
    "model.moe.ffn_size=64",
    "model.moe.latent_size=32",
    "model.moe.shared_ffn_size=128",
    "model.mamba.num_groups=2",
    "train.seq_length=128",
    "train.validation_sequences=4",
)

QUANTIZED_LAYOUTS = {
    "dp2": (2, ""),
    "tp2": (2, "tp=2 etp=2"),
    "tp2 ep2": (2, "tp=2 ep=2"),
    "cp2": (2, "cp=2 ep=2"),
    "ep2": (2, "ep=2"),
    "tp2 etp2 ep2": (4, "tp=2 etp=2 ep=2"),
    "tp2 cp2 ep4": (4, "tp=2 cp=2 ep=4"),
}


def save_quantized_gradients(config: Config, path: Path) -> None:
    """Of the model in FP32, where a code differs only where a sum in another order moves it."""
    loop.DTYPES["bf16"] = torch.float32  # in a forked process
    ranks = loop.start_ranks(config)
    engine = loop.build_engine(config, ranks)
    backward(config, engine, ranks, 0)
    torch.save(whole_gradients(engine, ranks), path)
    loop.stop_ranks()


@pytest.fixture(scope="session")
def quantized_one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    path = tmp_path_factory.mktemp("quantized")
    config = make_config(path / "files", *QUANTIZED)
    run_forked(save_quantized_gradients, config, path / "one.pt")
    return torch.load(path / "one.pt")


@pytest.mark.parametrize("name", QUANTIZED_LAYOUTS)
def test_quantised_gradients_are_those_of_one_rank(
    name: str, quantized_one_rank: dict[str, Tensor], run_ranks: Callable, tmp_path: Path
) -> None:
    """Another maximum, another cut of blocks or other random bits would change tenths of them."""
    world, layout = QUANTIZED_LAYOUTS[name]
    overrides = [f"parallel.{axis}" for axis in layout.split()]
    config = make_config(tmp_path / "files", *QUANTIZED, *overrides)
    gc.collect()
    run_ranks(world, save_quantized_gradients, config, tmp_path / "many.pt")
    for key, gradient in torch.load(tmp_path / "many.pt").items():
        assert_close(gradient, quantized_one_rank[key], limit=1e-2, name=key)


def test_a_quantised_pipeline_is_exact(run_ranks: Callable, tmp_path: Path) -> None:
    """Nothing is summed in another order: in BF16 to the last bit, four micro-batches in flight,
    layers recomputed after others have begun."""
    layouts = {"one": (1, "tp=1"), "pp2": (2, "pp=2"), "vpp2": (2, "pp=2 vpp=2")}
    results = {}
    for name, (world, layout) in layouts.items():
        run_dir = tmp_path / name
        config = make_config(
            tmp_path / "files",
            *QUANTIZED,
            f"run.dir={run_dir}",
            *[f"parallel.{axis}" for axis in layout.split()],
            'train.recompute=["moe", "mlp"]',
            "train.stop_after=2",
            "optim.grad_clip=100",  # the norm that gradients are clipped by is summed by stages
        )
        gc.collect()
        run_ranks(world, run_to_end, config)
        records = read_records(run_dir)
        for record in records:
            del record["loss/aux"], record["optim/grad_norm"]  # summed by stages
        results[name] = records, read_state(run_dir, 2)
    records, state = results.pop("one")
    for others, other in results.values():
        assert others == records
        assert_same_state(other, state)
