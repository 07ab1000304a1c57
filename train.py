"""Train a model: torchrun [...] train.py CONFIG.toml [section.key=value ...], or plain python."""

import argparse
import json
import os
import sys
from typing import Any

from nemomodel.config import precision
from nemomodel.config.checks import rank_problems
from nemomodel.config.help import help_text
from nemomodel.config.layout import fewest_ranks
from nemomodel.config.load import ConfigError, load_config
from nemomodel.config.schema import Config


def description(config: Config, ranks: int | None) -> dict[str, Any]:
    """What --describe prints.

    Raises:
        ConfigError: the number of ranks does not fit the config.
    """
    from nemomodel.model.count import describe
    from nemomodel.model.layout import describe_layout

    if ranks is None:
        ranks = int(os.environ.get("WORLD_SIZE", fewest_ranks(config)))
    if ranks < 1:
        raise ConfigError(f"--ranks {ranks}: a run has at least 1")
    if found := list(rank_problems(config, ranks)):
        raise ConfigError("\n  ".join([f"--describe for {ranks} rank(s):", *found]))
    return describe(config) | {
        "precision": precision.describe(config),
        "layout": describe_layout(config, ranks),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="TOML file, e.g. configs/tiny.toml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument(
        "--describe",
        action="store_true",
        help="print parameters, FLOPs, memory, precision phases and the parallel layout as JSON "
        "and exit; needs no weights and no GPU",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="with --describe: ranks of the layout; default is WORLD_SIZE, or the fewest it needs",
    )
    args = parser.parse_intermixed_args()  # overrides may follow --describe
    if args.ranks is not None and not args.describe:
        parser.error("--ranks goes with --describe; torchrun sets the number of ranks of a run")
    rank = os.environ.get("RANK", "0")
    try:
        config = load_config(args.config, args.overrides)
        if args.describe:
            print(json.dumps(description(config, args.ranks), indent=2))
            return 0
    except ConfigError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # all ranks have found the same
            print(error, file=sys.stderr)
        return 2
    from nemomodel.train.faults import exit_code_of
    from nemomodel.train.loop import run

    try:
        return run(config)
    except Exception as error:
        code = exit_code_of(error)
        if code is None:
            raise
        # Not on rank 0 alone: the fault may be of this rank, or of its host.
        print(error if rank == "0" else f"rank {rank}: {error}", file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(main())
