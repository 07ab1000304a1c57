"""Initial weights. Each parameter draws from its own stream, named by seed and parameter.

Sources: Megatron-LM core/transformer/transformer_config.py (two standard deviations) and
core/ssm/mamba_mixer.py (A_log, dt_bias, D, convolution) @ d98e8a64.
"""

import hashlib
import math

import torch
from torch import Tensor

from nemomodel.config.schema import ModelConfig
from nemomodel.model.nemotron import Nemotron
from nemomodel.parallel.shard import Shard, shard_of

OUTPUT_WEIGHTS = ("out_proj.weight", "fc2.weight", "experts.fc2", "latent_up.weight")
"""Projections back into the residual stream: init_std / sqrt(layers)."""

DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 0.1, 1e-4


@torch.no_grad()
def initialize(model: Nemotron, *, seed: int) -> None:
    """Fill every parameter and buffer.

    The values depend on the seed and the parameter's name and whole shape alone, not on the
    device, the order of parameters or which part of them a rank holds. Drawn in FP32, then
    rounded; every expert has a stream of its own.
    """
    for name, parameter in model.named_parameters():
        shard = shard_of(parameter)
        if len(shard.shape) == 3:
            (experts,) = shard.ranges[0]
            one = Shard(shard.shape[1:], shard.ranges[1:])
            for e, expert in zip(experts, parameter, strict=True):
                expert.copy_(one.cut(_draw(name, one.shape, f"{name}.{e}", seed, model.config)))
        else:
            parameter.copy_(shard.cut(_draw(name, shard.shape, name, seed, model.config)))
    for buffer in model.buffers():
        buffer.zero_()


def _seed(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"init/{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _draw(name: str, shape: tuple[int, ...], stream: str, seed: int, config: ModelConfig) -> Tensor:
    generator = torch.Generator().manual_seed(_seed(seed, stream))
    value = torch.empty(shape, dtype=torch.float32)
    leaf = name.rpartition(".")[2]
    if leaf == "A_log":
        return value.uniform_(1, 16, generator=generator).log_()
    if leaf == "dt_bias":
        dt = value.uniform_(math.log(DT_MIN), math.log(DT_MAX), generator=generator).exp_()
        dt.clamp_(min=DT_FLOOR)
        return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus
    if leaf == "D" or name.endswith("norm.weight"):
        return value.fill_(1)
    if leaf in ("conv_weight", "conv_bias"):
        bound = 1 / math.sqrt(config.mamba.conv_kernel)  # kaiming_uniform(a=sqrt(5)), depthwise
        return value.uniform_(-bound, bound, generator=generator)
    std = config.init_std
    if name.endswith(OUTPUT_WEIGHTS):
        std /= math.sqrt(len(config.layers))
    return value.normal_(0, std, generator=generator)
