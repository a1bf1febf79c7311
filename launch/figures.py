"""The look that the project's figures share."""

from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

INK, GRID = "#30363d", "#e6e9ed"
OURS, OTHERS = "#d1495b", "#a9b4c2"


def new_figure(title: str, size: tuple[float, float]) -> Figure:
    """An empty figure of this size in inches, under its title."""
    figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    figure.suptitle(title, fontsize=15, weight="bold", color=INK)
    return figure


def open_frame(axes: Axes) -> None:
    """Leave out the two sides of the frame that carry no numbers."""
    axes.spines[["top", "right"]].set_visible(False)


def draw_grid(axes: Axes, which: Literal["x", "y", "both"] = "y") -> None:
    """Faint lines behind the data, at the ticks of one axis or both."""
    axes.set_axisbelow(True)
    axes.grid(axis=which, color=GRID)
