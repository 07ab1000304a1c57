"""What a checkpoint holds of a running training, and how it is put back."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nemomodel.checkpoint.files import check_shapes, read_tensors
from nemomodel.model.quantize import Quantization
from nemomodel.parallel import cpu
from nemomodel.parallel.mcore import Ranks, global_sum
from nemomodel.parallel.shard import Shard, is_expert, shard_of

cpu.install()  # before the first import of megatron

from megatron.core.dist_checkpointing.mapping import ShardedTensor  # noqa: E402
from megatron.core.dist_checkpointing.strategies.checkpointable import (  # noqa: E402
    CheckpointableShardedTensor,
    LocalShardsContainer,
)
from megatron.core.distributed import DistributedDataParallel  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402
from megatron.core.optimizer.optimizer import ChainedOptimizer  # noqa: E402
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # noqa: E402

OptimizerState = dict[int, dict[str, ShardedTensor]]
"""By number of the parameter and name of the state."""


@dataclass(frozen=True)
class Engine:
    """The parts of a training whose state a checkpoint holds."""

    chunks: Sequence[DistributedDataParallel]
    """The model, or this rank's stages of a pipeline in their order."""
    optimizer: ChainedOptimizer
    scheduler: OptimizerParamScheduler
    quantization: Quantization | None = None

    @property
    def ddp(self) -> DistributedDataParallel:
        """The only chunk."""
        (ddp,) = self.chunks
        return ddp

    def counters(self) -> dict[str, int]:
        return {
            "optimizer_steps": _optimizer_steps(self.optimizer),
            "schedule_steps": self.scheduler.num_steps,
        }


class Held(NamedTuple):
    """What a rank has of a tensor of the checkpoint."""

    tensor: Tensor
    shard: Shard
    expert: bool

    @property
    def num_bytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def checkpointable(self, key: str) -> Tensor:
        """For torch's distributed checkpoints: every contiguous piece with its offset."""
        pieces = [
            CheckpointableShardedTensor.from_sh_ten(
                ShardedTensor(
                    key=key,
                    data=piece,
                    dtype=piece.dtype,
                    local_shape=tuple(piece.shape),
                    global_shape=self.shard.shape,
                    global_offset=offset,
                    axis_fragmentations=None,
                )
            )
            for offset, piece in self.shard.pieces(self.tensor.detach())
        ]
        return pieces[0] if len(pieces) == 1 else LocalShardsContainer(pieces)


def copy_shards(engine: Engine, ranks: Ranks) -> tuple[dict[str, Tensor], int]:
    """Host copies of the tensors that this rank writes, and the bytes of all ranks' together."""
    for chunk in engine.chunks:
        _gather_weights(chunk)
    held, _ = _state(engine, is_loading=False)
    # True copies: training changes the weights while they are being written.
    copies = {
        key: held[key]._replace(tensor=held[key].tensor.detach().to("cpu", copy=True))
        for key in _to_write(held, ranks)
    }
    num_bytes = torch.tensor(sum(copy.num_bytes for copy in copies.values()), device=ranks.device)
    checkpointable = {key: copy.checkpointable(key) for key, copy in copies.items()}
    return checkpointable, int(global_sum(num_bytes))


def restore(engine: Engine, ranks: Ranks, folder: Path, state: dict[str, Any]) -> None:
    """Put weights, optimizer, schedule and the random states of this rank back."""
    held, entries = _state(engine, is_loading=True)
    check_shapes(folder, {key: list(h.shard.shape) for key, h in held.items()})
    read_tensors(folder, {key: h.checkpointable(key) for key, h in held.items()})
    for optimizer, loaded in zip(engine.optimizer.chained_optimizers, entries, strict=True):
        tensors = {i: {name: s.data for name, s in entry.items()} for i, entry in loaded.items()}
        _restore_optimizer(optimizer, tensors, steps=state["optimizer_steps"])
    _restore_scheduler(engine.scheduler, steps=state["schedule_steps"])
    # Random states belong to ranks: with another number of ranks they have no meaning.
    if state["world_size"] == ranks.world_size:
        path = folder / rng_name(ranks.rank)
        set_random_states(torch.load(path, map_location="cpu", weights_only=True))


def _state(engine: Engine, *, is_loading: bool) -> tuple[dict[str, Held], list[OptimizerState]]:
    """Everything this rank holds by its key in the checkpoint, weights and optimizer, and the
    optimizers' tensors among them as megatron-core numbers them.

    Args:
        is_loading: the optimizers' tensors are empty, to be read into.
    """
    # `keep_vars`, because the optimizer finds its weights by identity.
    tensors: dict[str, Tensor] = {}
    for chunk in engine.chunks:
        tensors |= chunk.module.state_dict(keep_vars=True)
    held = {f"model.{n}": Held(t, shard_of(t), is_expert(t)) for n, t in tensors.items()}
    local = {key: ShardedTensor.from_rank_offsets(key, h.tensor) for key, h in held.items()}
    entries = [
        optimizer.sharded_param_state_fully_reshardable(local, is_loading=is_loading, metadata={})
        for optimizer in engine.optimizer.chained_optimizers
    ]
    for entry in entries:
        for tensor in (tensor for by_name in entry.values() for tensor in by_name.values()):
            weight = held["model." + tensor.key.partition(".model.")[2]]
            held[tensor.key] = weight._replace(tensor=tensor.data)
    return held, entries


def _to_write(held: dict[str, Held], ranks: Ranks) -> list[str]:
    """Each part of a tensor is held by several ranks alike; these share the writing."""
    groups, keys = ranks.groups, []
    for experts, group in ((False, groups.dp_cp), (True, groups.expt_dp)):
        alike = {key: h for key, h in held.items() if h.expert == experts}
        load = [0] * group.size()
        for key in sorted(alike, key=lambda key: (-alike[key].num_bytes, key)):
            owner = load.index(min(load))
            load[owner] += alike[key].num_bytes
            # What is not cut all tp ranks hold.
            whole = not experts and alike[key].tensor.shape == alike[key].shard.shape
            if owner == group.rank() and not (whole and ranks.mesh.tp.rank):
                keys.append(key)
    return keys


def _gather_weights(ddp: DistributedDataParallel) -> None:
    """Complete the weights on every rank now; overlapped gathering leaves it to the forward."""
    if ddp.ddp_config.overlap_param_gather:
        with torch.no_grad():
            ddp.start_param_sync(force_sync=True)


def _optimizer_steps(optimizer: ChainedOptimizer) -> int:
    """Updates made so far, as bias correction counts them."""
    parts = [part.optimizer.state for part in optimizer.chained_optimizers]
    (steps,) = {int(state["step"]) for states in parts for state in states.values()}
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
