"""LatentMoE (arXiv:2601.18089): y = W_up sum_k gate_k expert_k(W_down x) + shared(x)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemomodel.config.schema import MoeConfig
from nemomodel.model.layers import MLP, CachedLinear, Linear
from nemomodel.model.past import Past
from nemomodel.ops.activation import gated_squared_relu
from nemomodel.ops.experts import Permutation, expert_mlp
from nemomodel.ops.linear import linear_fp32
from nemomodel.ops.precision import accumulator, wide
from nemomodel.parallel.dispatch import make_dispatch
from nemomodel.parallel.exchange import sum_ranks
from nemomodel.parallel.mesh import SINGLE, Mesh
from nemomodel.parallel.shard import expert_parameter, parameter
from nemomodel.quant.linear import QuantizedLinear


class Routing(NamedTuple):
    """What a router decided about one micro-batch."""

    expert_TK: Tensor  # chosen experts, int64
    gate_TK: Tensor  # their weights, FP32
    balance: Tensor  # sequence-level auxiliary loss, summed over sequences, scalar; 0 if it is off


class Router(nn.Module):
    """Sigmoid scores in FP32; a bias that balances the load takes part in the choice alone.

    The bias is moved by `update_bias` once per global batch (auxiliary-loss-free balancing,
    arXiv:2408.15664); the gates are the unbiased scores, so it has no gradient.
    """

    def __init__(
        self, config: MoeConfig, hidden_size: int, *, dtype: torch.dtype, mesh: Mesh = SINGLE
    ):
        super().__init__()
        self.config, self.positions = config, mesh.positions
        wide = accumulator(dtype)
        self.weight = parameter(config.num_experts, hidden_size, dtype=dtype)
        self.register_buffer("expert_bias", torch.empty(config.num_experts, dtype=wide))

    def forward(self, x_SBD: Tensor) -> Routing:
        score_SBE = linear_fp32(x_SBD, self.weight).sigmoid()
        expert_TK, gate_TK = self.choose(score_SBE.flatten(0, 1))
        wanted = self.config.aux_loss_coeff > 0
        balance = self._balance(score_SBE) if wanted else score_SBE.new_zeros(())
        return Routing(expert_TK, gate_TK, balance)

    def choose(self, score_TE: Tensor) -> tuple[Tensor, Tensor]:
        """expert_TK and gate_TK of sigmoid scores."""
        expert_TK = self.best(score_TE.detach() + self.expert_bias)
        gate_TK = score_TE.gather(-1, expert_TK)
        if self.config.normalize_gates:
            gate_TK = gate_TK / (gate_TK.sum(-1, keepdim=True) + 1e-20)
        return expert_TK, gate_TK * self.config.routed_scaling_factor

    def best(self, biased_TE: Tensor) -> Tensor:
        """expert_TK of scores with the bias."""
        c = self.config
        if c.top_groups < c.num_groups:
            by_group = biased_TE.unflatten(-1, (c.num_groups, -1))
            # A group stands as high as its best two experts together.
            rank_TG = by_group.topk(2, dim=-1).values.sum(-1)
            kept = torch.zeros_like(rank_TG, dtype=torch.bool)
            kept.scatter_(-1, rank_TG.topk(c.top_groups, dim=-1, sorted=False).indices, True)
            biased_TE = by_group.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)
        return biased_TE.topk(c.top_k, dim=-1, sorted=False).indices

    def _balance(self, score_SBE: Tensor) -> Tensor:
        """sum over sequences of sum_e f_e P_e, 1 per sequence when the load is even.

        f_e = E / (K S) * tokens with e among their top K scores, bias and groups left out;
        P_e = mean over tokens of score_e / sum score (arXiv:2412.19437, equations 17 to 20).
        Of ranks that share sequences each has the part of its positions in P: they add up.
        """
        S, _, E = score_SBE.shape
        S *= self.positions.size
        top_SBK = score_SBE.detach().topk(self.config.top_k, dim=-1, sorted=False).indices
        top_SBE = torch.zeros_like(score_SBE).scatter_(-1, top_SBK, 1.0)
        load_BE = sum_ranks(top_SBE.sum(0), self.positions) * (E / (self.config.top_k * S))
        share_BE = (score_SBE / (score_SBE.sum(-1, keepdim=True) + 1e-20)).sum(0) / S
        return (load_BE * share_BE).sum()

    @torch.no_grad()
    def update_bias(self, count_E: Tensor) -> None:
        """Raise the bias of experts below the mean load, lower it above.

        Args:
            count_E: token copies per expert over the global batch, summed over all ranks.
        """
        count_E = count_E.to(self.expert_bias.dtype)
        direction_E = (count_E.mean() - count_E).sign()
        self.expert_bias.add_(direction_E, alpha=self.config.bias_update_rate)


class Experts(nn.Module):
    """fc2_e relu(fc1_e z)^2 for rows grouped by expert; gates enter before fc2, which is linear.

    ep cuts the experts, etp their inner width.
    """

    def __init__(
        self, num_experts: int, size: int, ffn_size: int, *, dtype: torch.dtype, mesh: Mesh = SINGLE
    ):
        super().__init__()
        E, F, L, experts = num_experts, ffn_size, size, mesh.ep.part(num_experts)
        inner = mesh.etp.part(F)
        self.fc1 = expert_parameter(E, F, L, dtype=dtype, experts=experts, rows=inner)
        self.fc2 = expert_parameter(E, L, F, dtype=dtype, experts=experts, columns=inner)
        # See model/quantize.py; a recipe has both or none.
        self.quantized_fc1: QuantizedLinear | None = None
        self.quantized_fc2: QuantizedLinear | None = None

    @property
    def by_micro_batch(self) -> bool:
        """Quantised rows of one micro-batch must not depend on those of others that come along."""
        return self.quantized_fc1 is not None

    def forward(
        self, z_RL: Tensor, gate_R: Tensor, order: Permutation, *, ranks: Sequence[int]
    ) -> Tensor:
        fc1, fc2 = self.quantized_fc1, self.quantized_fc2
        if fc1 is None or fc2 is None:
            return expert_mlp(z_RL, gate_R, self.fc1, self.fc2, order.rows_E)
        rows_ME, count_ME = (t.view(len(ranks), -1) for t in (order.rows_E, order.count_E))
        sizes = rows_ME.sum(1).tolist()
        y = []
        for rank, z, gate, *rows in zip(
            ranks, z_RL.split(sizes), gate_R.split(sizes), rows_ME, count_ME, strict=True
        ):
            with fc1.at.of_rank(rank):
                h_RF = gated_squared_relu(fc1.grouped(z, self.fc1, *rows), gate)
                y.append(fc2.grouped(h_RF, self.fc2, *rows))
        return torch.cat(y) if len(y) > 1 else y[0]


class LatentMoE(nn.Module):
    """Mixture of experts whose routed experts work at a narrow latent width L.

    Router and shared expert see the full width D. Without `latent_size` the routed experts do
    too, and the two projections are absent: the plain MoE of Nemotron 3 Nano.
    """

    def __init__(
        self, config: MoeConfig, hidden_size: int, *, dtype: torch.dtype, mesh: Mesh = SINGLE
    ):
        super().__init__()
        self.router = Router(config, hidden_size, dtype=dtype, mesh=mesh)
        size = config.latent_size or hidden_size
        if config.latent_size:
            self.latent_down = Linear(hidden_size, size, dtype=dtype)
            self.latent_up = Linear(size, hidden_size, dtype=dtype)
        else:
            self.latent_down = self.latent_up = nn.Identity()
        self.experts = Experts(config.num_experts, size, config.ffn_size, dtype=dtype, mesh=mesh)
        self.dispatch = make_dispatch(config.num_experts, mesh)
        self.shared_expert = MLP(hidden_size, config.shared_ffn_size, dtype=dtype, mesh=mesh)

    def forward(self, x_SBD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns y_SBD, the token copies per expert [E], and the auxiliary loss of `Router`."""
        routing = self.router(x_SBD)
        z_TL = self.latent_down(x_SBD).flatten(0, 1)
        y_TL, count_E = self.dispatch(z_TL, routing.expert_TK, routing.gate_TK, self.experts)
        # latent_up is linear: projecting the sum once equals projecting every copy.
        y_SBD = self.latent_up(y_TL.view(*x_SBD.shape[:2], -1)) + self.shared_expert(x_SBD)
        return y_SBD, count_E, routing.balance


