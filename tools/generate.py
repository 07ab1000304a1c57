"""Continue a text with a model.

    python tools/generate.py runs/tiny --prompt "def main(" --draft-length 2

The text comes on standard output while it is made, statistics on standard error at the end. The
prompt is that of --prompt or --prompt-file, each of which may be given several times, or else
standard input. --compare also measures decoding without drafts.
"""

import argparse
import json
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported where used: --help must not wait for them
    from collections.abc import Callable

    from tokenizers import Tokenizer

    from nemomodel.infer.generate import Generation, OnToken

USER_ERROR = 2
COMPARISONS = 3


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from nemomodel.checkpoint.files import CheckpointError

    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"generate: {message}", file=sys.stderr)
        try:
            return run(args)
        except (ValueError, OSError, CheckpointError) as error:
            print(f"generate: {error}", file=sys.stderr)
            return USER_ERROR
        except KeyboardInterrupt:
            return 128 + signal.SIGINT


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("path", metavar="PATH", help="run folder, step folder or Hugging Face folder")
    add("--prompt", action="append", default=[], metavar="TEXT", help="text to continue")
    add("--prompt-file", action="append", default=[], type=Path, metavar="FILE", help="UTF-8 file")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json; default: that of PATH")
    add("--max-new-tokens", type=int, default=128, metavar="N")
    add("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    add("--top-p", type=float, default=1.0, help="smallest likely set (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--draft-length", type=int, default=0, metavar="K", help="tokens the MTP heads draft")
    add("--compare", action="store_true", help="also run without drafts and print the speed-up")
    add("--dtype", choices=["bfloat16", "float32", "float64"], help="default: that of PATH")
    add("--device", default="cpu")
    add("--threads", type=int, help="CPU threads")
    add("--json", action="store_true", help="one JSON line per prompt in place of the text")
    args = parser.parse_args(argv)
    if args.compare and not args.draft_length:
        parser.error("--compare: there are no drafts to compare with; give --draft-length")
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads={args.threads}: must be at least 1")
    return args


@dataclass
class Result:
    prompt: str
    text: str
    generation: "Generation"
    seconds: float


def run(args: argparse.Namespace) -> int:
    from nemomodel.infer.generate import Sampling, generate
    from nemomodel.infer.loading import check_checkpoint, check_device, read_text

    check_checkpoint(args.path)
    sampling = Sampling(args.temperature, args.top_p, args.seed)
    prompts = [*args.prompt, *map(read_text, args.prompt_file)]
    prompts = prompts or [sys.stdin.read()]

    import torch

    import nemomodel

    check_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    tokenizer, stop_ids = load_tokenizer(args)
    prompt_ids = [tokenizer.encode(prompt).ids for prompt in prompts]
    if "" in prompts or [] in prompt_ids:
        raise ValueError("--prompt: it is empty; give some text to continue")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    model = nemomodel.load_model(args.path, dtype=dtype, device=args.device)

    def decode(ids: list[int], draft_length: int, on_token: "OnToken | None") -> "Generation":
        (generation,) = generate(
            model,
            [ids],
            max_new_tokens=args.max_new_tokens,
            stop_ids=stop_ids,
            sampling=sampling,
            draft_length=draft_length,
            on_token=on_token,
        )
        return generation

    results = []
    for prompt, ids in zip(prompts, prompt_ids, strict=True):
        results.append(show(prompt, ids, tokenizer, stop_ids, args, decode))
    report([r.generation for r in results], sum(r.seconds for r in results))
    if args.compare:
        return compare(prompt_ids, args, decode)
    return 0


def load_tokenizer(args: argparse.Namespace) -> "tuple[Tokenizer, list[int]]":
    """The tokenizer and the ids of its end tokens."""
    from nemomodel.checkpoint.huggingface.side_files import end_token_ids, find_tokenizer
    from nemomodel.data.tokenizer import end_token_id, load_tokenizer

    path = args.tokenizer or find_tokenizer(args.path)
    if path is None:
        raise ValueError(f"{args.path}: holds no tokenizer.json; give --tokenizer FILE")
    tokenizer = load_tokenizer(path)
    stop_ids = end_token_ids(args.path)
    return tokenizer, stop_ids or [end_token_id(tokenizer, name=None)]


def show(
    prompt: str,
    ids: list[int],
    tokenizer: "Tokenizer",
    stop_ids: list[int],
    args: argparse.Namespace,
    decode: "Callable[..., Generation]",
) -> Result:
    """Decode one prompt and write its text as it comes."""
    from nemomodel.infer.text import TextStream

    stream, pieces = TextStream(tokenizer), []

    def write(text: str) -> None:
        pieces.append(text)
        if not args.json:
            sys.stdout.write(text)
            sys.stdout.flush()

    def on_token(_: int, token: int) -> None:
        if token not in stop_ids:
            write(stream.add(token))

    start = time.perf_counter()
    generation = decode(ids, args.draft_length, on_token)
    seconds = time.perf_counter() - start
    write(stream.close())
    result = Result(prompt, "".join(pieces), generation, seconds)
    print(json.dumps(as_record(result)) if args.json else "")
    return result


def as_record(result: Result) -> dict:
    g = result.generation
    return {
        "prompt": result.prompt,
        "text": result.text,
        "tokens": g.tokens,
        "stopped": g.stopped,
        "seconds": result.seconds,
        "passes": g.passes,
        "drafted": g.drafted,
        "accepted": g.accepted,
        "acceptance_length": g.acceptance_length,
    }


def report(generations: "list[Generation]", seconds: float) -> None:
    """Statistics of all prompts together, on standard error."""
    tokens, passes = sum(len(g.tokens) for g in generations), sum(g.passes for g in generations)
    line = f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s"
    if any(g.drafted for g in generations) and passes:
        line += f"; acceptance length {(tokens - len(generations)) / passes:.2f}"
        drafted, accepted = (
            [sum(counts) for counts in zip(*columns, strict=True)]
            for columns in ([g.drafted for g in generations], [g.accepted for g in generations])
        )
        rates = [f"{a / d:.2f}" if d else "-" for a, d in zip(accepted, drafted, strict=True)]
        line += f"; accepted at draft position {', '.join(rates)}"
    print(line, file=sys.stderr)


def compare(
    prompt_ids: list[list[int]], args: argparse.Namespace, decode: "Callable[..., Generation]"
) -> int:
    """Decode with and without drafts in turn; 1 if greedy outputs differ, else 0."""
    warnings.simplefilter("ignore")  # what it has to say was said in the run before
    outputs: dict[int, list[list[int]]] = {0: [], args.draft_length: []}
    best: dict[tuple[int, int], float] = {}  # seconds by draft length and prompt
    for _ in range(COMPARISONS):
        for prompt, ids in enumerate(prompt_ids):
            for length, tokens in outputs.items():
                start = time.perf_counter()
                tokens.append(decode(ids, length, None).tokens)
                seconds = time.perf_counter() - start
                best[length, prompt] = min(seconds, best.get((length, prompt), seconds))
    plain_rate, drafted_rate = (
        sum(map(len, tokens[: len(prompt_ids)]))
        / sum(best[length, prompt] for prompt in range(len(prompt_ids)))
        for length, tokens in outputs.items()
    )
    plain, drafted = outputs.values()
    line = f"without drafts {plain_rate:.1f} tokens/s, with {drafted_rate:.1f}: "
    line += f"{drafted_rate / plain_rate:.2f} times as fast (best of {COMPARISONS} each)"
    if args.temperature:
        print(f"{line}; outputs are drawn at random", file=sys.stderr)
        return 0
    same = plain == drafted
    print(f"{line}; outputs {'are identical' if same else 'DIFFER'}", file=sys.stderr)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
