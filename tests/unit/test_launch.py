"""The launchers of clusters: their syntax, how they end, and two nodes on this machine.

A node is a process of launch/node. Slurm's commands are small scripts that write down how they
were called; a Kubernetes manifest is checked against the schema of the API.
"""

import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from nemomodel.checkpoint.files import damage, step_folders, step_of
from nemomodel.config.checks import rank_problems
from nemomodel.config.load import load_config
from nemomodel.config.schema import Config
from nemomodel.model.layout import describe_layout
from nemomodel.train import faults
from tests.ranks.test_train import Result, write_config
from tests.ranks.test_train import train as train  # the fixture
from tests.unit.test_train_process import (
    OVERRIDES,
    STEPS,
    assert_same_result,
    has_done,
    result,
    wait_for,
)

ROOT = Path(__file__).parents[2]
SHELL_SCRIPTS = ("launch/local", "launch/node", "launch/slurm.sbatch")
SBATCH = (ROOT / "launch/slurm.sbatch").read_text()
PARAMETERS, SERVICE, JOB = yaml.safe_load_all((ROOT / "launch/kubernetes.yaml").read_text())
TIMEOUT = 240
# Long options of sbatch, from its manual page (slurm.schedmd.com/sbatch.html, release 22.05).
SBATCH_OPTIONS = set(
    """
account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment constraint
container contiguous core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline
delay-boot dependency distribution error exclude exclusive export export-file extra-node-info
get-user-env gid gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket gpus-per-task gres
gres-flags hint hold ignore-pbs input job-name kill-on-invalid-dep licenses mail-type mail-user
mcs-label mem mem-bind mem-per-cpu mem-per-gpu mincpus network nice no-kill no-requeue nodefile
nodelist nodes ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket open-mode
output overcommit oversubscribe parsable partition power prefer priority profile propagate qos
quiet reboot requeue reservation signal sockets-per-node spread-job switches test-only
thread-spec threads-per-core time time-min tmp uid use-min-nodes verbose wait wait-all-nodes
wckey wrap
""".split()  # noqa: SIM905
)


@pytest.mark.parametrize("script", SHELL_SCRIPTS)
def test_shell_script_is_sound(script: str) -> None:
    subprocess.run(["bash", "-n", ROOT / script], check=True)
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck is not installed: pip install -e .[dev]")
    found = subprocess.run([shellcheck, ROOT / script], capture_output=True, text=True)
    assert found.stdout == ""
    assert found.returncode == 0


def test_directives_are_options_of_sbatch() -> None:
    lines = re.findall(r"^#SBATCH (.*)$", SBATCH, re.MULTILINE)
    options = dict(line.removeprefix("--").partition("=")[::2] for line in lines)
    assert len(options) == len(lines) >= 10
    assert set(options) <= SBATCH_OPTIONS
    head, _, rest = SBATCH.partition("set -euo pipefail")
    assert "#SBATCH" not in rest, "sbatch stops reading at the first command"
    assert all(line.startswith("#") for line in head.splitlines())
    assert options["ntasks-per-node"] == "1"
    name, seconds = options["signal"].split("@")  # no B: the steps get it, not the script
    assert hasattr(signal, f"SIG{name}")
    assert int(seconds) >= 300
    assert {"requeue": "", "open-mode": "append"}.items() <= options.items()


@pytest.mark.parametrize("document", [PARAMETERS, SERVICE, JOB], ids=lambda d: d["kind"])
def test_manifest_fits_the_schema_of_kubernetes(document: dict) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install -e .[dev]").validate
    validate(document, "1.31", strict=True)


