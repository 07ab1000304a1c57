"""Drafts of the tokens to come, by the MTP depths of the model itself."""

import torch
from torch import Tensor

from nemomodel.infer.sampling import Chooser
from nemomodel.model.cache import CachedDepth, CachedModel
from nemomodel.model.nemotron import Nemotron
from nemomodel.model.past import STEP_POSITIONS


class Drafter:
    """MTP depths 1 .. length of one sequence, each with its own cache.

    Depth k at position i joins depth k - 1 at i with token i + k, as in training. Towards the
    end that token is itself a draft. A position is forgotten when its draft is not accepted, and
    else never computed again. Depths beyond the model's own apply its last block further.
    """

    def __init__(self, model: Nemotron, cache: CachedModel, *, length: int, max_length: int):
        blocks = model.mtp.blocks
        self.cache, self.embedding_V1D = cache, model.embedding.weight.unsqueeze(1)
        self.depths = [
            CachedDepth(blocks[min(k, len(blocks) - 1)], max_length=max_length)
            for k in range(length)
        ]
        # What each depth starts from: hidden states of the one before it, at the last positions.
        self.before = [self.embedding_V1D[:0]] * length

    def draft(
        self, hidden_SBD: Tensor, ids: list[int], count: int, choose: Chooser
    ) -> tuple[list[int], list[Tensor | None]]:
        """`count` tokens that may follow `ids`, with the distribution each was drawn from.

        Args:
            hidden_SBD: of the backbone, at the positions since the last call; the last is the
                position before the last token of `ids`.
            ids: the whole sequence so far.
        """
        stop, known, distributions = len(ids) - 1, list(ids), []
        for k, depth in enumerate(self.depths, 1):
            before_SBD = hidden_SBD
            if len(self.before[k - 1]):
                before_SBD = torch.cat([self.before[k - 1], hidden_SBD])
            if k > count:
                self.before[k - 1] = before_SBD
                break
            S = stop - depth.length
            hidden_SBD = _extend(
                depth,
                _last(before_SBD, S),
                torch.stack([self.embedding_V1D[token] for token in known[-S:]]),
                rollback=k,
                # Of the last depth only the draft is of use, of the others every position.
                num_outputs=1 if k == len(self.depths) else None,
            )
            # When no draft is accepted it forgets one position more than the one before it.
            self.before[k - 1] = _last(before_SBD, k - 1)
            token, q_V = choose.draft(self.cache.logits(hidden_SBD[-1, 0]))
            known.append(token)
            distributions.append(q_V)
        return known[stop + 1 :], distributions

    def accept(self, ids: list[int]) -> None:
        """Forget the positions that saw a draft which is not part of `ids`.

        Args:
            ids: the sequence up to the last accepted draft, without the model's own next token.
        """
        for k, depth in enumerate(self.depths, 1):
            length = min(depth.length, max(len(ids) - k, 0))
            if forgotten := depth.length - length:
                depth.crop(length)
                if k < len(self.depths):
                    self.before[k] = self.before[k][:-forgotten]


def _last(x_SBD: Tensor, count: int) -> Tensor:
    """The last `count` positions, or all if there are fewer."""
    return x_SBD if len(x_SBD) <= count else x_SBD[len(x_SBD) - count :]


def _extend(
    depth: CachedDepth,
    hidden_SBD: Tensor,
    embedding_SBD: Tensor,
    *,
    rollback: int,
    num_outputs: int | None,
) -> Tensor:
    """A long pass in two, so that all but the first of the last `rollback` can be forgotten."""
    if len(hidden_SBD) <= STEP_POSITIONS:
        return depth.extend(hidden_SBD, embedding_SBD, num_outputs=num_outputs)
    parts = slice(None, -rollback), slice(-rollback, None)
    return torch.cat(
        [
            depth.extend(hidden_SBD[part], embedding_SBD[part], num_outputs=num_outputs)
            for part in parts
        ]
    )
