"""Measure the speed of this project on this machine.

    python tools/bench.py --peer transformers       forward + backward against
                                                    NemotronHForCausalLM, in CPU seconds
    python tools/bench.py --train CONFIG [key=value ...]    start-up, tokens/s, overhead, memory
    python tools/bench.py --imports                 import times

--peer: same weights, config and batch; ours as it stands, ours with train.compile and theirs
alternate in one process, so that whatever else the machine does meets all. Peak memory comes from
a fresh process each, as the growth of the resident set over the built models. transformers' clamp
of dt (absent from the published model) is lifted, and its loss must agree with ours before anything
is timed. The shapes keep the proportions of Nemotron 3 Super: inner width 2 x hidden, 16 heads or
fewer per group, expert width 0.66 x hidden, shared expert twice that.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nemomodel.checkpoint.huggingface.config import config_json
from nemomodel.checkpoint.huggingface.names import entries
from nemomodel.config.schema import AttentionConfig, MambaConfig, ModelConfig, MoeConfig
from nemomodel.model.init import initialize
from nemomodel.model.nemotron import DTYPES, Nemotron
from nemomodel.ops.fused import use_compiler


@dataclass(frozen=True)
class Shape:
    model: ModelConfig
    batch: int
    length: int


SMALL = Shape(
    ModelConfig(
        layer_pattern="MEM*EMEM",
        hidden_size=256,
        vocab_size=4096,
        mamba=MambaConfig(num_heads=8, head_dim=64, num_groups=1, state_size=64),
        attention=AttentionConfig(num_heads=8, num_kv_heads=2, head_dim=32),
        moe=MoeConfig(
            num_experts=16,
            top_k=4,
            ffn_size=176,
            shared_ffn_size=352,
            latent_size=64,
            routed_scaling_factor=2.5,
            aux_loss_coeff=0.0,
        ),
    ),
    batch=2,
    length=512,
)

LARGE = Shape(
    ModelConfig(
        layer_pattern="MEMEMEM*EMEMEM*E",
        hidden_size=512,
        vocab_size=8192,
        mamba=MambaConfig(num_heads=16, head_dim=64, num_groups=1, state_size=128),
        attention=AttentionConfig(num_heads=8, num_kv_heads=2, head_dim=64),
        moe=MoeConfig(
            num_experts=64,
            top_k=8,
            ffn_size=336,
            shared_ffn_size=672,
            latent_size=128,
            routed_scaling_factor=5.0,
            aux_loss_coeff=0.0,
        ),
    ),
    batch=1,
    length=1024,
)

SHAPES = {"small": SMALL, "large": LARGE}


def build_ours(shape: Shape, dtype: torch.dtype) -> Nemotron:
    model = Nemotron(replace(shape.model, mtp=None), dtype=dtype)
    initialize(model, seed=0)
    return model


def build_theirs(ours: Nemotron, dtype: torch.dtype) -> torch.nn.Module:
    """The transformers model with the weights of `ours`."""
    from safetensors.torch import save_file
    from transformers import NemotronHForCausalLM

    c, state = ours.config, ours.state_dict()
    tensors = {
        piece.name: part.clone()
        for entry in entries(c, state)
        for piece, part in entry.split(state[entry.name])
    }
    name = str(dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})
        raw = config_json(c, vocab_size=c.vocab_size, dtype=name, carried={"use_cache": False})
        Path(folder, "config.json").write_text(json.dumps(raw))
        model = NemotronHForCausalLM.from_pretrained(folder, dtype=dtype)
    for layer in model.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (0.0, float("inf"))
    return model


def steps(shape: Shape, dtype: torch.dtype, which: str) -> dict[str, Callable[[], Tensor]]:
    """Closures that run one forward and backward pass and return the loss."""
    torch.manual_seed(0)
    ids_BS = torch.randint(shape.model.vocab_size, (shape.batch, shape.length))
    labels_BS, mask_BS = ids_BS.roll(-1, 1), torch.ones_like(ids_BS, dtype=torch.bool)
    mask_BS[:, -1] = False
    ours = build_ours(shape, dtype)
    run: dict[str, Callable[[], Tensor]] = {}

    def step_ours() -> Tensor:
        ours.zero_grad()
        loss = ours.loss(ids_BS, labels_BS, mask_BS)
        loss.backward()
        return loss

    def step_compiled() -> Tensor:
        use_compiler()
        try:
            return step_ours()
        finally:
            use_compiler(False)

    if which in ("ours", "all"):
        run["ours"] = step_ours
    if which == "all":
        run["compiled"] = step_compiled
    if which in ("transformers", "all"):
        theirs = build_theirs(ours, dtype).train()

        def step_theirs() -> Tensor:
            theirs.zero_grad()
            loss = theirs(ids_BS, labels=ids_BS).loss
            loss.backward()
            return loss

        run["transformers"] = step_theirs
    return run


def compare_time(shape: Shape, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Median CPU seconds per step of each, alternating."""
    run = steps(shape, dtype, "all")
    losses = {name: step().item() for name, step in run.items()}
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    if max(losses.values()) - min(losses.values()) > limit * losses["transformers"]:
        raise SystemExit(f"the models disagree: {losses}")
    return alternate(run, rounds)


