"""Decoding: a model, or one MTP depth, over positions that follow others it remembers.

To be used under torch.inference_mode() or torch.no_grad(). A cache refers to the weights it was
made with, so it is of no use after they change.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemomodel.config.pattern import LayerKind
from nemomodel.model.attention import CachedAttention
from nemomodel.model.layers import CachedLinear, CachedMLP, CachedNorm
from nemomodel.model.mamba import CachedMamba
from nemomodel.model.moe import CachedMoE
from nemomodel.model.mtp import MtpBlock
from nemomodel.model.nemotron import Nemotron
from nemomodel.model.past import STEP_POSITIONS, Past
from nemomodel.ops.documents import Documents


class CachedBlocks:
    """A stack of blocks and what its mixers remember of the `length` positions so far.

    Args:
        max_length: positions there is room for.
        padding_B: positions at the start of each sequence that hold no token; None is none.
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        *,
        batch_size: int,
        max_length: int,
        padding_B: Tensor | None = None,
    ):
        self.norms = [CachedNorm(block.norm.weight, block.norm.eps) for block in blocks]
        self.mixers = []
        self.mambas: list[CachedMamba] = []
        self.last_looking_back = 0  # number of the layer after which no position sees others
        self.heads_per_group: int | None = None  # query heads per KV head, if there is attention
        for index, block in enumerate(blocks):
            if block.kind in (LayerKind.MAMBA, LayerKind.ATTENTION):
                self.last_looking_back = index
            match block.kind:
                case LayerKind.MAMBA:
                    mixer = CachedMamba(block.mixer, batch_size=batch_size)
                    self.mambas.append(mixer)
                case LayerKind.ATTENTION:
                    mixer = CachedAttention(
                        block.mixer, batch_size=batch_size, max_length=max_length
                    )
                    self.heads_per_group = mixer.heads_per_group
                case LayerKind.MOE:
                    mixer = CachedMoE(block.mixer)
                case LayerKind.MLP:
                    mixer = CachedMLP(block.mixer)
            self.mixers.append(mixer)
        self.max_length, self.padding_B = max_length, padding_B
        weight = blocks[0].norm.weight
        self.positions = torch.arange(max_length, device=weight.device)
        self.queries = self.positions.repeat_interleave(self.heads_per_group or 0)
        self.bias = weight.new_zeros(0)  # of the longest short pass so far
        self.length = self.last_start = 0

    def extend(self, x_SBD: Tensor, *, num_outputs: int | None = None) -> Tensor:
        """Pass x through the blocks as the next S positions; [S, B, D].

        Args:
            num_outputs: return those of this many positions at the end; None is of all.
        """
        S, B, D = x_SBD.shape
        assert S + self.length <= self.max_length, (S, self.length, self.max_length)
        Q, last = num_outputs or S, self.last_looking_back
        past, x_TD = self._past(S, B, S if last else Q), x_SBD.flatten(0, 1)
        for index, (norm, mixer) in enumerate(zip(self.norms, self.mixers, strict=True)):
            if Q == S or index != last:
                x_TD = mixer(norm(x_TD), past).add_(x_TD)
                continue
            if last:  # the layers before it needed all positions
                past = self._past(S, B, Q)
            x_TD = mixer(norm(x_TD), past)[-Q * B :].add_(x_TD[-Q * B :])
        self.last_start, self.length = self.length, self.length + S
        return x_TD.view(Q, B, D)

    def crop(self, length: int) -> None:
        """Forget the positions from `length` on.

        Args:
            length: 0, the present length, or more than before the last pass, which then must
                have had at most `STEP_POSITIONS` positions.
        """
        if length == self.length:
            return
        count = length - self.last_start
        assert length == 0 or 0 < count <= self.length - self.last_start <= STEP_POSITIONS
        for mamba in self.mambas:  # keys and values that are forgotten get written over
            mamba.keep(count) if length else mamba.reset()
        self.length = length

    def _past(self, S: int, B: int, Q: int) -> Past:
        length, stop = self.length, self.length + S
        if Q == 1 and self.padding_B is None:
            return Past(S, B, length, Q, None, None, None)
        key_S = self.positions[:stop]
        documents = real_SB1 = sees = None
        h = self.heads_per_group
        if self.padding_B is not None and length == 0:
            real_SB = key_S.unsqueeze(1) >= self.padding_B
            real_SB1 = real_SB.unsqueeze(2)
            if S > STEP_POSITIONS:
                documents = Documents.from_ids(real_SB.T.cpu()).to(key_S.device)
        if h and self.padding_B is None and S <= STEP_POSITIONS:
            if len(self.bias) < S * h:
                self.bias = causal_bias(S, h, self.max_length, like=self.bias)
            first = self.max_length - length
            sees = self.bias[(S - Q) * h : S * h, first : first + stop]
        elif h and (Q <= STEP_POSITIONS or length):
            query_Q1 = self.queries[(stop - Q) * h : stop * h].unsqueeze(1)
            sees = query_Q1 >= key_S
            if self.padding_B is not None:
                # Padding sees itself: a softmax over nothing is not a number.
                real = key_S >= self.padding_B.view(-1, 1, 1, 1)
                sees = sees & (real | (key_S == query_Q1))
        return Past(S, B, length, Q, sees, documents, real_SB1)


