"""What the training of a Megatron-Core model concludes from its runs, as a table, a picture and a JSON file."""

import json
import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from figures import GRID, INK, OTHERS, OURS, draw_grid, new_figure, open_frame
from files import replacing
from matplotlib.axes import Axes
from rich import box
from rich.table import Table

REFERENCE = "stock"
NOISE = "stock-split"
_GIB = 2**30

# Thick under thin, so that curves that lie on each other are all seen.
_STYLES: dict[str, dict[str, Any]] = {
    REFERENCE: {"color": OTHERS, "linewidth": 6, "solid_capstyle": "round"},
    NOISE: {"color": INK, "linewidth": 1.6, "linestyle": ":"},
    "stock-fused": {"color": "#6c7a89", "linewidth": 1.2, "linestyle": "--"},
    "recompute": {"color": OURS, "linewidth": 1.6},
    "cache": {"color": "#2a7f9e", "linewidth": 1.2},
}


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    parameters: int
    gradients: int
    """fp32, of all parameters."""
    optimizer: int
    resting: int
    """Everything alive between two steps."""
    compute_peak: int
    """At the worst moment of a step's forward and backward."""
    update_peak: int
    """At the worst moment of the optimizer's step."""


@dataclass(frozen=True)
class Run:
    """How one way of computing the loss trained."""

    mode: str
    losses: list[float]
    """One per step, nats per token."""
    step_ms: list[float]
    """One per step that was timed."""
    num_tokens: int
    """Of a step, on all ranks."""
    memory: list[Memory]
    """One per rank."""

    @property
    def median_ms(self) -> float:
        return statistics.median(self.step_ms)

    @property
    def largest(self) -> Memory:
        """Of the rank that needs most."""
        return max(self.memory, key=lambda memory: memory.compute_peak)


@dataclass(frozen=True)
class Report:
    """Trainings of one model from the same weights on the same text."""

    title: str
    setting: dict[str, Any]
    runs: list[Run]

    def run(self, mode: str) -> Run | None:
        return next((run for run in self.runs if run.mode == mode), None)

    def differences(self, run: Run) -> list[float] | None:
        """How far the losses are from the reference's at each step; None without a reference or for it."""
        reference = self.run(REFERENCE)
        if reference is None or run is reference:
            return None
        return [abs(loss - other) for loss, other in zip(run.losses, reference.losses, strict=True)]

    def save(self, path: Path) -> None:
        """Write settings, losses, times and memory."""
        with replacing(path) as unfinished:
            unfinished.write_text(json.dumps(asdict(self), indent=1))


def make_table(report: Report) -> Table:
    """The runs side by side."""
    table = Table(
        box=box.ROUNDED,
        title=report.title,
        caption=(
            f"Difference: of the loss from {REFERENCE}'s, over the steps; {NOISE} computes the same with its sums in "
            "another order, and shows what rounding alone does. Memory: of the rank that needs most. Time: median of a "
            "step, without the first ones."
        ),
    )
    table.add_column()
    reference = report.run(REFERENCE)
    for run in report.runs:
        table.add_column(run.mode, justify="right", style="" if run.mode.startswith("stock") else "bold")

    def add(name: str, cells: list[str], *, end_section: bool = False) -> None:
        table.add_row(name, *cells, end_section=end_section)

    add("loss, first step", [f"{run.losses[0]:.5f}" for run in report.runs])
    add("loss, last step", [f"{run.losses[-1]:.5f}" for run in report.runs])
    differences = [report.differences(run) for run in report.runs]
    add("difference, median", ["–" if d is None else f"{statistics.median(d):.1e}" for d in differences])
    add("root mean square", ["–" if d is None else f"{root_mean_square(d):.1e}" for d in differences], end_section=True)
    for field in ("parameters", "gradients", "optimizer"):
        add(field, [_gib(getattr(run.largest, field)) for run in report.runs])
    add("peak of forward and backward", [_gib(run.largest.compute_peak) for run in report.runs])
    add("peak of the optimizer's step", [_gib(run.largest.update_peak) for run in report.runs])
    if reference is not None:
        saved = [reference.largest.compute_peak - run.largest.compute_peak for run in report.runs]
        add(f"peak below {REFERENCE}'s", [_gib(size) for size in saved], end_section=True)
    add("ms per step", [f"{run.median_ms:.1f}" for run in report.runs])
    add("tokens/s", [f"{1000 * run.num_tokens / run.median_ms:,.0f}" for run in report.runs])
    return table


def root_mean_square(values: list[float]) -> float:
    """NaN if any value is."""
    return math.sqrt(sum(value * value for value in values) / len(values))


def draw_picture(report: Report, path: Path) -> None:
    """Loss curves above their differences on the left, memory above time on the right."""
    figure = new_figure("A model of Megatron-Core, trained with and without its logits", size=(12, 6.6))
    axes = figure.subplots(2, 2, width_ratios=(1.5, 1))
    for each in axes.flat:
        open_frame(each)
    _draw_losses(axes[0, 0], report)
    _draw_differences(axes[1, 0], report)
    _draw_memory(axes[0, 1], report)
    _draw_times(axes[1, 1], report)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _draw_losses(axes: Axes, report: Report) -> None:
    draw_grid(axes)
    for run in report.runs:
        axes.plot(range(1, len(run.losses) + 1), run.losses, label=run.mode, **_STYLES[run.mode])
    axes.set_ylabel("nats per token")
    axes.set_title(f"training loss · {report.title}", loc="left", fontsize=10, color=INK)
    axes.legend(frameon=False)


def _draw_differences(axes: Axes, report: Report) -> None:
    draw_grid(axes)
    for run in report.runs:
        if differences := report.differences(run):
            axes.plot(range(1, len(differences) + 1), differences, **_STYLES[run.mode])
    # Linear below fp32's resolution of such losses, so that equal losses have a place, at zero.
    axes.set_yscale("symlog", linthresh=1e-7)
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.set_title(f"difference from {REFERENCE}", loc="left", fontsize=10, color=INK)


def _draw_memory(axes: Axes, report: Report) -> None:
    resting = [run.largest.resting / _GIB for run in report.runs]
    beyond = [(run.largest.compute_peak - run.largest.resting) / _GIB for run in report.runs]
    names = [run.mode for run in report.runs]
    axes.bar(names, resting, color=GRID, width=0.6)
    bars = axes.bar(names, beyond, bottom=resting, color=_colors(report), width=0.6)
    axes.bar_label(bars, labels=[_gib(run.largest.compute_peak) for run in report.runs], padding=3, fontsize=9)
    axes.margins(y=0.15)
    axes.set_ylabel("GiB per rank")
    axes.set_title("peak of forward and backward (pale: alive between steps)", loc="left", fontsize=10, color=INK)
    axes.tick_params(axis="x", labelsize=8)


def _draw_times(axes: Axes, report: Report) -> None:
    bars = axes.bar([run.mode for run in report.runs], [run.median_ms for run in report.runs], color=_colors(report))
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=9)
    axes.margins(y=0.15)
    axes.set_ylabel("ms")
    axes.set_title("time of a step", loc="left", fontsize=10, color=INK)
    axes.tick_params(axis="x", labelsize=8)


def _colors(report: Report) -> list[str]:
    return [OTHERS if run.mode.startswith("stock") else OURS for run in report.runs]


def _gib(num_bytes: int) -> str:
    in_gib = abs(num_bytes) >= 0.1 * _GIB or num_bytes == 0
    return f"{num_bytes / _GIB:,.2f} GiB" if in_gib else f"{num_bytes / 2**20:,.1f} MiB"
