"""What a parallel layout asks of every pipeline stage, from the config alone: no module is built.

Numbers are those of one rank; the ranks of a stage are alike.
"""

from typing import Any

from nemomodel.config.layout import fewest_ranks
from nemomodel.config.pattern import LayerKind
from nemomodel.config.schema import Config
from nemomodel.model.count import block_flops
from nemomodel.model.portion import FP32, INT64, Portion
from nemomodel.model.traffic import step_traffic
from nemomodel.parallel.stage import Stage


def describe_layout(config: Config, ranks: int) -> dict[str, Any]:
    """The layout as data for JSON.

    Args:
        ranks: of the whole run; `config.checks.rank_problems` finds nothing wrong with it.
    """
    portion, p = Portion(config, ranks), config.parallel
    rows = [_pipeline_rank(portion, rank) for rank in range(p.pp)]
    m = portion.micro_batches
    return {
        "ranks": ranks,
        "fewest_ranks": fewest_ranks(config),
        "degrees": {"tp": p.tp, "cp": p.cp, "pp": p.pp, "dp": portion.dp}
        | {axis: portion.degree(axis) for axis in ("ep", "etp", "expert_dp")},
        "micro_batches": m,
        "tokens_per_micro_batch": portion.tokens,
        # Of the time of a step, on stages that take equally long.
        "bubble_share": (p.pp - 1) / (m * p.vpp + p.pp - 1),
        "largest": {
            "parameters": max(row["parameters"]["total"] for row in rows),
            "memory_bytes": max(row["memory_bytes"]["total"] for row in rows),
            "flops_share": max(row["flops_share"] for row in rows),
            "communication_bytes": max(_total(row["communication_bytes"]) for row in rows),
        },
        "pipeline_ranks": rows,
    }


def activation_bytes(portion: Portion, stage: Stage) -> int:
    """What operators of one micro-batch keep for their backward pass: an estimate.

    Per block the input of its norm, and unless it is recomputed

        Mamba        T (D + in_proj + conv + 2 I + 2 H) + B I N
        attention    T (D + 2 q + k + v)
        MLP          T (D + 2 F)
        MoE          T (D + 2 F_shared) + T/tp (D + L + E + 4 K) + R (L + 2 F + 1)

    elements per rank, widths of this rank's part, with T the tokens of its cp rank and R its token
    copies; 2 H, B I N, E, 4 K and the 1 are FP32. docs/parallelism.md has it in words. Not in it:
    what an operator needs while it works, such as the logits of 2,048 tokens, and operands in few
    bits.
    """
    recomputed = {LayerKind[name.upper()] for name in portion.config.train.recompute}
    D, width, t, T = _sizes(portion)
    kept = 0
    for kind in portion.passes(stage):
        kept += t * D * width
        if kind not in recomputed:
            kept += _mixer_bytes(portion, kind)
    if portion.heads > 1 and not stage.first:
        kept += t * D * width  # the embeddings; on the first stage they are the input of block 0
    if not stage.last:
        return kept + (2 if portion.heads > 1 else 1) * t * D * width  # what is sent
    vocab = portion.config.model.vocab_size // portion.config.parallel.tp
    # Inputs of the final norm; of every depth those of three norms and of eh_proj. The head has
    # made its gradients already.
    kept += (1 + 5 * (portion.heads - 1)) * t * D * width
    return kept + portion.heads * T * D * width + vocab * D * FP32


def _sizes(portion: Portion) -> tuple[int, int, int, int]:
    return portion.config.model.hidden_size, portion.width, portion.tokens, portion.gathered


