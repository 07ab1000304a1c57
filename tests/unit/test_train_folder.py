"""What a run folder survives: damage, a second run, changed settings."""

import fcntl
import json
from pathlib import Path

import pytest
import torch

import nemomodel
from nemomodel.checkpoint.files import step_folders, step_of
from tests.ranks.test_train import write_config
from tests.unit.test_train_process import run_program


def test_damaged_checkpoint_does_not_displace_a_good_one(tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    arguments = (config, "checkpoint.keep=2", "train.stop_after=3", "checkpoint.interval=1")
    assert run_program(tmp_path, *arguments)[0] == 0
    newest = step_folders(tmp_path / "run/checkpoints")[0]
    (newest / "__0_0.distcp").write_bytes(b"cut short")
    code, stdout, stderr = run_program(tmp_path, config, "checkpoint.keep=2", "train.stop_after=4")
    assert (code, stderr) == (0, "")
    assert [step_of(folder) for folder in step_folders(newest.parent)] == [4, 2]
    assert f"checkpoint {newest.parent / 'step_00000004'}" in stdout.splitlines()[-1]


def test_second_run_in_a_folder_is_refused(tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    (tmp_path / "run").mkdir()
    with (tmp_path / "run/run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, stderr = run_program(tmp_path, config)
    assert code == 2
    assert stderr == (
        f"run.dir='{tmp_path}/run': another run is at work there; "
        "wait for it, or use another folder\n"
    )
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.lock"]


def test_changed_settings_are_told_and_tokens_are_counted_on(tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    assert run_program(tmp_path, config, "train.stop_after=2")[0] == 0
    changes = ("train.seq_length=64", "optim.lr=1e-3", "train.stop_after=3")
    code, stdout, _ = run_program(tmp_path, config, *changes)
    assert code == 0
    assert "train.seq_length=64, which was 32; the order of the data changes here" in stdout
    assert "optim.lr=0.001, which was 0.003\n" in stdout
    records = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(r)["data/tokens"] for r in records] == [128, 256, 512]


def test_run_that_is_further_than_its_schedule_is_refused(tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    assert run_program(tmp_path, config, "train.stop_after=7")[0] == 0
    code, _, stderr = run_program(tmp_path, config, "train.steps=6")
    assert code == 2
    assert stderr.startswith("train.steps=6: ")
    assert "is further already; use at least 7" in stderr


def test_folder_that_cannot_be_made_is_one_message(tmp_path: Path) -> None:
    write_config(tmp_path)
    code, _, stderr = run_program(tmp_path, str(tmp_path / "config.toml"), "run.dir=/dev/null/x")
    assert code == 2
    assert "Traceback" not in stderr


def test_filler_labels_under_the_mask_count_for_nothing(tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    assert run_program(tmp_path, config, "train.stop_after=1")[0] == 0
    model = nemomodel.load_model(tmp_path / "run")
    ids_BS = torch.randint(300, (2, 16))
    labels_BS, mask_BS = ids_BS.roll(-1, 1), torch.rand(2, 16) < 0.7
    expected = model.loss(ids_BS, labels_BS, mask_BS)
    assert torch.equal(model.loss(ids_BS, labels_BS.masked_fill(~mask_BS, -100), mask_BS), expected)
    with pytest.raises(ValueError, match=r"dtype=torch\.int32"):
        nemomodel.load_model(tmp_path / "run", dtype=torch.int32)


def test_overrides_may_follow_describe(tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    code, stdout, _ = run_program(tmp_path, config, "--describe", "train.seq_length=64")
    assert code == 0
    assert json.loads(stdout)["flops_per_token"]["seq_length"] == 64
