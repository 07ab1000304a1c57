"""Move checkpoints between our format and Hugging Face nemotron_h folders, on a CPU.

    python tools/convert.py import HF_DIR CKPT_DIR      to train on, or to load
    python tools/convert.py export CKPT HF_DIR          for transformers, vLLM, SGLang
    python tools/convert.py verify A B                  same names, shapes, dtypes and bytes?
    python tools/convert.py plan CONFIG.toml [section.key=value ...]
                                                        what an export would write, no weights

CKPT is a run folder (its newest intact checkpoint), one step folder, or an imported CKPT_DIR.
A and B are either kind. Weights are streamed: memory is that of about one layer. The result
appears when it is complete, or not at all.

exit codes: 0 done, verify: equal; 1 verify: different, or a file could not be read or written;
2 bad input, nothing was written; 130, 143 interrupted, nothing was written
"""

import argparse
import os
import re
import signal
import sys
from pathlib import Path

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    # A terminated conversion cleans up like an interrupted one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return run(args)
    except SystemExit as end:
        print("convert: terminated; nothing was written", file=sys.stderr)
        return int(end.code)
    except KeyboardInterrupt:
        print("convert: interrupted; nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # the reader of our output, e.g. `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        print(f"convert: {error}; nothing was written", file=sys.stderr)
        return 1


def run(args: argparse.Namespace) -> int:
    from nemomodel.checkpoint.files import CheckpointError
    from nemomodel.config.load import ConfigError

    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except (CheckpointError, ConfigError) as error:
        print(f"convert: {error}", file=sys.stderr)
        return 2


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("import", help="Hugging Face folder to checkpoint")
    command.add_argument("source", type=Path, metavar="HF_DIR")
    command.add_argument("target", type=Path, metavar="CKPT_DIR")
    command.set_defaults(run=run_import)

    command = commands.add_parser("export", help="checkpoint to Hugging Face folder")
    command.add_argument("source", type=Path, metavar="CKPT")
    command.add_argument("target", type=Path, metavar="HF_DIR")
    command.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        help="of all tensors but router biases, which are FP32 (default: the recipe's)",
    )
    command.add_argument(
        "--shard-size",
        type=size,
        default="5GB",
        help="largest file, e.g. 500MB (default: %(default)s)",
    )
    _add_vocab_size(command)
    command.set_defaults(run=run_export)

    command = commands.add_parser("verify", help="compare two checkpoints byte by byte")
    command.add_argument("a", type=Path, metavar="A")
    command.add_argument("b", type=Path, metavar="B")
    _add_vocab_size(command)
    command.set_defaults(run=run_verify)

    command = commands.add_parser("plan", help="the tensors of a config, without weights")
    command.add_argument("config", metavar="CONFIG.toml")
    command.add_argument("overrides", nargs="*", metavar="section.key=value")
    command.add_argument("--names", action="store_true", help="list every tensor")
    command.set_defaults(run=run_plan)
    return parser.parse_args(argv)


def _add_vocab_size(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--vocab-size",
        type=int,
        metavar="ROWS",
        help="rows of embedding and head without padding (default: those of the imported folder)",
    )


def size(text: str) -> int:
    """Bytes of `500MB` and the like, in powers of ten."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]B)?", text, re.IGNORECASE)
    value = int(float(match[1]) * UNITS[(match[2] or "").upper()]) if match else 0
    if not value:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; use e.g. 5GB")
    return value


def run_import(args: argparse.Namespace) -> int:
    from nemomodel.checkpoint.huggingface.importing import MODEL_TOML, import_folder, model_toml

    folder = import_folder(args.source, args.target)
    print(f"{args.target}: {len(folder.tensors):,} tensors, {folder.num_bytes:,} bytes")
    if folder.num_narrow_biases:
        print(f"{folder.num_narrow_biases} router biases were BF16; they are FP32 now, exactly")
    print(f"For a training config ({args.target / MODEL_TOML}):\n")
    print(model_toml(folder.config, folder.recipe), end="")
    return 0


def run_export(args: argparse.Namespace) -> int:
    import torch

    from nemomodel.checkpoint.huggingface.exporting import export_checkpoint

    done = export_checkpoint(
        args.source,
        args.target,
        dtype=getattr(torch, args.dtype) if args.dtype else None,
        shard_bytes=args.shard_size,
        vocab_size=args.vocab_size,
    )
    print(
        f"{args.target}: {done.num_tensors:,} tensors, {done.num_bytes:,} bytes, "
        f"{done.num_shards} file{'s' if done.num_shards > 1 else ''}"
    )
    if done.own_tokenizer:
        print("tokenizer, end tokens: those of the run; none of what it started from")
    if done.rounded:
        kinds = sorted({name.rsplit(".", 1)[-1] for name in done.rounded})
        print(f"rounded to BF16: {len(done.rounded):,} FP32 tensors ({', '.join(kinds)})")
    return 0


def run_verify(args: argparse.Namespace) -> int:
    from nemomodel.checkpoint.huggingface.verify import verify

    count = different = 0
    for line in verify(args.a, args.b, vocab_size=args.vocab_size):
        count += 1
        if line.equal:
            print(f"{line.a} {line.name}")
            continue
        different += 1
        print(f"DIFFERENT {line.name}\n  A {line.a or 'missing'}\n  B {line.b or 'missing'}")
    print(f"{count:,} tensors, {different:,} different")
    return 1 if different else 0


def run_plan(args: argparse.Namespace) -> int:
    from nemomodel.checkpoint.huggingface.exporting import published_dtype
    from nemomodel.checkpoint.huggingface.names import plan
    from nemomodel.checkpoint.huggingface.tensor_files import NAMES
    from nemomodel.config.load import load_config
    from nemomodel.model.nemotron import DTYPES

    config = load_config(args.config, args.overrides)
    dtype = DTYPES[config.precision.weights]
    pieces = [piece for entry in plan(config.model, dtype=dtype) for piece in entry.pieces]
    if args.names:
        for piece in pieces:
            print(f"{piece.name} {NAMES[published_dtype(piece, dtype)]} {list(piece.shape)}")
    num_bytes = sum(piece.numel * published_dtype(piece, dtype).itemsize for piece in pieces)
    biases = sum(piece.is_router_bias for piece in pieces)
    print(
        f"{len(pieces):,} tensors, {sum(piece.numel for piece in pieces):,} elements, "
        f"{num_bytes:,} bytes; {biases} router biases are FP32, the others {NAMES[dtype]}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
