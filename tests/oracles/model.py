"""The whole model as a function of its parameters, and its training loss."""

from collections.abc import Mapping

import torch
from torch import Tensor

from nemomodel.config.pattern import LayerKind
from nemomodel.config.schema import AttentionConfig, MambaConfig, ModelConfig
from tests.oracles.attention import attention_oracle
from tests.oracles.conv import conv_oracle
from tests.oracles.loss import cross_entropy_oracle, mtp_targets_oracle
from tests.oracles.moe import ffn_oracle, moe_oracle
from tests.oracles.norm import gated_group_rmsnorm_oracle, rmsnorm_oracle
from tests.oracles.ssd import ssd_oracle

Params = Mapping[str, Tensor]


def forward(
    params: Params, config: ModelConfig, ids_BS: Tensor, document_BS: Tensor | None = None
) -> dict:
    """Logits of the main head and of every MTP depth.

    Returns:
        logits_BSV: main head.
        mtp_logits: list over depths 1, 2, ... of [B, S, V].
        counts: name of a router ("blocks.1.mixer.router") -> count_E, int64; the depths that
            share an MTP block add up.
        aux: the same names -> load-balancing loss summed over sequences (and shared depths),
            coefficient included.
        hidden_BSD: output of the final norm.
        mtp_hidden: list over depths of the MTP block's output, after its final norm.
    """
    result = {"counts": {}, "aux": {}, "mtp_logits": [], "mtp_hidden": []}
    x_BSD = params["embedding.weight"][ids_BS]
    for i, kind in enumerate(config.layers):
        x_BSD = _block(x_BSD, params, f"blocks.{i}.", kind, config, document_BS, 1.0, result)
    h_BSD = rmsnorm_oracle(x_BSD, params["final_norm.weight"], eps=config.norm_eps)
    result["hidden_BSD"] = h_BSD
    result["logits_BSV"] = h_BSD @ params["lm_head.weight"].T
    if config.mtp:
        for depth in range(1, config.mtp.num_depths + 1):
            h_BSD = _mtp_block(h_BSD, params, config, ids_BS, document_BS, depth, result)
            result["mtp_hidden"].append(h_BSD)
            result["mtp_logits"].append(h_BSD @ params["lm_head.weight"].T)
    return result


def loss_terms(
    params: Params,
    config: ModelConfig,
    ids_BS: Tensor,
    labels_BS: Tensor,
    loss_mask_BS: Tensor,
    document_BS: Tensor | None = None,
) -> dict:
    """The parts of the training loss, and `forward`'s results.

        total = ce_0 / N_0 + loss_scale / num_depths * sum_k ce_k / N_k + sum of aux / B

    with ce_k the cross-entropy summed over the N_k valid targets of depth k in the whole batch
    (0 is the main head); a depth without valid targets contributes 0.

    Returns:
        `forward`'s entries and total, ce_sums (list over k = 0, 1, ...), num_targets (same
        order, ints), aux_sum.
    """
    result = forward(params, config, ids_BS, document_BS)
    B, S = ids_BS.shape
    ce_sums, num_targets, means = [], [], []
    for depth, logits_BSV in enumerate([result["logits_BSV"], *result["mtp_logits"]]):
        label_BS, valid_BS = mtp_targets_oracle(
            labels_BS, loss_mask_BS, depth=depth, document_BS=document_BS
        )
        count = int(valid_BS.sum())
        ce_sum = cross_entropy_oracle(
            logits_BSV.reshape(B * S, -1), label_BS.reshape(-1), valid_BS.reshape(-1)
        )
        ce_sums.append(ce_sum)
        num_targets.append(count)
        means.append(ce_sum / count if count else ce_sum * 0)
    total = means[0]
    if config.mtp:
        total = total + config.mtp.loss_scale / config.mtp.num_depths * sum(means[1:])
    aux_sum = sum(result["aux"].values(), start=total.new_zeros(()))
    total = total + aux_sum / B
    return result | {
        "total": total,
        "ce_sums": ce_sums,
        "num_targets": num_targets,
        "aux_sum": aux_sum,
    }


def loss(
    params: Params,
    config: ModelConfig,
    ids_BS: Tensor,
    labels_BS: Tensor,
    loss_mask_BS: Tensor,
    document_BS: Tensor | None = None,
) -> Tensor:
    """The training loss of one batch, a scalar; its formula stands at `loss_terms`."""
    return loss_terms(params, config, ids_BS, labels_BS, loss_mask_BS, document_BS)["total"]


