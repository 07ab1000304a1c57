"""Learning rate of every update."""

import math

from nemomodel.config.schema import ScheduleConfig


def lr_oracle(
    n: int, schedule: ScheduleConfig, *, max_lr: float, min_lr: float, steps: int
) -> float:
    """The learning rate that the n-th of `steps` updates uses, n from 1.

        warm-up    n <= warmup_steps:          max_lr * n / warmup_steps (the first is not 0)
        constant   after it:                   max_lr
        cosine     after it:                   min_lr + (max_lr - min_lr) (1 + cos(pi r)) / 2
                                               r = (n - warmup_steps) / (steps - warmup_steps)
        wsd        up to steps - decay_steps:  max_lr
                   the last decay_steps:       min_lr + (max_lr - min_lr) (1 - sqrt(r))
                                               r = (n - (steps - decay_steps)) / decay_steps

    So r is 1 and the rate is min_lr at the last update, n = steps, and first below max_lr at
    n = steps - decay_steps + 1.
    """
    if n <= schedule.warmup_steps:
        return max_lr * n / schedule.warmup_steps
    if schedule.kind == "constant":
        return max_lr
    if schedule.kind == "cosine":
        r = (n - schedule.warmup_steps) / (steps - schedule.warmup_steps)
        return min_lr + (max_lr - min_lr) * (1 + math.cos(math.pi * r)) / 2
    stable_until = steps - schedule.decay_steps
    if n <= stable_until:
        return max_lr
    r = (n - stable_until) / schedule.decay_steps
    return min_lr + (max_lr - min_lr) * (1 - math.sqrt(r))
