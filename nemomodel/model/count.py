"""Parameters, FLOPs and memory of a model, from its config alone: no module is built.

A FLOP count is per token, forward, and counts a multiply-add as two. Elementwise work (norms,
activations, gates, the state passed between chunks) is left out: it costs bytes, not FLOPs.
"""

import math
from collections import Counter
from typing import Any

from nemomodel.config.pattern import LayerKind
from nemomodel.config.schema import Config, ModelConfig

Shapes = dict[str, tuple[int, ...]]

TRAINING_OVER_FORWARD = 3
"""The backward pass does every matrix product twice: for the input and for the weight."""


def describe(config: Config) -> dict[str, Any]:
    """Everything that can be counted before a run, as data for JSON."""
    model, seq_length = config.model, config.train.seq_length
    backbone = _size(_backbone_shapes(model))
    mtp = model.num_mtp_blocks * _size(_mtp_block_shapes(model))
    active = backbone - sum(_idle_parameters(model, kind) for kind in model.layers)
    embedding = model.vocab_size * model.hidden_size
    return {
        "layer_pattern": model.letters,
        "parameters_by_kind": _parameters_by_kind(model),
        "parameters_backbone": backbone,
        "parameters_mtp": mtp,
        "parameters_total": backbone + mtp,
        # Of the backbone, per token: all of it except the experts the router did not choose.
        "parameters_active": active,
        "parameters_active_without_input_embedding": active - embedding,
        "parameters_active_without_both_embeddings": active - 2 * embedding,
        "router_biases": router_biases(model),
        "flops_per_token": _flops_per_token(model, seq_length),
        "memory_bytes": _memory_bytes(config, backbone + mtp),
        "layers": _layer_rows(model, seq_length),
        "mtp": _mtp_row(model, seq_length),
    }


def parameter_shapes(model: ModelConfig) -> Shapes:
    """Name and shape of every parameter of the built model on one rank.

    The router's `expert_bias` is a buffer and is not in here; see `router_biases`.
    """
    shapes = _backbone_shapes(model)
    for block in range(model.num_mtp_blocks):
        shapes |= _prefixed(f"mtp.blocks.{block}", _mtp_block_shapes(model))
    return shapes


def layer_shapes(model: ModelConfig, kind: LayerKind) -> Shapes:
    """The parameters of one block: its norm and its mixer."""
    mixer = {
        LayerKind.MAMBA: _mamba_shapes,
        LayerKind.ATTENTION: _attention_shapes,
        LayerKind.MOE: _moe_shapes,
        LayerKind.MLP: _mlp_shapes,
    }[kind](model)
    return {"norm.weight": (model.hidden_size,), **_prefixed("mixer", mixer)}


def router_biases(model: ModelConfig) -> dict[str, int]:
    """Selection biases of the routers: FP32 buffers, moved by load and not by gradients."""
    experts = model.moe.num_experts if model.moe else 0
    return {
        "backbone": model.layers.count(LayerKind.MOE) * experts,
        "mtp": model.num_mtp_blocks * model.mtp_layers.count(LayerKind.MOE) * experts,
    }


def layer_flops(model: ModelConfig, kind: LayerKind, seq_length: int) -> Counter[str]:
    """FLOPs of one block for one token, by kind of work."""
    if kind is LayerKind.MAMBA:
        return _mamba_flops(model)
    if kind is LayerKind.ATTENTION:
        return _attention_flops(model, seq_length)
    if kind is LayerKind.MOE:
        return _moe_flops(model)
    return _mlp_flops(model)


def block_flops(config: Config) -> tuple[list[int], int]:
    """FLOPs for one token of every block, and of what follows the last: head and MTP."""
    model, seq_length = config.model, config.train.seq_length
    blocks = [layer_flops(model, kind, seq_length).total() for kind in model.layers]
    depths = model.mtp.num_depths if model.mtp else 0
    return blocks, _head_flops(model) + depths * _mtp_flops(model, seq_length).total()


def _backbone_shapes(model: ModelConfig) -> Shapes:
    shapes: Shapes = {"embedding.weight": (model.vocab_size, model.hidden_size)}
    for index, kind in enumerate(model.layers):
        shapes |= _prefixed(f"blocks.{index}", layer_shapes(model, kind))
    shapes["final_norm.weight"] = (model.hidden_size,)
    shapes["lm_head.weight"] = (model.vocab_size, model.hidden_size)
    return shapes


def _mtp_block_shapes(model: ModelConfig) -> Shapes:
    """One MTP block: two norms, the projection of [embedding, hidden] to D, layers, final norm."""
    D = model.hidden_size
    shapes: Shapes = {
        "embedding_norm.weight": (D,),
        "hidden_norm.weight": (D,),
        "eh_proj.weight": (D, 2 * D),
    }
    for index, kind in enumerate(model.mtp_layers):
        shapes |= _prefixed(f"layers.{index}", layer_shapes(model, kind))
    shapes["final_norm.weight"] = (D,)
    return shapes