def mamba_oracle(
    x_BSD: Tensor,
    params: Params,
    config: MambaConfig,
    *,
    norm_eps: float,
    document_BS: Tensor | None = None,
) -> Tensor:
    """Mamba-2 mixer: in_proj -> conv and silu on x, B, C -> SSD -> gated norm -> out_proj.

    The rows of in_proj are z | x | B | C | dt. Source: arXiv:2405.21060, section 7.

    Args:
        params: the mixer's tensors, named relative to the mixer.
    """
    B, S, _ = x_BSD.shape
    heads, head_dim = config.num_heads, config.head_dim
    groups, states = config.num_groups, config.state_size
    inner = heads * head_dim
    projected = x_BSD @ params["in_proj.weight"].T
    z_BSI, xBC_BSC, dt_BSH = projected.split([inner, inner + 2 * groups * states, heads], dim=-1)
    xBC_BSC = conv_oracle(
        xBC_BSC, params["conv_weight"], params["conv_bias"], document_BS=document_BS, silu=True
    )
    x_BSI, B_flat, C_flat = xBC_BSC.split([inner, groups * states, groups * states], dim=-1)
    dt_BSH = softplus(dt_BSH + params["dt_bias"])
    if config.dt_min > 0:
        dt_BSH = dt_BSH.clamp(min=config.dt_min)
    y_BSHP = ssd_oracle(
        x_BSI.reshape(B, S, heads, head_dim),
        dt_BSH,
        -torch.exp(params["A_log"]),
        B_flat.reshape(B, S, groups, states),
        C_flat.reshape(B, S, groups, states),
        params["D"],
        document_BS=document_BS,
    )
    y_BSI = gated_group_rmsnorm_oracle(
        y_BSHP.reshape(B, S, inner), z_BSI, params["norm.weight"], eps=norm_eps, num_groups=groups
    )
    return y_BSI @ params["out_proj.weight"].T


def attention_mixer_oracle(
    x_BSD: Tensor, params: Params, config: AttentionConfig, *, document_BS: Tensor | None = None
) -> Tensor:
    """Attention mixer; q_proj, k_proj and v_proj make the heads of their kind."""
    B, S, _ = x_BSD.shape
    heads, groups, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    q, k, v = (x_BSD @ params[f"{kind}_proj.weight"].T for kind in "qkv")
    y_BSHP = attention_oracle(
        q.reshape(B, S, heads, head_dim),
        k.reshape(B, S, groups, head_dim),
        v.reshape(B, S, groups, head_dim),
        document_BS=document_BS,
    )
    return y_BSHP.reshape(B, S, heads * head_dim) @ params["out_proj.weight"].T


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), exact above 20 too, where torch's own turns linear."""
    return torch.logaddexp(x, torch.zeros_like(x))


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, and of the routers' bias buffers."""
    D, V = config.hidden_size, config.vocab_size
    shapes = {"embedding.weight": (V, D), "final_norm.weight": (D,), "lm_head.weight": (V, D)}
    for i, kind in enumerate(config.layers):
        shapes |= _block_shapes(f"blocks.{i}.", kind, config)
    for j in range(config.num_mtp_blocks):
        at = f"mtp.blocks.{j}."
        shapes[at + "embedding_norm.weight"] = (D,)
        shapes[at + "hidden_norm.weight"] = (D,)
        shapes[at + "eh_proj.weight"] = (D, 2 * D)
        shapes[at + "final_norm.weight"] = (D,)
        for i, kind in enumerate(config.mtp_layers):
            shapes |= _block_shapes(f"{at}layers.{i}.", kind, config)
    return shapes


