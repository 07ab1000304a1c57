"""Fixtures of all tests: seeds, and functions run on several forked ranks."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # every optimizer imports it: once here, not in each forked rank
import torch.distributed as dist
import torch.multiprocessing as mp


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@contextmanager
def fork_safely() -> Iterator[None]:
    """Keep a forked process from collecting garbage of its parent.

    Destroying a process group there waits for ever for threads that a fork does not copy.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., None]:
    """Run `fn(*args)` on `world` forked gloo ranks; the first failure reaches the test.

    Forking takes 0.2 s where spawning takes 7 s, and is safe in a process without CUDA.
    """
    runs = iter(range(1_000))

    def run(world: int, fn: Callable[..., None], *args: Any) -> None:
        store = tmp_path / f"store_{next(runs)}"
        with fork_safely():
            mp.start_processes(
                _entry, args=(world, store, fn, args), nprocs=world, start_method="fork"
            )

    return run


def _entry(rank: int, world: int, store: Path, fn: Callable[..., None], args: tuple) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # A file needs no port, so parallel test runs cannot collide.
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        fn(*args)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
