"""train.py as a process: exit codes, signals, sudden death, and going on after them."""

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

import train
from nemomodel.checkpoint.files import damage, step_folders, step_name, step_of
from tests.ranks.test_train import Result, assert_same_state, read_records, read_state, write_config

ROOT = Path(__file__).parents[2]
STEPS = 14
TIMEOUT = 300
"""Seconds; only a run that hangs takes so long."""
OVERRIDES = (f"train.steps={STEPS}", "checkpoint.interval=2", "train.validation_interval=7")


def start_program(folder: Path, *arguments: str) -> ForkProcess:
    """train.py in a forked process, which starts at once; its output goes to two files."""
    gc.collect()  # see the fixture `train` of test_train.py
    process = mp.get_context("fork").Process(target=_main, args=(folder, arguments), daemon=True)
    process.start()
    return process


def _main(folder: Path, arguments: tuple[str, ...]) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        setattr(sys, name, os.fdopen(number, "w", closefd=False, buffering=1))
    torch.set_num_threads(1)
    sys.argv = ["train.py", *arguments]
    sys.exit(train.main())


def run_program(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of train.py."""
    process = start_program(folder, *arguments)
    process.join(TIMEOUT)
    assert process.exitcode is not None, "train.py hangs"
    return process.exitcode, (folder / "stdout").read_text(), (folder / "stderr").read_text()


def wait_for(condition: Callable[[], bool], process: ForkProcess | subprocess.Popen) -> None:
    """Return as soon as `condition` holds; the process has to be alive until then."""
    alive = process.is_alive if isinstance(process, ForkProcess) else lambda: process.poll() is None
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert alive(), "train.py ended before it was disturbed"
        assert time.monotonic() < deadline
        time.sleep(0.001)


def has_done(run_dir: Path, step: int) -> Callable[[], bool]:
    """Whether metrics.jsonl has the record of `step`."""
    path = run_dir / "metrics.jsonl"
    return lambda: path.exists() and path.read_text().count("\n") >= step


def result(run_dir: Path, step: int = STEPS) -> Result:
    return read_records(run_dir), read_state(run_dir, step)


def assert_same_result(actual: Result, expected: Result) -> None:
    assert actual[0] == expected[0]
    assert_same_state(actual[1], expected[1])


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Result:
    """Records and last state of the run that nobody disturbs."""
    path = tmp_path_factory.mktemp("straight")
    code, _, stderr = run_program(path, str(write_config(path)), *OVERRIDES)
    assert (code, stderr) == (0, "")
    records, state = result(path / "run")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    return records, state


@pytest.mark.parametrize("step", [1, 8])
def test_killed_run_goes_on_as_if_nothing_had_happened(
    straight: Result, tmp_path: Path, step: int
) -> None:
    arguments = (str(write_config(tmp_path)), *OVERRIDES)
    process = start_program(tmp_path, *arguments)
    wait_for(has_done(tmp_path / "run", step), process)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    code, stdout, stderr = run_program(tmp_path, *arguments)
    assert (code, stderr) == (0, "")
    assert ("resuming after step" in stdout) == (step > 2)
    assert_same_result(result(tmp_path / "run"), straight)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("times", [1, 50])
def test_signal_saves_and_the_run_goes_on(
    straight: Result, tmp_path: Path, number: signal.Signals, times: int
) -> None:
    """Asked once, or again and again while it is saving."""
    arguments = (str(write_config(tmp_path)), *OVERRIDES, "checkpoint.interval=none")
    process = start_program(tmp_path, *arguments)
    wait_for(has_done(tmp_path / "run", 5), process)
    for _ in range(times):
        if process.is_alive():
            os.kill(process.pid, number)
            time.sleep(0.001)
    process.join(TIMEOUT)
    assert (process.exitcode, (tmp_path / "stderr").read_text()) == (75, "")
    stdout = (tmp_path / "stdout").read_text()
    assert stdout.count(f"{number.name}: stopping with a checkpoint after this step") == 1
    (folder,) = step_folders(tmp_path / "run/checkpoints")
    assert damage(folder) is None
    assert 5 <= step_of(folder) < STEPS
    assert read_records(tmp_path / "run")[-1]["step"] == step_of(folder)
    code, stdout, _ = run_program(tmp_path, *arguments)
    assert code == 0
    assert f"resuming after step {step_of(folder)} of {STEPS}" in stdout
    assert_same_result(result(tmp_path / "run"), straight)


def test_death_while_saving_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    arguments = (str(write_config(tmp_path)), "train.steps=200", "schedule.kind=constant")
    arguments += ("schedule.decay_steps=none", "optim.min_lr=0.0", "checkpoint.interval=1")
    root = tmp_path / "run/checkpoints"

    def saves() -> bool:
        return bool(step_folders(root)) and any(root.glob(".step_*.partial"))

    for _ in range(20):  # the folder may be published between the look and the kill
        process = start_program(tmp_path, *arguments)
        wait_for(saves, process)
        process.kill()
        process.join()
        if any(root.glob(".step_*.partial")):
            break
    assert any(root.glob(".step_*.partial"))
    last = step_of(step_folders(root)[0])
    stop = f"train.stop_after={last + 2}"
    code, stdout, _ = run_program(tmp_path, *arguments, stop)
    assert code == 0
    assert f"resuming after step {last} of 200" in stdout
    assert not list(root.glob(".step_*"))
    assert run_program(tmp_path, *arguments, stop, f"run.dir={tmp_path / 'straight'}")[0] == 0
    assert_same_result(result(tmp_path / "run", last + 2), result(tmp_path / "straight", last + 2))


@pytest.mark.parametrize("interval", ["none", "1"])
def test_gradient_that_is_not_finite_ends_the_run_before_the_update(
    straight: Result, tmp_path: Path, interval: str
) -> None:
    """An absurd rate at step 6 ruins the weights for step 7, whatever is being written then."""
    common = (str(write_config(tmp_path)), *OVERRIDES, "checkpoint.interval=none")
    assert run_program(tmp_path, *common, "train.stop_after=5")[0] == 0
    absurd = ("optim.lr=1e30", f"checkpoint.interval={interval}")
    code, stdout, stderr = run_program(tmp_path, *common, *absurd)
    assert code == 3
    assert stderr == (
        "step 7: gradient norm is nan; the weights were not updated. Resume from the last "
        "checkpoint with a lower optim.lr or other data\n"
    )
    assert "Traceback" not in stdout
    folders = step_folders(tmp_path / "run/checkpoints")
    assert [step_of(folder) for folder in folders] == ([5] if interval == "none" else [6, 5])
    assert [damage(folder) for folder in folders] == [None] * len(folders)
    if interval == "none":
        assert run_program(tmp_path, *common)[0] == 0
        assert_same_result(result(tmp_path / "run"), straight)


def test_run_that_is_further_than_stop_after_is_left_alone(tmp_path: Path) -> None:
    arguments = (str(write_config(tmp_path)),)
    assert run_program(tmp_path, *arguments)[0] == 0
    records, state = result(tmp_path / "run", 8)
    code, stdout, _ = run_program(tmp_path, *arguments, "train.stop_after=3")
    assert code == 0
    assert "stopped after step 8 of 8" in stdout
    assert [f.name for f in step_folders(tmp_path / "run/checkpoints")] == [step_name(8)]
    assert_same_result(result(tmp_path / "run", 8), (records, state))


def _python(folder: Path, *arguments: str) -> subprocess.Popen:
    """A real interpreter."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as err:
        return subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, env=environment, stdout=out, stderr=err
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "expected"),
    [(signal.SIGKILL, -9), (signal.SIGTERM, 75), (signal.SIGINT, 75)],
    ids=["SIGKILL", "SIGTERM", "SIGINT"],
)
def test_interpreter_that_is_stopped_goes_on(
    straight: Result, tmp_path: Path, number: signal.Signals, expected: int
) -> None:
    command = (str(ROOT / "train.py"), str(write_config(tmp_path)), *OVERRIDES)
    process = _python(tmp_path, *command)
    wait_for(has_done(tmp_path / "run", 5), process)
    process.send_signal(number)
    assert process.wait(TIMEOUT) == expected
    assert "Traceback" not in (tmp_path / "stderr").read_text()
    assert _python(tmp_path, *command).wait(TIMEOUT) == 0
    assert_same_result(result(tmp_path / "run"), straight)


@pytest.mark.slow
def test_launcher_that_is_stopped_saves_on_all_ranks(tmp_path: Path) -> None:
    """torchrun passes SIGTERM on to its ranks, and has an exit code of its own."""
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = (*launch, str(ROOT / "train.py"), str(write_config(tmp_path)), *OVERRIDES)
    process = _python(tmp_path, *command, "checkpoint.interval=none")
    wait_for(has_done(tmp_path / "run", 5), process)
    process.send_signal(signal.SIGTERM)
    process.wait(TIMEOUT)
    (folder,) = step_folders(tmp_path / "run/checkpoints")
    assert damage(folder) is None
    assert 5 <= step_of(folder) < STEPS
    assert _python(tmp_path, *command).wait(TIMEOUT) == 0
    straight = ("run.dir=" + str(tmp_path / "straight"), "checkpoint.interval=none")
    assert _python(tmp_path, *command, *straight).wait(TIMEOUT) == 0
    assert_same_result(result(tmp_path / "run"), result(tmp_path / "straight"))
