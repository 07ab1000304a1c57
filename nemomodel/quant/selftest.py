"""A test of the quantiser before training, on the device and with the code that will run.

A quantiser that is wrong still trains, a little worse: there are parts and drivers on which
stochastic rounding gave zeros without a word (TransformerEngine pull request 3281).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nemomodel.quant.formats import E2M1
from nemomodel.quant.hadamard import SIGNS
from nemomodel.quant.linear import LinearFormat, ProductFormat
from nemomodel.quant.operand import (
    ExactOperand,
    OperandFormat,
    product,
    quantize_groups,
)
from nemomodel.quant.rounding import stream_key


class SelfTestError(RuntimeError):
    """The quantiser of this device does not compute what it should."""


class Layer(Protocol):
    """The face of `QuantizedLinear`, as far as it is tested."""

    def begin(self, step: int, micro_batch: int) -> None: ...

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor: ...


class Block(NamedTuple):
    """Half of a block; the other half is its negative."""

    elements: tuple[float, ...]
    scale: float
    codes: tuple[float, ...]


_TIE_CODES = (0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0)
_ZEROS = (0.0,) * 8

# Numerics of Transformer Engine @ d0067d0d; the tests compute the same from enumerated grids.
NVFP4_VECTORS = (
    # The largest magnitude is 2688 = 6 * 448, so the factor of the matrix is 1.
    (
        # Every midpoint between two codes.
        Block((112.0, 336.0, 560.0, 784.0, 1120.0, 1568.0, 2240.0, 2688.0), 448.0, _TIE_CODES),
        Block((0.125, 0.375, 0.625, 0.875, 1.25, 1.75, 2.5, 3.0), 0.5, _TIE_CODES),
        # The scale is rounded down from 7 / 6: elements beyond 6 scales are clamped.
        Block(
            (0.5, 1.0, 2.25, 3.375, 4.5, 5.5, 6.75, 7.0),
            1.125,
            (0.5, 1.0, 2.0, 3.0, 4.0, 4.0, 6.0, 6.0),
        ),
        # The smallest scale, and one that rounds to 0.
        Block(
            (2**-9, 2**-8, 2**-7, 3 * 2**-8, 3 * 2**-10, 0.0, 2**-10, 3 * 2**-8),
            2**-9,
            (1.0, 2.0, 4.0, 6.0, 1.5, 0.0, 0.5, 6.0),
        ),
        Block((2**-10, 2**-11, 2**-12, 0.0, 0.0, 0.0, 0.0, 2**-10), 0.0, _ZEROS),
        Block(_ZEROS, 0.0, _ZEROS),
    ),
    (
        Block(
            (7.375, 0.30078125, 0.8984375, 1.703125, 2.203125, 3.09375, 4.40625, 6.1875),
            448.0,
            (6.0, 0.0, 0.5, 1.5, 2.0, 3.0, 4.0, 6.0),
        ),
        # The order of the FP32 operations: written as in the paper the scale would be 320.
        Block(
            (5.53125, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0),
            352.0,
            (6.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
        ),
    ),
)
MXFP8_VECTORS = (
    # Ties of E4M3 with the scale 1, the largest that 448 needs; then one that 450 needs.
    Block(
        (448.0, 17.0, 19.0, 1.0625, 1.1875, 2**-10, 3 * 2**-10, 0.0),
        1.0,
        (448.0, 16.0, 20.0, 1.0, 1.25, 0.0, 2**-8, 0.0),
    ),
    Block(
        (450.0, 34.0, 38.0, 2.125, 2.375, 2**-9, 3 * 2**-9, 1.0),
        2.0,
        (224.0, 16.0, 20.0, 1.0, 1.25, 0.0, 2**-8, 0.5),
    ),
)

# Magnitudes that lie a quarter or three quarters of the way from one code to the next.
_BETWEEN = ((0.125, 0.0, 0.5), (1.375, 1.0, 1.5), (2.25, 2.0, 3.0), (5.5, 4.0, 6.0))

WGRAD_ERROR = 0.4
"""Of a weight gradient, relative; NVFP4 with stochastic rounding leaves about 0.2."""
FEW, MANY = 2**11, 2**13
"""Numbers that are rounded stochastically: too few for compiled code on a CPU, and enough."""

_SIGMAS = 5.0


def self_test(
    device: torch.device, dtype: torch.dtype = torch.bfloat16, *, draws: int = MANY
) -> None:
    """Check known codes and scales, the Hadamard transform and stochastic rounding, in well under
    a second; longer where code is compiled.

    Args:
        draws: `FEW` where a run has no larger operands.

    Raises:
        SelfTestError: naming everything that is wrong.
    """
    _raise(
        [
            *_known_vectors(device, dtype),
            *_hadamard(device, dtype),
            *_stochastic(device, dtype, draws),
        ],
        device,
    )


def self_test_layers(
    make: Callable[[LinearFormat], Layer],
    formats: Iterable[LinearFormat],
    device: torch.device,
    *,
    draws: int = MANY,
) -> None:
    """Check what a layer of each format makes of known inputs and of gradients between codes.

    Args:
        make: a linear layer of the executor that will run.

    Raises:
        SelfTestError: naming everything that is wrong.
    """
    faults = [fault for format in formats for fault in _layer(make(format), format, device, draws)]
    _raise(faults, device)


def _raise(faults: list[str], device: torch.device) -> None:
    if faults:
        raise SelfTestError(
            f"self-test of the quantiser on {device} failed: {'; '.join(faults)}. "
            "Nothing was trained. Another version of the driver, of torch or of the compiler may "
            "help; precision.recipe='bf16' does without quantisation"
        )


def quantize_operand(
    x: Tensor, format: OperandFormat, *, key: tuple[int, int] | None = None
) -> ExactOperand:
    """As layers do it: x is the second of two groups, after one of zeros."""
    rows = [len(SIGNS), len(x)]
    streams = {"keys": [key, key]} if key else {}
    _, operand = quantize_groups(
        torch.cat([x.new_zeros(rows[0], x.shape[1]), x]), format, rows, rows, **streams
    )
    return operand


def _known_vectors(device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    for blocks in NVFP4_VECTORS:
        x, values = _matrices(blocks, repeats=1, device=device, dtype=dtype)
        amax = max(abs(element) for block in blocks for element in block.elements)
        for along in ("columns", "rows", "both"):
            yield from _compare(OperandFormat("nvfp4", along), x, values, factor=amax / 2688)
    x, values = _matrices(MXFP8_VECTORS, repeats=2, device=device, dtype=dtype)
    for along in ("columns", "rows"):
        yield from _compare(OperandFormat("mxfp8", along), x, values, factor=1.0)


def _matrices(
    blocks: tuple[Block, ...], *, repeats: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A matrix with a block in every row, and the codes times scales it should become."""
    x, values = (
        torch.tensor(rows, device=device, dtype=dtype)
        for rows in (
            [block.elements for block in blocks],
            [[code * block.scale for code in block.codes] for block in blocks],
        )
    )
    return torch.cat([x, -x] * repeats, 1), torch.cat([values, -values] * repeats, 1)


