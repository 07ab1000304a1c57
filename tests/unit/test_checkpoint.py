"""Publishing, verification and failure of checkpoints, in one process."""

import errno
import json
import logging
import os
import pickle
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch.distributed.checkpoint import FileSystemWriter

from nemomodel.checkpoint.checkpoints import CheckpointError, Checkpoints, Progress
from nemomodel.checkpoint.files import SafeReader
from nemomodel.checkpoint.weights import load_weights, read_config
from nemomodel.config.load import parse_config
from nemomodel.config.schema import Config
from nemomodel.parallel.mcore import Ranks, start_ranks, stop_ranks
from tests.conftest import fork_safely
from tests.ranks.test_engine import Mlp, make_config, make_engine, train


@pytest.fixture
def run(tmp_path: Path) -> Iterator["Run"]:
    yield Run(tmp_path)
    stop_ranks()


class Run:
    """A one-rank run in its folder."""

    def __init__(self, path: Path, *overrides: str) -> None:
        self.config = make_config(f"run.dir={path / 'run'}", *overrides)
        self.ranks = start_ranks(self.config)
        self.engine = make_engine(self.config, self.ranks)
        self.checkpoints = Checkpoints(self.config, self.ranks, self.engine)
        self.root = path / "run/checkpoints"

    def save(self, step: int) -> None:
        self.checkpoints.save(step, tokens=10 * step)
        self.checkpoints.finish()

    def names(self) -> list[str]:
        return sorted(path.name for path in self.root.iterdir())

    @property
    def model(self) -> Mlp:
        return self.engine.ddp.module


def test_folder_is_published_whole_with_pointer_and_manifest(run: Run) -> None:
    run.save(1)
    assert run.names() == ["latest", "step_00000001"]
    assert (run.root / "latest").read_text() == "step_00000001"
    folder = run.root / "step_00000001"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["step"], manifest["world_size"]) == (1, 1, 1)
    assert {path.name for path in folder.iterdir()} == {*manifest["files"], "manifest.json"}


def test_only_the_newest_are_kept(run: Run) -> None:
    for step in (1, 2, 3, 4):
        run.save(step)
    assert run.names() == ["latest", "step_00000003", "step_00000004"]
    run.save(4)
    assert run.names() == ["latest", "step_00000003", "step_00000004"]


