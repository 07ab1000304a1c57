"""The first 20 steps of configs/tiny.toml on fixed tokens, against the recorded ones.

To renew the record: python -m tests.unit.test_train_golden > tests/golden/tiny_cpu.json
"""

import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from nemomodel.config.load import load_config
from nemomodel.config.schema import Config
from tests.ranks.test_train import read_records, run_to_end, write_tokens

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden/tiny_cpu.json"
COMMAND = "python -m tests.unit.test_train_golden > tests/golden/tiny_cpu.json"
STEPS = 20
NAMES = ("loss/lm", "loss/mtp_1", "loss/mtp_2", "loss/aux", "optim/grad_norm", "optim/lr")


def golden_config(files: Path, run_dir: Path) -> Config:
    """Short sequences and small batches: twenty steps take two seconds."""
    if not (files / "train.bin").exists():
        write_tokens(files / "train", documents=1000, seed=3, vocab=2048)
    return load_config(
        ROOT / "configs/tiny.toml",
        [
            f"run.dir={run_dir}",
            f"train.stop_after={STEPS}",
            "train.global_batch_size=2",
            "train.micro_batch_size=1",
            "train.seq_length=96",
            "train.validation_interval=none",
            f'data.train=[{{path="{files}/train"}}]',
            "observe.log_interval=1",
            "observe.tensorboard=false",
        ],
    )


def test_first_steps_are_the_golden_ones_and_exactly_so_twice(
    run_ranks: Callable, tmp_path: Path
) -> None:
    found = []
    for name in ("first", "again"):
        run_ranks(1, run_to_end, golden_config(tmp_path, tmp_path / name))
        found.append(read_records(tmp_path / name))
    assert found[0] == found[1]
    golden = json.loads(GOLDEN.read_text())
    assert golden["command"] == COMMAND
    for name in NAMES:
        actual = [record[name] for record in found[0]]
        assert actual == pytest.approx(golden[name], rel=1e-4), name


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        run_to_end(golden_config(Path(folder), Path(folder) / "run"))
        records = read_records(Path(folder) / "run")
    golden = {"command": COMMAND} | {name: [r[name] for r in records] for name in NAMES}
    print(json.dumps(golden, indent=1))


if __name__ == "__main__":
    main()
