"""A rank none of whose experts was chosen still takes part, and gradients are those of one rank."""

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nemomodel.config.schema import Config
from nemomodel.parallel.mcore import start_ranks, stop_ranks
from nemomodel.train.loop import build_engine
from tests.close import assert_close
from tests.ranks.gradients import whole_gradients
from tests.ranks.test_layouts import MODEL
from tests.ranks.test_train import backward, make_config


def _save_gradients(config: Config, path: Path) -> None:
    ranks = start_ranks(config)
    engine = build_engine(config, ranks)
    for router in engine.ddp.module.routers().values():
        router.expert_bias[: config.model.moe.top_k] = 10.0  # far above any score
    backward(config, engine, ranks, 0)
    gradients = whole_gradients(engine, ranks)
    if ranks.rank == 0:
        torch.save(gradients, path)
    stop_ranks()


@pytest.mark.parametrize(
    ("world", "degrees"), [(2, ("ep=2",)), (4, ("ep=2", "etp=2"))], ids=["ep2", "ep2 etp2"]
)
def test_ranks_without_tokens_change_no_gradient(
    world: int, degrees: tuple[str, ...], run_ranks: Callable, tmp_path: Path
) -> None:
    for number, axes in ((1, ()), (world, degrees)):
        config = make_config(tmp_path, *MODEL, *(f"parallel.{axis}" for axis in axes))
        gc.collect()
        run_ranks(number, _save_gradients, config, tmp_path / f"{number}.pt")
    expected, actual = torch.load(tmp_path / "1.pt"), torch.load(tmp_path / f"{world}.pt")
    for name, gradient in expected.items():
        if ".experts." in name:
            assert gradient[:2].any(), name
            assert not gradient[2:].any(), name
        assert_close(actual[name], gradient, limit=1e-5, name=name)
