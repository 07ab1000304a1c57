"""What train.py says when its input is wrong: one clear text, an exit code, nothing written."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from nemomodel.checkpoint.files import damage, step_folders, step_name, step_of
from nemomodel.config.schema import Config
from nemomodel.data.tokenizer import train_tokenizer
from tests.ranks.test_train import assert_same_state, read_state, write_config
from tests.unit.test_train_process import ROOT, run_program


def assert_refused(path: Path, text: str, *overrides: str, code: int = 2) -> None:
    """The text is all there is on standard error, and no run folder was made."""
    found, _, stderr = run_program(path, str(path / "config.toml"), *overrides)
    assert found == code, stderr
    assert text in stderr
    assert "Traceback" not in stderr
    assert not (path / "run").exists()


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("train.step=9", "train.step: unknown key; did you mean 'steps'?"),
        ("optim.lr=-1.0", "optim.lr=-1.0: is not allowed; use a value above 0"),
        (
            "model.attention.num_kv_heads=3",
            "model.attention.num_heads=4 is not divisible by model.attention.num_kv_heads=3; "
            "use model.attention.num_kv_heads in {1, 2, 4}",
        ),
        (
            "train.micro_batch_size=3",
            "train.global_batch_size=4 is not divisible by train.micro_batch_size=3",
        ),
        ("model.vocab_size", "override 'model.vocab_size': expected section.key=value"),
        ("train.seq_length=100000", "tokens, less than one window of train.seq_length=100000"),
        ("train.validation_sequences=999", "train.validation_sequences=999: takes 999 sequences"),
    ],
)
def test_impossible_config_is_refused(tmp_path: Path, override: str, text: str) -> None:
    write_config(tmp_path)
    assert_refused(tmp_path, text, override)


def test_missing_config_is_named(tmp_path: Path) -> None:
    assert_refused(tmp_path, f"{tmp_path}/config.toml: No such file or directory")


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_missing_package_is_named(tmp_path: Path) -> None:
    write_config(tmp_path)
    text = 'observe.wandb_project="mine" needs the wandb package; pip install nemomodel[wandb]'
    assert_refused(tmp_path, text, "observe.wandb_project=mine")


def test_missing_and_truncated_token_files_are_named_together(tmp_path: Path) -> None:
    write_config(tmp_path)
    (tmp_path / "validation.idx").unlink()
    size = (tmp_path / "train.bin").stat().st_size
    os.truncate(tmp_path / "train.bin", size - 2)
    assert_refused(tmp_path, f"{tmp_path}/train.bin: has {size - 2:,} bytes, train.idx describes")
    assert_refused(tmp_path, f"{tmp_path}/validation.idx: no such file")


def test_tokenizer_that_does_not_fit_the_model_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # no threads before a fork
    write_config(tmp_path)
    path = tmp_path / "tokenizer.json"
    train_tokenizer(["some words to learn from, some more"] * 9, vocab_size=270).save(str(path))
    text = f"data.tokenizer='{path}': has 270 tokens, more than model.vocab_size=256"
    assert_refused(tmp_path, text, f"data.tokenizer={path}", "model.vocab_size=256")
    path.write_text("{}")
    assert_refused(tmp_path, "is not a tokenizer.json", f"data.tokenizer={path}")


@pytest.mark.parametrize("bad", [300, 65535])
def test_token_beyond_the_vocabulary_ends_the_run_when_it_is_read(tmp_path: Path, bad: int) -> None:
    config = str(write_config(tmp_path))
    tokens = np.memmap(tmp_path / "train.bin", "<u2", mode="r+")
    tokens[700] = bad
    tokens.flush()
    code, stdout, stderr = run_program(tmp_path, config, "train.steps=20")
    assert code == 2
    assert stderr == (
        f"{tmp_path}/train.bin: token id {bad} at position 700 is outside of model.vocab_size=300; "
        "the data were made with another tokenizer, or are damaged\n"
    )
    assert "Traceback" not in stdout


def test_number_of_ranks_has_to_fit_the_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    text = (
        "launch:\n  train.global_batch_size=3 is not divisible by train.micro_batch_size=1 times "
        "the 2 data-parallel rank(s) of WORLD_SIZE=2; use a multiple of 2\n"
    )
    for rank, prefix in (("0", ""), ("1", "rank 1: ")):
        monkeypatch.setenv("RANK", rank)
        assert_refused(tmp_path, prefix + text, "train.global_batch_size=3")


def test_run_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    (tmp_path / "taken").write_text("mine")
    code, _, stderr = run_program(tmp_path, config, f"run.dir={tmp_path}/taken")
    assert (code, stderr) == (2, f"run.dir='{tmp_path}/taken': File exists\n")
    assert (tmp_path / "taken").read_text() == "mine"


def _mount(folder: Path, options: str) -> None:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")


def test_run_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    _mount(tmp_path / "readonly", "ro")
    try:
        where = f"{tmp_path}/readonly/run"
        code, _, stderr = run_program(tmp_path, config, f"run.dir={where}")
        assert (code, stderr) == (2, f"run.dir='{where}': Read-only file system\n")
    finally:
        subprocess.run(["umount", str(tmp_path / "readonly")], check=True)


def test_full_disk_ends_the_run_with_the_checkpoint_before(tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    _mount(tmp_path / "small", "size=1500k")
    try:
        where = tmp_path / "small/run"
        arguments = (config, f"run.dir={where}", "checkpoint.interval=2")
        code, _, stderr = run_program(tmp_path, *arguments)
        assert code == 4
        assert f"checkpoints in {where}/checkpoints: step 4 needs 0.0" in stderr
        assert "make room, or use a smaller checkpoint.keep" in stderr
        assert "Traceback" not in stderr
        (folder,) = step_folders(where / "checkpoints")
        assert (step_of(folder), damage(folder)) == (2, None)
    finally:
        subprocess.run(["umount", str(tmp_path / "small")], check=True)


def test_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    assert run_program(tmp_path, config, "train.stop_after=1")[0] == 0
    before = read_state(tmp_path / "run", 1)
    code, _, stderr = run_program(tmp_path, config, "model.moe.num_experts=8", "model.ffn_size=50")
    folder = tmp_path / "run/checkpoints" / step_name(1)
    assert code == 4
    assert stderr == (
        f"checkpoint {folder}: saved with model.ffn_size=48, this run has 50; saved with "
        "model.moe.num_experts=4, this run has 8; the models differ\n"
    )
    assert_same_state(read_state(tmp_path / "run", 1), before)


def test_damaged_checkpoint_falls_back_and_says_so(tmp_path: Path) -> None:
    config = str(write_config(tmp_path))
    arguments = (config, "checkpoint.interval=2", "train.stop_after=4")
    assert run_program(tmp_path, *arguments)[0] == 0
    before = read_state(tmp_path / "run", 4)
    folders = [tmp_path / "run/checkpoints" / step_name(step) for step in (4, 2)]
    _damage(folders[0])
    code, stdout, stderr = run_program(tmp_path, *arguments)
    assert (code, stderr) == (0, "")
    assert f"WARNING: checkpoint {folders[0]} is damaged" in stdout
    assert "resuming after step 2 of 8" in stdout
    assert_same_state(read_state(tmp_path / "run", 4), before)
    for folder in folders:
        _damage(folder)
    code, _, stderr = run_program(tmp_path, *arguments)
    assert code == 4
    assert stderr.startswith(f"{tmp_path}/run/checkpoints: no intact checkpoint\n  {folders[0]}")
    assert [line.count("SHA-256 differs") for line in stderr.splitlines()] == [0, 1, 1]


def _damage(folder: Path) -> None:
    file = folder / "__0_0.distcp"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_help_lists_every_section() -> None:
    command = [sys.executable, "train.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    sections = [field.name for field in dataclasses.fields(Config)]
    for section in (*sections, "model.mamba", "model.attention", "model.moe", "model.mtp"):
        assert f"\n[{section}]" in done.stdout, section


def test_describe_needs_no_torch() -> None:
    """One interpreter for all configs; --describe of each is what a scheduler would read."""
    code = """
import contextlib, io, json, pathlib, sys, train
for path in sorted(pathlib.Path("configs").glob("*.toml")):
    sys.argv = ["train.py", str(path), "--describe"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert train.main() == 0, path
    assert json.loads(out.getvalue())["parameters_total"] > 0, path
    print(path.name)
assert "torch" not in sys.modules and "megatron" not in sys.modules
"""

    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == len(list((ROOT / "configs").glob("*.toml"))) > 0
