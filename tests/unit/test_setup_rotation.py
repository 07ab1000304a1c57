"""The daily slices of the slow tests cover all of them, and a choice by hand runs as chosen."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rotate import SLICES

ROOT = Path(__file__).parents[2]
SUITE = """
import pytest

def test_quick(): pass

@pytest.mark.slow
@pytest.mark.parametrize("n", range(20))
def test_slow(n): pass
"""


@pytest.fixture
def collect(tmp_path):
    """Names of the tests that run on a day, with the arguments given."""
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")

    def collect(day: int, *args: str) -> list[str]:
        pytest_args = ["-p", "tests.rotate", "--collect-only", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *pytest_args, *(args or ["test_suite.py"])],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT), "NEMOMODEL_TEST_DAY": str(day)},
            capture_output=True,
            text=True,
            check=True,
        )
        return re.findall(r"::(\S+)", done.stdout)

    return collect


def test_every_slow_test_runs_once_in_a_round_of_days(collect):
    days = [collect(day) for day in range(100, 100 + SLICES)]
    assert all("test_quick" in day for day in days)
    slow = [test for day in days for test in day if test != "test_quick"]
    assert sorted(slow) == sorted(f"test_slow[{n}]" for n in range(20))


@pytest.mark.parametrize(
    ("args", "count"),
    [(("--slow",), 21), (("-m", "slow"), 20), (("test_suite.py::test_slow",), 20)],
)
def test_a_choice_by_hand_is_not_sliced(collect, args, count):
    assert len(collect(0, *args)) == count