def _compare(format: OperandFormat, x: Tensor, values: Tensor, *, factor: float) -> Iterator[str]:
    if format.along == "rows":
        x, values = x.T.contiguous(), values.T
    if format.along == "both":
        x, values = (t.repeat_interleave(16, 0) for t in (x, values))
    rows = [len(x)] * 2
    # A power of two changes no code: it is in the factor, or where there is none in the scales.
    halved = (values, factor / 2) if format.format == "nvfp4" else (values / 2, factor)
    first, second = quantize_groups(torch.cat([x, x / 2]), format, rows, rows)
    for what, operand, (wanted, wanted_factor) in (
        ("", quantize_operand(x, format), (values, factor)),
        (" in groups", first, (values, factor)),
        (" in groups", second, halved),
    ):
        if wrong := (operand.values != wanted).sum().item():
            yield f"{format}{what}: {wrong} of {wanted.numel()} known values differ"
        found = 1.0 if operand.factor is None else operand.factor.item()
        if not math.isclose(found, wanted_factor, rel_tol=1e-6):
            yield f"{format}{what}: factor {found}, not {wanted_factor}"


def _hadamard(device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    """Unit vectors become the rows of the matrix; transformed operands have the plain product."""
    format = OperandFormat("nvfp4", "rows", hadamard=True)
    matrix = _signed_hadamard()
    unit = 4 * torch.eye(len(SIGNS), device=device, dtype=dtype)
    operand = quantize_operand(unit, format)
    # All magnitudes are 1, whose code and scale are the largest there are.
    if not torch.equal(operand.values.cpu().double() / 2688, matrix.T):
        yield f"{format}: the transform of unit vectors is not the Hadamard matrix"
    turned = ExactOperand(operand.values.T, operand.factor)
    gram = product(turned, operand).cpu().double()
    if not torch.allclose(gram, 16 * torch.eye(len(SIGNS), dtype=torch.float64), atol=1e-6):
        yield f"{format}: the transform is not orthogonal"


def _signed_hadamard() -> Tensor:
    """FP64 [16, 16] of 1 and -1: four times the matrix of `hadamard_matrix`, from its formula."""
    rows = [
        [s * (-1) ** (i & j).bit_count() for j in range(len(SIGNS))] for i, s in enumerate(SIGNS)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def _stochastic(device: torch.device, dtype: torch.dtype, draws: int) -> Iterator[str]:
    """Only the two neighbours of a number occur, each as often as it is near."""
    # Two numbers a column, of which the transform makes 8 times (a + b) / 4 = 6 and 8 times
    # (a - b) / 4, a number between two codes.
    between = torch.tensor(_BETWEEN, dtype=torch.float64)[:, 0].repeat(draws // len(_BETWEEN))
    before = torch.zeros(len(SIGNS), draws, dtype=torch.float64)
    before[0], before[1] = 12 + 2 * between, 12 - 2 * between
    after = _signed_hadamard().T @ before / 4
    for format, x, wanted in (
        (OperandFormat("nvfp4", "columns", stochastic=True), after.T, after.T),
        (OperandFormat("nvfp4", "rows", stochastic=True), after, after),
        (OperandFormat("nvfp4", "rows", stochastic=True, hadamard=True), before, after),
    ):
        x = x.contiguous().to(device, dtype)
        first, again, other = (
            quantize_operand(x, format, key=stream_key("self-test", n)).values.cpu().double() / 448
            for n in (0, 0, 1)
        )
        if not torch.equal(first, again):
            yield f"{format}: the same stream of random bits gave other codes the second time"
        if torch.equal(first, other):
            yield f"{format}: two streams of random bits gave the same codes"
        yield from _unbiased(format, first, wanted)


def _layer(layer: Layer, format: LinearFormat, device: torch.device, draws: int) -> Iterator[str]:
    """With a unit matrix as weight the output is the quantised input, and so with gradients."""
    weight = torch.eye(32, device=device, dtype=torch.bfloat16)
    between = torch.tensor(_BETWEEN)[:, :1].repeat(draws // len(_BETWEEN), 1)
    dy_TO = torch.cat([torch.full_like(between, E2M1.max), between], 1).repeat(1, 16)
    layer.begin(1, 0)
    for blocks, name, factor in (
        (NVFP4_VECTORS[1], "nvfp4", NVFP4_VECTORS[1][0].elements[0] / 2688),
        (MXFP8_VECTORS, "mxfp8", 1.0),
    ):
        x, values = _matrices(blocks, repeats=2, device=device, dtype=torch.bfloat16)
        x_TI = x.repeat(draws // len(x), 1).requires_grad_()
        y_TO = layer(x_TI, weight)
        if _quantises(format.fprop, name) and not format.fprop.left.stochastic:
            wanted = (values.float() * factor).repeat(draws // len(x), 1)
            if not torch.allclose(y_TO.float(), wanted, rtol=2**-8, atol=0.0):
                yield f"{format.fprop}: the output is not the product of the known operands"
        if _quantises(format.dgrad, name) and format.dgrad.left.stochastic:
            y_TO.backward(dy_TO.to(device, torch.bfloat16))
            # The scale of every block is that of 6, so these are the codes.
            yield from _unbiased(format.dgrad, x_TI.grad.cpu().double(), dy_TO.double())
    yield from _weight_gradient(layer, format, device)


def _weight_gradient(layer: Layer, format: LinearFormat, device: torch.device) -> Iterator[str]:
    """It is that of the exact product up to what the formats leave out."""
    place = torch.arange(64 * 32, dtype=torch.float64, device=device).view(64, 32)
    x_TI, dy_TO = ((place * step).sin().bfloat16() for step in (0.7, 1.3))
    weight = torch.eye(32, device=device, dtype=torch.bfloat16).requires_grad_()
    layer(x_TI, weight).backward(dy_TO)
    exact_OI = dy_TO.double().T @ x_TI.double()
    error = float((weight.grad.double() - exact_OI).norm() / exact_OI.norm())
    if not error < WGRAD_ERROR:
        yield f"{format.wgrad or 'wgrad'}: a weight gradient is wrong by {error:.0%}"


def _quantises(product: ProductFormat | None, name: str) -> bool:
    return product is not None and product.left is not None and product.left.format == name


def _unbiased(
    format: OperandFormat | ProductFormat, codes: Tensor, wanted: Tensor
) -> Iterator[str]:
    if not torch.equal(codes[wanted.abs() == E2M1.max], wanted[wanted.abs() == E2M1.max]):
        yield f"{format}: the largest code did not stay what it is"
    for value, low, high in _BETWEEN:
        at = wanted.abs() == value
        drawn = (codes * wanted.sign())[at]
        ups = (drawn == high).double()
        if not ((drawn == low) | (drawn == high)).all():
            yield f"{format}: {value} became something else than {low} or {high}"
        share = (value - low) / (high - low)
        bound = _SIGMAS * math.sqrt(share * (1 - share) / len(drawn))
        if abs(ups.mean().item() - share) > bound:
            yield (
                f"{format}: {value} became {high} in {ups.mean().item():.4f} of {len(drawn)} "
                f"draws, not in {share} +- {bound:.4f}"
            )
