"""The study of recipes: its table, going on after an end, and arguments that cannot be."""

import csv
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from nemomodel.config.load import config_to_dict
from nemomodel.config.precision import phases
from nemomodel.observe.comparison import Comparison, Outcome
from nemomodel.observe.environment import write_run_files
from tests.ranks.test_train import write_config
from tools.nvfp4_study import main, make_run, parse_args

TINY = ("train.steps=4", "schedule.warmup_steps=1", "schedule.decay_steps=2", "model.mtp=none")
RECIPES = ("--recipes", "nvfp4", "--full", "nvfp4")


def study(folder: Path, *arguments: str) -> int:
    return main([str(write_config(folder)), *TINY, "--output", str(folder / "study"), *arguments])


def in_a_process(folder: Path, *arguments: str) -> None:
    """For `run_ranks`, which keeps process groups out of the process of the tests; the study
    joins the group that is there."""
    assert study(folder, *RECIPES, *arguments) == 0


def records(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_table_is_that_of_the_runs_and_complete_runs_are_kept(
    run_ranks: Callable[..., None], tmp_path: Path
) -> None:
    run_ranks(1, in_a_process, tmp_path, "--seeds", "1,2", "precision.bf16_last_layers=1")
    runs = tmp_path / "study/runs"
    assert sorted(p.name for p in runs.iterdir()) == [
        f"{recipe}_seed{seed}" for recipe in ("bf16", "nvfp4") for seed in (1, 2)
    ]
    final = {p.name: records(p)[-1]["loss/validation"] for p in runs.iterdir()}
    gaps = [final[f"nvfp4_seed{s}"] / final[f"bf16_seed{s}"] - 1 for s in (1, 2)]
    assert all(gaps)
    result = json.loads((tmp_path / "study/study.json").read_text())
    (bf16, nvfp4) = result["table"]
    assert bf16["gap_to_baseline"] is None
    assert nvfp4["gap_to_baseline"]["mean"] == pytest.approx(statistics.fmean(gaps), rel=1e-12)
    error = statistics.stdev(gaps) / 2**0.5
    assert nvfp4["gap_to_baseline"]["standard_error"] == pytest.approx(error, rel=1e-12)
    mean = {p.name: statistics.fmean(r["loss/lm"] for r in records(p)) for p in runs.iterdir()}
    gaps = [mean[f"nvfp4_seed{s}"] / mean[f"bf16_seed{s}"] - 1 for s in (1, 2)]
    assert nvfp4["gap_over_run"]["mean"] == pytest.approx(statistics.fmean(gaps), rel=1e-12)

    with (tmp_path / "study/study.csv").open() as file:
        rows = list(csv.DictReader(file))
    first = [r["loss/lm"] for r in records(runs / "nvfp4_seed2")]
    own = [row for row in rows if (row["name"], row["seed"]) == ("nvfp4", "2")]
    assert [float(row["loss"]) for row in own] == first
    assert [int(row["tokens"]) for row in own] == [128, 256, 384, 512]
    base = [r["loss/lm"] for r in records(runs / "bf16_seed2")]
    expected = [a / b - 1 for a, b in zip(first, base, strict=True)]
    assert [float(row["gap"]) for row in own] == pytest.approx(expected, rel=1e-12)

    written = {p: (p / "metrics.jsonl").stat().st_mtime_ns for p in runs.iterdir()}
    run_ranks(1, in_a_process, tmp_path, "--seeds", "1,2,3", "precision.bf16_last_layers=1")
    assert {p: (p / "metrics.jsonl").stat().st_mtime_ns for p in written} == written
    table = (tmp_path / "study/study.md").read_text()
    assert "| nvfp4 | 3 |" in table
    assert not any(runs.glob("*/checkpoints"))


def test_seed_names_start_and_data(run_ranks: Callable[..., None], tmp_path: Path) -> None:
    """Recipes of a seed begin alike, seeds do not."""
    run_ranks(1, in_a_process, tmp_path, "--seeds", "1,2", "optim.lr=1e-9", "optim.min_lr=0.0")
    loss = {p.name: records(p)[0]["loss/lm"] for p in (tmp_path / "study/runs").iterdir()}
    assert loss["nvfp4_seed1"] == pytest.approx(loss["bf16_seed1"], rel=2e-3)
    assert loss["bf16_seed2"] != pytest.approx(loss["bf16_seed1"], rel=1e-6)


def test_diverged_run_is_a_result(run_ranks: Callable[..., None], tmp_path: Path) -> None:
    overrides = ("optim.lr=1e38", "optim.min_lr=0.0", "optim.grad_clip=none")
    run_ranks(1, in_a_process, tmp_path, "--seeds", "1", *overrides)
    assert "| bf16 | 1, 1 diverged |" in (tmp_path / "study/study.md").read_text()
    reason = (tmp_path / "study/runs/bf16_seed1/diverged.txt").read_text()
    assert "gradient norm is" in reason


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--recipes", "nvfp5"), "precision.recipe"),
        (("--recipes", "bf16"), "--recipes=bf16: give one besides bf16"),
        (("--seeds", "1,x"), "--seeds=1,x: use whole numbers"),
        (("run.seed=3",), "the study sets run.seed"),
        (("precision.recipe=nvfp4",), "the study sets precision.recipe"),
        (("train.stepz=3",), "did you mean 'steps'?"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert study(tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_a_run_has_its_recipe_and_no_other(tmp_path: Path) -> None:
    """Whatever the config says of how to quantise, and of phases."""
    config = write_config(tmp_path)
    phase = '{from_tokens = 200, recipe = "nvfp4_super"}'
    own = f"[precision]\nbf16_last_layers = 1\nphases = [{phase}]\n"
    config.write_text(config.read_text().replace("[precision]\n", own))
    sampling = "observe.quantization_interval=2"
    args = parse_args([str(config), *TINY, sampling, "--output", str(tmp_path / "study")])
    plain, quantised = (make_run(args, recipe, seed=1).config for recipe in ("bf16", "mxfp8"))
    assert [str(phase) for phase in phases(plain)] == ["recipe bf16, from 0 tokens"]
    (phase,) = phases(quantised)
    assert (phase.name, phase.last_layers) == ("mxfp8", 1)
    assert plain.observe.quantization_interval is None
    assert quantised.observe.quantization_interval == 2


def test_other_settings_need_another_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(write_config(tmp_path)), *TINY, "--output", str(tmp_path / "study")]
    run = make_run(parse_args(arguments), "bf16", seed=1)
    write_run_files(run.folder, config=config_to_dict(run.config))
    assert study(tmp_path, *RECIPES, "optim.lr=5e-3") == 2
    error = capsys.readouterr().err
    assert f"{run.folder / 'config.json'}: [optim] is not that of this study" in error


def comparison(gaps: list[float]) -> Comparison:
    """Runs of two names, one `gap` apart each."""
    outcomes = [Outcome("base", seed, [1], [2.0], 2.0) for seed in range(len(gaps))]
    outcomes += [Outcome("other", s, [1], [2.0], 2 * (1 + gap)) for s, gap in enumerate(gaps)]
    return Comparison("runs", ["base", "other"], "base", "base", outcomes)


@pytest.mark.parametrize(
    ("gaps", "separated"),
    [
        ([0.01], None),
        ([0.01, 0.011], True),  # 0.0105 is 21 standard errors, 12.7 are needed with two seeds
        ([0.01, 0.013], False),  # 7.7 of them
        ([0.01, 0.02, 0.03], False),  # 3.5, of 4.3
        ([0.02, 0.03, 0.04], True),  # 5.2
        ([-0.02, -0.03, -0.04], True),
    ],
)
def test_separation_is_that_of_students_t(gaps: list[float], separated: bool | None) -> None:
    gap = comparison(gaps).gap("other", "base")
    assert gap is not None
    assert gap.mean == pytest.approx(statistics.fmean(gaps))
    assert gap.separated is separated


def test_diverged_runs_have_no_gap() -> None:
    outcomes = [Outcome("base", 0, [1], [2.0], 2.0), Outcome("other", 0, [1], [9.0], None)]
    found = Comparison("runs", ["base", "other"], "base", "base", outcomes)
    assert found.gap("other", "base") is None
    assert "| other | 1, 1 diverged |" in found.markdown()


def test_plot_appears_complete(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    comparison([0.01, 0.02]).write(tmp_path, stem="study", plot=True)
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".csv", ".json", ".md", ".png"]
