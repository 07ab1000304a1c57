"""Train a model: torchrun [...] train.py CONFIG.toml [section.key=value ...], or plain python."""

import argparse
import json
import os
import sys

from nemomodel.config import precision
from nemomodel.config.help import help_text
from nemomodel.config.load import ConfigError, load_config


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
        help="print parameters, FLOPs, memory and precision phases as JSON and exit; needs no "
        "weights and no GPU",
    )
    args = parser.parse_intermixed_args()  # overrides may follow --describe
    rank = os.environ.get("RANK", "0")
    try:
        config = load_config(args.config, args.overrides)
    except ConfigError as error:
        if rank == "0":  # all ranks have found the same
            print(error, file=sys.stderr)
        return 2
    if args.describe:
        from nemomodel.model.count import describe

        phases = precision.describe(config)
        print(json.dumps(describe(config) | {"precision": phases}, indent=2))
        return 0
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
