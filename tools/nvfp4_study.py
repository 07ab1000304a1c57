"""Train with several precision recipes from the same starts on the same data, and compare.

    python tools/nvfp4_study.py CONFIG.toml [section.key=value ...] --output runs/study
        [--recipes nvfp4_super,nvfp4] [--seeds 1,2,3]

Every recipe is trained once per seed; a seed names the initial weights, the order of the data and
the random bits. A run has its recipe from the first step to the last: precision.phases of the
config do not count. What is compared is the relative gap (loss - loss_bf16) / loss_bf16 within a
seed. Complete runs are not repeated: the same command goes on where an earlier one stopped, and
more recipes or seeds may be added to it. The output folder gets study.md, study.json, study.csv
and, where matplotlib is installed, study.png, anew after every run; runs are in its folder runs.
"""

import argparse
import json
import logging
import math
import os
import shutil
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from nemomodel.config.load import ConfigError, load_config, parse_config
from nemomodel.config.recipe import RECIPES
from nemomodel.config.schema import Config
from nemomodel.observe.comparison import Comparison, Outcome
from nemomodel.observe.files import write_atomically

BASELINE, FULL = "bf16", "nvfp4_super"
NUM_WINDOWS = 20
"""Pieces of a run over which a point of its curve is averaged."""
LINE_INTERVAL = 10.0
"""Seconds between console lines of a run."""
OWN_KEYS = ("run.dir", "run.seed", "precision.recipe", "precision.phases")
PLAIN = (
    "precision.bf16_last_layers=none",
    "precision.executor=emulated",
    "observe.quantization_interval=none",
)
"""How to quantise, and what to see of it: without effect where nothing is quantised."""


@dataclass(frozen=True)
class Run:
    """One training run of the study."""

    recipe: str
    seed: int
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def divergence(self) -> Path:
        """A file that says at which step the gradient was not finite, if it ever was not."""
        return self.folder / "diverged.txt"

    def records(self) -> list[dict[str, float]]:
        """What metrics.jsonl has of it."""
        try:
            lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines]

    def done(self) -> bool:
        records = self.records()
        finished = bool(records) and records[-1]["step"] == self.config.train.steps
        return finished or self.divergence.exists()


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        runs = plan(args)
    except ConfigError as error:
        print(f"nvfp4_study: {error}", file=sys.stderr)
        return 2
    from nemomodel.train.faults import EXIT_INTERRUPTED, exit_code_of

    logging.getLogger("nemomodel.observe.console").addFilter(thin)
    try:
        if not train_all(runs, args):
            print("nvfp4_study: interrupted; the same command goes on", file=sys.stderr)
            return EXIT_INTERRUPTED
    except Exception as error:
        if (code := exit_code_of(error)) is None:
            raise
        print(f"nvfp4_study: {error}", file=sys.stderr)
        return code
    print((args.output / "study.md").read_text(encoding="utf-8"), end="")
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("config", help="TOML file, as train.py takes it")
    add("overrides", nargs="*", metavar="section.key=value")
    add("--output", type=Path, required=True, help="folder of the study; made if missing")
    add(
        "--recipes",
        help="names with commas between, all that quantise something in the model where not "
        f"given; {BASELINE} is always in, fp32 may be",
    )
    add("--full", default=FULL, help="recipe that all are compared with besides bf16")
    add("--seeds", default="1,2,3", help="whole numbers with commas between")
    return parser.parse_intermixed_args(argv)


def plan(args: argparse.Namespace) -> list[Run]:
    """The runs in the order they are made: seed by seed, the baseline first.

    Raises:
        ConfigError: anything is wrong with any of them; nothing has been started.
    """
    try:
        seeds = list(dict.fromkeys(int(seed) for seed in args.seeds.split(",")))
    except ValueError:
        raise ConfigError(f"--seeds={args.seeds}: use whole numbers, e.g. 1,2,3") from None
    if "RANK" in os.environ:
        raise ConfigError("torchrun: the study trains in one process; start it with plain python")
    for override in args.overrides:
        if (key := override.partition("=")[0]) in OWN_KEYS:
            raise ConfigError(f"override {override!r}: the study sets {key}; see --help")
    names = args.recipes.split(",") if args.recipes else usable(args)
    recipes = [BASELINE, *dict.fromkeys(name for name in names if name != BASELINE)]
    if args.full not in recipes and args.full != FULL:
        raise ConfigError(f"--full={args.full}: is not run; use one of {', '.join(recipes)}")
    if len(recipes) == 1:
        raise ConfigError(f"--recipes={args.recipes}: give one besides {BASELINE}")
    runs = [make_run(args, recipe, seed) for seed in seeds for recipe in recipes]
    for run in runs:
        check_settings(run)
    return runs


