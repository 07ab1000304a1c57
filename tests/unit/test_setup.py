"""launch/local sets up once, starts the job at once after that, and hands its end through.

The script runs for real in a copy of the repository's set-up files; a small shell script stands
for Python and for uv and writes down how it was called.
"""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Runs its job for `-c` (a shell command here), makes a venv for `-m venv`, and takes notes.
PYTHON = """#!/bin/bash
case "$1 $2" in
"-c import"*) exit 0 ;;
"-c "*) exec bash -c "$2" ;;
"-m venv")
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    cp "$(dirname "$0")/fake_uv" "$3/bin/uv" ;;
"-m pip") exit 0 ;;
esac
echo "python OMP_NUM_THREADS=$OMP_NUM_THREADS $*" >>"$NOTES"
"""
UV = """#!/bin/bash
echo "uv $*" >>"$NOTES"
if [ -n "$UV_SLEEP" ]; then sleep "$UV_SLEEP"; fi
exit "${UV_EXIT:-0}"
"""

TOOLS = ("bash", "cat", "cut", "dirname", "flock", "realpath", "sha256sum", "sort", "tr")


class Checkout:
    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "repo" / "launch").mkdir(parents=True)
        for name in "launch/local", "pyproject.toml", "constraints.txt":
            shutil.copy(ROOT / name, root / "repo" / name)
        (root / "bin").mkdir()
        for name, text in [("python3.12", PYTHON), ("fake_uv", UV)]:
            (root / "bin" / name).write_text(text)
            (root / "bin" / name).chmod(0o755)
        self.notes = root / "notes"
        self.venv = root / "repo" / ".venv"
        self.environment = {
            "PATH": f"{root / 'bin'}:/usr/bin:/bin",
            "HOME": str(root),
            "NOTES": str(self.notes),
            "CUDA_VISIBLE_DEVICES": "",
        }

    def start(self, *args: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [self.root / "repo" / "launch" / "local", *args],
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def call(self, *args: str, **environment: str) -> tuple[int, str]:
        process = self.start(*args, **environment)
        _, err = process.communicate(timeout=60)
        return process.returncode, err

    def take_notes(self) -> list[str]:
        """What was called since the last time."""
        lines = self.notes.read_text().splitlines() if self.notes.exists() else []
        self.notes.unlink(missing_ok=True)
        return [line.replace(str(self.root), "") for line in lines]


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def install(target: str) -> str:
    install = f"uv pip install -c /repo/constraints.txt -e {target}"
    return f"{install} --compile-bytecode --python /repo/.venv/bin/python"


@pytest.mark.parametrize("args", [(), ("train",), ("run", "x.toml"), ("--help",)], ids=str)
def test_wrong_input_shows_the_usage(checkout, args):
    code, err = checkout.call(*args)
    assert code == 2
    assert err.startswith("usage: launch/local train CONFIG.toml")
    assert not checkout.venv.exists()


def test_the_first_call_sets_up_and_later_ones_start_at_once(checkout):
    assert checkout.call("python", "tool.py", "a b")[0] == 0
    notes = checkout.take_notes()
    assert notes[0].startswith("python OMP_NUM_THREADS= -m venv /repo/.venv")
    assert notes[1:] == [install("/repo"), "python OMP_NUM_THREADS= tool.py a b"]
    assert checkout.call("python", "tool.py") == (0, "")
    assert checkout.take_notes() == ["python OMP_NUM_THREADS= tool.py"]


def test_a_later_call_costs_less_than_a_second(checkout):
    checkout.call("python")
    start = time.perf_counter()
    checkout.call("python")
    assert time.perf_counter() - start < 1


def test_the_tests_need_more_packages_than_training(checkout):
    checkout.call("train", "a.toml")
    checkout.take_notes()
    checkout.call("test", "-k", "x")
    assert checkout.take_notes() == [
        install("/repo[dev,hf]"),
        "python OMP_NUM_THREADS=1 -m pytest -k x",
    ]
    checkout.call("python", "tool.py")
    assert checkout.take_notes() == ["python OMP_NUM_THREADS= tool.py"]


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_a_changed_lock_is_installed_with_the_extras_that_were_there(checkout, name):
    checkout.call("test")
    checkout.take_notes()
    with (checkout.root / "repo" / name).open("a") as file:
        file.write("# changed\n")
    checkout.call("python", "tool.py")
    assert checkout.take_notes() == [
        install("/repo[dev,hf]"),
        "python OMP_NUM_THREADS= tool.py",
    ]


def test_train_is_one_process_on_a_cpu_with_all_its_cores(checkout):
    checkout.call("train", "a.toml", "train.steps=2")
    cores = len(os.sched_getaffinity(0))
    job = f"python OMP_NUM_THREADS={cores} /repo/train.py a.toml train.steps=2"
    assert checkout.take_notes()[-1] == job


@pytest.mark.parametrize(("variable", "value"), [("NPROC", "3"), ("CUDA_VISIBLE_DEVICES", "0,2,5")])
def test_train_starts_one_process_per_gpu_or_as_many_as_asked(checkout, variable, value):
    checkout.call("train", "a.toml", OMP_NUM_THREADS="1", **{variable: value})
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node=3"
    job = f"python OMP_NUM_THREADS=1 {torchrun} /repo/train.py a.toml"
    assert checkout.take_notes()[-1] == job


def test_without_uv_pip_installs(checkout):
    code, err = checkout.call("python", "tool.py", UV_EXIT="1")
    assert code == 0
    assert "uv failed, see above; installing with pip, which takes longer" in err


def test_a_set_up_that_was_cut_short_is_made_anew(checkout):
    process = checkout.start("python", "tool.py", UV_SLEEP="60")
    while not (checkout.notes.exists() and "uv pip install" in checkout.notes.read_text()):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=10)
    checkout.take_notes()
    leftover = checkout.venv / "half_installed"
    leftover.touch()
    code, err = checkout.call("python", "tool.py")
    assert code == 0
    assert "was cut short; making it anew" in err
    assert not leftover.exists()


