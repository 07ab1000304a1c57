"""Which optional kernels are used: the one place that looks for their packages."""

import functools
import importlib.util

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def kernel_takes(package: str, *tensors: Tensor) -> bool:
    """Whether the kernels of `package` can run on these tensors.

    They compute offsets in int32, so a longer view overflows silently: finite, wrong results
    (state-spaces/mamba#1015). Such a call takes the plain path.
    """
    on_gpu = all(t.is_cuda and t.dtype != torch.float64 for t in tensors)
    return on_gpu and _installed(package) and all(_last_offset(t) <= INT32_MAX for t in tensors)


def _last_offset(t: Tensor) -> int:
    return sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))


def describe(device: torch.device) -> list[str]:
    """One line per op that has a faster kernel: what runs on `device`, and why."""
    lines = []
    for op, package in (("scan", "mamba_ssm"), ("convolution", "causal_conv1d")):
        if device.type != "cuda":
            why = "no GPU"
        elif not _installed(package):
            why = f"{package} is not installed"
        else:
            lines.append(f"{op}: {package} kernel")
            continue
        lines.append(f"{op}: plain PyTorch ({why})")
    return lines
