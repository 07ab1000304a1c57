"""Runs that differ in one thing, compared: relative gaps of their losses, as tables and a plot."""

import csv
import io
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from nemomodel.observe.files import write_atomically

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Two-sided 95 % quantiles of Student's t for 1 to 10 degrees of freedom; beyond, the last."""


@dataclass(frozen=True)
class Outcome:
    """What a complete run came to."""

    name: str
    """What is compared, e.g. its recipe."""
    seed: int
    tokens: list[int]
    """Of the windows of its curve: tokens trained on at the end of each."""
    losses: list[float]
    """Mean training loss in each window."""
    final: float | None
    """Loss after the last step; None: the run diverged."""

    @property
    def mean(self) -> float | None:
        """Training loss over the whole run; None: it diverged."""
        return None if self.final is None else statistics.fmean(self.losses)


@dataclass(frozen=True)
class Gap:
    """(loss - other) / other of two runs of a seed, over the seeds that both sides have."""

    num_seeds: int
    mean: float
    standard_error: float | None
    """None with one seed."""
    separated: bool | None = field(init=False)
    """Whether 0 is outside the 95 % interval of Student's t; None: not known from one seed."""

    def __post_init__(self) -> None:
        separated = None
        if self.standard_error is not None:
            quantile = T_975[min(self.num_seeds - 1, len(T_975)) - 1]
            separated = abs(self.mean) > quantile * self.standard_error
        object.__setattr__(self, "separated", separated)

    def __str__(self) -> str:
        if self.standard_error is None:
            return f"{self.mean:+.3%}, one seed"
        verdict = "separated" if self.separated else "not separated"
        return f"{self.mean:+.3%} +- {self.standard_error:.3%}, {verdict}"


@dataclass(frozen=True)
class Comparison:
    """
    Args:
        names: of what is compared, in the order to show them.
        baseline, full: two of them that the others are held against.
    """

    title: str
    names: Sequence[str]
    baseline: str
    full: str
    outcomes: Sequence[Outcome]

    def gap(self, name: str, other: str, loss: Literal["final", "mean"] = "final") -> Gap | None:
        """None: no seed has finished with both."""
        losses = {(o.name, o.seed): getattr(o, loss) for o in self.outcomes if o.final is not None}
        gaps = [
            value / losses[other, seed] - 1
            for (which, seed), value in losses.items()
            if which == name and (other, seed) in losses
        ]
        if not gaps or name == other:
            return None
        error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else None
        return Gap(len(gaps), statistics.fmean(gaps), error)

    def curves(self) -> list[tuple[str, int, int, float, float | None]]:
        """Name, seed, tokens, loss, and gap to the baseline, of every window of every run."""
        baseline = {
            (o.seed, tokens): loss
            for o in self.outcomes
            if o.name == self.baseline
            for tokens, loss in zip(o.tokens, o.losses, strict=True)
        }
        return [
            (o.name, o.seed, tokens, loss, loss / other - 1 if other else None)
            for o in self.outcomes
            for tokens, loss in zip(o.tokens, o.losses, strict=True)
            for other in (baseline.get((o.seed, tokens)),)
        ]

    def rows(self) -> list[dict[str, Any]]:
        """The table: per name the runs there are, and its gaps."""
        return [
            {
                "name": name,
                "runs": sum(o.name == name for o in self.outcomes),
                "diverged": sum(o.name == name and o.final is None for o in self.outcomes),
                "gap_to_baseline": self.gap(name, self.baseline),
                "gap_over_run": self.gap(name, self.baseline, "mean"),
                "gap_to_full": self.gap(name, self.full),
            }
            for name in self.names
        ]

    def write(self, folder: Path, *, stem: str, plot: bool) -> None:
        """STEM.md, STEM.json and STEM.csv, and where `plot` says so STEM.png, which needs
        matplotlib."""
        rows = [
            {k: asdict(v) if isinstance(v, Gap) else v for k, v in row.items()}
            for row in self.rows()
        ]
        runs = [asdict(o) for o in self.outcomes]
        result = {"title": self.title, "baseline": self.baseline, "full": self.full}
        text = json.dumps(result | {"table": rows, "runs": runs}, indent=1)
        write_atomically(folder / f"{stem}.json", text + "\n")
        write_atomically(folder / f"{stem}.csv", self.csv())
        write_atomically(folder / f"{stem}.md", self.markdown())
        if plot:
            self.plot(folder / f"{stem}.png")

    def csv(self) -> str:
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["name", "seed", "tokens", "loss", "gap"])
        writer.writerows(self.curves())
        return file.getvalue()

    def markdown(self) -> str:
        """The table, and what it says."""
        lines = [
            f"# {self.title}",
            "",
            "Relative gaps within a seed, mean +- standard error over seeds, of the loss after the "
            "last step, and of the mean training loss over the run. Separated: 0 is outside the "
            "95 % interval of Student's t.",
            "",
            f"| | runs | gap to {self.baseline} | over the run | gap to {self.full} |",
            "|---|---|---|---|---|",
        ]
        rows = self.rows()
        for row in rows:
            runs = f"{row['runs']}" + (f", {row['diverged']} diverged" if row["diverged"] else "")
            gaps = (str(gap or "") for key, gap in row.items() if key.startswith("gap_"))
            lines.append(f"| {row['name']} | {runs} | {' | '.join(gaps)} |")
        compared = [row for row in rows if row["gap_to_baseline"]]
        at_the_end, over_the_run = (
            _separated(compared, key) for key in ("gap_to_baseline", "gap_over_run")
        )
        lines += [
            "",
            f"Separated from {self.baseline} at the end: {at_the_end}; over the run: "
            f"{over_the_run}; of {len(compared)} compared. Each is tested by itself: of twenty "
            "that do not differ one looks separated by chance.",
        ]
        return "\n".join(lines) + "\n"

    def plot(self, path: Path) -> None:
        """The gap of the training loss over tokens, mean and standard error over seeds."""
        from matplotlib import colormaps
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 5), layout="constrained")
        axes = figure.subplots()
        points = self.curves()
        axes.set_prop_cycle(color=colormaps["tab20"].colors)
        for name in self.names:
            gaps: dict[int, list[float]] = {}
            for which, _, tokens, _, gap in points:
                if which == name != self.baseline and gap is not None:
                    gaps.setdefault(tokens, []).append(100 * gap)
            if not gaps:
                continue
            means = [statistics.fmean(found) for found in gaps.values()]
            errors = [
                statistics.stdev(found) / math.sqrt(len(found)) if len(found) > 1 else 0.0
                for found in gaps.values()
            ]
            (line,) = axes.plot(list(gaps), means, label=name)
            low, high = ([m + s * e for m, e in zip(means, errors, strict=True)] for s in (-1, 1))
            axes.fill_between(list(gaps), low, high, color=line.get_color(), alpha=0.15)
        axes.axhline(0, color="black", linewidth=0.8, label=self.baseline)
        axes.set(xlabel="tokens", ylabel=f"training loss, gap to {self.baseline} in %")
        figure.legend(loc="outside right upper", fontsize="small")
        partial = path.with_name(f".{path.name}.partial")
        figure.savefig(partial, format="png", dpi=120)
        partial.replace(path)


def _separated(rows: list[dict[str, Any]], key: str) -> str:
    """The names of those whose gap is not 0 by chance alone."""
    if rows and all(row[key].separated is None for row in rows):
        return "not known from one seed"
    return ", ".join(row["name"] for row in rows if row[key].separated) or "none"
