"""The bridge to megatron-core: process groups, data parallelism, optimizer, schedule.

The only module that turns a `Config` into megatron-core objects. One optimizer step is

    ranks = start_ranks(config)
    ddp = wrap_ddp(model, config, ranks)        # sums gradients over data-parallel ranks
    optimizer = build_optimizer(ddp, config, ranks)
    scheduler = build_scheduler(optimizer, config)

    ddp.zero_grad_buffer()
    with ddp.no_sync():                         # all micro-batches but the last
        loss(ddp(...)).backward()
    loss(ddp(...)).backward()                   # the last one
    ddp.finish_grad_sync()
    grad_norm = step_optimizer(optimizer)       # not finite: nothing was changed
    scheduler.step(1)

Losses are divided by the token counts of the whole global batch (`global_sum`), so gradients
are summed over ranks and micro-batches and never scaled.
"""

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemomodel.config.checks import rank_problems
from nemomodel.config.load import ConfigError
from nemomodel.config.schema import Config
from nemomodel.parallel import cpu

cpu.install()  # before the first import of megatron

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.optimizer import OptimizerConfig  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among all of them."""

    rank: int
    world_size: int
    local_rank: int
    dp_rank: int
    dp_size: int
    device: torch.device
    groups: ProcessGroupCollection


def start_ranks(config: Config) -> Ranks:
    """Join the process groups of `config.parallel`.

    Under torchrun its environment tells the rank; without it this is a one-process run. Groups
    that exist already (of a test) are taken as they are.

    Raises:
        ConfigError: the number of ranks or the device does not fit the config.
    """
    if dist.is_initialized():
        rank, world_size = dist.get_rank(), dist.get_world_size()
    else:
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if found := list(rank_problems(config, world_size)):
        raise ConfigError("\n  ".join(["launch:", *found]))
    device = _device(config, local_rank)
    if not dist.is_initialized():
        backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
        under_torchrun = "MASTER_ADDR" in os.environ and "RANK" in os.environ
        # An in-memory store needs no port, so one-process runs cannot collide.
        store = None if under_torchrun else dist.HashStore()
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    p = config.parallel
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=p.tp,
        pipeline_model_parallel_size=p.pp,
        context_parallel_size=p.cp,
        expert_model_parallel_size=p.ep,
        expert_tensor_parallel_size=p.etp,
        create_gloo_process_groups=False,
    )
    return Ranks(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        device=device,
        groups=ProcessGroupCollection.use_mpu_process_groups(),
    )


def stop_ranks() -> None:
    """Leave all process groups."""
    parallel_state.destroy_model_parallel()
    # megatron-core 0.19.2 forgets some; a forked process that starts groups of its own would
    # then destroy ours, and wait for ever for their threads.
    for name, value in list(vars(parallel_state).items()):
        if isinstance(value, dist.ProcessGroup):
            setattr(parallel_state, name, None)
    if dist.is_initialized():
        dist.destroy_process_group()


def global_sum(tensor: Tensor, ranks: Ranks) -> Tensor:
    """Sum `tensor` over the data-parallel ranks, in place; counts of tokens or expert loads."""
    dist.all_reduce(tensor, group=ranks.groups.dp)
    return tensor


def transformer_config(config: Config) -> TransformerConfig:
    """What the engine needs to know of the model; the layers themselves are ours.

    Only fields that process groups, data parallelism, pipeline and optimizer read.
    """
    p, bf16 = config.parallel, config.precision.weights == "bf16"
    attention = config.model.attention
    return TransformerConfig(
        num_layers=len(config.model.layers),
        hidden_size=config.model.hidden_size,
        num_attention_heads=attention.num_heads if attention else 1,
        tensor_model_parallel_size=p.tp,
        pipeline_model_parallel_size=p.pp,
        context_parallel_size=p.cp,
        expert_model_parallel_size=p.ep,
        expert_tensor_parallel_size=p.etp,
        sequence_parallel=False,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        # The loss is divided by global token counts already: data parallelism must only sum.
        calculate_per_token_loss=True,
        # Our operators add to main_grad themselves (`ops.wgrad.deliver_grad`).
        gradient_accumulation_fusion=False,
        deterministic_mode=False,
        cuda_graph_impl="none",
        cuda_graph_modules=[],  # the default is deprecated, and warns
    )


def wrap_ddp(model: nn.Module, config: Config, ranks: Ranks) -> DistributedDataParallel:
    """Give `model` contiguous weights and FP32 gradient buffers that are summed over ranks.

    Parameters keep their dtypes (FP32 A_log, D, dt_bias next to BF16 matrices). Each gets
    `main_grad`, an FP32 view into the gradient buffer. The wrapper's hook runs when autograd
    has finished a parameter, and adds its gradient to `main_grad` unless
    `grad_added_to_main_grad` says that the operator has done so (`ops.wgrad.deliver_grad`).
    With overlap_grad_reduce the hook also starts the reduction of full buckets; then it insists
    on a gradient from autograd, so such operators return a dummy (`needs_dummy_grad`).
    """
    p = config.parallel
    num_shards = ranks.groups.dp_cp.size()
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=p.overlap_grad_reduce,
        overlap_param_gather=p.overlap_param_gather,
        average_in_collective=False,
        # Elements; the default of megatron-core, written out because the layout needs it too.
        bucket_size=max(40_000_000, 1_000_000 * num_shards) if p.overlap_grad_reduce else None,
    )
    params = [param for param in model.parameters() if param.requires_grad]
    ddp = DistributedDataParallel(
        transformer_config(config),
        ddp_config,
        model,
        full_param_layout=DistributedOptimizer.compute_full_param_layout(
            params, ddp_config.bucket_size, num_shards, ddp_config
        ),
    )
    for param in params:
        param.needs_dummy_grad = p.overlap_grad_reduce
    # Ranks draw equal initial weights; this makes equality a fact rather than a hope.
    ddp.broadcast_params()
    return ddp


def param_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Matrices, embeddings and convolutions decay; vectors (norms, biases, A_log, D) do not.

    A group holds one dtype: in a mixed one megatron-core 0.19.2 sorts the FP32 parameters first
    and then looks up the state of the others in the old order, silently where sizes agree.
    """
    groups: dict[tuple[float, torch.dtype], list[nn.Parameter]] = {}
    for param in model.parameters():
        if param.requires_grad:
            wd_mult = 1.0 if param.ndim > 1 else 0.0
            groups.setdefault((wd_mult, param.dtype), []).append(param)
    return [
        {
            "params": params,
            "wd_mult": wd_mult,
            "weight_decay": config.optim.weight_decay * wd_mult,
            "is_expert_parallel": False,
        }
        for (wd_mult, _), params in groups.items()
    ]


