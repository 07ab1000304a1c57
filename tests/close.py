"""The one comparison of floating-point results: error relative to the size of the expected."""

import math

import torch
from torch import Tensor


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    """rms(actual - expected) / rms(expected), in float64.

    0 when both are all zero, infinity when only the expected is, NaN when a NaN is anywhere or
    an infinite value is not met by the same infinite value.
    """
    expected = expected.detach().to("cpu", torch.float64)
    error = _error(actual, expected)
    if error.isnan().any():
        return math.nan
    size = float(expected[expected.isfinite()].square().sum().sqrt())
    distance = float(error.square().sum().sqrt())
    if size == 0:
        return 0.0 if distance == 0 else math.inf
    return distance / size


def assert_close(
    actual: Tensor, expected: Tensor, *, limit: float, name: str, finite: bool = True
) -> None:
    """Fail unless shapes agree and `rms_ratio(actual, expected)` is at most `limit`.

    Args:
        finite: also fail when the actual or the expected value has an infinity; without it,
            an infinity passes only where both have the same one.
    """
    assert actual.shape == expected.shape, (
        f"{name}: shape {tuple(actual.shape)} is not the expected {tuple(expected.shape)}"
    )
    for word, value in (("actual", actual), ("expected", expected)):
        assert not value.isnan().any(), f"{name}: the {word} value has a NaN at {_first_nan(value)}"
        assert not finite or value.isfinite().all(), f"{name}: the {word} value has an infinity"
    ratio = rms_ratio(actual, expected)
    if ratio <= limit:
        return
    error = _error(actual, expected).nan_to_num(nan=math.inf)
    flat = int(error.argmax())
    index = _unravel(flat, error.shape)
    raise AssertionError(
        f"{name}: RMS ratio {ratio:.3e} is over the limit {limit:.1e}; largest absolute error "
        f"{float(error.flatten()[flat]):.3e} at {index}: actual {actual[index].item():.9e}, "
        f"expected {expected[index].item():.9e}"
    )


def _error(actual: Tensor, expected: Tensor) -> Tensor:
    actual = actual.detach().to("cpu", torch.float64)
    expected = expected.detach().to("cpu", torch.float64)
    same_infinity = actual.isinf() & (actual == expected)
    return torch.where(same_infinity, 0.0, (actual - expected).abs())


def _unravel(flat: int, shape: torch.Size) -> tuple[int, ...]:
    """torch.unravel_index imports the compiler, which takes seconds."""
    index = []
    for size in reversed(shape):
        flat, last = divmod(flat, size)
        index.insert(0, last)
    return tuple(index)


def _first_nan(value: Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in value.isnan().nonzero()[0])
