"""Turn text into the token files that training reads.

Inputs are text files (one document each), folders of them, JSON lines (.jsonl, also .gz, .zst),
Parquet files, and Hugging Face datasets (a folder or a name on the hub). The result is
PREFIX.bin and PREFIX.idx in megatron-core's indexed format, PREFIX.json that describes them, and
PREFIX.tokenizer.json. All of them appear at the end, or none.
"""

import argparse
import hashlib
import os
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported where used: --help must not wait for them
    from tokenizers import Tokenizer

    from nemomodel.data.metadata import Metadata
    from nemomodel.data.progress import Progress
    from nemomodel.data.readers import Document, Input

USER_ERROR = 2


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    # A terminated run cleans up like an interrupted one.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # The tokenizer library reads its number of threads from here, once.
    os.environ["RAYON_NUM_THREADS"] = str(args.workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        prepare(args)
    except ValueError as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        print(f"prepare_data: {error}; nothing was written", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("prepare_data: interrupted; nothing was written", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="file, folder or dataset name")
    add("--output", required=True, type=Path, metavar="PREFIX", help="where the files are written")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json to use")
    which.add_argument(
        "--train-tokenizer",
        type=int,
        metavar="VOCAB_SIZE",
        help="train a byte-level BPE of this size on the inputs",
    )
    add(
        "--tokenizer-sample",
        type=int,
        metavar="BYTES",
        help="text the tokenizer is trained on, from the start of the inputs (default: 200000000)",
    )
    add("--eod-token", metavar="TOKEN", help="token that ends a document, if not a known one")
    add("--text-key", metavar="KEY", help="key or column of the text (default: text)")
    add("--split", metavar="NAME", help="split of Hugging Face datasets (default: train)")
    add("--subset", metavar="NAME", help="configuration of a Hugging Face dataset")
    add("--streaming", action="store_true", help="do not download datasets before reading them")
    add(
        "--validation-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="share of the documents that goes to PREFIX_validation, chosen by their content",
    )
    add(
        "--workers",
        type=int,
        default=os.cpu_count(),
        metavar="N",
        help="threads that tokenize; the result does not depend on it (default: all, %(default)s)",
    )
    add("--overwrite", action="store_true", help="replace an existing output")
    return parser.parse_args(argv)


def prepare(args: argparse.Namespace) -> None:
    """Read, tokenize and publish.

    Raises:
        ValueError: for what the user can correct, in one sentence.
    """
    from nemomodel.data.indexed import file_of
    from nemomodel.data.readers import open_inputs
    from nemomodel.data.staging import publish, staging_folder

    started = time.monotonic()
    check_options(args)
    parts = [args.output]
    if args.validation_fraction:
        parts.append(args.output.with_name(args.output.name + "_validation"))
    finals = [file_of(part, suffix) for part in parts for suffix in (".json", ".idx", ".bin")]
    check_free(finals, args.overwrite)
    inputs = open_inputs(
        args.inputs,
        text_key=args.text_key or "text",
        split=args.split or "train",
        subset=args.subset,
        streaming=args.streaming,
    )
    check_effect(args, inputs)

    with staging_folder(args.output) as staged:
        tokenizer = stage_tokenizer(args, inputs, staged / "tokenizer.json")
        metadata = write_parts(args, inputs, tokenizer, staged)
        # Without an index no file counts as there, so old and new never mix.
        for final in finals:
            if final.suffix != ".bin":
                final.unlink(missing_ok=True)
        names = ["train", "validation"]
        moves = [(staged / "tokenizer.json", file_of(args.output, ".tokenizer.json"))]
        for suffix in (".bin", ".idx", ".json"):
            moves += [
                (staged / f"{name}{suffix}", file_of(part, suffix))
                for name, part in zip(names, parts, strict=False)
            ]
        publish(moves)
    for part, found in zip(parts, metadata, strict=True):
        print(
            f"{part}: {found.documents:,} documents, {found.tokens:,} tokens, "
            f"{found.bytes / found.tokens:.2f} bytes per token, vocabulary {found.vocab_size}"
        )
    print(f"done in {time.monotonic() - started:.1f} s")


def check_options(args: argparse.Namespace) -> None:
    from nemomodel.data.tokenizer import MIN_VOCAB_SIZE

    if args.train_tokenizer is not None and args.train_tokenizer < MIN_VOCAB_SIZE:
        raise ValueError(f"--train-tokenizer={args.train_tokenizer}: use at least {MIN_VOCAB_SIZE}")
    if args.train_tokenizer is None and args.tokenizer_sample is not None:
        raise ValueError("--tokenizer-sample has no effect without --train-tokenizer; remove it")
    if args.train_tokenizer is not None and args.eod_token is not None:
        raise ValueError("--eod-token has no effect with --train-tokenizer; remove it")
    if not 0 <= args.validation_fraction < 1:
        raise ValueError(
            f"--validation-fraction={args.validation_fraction}: use 0 or more, below 1"
        )
    if args.workers < 1:
        raise ValueError(f"--workers={args.workers}: use at least 1")


def check_free(finals: list[Path], overwrite: bool) -> None:
    # A .bin alone is what a run leaves that was killed while it published.
    there = [final for final in finals if final.suffix != ".bin" and final.exists()]
    if there and not overwrite:
        raise ValueError(f"{there[0]}: exists; give another --output, or --overwrite")


def check_effect(args: argparse.Namespace, inputs: "list[Input]") -> None:
    from nemomodel.data.readers import HubDataset, TextFile

    kinds = {type(source) for source in inputs}
    for option in ("split", "subset", "streaming"):
        if getattr(args, option) and HubDataset not in kinds:
            raise ValueError(f"--{option} has no effect: no input is a dataset; remove it")
    if args.text_key and kinds == {TextFile}:
        raise ValueError("--text-key has no effect: all inputs are text files; remove it")


def stage_tokenizer(args: argparse.Namespace, inputs: "list[Input]", path: Path) -> "Tokenizer":
    """Put the tokenizer at `path`, copied or trained."""
    from nemomodel.data.progress import Progress
    from nemomodel.data.tokenizer import load_tokenizer, train_tokenizer, vocab_size_of

    if args.tokenizer is not None:
        tokenizer = load_tokenizer(args.tokenizer)
        shutil.copyfile(args.tokenizer, path)
        return tokenizer
    with Progress("training the tokenizer", inputs) as progress:
        texts = sample(inputs, args, progress)
        tokenizer = train_tokenizer(texts, vocab_size=args.train_tokenizer)
    if (found := vocab_size_of(tokenizer)) < args.train_tokenizer:
        print(f"the text has no more than {found} tokens worth learning", file=sys.stderr)
    tokenizer.save(str(path))
    return load_tokenizer(path)


def sample(inputs: "list[Input]", args: argparse.Namespace, progress: "Progress") -> Iterator[str]:
    """Training text from the start of the inputs."""
    left = args.tokenizer_sample or 200_000_000
    for document, position in read_all(inputs):
        num_bytes, held_out = weigh(document.text, args.validation_fraction)
        progress.advance(position, num_bytes=num_bytes)
        if not held_out:
            yield document.text
            left -= num_bytes
        if left <= 0:
            return


def read_all(inputs: "list[Input]") -> "Iterator[tuple[Document, float]]":
    """Every document that has text, and how far all inputs together are read."""
    done = 0.0
    for source in inputs:
        for document in source.documents():
            if document.text:
                yield document, done + document.position
        done += source.size or 0


def weigh(text: str, validation_fraction: float) -> tuple[int, bool]:
    """UTF-8 bytes of a document, and whether it is held out.

    Held out by content, not by place: the choice survives a new order, and copies of a document
    stay on one side.
    """
    data = text.encode()
    if not validation_fraction:
        return len(data), False
    digest = hashlib.blake2b(data, digest_size=8).digest()
    return len(data), int.from_bytes(digest, "little") < validation_fraction * 2**64


def write_parts(
    args: argparse.Namespace, inputs: "list[Input]", tokenizer: "Tokenizer", staged: Path
) -> "list[Metadata]":
    """Tokenize all documents into staged files; the metadata of each part."""
    from nemomodel.data.metadata import sha256_of
    from nemomodel.data.progress import Progress
    from nemomodel.data.staging import TokenPart
    from nemomodel.data.tokenizer import encode_documents, end_token_id, vocab_size_of

    eod_id = end_token_id(tokenizer, name=args.eod_token)
    names = ["train", "validation"] if args.validation_fraction else ["train"]
    parts = [
        TokenPart(
            staged / name,
            vocab_size_of(tokenizer),
            eod_id,
            sha256_of(staged / "tokenizer.json"),
            tuple(args.inputs),
        )
        for name in names
    ]
    # Documents wait here while the tokenizer works on their batch.
    waiting: deque[tuple[int, bool, float]] = deque()

    def texts() -> Iterator[str]:
        for document, position in read_all(inputs):
            waiting.append((*weigh(document.text, args.validation_fraction), position))
            yield document.text

    with Progress("tokenizing", inputs) as progress:
        for tokens in encode_documents(tokenizer, texts(), eod_id=eod_id):
            num_bytes, held_out, position = waiting.popleft()
            parts[held_out].add(tokens, num_bytes=num_bytes)
            progress.advance(position, num_bytes=num_bytes, num_tokens=len(tokens))
    for name, part in zip(names, parts, strict=True):
        if not part.writer.num_documents:
            raise ValueError(
                f"the {name} part has no documents; "
                + ("change --validation-fraction" if len(parts) > 1 else "the inputs are empty")
            )
    return [part.finish() for part in parts]


if __name__ == "__main__":
    sys.exit(main())
