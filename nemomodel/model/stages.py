"""Cut a model into pipeline stages."""

from itertools import accumulate, pairwise

from nemomodel.config.pattern import CUT
from nemomodel.config.schema import Config
from nemomodel.model.count import block_flops
from nemomodel.parallel.stage import Stage


def cut_stages(config: Config) -> list[Stage]:
    """pp * vpp stages: at the `|` of the pattern, or else so that the FLOPs of the busiest stage,
    head and MTP among them, are as few as possible. Rank r has stages r, r + pp, .."""
    pattern, num_blocks = config.model.layer_pattern, len(config.model.layers)
    if CUT in pattern:
        borders = [0, *accumulate(len(part) for part in pattern.split(CUT))]
    else:
        borders = _balanced(*block_flops(config), config.parallel.pp * config.parallel.vpp)
    return [Stage(range(a, b), num_blocks) for a, b in pairwise(borders)]


def _balanced(costs: list[int], last: int, parts: int) -> list[int]:
    """Borders of `parts` slices whose largest sum is smallest; `last` is added to the last."""
    sums = [0, *accumulate(costs)]
    n = len(costs)
    # best[i]: of all ways to cut the first i blocks, (largest sum, borders).
    best = {i: (sums[i], [0, i]) for i in range(1, n + 1)}
    for part in range(2, parts + 1):
        extra = last if part == parts else 0
        best = {
            i: min(
                (max(best[j][0], sums[i] - sums[j] + extra), [*best[j][1], i])
                for j in range(part - 1, i)
            )
            for i in range(part, n + 1)
        }
    return best[n][1]