def build_optimizer(
    ddp: DistributedDataParallel, config: Config, ranks: Ranks
) -> DistributedOptimizer:
    """AdamW with FP32 weights and moments, sharded over the data-parallel ranks."""
    optim, bf16 = config.optim, config.precision.weights == "bf16"
    inner = torch.optim.AdamW(
        param_groups(ddp.module, config),
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
        model_chunks=[ddp],
        per_model_buffers={0: ddp.buffers},
        data_parallel_group=ddp.intra_dp_cp_group,
        data_parallel_group_gloo=None,
        data_parallel_group_idx=ranks.groups.mp.rank(),
        distributed_optimizer_instance_id=0,
    )
    optimizer.grad_stats_parallel_group = ranks.groups.intra_dist_opt
    optimizer.tp_group = ranks.groups.tp
    optimizer.expert_tp_group = ranks.groups.expt_tp
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


def step_optimizer(optimizer: DistributedOptimizer) -> float:
    """Clip the reduced gradients, update the weights, return the norm before clipping.

    Where the norm is not finite, nothing has been updated: the caller decides what to do.
    """
    optimizer.prepare_grads()
    grad_norm = float(optimizer.clip_grad_norm(optimizer.config.clip_grad))
    if math.isfinite(grad_norm):
        optimizer.step_with_ready_grads()
    optimizer.zero_grad(set_to_none=True)
    return grad_norm


def build_scheduler(optimizer: DistributedOptimizer, config: Config) -> OptimizerParamScheduler:
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


def _device(config: Config, local_rank: int) -> torch.device:
    wanted, available = config.run.device, torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ConfigError("run.device='cuda': this process sees no GPU; use 'cpu' or 'auto'")
    if wanted == "cpu" and available:
        raise ConfigError(
            "run.device='cpu': megatron-core would still use the GPU that this process sees; "
            "hide it with CUDA_VISIBLE_DEVICES= or use 'auto'"
        )
    if not available:
        return torch.device("cpu")
    if local_rank >= (count := torch.cuda.device_count()):
        raise ConfigError(
            f"LOCAL_RANK={local_rank}: this host has {count} GPU(s); "
            f"start torchrun with --nproc-per-node {count} or less"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
