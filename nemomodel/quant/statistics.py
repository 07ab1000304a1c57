"""What quantisation does to the operands of a step, by role, layer and operand.

Every count is summed where the tensors are, over calls, micro-batches, experts and ranks; the
host reads once, at the end of a step.
"""

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from nemomodel.quant.formats import E4M3, MXFP8_E4M3
from nemomodel.quant.hadamard import hadamard_matrix, transform_rows
from nemomodel.quant.mx import encode_mx
from nemomodel.quant.nvfp4 import encode
from nemomodel.quant.operand import ExactOperand, OperandFormat
from nemomodel.quant.rounding import exp2
from nemomodel.quant.tiles import from_tiles, tile_amax, to_tiles

OPERANDS = (
    "x",
    "x_along_tokens",
    "weight",
    "weight_along_outputs",
    "dy",
    "dy_along_tokens",
)
"""Operands by the name of their tensor and the dimension that its blocks lie along: an input and
a gradient are quantised along the channels for fprop and dgrad, and again along the tokens for
wgrad; a weight is quantised once where blocks are square, else along both its dimensions."""

_SUMS = ("signal", "noise", "elements", "not_zero", "underflows", "saturated")


class Observer:
    """Statistics of the operands that are shown to it.

    Args:
        roles: of the linear layers of this rank, by their names. Where there are several ranks
            all of them make an observer, and read it, together.
        device: where the operands are.

    Statistics of a layer are those of all its experts, and of a block's layers of one role; what
    they mean stands in observe/metrics.py.
    """

    def __init__(self, roles: Mapping[str, str], device: torch.device) -> None:
        self._site = {layer: (str(role), _place(layer)) for layer, role in roles.items()}
        self._ranks = dist.is_initialized() and dist.get_world_size() > 1
        sites = set(self._site.values())
        if self._ranks:  # stages of a pipeline have other layers
            everyone: list[set[tuple[str, str]]] = [set()] * dist.get_world_size()
            dist.all_gather_object(everyone, sites)
            sites = set().union(*everyone)
        self._row = {site: i for i, site in enumerate(sorted(sites))}
        shape = len(self._row), len(OPERANDS)
        self._sums = torch.zeros(*shape, len(_SUMS), dtype=torch.float64, device=device)
        self._extremes = torch.full((*shape, 3), -math.inf, dtype=torch.float64, device=device)

    @torch.no_grad()
    def see(
        self, layer: str, operand: str, x_MK: Tensor, format: OperandFormat, exact: ExactOperand
    ) -> None:
        """Add one quantised operand; nothing waits for the device.

        Args:
            operand: one of OPERANDS, with spaces or underscores; "weight" of either dimension.
            x_MK: what was quantised to `exact`, before a transform.
        """
        name = operand.replace(" ", "_")
        if name == "weight" and format.along == "rows":
            name = "weight_along_outputs"
        if not x_MK.numel():
            return
        sums, extremes = measure(x_MK, format, exact)
        at = self._row[self._site[layer]], OPERANDS.index(name)
        self._sums[at] += sums
        self._extremes[at] = torch.maximum(self._extremes[at], extremes)

    def read(self) -> dict[str, float]:
        """The statistics since the last call, by `quant/ROLE/LAYER/OPERAND/STATISTIC`, and over
        all layers of a role by `quant/ROLE/OPERAND/STATISTIC`; what nothing was seen of is left
        out."""
        if self._ranks:
            dist.all_reduce(self._sums)
            dist.all_reduce(self._extremes, dist.ReduceOp.MAX)
        both = torch.cat([self._sums, self._extremes], dim=-1).cpu()
        self._sums.zero_()
        self._extremes.fill_(-math.inf)
        values: dict[str, float] = {}
        roles: dict[str, list[int]] = {}
        for (role, place), row in self._row.items():
            values |= _named(f"quant/{role}/{place}", both[row : row + 1])
            roles.setdefault(role, []).append(row)
        for role, rows in roles.items():
            values |= _named(f"quant/{role}", both[rows])
        return values


def measure(x_MK: Tensor, format: OperandFormat, exact: ExactOperand) -> tuple[Tensor, Tensor]:
    """Sums, in the order of _SUMS, and the largest of magnitudes, of block scales, and of block
    scales that are not 0 times -1; FP64, on the device of x_MK.

    A block whose scale is 0 holds nothing: its elements count as underflows, not as saturated.
    """
    if format.hadamard:
        x_MK = transform_rows(x_MK, hadamard_matrix().to(x_MK.device))
    x = x_MK.double()
    q = exact.values.double()
    if exact.factor is not None:
        q = q * exact.factor.double()
    amax = x.abs().amax()
    scales, limits = _block_scales(x_MK, format, amax if exact.amax is None else exact.amax)
    limit = from_tiles(limits.expand_as(to_tiles(x, format.block)), tuple(x.shape))
    not_zero = x != 0
    sums = (
        x.square().sum(),
        (q - x).square().sum(),
        torch.full_like(amax, x.numel()),
        not_zero.sum(),
        (not_zero & (q == 0)).sum(),
        ((x.abs() > limit) & (limit > 0)).sum(),
    )
    smallest = torch.where(scales > 0, scales, math.inf).amin()
    return torch.stack(sums), torch.stack([amax, scales.amax(), -smallest])


def _block_scales(x_MK: Tensor, format: OperandFormat, amax: Tensor) -> tuple[Tensor, Tensor]:
    """The stored scales, [M / a, 1, K / b, 1], and the largest values that their blocks hold."""
    tiles = to_tiles(x_MK, format.block).float()
    if format.format == "mxfp8":
        _, exponents = encode_mx(tiles, MXFP8_E4M3.element, "rceil", key=None)
        # An E8M0 scale is never 0; what a block of zeros has says nothing.
        scales = torch.where(tile_amax(tiles) > 0, exp2(exponents), 0).double()
        return scales, scales * MXFP8_E4M3.element.max
    _, scales = encode(tiles, amax.float(), key=None)
    # 6 * scale * amax / (6 * 448), in this order exact in FP64 wherever an element is that large.
    return scales.double(), scales.double() * amax.double() / E4M3.max


def _named(prefix: str, rows: Tensor) -> dict[str, float]:
    """Statistics of some rows together, operand by operand."""
    values: dict[str, float] = {}
    sums, extremes = rows[..., : len(_SUMS)].sum(0), rows[..., len(_SUMS) :].amax(0)
    for operand, counts, largest in zip(OPERANDS, sums.tolist(), extremes.tolist(), strict=True):
        signal, noise, elements, not_zero, underflows, saturated = counts
        amax, scale_max, scale_min = largest[0], largest[1], -largest[2]
        if not elements:
            continue
        found = {} if not noise else {"sqnr_db": 10 * math.log10(signal / noise)}
        found |= {"underflow": underflows / max(not_zero, 1), "saturation": saturated / elements}
        if scale_max > 0:
            found |= {"scale_min": scale_min, "scale_max": scale_max}
            found["scale_range_log2"] = math.log2(scale_max / scale_min)
        found["amax"] = amax
        values |= {f"{prefix}/{operand}/{name}": value for name, value in found.items()}
    return values


def _place(layer: str) -> str:
    """blocks.3.mixer.in_proj -> 3; mtp.blocks.0.layers.1.mixer.in_proj -> mtp.0.1."""
    return ".".join(part for part in layer.split(".") if part.isdigit() or part == "mtp")
