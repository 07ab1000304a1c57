# NOTICE TO Q FROM THE FOUNDER: the project has a fixed rule "no compiled extension of ours": no C++ of ours, not even compiled at run time. compiled.py has to use torch.compile (inductor's C++ backend) on plain torch
# functions instead of compiled.cpp/ctypes. Please replace it: same public face (parts of a matrix in one call is a good idea: keep it), few dynamic-shape graphs (one per format and dtype), and announce a missing compiler.
# If cold compile time is the problem: disable what is not needed (config.cpp settings, no precompiled headers, fewer variants: nearest/stochastic as one graph with bits passed in where it costs nothing, ...), eager for small matrices
# so that tests and tiny runs never wait for the compiler, and measure. Delete compiled.cpp. Then remove this notice.
"""The quantiser of operands in C++ for CPUs (compiled.cpp), with the bits of the plain one.

Compiled at first use, for this processor, in about three seconds, and kept in the user's cache
folder. Where there is no compiler, or it fails, the plain quantiser in `operand.py` serves.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from nemomodel.quant.hadamard import hadamard_matrix

if TYPE_CHECKING:
    from nemomodel.quant.operand import OperandFormat, Place2D

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = (
    *("-std=c++20", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"),
    # Every operation rounds once, as in the plain quantiser; the other two do not change results.
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
)
ELEMENTS_PER_THREAD = 2**17
"""A thread takes as long to start as the work on fewer."""
ALONG = ("columns", "rows", "both")


@dataclass(frozen=True)
class Part:
    """Consecutive rows that are quantised as a matrix of their own."""

    row: int
    rows: int
    out_row: int
    """Where the operand's rows begin in the result."""
    out_rows: int
    """At least `rows`; the others are zero but for what a transform mixes into them."""
    key: tuple[int, int] | None
    """Stream of stochastic rounding."""


class _Part(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64) for name in ("row", "rows", "out_row", "out_rows", "key0", "key1")
    ]


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "values", "parts", "signs", "column_of")),
        *((name, ctypes.c_int64) for name in ("stride", "columns", "num_parts", "along")),
        *((name, ctypes.c_int64) for name in ("first_row", "counter_width", "threads")),
    ]


def takes(x: Tensor) -> bool:
    """Whether this quantiser can take x."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.bfloat16, torch.float32)
        and _library() is not None
    )


def quantize(
    x_MK: Tensor,
    format: "OperandFormat",
    parts: Sequence[Part],
    *,
    out_rows: int,
    place: "Place2D",
    amax_group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor]:
    """Quantise every part of x by itself.

    Args:
        x_MK: BF16 or FP32 on a CPU.
        out_rows: rows of the result; the parts have to cover them all.
        place: of every part in the matrix that ranks share.

    Returns:
        values [out_rows, K] in the dtype of x, code times block scale, and the largest magnitude
        of every part, FP32, over the ranks of `amax_group` in NVFP4.
    """
    library = _library()
    x_MK = x_MK if x_MK.stride(-1) == 1 else x_MK.contiguous()
    values = x_MK.new_empty(out_rows, x_MK.shape[1])
    amax = torch.zeros(len(parts))
    column_of = place.columns if place.columns is None else place.columns.contiguous()
    list_of_parts = (_Part * len(parts))(
        *((p.row, p.rows, p.out_row, p.out_rows, *(p.key or (0, 0))) for p in parts)
    )
    job = _Job(
        x=x_MK.data_ptr(),
        values=values.data_ptr(),
        parts=ctypes.addressof(list_of_parts),
        signs=_signs().data_ptr() if format.hadamard else None,
        column_of=None if column_of is None else column_of.data_ptr(),
        stride=x_MK.stride(0),
        columns=x_MK.shape[1],
        num_parts=len(parts),
        along=ALONG.index(format.along),
        first_row=place.row,
        counter_width=place.width,
        threads=min(torch.get_num_threads(), 1 + values.numel() // ELEMENTS_PER_THREAD),
    )
    bf16, amax_pointer = x_MK.dtype == torch.bfloat16, ctypes.c_void_p(amax.data_ptr())
    if format.format == "nvfp4":
        library.largest(ctypes.byref(job), bf16, amax_pointer)
        if amax_group is not None:
            dist.all_reduce(amax, dist.ReduceOp.MAX, amax_group)
    mxfp8 = format.format == "mxfp8"
    library.encode(ctypes.byref(job), bf16, mxfp8, format.stochastic, amax_pointer)
    return values, amax


@functools.cache
def _signs() -> Tensor:
    return hadamard_matrix()[:, 0].contiguous()


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled quantiser; None, after one line in the log, where it cannot be had."""
    try:
        library = ctypes.CDLL(str(_build()))
    except (OSError, subprocess.CalledProcessError) as error:
        why = (getattr(error, "stderr", None) or str(error)).strip().partition("\n")[0]
        log.warning("quantiser: plain PyTorch, about ten times slower (C++: %s)", why)
        return None
    flag = ctypes.c_bool
    library.largest.argtypes = [ctypes.POINTER(_Job), flag, ctypes.c_void_p]
    library.encode.argtypes = [ctypes.POINTER(_Job), flag, flag, flag, ctypes.c_void_p]
    library.largest.restype = library.encode.restype = None
    return library


def _build() -> Path:
    """The library's file, compiled if it is not there; ranks may come here at the same time.

    Its name holds all that its bytes depend on, the processor and the compiler's version too.
    """
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise FileNotFoundError("neither g++ nor clang++ is installed")
    native = [compiler, "-march=native", "-E", "-v", "-x", "c++", os.devnull]
    version = subprocess.run(native, check=True, capture_output=True, text=True).stderr
    identity = "\0".join((SOURCE.read_text(), version, *FLAGS))
    name = f"quantiser_{hashlib.sha256(identity.encode()).hexdigest()[:24]}.so"
    if (file := _cache_folder() / name).exists():
        return file
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        made = Path(folder) / name
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        made.replace(file)
    return file


@functools.cache
def _cache_folder() -> Path:
    """Where compiled libraries stay; without a home that can be written, only for this process."""
    with suppress(OSError, RuntimeError):
        folder = Path.home() / ".cache" / "nemomodel"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    return Path(tempfile.mkdtemp(prefix="nemomodel_"))
