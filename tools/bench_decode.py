"""Measure cached decoding against another package on this machine.

    python tools/bench_decode.py --peer transformers [--shapes tiny small large]

Same weights, prompt and greedy choice; the two alternate in one process, so that whatever else
the machine does meets both. In FP32 they must give the same tokens before anything is timed.
What is timed is the whole `generate`, prompt included. `small` and `large` are the shapes of
tools/bench.py, `tiny` is the model of configs/tiny.toml; none has MTP heads here. Drafting is
measured by tools/generate.py --compare, with a trained model.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench import SHAPES, Shape, build_ours, build_theirs
from rich.console import Console
from rich.table import Table

from nemomodel.config.load import load_config
from nemomodel.infer.generate import generate
from nemomodel.model.nemotron import DTYPES

TINY = Path(__file__).parents[1] / "configs" / "tiny.toml"


def shape_of(name: str) -> Shape:
    return Shape(load_config(TINY).model, batch=1, length=256) if name == "tiny" else SHAPES[name]


def decoders(
    shape: Shape, dtype: torch.dtype, *, prompt_length: int, new_tokens: int
) -> dict[str, Callable[[], list[int]]]:
    """Closures that continue one prompt and return the new tokens."""
    ours = build_ours(shape, dtype).eval()
    with torch.no_grad():  # away from ties: random weights of small scale make flat logits
        ours.lm_head.weight.mul_(20)
    theirs = build_theirs(ours, dtype).eval()
    prompt = torch.randint(
        shape.model.vocab_size, (1, prompt_length), generator=torch.Generator().manual_seed(0)
    )

    def decode_ours() -> list[int]:
        return generate(ours, prompt.tolist(), max_new_tokens=new_tokens)[0].tokens

    def decode_theirs() -> list[int]:
        output = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            use_cache=True,
            pad_token_id=0,
            eos_token_id=None,
        )
        return output[0, prompt_length:].tolist()

    return {"ours": decode_ours, "transformers": decode_theirs}


def compare(
    run: dict[str, Callable[[], list[int]]], rounds: int, *, exact: bool
) -> tuple[dict[str, float], ...]:
    """Median CPU seconds and median wall seconds of each, alternating."""
    tokens = {name: decode() for name, decode in run.items()}
    if exact and tokens["ours"] != tokens["transformers"]:
        raise SystemExit(f"the two disagree: {tokens}")
    cpu, wall = ({name: [] for name in run} for _ in range(2))
    for _ in range(rounds):
        for name, decode in run.items():
            start = time.process_time(), time.perf_counter()
            decode()
            cpu[name].append(time.process_time() - start[0])
            wall[name].append(time.perf_counter() - start[1])
    return tuple({n: statistics.median(t) for n, t in times.items()} for times in (cpu, wall))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", choices=["transformers"], required=True)
    parser.add_argument("--shapes", nargs="+", choices=["tiny", *SHAPES], default=["tiny", *SHAPES])
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32"])
    parser.add_argument("--prompt-length", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each (median)")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    import transformers

    transformers.logging.set_verbosity_error()
    table = Table(
        title=f"greedy decoding, {args.prompt_length} + {args.new_tokens} tokens, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"CPU threads: {args.threads}"
    )
    for column in ("shape", "dtype", "ours", "peer", "speed-up", "ours", "peer"):
        table.add_column(column, justify="right")
    table.add_row("", "", "CPU s", "CPU s", "", "tokens/s", "tokens/s")
    for name in args.shapes:
        for dtype in args.dtypes:
            run = decoders(
                shape_of(name),
                DTYPES[dtype],
                prompt_length=args.prompt_length,
                new_tokens=args.new_tokens,
            )
            cpu, wall = compare(run, args.rounds, exact=dtype == "fp32")
            rate = {which: args.new_tokens / seconds for which, seconds in wall.items()}
            table.add_row(
                name,
                dtype,
                f"{cpu['ours']:.3f}",
                f"{cpu['transformers']:.3f}",
                f"{cpu['transformers'] / cpu['ours']:.2f}x",
                f"{rate['ours']:.0f}",
                f"{rate['transformers']:.0f}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