def _mixer_bytes(portion: Portion, kind: LayerKind) -> int:
    model, p = portion.config.model, portion.config.parallel
    D, width, t, T = _sizes(portion)
    if kind is LayerKind.MLP:
        assert model.ffn_size is not None
        return T * (D + 2 * model.ffn_size // p.tp) * width
    if kind is LayerKind.ATTENTION:
        assert model.attention is not None
        q, kv = portion.attention_widths()
        local = 0 if portion.kv_cut else t * D
        if not portion.kv_cut and p.cp == 1:  # views of the keys and values of all heads
            kv = 2 * model.attention.num_kv_heads * model.attention.head_dim
        return (T * (D + (2 * q + kv) * p.cp) + local) * width
    if kind is LayerKind.MAMBA:
        assert model.mamba is not None
        inner, state, heads = (n * p.cp for n in portion.mamba_widths())
        scan = portion.config.train.micro_batch_size * inner // p.cp * model.mamba.state_size
        groups = model.mamba.num_groups * model.mamba.state_size // p.tp
        in_proj = 2 * inner + 2 * groups + heads
        # The convolution keeps its input: a part of in_proj's output, or what cp ranks sent.
        received = inner + state + heads if p.cp > 1 else 0
        kept = (D + in_proj + received + 3 * inner + state) * width + 2 * heads * FP32
        return T * kept + scan * FP32
    return _moe_bytes(portion)


def _moe_bytes(portion: Portion) -> int:
    model, p = portion.config.model, portion.config.parallel
    moe = model.moe
    assert moe is not None
    D, width, t, T = _sizes(portion)
    L, K = moe.latent_size or D, moe.top_k
    R = t * K * p.etp
    own = t * D * width if p.tp > 1 else 0  # the shared expert keeps what is gathered
    latent = t * L * width if moe.latent_size else 0
    router = t * (moe.num_experts * FP32 + K * (INT64 + 2 * FP32))
    shared = T * (D + 2 * moe.shared_ffn_size // p.tp) * width
    experts = R * ((L + 2 * moe.ffn_size // p.etp) * width + FP32)
    return own + latent + router + shared + experts


def _pipeline_rank(portion: Portion, rank: int) -> dict[str, Any]:
    config, stages = portion.config, portion.stages[rank]
    parameters = [held for stage in stages for held in portion.parameters(stage)]
    dense = sum(p.elements for p in parameters if not p.expert)
    experts = sum(p.elements for p in parameters if p.expert)
    costs, after = block_flops(config)
    flops = sum(costs[i] for stage in stages for i in stage.blocks)
    flops += after * any(stage.last for stage in stages)
    in_flight = passes_in_flight(portion, rank)
    memory = {
        "weights": sum(p.elements * p.bytes_each for p in parameters),
        "gradients": FP32 * (dense + experts),
        **_optimizer_bytes(portion, dense, experts),
        "activations": sum(
            number * activation_bytes(portion, stage)
            for number, stage in zip(in_flight, stages, strict=True)
        ),
        "recomputed_block": max(_recomputed_bytes(portion, stage) for stage in stages),
    }
    return {
        "stages": [
            {
                "first_block": stage.blocks.start,
                "layer_pattern": config.model.letters[stage.blocks.start : stage.blocks.stop],
                "micro_batches_in_flight": number,
            }
            for number, stage in zip(in_flight, stages, strict=True)
        ],
        "flops_share": flops / (sum(costs) + after),
        "parameters": {"dense": dense, "experts": experts, "total": dense + experts},
        "memory_bytes": memory | {"total": sum(memory.values())},
        "communication_bytes": {
            axis: {purpose: round(size) for purpose, size in sizes.items()}
            for axis, sizes in step_traffic(portion, stages).items()
        },
    }


def passes_in_flight(portion: Portion, rank: int) -> list[int]:
    """Micro-batches of each stage of a pipeline rank that wait for their backward pass, at most.

    1F1B: as many as stages follow, and one more. Interleaved, the passes of a rank go to its
    stages in turns of pp, and twice as many start before the first comes back.
    Source: core/pipeline_parallel/schedules.py of megatron-core 0.19.2.
    """
    p, m = portion.config.parallel, portion.micro_batches
    behind = p.pp - rank - 1
    if p.vpp == 1:
        return [min(m, behind + 1)]
    started = min(m * p.vpp, 2 * behind + (p.vpp - 1) * p.pp + 1)
    stages = [i // p.pp % p.vpp for i in range(started)]
    return [stages.count(stage) for stage in range(p.vpp)]


def _optimizer_bytes(portion: Portion, dense: int, experts: int) -> dict[str, int]:
    """FP32 main weights (none where the weights are FP32) and two moments, cut over the ranks
    that hold the same weights."""
    own = -(-dense // portion.degree("dp")) + -(-experts // portion.degree("expert_dp"))
    return {"main_weights": FP32 * own * (portion.width < FP32), "moments": 2 * FP32 * own}


def _recomputed_bytes(portion: Portion, stage: Stage) -> int:
    """One block at a time keeps everything again."""
    kinds = {LayerKind[name.upper()] for name in portion.config.train.recompute}
    here = kinds & set(portion.passes(stage))
    return max((_mixer_bytes(portion, kind) for kind in here), default=0)


def _total(traffic: dict[str, dict[str, int]]) -> int:
    return sum(sum(sizes.values()) for sizes in traffic.values())