FEW_TOKENS = 16
"""Up to this many, grouping the tokens by expert takes longer than it saves on a CPU."""

SMALL_EXPERTS = 2**16
"""Elements of all experts' fc1 up to which a product with all of them costs next to nothing."""


class CachedMoE:
    """The mixer without gradients; it remembers nothing."""

    def __init__(self, mixer: LatentMoE):
        self.mixer, self.router = mixer, mixer.router
        self.few_tokens = 0 if self.router.weight.is_cuda else FEW_TOKENS
        if not self.few_tokens:
            return  # it is the mixer itself that is called then
        router, self.latent = wide(self.router.weight), self.router.config.latent_size is not None
        # Scores, the shared expert's inner layer and the latent input come out of one product;
        # scores have their own where they are of a wider dtype.
        rows: list[Tensor] = [mixer.shared_expert.fc1.weight]
        if self.latent:
            rows.append(mixer.latent_down.weight)
            self.latent_up = CachedLinear(mixer.latent_up.weight)
        self.score = CachedLinear(router) if router.dtype != rows[0].dtype else None
        if self.score is None:
            rows.insert(0, router)
        self.in_proj, self.split = CachedLinear(torch.cat(rows)), [len(part) for part in rows]
        # As tensors: with a Python number an operation takes twice as long.
        self.floor, self.scale = router.new_tensor(
            [1e-20, self.router.config.routed_scaling_factor]
        ).unbind()
        self.fc1, self.fc2 = mixer.experts.fc1, mixer.experts.fc2
        self.fc1_of, self.fc2_of = self.fc1.unbind(), self.fc2.unbind()
        self.small = self.fc1.numel() <= SMALL_EXPERTS
        self.fc1_of_all = CachedLinear(self.fc1.flatten(0, 1))
        if self.small:
            self.fc2_of_all = CachedLinear(self.fc2.transpose(0, 1).flatten(1))
        self.shared_fc2 = CachedLinear(mixer.shared_expert.fc2.weight)

    def __call__(self, x_TD: Tensor, past: Past) -> Tensor:
        T = x_TD.shape[0]
        if self.few_tokens < T:
            return self.mixer(x_TD.unsqueeze(1))[0].squeeze(1)
        parts = self.in_proj(x_TD).split_with_sizes(self.split, -1)
        if self.score is not None:
            parts = self.score(wide(x_TD)), *parts
        score_TE, h_TF, *z = parts
        expert_TK, gate_TK = self._choose(score_TE.sigmoid_())
        z_TL = z[0] if self.latent else x_TD
        all_of_them = self.small or (T > 1 and expert_TK.numel() >= len(self.fc1_of))
        y_TL = (self._by_all if all_of_them else self._by_chosen)(z_TL, expert_TK, gate_TK)
        y_TD = self.latent_up(y_TL) if self.latent else y_TL
        return self.shared_fc2(h_TF.relu_().square_()).add_(y_TD)

    def _choose(self, score_TE: Tensor) -> tuple[Tensor, Tensor]:
        """As `Router.choose`."""
        expert_TK = self.router.best(score_TE + self.router.expert_bias)
        gate_TK = score_TE.gather(-1, expert_TK)
        if self.router.config.normalize_gates:
            gate_TK.div_(gate_TK.sum(-1, keepdim=True).add_(self.floor))
        return expert_TK, gate_TK.mul_(self.scale)

    def _by_chosen(self, z_TL: Tensor, expert_TK: Tensor, gate_TK: Tensor) -> Tensor:
        """sum_k gate_k expert_k(z), one product per token and chosen expert."""
        experts = expert_TK.tolist()
        chosen = [e for row in experts for e in row]
        tokens = [z for z, row in zip(z_TL.unbind(), experts, strict=True) for _ in row]
        h = [F.linear(z, self.fc1_of[e]) for z, e in zip(tokens, chosen, strict=True)]
        h_RF = torch.stack(h).relu_().square_().mul_(gate_TK.view(-1, 1))
        y = [F.linear(h, self.fc2_of[e]) for h, e in zip(h_RF.unbind(), chosen, strict=True)]
        return torch.stack(y).view(*expert_TK.shape, -1).sum(1)

    def _by_all(self, z_TL: Tensor, expert_TK: Tensor, gate_TK: Tensor) -> Tensor:
        """The same by every expert, with gate 0 for those not chosen: few products."""
        T, E = z_TL.shape[0], len(self.fc1_of)
        gate_TE = gate_TK.new_zeros(T, E).scatter_(1, expert_TK, gate_TK)
        h_TEF = self.fc1_of_all(z_TL).relu_().square_().view(T, E, -1)
        h_TEF.mul_(gate_TE.unsqueeze(-1))
        if self.small:
            return self.fc2_of_all(h_TEF.flatten(1))
        return torch.bmm(h_TEF.transpose(0, 1), self.fc2.mT).sum(0)
