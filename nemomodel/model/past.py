"""What the layers of one cached pass know about the positions before and in it."""

from typing import NamedTuple

from torch import Tensor

from nemomodel.ops.documents import Documents

STEP_POSITIONS = 16
"""A pass of at most this many positions goes one by one through the recurrence and can be rolled
back to any of them; a longer one goes by chunks."""


class Past(NamedTuple):
    """The same for every layer of a pass over S positions that follow `length` others."""

    num_positions: int
    batch_size: int
    length: int
    num_outputs: int
    """Positions at the end whose output is of use, the queries of attention; S if all."""
    sees: Tensor | None
    """Which keys each query sees, [Q * h, length + S], bool or what to add to the scores; or with
    padding [B, 1, ...]. Q is `num_outputs`; the h query heads per KV head of one position are
    together. None: every query sees all."""
    documents: Documents | None
    """Of a long pass from an empty cache with padding: each sequence's padding is a document."""
    real_SB1: Tensor | None
    """Bool, false at padding; None without padding in this pass."""
