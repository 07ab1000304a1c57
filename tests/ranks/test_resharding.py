"""A checkpoint of any layout goes on in any other: same data, same losses, optimizer included."""

import gc
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ranks.test_layouts import (
    MODEL,
    assert_equal_state,
    assert_same_records,
    one_rank_run,
)
from tests.ranks.test_train import make_config, read_records, read_state, run_to_end

STEPS = ("checkpoint.keep=3", "train.stop_after=4")
FROM = {
    "one": (1, ""),
    "tp2 pp2 ep2": (4, "tp=2 pp=2 ep=2"),
}
TO = {
    "one": (1, ""),
    "dp2": (2, ""),
    "tp4": (4, "tp=4"),
    "cp2 dp2": (4, "cp=2"),
    "pp4": (4, "pp=4"),
    "vpp2": (2, "pp=2 vpp=2"),
    "ep4": (4, "ep=4"),
    "tp2 etp2": (2, "tp=2 etp=2"),
}


def resume(run_ranks: Callable, path: Path, world: int, layout: str, *overrides: str) -> None:
    axes = [f"parallel.{axis}" for axis in layout.split()]
    config = make_config(
        path.parent / "files", f"run.dir={path}", *MODEL, *STEPS, *axes, *overrides
    )
    gc.collect()
    run_ranks(world, run_to_end, config)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return one_rank_run(tmp_path_factory.mktemp("straight"), *MODEL, *STEPS)


@pytest.fixture(scope="module")
def halves() -> dict[str, Path]:
    """Runs that stopped after two steps, by layout."""
    return {}


@pytest.mark.parametrize("source", FROM)
@pytest.mark.parametrize("target", TO)
def test_run_goes_on_in_another_layout(
    source: str,
    target: str,
    straight: Path,
    halves: dict[str, Path],
    run_ranks: Callable,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    if source not in halves:
        halves[source] = tmp_path_factory.mktemp("half") / "run"
        resume(run_ranks, halves[source], *FROM[source], "train.stop_after=2")
    run_dir = tmp_path / "run"
    shutil.copytree(halves[source], run_dir)
    shutil.copytree(halves[source].parent / "files", tmp_path / "files")
    resume(run_ranks, run_dir, *TO[target])
    assert_same_records(read_records(run_dir), read_records(straight))
    assert_equal_state(read_state(run_dir, 4), read_state(straight, 4))