def test_two_calls_at_once_install_once(checkout):
    calls = [checkout.start("python", "tool.py", UV_SLEEP="0.3") for _ in range(2)]
    for process in calls:
        process.communicate(timeout=60)
    notes = checkout.take_notes()
    assert notes.count(install("/repo")) == 1
    assert notes.count("python OMP_NUM_THREADS= tool.py") == 2


def test_a_venv_of_the_user_is_used(checkout):
    (checkout.venv / "bin").mkdir(parents=True)
    shutil.copy(checkout.root / "bin" / "python3.12", checkout.venv / "bin" / "python")
    shutil.copy(checkout.root / "bin" / "fake_uv", checkout.venv / "bin" / "uv")
    checkout.call("python", "tool.py")
    assert checkout.take_notes() == [install("/repo"), "python OMP_NUM_THREADS= tool.py"]


def test_a_broken_venv_of_the_user_is_reported_and_left_alone(checkout):
    checkout.venv.mkdir()
    code, err = checkout.call("python", "tool.py")
    assert code == 1
    assert "does not run or is older than 3.12; remove .venv" in err


def test_a_moved_checkout_is_set_up_again(checkout):
    checkout.call("python", "tool.py")
    checkout.take_notes()
    shutil.move(checkout.root / "repo", checkout.root / "moved")
    (checkout.root / "repo").symlink_to("moved")
    code, err = checkout.call("python", "tool.py")
    assert code == 0
    assert "the folder of .venv changed; making it anew" in err


def test_without_python_and_uv_the_message_says_what_to_install(checkout):
    # A PATH of only what the script itself needs, so that no Python of this machine is found.
    (checkout.root / "bin" / "python3.12").unlink()
    for tool in TOOLS:
        (checkout.root / "bin" / tool).symlink_to(shutil.which(tool))
    code, err = checkout.call("python", "tool.py", PATH=str(checkout.root / "bin"))
    assert code == 1
    assert "found neither Python 3.12 or newer with its venv module nor uv" in err


def test_the_exit_code_is_the_job_s(checkout):
    assert checkout.call("python", "-c", "exit 7")[0] == 7


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_job(checkout, number):
    ready = checkout.root / "ready"
    script = f"trap 'exit 9' TERM INT; touch {ready}; while :; do sleep 0.02; done"
    process = checkout.start("python", "-c", script)
    while not ready.exists():
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(timeout=10) == 9