def test_manifest_agrees_with_itself() -> None:
    spec, parameters = JOB["spec"], PARAMETERS["data"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert spec["parallelism"] == spec["completions"] == int(parameters["NODES"])
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert gpus == int(parameters["RANKS_PER_NODE"])
    # The name of pod 0, as the Service gives it.
    job, service = JOB["metadata"]["name"], SERVICE["metadata"]["name"]
    assert parameters["RENDEZVOUS"].startswith(f"{job}-0.{service}:")
    assert pod["subdomain"] == service
    assert SERVICE["spec"]["selector"] == {"batch.kubernetes.io/job-name": job}
    assert container["envFrom"] == [{"configMapRef": {"name": PARAMETERS["metadata"]["name"]}}]
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    # What follows the image's folder exists here, and is a valid command.
    program, path = container["command"][0], container["args"][0]
    assert (ROOT / program.removeprefix("/nemomodel/")).exists()
    config = load_config(ROOT / path.removeprefix("/nemomodel/"), container["args"][1:])
    assert isinstance(config, Config)


def test_manifest_knows_the_exit_codes() -> None:
    rules = JOB["spec"]["podFailurePolicy"]["rules"]
    actions = {
        code: rule["action"]
        for rule in rules
        for code in rule.get("onExitCodes", {}).get("values", ())
    }
    assert actions == {
        faults.EXIT_BAD_INPUT: "FailJob",
        faults.EXIT_NOT_FINITE: "FailJob",
        faults.EXIT_INTERRUPTED: "Ignore",
    }
    assert {r["onExitCodes"]["containerName"] for r in rules if "onExitCodes" in r} == {"train"}


def test_launcher_knows_the_exit_codes() -> None:
    launcher = runpy.run_path(str(ROOT / "launch/torchrun.py"))
    assert {*launcher["REASONS"]} == {v for k, v in vars(faults).items() if k.startswith("EXIT_")}
    final = {faults.EXIT_BAD_INPUT, faults.EXIT_NOT_FINITE, faults.EXIT_INTERRUPTED}
    assert launcher["FINAL"] == final


def slurm(tmp_path: Path, code: int, **environment: str) -> tuple[int, str, list[str]]:
    """Exit code and messages of the batch script, and the calls of Slurm's commands."""
    notes = tmp_path / "notes"
    srun = f'echo "srun $NODES $RANKS_PER_NODE $RENDEZVOUS $RUN_ID $LOGS $*" >>{notes}; exit {code}'
    scontrol = f'[[ $1 != show ]] || {{ echo n3; echo n4; exit; }}; echo "scontrol $*" >>{notes}'
    for name, line in (("srun", srun), ("scontrol", scontrol)):
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "n[3-4]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
    }
    command = ["bash", ROOT / "launch/slurm.sbatch", "a.toml", 'data.train=[{path="x y"}]']
    done = subprocess.run(command, env=variables | environment, capture_output=True, text=True)
    calls = notes.read_text().replace(str(ROOT), "") if notes.exists() else ""
    return done.returncode, done.stderr, calls.splitlines()


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 5, 75, 137])
def test_slurm_queues_a_job_again_that_was_asked_to_stop(tmp_path: Path, code: int) -> None:
    returned, err, calls = slurm(tmp_path, code)
    assert (returned, err) == (code, "")
    where = "2 8 n3:23456 123456-0 /logs/123456"
    options = "--kill-on-bad-exit=0 --wait=120"
    assert calls[0] == f'srun {where} {options} /launch/node a.toml data.train=[{{path="x y"}}]'
    assert calls[1:] == (["scontrol requeue 123456"] if code == 75 else [])


def test_slurm_job_takes_parameters_from_the_environment(tmp_path: Path) -> None:
    own = {"NODES": "1:2", "RANKS_PER_NODE": "4", "RENDEZVOUS": "n9:1", "LOGS": "/l"}
    _, _, calls = slurm(tmp_path, 0, SLURM_RESTART_COUNT="5", **own)
    assert calls[0].startswith("srun 1:2 4 n9:1 123456-5 /l --")


def test_slurm_job_submitted_from_elsewhere_says_so(tmp_path: Path) -> None:
    code, err, calls = slurm(tmp_path, 0, SLURM_SUBMIT_DIR="/tmp")
    assert code == 2
    assert "/tmp is not the root of the checkout" in err
    assert calls == []


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


Start = Callable[..., subprocess.Popen]


