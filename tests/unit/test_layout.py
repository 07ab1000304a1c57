"""What --describe says of a layout, against built models and numbers worked out by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nemomodel.config.layout import fewest_ranks
from nemomodel.config.load import load_config
from nemomodel.config.schema import Config
from nemomodel.model.layout import describe_layout
from nemomodel.model.nemotron import DTYPES, Nemotron
from nemomodel.model.portion import Portion
from nemomodel.model.traffic import pipeline_bytes, step_traffic
from nemomodel.parallel.mesh import Axis, Mesh
from nemomodel.parallel.shard import is_expert

ROOT = Path(__file__).parents[2]


def load(name: str, layout: str = "", *overrides: str) -> Config:
    axes = [f"parallel.{axis}" for axis in layout.split()]
    return load_config(ROOT / f"configs/{name}.toml", [*axes, *overrides])


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("super_120b", "tp=8 ep=16"),
        ("super_120b", "tp=2 cp=2 pp=4 ep=64"),
        ("super_120b", "ep=8 etp=4"),
        ("nano_4b", "tp=4 pp=2"),
        ("nano_30b", "tp=4 cp=2 ep=8"),
        ("ultra_550b", "tp=8 pp=6 vpp=2 ep=32"),
    ],
)
def test_parameters_and_their_bytes_are_those_of_the_built_stages(name: str, layout: str) -> None:
    config = load(name, layout)
    p, described = config.parallel, describe_layout(config, fewest_ranks(config))
    mesh = Mesh(
        tp=Axis(size=p.tp),
        cp=Axis(size=p.cp),
        pp=Axis(size=p.pp),
        ep=Axis(size=p.ep),
        etp=Axis(size=p.etp),
        positions=Axis(size=p.tp * p.cp),
    )
    portion = Portion(config, fewest_ranks(config))
    for stages, row in zip(portion.stages, described["pipeline_ranks"], strict=True):
        dtype = DTYPES[config.precision.weights]
        with torch.device("meta"):
            models = [Nemotron(config.model, dtype=dtype, mesh=mesh, stage=s) for s in stages]
        built = [param for model in models for param in model.parameters()]
        experts = sum(p.numel() for p in built if is_expert(p))
        assert row["parameters"]["experts"] == experts
        assert row["parameters"]["dense"] == sum(p.numel() for p in built) - experts
        assert row["memory_bytes"]["weights"] == sum(p.nbytes for p in built)
        uncut = sum(p.numel() for p in built if p.sequence_parallel)
        sent = row["communication_bytes"].get("tp", {}).get("gradients of uncut parameters", 0)
        assert sent == round(2 * 4 * uncut * (p.tp - 1) / p.tp)


def test_stages_add_up_and_no_rank_holds_what_another_stage_has() -> None:
    config = load("super_120b", "pp=4 ep=8")
    described = describe_layout(config, 64)
    stages = described["pipeline_ranks"]
    held = [stage for row in stages for stage in row["stages"]]
    assert "".join(stage["layer_pattern"] for stage in held) == config.model.letters
    assert sum(row["flops_share"] for row in stages) == pytest.approx(1)
    whole = describe_layout(load("super_120b"), 1)["pipeline_ranks"][0]["parameters"]
    assert sum(row["parameters"]["dense"] for row in stages) == whole["dense"]
    assert sum(row["parameters"]["experts"] for row in stages) * 8 == whole["experts"]
    assert [stage["micro_batches_in_flight"] for stage in held] == [4, 3, 2, 1]
    assert described["bubble_share"] == 3 / (3072 // 16 + 3)
    largest = max(row["memory_bytes"]["total"] for row in stages)
    assert described["largest"]["memory_bytes"] == largest


def test_interleaved_stages_wait_less_and_keep_more() -> None:
    """Rank 1 of 4 with two stages starts 2 x 2 + 4 + 1 passes before the first comes back."""
    described = describe_layout(load("super_120b", "pp=4 vpp=2 ep=8"), 32)
    stages = [row["stages"] for row in described["pipeline_ranks"]]
    assert described["bubble_share"] == 3 / (2 * 3072 // 8 + 3)
    assert [stage["micro_batches_in_flight"] for stage in stages[1]] == [5, 4]
    assert [stage["micro_batches_in_flight"] for stage in stages[3]] == [4, 1]
    in_order = sorted((stage["first_block"], r) for r, row in enumerate(stages) for stage in row)
    assert [rank for _, rank in in_order] == [0, 1, 2, 3, 0, 1, 2, 3]


def test_optimizer_state_is_cut_over_the_ranks_with_the_same_weights() -> None:
    """12 bytes per parameter of BF16 weights: dense over 64 ranks, experts over 64 / 8."""
    (row,) = describe_layout(load("super_120b", "ep=8"), 64)["pipeline_ranks"]
    dense, experts = row["parameters"]["dense"], row["parameters"]["experts"]
    memory = row["memory_bytes"]
    expected = 12 * (dense / 64 + experts / 8)
    assert memory["main_weights"] + memory["moments"] == pytest.approx(expected, rel=1e-9)
    assert memory["gradients"] == 4 * (dense + experts)


def test_bytes_of_super_by_hand() -> None:
    """8,192 tokens of width 4,096 in BF16, 22 of 512 experts at width 1,024, on eight ranks."""
    (stages,) = (portion := Portion(load("super_120b", "ep=8"), 8)).stages
    passes, micro_batches, away = 40 + 2, 3072 // 8, 7 / 8
    copies = passes * micro_batches * 8192 * 22
    sizes = step_traffic(portion, stages)["ep"]
    assert sizes["tokens to experts"] == sizes["experts to tokens"]
    assert sizes["tokens to experts"] == 2 * copies * 1024 * 2 * away
    assert sizes["gates"] == 2 * copies * 4 * away
    assert sizes["counts"] == passes * micro_batches * 512 * 8 * away
    plain = load("super_120b", "ep=8", "model.moe.latent_size=none")
    wide = step_traffic(Portion(plain, 8), stages)["ep"]["tokens to experts"]
    assert wide == 4 * sizes["tokens to experts"]
    # Hidden states and embeddings, and the embeddings of two tokens that MTP looks ahead to.
    staged = Portion(load("super_120b", "tp=8 ep=8 pp=2"), 16)
    assert pipeline_bytes(staged) == 2 * 4096 * (2 * 1024 + 2)


def test_recomputation_keeps_the_inputs_of_blocks_and_one_block_whole() -> None:
    recompute = 'train.recompute=["mamba", "attention", "moe"]'
    (kept,) = describe_layout(load("super_120b"), 1)["pipeline_ranks"]
    (less,) = describe_layout(load("super_120b", "", recompute), 1)["pipeline_ranks"]
    hidden = 8192 * 4096 * 2
    tables = 131_072 * 4096 * 4
    # Of 88 blocks and 2 x 2 of MTP their inputs; of MTP 5 more each, final norm, three gradients.
    assert less["memory_bytes"]["activations"] == (88 + 4 + 2 * 5 + 1 + 3) * hidden + tables
    assert less["memory_bytes"]["recomputed_block"] > hidden
    assert kept["memory_bytes"]["recomputed_block"] == 0
    assert kept["memory_bytes"]["activations"] > 10 * less["memory_bytes"]["activations"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--describe", "parallel.ep=8", "--ranks", "12"], 2, "etp*ep*pp=8 does not divide"),
        (["--describe", "--ranks", "0"], 2, "--ranks 0: a run has at least 1"),
        (["--describe", "--ranks", "5"], 2, "5 data-parallel rank(s)"),
        (["--ranks", "2"], 2, "--ranks goes with --describe"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(arguments: list, code: int, message: str) -> None:
    done = _train("configs/super_120b.toml", *arguments)
    assert done.returncode == code
    assert message in done.stderr
    assert done.stdout == ""


def test_describe_takes_as_many_ranks_as_it_is_told_or_needs() -> None:
    arguments = ("configs/super_120b.toml", "parallel.tp=2", "parallel.ep=8", "--describe")
    for more, ranks in (((), 8), (("--ranks", "32"), 32)):
        layout = json.loads(_train(*arguments, *more).stdout)["layout"]
        assert (layout["ranks"], layout["fewest_ranks"]) == (ranks, 8)
        assert layout["degrees"]["dp"] == ranks // 2
        assert layout["degrees"]["expert_dp"] == ranks // 8


def _train(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "train.py", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