def random_params(
    config: ModelConfig, *, seed: int, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Random values for every tensor of `param_shapes`, none at a special point.

    Nothing is zero, one or equal to its neighbour, so that a forgotten bias, norm weight or D
    shows; sizes are such that every part of the model matters to the logits.
    """
    generator = torch.Generator().manual_seed(seed)
    params = {}
    for name, shape in param_shapes(config).items():
        draw = torch.randn(shape, generator=generator, dtype=torch.float64)
        last = name.rsplit(".", 1)[-1]
        if name.endswith("norm.weight") or last == "D":
            value = 1 + 0.3 * draw
        elif last == "A_log":
            value = 0.5 * draw
        elif last == "dt_bias":
            value = draw - 1
        elif last in ("conv_bias", "expert_bias"):
            value = 0.2 * draw
        elif last == "conv_weight":
            value = 0.5 * draw
        elif name == "embedding.weight":
            value = draw
        else:
            value = draw / shape[-1] ** 0.5
        params[name] = value.to(dtype)
    return params


def _block(
    x_BSD: Tensor,
    params: Params,
    prefix: str,
    kind: LayerKind,
    config: ModelConfig,
    document_BS: Tensor | None,
    aux_factor: float,
    result: dict,
) -> Tensor:
    """x + mixer(rmsnorm(x)); a router's counts and loss are added to `result`."""
    u_BSD = rmsnorm_oracle(x_BSD, params[prefix + "norm.weight"], eps=config.norm_eps)
    mixer = _under(params, prefix + "mixer.")
    if kind is LayerKind.MAMBA:
        y_BSD = mamba_oracle(
            u_BSD, mixer, config.mamba, norm_eps=config.norm_eps, document_BS=document_BS
        )
    elif kind is LayerKind.ATTENTION:
        y_BSD = attention_mixer_oracle(u_BSD, mixer, config.attention, document_BS=document_BS)
    elif kind is LayerKind.MLP:
        y_BSD = ffn_oracle(u_BSD, mixer["fc1.weight"], mixer["fc2.weight"])
    else:
        coeff = config.moe.aux_loss_coeff * aux_factor
        y_BSD, count_E, aux = moe_oracle(u_BSD, mixer, config.moe, aux_loss_coeff=coeff)
        name = prefix + "mixer.router"
        result["counts"][name] = result["counts"].get(name, 0) + count_E
        result["aux"][name] = result["aux"].get(name, 0) + aux
    return x_BSD + y_BSD


def _mtp_block(
    h_BSD: Tensor,
    params: Params,
    config: ModelConfig,
    ids_BS: Tensor,
    document_BS: Tensor | None,
    depth: int,
    result: dict,
) -> Tensor:
    """h_k of depth k from h_{k-1}.

        u_i = eh_proj [rmsnorm(embedding of token i + k), rmsnorm(h_{k-1, i})]
        h_k = rmsnorm(layers(u))

    A token beyond the row or in another document has the embedding zero.

    Source: arXiv:2412.19437 section 2.2; NVIDIA/Megatron-LM
    megatron/core/transformer/multi_token_prediction.py @ d98e8a64 (order of the halves, norms).
    """
    at = f"mtp.blocks.{0 if config.mtp.shared else depth - 1}."
    eps = config.norm_eps
    B, S = ids_BS.shape
    embedding = params["embedding.weight"]
    zero_D = torch.zeros_like(embedding[0])
    ahead_BSD = []
    for b in range(B):
        row_SD = []
        for i in range(S):
            there = i + depth < S
            if there and document_BS is not None:
                there = bool(document_BS[b, i + depth] == document_BS[b, i])
            row_SD.append(embedding[ids_BS[b, i + depth]] if there else zero_D)
        ahead_BSD.append(torch.stack(row_SD))
    e_BSD = rmsnorm_oracle(torch.stack(ahead_BSD), params[at + "embedding_norm.weight"], eps=eps)
    n_BSD = rmsnorm_oracle(h_BSD, params[at + "hidden_norm.weight"], eps=eps)
    x_BSD = torch.cat([e_BSD, n_BSD], dim=-1) @ params[at + "eh_proj.weight"].T
    factor = 1 / config.mtp.num_depths if config.mtp.shared else 1.0
    for i, kind in enumerate(config.mtp_layers):
        x_BSD = _block(x_BSD, params, f"{at}layers.{i}.", kind, config, document_BS, factor, result)
    return rmsnorm_oracle(x_BSD, params[at + "final_norm.weight"], eps=eps)


def _block_shapes(prefix: str, kind: LayerKind, config: ModelConfig) -> dict:
    D = config.hidden_size
    shapes = {"norm.weight": (D,)}
    if kind is LayerKind.MAMBA:
        m = config.mamba
        inner = m.num_heads * m.head_dim
        channels = inner + 2 * m.num_groups * m.state_size
        shapes |= {
            "mixer.in_proj.weight": (inner + channels + m.num_heads, D),
            "mixer.conv_weight": (channels, m.conv_kernel),
            "mixer.conv_bias": (channels,),
            "mixer.A_log": (m.num_heads,),
            "mixer.D": (m.num_heads,),
            "mixer.dt_bias": (m.num_heads,),
            "mixer.norm.weight": (inner,),
            "mixer.out_proj.weight": (D, inner),
        }
    elif kind is LayerKind.ATTENTION:
        a = config.attention
        shapes |= {
            "mixer.q_proj.weight": (a.num_heads * a.head_dim, D),
            "mixer.k_proj.weight": (a.num_kv_heads * a.head_dim, D),
            "mixer.v_proj.weight": (a.num_kv_heads * a.head_dim, D),
            "mixer.out_proj.weight": (D, a.num_heads * a.head_dim),
        }
    elif kind is LayerKind.MLP:
        shapes |= {
            "mixer.fc1.weight": (config.ffn_size, D),
            "mixer.fc2.weight": (D, config.ffn_size),
        }
    else:
        e = config.moe
        width = D if e.latent_size is None else e.latent_size
        shapes |= {
            "mixer.router.weight": (e.num_experts, D),
            "mixer.router.expert_bias": (e.num_experts,),
            "mixer.experts.fc1": (e.num_experts, e.ffn_size, width),
            "mixer.experts.fc2": (e.num_experts, width, e.ffn_size),
            "mixer.shared_expert.fc1.weight": (e.shared_ffn_size, D),
            "mixer.shared_expert.fc2.weight": (D, e.shared_ffn_size),
        }
        if e.latent_size is not None:
            shapes |= {
                "mixer.latent_down.weight": (e.latent_size, D),
                "mixer.latent_up.weight": (D, e.latent_size),
            }
    return {prefix + name: shape for name, shape in shapes.items()}


def _under(params: Params, prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in params.items() if name.startswith(prefix)}