def test_training_on_does_not_change_what_is_written(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = {name: value.clone() for name, value in run.model.state_dict().items()}
    release = threading.Event()
    write = FileSystemWriter.write_data

    def write_after_the_change(*args: Any) -> Any:
        assert release.wait(30)
        return write(*args)

    monkeypatch.setattr(FileSystemWriter, "write_data", write_after_the_change)
    run.checkpoints.save(1, tokens=10)
    for value in (*run.model.state_dict().values(), *run.engine.optimizer.get_parameters()):
        value.data.fill_(99.0)
    run.checkpoints.poll()
    assert run.checkpoints.latest() is None
    release.set()
    run.checkpoints.finish()
    model = Mlp(torch.float32)
    load_weights(run.root.parent, model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert run.checkpoints.load() == Progress(step=1, tokens=10)
    for shard in run.engine.optimizer.get_parameters():
        assert not (shard == 99.0).any()


def test_config_is_saved_as_plain_data(run: Run) -> None:
    run.save(1)
    saved: Config = parse_config(read_config(run.root.parent), where="checkpoint")
    assert saved == run.config


def _flip_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


@pytest.mark.parametrize(
    ("name", "hurt", "message"),
    [
        ("__0_0.distcp", _flip_byte, "SHA-256 differs"),
        ("__0_0.distcp", _truncate, "the manifest says"),
        ("rng_00000.pt", Path.unlink, "No such file"),
        (".metadata", _flip_byte, "SHA-256 differs"),
        ("manifest.json", Path.unlink, "No such file"),
        ("manifest.json", _truncate, "Expecting"),
    ],
)
def test_damage_falls_back_to_the_one_before(
    run: Run,
    caplog: pytest.LogCaptureFixture,
    name: str,
    hurt: Callable[[Path], None],
    message: str,
) -> None:
    run.save(1)
    run.model.A_log.data.fill_(5.0)
    run.save(2)
    hurt(run.root / "step_00000002" / name)
    with caplog.at_level(logging.WARNING):
        assert run.checkpoints.load() == Progress(step=1, tokens=10)
    (line,) = (r.getMessage() for r in caplog.records if r.name.startswith("nemomodel"))
    assert str(run.root / "step_00000002" / name) in line
    assert message in line
    assert not (run.model.A_log == 5.0).any()
    assert load_weights(run.root.parent, Mlp(torch.float32)).name == "step_00000001"
    hurt(run.root / "step_00000001" / name)
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        run.checkpoints.load()
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        load_weights(run.root.parent, Mlp(torch.float32))


def _die_while_saving(_: int, path: Path) -> None:
    run = Run(path)
    run.save(1)
    os.fsync = lambda file: time.sleep(60)  # the bytes are written, and the writer hangs
    run.checkpoints.save(2, tokens=20)
    time.sleep(60)


def test_killed_while_saving_leaves_the_one_before(tmp_path: Path) -> None:
    with fork_safely():
        context = mp.start_processes(
            _die_while_saving, args=(tmp_path,), nprocs=1, join=False, start_method="fork"
        )
    partial = tmp_path / "run/checkpoints/.step_00000002.partial"
    deadline = time.monotonic() + 30
    while not (partial / "__0_0.distcp").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(context.processes[0].pid, signal.SIGKILL)
    context.processes[0].join()
    assert partial.is_dir()
    run = Run(tmp_path)
    assert run.names() == ["latest", "step_00000001"], "the partial folder is gone"
    assert run.checkpoints.load() == Progress(step=1, tokens=10)
    stop_ranks()


def test_disk_without_room_is_told_before_writing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.save(1)
    usage = shutil.disk_usage(run.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"step 2 needs 0\.000 GB, the disk has 0\.000 GB"):
        run.checkpoints.save(2, tokens=20)
    assert run.names() == ["latest", "step_00000001"]


def _write_beyond_the_limit(path: Path) -> None:
    run = Run(path)
    run.save(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    _expect_failure(run, os.strerror(errno.EFBIG))
    stop_ranks()


def _expect_failure(run: Run, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason) as caught:
        run.save(2)
    assert f"{run.root / 'step_00000002'} could not be written: rank 0" in str(caught.value)
    assert run.names() == ["latest", "step_00000001"]
    assert run.checkpoints.load() == Progress(step=1, tokens=10)


def test_failing_write_is_one_clear_error(run_ranks: Callable, tmp_path: Path) -> None:
    run_ranks(1, _write_beyond_the_limit, tmp_path)


def test_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounted = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(tmp_path)]
    if os.geteuid() or subprocess.run(mounted, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        run = Run(tmp_path)
        run.save(1)
        usage = shutil.disk_usage(run.root)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10**9))
        _expect_failure(run, "No space left on device")
    finally:
        stop_ranks()
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_another_model_is_refused_with_every_difference(run: Run, tmp_path: Path) -> None:
    run.save(1)
    stop_ranks()
    other = Run(tmp_path, "model.layer_pattern=MEM*-", "model.moe.top_k=3", "model.init_std=0.5")
    with pytest.raises(CheckpointError) as caught:
        other.checkpoints.load()
    assert str(caught.value) == (
        f'checkpoint {run.root}/step_00000001: saved with model.layer_pattern="MEM*-MEME", this '
        'run has "MEM*-"; saved with model.moe.top_k=2, this run has 3; the models differ'
    )


def test_other_shapes_are_named(run: Run) -> None:
    run.save(1)
    model = Mlp(torch.float32)
    model.fc1 = torch.nn.Parameter(torch.zeros(3, 4))
    model.extra = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(CheckpointError) as caught:
        load_weights(run.root.parent, model)
    assert str(caught.value).split("\n  ")[1:] == [
        "tensor model.fc1: checkpoint has [32, 32], model needs [3, 4]",
        "tensor model.extra: checkpoint has no such tensor, model needs [2]",
    ]


def test_weights_load_without_process_groups_or_megatron(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save(1)
    expected = run.model.state_dict()
    stop_ranks()
    model = Mlp(torch.float32)
    assert load_weights(tmp_path / "run/checkpoints/step_00000001", model).name == "step_00000001"
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        load_weights(tmp_path, model)


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


def test_index_that_names_a_function_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Evil()))
    with pytest.raises(CheckpointError, match=r"names posix\.system, which is not a tensor type"):
        SafeReader(tmp_path).read_metadata()


def test_format_of_the_future_is_refused(run: Run) -> None:
    run.save(1)
    path = run.root / "step_00000001/manifest.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckpointError, match="format=2; this version reads format 1"):
        run.checkpoints.load()


def test_schedule_and_bias_correction_go_on(run: Run) -> None:
    ranks: Ranks = run.ranks
    train(run.engine.ddp, run.engine.optimizer, run.engine.scheduler, ranks, range(2))
    run.save(2)
    assert run.checkpoints.load() == Progress(step=2, tokens=20)
    train(run.engine.ddp, run.engine.optimizer, run.engine.scheduler, ranks, range(2))
    # Each parameter has its own step tensor; a shared one would count once per parameter.
    assert run.engine.counters() == {"optimizer_steps": 4, "schedule_steps": 5}
