"""Measure forward + backward against transformers' NemotronHForCausalLM, in CPU seconds.

    python tools/bench.py --peer transformers

Same weights, config and batch; the two alternate in one process, so that whatever else the
machine does meets both. Peak memory comes from a fresh process each, as the growth of the
resident set over the built models. transformers' clamp of dt (absent from the published model)
is lifted, and its logits must agree with ours before anything is timed.
"""

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from nemomodel.config.pattern import LayerKind
from nemomodel.config.schema import AttentionConfig, MambaConfig, ModelConfig, MoeConfig
from nemomodel.model.init import initialize
from nemomodel.model.nemotron import Nemotron

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
    from transformers import NemotronHConfig, NemotronHForCausalLM

    c = ours.config
    names = {LayerKind.MAMBA: "linear_attention", LayerKind.ATTENTION: "full_attention"}
    names |= {LayerKind.MOE: "moe", LayerKind.MLP: "mlp"}
    config = NemotronHConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        layers_block_type=[names[kind] for kind in c.layers],
        layer_norm_epsilon=c.norm_eps,
        num_attention_heads=c.attention.num_heads,
        num_key_value_heads=c.attention.num_kv_heads,
        head_dim=c.attention.head_dim,
        mamba_num_heads=c.mamba.num_heads,
        mamba_head_dim=c.mamba.head_dim,
        n_groups=c.mamba.num_groups,
        ssm_state_size=c.mamba.state_size,
        chunk_size=c.mamba.chunk_size,
        n_routed_experts=c.moe.num_experts,
        num_experts_per_tok=c.moe.top_k,
        moe_intermediate_size=c.moe.ffn_size,
        moe_latent_size=c.moe.latent_size,
        moe_shared_expert_intermediate_size=c.moe.shared_ffn_size,
        routed_scaling_factor=c.moe.routed_scaling_factor,
        use_cache=False,
    )
    model = NemotronHForCausalLM(config).to(dtype)
    for layer in model.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (0.0, float("inf"))
        if hasattr(layer.mixer, "gate"):  # .to(bf16) has rounded it; published files keep FP32
            layer.mixer.gate.e_score_correction_bias.data = torch.zeros(c.moe.num_experts)
    state = dict(ours.named_parameters())
    q, kv = (n * c.attention.head_dim for n in (c.attention.num_heads, c.attention.num_kv_heads))
    renamed = {}
    for name, value in state.items():
        for old, new in (
            ("embedding.", "model.embeddings."),
            ("blocks.", "model.layers."),
            ("final_norm.", "model.norm_f."),
            ("mixer.conv_weight", "mixer.conv1d.weight"),
            ("mixer.conv_bias", "mixer.conv1d.bias"),
            ("router.", "gate."),
            ("latent_down.", "fc1_latent_proj."),
            ("latent_up.", "fc2_latent_proj."),
            ("experts.fc1", "experts.up_proj"),
            ("experts.fc2", "experts.down_proj"),
            ("shared_expert.fc1", "shared_experts.up_proj"),
            ("shared_expert.fc2", "shared_experts.down_proj"),
        ):
            name = name.replace(old, new)
        if name.endswith("qkv_proj.weight"):
            for letter, part in zip("qkv", value.split([q, kv, kv]), strict=True):
                renamed[name.replace("qkv_proj", f"{letter}_proj")] = part
        elif "qkv" not in name and "out_proj" in name:
            layer = int(name.split(".")[2])
            attention = c.layers[layer] is LayerKind.ATTENTION
            renamed[name.replace("out_proj", "o_proj") if attention else name] = value
        else:
            renamed[name] = value.unsqueeze(1) if name.endswith("conv1d.weight") else value
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    missing = [name for name in missing if not name.endswith("e_score_correction_bias")]
    assert missing == unexpected == [], (missing, unexpected)
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

    if which in ("ours", "both"):
        run["ours"] = step_ours
    if which in ("transformers", "both"):
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
    run = steps(shape, dtype, "both")
    losses = {name: step().item() for name, step in run.items()}
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    if abs(losses["ours"] - losses["transformers"]) > limit * losses["transformers"]:
        raise SystemExit(f"the two models disagree: {losses}")
    seconds: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(rounds):
        for name, step in run.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory(shape_name: str, dtype_name: str, which: str) -> float:
    """MiB that two steps add to the resident set of a fresh process."""
    command = [sys.executable, __file__, "--child", which, shape_name, dtype_name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def child(which: str, shape_name: str, dtype_name: str) -> None:
    (step,) = steps(SHAPES[shape_name], DTYPES[dtype_name], which).values()
    before = peak_resident()
    step()
    step()
    print((peak_resident() - before) / 1024)


def peak_resident() -> int:
    """KiB. Not ru_maxrss: that one starts at the parent's peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", choices=["transformers"], help="what to compare with")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each (median)")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads; with more than one, threads that wait spin and count as work",
    )
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    torch.set_num_threads(args.threads)
    import transformers

    table = Table(
        title=f"forward + backward, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, {torch.get_num_threads()} CPU threads"
    )
    for column in (
        "shape",
        "dtype",
        "ours, CPU s",
        "peer, CPU s",
        "speed-up",
        "ours, MiB",
        "peer, MiB",
    ):
        table.add_column(column, justify="right")
    for shape in args.shapes:
        for dtype in args.dtypes:
            seconds = compare_time(SHAPES[shape], DTYPES[dtype], args.rounds)
            memory = {w: peak_memory(shape, dtype, w) for w in ("ours", "transformers")}
            ratio = seconds["transformers"] / seconds["ours"]
            table.add_row(
                shape,
                dtype,
                f"{seconds['ours']:.3f}",
                f"{seconds['transformers']:.3f}",
                f"{ratio:.2f}x",
                f"{memory['ours']:.0f}",
                f"{memory['transformers']:.0f}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
