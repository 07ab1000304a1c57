"""Reduced gradients, put together from the parts that ranks have."""

from typing import Any

import torch
from torch import Tensor, nn

from nemomodel.checkpoint.state import Engine
from nemomodel.model.nemotron import Nemotron
from nemomodel.parallel.mcore import Ranks, global_sum
from nemomodel.parallel.shard import is_expert, shard_of


def own_part(optimizer: Any, param: nn.Parameter) -> slice:
    """The part of a flat parameter whose reduced gradient and optimizer state this rank has."""
    for part in optimizer.chained_optimizers:
        if param in part.model_param_gbuf_map:
            try:
                found = part._get_model_param_range_map(param)["param"]
            except KeyError:
                continue
            return slice(found.start, found.end)
    return slice(0, 0)


def whole_gradients(engine: Engine, ranks: Ranks) -> dict[str, Tensor]:
    """The gradient of every parameter of the whole model, on every rank."""
    model = engine.ddp.module
    here = dict(model.named_parameters())
    with torch.device("meta"):
        everything = Nemotron(model.config, dtype=torch.float32)
    gradients = {}
    for name, like in everything.named_parameters():
        whole = torch.zeros(like.shape)
        if name in here:
            param = here[name]
            mine = torch.zeros(param.numel())
            own = own_part(engine.optimizer, param)
            mine[own] = param.main_grad.view(-1)[own]
            alike = not is_expert(param) and not param.tensor_model_parallel
            if not (alike and ranks.mesh.tp.rank):
                for offset, piece in shard_of(param).pieces(mine.view_as(param)):
                    place = whole
                    for dim, (start, size) in enumerate(zip(offset, piece.shape, strict=True)):
                        place = place.narrow(dim, start, size)
                    place.copy_(piece)
        gradients[name] = global_sum(whole)
    return gradients