def alternate(run: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each, all in turn; a first call that compiles comes before.

    Every other round goes backwards, so that none always comes after the same one: what a call
    leaves in caches, oneDNN's of the last 1024 kernels too, matters to the next.
    """
    seconds: dict[str, list[float]] = {name: [] for name in run}
    for i in range(rounds):
        for name, call in (reversed if i % 2 else list)(run.items()):
            start = time.process_time()
            call()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory(script: str, *arguments: str) -> float:
    """MiB that `script --child ...` prints in a fresh process."""
    command = [sys.executable, script, "--child", *arguments]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def child(which: str, shape_name: str, dtype_name: str) -> None:
    """Print the MiB that two steps add to the resident set."""
    (step,) = steps(SHAPES[shape_name], DTYPES[dtype_name], which).values()
    before = peak_resident()
    step()
    step()
    print((peak_resident() - before) / 1024)


def peak_resident() -> int:
    """KiB. Not ru_maxrss: that one starts at the parent's peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def print_comparison(shapes: list[str], dtypes: list[str], rounds: int) -> None:
    import transformers

    table = Table(
        title=f"forward + backward, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, CPU threads: {torch.get_num_threads()}"
    )
    for column in ("shape", "dtype", "", "CPU s", "speed-up", "peak MiB"):
        table.add_column(column, justify="right")
    for shape in shapes:
        for dtype in dtypes:
            seconds = compare_time(SHAPES[shape], DTYPES[dtype], rounds)
            for which, its in seconds.items():
                speed = f"{its:.3f}", f"{seconds['transformers'] / its:.2f}x"
                # The compiler's own memory would hide that of the step.
                compiled = which == "compiled"
                memory = "" if compiled else f"{peak_memory(__file__, which, shape, dtype):.0f}"
                table.add_row(shape, dtype, which, *speed, memory)
    Console().print(table)


def seconds_of(code: str) -> float:
    """Best of three wall times of `python -c code`."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return min(times)


def measure_training(config: str, num_steps: int, overrides: list[str]) -> None:
    """Start-up, speed and overhead of a real run from a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        metrics = Path(folder) / "metrics.jsonl"
        command = [sys.executable, "train.py", config, *overrides, f"run.dir={folder}"]
        command += [f"train.stop_after={num_steps}", f"observe.log_interval={num_steps // 2}"]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.05)
        first_step = time.perf_counter() - start
        if process.wait():
            raise SystemExit(f"exit code {process.returncode}: {' '.join(command)}")
        record = json.loads(metrics.read_text().splitlines()[-1])
    print(f"start of the process to the end of step 1: {first_step:.1f} s")
    for name in ("tokens_per_s", "step_s", "mfu", "overhead_fraction", "memory_gb"):
        if (value := record.get(f"perf/{name}")) is not None:
            print(f"perf/{name}, steps {num_steps // 2 + 1} to {num_steps}: {value:.4g}")


def measure_imports() -> None:
    torch_alone = seconds_of("import torch")
    for name in ("nemomodel", "nemomodel.model.nemotron", "nemomodel.train.loop"):
        print(f"import {name}: {seconds_of(f'import torch, {name}') - torch_alone:.2f} s", end=" ")
        print(f"beyond torch ({torch_alone:.2f} s)")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--peer", choices=["transformers"], help="compare with this package")
    what.add_argument("--train", metavar="CONFIG", help="measure a run of the trainer")
    what.add_argument("--imports", action="store_true", help="measure import times")
    what.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each (median)")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads of --peer; of several, those that wait spin and count as work",
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument(
        "--steps", type=int, default=40, help="steps of --train, the last half timed"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for --train")
    args = parser.parse_args()
    if args.child:
        child(*args.child)
    elif args.train:
        measure_training(args.train, args.steps, args.overrides)
    elif args.imports:
        measure_imports()
    else:
        torch.set_num_threads(args.threads)
        print_comparison(args.shapes, args.dtypes, args.rounds)


if __name__ == "__main__":
    main()
