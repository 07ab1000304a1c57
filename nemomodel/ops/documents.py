"""Which positions of a packed micro-batch belong to the same document."""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Document borders of a micro-batch, once for the device and once for the host.

    Positions of different documents never see each other: not in the convolution, the scan,
    attention, or the labels of multi-token prediction.
    """

    id_SB: Tensor
    """int32; equal within one sequence exactly where the document is the same."""
    spans: tuple[tuple[int, int, int], ...]
    """(sequence, first position, one past the last position) of every document, in order."""

    @staticmethod
    def from_ids(document_BS: Tensor) -> "Documents":
        """From document numbers [B, S] on the CPU, each document a contiguous run of positions."""
        B, S = document_BS.shape
        spans = []
        for b in range(B):
            starts = (document_BS[b, 1:] != document_BS[b, :-1]).nonzero().flatten() + 1
            borders = [0, *starts.tolist(), S]
            spans += [(b, s, e) for s, e in pairwise(borders)]
        return Documents(document_BS.T.contiguous().to(torch.int32), tuple(spans))

    def to(self, device: torch.device) -> "Documents":
        return Documents(self.id_SB.to(device, non_blocking=True), self.spans)
