"""What the tools check before they load anything."""

from pathlib import Path

import torch


def check_checkpoint(path: Path | str) -> None:
    """
    Raises:
        ValueError: nothing is there.
    """
    if not Path(path).exists():
        raise ValueError(f"{path}: no such folder")


def check_device(device: str) -> None:
    """
    Raises:
        ValueError: torch does not know the device, or it is not there.
    """
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device={device}: {str(error).splitlines()[0]}") from None


def read_text(path: Path) -> str:
    """
    Raises:
        ValueError: the file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