def usable(args: argparse.Namespace) -> list[str]:
    """Every recipe that quantises something in this model; the others are named."""
    make_run(args, BASELINE, 0)  # what is wrong without any recipe
    found = []
    for recipe in RECIPES:
        try:
            make_run(args, recipe, 0)
        except ConfigError as error:
            print(f"without {recipe}: {error}", flush=True)
        else:
            found.append(recipe)
    return found


def make_run(args: argparse.Namespace, recipe: str, seed: int) -> Run:
    folder = args.output / "runs" / f"{recipe}_seed{seed}"
    defaults = ("observe.log_interval=1", "observe.tensorboard=false", "checkpoint.keep=1")
    own = (
        f"run.dir={json.dumps(str(folder))}",
        f"run.seed={seed}",
        f"precision.recipe={recipe}",
        "precision.phases=[]",
        *(() if recipe in RECIPES else PLAIN),
    )
    return Run(recipe, seed, load_config(args.config, [*defaults, *args.overrides, *own]))


def check_settings(run: Run) -> None:
    """
    Raises:
        ConfigError: the folder has a run with other settings.
    """
    path = run.folder / "config.json"
    if not path.exists():
        return
    earlier = asdict(parse_config(json.loads(path.read_text(encoding="utf-8")), where=str(path)))
    for section, values in asdict(run.config).items():
        if earlier[section] != values:
            raise ConfigError(
                f"{path}: [{section}] is not that of this study; use the same settings, or "
                "another --output"
            )


def train_all(runs: list[Run], args: argparse.Namespace) -> bool:
    """Make the runs that are not complete, and report after each; False after a signal."""
    from nemomodel.train.faults import NotFiniteError
    from nemomodel.train.loop import run as train

    if not (plot := find_spec("matplotlib") is not None):
        print("no study.png: matplotlib is not installed; pip install nemomodel[study]", flush=True)
    missing = [run for run in runs if not run.done()]
    complete = len(runs) - len(missing)
    print(f"{len(runs)} runs, {complete} of them complete", flush=True)
    start = time.monotonic()
    for number, run in enumerate(missing):
        line = f"run {complete + number + 1} of {len(runs)}: {run.recipe}, seed {run.seed}"
        if number:
            seconds = (time.monotonic() - start) / number * (len(missing) - number)
            line += f", about {seconds / 60:.0f} min left"
        print(line, flush=True)
        try:
            if train(run.config):
                return False
        except NotFiniteError as error:  # a result, not a mistake
            write_atomically(run.divergence, f"{error}\n")
        shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
        report(runs, args, plot=plot)
    report(runs, args, plot=plot)
    return True


def thin(record: logging.LogRecord) -> bool:
    """Let one console line of a run pass every LINE_INTERVAL seconds."""
    if fresh := record.created - getattr(thin, "last", 0.0) >= LINE_INTERVAL:
        thin.last = record.created
    return fresh


def report(runs: list[Run], args: argparse.Namespace, *, plot: bool) -> None:
    """Compare the runs that are complete."""
    outcomes = [outcome(run) for run in runs if run.done()]
    train = runs[0].config.train
    tokens = train.steps * train.global_batch_size * train.seq_length
    overrides = " ".join(args.overrides)
    Comparison(
        title=f"{args.config} {overrides}: {tokens:,} tokens, {len(outcomes)} of {len(runs)} runs",
        names=list(dict.fromkeys(run.recipe for run in runs)),
        baseline=BASELINE,
        full=args.full,
        outcomes=outcomes,
    ).write(args.output, stem="study", plot=plot)


def outcome(run: Run) -> Outcome:
    """The final loss is that of validation, where the config has data for it.

    Args:
        run: complete.
    """
    train = run.config.train
    records = [record for record in run.records() if record.get("loss/lm") is not None]
    windows: dict[int, list[float]] = {}
    for record in records:
        window = math.ceil(record["step"] * NUM_WINDOWS / train.steps)
        windows.setdefault(window, []).append(record["loss/lm"])
    step_tokens = train.global_batch_size * train.seq_length
    tokens = [window * train.steps // NUM_WINDOWS * step_tokens for window in windows]
    losses = [statistics.fmean(window) for window in windows.values()]
    final = None
    if not run.divergence.exists():
        final = records[-1].get("loss/validation", losses[-1])
    return Outcome(run.recipe, run.seed, tokens, losses, final)


if __name__ == "__main__":
    sys.exit(main())
