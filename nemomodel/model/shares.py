"""Which tensors of a quantised linear layer ranks share, and what part of them this one has.

A layer that tp cuts by its rows, by its columns, and one that is whole and sees other positions:

              x               weight        dy
    rows      cp              tp            tp and cp, columns cut
    columns   tp and cp,      tp            cp
              columns cut
    whole     tp and cp       -             tp and cp

Experts see whole micro-batches, and etp cuts their rows or columns.
"""

from math import gcd

import torch
from torch import Tensor

from nemomodel.parallel.mesh import Axis, Mesh
from nemomodel.parallel.shard import Ranges, is_expert, shard_of
from nemomodel.quant.linear import LinearFormat, Share


def shares(weight: Tensor, mesh: Mesh, format: LinearFormat, *, name: str) -> dict[str, Share]:
    """By the name of the tensor; see `quant.linear.QuantizedLinear`.

    Raises:
        ValueError: a block would lie on two ranks.
    """
    (rows, out_size), (columns, in_size) = zip(
        shard_of(weight).ranges[-2:], shard_of(weight).shape[-2:], strict=True
    )
    cuts = mesh.etp if is_expert(weight) else mesh.tp
    tokens = Axis() if is_expert(weight) else mesh.cp
    together = mesh.etp if is_expert(weight) else mesh.positions
    found: dict[str, Share | None] = {"weight": _share(cuts)}
    if _is_cut(rows, out_size):
        found["x"] = _share(tokens, tokens.rank)
        found["dy"] = _share(together, tokens.rank, _columns(rows, weight), out_size)
        _check(rows, format, name)
    elif _is_cut(columns, in_size):
        found["x"] = _share(together, tokens.rank, _columns(columns, weight), in_size)
        found["dy"] = _share(tokens, tokens.rank)
        _check(columns, format, name)
    else:
        everyone = Axis() if is_expert(weight) else mesh.positions
        found = dict.fromkeys(("x", "dy"), _share(everyone, everyone.rank))
    return {tensor: share for tensor, share in found.items() if share}


def first_expert(weight: Tensor) -> int:
    """Of those this rank has; 0 where there are none."""
    return shard_of(weight).ranges[0][0].start if is_expert(weight) else 0


def _share(
    axis: Axis, token_rank: int = 0, columns: Tensor | None = None, width: int | None = None
) -> Share | None:
    if axis.size == 1:
        return None
    return Share(axis.group, token_rank, columns, width)


def _is_cut(ranges: Ranges, size: int) -> bool:
    return sum(map(len, ranges)) < size


def _columns(ranges: Ranges, weight: Tensor) -> Tensor:
    places = torch.cat([torch.arange(r.start, r.stop) for r in ranges])
    return places.to(weight.device, torch.int32)


def _check(ranges: Ranges, format: LinearFormat, name: str) -> None:
    products = [product for product in (format.fprop, format.dgrad, format.wgrad) if product]
    operands = [o for product in products for o in (product.left, product.right) if o]
    block = max(max(operand.block) for operand in operands)
    common = gcd(*(border for r in ranges for border in (r.start, r.stop)))
    if common % block:
        raise ValueError(
            f"{name}: the layout cuts the weight at multiples of {common}, blocks have {block}; "
            "use fewer tensor-parallel ranks, or a recipe that does not quantise this layer"
        )
