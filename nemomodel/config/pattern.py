"""The layer pattern: one letter per block, in order.

    M  Mamba-2 mixer        *  attention (GQA)        E  LatentMoE        -  dense MLP

A `|` between two letters cuts the backbone into pipeline stages; it is no part of the model.

Source of the notation: Megatron-LM core/models/hybrid/hybrid_layer_allocation.py @ d98e8a64.
"""

from enum import StrEnum

CUT = "|"


class LayerKind(StrEnum):
    """What the single mixer of a block is; the value is its letter in a pattern."""

    MAMBA = "M"
    ATTENTION = "*"
    MOE = "E"
    MLP = "-"


def parse_pattern(pattern: str) -> tuple[LayerKind, ...]:
    """Turn ``"MEM*-"`` into layer kinds, without the cuts.

    Raises:
        ValueError: the pattern is empty or has another letter than ``M * E -``.
    """
    pattern = pattern.replace(CUT, "")
    if not pattern:
        raise ValueError("the pattern is empty; use letters of M * E -")
    unknown = sorted(set(pattern) - {kind.value for kind in LayerKind})
    if unknown:
        raise ValueError(f"unknown letter(s) {' '.join(unknown)}; use letters of M * E -")
    return tuple(LayerKind(letter) for letter in pattern)