def _mamba_shapes(model: ModelConfig) -> Shapes:
    """in_proj rows are z, x, B, C, dt; the convolution runs over x, B, C."""
    assert model.mamba is not None
    D, H, P = model.hidden_size, model.mamba.num_heads, model.mamba.head_dim
    inner = H * P
    groups_state = model.mamba.num_groups * model.mamba.state_size
    conv = inner + 2 * groups_state
    return {
        "in_proj.weight": (2 * inner + 2 * groups_state + H, D),
        "conv_weight": (conv, model.mamba.conv_kernel),
        "conv_bias": (conv,),
        "A_log": (H,),
        "D": (H,),
        "dt_bias": (H,),
        "norm.weight": (inner,),
        "out_proj.weight": (D, inner),
    }


def _attention_shapes(model: ModelConfig) -> Shapes:
    assert model.attention is not None
    D, P = model.hidden_size, model.attention.head_dim
    queries, keys = model.attention.num_heads, model.attention.num_kv_heads
    return {
        "q_proj.weight": (queries * P, D),
        "k_proj.weight": (keys * P, D),
        "v_proj.weight": (keys * P, D),
        "out_proj.weight": (D, queries * P),
    }


def _moe_shapes(model: ModelConfig) -> Shapes:
    """Experts are stacked; their outer width is the latent one where there is one."""
    assert model.moe is not None
    D, E, F = model.hidden_size, model.moe.num_experts, model.moe.ffn_size
    shared, L = model.moe.shared_ffn_size, model.moe.latent_size
    shapes: Shapes = {"router.weight": (E, D)}
    if L is not None:
        shapes |= {"latent_down.weight": (L, D), "latent_up.weight": (D, L)}
    return shapes | {
        "experts.fc1": (E, F, L or D),
        "experts.fc2": (E, L or D, F),
        "shared_expert.fc1.weight": (shared, D),
        "shared_expert.fc2.weight": (D, shared),
    }


def _mlp_shapes(model: ModelConfig) -> Shapes:
    assert model.ffn_size is not None
    D, F = model.hidden_size, model.ffn_size
    return {"fc1.weight": (F, D), "fc2.weight": (D, F)}


def _idle_parameters(model: ModelConfig, kind: LayerKind) -> int:
    """Parameters of one block that a token does not use: its E - K other experts."""
    if kind is not LayerKind.MOE:
        return 0
    assert model.moe is not None
    shapes = _moe_shapes(model)
    one_expert = (_elements(shapes["experts.fc1"]) + _elements(shapes["experts.fc2"])) // (
        model.moe.num_experts
    )
    return (model.moe.num_experts - model.moe.top_k) * one_expert


def _mamba_flops(model: ModelConfig) -> Counter[str]:
    """Projections, depthwise convolution, and the scan in its chunked matrix form.

        conv       2 W (I + 2 G N)
        ssd core   2 Q G N      C B^T within a chunk, once per group
                 + 2 Q I        its product with x, per head
                 + 2 N I        the state a chunk leaves, B^T x
                 + 2 N I        the output of the state before the chunk, C h

    The Q x Q products are counted whole, as kernels and plain matrix products do them; the
    causal half of them would be Q / 2 in place of Q. (arXiv:2405.21060 section 6.)
    """
    assert model.mamba is not None
    shapes = _mamba_shapes(model)
    inner = model.mamba.num_heads * model.mamba.head_dim
    Q, N, G = model.mamba.chunk_size, model.mamba.state_size, model.mamba.num_groups
    return Counter(
        mamba_projections=2 * (_elements(shapes["in_proj.weight"]) + inner * model.hidden_size),
        conv=2 * _elements(shapes["conv_weight"]),
        ssd_core=2 * Q * (G * N + inner) + 4 * N * inner,
    )


def _attention_flops(model: ModelConfig, seq_length: int) -> Counter[str]:
    """Projections and core; a causal query sees S / 2 keys on average.

    core   2 * 2 * (S / 2) * heads * head_dim      for Q K^T and for its product with V
    """
    assert model.attention is not None
    width = model.attention.num_heads * model.attention.head_dim
    return Counter(
        attention_projections=2 * _size(_attention_shapes(model)),
        attention_core=2 * seq_length * width,
    )


def _moe_flops(model: ModelConfig) -> Counter[str]:
    """Twice the weights a token meets; of the routed experts it meets K of E."""
    assert model.moe is not None
    shapes = {name: _elements(shape) for name, shape in _moe_shapes(model).items()}
    experts = shapes["experts.fc1"] + shapes["experts.fc2"]
    latent = shapes.get("latent_down.weight", 0) + shapes.get("latent_up.weight", 0)
    shared = shapes["shared_expert.fc1.weight"] + shapes["shared_expert.fc2.weight"]
    return Counter(
        router=2 * shapes["router.weight"],
        latent_projections=2 * latent,
        routed_experts=2 * experts // model.moe.num_experts * model.moe.top_k,
        shared_expert=2 * shared,
    )


