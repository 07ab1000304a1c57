"""The bridge to megatron-core: process groups, data parallelism, optimizer, schedule.

The only module that turns a `Config` into megatron-core objects. One optimizer step is

    ranks = start_ranks(config)
    chunks = [wrap_ddp(model, config, ranks)]   # sums gradients over data-parallel ranks
    optimizer = build_optimizer(chunks, config, ranks)
    scheduler = build_scheduler(optimizer, config)

    chunk.zero_grad_buffer()                        # each
    run_micro_batches(chunks, forward, number, ...) # pipeline.py
    finish_gradients(chunks, ranks)
    grad_norm = step_optimizer(optimizer)       # not finite: nothing was changed
    scheduler.step(1)

Losses are divided by the token counts of the whole global batch (`global_sum`), so gradients
are summed over ranks and micro-batches and never scaled.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemomodel.config.checks import rank_problems
from nemomodel.config.load import ConfigError
from nemomodel.config.schema import Config
from nemomodel.parallel import cpu, flex_dispatch
from nemomodel.parallel.mesh import Axis, Mesh

cpu.install()  # before the first import of megatron

from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402
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
    mesh: Mesh

    @property
    def last_stage(self) -> bool:
        return self.mesh.pp.rank == self.mesh.pp.size - 1

    @property
    def counts(self) -> bool:
        """Whether this rank counts for its sequences, of all that work on them."""
        return self.last_stage and self.mesh.positions.rank == 0


def start_ranks(config: Config) -> Ranks:
    """Join the process groups of `config.parallel`.

    Under torchrun its environment tells the rank; without it this is a one-process run. Groups
    that exist already (of a test) are taken as they are.

    Raises:
        ConfigError: the number of ranks, the device or its packages do not fit the config.
    """
    if dist.is_initialized():
        rank, world_size = dist.get_rank(), dist.get_world_size()
    else:
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if found := list(rank_problems(config, world_size)):
        raise ConfigError("\n  ".join(["launch:", *found]))
    device = _device(config, local_rank)
    if config.parallel.dispatcher != "alltoall":
        flex_dispatch.require(config.parallel.dispatcher, device)
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
        virtual_pipeline_model_parallel_size=p.vpp if p.vpp > 1 else None,
        context_parallel_size=p.cp,
        expert_model_parallel_size=p.ep,
        expert_tensor_parallel_size=p.etp,
        create_gloo_process_groups=False,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return Ranks(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        device=device,
        groups=groups,
        mesh=Mesh(
            tp=_axis(groups.tp),
            cp=_axis(groups.cp),
            pp=_axis(groups.pp),
            ep=_axis(groups.ep),
            etp=_axis(groups.expt_tp),
            positions=_axis(groups.tp_cp),
            experts=_axis(groups.tp_ep),
            dispatcher=p.dispatcher,
        ),
    )


def _axis(group: dist.ProcessGroup) -> Axis:
    return Axis(dist.get_rank(group), dist.get_world_size(group), group)


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


def global_sum(tensor: Tensor) -> Tensor:
    """Sum `tensor` over all ranks, in place; what several have alike has to be 0 on all but one."""
    dist.all_reduce(tensor)
    return tensor


def transformer_config(config: Config) -> TransformerConfig:
    """What the engine needs to know of the model; the layers themselves are ours.

    Only fields that data parallelism, pipeline and optimizer read. They know experts by process
    groups; here a number of ranks would want more fields of a model that is not theirs.
    """
    p, bf16 = config.parallel, config.precision.weights == "bf16"
    attention = config.model.attention
    return TransformerConfig(
        num_layers=len(config.model.layers),
        hidden_size=config.model.hidden_size,
        num_attention_heads=attention.num_heads if attention else 1,
        tensor_model_parallel_size=p.tp,
        pipeline_model_parallel_size=p.pp,
        virtual_pipeline_model_parallel_size=p.vpp if p.vpp > 1 else None,
        # Two messages between the same two ranks in one batch arrive in the wrong order with gloo.
        batch_p2p_comm=p.vpp == 1,
        context_parallel_size=p.cp,
        expert_tensor_parallel_size=p.etp,
        sequence_parallel=p.tp > 1,
        pipeline_dtype=torch.bfloat16 if bf16 else torch.float32,
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
    num_shards, num_expert_shards = ranks.groups.dp_cp.size(), ranks.groups.expt_dp.size()
    # Stages after the first are waited for anyway: megatron-core reduces theirs in one piece.
    buckets = p.overlap_grad_reduce and ranks.mesh.pp.rank == 0
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=p.overlap_grad_reduce,
        overlap_param_gather=p.overlap_param_gather,
        average_in_collective=False,
        # Elements; the default of megatron-core, written out because the layout needs it too.
        bucket_size=max(40_000_000, 1_000_000 * num_shards) if buckets else None,
    )
    params = [param for param in model.parameters() if param.requires_grad]
    ddp = DistributedDataParallel(
        transformer_config(config),
        ddp_config,
        model,
        full_param_layout=DistributedOptimizer.compute_full_param_layout(
            params, ddp_config.bucket_size, num_shards, ddp_config, num_expert_shards
        ),
    )
    for param in params:
        param.needs_dummy_grad = p.overlap_grad_reduce
    # Ranks draw equal initial weights; this makes equality a fact rather than a hope.
    ddp.broadcast_params()
    return ddp


def finish_gradients(chunks: Sequence[DistributedDataParallel], ranks: Ranks) -> None:
    """Sum the gradients over the ranks that hold the same weights and saw other tokens."""
    for chunk in chunks:
        chunk.finish_grad_sync()
    if ranks.mesh.tp.size == 1:
        return
    params = (param for chunk in chunks for param in chunk.module.parameters())
    alike = [param.main_grad for param in params if param.sequence_parallel]
    flat = torch.cat([grad.flatten() for grad in alike])
    dist.all_reduce(flat, group=ranks.groups.tp)
    for grad, summed in zip(alike, flat.split([g.numel() for g in alike]), strict=True):
        grad.copy_(summed.view_as(grad))


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