def causal_bias(S: int, heads_per_group: int, max_length: int, *, like: Tensor) -> Tensor:
    """What is added to the scores of attention: -inf where the key comes after the query.

    Rows are the queries of a pass over up to S positions, columns its keys, those of the first
    of these positions in column `max_length`.
    """
    query_S = torch.arange(S, device=like.device)
    key_S = torch.arange(max_length + S, device=like.device) - max_length
    after = key_S > query_S.repeat_interleave(heads_per_group).unsqueeze(1)
    return like.new_zeros(after.shape).masked_fill_(after, -torch.inf)


class CachedModel:
    """The backbone of a model over sequences that grow.

        cache = CachedModel(model, batch_size=1, max_length=100)
        hidden_SBD = cache.extend(ids_BS)       logits = cache.logits(hidden_SBD[-1])

    Args:
        padding: for unequal prompts, tokens at the start of each that stand for nothing; at
            least one token of every sequence's first pass must be real.
    """

    def __init__(
        self,
        model: Nemotron,
        *,
        batch_size: int,
        max_length: int,
        padding: list[int] | None = None,
    ):
        self.embedding, self.head = model.embedding.weight, CachedLinear(model.lm_head.weight)
        self.final_norm = CachedNorm(model.final_norm.weight, model.final_norm.eps)
        padding_B = (
            torch.tensor(padding, device=self.embedding.device) if any(padding or ()) else None
        )
        self.blocks = CachedBlocks(
            model.blocks, batch_size=batch_size, max_length=max_length, padding_B=padding_B
        )

    @property
    def length(self) -> int:
        return self.blocks.length

    def extend(self, ids_BS: Tensor) -> Tensor:
        """Hidden states [S, B, D] after the final norm, of the next S tokens."""
        return self.final_norm(self.blocks.extend(F.embedding(ids_BS.T, self.embedding)))

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., V] of hidden states [..., D], of the backbone or of a depth."""
        return self.head(hidden.view(-1, hidden.shape[-1])).view(*hidden.shape[:-1], -1)

    def crop(self, length: int) -> None:
        """As `CachedBlocks.crop`: roll back to the first `length` positions."""
        self.blocks.crop(length)


class CachedDepth:
    """One MTP depth of one sequence; the same block may serve several depths, each with its own.

    Position i joins the hidden state of the depth before at i with the token this depth looks
    ahead to.
    """

    def __init__(self, block: MtpBlock, *, max_length: int):
        norms = block.embedding_norm, block.hidden_norm
        self.half_norms = CachedNorm(torch.stack([n.weight for n in norms]), norms[0].eps)
        self.final_norm = CachedNorm(block.final_norm.weight, block.final_norm.eps)
        self.eh_proj = CachedLinear(block.eh_proj.weight)
        self.blocks = CachedBlocks(block.layers, batch_size=1, max_length=max_length)

    @property
    def length(self) -> int:
        return self.blocks.length

    def extend(
        self, hidden_SBD: Tensor, embedding_SBD: Tensor, *, num_outputs: int | None = None
    ) -> Tensor:
        """Hidden states [S, 1, D] of this depth after its final norm; as `CachedBlocks.extend`."""
        halves_SB2D = self.half_norms(torch.stack([embedding_SBD, hidden_SBD], dim=-2))
        x_TD = self.eh_proj(halves_SB2D.view(len(halves_SB2D), -1))
        return self.final_norm(self.blocks.extend(x_TD.unsqueeze(1), num_outputs=num_outputs))

    def crop(self, length: int) -> None:
        """As `CachedBlocks.crop`."""
        self.blocks.crop(length)
