"""Mixture of experts: router, load-balancing loss, experts, LatentMoE, selection bias."""

from collections.abc import Mapping

import torch
from torch import Tensor

from nemomodel.config.schema import MoeConfig


def router_oracle(
    x_TD: Tensor,
    weight: Tensor,
    expert_bias: Tensor,
    *,
    top_k: int,
    num_groups: int,
    top_groups: int,
    normalize_gates: bool,
    routed_scaling_factor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sigmoid scores; the bias and the group limit choose, the unbiased scores weigh.

    A group is ranked by the sum of its best two biased scores; a token chooses among the experts
    of its top_groups best groups. Equal values go to the lower index.

    Returns:
        gate_TK (float64), expert_TK (int64, the best biased score first) and the unbiased
        score_TE (float64).

    Source: arXiv:2412.19437 section 2.1.2.
    """
    num_experts = weight.shape[0]
    group_size = num_experts // num_groups
    score_TE = torch.sigmoid(x_TD.double() @ weight.double().T)
    biased_TE = (score_TE + expert_bias.double()).tolist()
    gate_TK, expert_TK = [], []
    for t, biased in enumerate(biased_TE):
        allowed = list(range(num_experts))
        if top_groups < num_groups:
            rank = []
            for g in range(num_groups):
                members = biased[g * group_size : (g + 1) * group_size]
                rank.append(sum(sorted(members, reverse=True)[:2]))
            kept = sorted(range(num_groups), key=lambda g: -rank[g])[:top_groups]
            allowed = [e for e in range(num_experts) if e // group_size in kept]
        chosen = sorted(allowed, key=lambda e: -biased[e])[:top_k]
        gate_K = score_TE[t, chosen]
        if normalize_gates:
            gate_K = gate_K / (gate_K.sum() + 1e-20)
        gate_TK.append(gate_K * routed_scaling_factor)
        expert_TK.append(chosen)
    return torch.stack(gate_TK), torch.tensor(expert_TK), score_TE


def seq_aux_loss_oracle(score_BSE: Tensor, expert_BSK: Tensor, *, coeff: float) -> Tensor:
    """Sequence-level load-balancing loss, summed over the sequences.

        f_e = E / (K S) * number of the sequence's positions that chose e       (no gradient)
        P_e = mean over the sequence's positions of score_e / sum_e' score_e'
        loss of a sequence = coeff * sum_e f_e P_e             (coeff when perfectly balanced)

    The choice is the one made, selection bias included; the source takes the top k of the
    unbiased scores in f_e.

    Source: arXiv:2412.19437 section 2.1.2, complementary sequence-wise auxiliary loss.
    """
    length, num_experts = score_BSE.shape[1:]
    top_k = expert_BSK.shape[2]
    total = score_BSE.new_zeros(())
    for score_SE, expert_SK in zip(score_BSE, expert_BSK, strict=True):
        count_E = count_oracle(expert_SK, num_experts=num_experts).to(score_SE.dtype)
        f_E = num_experts / (top_k * length) * count_E
        P_E = (score_SE / score_SE.sum(dim=-1, keepdim=True)).mean(dim=0)
        total = total + coeff * (f_E * P_E).sum()
    return total


def count_oracle(expert_TK: Tensor, *, num_experts: int) -> Tensor:
    """How many tokens chose each expert: [E], int64."""
    count = [0] * num_experts
    for e in expert_TK.flatten().tolist():
        count[e] += 1
    return torch.tensor(count)


def bias_update_oracle(expert_bias: Tensor, count_E: Tensor, *, rate: float) -> Tensor:
    """bias + rate * sign(mean count - count): busier than the mean loses, idler gains."""
    load_E = count_E.double()
    return expert_bias + rate * torch.sign(load_E.mean() - load_E).to(expert_bias.dtype)


def ffn_oracle(x: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    """fc2 relu(fc1 x)^2; fc1 is [F, in], fc2 is [out, F]. Also one expert, and the dense MLP."""
    return torch.relu(x @ fc1.T) ** 2 @ fc2.T


def moe_oracle(
    x_BSD: Tensor, params: Mapping[str, Tensor], config: MoeConfig, *, aux_loss_coeff: float
) -> tuple[Tensor, Tensor, Tensor]:
    """One MoE mixer, token by token.

        y = latent_up(sum_k gate_k expert_k(latent_down x)) + shared_expert(x)

    Without a latent size both projections are absent and the experts see x.

    Args:
        params: the mixer's tensors, named relative to the mixer ("router.weight", ...).
        aux_loss_coeff: stands in for config.aux_loss_coeff, which a shared MTP block divides.

    Returns:
        y_BSD, the tokens that chose each expert count_E (int64), and the load-balancing loss
        summed over the sequences with its coefficient (float64).

    Source: arXiv:2601.18089.
    """
    B, S, D = x_BSD.shape
    x_TD = x_BSD.reshape(B * S, D)
    gate_TK, expert_TK, score_TE = router_oracle(
        x_TD,
        params["router.weight"],
        params["router.expert_bias"],
        top_k=config.top_k,
        num_groups=config.num_groups,
        top_groups=config.top_groups,
        normalize_gates=config.normalize_gates,
        routed_scaling_factor=config.routed_scaling_factor,
    )
    fc1, fc2 = params["experts.fc1"], params["experts.fc2"]
    y_TD = []
    for t in range(B * S):
        z_L = x_TD[t]
        if config.latent_size is not None:
            z_L = params["latent_down.weight"] @ z_L
        mixed_L = torch.zeros_like(z_L)
        for gate, e in zip(gate_TK[t], expert_TK[t].tolist(), strict=True):
            mixed_L = mixed_L + gate.to(z_L.dtype) * ffn_oracle(z_L, fc1[e], fc2[e])
        if config.latent_size is not None:
            mixed_L = params["latent_up.weight"] @ mixed_L
        y_TD.append(mixed_L)
    shared_TD = ffn_oracle(
        x_TD, params["shared_expert.fc1.weight"], params["shared_expert.fc2.weight"]
    )
    score_BSE = score_TE.reshape(B, S, config.num_experts)
    # The load that is balanced is that of the scores alone: no bias, no group limit.
    expert_BSK = score_BSE.topk(config.top_k, dim=-1).indices
    y_BSD = (torch.stack(y_TD) + shared_TD).reshape(B, S, D)
    count_E = count_oracle(expert_TK, num_experts=config.num_experts)
    return y_BSD, count_E, seq_aux_loss_oracle(score_BSE, expert_BSK, coeff=aux_loss_coeff)
