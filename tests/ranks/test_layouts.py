"""Every parallel layout trains as one rank: losses, gradients, and the state after three steps."""

import gc
import multiprocessing as mp
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.close import assert_close
from tests.ranks.test_train import (
    make_config,
    read_records,
    read_state,
    run_to_end,
)

STEPS = ("train.stop_after=3", "checkpoint.interval=1", "checkpoint.keep=3")
# As many heads, groups and letters as eight ranks need.
MODEL = (
    'model.layer_pattern="MEM*-E"',
    "model.mamba.num_heads=8",
    "model.mamba.num_groups=4",
    "model.attention.num_heads=8",
    "model.init_std=0.1",  # gradients of A_log far above the rounding of their terms
    "train.micro_batch_size=1",
)
LAYOUTS = {
    "tp2": (2, "tp=2"),
    "tp4": (4, "tp=4"),
    "cp2": (2, "cp=2"),
    "cp4": (4, "cp=4"),
    "ep2": (2, "ep=2"),
    "ep4": (4, "ep=4"),
    "etp2": (2, "etp=2"),
    "pp2": (2, "pp=2"),
    "pp4": (4, "pp=4"),
    "tp2 etp2 ep2": (4, "tp=2 etp=2 ep=2"),
    "tp2 pp2 ep2": (8, "tp=2 pp=2 ep=2"),
    "tp2 cp2 ep4": (4, "tp=2 cp=2 ep=4"),
    "tp2 cp2 ep2 dp2": (8, "tp=2 cp=2 ep=2"),
    "pp2 ep2 dp2": (4, "pp=2 ep=2"),
}


def run_layout(run_ranks: Callable, path: Path, name: str, world: int, layout: str) -> Path:
    overrides = [f"parallel.{axis}" for axis in layout.split()]
    run_dir = path / name.replace(" ", "_")
    config = make_config(path / "files", f"run.dir={run_dir}", *STEPS, *MODEL, *overrides)
    gc.collect()
    run_ranks(world, run_to_end, config)
    return run_dir


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that all others have to equal."""
    path = tmp_path_factory.mktemp("layouts")
    run_dir = path / "one"
    config = make_config(path / "files", f"run.dir={run_dir}", *STEPS, *MODEL)
    process = mp.get_context("fork").Process(target=run_to_end, args=(config,))
    process.start()
    process.join()
    assert process.exitcode == 0
    return run_dir


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_trains_as_one_rank(
    name: str, one_rank: Path, run_ranks: Callable, tmp_path: Path
) -> None:
    run_dir = run_layout(run_ranks, tmp_path, name, *LAYOUTS[name])
    for record, expected in zip(read_records(run_dir), read_records(one_rank), strict=True):
        assert record == pytest.approx(expected, rel=1e-6)
    # The first moment after one step is a tenth of the (clipped) gradient.
    for step in (1, 3):
        state, expected = read_state(run_dir, step), read_state(one_rank, step)
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            if key.endswith("expert_bias"):
                assert torch.equal(state[key], value), key
                continue
            if ".exp_avg_sq." in key:  # of squares: the relative error is twice that of gradients
                value, state[key] = value.sqrt(), state[key].sqrt()
            assert_close(state[key], value, limit=1e-5, name=f"{key} after step {step}")