def _mlp_flops(model: ModelConfig) -> Counter[str]:
    return Counter(mlp=2 * _size(_mlp_shapes(model)))


def _head_flops(model: ModelConfig) -> int:
    return 2 * model.vocab_size * model.hidden_size


def _mtp_flops(model: ModelConfig, seq_length: int) -> Counter[str]:
    """One depth: the projection of [embedding, hidden], the layers, and the head once more."""
    if model.mtp is None:
        return Counter()
    flops = Counter(eh_proj=2 * 2 * model.hidden_size**2, head=_head_flops(model))
    for kind in model.mtp_layers:
        flops += layer_flops(model, kind, seq_length)
    return flops


def _flops_per_token(model: ModelConfig, seq_length: int) -> dict[str, Any]:
    forward: Counter[str] = Counter(head=_head_flops(model))
    for kind in model.layers:
        forward += layer_flops(model, kind, seq_length)
    depths = model.mtp.num_depths if model.mtp else 0
    per_depth = _mtp_flops(model, seq_length)
    forward["mtp"] = depths * per_depth.total()
    return {
        "seq_length": seq_length,
        "forward": forward.total(),
        "training": TRAINING_OVER_FORWARD * forward.total(),
        "forward_by_kind": dict(forward),
        "training_by_kind": {k: TRAINING_OVER_FORWARD * n for k, n in forward.items()},
        # What the one entry "mtp" above consists of, over all depths.
        "forward_mtp_by_kind": {k: depths * n for k, n in per_depth.items()},
    }


def _memory_bytes(config: Config, parameters: int) -> dict[str, int]:
    """Weights, gradients and optimizer over all ranks together, activations excluded.

    BF16: 2 (weight) + 4 (FP32 main weight) + 4 (FP32 gradient) + 8 (two FP32 moments) = 18 bytes
    per parameter. FP32: the weight is its own main weight, 16 bytes.
    """
    low_precision = config.precision.weights == "bf16"
    memory = {
        "weights": (2 if low_precision else 4) * parameters,
        "main_weights": (4 if low_precision else 0) * parameters,
        "gradients": 4 * parameters,
        "moments": 8 * parameters,
        "router_biases": 4 * sum(router_biases(config.model).values()),
    }
    return memory | {"total": sum(memory.values())}


def _parameters_by_kind(model: ModelConfig) -> list[dict[str, Any]]:
    """Rows of name, layers, parameters per layer, total; they add up to `parameters_total`."""

    def row(name: str, layers: int, shapes: Shapes) -> dict[str, Any]:
        each = _size(shapes)
        return {"name": name, "layers": layers, "per_layer": each, "total": layers * each}

    table: Shapes = {"weight": (model.vocab_size, model.hidden_size)}
    rows = [row("embedding", 1, table)]
    rows += [
        row(kind.name.lower(), model.layers.count(kind), layer_shapes(model, kind))
        for kind in LayerKind
        if kind in model.layers
    ]
    rows += [row("final_norm", 1, {"weight": (model.hidden_size,)}), row("head", 1, table)]
    if model.mtp:
        rows.append(row("mtp", model.num_mtp_blocks, _mtp_block_shapes(model)))
    return rows


def _layer_rows(model: ModelConfig, seq_length: int) -> list[dict[str, Any]]:
    """The blocks of the backbone in order."""
    return [
        {"index": index, **_layer_row(model, kind, seq_length)}
        for index, kind in enumerate(model.layers)
    ]


def _layer_row(model: ModelConfig, kind: LayerKind, seq_length: int) -> dict[str, Any]:
    parameters = _size(layer_shapes(model, kind))
    return {
        "kind": kind.name.lower(),
        "parameters": parameters,
        "parameters_active": parameters - _idle_parameters(model, kind),
        "flops_per_token": layer_flops(model, kind, seq_length).total(),
    }


def _mtp_row(model: ModelConfig, seq_length: int) -> dict[str, Any] | None:
    """One MTP block; `flops_per_token` is one depth with its pass through the head."""
    if model.mtp is None:
        return None
    parameters = _size(_mtp_block_shapes(model))
    idle = sum(_idle_parameters(model, kind) for kind in model.mtp_layers)
    return {
        "blocks": model.num_mtp_blocks,
        "depths": model.mtp.num_depths,
        "parameters": parameters,
        "parameters_active": parameters - idle,
        "flops_per_token": _mtp_flops(model, seq_length).total(),
        "layers": [_layer_row(model, kind, seq_length) for kind in model.mtp_layers],
    }


def _elements(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def _size(shapes: Shapes) -> int:
    return sum(_elements(shape) for shape in shapes.values())


def _prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}
