"""Peak matrix throughput of the device, the denominator of MFU."""

import re
import time
from typing import NamedTuple

import torch

MEASURE_SECONDS = 0.2


class Peak(NamedTuple):
    flops: float
    """FLOP/s of one device."""
    source: str
    """Where the number comes from, for the log."""


class _Row(NamedTuple):
    name: str
    bf16: float
    fp32: float


# Dense peaks in FLOP/s from NVIDIA's datasheets: BF16 tensor cores without sparsity, FP32 without
# TF32. `name` is a regular expression searched in the device name; the first match counts.
_TABLE = (
    _Row(r"\bGB200\b", 2500e12, 80e12),
    _Row(r"\bB200\b", 2250e12, 75e12),
    _Row(r"\bGH200\b", 989.4e12, 66.9e12),
    _Row(r"\bH200 NVL\b", 835.5e12, 60e12),
    _Row(r"\bH200\b", 989.4e12, 66.9e12),
    _Row(r"\bH100 PCIe\b", 756e12, 51.2e12),
    _Row(r"\bH100 NVL\b", 835.5e12, 60e12),
    _Row(r"\bH100\b", 989.4e12, 66.9e12),
    _Row(r"\bA100\b", 312e12, 19.5e12),
    _Row(r"\bL40S\b", 362e12, 91.6e12),
    _Row(r"\bL4\b", 121e12, 30.3e12),
    _Row(r"\bA10\b", 125e12, 31.2e12),
    _Row(r"\bRTX A6000\b", 154.8e12, 38.7e12),
    _Row(r"\bRTX 4090\b(?! [DL])", 165.2e12, 82.6e12),
    _Row(r"\bRTX 3090\b(?! Ti)", 71e12, 35.6e12),
)


def peak_flops(device: torch.device, dtype: torch.dtype) -> Peak:
    """Peak of `device` for matrix products in `dtype`, bfloat16 or float32.

    From the table where the GPU is in it, else measured in at most MEASURE_SECONDS or so. A MIG
    slice reports the name of the whole GPU and is measured.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = datasheet_flops(name, dtype)
        if known is not None:
            return Peak(known, f"datasheet of {name}")
    else:
        name = "this CPU"
    flops, size = _measure(device, dtype)
    kind = str(dtype).removeprefix("torch.")
    return Peak(flops, f"measured on {name} with a {kind} matrix product of size {size}")


def datasheet_flops(name: str, dtype: torch.dtype) -> float | None:
    """The table's entry for a device name; None where there is none."""
    if " MIG " in name:
        return None
    for row in _TABLE:
        if re.search(row.name, name):
            return row.bf16 if dtype == torch.bfloat16 else row.fp32
    return None


def _measure(device: torch.device, dtype: torch.dtype) -> tuple[float, int]:
    """Best rate over growing square products and the size that gave it."""
    best, best_size = 0.0, 0
    deadline = time.perf_counter() + MEASURE_SECONDS
    size, seconds = 256, 0.0
    # The next size takes 8 times as long; four runs of it (one warms up) must fit.
    while size <= 8192 and time.perf_counter() + 32 * seconds < deadline:
        a = torch.ones(size, size, device=device, dtype=dtype)
        torch.mm(a, a)
        seconds = min(_seconds(a) for _ in range(3))  # one may meet other work of the machine
        if 2 * size**3 / seconds > best:
            best, best_size = 2 * size**3 / seconds, size
        size *= 2
    return best, best_size


def _seconds(a: torch.Tensor) -> float:
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    start = time.perf_counter()
    torch.mm(a, a)
    if a.is_cuda:
        torch.cuda.synchronize(a.device)
    return time.perf_counter() - start
