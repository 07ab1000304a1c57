"""Evaluate a checkpoint: a run folder, a step folder or a Hugging Face nemotron_h folder.

python tools/evaluate.py perplexity PATH --data PREFIX | --text FILE ...
python tools/evaluate.py acceptance PATH --prompts FILE.jsonl
python tools/evaluate.py harness PATH --tasks arc_easy,hellaswag
"""

import argparse
import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported where used: --help must not wait for them
    from nemomodel.infer.evaluate import Losses, Stream
    from nemomodel.model.nemotron import Nemotron

USER_ERROR = 2
DTYPES = ("bfloat16", "float32", "float64")
MAX_DEFAULT_WINDOW = 8192
"""Published models take up to a million positions, which few machines have the memory for."""


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from nemomodel.checkpoint.files import CheckpointError

    try:
        check_output(args.json)
        result = args.run(args)
        if args.json:
            write_json(args.json, result)
        return 0
    except (ValueError, CheckpointError, FileNotFoundError, IsADirectoryError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("evaluate: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("perplexity", help="loss, perplexity and bits per byte of text")
    add_common(command, batch_size=8)
    add = command.add_argument
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("--data", type=Path, metavar="PREFIX", help="tokens of prepare_data.py")
    which.add_argument(
        "--text",
        nargs="+",
        metavar="FILE",
        help="text, one document per file; also folders, .jsonl, .parquet as in prepare_data.py",
    )
    add("--text-key", default="text", metavar="KEY", help="key of the text (default: %(default)s)")
    add("--eod-token", metavar="TOKEN", help="token that ends a document, if not a known one")
    add("--seq-length", type=int, metavar="N", help="window (default: the model's, 8192 at most)")
    add(
        "--stride",
        type=int,
        metavar="N",
        help="tokens from window to window; each token then has at least seq_length - stride "
        "tokens of context, if its document has (default: seq_length)",
    )
    add("--max-tokens", type=int, metavar="N", help="only the first tokens")
    command.set_defaults(run=run_perplexity)

    command = commands.add_parser("acceptance", help="how many MTP drafts the model accepts")
    add_common(command)
    add = command.add_argument
    add("--prompts", required=True, type=Path, metavar="FILE.jsonl", help='"prompt", "category"')
    add("--draft-length", type=int, metavar="N", help="drafts per pass (default: the MTP depths)")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="default: %(default)s")
    add("--temperature", type=float, default=0.0, metavar="T", help="default: 0, greedy")
    add("--top-p", type=float, default=1.0, metavar="P", help="default: %(default)s")
    add("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    command.set_defaults(run=run_acceptance)

    command = commands.add_parser("harness", help="tasks of lm-evaluation-harness (extra: eval)")
    add_common(command, batch_size=8)
    add = command.add_argument
    add("--tasks", required=True, metavar="A,B", help="names of tasks or groups")
    add("--include-path", metavar="DIR", help="folder of more tasks")
    add("--num-fewshot", type=int, metavar="N", help="examples in the prompt (default: the task's)")
    add("--limit", type=float, metavar="N", help="examples per task, below 1 a share of them")
    add("--max-length", type=int, metavar="N", help="longest input (default: that of the model)")
    add("--seed", type=int, default=0, metavar="N", help="of sampled text (default: %(default)s)")
    command.set_defaults(run=run_harness)
    return parser.parse_args(argv)


def add_common(command: argparse.ArgumentParser, *, batch_size: int | None = None) -> None:
    add = command.add_argument
    add("path", type=Path, metavar="PATH", help="the checkpoint")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json (default: that in PATH)")
    add("--dtype", choices=DTYPES, help="of weights and activations (default: the checkpoint's)")
    add("--device", default="cpu", metavar="NAME", help="cpu, cuda, ... (default: %(default)s)")
    add("--threads", type=int, metavar="N", help="CPU threads")
    add("--json", metavar="FILE", help="write the results; - prints them instead of a table")
    if batch_size:
        add("--batch-size", type=int, default=batch_size, metavar="N", help="default: %(default)s")


def run_perplexity(args: argparse.Namespace) -> dict[str, Any]:
    from nemomodel.data.token_bytes import token_bytes
    from nemomodel.infer.evaluate import evaluate
    from nemomodel.infer.progress import CountProgress
    from nemomodel.infer.text_format import context_length

    if args.eod_token and args.data:
        raise ValueError("--eod-token: tokens of --data have their end tokens already")
    set_up_torch(args)
    stream, tokenizer = open_stream(args)
    model = load_model(args)
    vocab_size = model.config.vocab_size
    bytes_V = token_bytes(tokenizer, vocab_size=vocab_size) if tokenizer else None
    seq_length = args.seq_length
    if seq_length is None:
        seq_length = min(context_length(args.path), MAX_DEFAULT_WINDOW)
    stride = seq_length if args.stride is None else args.stride
    total = min(len(stream.tokens) - 1, args.max_tokens or len(stream.tokens))
    with CountProgress("perplexity", total, unit="tokens") as bar:
        losses = evaluate(
            model,
            stream,
            seq_length=seq_length,
            stride=stride,
            batch_size=args.batch_size,
            max_tokens=args.max_tokens,
            token_bytes=bytes_V,
            on_tokens=bar.advance,
        )
    if args.json != "-":
        print_losses(losses)
    return {"seq_length": seq_length, "stride": stride, **losses.record()}


def open_stream(args: argparse.Namespace) -> "tuple[Stream, Path | None]":
    """What to score, and the tokenizer it was made with if that is known."""
    from nemomodel.checkpoint.huggingface.side_files import find_tokenizer
    from nemomodel.data.indexed import file_of
    from nemomodel.data.metadata import sha256_of
    from nemomodel.data.readers import open_inputs
    from nemomodel.data.tokenizer import end_token_id, load_tokenizer
    from nemomodel.infer.evaluate import encode_texts, open_tokens
    from nemomodel.infer.text_format import tokenizer_file

    if args.text:
        path = tokenizer_file(args.path, args.tokenizer)
        tokenizer = load_tokenizer(path)
        eod_id = end_token_id(tokenizer, name=args.eod_token)
        inputs = open_inputs(
            args.text, text_key=args.text_key, split="train", subset=None, streaming=False
        )
        texts = (document.text for source in inputs for document in source.documents())
        return encode_texts(", ".join(args.text), texts, tokenizer, eod_id=eod_id), path

    stream = open_tokens(args.data)
    if args.tokenizer:
        load_tokenizer(args.tokenizer)
        if stream.tokenizer_sha256 not in (None, sha256_of(args.tokenizer)):
            raise ValueError(f"{args.tokenizer}: is not the tokenizer {args.data} was made with")
        return stream, args.tokenizer
    beside = file_of(args.data, ".tokenizer.json")
    candidates = [path for path in (beside, find_tokenizer(args.path)) if path and path.is_file()]
    for path in candidates:
        if stream.tokenizer_sha256 == sha256_of(path):
            return stream, path
    print("no bits per byte: --tokenizer FILE names the tokenizer of the data", file=sys.stderr)
    return stream, None


def print_losses(losses: "Losses") -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("head", "tokens", "loss (nats)", "perplexity")
    for k, (loss, tokens) in enumerate(zip(losses.nats_per_token, losses.tokens, strict=True)):
        cells = (f"{loss:.4f}", f"{math.exp(loss):.4f}") if loss is not None else ("-", "-")
        table.add_row(f"MTP depth {k}" if k else "main", f"{tokens:,}", *cells)
    console = Console()
    console.print(table)
    if losses.bits_per_byte is not None:
        console.print(f"{losses.bits_per_byte:.4f} bits per byte of {losses.bytes:,} bytes")


def run_acceptance(args: argparse.Namespace) -> dict[str, Any]:
    from nemomodel.infer.acceptance import measure, read_prompts, summarize
    from nemomodel.infer.progress import CountProgress
    from nemomodel.infer.sampling import Sampling
    from nemomodel.infer.text_format import TextFormat

    set_up_torch(args)
    prompts = read_prompts(args.prompts)
    sampling = Sampling(args.temperature, args.top_p, args.seed)
    text = TextFormat.of(args.path, args.tokenizer)
    model = load_model(args)
    text.check_vocabulary(model.config.vocab_size)
    if args.draft_length is None:
        if model.config.mtp is None:
            raise ValueError(f"{args.path}: this model has no MTP heads to draft with")
        args.draft_length = model.config.mtp.num_depths
    with CountProgress("acceptance", len(prompts), unit="prompts") as bar:
        measured = measure(
            model,
            [(prompt.category, text.encode(prompt.text)) for prompt in prompts],
            max_new_tokens=args.max_new_tokens,
            stop_ids=text.end_ids,
            sampling=sampling,
            draft_length=args.draft_length,
            on_prompt=lambda: bar.advance(1),
        )
    summary = summarize(measured)
    if args.json != "-":
        print_acceptance(summary, args.draft_length)
    options = ("draft_length", "max_new_tokens", "temperature", "top_p", "seed")
    return {**{name: getattr(args, name) for name in options}, **summary}


def print_acceptance(summary: dict[str, Any], draft_length: int) -> None:
    from rich.console import Console
    from rich.table import Table

    rates = [f"rate {position}" for position in range(1, draft_length + 1)]
    table = Table("category", "prompts", "acceptance length", *rates, "tokens/s")

    def number(value: float | None, digits: int = 3) -> str:
        return "-" if value is None else f"{value:,.{digits}f}"

    rows = [*summary["categories"].items(), ("all prompts", summary["all"])]
    for name, part in rows:
        if name == "all prompts":
            table.add_section()
        cells = [number(part["acceptance_length"]), *map(number, part["acceptance_rate"])]
        table.add_row(name, str(part["prompts"]), *cells, number(part["tokens_per_s"], 1))
    table.add_row("macro average", "", number(summary["macro_average"]))
    console = Console()
    console.print(table)
    console.print("rate k: accepted drafts k per pass that accepted all drafts before k")


def run_harness(args: argparse.Namespace) -> dict[str, Any]:
    try:
        import lm_eval
    except ImportError:
        raise ValueError(
            "harness needs lm-eval; install the extra: pip install -e .[eval]"
        ) from None
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    tasks = [name.strip() for name in args.tasks.split(",")]
    manager = TaskManager(include_path=args.include_path)
    if missing := [name for name in tasks if name not in manager.all_tasks]:
        raise ValueError(f"--tasks: lm-eval has no {', '.join(missing)}")
    from nemomodel.infer.harness import HarnessModel

    set_up_torch(args)
    model = HarnessModel(
        args.path,
        tokenizer=args.tokenizer,
        max_length=args.max_length,
        batch_size=args.batch_size,
        dtype=args.dtype,
        device=args.device,
        seed=args.seed,
    )
    results = lm_eval.simple_evaluate(
        model=model,
        tasks=tasks,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        task_manager=manager,
        log_samples=False,
    )
    if args.json != "-":
        print(make_table(results))
        if results.get("groups"):
            print(make_table(results, "groups"))
    return results


def load_model(args: argparse.Namespace) -> "Nemotron":
    import torch

    import nemomodel

    dtype = getattr(torch, args.dtype) if args.dtype else None
    return nemomodel.load_model(args.path, dtype=dtype, device=args.device)


def set_up_torch(args: argparse.Namespace) -> None:
    import torch

    from nemomodel.infer.loading import check_device

    check_device(args.device)
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads={args.threads}: must be at least 1")
        torch.set_num_threads(args.threads)


def check_output(name: str | None) -> None:
    """Before any work: an evaluation may take hours, and its result needs a place."""
    if not name or name == "-":
        return
    path = Path(name).absolute()
    if path.is_dir():
        raise ValueError(f"--json={name}: is a folder; give a file")
    if not path.parent.is_dir():
        raise ValueError(f"--json={name}: its folder does not exist")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--json={name}: its folder cannot be written to")


def write_json(name: str, result: dict[str, Any]) -> None:
    """To standard output, or to a file that appears when it is complete."""
    text = json.dumps(result, indent=1, default=str) + "\n"
    if name == "-":
        print(text, end="")
        return
    path = Path(name)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