@pytest.fixture
def start() -> Iterator[Start]:
    """start(folder, command, **variables): a process whose output goes to files in `folder`."""
    running = []

    def start_process(folder: Path, *command: str | Path, **variables: str) -> subprocess.Popen:
        folder.mkdir(exist_ok=True)
        with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as err:
            environment = os.environ | variables
            running.append(subprocess.Popen(command, env=environment, stdout=out, stderr=err))
        return running[-1]

    yield start_process
    for process in running:
        if process.poll() is None:
            for pid in (*children(process.pid), process.pid):
                os.kill(pid, signal.SIGKILL)
            process.wait()


def children(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def start_node(start: Start, folder: Path, *arguments: str, **variables: str) -> subprocess.Popen:
    defaults = {
        "NODES": "1",
        "RANKS_PER_NODE": "1",
        "RENDEZVOUS": f"localhost:{free_port()}",
        "RUN_ID": "test",
        "NODE_RANK": "0",
        "LOGS": str(folder / "logs"),
        "PYTHON": sys.executable,
    }
    return start(folder, ROOT / "launch/node", *arguments, **defaults | variables)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NODES": ""}, "NODES is not set"),
        ({"NODES": "two"}, "NODES=two is no number and no MIN:MAX"),
        ({"RANKS_PER_NODE": "0"}, "RANKS_PER_NODE=0 is no number"),
        ({"RENDEZVOUS": "localhost"}, "RENDEZVOUS=localhost has no port"),
        ({"NODE_RANK": "first"}, "NODE_RANK=first is no number"),
        ({"PYTHON": "/no/python"}, "PYTHON=/no/python is not there"),
    ],
    ids=lambda value: str(value),
)
def test_wrong_parameter_is_named(
    start: Start, tmp_path: Path, variables: dict, message: str
) -> None:
    process = start_node(start, tmp_path, "a.toml", **variables)
    assert process.wait(TIMEOUT) == 2
    (line,) = (tmp_path / "stderr").read_text().splitlines()
    assert line.startswith(f"launch/node: {message}")


def test_wrong_config_ends_a_node_at_once_and_says_why(start: Start, tmp_path: Path) -> None:
    """By the code that retry policies know, not by torchrun's 1; no rank is started again."""
    arguments = (str(ROOT / "configs/tiny.toml"), "optim.lrr=1")
    process = start_node(start, tmp_path, *arguments, RANKS_PER_NODE="2")
    assert process.wait(TIMEOUT) == faults.EXIT_BAD_INPUT
    assert "optim.lrr" in (tmp_path / "stderr").read_text()
    logs = [p.relative_to(tmp_path / "logs") for p in tmp_path.glob("logs/**/stderr.log")]
    assert {p.parts[0] for p in logs} == {"node_0"}
    assert sorted(p.parts[2:] for p in logs) == [
        ("attempt_0", "0", "stderr.log"),
        ("attempt_0", "1", "stderr.log"),
    ]


def launch_script(start: Start, folder: Path, text: str, *arguments: str) -> subprocess.Popen:
    """launch/torchrun.py with one rank that runs `text`, three restarts allowed."""
    script = folder / "script.py"
    script.write_text(f"import os, signal, sys, time\n{text}\n")
    options = ("--standalone", "--nproc-per-node=1", "--max-restarts=3", str(script))
    return start(folder, sys.executable, ROOT / "launch/torchrun.py", *options, *arguments)


@pytest.mark.parametrize("code", [3, 5])
def test_ranks_start_again_where_that_may_help(start: Start, tmp_path: Path, code: int) -> None:
    once = "sys.exit(0 if int(os.environ['TORCHELASTIC_RESTART_COUNT']) else int(sys.argv[1]))"
    process = launch_script(start, tmp_path, once, str(code))
    assert process.wait(TIMEOUT) == (code if code == faults.EXIT_NOT_FINITE else 0)
    assert f"rank 0 ended with {code}" in (tmp_path / "stderr").read_text()


