"""What the demo concludes from its two training runs, as a verdict, a table and a picture."""

from dataclasses import dataclass
from pathlib import Path

import torch
from figures import INK, OTHERS, OURS, draw_grid, new_figure, open_frame
from matplotlib.axes import Axes
from rich import box
from rich.table import Table
from torch import Tensor

# The runs differ in the order of their sums only, which moves a loss near 8 by a few units in its last place (1e-6).
# In the same 80 steps, hidden-state gradients rounded to bf16 move the curve by 1e-4, one column too many in the
# softmax by 2e-4, and a reduction left out by 0.1.
TOLERANCE = 2e-5
# Long training can amplify any difference exponentially: at a learning rate of 3e-3, computing the logits of the
# *ordinary* head in two halves moves its loss by 1e-6 within 100 steps, and by 4e-4 within 300.
COMPARED_STEPS = 100

BYTES_PER_LOGIT = 4  # fp32
_MIB = 2**20


@dataclass(frozen=True)
class Run:
    """How training with one kind of head went, seen from one rank."""

    name: str
    losses: list[float]
    """One per step."""
    num_tokens: int
    """Per step."""
    tokens_per_second: float
    """Of whole training steps."""
    vocab_rows: int
    """On this rank."""
    peak_bytes: int
    """Of the forward and backward of head and loss."""

    @property
    def logits_bytes(self) -> int:
        """What this rank's logits take if they are stored."""
        return self.num_tokens * self.vocab_rows * BYTES_PER_LOGIT


@dataclass(frozen=True)
class Comparison:
    """Two runs that ought to have the same losses."""

    setting: str
    """What both have in common, in words."""
    full: Run
    sharded: Run

    @property
    def differences(self) -> Tensor:
        """``[steps]`` fp64, how far the losses are apart."""
        full, sharded = (torch.tensor(run.losses, dtype=torch.float64) for run in (self.full, self.sharded))
        return (full - sharded).abs()

    @property
    def compared_steps(self) -> int:
        return min(COMPARED_STEPS, len(self.full.losses))

    @property
    def largest_difference(self) -> float:
        """Over the compared steps; NaN if any loss is."""
        return float(self.differences[: self.compared_steps].max())

    @property
    def curves_agree(self) -> bool:
        return self.largest_difference <= TOLERANCE


def make_table(comparison: Comparison) -> Table:
    """Both runs side by side, and how far apart they are."""
    full, sharded = comparison.full, comparison.sharded
    table = Table(
        box=box.ROUNDED,
        title=comparison.setting,
        caption=(
            f"Logits: {full.num_tokens:,} tokens a step × vocabulary rows × {BYTES_PER_LOGIT} bytes. "
            "Peak memory: bytes alive at the worst moment of the forward and backward of head and loss, gradients "
            "included, beyond those alive before. Tokens/s: of whole training steps; with full logits every rank "
            "computes all of them."
        ),
    )
    table.add_column()
    table.add_column(full.name, justify="right")
    table.add_column(sharded.name, justify="right", style="bold")
    table.add_row("vocabulary rows per rank", f"{full.vocab_rows:,}", f"{sharded.vocab_rows:,}")
    table.add_row("loss, first step", f"{full.losses[0]:.6f}", f"{sharded.losses[0]:.6f}")
    table.add_row("loss, last step", f"{full.losses[-1]:.6f}", f"{sharded.losses[-1]:.6f}")
    table.add_row("logits stored per rank", _mib(full.logits_bytes), "none")
    table.add_row("logits avoided per rank", "none", _mib(sharded.logits_bytes))
    table.add_row("peak memory of the loss", _mib(full.peak_bytes), _mib(sharded.peak_bytes))
    table.add_row("tokens/s", f"{full.tokens_per_second:,.0f}", f"{sharded.tokens_per_second:,.0f}", end_section=True)
    table.add_row(
        f"largest difference in {comparison.compared_steps} steps",
        f"allowed: {TOLERANCE:.0e}",
        f"{comparison.largest_difference:.1e}",
        style="green" if comparison.curves_agree else "red",
    )
    return table


def draw_picture(comparison: Comparison, path: Path) -> None:
    """Loss curves above their difference on the left, memory bars on the right."""
    figure = new_figure("One language model, trained with and without its logits", size=(11, 5.4))
    grid = figure.add_gridspec(2, 2, width_ratios=(2.2, 1), height_ratios=(2.4, 1))
    loss_axes = figure.add_subplot(grid[0, 0])
    difference_axes = figure.add_subplot(grid[1, 0], sharex=loss_axes)
    memory_axes = figure.add_subplot(grid[:, 1])
    for axes in (loss_axes, difference_axes, memory_axes):
        open_frame(axes)
    for axes in (loss_axes, difference_axes):
        draw_grid(axes)
    _draw_losses(loss_axes, comparison)
    _draw_differences(difference_axes, comparison)
    _draw_memory(memory_axes, comparison)
    figure.savefig(path, dpi=150)


def _draw_losses(axes: Axes, comparison: Comparison) -> None:
    full, sharded = comparison.full, comparison.sharded
    steps = range(1, len(full.losses) + 1)
    axes.plot(steps, full.losses, color=OTHERS, linewidth=7, solid_capstyle="round", label=full.name)
    axes.plot(steps, sharded.losses, color=OURS, linewidth=1.8, label=sharded.name)
    axes.set_ylabel("nats per token")
    axes.set_title(f"training loss · {comparison.setting}", loc="left", fontsize=11, color=INK)
    axes.legend(frameon=False)
    axes.tick_params(labelbottom=False)


def _draw_differences(axes: Axes, comparison: Comparison) -> None:
    differences = comparison.differences
    # Linear below fp32's resolution of such losses, so that equal losses have a place, at zero.
    axes.set_yscale("symlog", linthresh=1e-7)
    axes.plot(range(1, len(differences) + 1), differences, color=INK, marker="o", markersize=3, linestyle="none")
    axes.hlines(TOLERANCE, 1, comparison.compared_steps, color=OURS, linestyle="--", linewidth=1)
    axes.text(1, TOLERANCE, "allowed", color=OURS, va="bottom", fontsize=9)
    axes.set_ylim(-5e-8, 10 * max(TOLERANCE, float(differences.nan_to_num(posinf=0.0).max())))
    axes.set_yticks([0, 1e-6, 1e-4])
    axes.set_title("difference of the two", loc="left", fontsize=11, color=INK)
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")


def _draw_memory(axes: Axes, comparison: Comparison) -> None:
    runs = (comparison.full, comparison.sharded)
    bars = axes.bar(
        [run.name for run in runs], [run.peak_bytes / _MIB for run in runs], color=[OTHERS, OURS], width=0.55
    )
    axes.bar_label(bars, labels=[_mib(run.peak_bytes) for run in runs], padding=4, fontsize=11, color=INK)
    axes.margins(x=0.15, y=0.1)
    axes.set_ylabel("MiB per rank")
    axes.set_title("peak memory of head and loss", loc="left", fontsize=11, color=INK)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:,.1f} MiB"
