"""The closed list of metrics. A name that is not here is a bug, found at its first write."""

import re
from collections.abc import Mapping

METRICS = {
    "loss/lm": "cross-entropy of the main head, nats per token",
    "loss/mtp_{k}": "cross-entropy of MTP depth k (from 1), nats per token",
    "loss/aux": "load-balancing loss, weighted, as it enters the total",
    "loss/validation": "loss/lm on the validation sequences",
    "loss/validation_mtp_{k}": "loss/mtp_{k} on the validation sequences",
    "loss/validation_bits_per_byte": "loss/validation per byte of text, in bits",
    "optim/grad_norm": "global gradient norm before clipping",
    "optim/lr": "learning rate of the step",
    "moe/max_violation": "largest over layers of the busiest expert's load / mean load (MaxVio)",
    "moe/max_violation/main": "the same over the MoE layers of the main stack",
    "moe/max_violation/mtp": "the same over the MoE layers of the MTP blocks",
    "moe/worst_layer": "index of the layer that moe/max_violation comes from",
    "quant/{where}/sqnr_db": "quantisation of an operand: 10 log10(sum x^2 / sum (q - x)^2), dB",
    "quant/{where}/underflow": "share of its elements that are not 0 and become 0",
    "quant/{where}/saturation": "share of its elements beyond the largest value of their block",
    "quant/{where}/scale_min": "smallest stored scale of a block that is not all 0",
    "quant/{where}/scale_max": "largest stored scale of a block",
    "quant/{where}/scale_range_log2": "log2(scale_max / scale_min)",
    "quant/{where}/amax": "largest magnitude, after the Hadamard transform where there is one",
    "data/tokens": "tokens trained on since step 0, over all ranks",
    "perf/tokens_per_s": "tokens per second of wall time, over all ranks",
    "perf/mfu": "model FLOPs per second over the peak of all devices, 0 to 1",
    "perf/step_s": "seconds of wall time per step",
    "perf/overhead_fraction": "share of the time outside forward, backward and optimizer, 0 to 1; "
    "with the copying of a checkpoint where one falls into the interval",
    "perf/memory_gb": "peak memory allocated on one device, 1e9 bytes",
}
"""Name -> meaning and unit. `{k}` stands for a number, `{where}` for ROLE/LAYER/OPERAND and, over
all layers of a role, ROLE/OPERAND."""

_PATTERN = re.compile(
    "|".join(
        re.escape(name).replace(r"\{k\}", r"\d+").replace(r"\{where\}", r"[\w.]+(/[\w.]+){1,2}")
        for name in METRICS
    )
)


def check_names(values: Mapping[str, float]) -> None:
    """Every name is on the list."""
    unknown = [name for name in values if not _PATTERN.fullmatch(name)]
    assert not unknown, f"metrics not in METRICS of observe/metrics.py: {unknown}"
