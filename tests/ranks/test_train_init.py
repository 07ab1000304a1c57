"""checkpoint.init_from: a new run from the weights of another one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nemomodel.checkpoint.files import CheckpointError, step_name
from nemomodel.checkpoint.huggingface.exporting import export_checkpoint
from nemomodel.checkpoint.huggingface.importing import import_folder
from nemomodel.checkpoint.huggingface.verify import verify
from nemomodel.train.loop import run
from tests.ranks.test_train import Result, make_config
from tests.ranks.test_train import train as train  # the fixture

Train = Callable[..., Result]
STILL = (
    "optim.lr=1e-30",
    "optim.min_lr=0",
    "train.stop_after=1",
    "model.moe.bias_update_rate=0",
)
"""One update that moves nothing."""


@pytest.mark.parametrize(
    ("world", "recipe", "overlap"),
    [(1, "fp32", False), (2, "bf16", False), (2, "bf16", True)],
    ids=["1-fp32", "2-bf16", "2-bf16-overlap"],
)
def test_starts_with_the_weights_and_nothing_else(
    train: Train, tmp_path: Path, world: int, recipe: str, overlap: bool
) -> None:
    precision = f"precision.recipe={recipe}"
    flag = str(overlap).lower()
    flags = (f"parallel.overlap_grad_reduce={flag}", f"parallel.overlap_param_gather={flag}")
    _, source = train("source", precision, "train.stop_after=3")
    start = f"checkpoint.init_from={tmp_path / 'source'}"
    _, state = train("new", precision, start, *flags, *STILL, world=world)
    weights = [name for name in source if name.startswith("model.")]
    assert [n for n in weights if not torch.equal(state[n], source[n])] == []
    # The optimizer too: else the next update would put the initial weights back.
    masters = {n: f"optimizer.state.param.{n}" for n in weights if not n.endswith("expert_bias")}
    assert [n for n, m in masters.items() if not torch.equal(state[m], source[n].float())] == []
    saved = json.loads((tmp_path / "new/checkpoints" / step_name(1) / "state.json").read_text())
    assert (saved["step"], saved["optimizer_steps"]) == (1, 1)


@pytest.mark.parametrize("layout", ["tp=2", "pp=2", "ep=2"])
@pytest.mark.parametrize("imported", [False, True], ids=["checkpoint", "folder"])
def test_every_layout_starts_with_the_weights(
    train: Train, tmp_path: Path, layout: str, imported: bool
) -> None:
    _, source = train("source", "train.stop_after=2")
    path = tmp_path / "source"
    if imported:
        path = tmp_path / "hf"
        export_checkpoint(tmp_path / "source", path)
    start = f"checkpoint.init_from={path}"
    _, state = train("new", start, f"parallel.{layout}", *STILL, world=2)
    weights = [name for name in source if name.startswith("model.")]
    assert [n for n in weights if not torch.equal(state[n], source[n])] == []


def test_own_checkpoint_comes_first(train: Train, tmp_path: Path) -> None:
    straight, state = train("straight")
    train("parts", "train.stop_after=3")
    gone = f"checkpoint.init_from={tmp_path / 'nowhere'}"
    parts, parts_state = train("parts", gone)
    assert parts == straight
    assert [name for name in state if not torch.equal(parts_state[name], state[name])] == []


def test_source_that_is_not_there(train: Train, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no checkpoint here"):
        run(make_config(tmp_path / "files", f"checkpoint.init_from={tmp_path / 'nowhere'}"))


def test_source_of_another_model_is_refused_with_every_difference(
    train: Train, tmp_path: Path
) -> None:
    train("source", "train.stop_after=1")
    overrides = ("model.hidden_size=48", "model.norm_eps=1e-6")
    config = make_config(
        tmp_path / "files", f"checkpoint.init_from={tmp_path / 'source'}", *overrides
    )
    with pytest.raises(CheckpointError, match="models differ") as error:
        run(config)
    assert "model.hidden_size" in str(error.value)
    assert "model.norm_eps" in str(error.value)


@pytest.mark.parametrize("imported", [False, True], ids=["folder", "imported"])
def test_hugging_face_weights_go_in_and_out_of_a_run(
    train: Train, tmp_path: Path, imported: bool
) -> None:
    """What the folder says beside the model comes out again with the trained weights."""
    _, source = train("source", "train.stop_after=1")
    folder = tmp_path / "hf"
    export_checkpoint(tmp_path / "source", folder, dtype=None, shard_bytes=2**30, vocab_size=None)
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"eos_token_id": 7, "rope_theta": 1e4}))
    if imported:
        import_folder(folder, tmp_path / "imported")
        folder = tmp_path / "imported"
    _, state = train("new", f"checkpoint.init_from={folder}", *STILL, world=2)
    weights = [name for name in source if name.startswith("model.")]
    assert [n for n in weights if not torch.equal(state[n], source[n])] == []
    back = tmp_path / "back"
    export_checkpoint(tmp_path / "new", back, dtype=None, shard_bytes=2**30, vocab_size=None)
    raw = json.loads((back / "config.json").read_text())
    assert (raw["eos_token_id"], raw["rope_theta"]) == (7, 1e4)
    assert [line.name for line in verify(folder, back) if not line.equal] == []
