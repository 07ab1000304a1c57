"""AdamW sharded over ranks, and its schedule, from a `Config`."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from nemomodel.config.schema import Config
from nemomodel.parallel import cpu
from nemomodel.parallel.mcore import Ranks
from nemomodel.parallel.shard import is_expert

cpu.install()  # before the first import of megatron

from megatron.core.distributed import DistributedDataParallel  # noqa: E402
from megatron.core.optimizer import OptimizerConfig  # noqa: E402
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402
from megatron.core.optimizer.optimizer import ChainedOptimizer  # noqa: E402
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # noqa: E402


def param_groups(
    models: Sequence[nn.Module], config: Config, *, experts: bool
) -> list[dict[str, Any]]:
    """Matrices, embeddings and convolutions decay; vectors (norms, biases, A_log, D) do not.

    A group holds one dtype: in a mixed one megatron-core 0.19.2 sorts the FP32 parameters first
    and then looks up the state of the others in the old order, silently where sizes agree.

    Args:
        experts: the parameters of experts, or all others.
    """
    groups: dict[tuple[float, torch.dtype], list[nn.Parameter]] = {}
    for param in (param for model in models for param in model.parameters()):
        if param.requires_grad and is_expert(param) == experts:
            wd_mult = 1.0 if param.ndim > 1 else 0.0
            groups.setdefault((wd_mult, param.dtype), []).append(param)
    return [
        {
            "params": params,
            "wd_mult": wd_mult,
            "weight_decay": config.optim.weight_decay * wd_mult,
            "is_expert_parallel": experts,
        }
        for (wd_mult, _), params in groups.items()
    ]


def build_optimizer(
    chunks: Sequence[DistributedDataParallel], config: Config, ranks: Ranks
) -> ChainedOptimizer:
    """AdamW with FP32 weights and moments, sharded over the ranks that hold the same weights.

    Those are fewer for experts, which so have an optimizer of their own.
    """
    optimizers = [_optimizer(chunks, config, ranks, experts=False)]
    if any(chunk.expert_parallel_buffers for chunk in chunks):
        optimizers.append(_optimizer(chunks, config, ranks, experts=True))
    for optimizer in optimizers[:-1]:
        # Else megatron-core 0.19.2 gathers all weights after each; the last one does it for all.
        optimizer._defer_param_sync = True
    return ChainedOptimizer(optimizers)


def _optimizer(
    chunks: Sequence[DistributedDataParallel], config: Config, ranks: Ranks, *, experts: bool
) -> DistributedOptimizer:
    optim, bf16, groups = config.optim, config.precision.weights == "bf16", ranks.groups
    inner = torch.optim.AdamW(
        param_groups([chunk.module for chunk in chunks], config, experts=experts),
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )
    optimizer = DistributedOptimizer(
        inner,
        OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=optim.min_lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_eps=optim.eps,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=True,
            overlap_param_gather=config.parallel.overlap_param_gather,
            # An infinite limit clips nothing and still measures the norm.
            clip_grad=math.inf if optim.grad_clip is None else optim.grad_clip,
        ),
        None,
        None,
        model_chunks=list(chunks),
        per_model_buffers={
            i: chunk.expert_parallel_buffers if experts else chunk.buffers
            for i, chunk in enumerate(chunks)
        },
        data_parallel_group=groups.intra_expt_dp if experts else groups.intra_dp_cp,
        data_parallel_group_gloo=None,
        data_parallel_group_idx=(groups.tp_ep_pp if experts else groups.mp).rank(),
        distributed_optimizer_instance_id=0,
    )
    optimizer.grad_stats_parallel_group = groups.intra_dist_opt
    optimizer.tp_group = groups.tp
    optimizer.expert_tp_group = groups.expt_tp
    # torch creates this lazily in the first step; a checkpoint needs it before, and its shape
    # is what a loaded state is copied into.
    for group in inner.param_groups:
        for shard in group["params"]:
            inner.state[shard] = {
                "step": torch.zeros((), dtype=torch.float32, device=shard.device),
                "exp_avg": torch.zeros_like(shard),
                "exp_avg_sq": torch.zeros_like(shard),
            }
    return optimizer


def step_optimizer(optimizer: ChainedOptimizer) -> float:
    """Clip the reduced gradients, update the weights, return the norm before clipping.

    Where the norm is not finite, nothing has been updated: the caller decides what to do.
    """
    optimizer.prepare_grads()
    grad_norm = float(optimizer.get_grad_norm())
    if math.isfinite(grad_norm):
        for part in optimizer.chained_optimizers:
            clip_grad_by_total_norm_fp32(part.get_parameters(), part.config.clip_grad, grad_norm)
        optimizer.step_with_ready_grads()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm


def build_scheduler(optimizer: ChainedOptimizer, config: Config) -> OptimizerParamScheduler:
    """Learning rate in units of optimizer steps; update n, counted from 1, uses its value at n.

    Linear warm-up, then `wsd` (stable, then decay by one minus the square root), `cosine` or
    `constant`. The caller steps it by 1 after every update.
    """
    optim, schedule, steps = config.optim, config.schedule, config.train.steps
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=schedule.warmup_steps,
        lr_decay_steps=steps,
        lr_decay_style={"wsd": "WSD", "cosine": "cosine", "constant": "constant"}[schedule.kind],
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=steps,
        wd_incr_style="constant",
        wsd_decay_steps=schedule.decay_steps,
        lr_wsd_decay_style="minus_sqrt",
    )
    scheduler.step(1)  # megatron-core counts from 0, and would spend the first update at 0
    return scheduler
