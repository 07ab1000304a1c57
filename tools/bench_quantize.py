"""Measure the quantiser of NVFP4 and a quantised training step on this machine.

    python tools/bench_quantize.py --operands     quantise + dequantise 4096 x 4096 BF16 numbers
    python tools/bench_quantize.py --step         a step with BF16 and with nvfp4_super

CPU seconds, medians, everything that is compared alternating in one process. --operands uses
transparent huge pages, and other packages where they are installed: torchao's NVFP4, compiled, and
the Python reference of Transformer Engine. --step is forward, backward and AdamW with FP32 masters
on the shapes of tools/bench.py; peak memory comes from a fresh process each, as the growth of the
resident set from before the model is built.
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from bench import SHAPES, Shape, alternate, build_ours, peak_memory, peak_resident
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nemomodel.config.precision import Phase
from nemomodel.model.quantize import Quantization
from nemomodel.quant.operand import OperandFormat, quantize_operand, quantize_plain
from nemomodel.quant.rounding import stream_key

OPERANDS = (
    OperandFormat("nvfp4", "columns"),
    OperandFormat("nvfp4", "both"),
    OperandFormat("nvfp4", "columns", stochastic=True),
    OperandFormat("nvfp4", "rows", hadamard=True),
    OperandFormat("nvfp4", "rows", stochastic=True, hadamard=True),
    OperandFormat("mxfp8", "columns"),
    OperandFormat("mxfp8", "rows"),
)
RECIPES = ("bf16", "nvfp4_super")


def torchao_compiled() -> Callable[[Tensor], Tensor]:
    from torchao.prototype.mx_formats.nvfp4_tensor import (
        NVFP4Tensor,
        per_tensor_amax_to_scale,
    )

    @torch.compile
    def run(x: Tensor) -> Tensor:
        scale = per_tensor_amax_to_scale(x.abs().amax())
        return NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(x.dtype)

    return run


def transformer_engine_reference() -> Callable[[Tensor], Tensor]:
    import transformer_engine.pytorch  # noqa: F401, its subpackages need it
    from transformer_engine.pytorch.custom_recipes import reference_nvfp4 as reference
    from transformer_engine.pytorch.custom_recipes.reference_utils import Fp4Formats

    quantizer = reference.NVFP4QuantizerRef(Fp4Formats.E2M1, columnwise=False)

    def run(x: Tensor) -> Tensor:
        q = quantizer.quantize(x)
        values = reference.cast_from_fp4x2(q.data, torch.float32).unflatten(1, (-1, 16))
        scales = q.scale.float() * (q.global_amax_row / 2688)
        return (values * scales.unsqueeze(-1)).flatten(1).to(x.dtype)

    return run


PEERS = {
    "torchao": ("torchao, compiled", torchao_compiled),
    "transformer_engine": ("Transformer Engine's Python reference", transformer_engine_reference),
}


def measure(run: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """`alternate`, after a call of each that compiles."""
    for call in run.values():
        call()
    return alternate(run, rounds)


def print_operands(rounds: int) -> None:
    x = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    run: dict[str, Callable[[], object]] = {}
    for format in OPERANDS:
        key = stream_key(0) if format.stochastic else None
        run[str(format)] = lambda f=format, k=key: quantize_operand(x, f, key=k)
    run["nvfp4 1x16, plain PyTorch"] = lambda: quantize_plain(x, OPERANDS[0])
    for package, (name, make) in PEERS.items():
        try:
            peer = make()
            peer(x)
        except (ImportError, RuntimeError, AttributeError, TypeError) as error:
            print(f"{name}: skipped ({type(error).__name__}: {str(error).splitlines()[0]})")
        else:
            version = getattr(sys.modules[package], "__version__", "")
            run[f"{name} {version}"] = lambda peer=peer: peer(x)
    table = Table(
        title=f"quantise + dequantise 4096 x 4096 BF16, 1 thread, torch {torch.__version__}"
    )
    for column in ("format", "CPU ms", "times 1x16"):
        table.add_column(column, justify="right")
    seconds = measure(run, rounds)
    for name, each in seconds.items():
        table.add_row(name, f"{each * 1e3:.1f}", f"{each / seconds[str(OPERANDS[0])]:.1f}")
    Console().print(table)


def training_step(shape: Shape, recipe: str) -> Callable[[], Tensor]:
    """Forward, backward, and AdamW on FP32 copies of the weights."""
    torch.manual_seed(0)
    model = build_ours(shape, torch.bfloat16)
    quantization = Quantization([model], [Phase("precision", 0, 1, recipe, None)], seed=0)
    ids_BS = torch.randint(shape.model.vocab_size, (shape.batch, shape.length))
    mask_BS = torch.ones_like(ids_BS, dtype=torch.bool)
    mask_BS[:, -1] = False
    params = list(model.parameters())
    masters = [p.detach().float() for p in params]
    for param, master in zip(params, masters, strict=True):
        param.main_grad = master.grad = torch.zeros_like(master)
    optimizer = torch.optim.AdamW(masters, lr=1e-4, foreach=False)
    step = 0

    def run() -> Tensor:
        nonlocal step
        step += 1
        quantization.begin(step, 0)
        loss = model.loss(ids_BS, ids_BS.roll(-1, 1), mask_BS)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for param, master in zip(params, masters, strict=True):
                param.copy_(master)
                master.grad.zero_()
        return loss

    return run


def child(shape_name: str, recipe: str) -> None:
    """Print the MiB that model and steps add to the resident set."""
    # What the compiler takes is no memory of a step, and what it gives back serves both recipes.
    for format in OPERANDS:
        key = stream_key(0) if format.stochastic else None
        quantize_operand(torch.randn(384, 512).bfloat16(), format, key=key)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at what is resident now
    before = peak_resident()
    run = training_step(SHAPES[shape_name], recipe)
    for _ in range(3):
        run()
    print((peak_resident() - before) / 1024)


def print_steps(shapes: list[str], rounds: int) -> None:
    table = Table(
        title=f"training step, {torch.get_num_threads()} thread, torch {torch.__version__}"
    )
    for column in ("shape", *(f"{r}, CPU s" for r in RECIPES), "ratio"):
        table.add_column(column, justify="right")
    for column in (*(f"{r}, MiB" for r in RECIPES), "ratio"):
        table.add_column(column, justify="right")
    for name in shapes:
        steps = {recipe: training_step(SHAPES[name], recipe) for recipe in RECIPES}
        seconds = list(measure(steps, rounds).values())
        del steps
        memory = [peak_memory(__file__, name, recipe) for recipe in RECIPES]
        table.add_row(
            name,
            *(f"{each:.3f}" for each in seconds),
            f"{seconds[1] / seconds[0]:.2f}x",
            *(f"{each:.0f}" for each in memory),
            f"{memory[1] / memory[0]:.2f}x",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--operands", action="store_true", help="measure the quantiser")
    what.add_argument("--step", action="store_true", help="measure training steps")
    what.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each (median)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.child:
        child(*args.child)
    elif args.step:
        print_steps(args.shapes, args.rounds)
    elif os.environ.get("THP_MEM_ALLOC_ENABLE") != "1":  # torch reads it once, at the start
        os.execve(
            sys.executable, [sys.executable, *sys.argv], os.environ | {"THP_MEM_ALLOC_ENABLE": "1"}
        )
    else:
        print_operands(args.rounds)


if __name__ == "__main__":
    main()
