"""pytest plugin: of the tests marked `slow`, run the slice of the day; `--slow` runs them all.

Choosing tests by hand (`-m` with the word slow, or a node id with `::`) switches the plugin off.
"""

import os
import time
import zlib

import pytest

SLICES = 5

# Workers of pytest-xdist inherit the environment, so all of them use one day even at midnight.
DAY = int(os.environ.setdefault("NEMOMODEL_TEST_DAY", str(int(time.time()) // 86400)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run every slow test, not one slice")


def _rotates(config: pytest.Config) -> bool:
    by_hand = "slow" in config.option.markexpr or any("::" in arg for arg in config.args)
    return not (config.option.slow or by_hand)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not _rotates(config):
        return
    other = [
        item
        for item in items
        if item.get_closest_marker("slow")
        and zlib.crc32(item.nodeid.encode()) % SLICES != DAY % SLICES
    ]
    if other:
        config.hook.pytest_deselected(items=other)
        items[:] = [item for item in items if item not in set(other)]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    # A header would be lost under -q.
    if _rotates(config) and terminalreporter.stats.get("deselected"):
        day = DAY % SLICES + 1
        terminalreporter.write_line(
            f"slow tests: slice {day} of {SLICES}; it changes daily, --slow runs all of them"
        )
