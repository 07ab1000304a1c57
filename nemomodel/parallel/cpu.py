"""The CPU seam: lets megatron-core run in a process without CUDA.

megatron-core calls `torch.cuda.*` unconditionally and decorates small functions with
`torch.compile`. `install()` gives those calls their CPU meaning. Where CUDA exists it changes
nothing. This is the one place of the project that patches another package. Every module that
imports megatron calls it first.
"""

import functools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def install() -> None:
    """Import megatron-core, with the CPU meaning of `torch.cuda.*` where there is no CUDA."""
    if "megatron.core" in sys.modules:
        return
    if not torch.cuda.is_available():
        _patch_torch()
    with _quiet_import():
        import megatron.core
        import megatron.core.dist_checkpointing
        import megatron.core.optimizer
        import megatron.core.pipeline_parallel.schedules
    if not torch.cuda.is_available():
        megatron.core.optimizer.clip_grads.l2_norm_impl = _l2_norm


def _patch_torch() -> None:
    # It warns of a CUDA toolkit without a GPU; nobody builds CUDA extensions in this process.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    stream = torch.cpu.current_stream()
    torch.cuda.current_stream = lambda device=None: stream
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.synchronize = lambda device=None: None
    # torch looks up once which functions `with torch.device(...)` redirects: before they change.
    with torch.device("meta"):
        torch.empty(0)
    for name in ("tensor", "zeros", "ones", "empty", "empty_like"):
        setattr(torch, name, _redirect_device(getattr(torch, name)))
    torch.Tensor.cuda = _cuda
    torch.Tensor.type = _type(torch.Tensor.type)


def _from_megatron(depth: int) -> bool:
    """Whether the caller of the patched function is megatron-core: the seam answers no other."""
    return sys._getframe(depth).f_globals.get("__name__", "").startswith("megatron.")


def _redirect_device(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> Tensor:
        if kwargs.get("device") == "cuda" and _from_megatron(2):
            kwargs["device"] = "cpu"
        return factory(*args, **kwargs)

    return create


def _cuda(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if not _from_megatron(2):
        raise RuntimeError("Tensor.cuda(): this process has no CUDA device")
    return self


def _type(type_of: Callable[..., Any]) -> Callable[..., Any]:
    """megatron-core's optimizers sort parameters by the name "torch.cuda.FloatTensor"."""

    def type_(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = type_of(self, *args, **kwargs)
        if isinstance(result, str) and _from_megatron(2):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    return type_


NORM_ROW = 1024
"""Numbers whose squares are added up one after another."""


def _l2_norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool
) -> tuple[Tensor, None]:
    """For the gradient norm, FP32 [1]. PyTorch's norm of a CPU adds all squares one after another
    in FP32: 1e-6 off for 2^18 numbers, 0.5 % for 2^26, and so another one in every layout."""
    norms = []
    for tensor in tensor_lists[0]:
        flat = tensor.flatten()
        whole = len(flat) // NORM_ROW * NORM_ROW
        norms.append(torch.linalg.vector_norm(flat[:whole].view(-1, NORM_ROW), dim=1))
        norms.append(torch.linalg.vector_norm(flat[whole:]).view(1))
    return torch.linalg.vector_norm(torch.cat(norms).double()).float().view(1), None


@contextmanager
def _quiet_import() -> Iterator[None]:
    """Import time: no advice to install CUDA packages, and no compiler in a CPU process.

    `torch.compile` as a decorator imports its whole back end and would compile C++ for half a
    minute in the first step, for functions of three elementwise lines.
    """
    compile_ = torch.compile
    if not torch.cuda.is_available():
        torch.compile = lambda model=None, **_: model if model is not None else lambda fn: fn
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not")
            warnings.filterwarnings("ignore", message="Apex is not installed")
            # An escape in a docstring of megatron-core 0.19.2, told where nothing is compiled yet.
            warnings.filterwarnings("ignore", category=SyntaxWarning)
            yield
    finally:
        torch.compile = compile_