@pytest.mark.slow
def test_saving_may_take_longer_than_torchrun_grants(start: Start, tmp_path: Path) -> None:
    """torchrun kills ranks 30 seconds after the signal; a second one changes nothing."""
    ready = tmp_path / "ready"
    slow = f"""
def save(*_):
    time.sleep(33)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
open({str(ready)!r}, "w").close()
time.sleep(200)
"""
    process = launch_script(start, tmp_path, slow)
    wait_for(ready.exists, process)
    for _ in range(2):
        process.send_signal(signal.SIGUSR1)
        time.sleep(1)
    assert process.wait(TIMEOUT) == faults.EXIT_INTERRUPTED


def end(*nodes: subprocess.Popen) -> list[int]:
    return [node.wait(TIMEOUT) for node in nodes]


def start_run(start: Start, path: Path, *overrides: str) -> list[subprocess.Popen]:
    """Two nodes of one rank each, with one rendezvous; run.dir is `path`/run."""
    arguments = (str(write_config(path)), *OVERRIDES, *overrides)
    common = {"NODES": "2", "RENDEZVOUS": f"localhost:{free_port()}", "LOGS": str(path / "logs")}
    return [
        start_node(start, path / f"node_{rank}", *arguments, NODE_RANK=str(rank), **common)
        for rank in (0, 1)
    ]


@pytest.mark.slow
def test_run_whose_second_node_is_preempted_saves_and_goes_on(
    start: Start, train: Callable[..., Result], tmp_path: Path
) -> None:
    nodes = start_run(start, tmp_path, "checkpoint.interval=none")
    wait_for(has_done(tmp_path / "run", 5), nodes[0])
    nodes[1].send_signal(signal.SIGTERM)
    # Node 0 has got no signal, and does not start its rank again.
    assert end(*nodes) == [faults.EXIT_INTERRUPTED] * 2
    (folder,) = step_folders(tmp_path / "run/checkpoints")
    assert damage(folder) is None
    assert 5 <= step_of(folder) < STEPS
    assert end(*start_run(start, tmp_path)) == [0, 0]
    assert_same_result(result(tmp_path / "run"), train("straight", *OVERRIDES, world=2))


@pytest.mark.slow
def test_run_that_loses_a_rank_goes_on_by_itself(
    start: Start, train: Callable[..., Result], tmp_path: Path
) -> None:
    """Both nodes stay, meet again, and start their ranks from the last checkpoint."""
    nodes = start_run(start, tmp_path)
    wait_for(has_done(tmp_path / "run", 5), nodes[0])
    (rank,) = children(nodes[1].pid)
    os.kill(rank, signal.SIGKILL)
    assert end(*nodes) == [0, 0]
    assert "rank 1 ended with -9" in (tmp_path / "node_1/stderr").read_text()
    assert list(tmp_path.glob("logs/node_1/*/attempt_1/0/stdout.log"))
    assert_same_result(result(tmp_path / "run"), train("straight", *OVERRIDES, world=2))


def layouts_of_super() -> list[tuple[int, list[str], int]]:
    """GPUs, overrides and GB per GPU of each row in docs/launching.md."""
    text = (ROOT / "docs/launching.md").read_text()
    recompute = re.search(r"`(train\.recompute=\S+)`", text)[1]
    rows = re.findall(r"^\| (\d+) [^|]*\| `([^`]+)` \| (\d+) \|$", text, re.MULTILINE)
    assert len(rows) >= 6
    return [(int(n), o.replace("recompute", recompute).split(), int(gb)) for n, o, gb in rows]


@pytest.mark.parametrize(("ranks", "overrides", "gigabytes"), layouts_of_super(), ids=str)
def test_layout_of_super_is_valid_and_as_large_as_documented(
    ranks: int, overrides: list[str], gigabytes: int
) -> None:
    config = load_config(ROOT / "configs/super_120b.toml", overrides)
    assert list(rank_problems(config, ranks)) == []
    memory = describe_layout(config, ranks)["largest"]["memory_bytes"]
    assert memory / 1e9 == pytest.approx(gigabytes, abs=0.51)
