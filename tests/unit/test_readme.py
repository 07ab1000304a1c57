"""What the README tells a reader to type works."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nemomodel.config.load import load_config
from nemomodel.model.count import describe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)
    for line in re.sub(r"\\\n\s+", "", README).splitlines()
    if line.startswith("    ") and "./launch/local" in line
]
TRAINING = [command[command.index("train") + 1 :] for command in COMMANDS if "train" in command]
TOOLS = [command[2:] for command in COMMANDS if "python" in command]


@pytest.mark.parametrize("arguments", TRAINING, ids=" ".join)
def test_training_command_is_a_valid_config(arguments: list[str]) -> None:
    path, *overrides = arguments
    load_config(ROOT / path, overrides)


@pytest.mark.parametrize("arguments", TOOLS, ids=" ".join)
def test_tool_command_names_a_tool_and_its_options(arguments: list[str]) -> None:
    script, *rest = arguments
    command = [sys.executable, ROOT / script, "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for word in rest:
        if word.startswith("--"):
            assert word in text


def test_files_that_are_linked_exist() -> None:
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_parameter_counts_of_the_table() -> None:
    rows = re.findall(r"^\| `(configs/\w+\.toml)` \|.*\| ([^|]+) \|$", README, re.MULTILINE)
    assert {path for path, _ in rows} == {f"configs/{p.name}" for p in ROOT.glob("configs/*.toml")}
    units = {"M": 1e6, "B": 1e9}
    for path, text in rows:
        counts = describe(load_config(ROOT / path))
        numbers = re.findall(r"([\d.]+)([MB])", text)
        actual = [counts["parameters_total"]]
        if len(numbers) == 2:
            actual = [counts["parameters_backbone"], counts["parameters_mtp"]]
        for (number, unit), value in zip(numbers, actual, strict=True):
            decimals = len(number.partition(".")[2])
            assert f"{value / units[unit]:.{decimals}f}" == number, path
