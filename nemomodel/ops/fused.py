"""What lies between two matrix products, as one pass over memory each.

Such functions of elementwise operations and reductions are marked `@fused`. They run as they stand,
every operation through memory, or, after `use_compiler`, as what torch.compile makes of them: one
loop that reads each input once. Matrix products stay outside, where libraries do them better.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

ROWS_OF_A_SUM = 32
"""Rows that `sum_rows` adds in a compiled loop: few enough to stay in cache meanwhile."""

_compiling = False


def use_compiler(wanted: bool = True) -> None:
    """Compile `@fused` functions from now on in this process, or run them as they stand again.

    Says so where torch.compile does not work, and leaves them as they stand.
    """
    global _compiling
    _compiling = wanted and has_compiler()


def compiling() -> bool:
    """Whether `@fused` functions are compiled."""
    return _compiling


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of tensors, without autograd, compiled if that is wanted."""

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return compiled(function)(*args) if _compiling else function(*args)

    return call


def sum_rows(t: Tensor) -> Tensor:
    """Sums of some rows of [R, ...] each, [R / 32, ...], within a `@fused` function; [1, ...] where
    nothing is compiled. A compiled sum of all rows would go down one narrow column after another.
    """
    if _compiling and len(t) % ROWS_OF_A_SUM == 0:
        return t.unflatten(0, (-1, ROWS_OF_A_SUM)).sum(1)
    return t.sum(0, keepdim=True)


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` by torch.compile, what lies between input and output kept in registers."""
    options = {
        "realize_opcount_threshold": 10_000,
        "realize_reads_threshold": 10_000,
        "compile_threads": 1,
    }
    return torch.compile(function, options=options)


@functools.cache
def has_compiler() -> bool:
    """Whether torch.compile works here; says once if not."""
    try:
        compiled(torch.neg)(torch.zeros(16))
    except torch._dynamo.exc.TorchDynamoException as error:
        why = str(error).strip().partition("\n")[0]
        log.warning("torch.compile does not work here, plain PyTorch is slower: %s", why)
        return False
    return True
