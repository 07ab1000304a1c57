"""What the metrics of a step are made of."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nemomodel.config.schema import ModelConfig
from nemomodel.model.nemotron import Losses, router_names
from nemomodel.parallel.mcore import Ranks, global_sum


class Meter:
    """Speed since it was last read."""

    def __init__(self, *, flops_per_token: float, peak_flops: float, device: torch.device):
        """
        Args:
            peak_flops: of all devices together, per second.
        """
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._device = device
        self._reset()

    def _reset(self) -> None:
        self._start = time.perf_counter()
        self._computing = self._paused = 0.0
        self._steps = self._tokens = 0

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around forward, backward and optimizer, which ends by reading the gradient norm."""
        start = time.perf_counter()
        yield
        self._computing += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around work that is no part of a training step."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def step_done(self, tokens: int) -> None:
        self._steps += 1
        self._tokens += tokens

    def read(self) -> dict[str, float]:
        """Rates over the steps since the last call."""
        seconds = time.perf_counter() - self._start - self._paused
        tokens_per_s = self._tokens / seconds
        values = {
            "perf/tokens_per_s": tokens_per_s,
            "perf/mfu": tokens_per_s * self._flops_per_token / self._peak_flops,
            "perf/step_s": seconds / self._steps,
            "perf/overhead_fraction": 1 - self._computing / seconds,
        }
        if self._device.type == "cuda":
            values["perf/memory_gb"] = torch.cuda.max_memory_allocated(self._device) / 1e9
        self._reset()
        return values


def losses_per_token(losses: Losses, num_targets: Tensor, ranks: Ranks) -> dict[str, float]:
    """Losses of the whole global batch, from the sums of this rank."""
    sums = torch.cat([losses.cross_entropy, losses.balance.reshape(1)]).double()
    if ranks.mesh.tp.rank:
        sums[:-1] = 0  # every tp rank has the same
    *cross_entropy, balance = global_sum(sums).tolist()
    per_token = [
        ce / n if n else float("nan")
        for ce, n in zip(cross_entropy, num_targets.tolist(), strict=True)
    ]
    values = {"loss/lm": per_token[0], "loss/aux": balance}
    return values | {f"loss/mtp_{k}": loss for k, loss in enumerate(per_token[1:], 1)}


def expert_loads(config: ModelConfig, count: Tensor) -> dict[str, float]:
    """MaxVio, the load of the busiest expert over the mean load (arXiv:2408.15664).

    Args:
        count: [routers, E] token copies per expert over the global batch.
    """
    if not len(count):
        return {}
    load = count.double()
    violations = (load.amax(1) / load.mean(1)).tolist()
    values = {"moe/max_violation": max(violations)}
    parts: dict[str, list[float]] = {}
    names = router_names(config)
    for name, violation in zip(names, violations, strict=True):
        parts.setdefault("mtp" if name.startswith("mtp.") else "main", []).append(violation)
    values |= {f"moe/max_violation/{part}": max(found) for part, found in parts.items()}
    worst = names[violations.index(max(violations))]
    return values | {"moe/worst_layer": float(_layer_index(worst, config))}


def _layer_index(router: str, config: ModelConfig) -> int:
    """Index of the layer a router is in; MTP layers count on from the last block."""
    numbers = [int(part) for part in router.split(".") if part.isdigit()]
    if not router.startswith("mtp."):
        return numbers[0]
    block, layer = numbers
    return len(config.layers) + block * len(config.mtp_layers) + layer
