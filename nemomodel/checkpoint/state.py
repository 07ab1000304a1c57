"""What a checkpoint holds of a running training, and how it is put back."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nemomodel.checkpoint.files import check_shapes, read_tensors
from nemomodel.parallel import cpu
from nemomodel.parallel.mcore import Ranks

cpu.install()  # before the first import of megatron

from megatron.core.dist_checkpointing.mapping import ShardedTensor  # noqa: E402
from megatron.core.dist_checkpointing.strategies.checkpointable import (  # noqa: E402
    CheckpointableShardedTensor,
)
from megatron.core.distributed import DistributedDataParallel  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # noqa: E402

Shards = dict[str, ShardedTensor]


@dataclass(frozen=True)
class Engine:
    """The parts of a training whose state a checkpoint holds."""

    ddp: DistributedDataParallel
    optimizer: DistributedOptimizer
    scheduler: OptimizerParamScheduler

    def counters(self) -> dict[str, int]:
        return {
            "optimizer_steps": _optimizer_steps(self.optimizer),
            "schedule_steps": self.scheduler.num_steps,
        }


def copy_shards(engine: Engine, ranks: Ranks) -> tuple[dict[str, Tensor], int]:
    """Host copies of the tensors that this rank writes, and the bytes of all ranks' together.

    Every tensor is replicated over the data-parallel ranks; each is written by one of them.
    """
    _gather_weights(engine.ddp)
    model = _model_shards(engine.ddp.module, ranks)
    optimizer = engine.optimizer.sharded_param_state_fully_reshardable(
        model, is_loading=False, metadata={}
    )
    shards = model | _by_key(optimizer)
    total = sum(_num_bytes(shard) for shard in shards.values())
    owner, load = {}, [0] * ranks.dp_size
    for key in sorted(shards, key=lambda key: (-_num_bytes(shards[key]), key)):
        owner[key] = load.index(min(load))
        load[owner[key]] += _num_bytes(shards[key])
    copies = {}
    for key, shard in shards.items():
        if owner[key] == ranks.dp_rank:
            # A true copy: training changes the weights while they are being written.
            shard.data = shard.data.detach().to("cpu", copy=True)
            copies[key] = CheckpointableShardedTensor.from_sh_ten(shard)
    return copies, total


def restore(engine: Engine, ranks: Ranks, folder: Path, state: dict[str, Any]) -> None:
    """Put weights, optimizer, schedule and the random states of this rank back."""
    model = _model_shards(engine.ddp.module, ranks)
    optimizer = engine.optimizer.sharded_param_state_fully_reshardable(
        model, is_loading=True, metadata={}
    )
    shards = model | _by_key(optimizer)
    check_shapes(folder, {key: list(shard.global_shape) for key, shard in shards.items()})
    read_tensors(
        folder, {key: CheckpointableShardedTensor.from_sh_ten(s) for key, s in shards.items()}
    )
    tensors = {i: {name: s.data for name, s in entry.items()} for i, entry in optimizer.items()}
    _restore_optimizer(engine.optimizer, tensors, steps=state["optimizer_steps"])
    _restore_scheduler(engine.scheduler, steps=state["schedule_steps"])
    # Random states belong to ranks: with another number of ranks they have no meaning.
    if state["world_size"] == ranks.world_size:
        path = folder / rng_name(ranks.rank)
        set_random_states(torch.load(path, map_location="cpu", weights_only=True))


def _gather_weights(ddp: DistributedDataParallel) -> None:
    """Complete the weights on every rank now; overlapped gathering leaves it to the forward."""
    if ddp.ddp_config.overlap_param_gather:
        with torch.no_grad():
            ddp.start_param_sync(force_sync=True)


def _optimizer_steps(optimizer: DistributedOptimizer) -> int:
    """Updates made so far, as bias correction counts them."""
    (steps,) = {int(state["step"]) for state in optimizer.optimizer.state.values()}
    return steps


def _restore_optimizer(
    optimizer: DistributedOptimizer, tensors: dict[int, dict[str, Tensor]], *, steps: int
) -> None:
    """Put back FP32 weights and moments (fully_reshardable form) and the number of updates.

    The number is kept apart because megatron-core would give all parameters one shared step
    tensor, which every update then advances once per parameter. Learning rate and other
    settings are not restored: they come from the config.
    """
    states = optimizer.optimizer.state
    for state in states.values():
        del state["step"]
    optimizer.load_parameter_state_from_fully_reshardable(tensors)
    for shard, state in states.items():
        state["step"] = torch.tensor(float(steps), dtype=torch.float32, device=shard.device)


def _restore_scheduler(scheduler: OptimizerParamScheduler, *, steps: int) -> None:
    """Set the position in the schedule; its shape comes from the config."""
    scheduler.num_steps = 0
    scheduler.step(steps)


def rng_name(rank: int) -> str:
    return f"rng_{rank:05d}.pt"


def random_states() -> dict[str, Any]:
    """All global generators of this process as tensors and plain data."""
    _, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    keys, *rest = states["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _model_shards(model: nn.Module, ranks: Ranks) -> Shards:
    """Weights and buffers; `keep_vars` because the optimizer finds its weights by identity."""
    return {
        f"model.{name}": ShardedTensor.from_rank_offsets(
            f"model.{name}", tensor, replica_id=(0, 0, ranks.dp_rank)
        )
        for name, tensor in model.state_dict(keep_vars=True).items()
    }


def _by_key(entries: dict[int, Shards]) -> Shards:
    return {shard.key: shard for entry in entries.values() for shard in entry.values()}


def _num_bytes(shard: ShardedTensor) -> int:
    return shard.data.numel() * shard.data.element_size()
