"""What a run was started with: config.json, environment.json, tokenizer.json of the run folder."""

import datetime
import importlib.metadata
import json
import logging
import os
import platform
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nemomodel.observe.files import write_atomically

log = logging.getLogger(__name__)

PACKAGES = (
    "nemomodel",
    "torch",
    "megatron-core",
    "numpy",
    "einops",
    "pydantic",
    "datasets",
    "tokenizers",
    "safetensors",
    "tensorboard",
    "transformers",
    "triton",
    "transformer-engine",
    "mamba-ssm",
    "causal-conv1d",
)


def environment() -> dict[str, Any]:
    """Software and hardware of this process, as plain data."""
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
        "command": sys.argv,
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "cpu": _cpu_model(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "torch_build": torch.__config__.show(),
    }


def write_run_files(
    run_dir: Path, *, config: Mapping[str, Any], tokenizer: Path | None = None
) -> None:
    """Write config.json, environment.json and, if there is one, tokenizer.json; on one rank.

    With its tokenizer a run folder is all that generating and exporting need. What an earlier
    start left is kept as config.N.json and so on, N from 1; an unchanged file is not written
    again.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    _write(run_dir / "config.json", json.dumps(config, indent=2) + "\n")
    _write(run_dir / "environment.json", json.dumps(environment(), indent=2) + "\n")
    if tokenizer is not None:
        _write(run_dir / "tokenizer.json", tokenizer.read_text(encoding="utf-8"))


def _write(path: Path, text: str) -> None:
    if path.exists():
        earlier = path.read_text(encoding="utf-8")
        if earlier == text:
            return
        n = 1
        while (kept := path.with_suffix(f".{n}.json")).exists():
            n += 1
        write_atomically(kept, earlier)
    write_atomically(path, text)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout this package is in, with `-dirty` after it where files changed."""
    command = ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("the git commit is not recorded: %s", error)
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()  # ARM has no such line
