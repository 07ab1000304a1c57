"""Rules of the code base that no linter knows."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAX_LINES = 400
ENGINE_LAYERS = ("parallel", "checkpoint", "train")


def texts(*folders: str, suffix: str = "") -> list[tuple[str, str]]:
    """(path from the root, content) of every file in `folders`."""
    return [
        (str(path.relative_to(ROOT)), path.read_text(encoding="utf-8"))
        for folder in folders
        for path in sorted((ROOT / folder).rglob(f"*{suffix}"))
        if path.is_file() and "__pycache__" not in path.parts
    ]


def test_text_is_ascii():
    not_ascii = [
        f"{path}:{number}: {line}"
        for path, text in texts("nemomodel", "tools", "configs", "launch")
        for number, line in enumerate(text.splitlines(), 1)
        if not line.isascii()
    ]
    assert not_ascii == []


def test_every_file_fits_one_reading():
    sizes = {path: len(text.splitlines()) for path, text in texts("nemomodel", "tools")}
    assert {path: size for path, size in sizes.items() if size > MAX_LINES} == {}


def test_megatron_is_known_only_to_the_engine_layers():
    """import-linter holds the same rule; this one also sees imports inside functions and types."""
    outside = [
        path
        for path, text in texts("nemomodel", suffix=".py")
        if re.search(r"^\s*(import|from) megatron\b", text, re.MULTILINE)
        and path.split("/")[1] not in ENGINE_LAYERS
    ]
    assert outside == []
