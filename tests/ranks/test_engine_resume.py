"""A resumed run is the same run, bit by bit, on one and on two ranks."""

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

from nemomodel.checkpoint.checkpoints import CheckpointError, Checkpoints, Progress
from nemomodel.checkpoint.state import Engine
from nemomodel.checkpoint.weights import load_weights
from nemomodel.parallel.mcore import start_ranks, stop_ranks
from tests.ranks.test_engine import OVERLAP, Mlp, make_config, make_engine, train


def _start(path: Path, *overrides: str) -> tuple[Any, Engine, Checkpoints]:
    config = make_config(f"run.dir={path / 'run'}", *overrides)
    ranks = start_ranks(config)
    engine = make_engine(config, ranks)
    return ranks, engine, Checkpoints(config, ranks, engine)


def _train(engine: Engine, ranks: Any, steps: range) -> list[float]:
    # torch.rand stands for dropout: its stream must go on where it stopped.
    losses = train(engine.ddp, engine.optimizer, engine.scheduler, ranks, steps)
    return [*losses, torch.rand(()).item()]


def _record(path: Path, name: str, engine: Engine, ranks: Any, losses: list[float]) -> None:
    optimizer = [
        state[name]
        for part in engine.optimizer.chained_optimizers
        for state in part.optimizer.state.values()
        for name in ("step", "exp_avg", "exp_avg_sq")
    ]
    main = [p for group in engine.optimizer.param_groups for p in group["params"]]
    tensors = [*engine.ddp.module.state_dict().values(), *optimizer, *main, torch.tensor(losses)]
    torch.save([t.detach() for t in tensors], path / f"{name}_{ranks.rank}.pt")


def _straight(path: Path, overrides: tuple[str, ...]) -> None:
    ranks, engine, _ = _start(path, *overrides)
    _train(engine, ranks, range(3))
    _record(path, "straight", engine, ranks, _train(engine, ranks, range(3, 6)))
    stop_ranks()


def _first_half(path: Path, overrides: tuple[str, ...]) -> None:
    ranks, engine, checkpoints = _start(path, *overrides)
    assert checkpoints.load() is None
    engine.ddp.module.expert_bias += 0.5
    _train(engine, ranks, range(3))
    checkpoints.save(3, tokens=300)
    _train(engine, ranks, range(3, 5))
    checkpoints.poll()
    checkpoints.finish()
    stop_ranks()


def _second_half(path: Path, overrides: tuple[str, ...]) -> None:
    torch.manual_seed(99)
    ranks, engine, checkpoints = _start(path, *overrides)
    assert checkpoints.load() == Progress(step=3, tokens=300)
    assert torch.equal(engine.ddp.module.expert_bias, torch.full((3,), 0.5))
    engine.ddp.module.expert_bias.zero_()
    _record(path, "resumed", engine, ranks, _train(engine, ranks, range(3, 6)))
    stop_ranks()


@pytest.mark.parametrize(
    ("world", "overrides"),
    [
        pytest.param(1, (), id="1-fp32"),
        pytest.param(1, ("precision.recipe=bf16",), id="1-bf16"),
        pytest.param(2, ("checkpoint.async_save=false",), id="2-fp32"),
        pytest.param(2, ("precision.recipe=bf16", *OVERLAP), id="2-bf16-overlap"),
    ],
)
def test_resumed_run_is_bit_equal(
    run_ranks: Callable, tmp_path: Path, world: int, overrides: tuple[str, ...]
) -> None:
    for part in (_straight, _first_half, _second_half):
        run_ranks(world, part, tmp_path, overrides)
    for rank in range(world):
        straight = torch.load(tmp_path / f"straight_{rank}.pt")
        resumed = torch.load(tmp_path / f"resumed_{rank}.pt")
        assert len(straight) == len(resumed) >= 15
        for i, (expected, actual) in enumerate(zip(straight, resumed, strict=True)):
            assert torch.equal(actual, expected), i


def _resume_elsewhere(path: Path, overrides: tuple[str, ...]) -> None:
    ranks, engine, checkpoints = _start(path, *overrides, "optim.lr=5e-4", "optim.min_lr=0.0")
    assert checkpoints.load() == Progress(step=3, tokens=300)
    assert engine.counters() == {"optimizer_steps": 3, "schedule_steps": 4}
    assert engine.optimizer.param_groups[0]["lr"] == 5e-4, "the config sets the schedule"
    losses = _train(engine, ranks, range(3, 6))[:3]
    torch.save(torch.tensor(losses), path / f"other_{ranks.world_size}.pt")
    assert engine.counters() == {"optimizer_steps": 6, "schedule_steps": 7}
    stop_ranks()


@pytest.mark.parametrize("world", [1, 2])
def test_another_number_of_ranks_resumes(run_ranks: Callable, tmp_path: Path, world: int) -> None:
    overrides = ("precision.recipe=bf16",)
    run_ranks(3 - world, _first_half, tmp_path, overrides)
    for resumed in (world, 3 - world):
        run_ranks(resumed, _resume_elsewhere, tmp_path, overrides)
    losses = [torch.load(tmp_path / f"other_{n}.pt") for n in (1, 2)]
    # bf16 weights round a last-bit difference of the FP32 sums up to one bf16 step.
    assert torch.allclose(*losses, rtol=1e-3), losses
    model = Mlp(torch.bfloat16)
    folder = load_weights(tmp_path / "run", model)
    assert folder.name == "step_00000003"
    assert torch.equal(model.expert_bias, torch.full((3,), 0.5))


def _one_rank_is_slow(path: Path) -> None:
    ranks, _, checkpoints = _start(path)
    release, write = threading.Event(), FileSystemWriter.write_data

    def write_late(*args: Any) -> Any:
        assert release.wait(30)
        return write(*args)

    if ranks.rank == 1:
        FileSystemWriter.write_data = write_late
    checkpoints.save(1, tokens=1)
    for _ in range(20):
        checkpoints.poll()
    assert checkpoints.latest() is None, "published before rank 1 had written"
    release.set()
    checkpoints.finish()
    assert checkpoints.latest().name == "step_00000001"
    stop_ranks()


def test_ranks_publish_together(run_ranks: Callable, tmp_path: Path) -> None:
    run_ranks(2, _one_rank_is_slow, tmp_path)


def _one_rank_fails(path: Path) -> None:
    ranks, _, checkpoints = _start(path)
    checkpoints.save(1, tokens=1)
    checkpoints.finish()

    def write_to_full_disk(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if ranks.rank == 1:
        FileSystemWriter.write_data = write_to_full_disk
    checkpoints.save(2, tokens=2)
    with pytest.raises(CheckpointError, match="step_00000002 could not be written: rank 1: No sp"):
        checkpoints.finish()
    assert [p.name for p in sorted((path / "run/checkpoints").iterdir())] == [
        "latest",
        "step_00000001",
    ]
    assert checkpoints.load() == Progress(step=1, tokens=1)
    stop_ranks()


def test_failure_of_one_rank_reaches_all(run_ranks: Callable, tmp_path: Path) -> None:
    run_ranks(2, _one_rank_fails, tmp_path)
