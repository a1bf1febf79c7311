"""What ``benchmark.py`` found, as pictures: time against memory, and time against the number of tokens or classes."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
from benchmark_methods import OURS as OUR_PACKAGE
from benchmark_report import Measurement, Report, ShapeResult
from figures import INK, OTHERS, OURS, draw_grid, new_figure, open_frame
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator, ScalarFormatter

_MIB = 2**20
_SIZES = {"tokens": "number of tokens", "vocabulary": "size of the vocabulary"}
_MARKERS = "osD^v<>PXh*pd8H"
_COLORS = ("#3b5b92", "#2a9d8f", "#8d6cab", "#e09f3e", "#6c757d", "#9c6644")


def draw_pictures(report: Report, folder: Path) -> list[Path]:
    """One SVG per shape: time against memory, or time against ``T`` or ``V`` where a shape was measured at several.

    Returns:
        The paths of the files, whose names start with ``memory-``, ``tokens-`` or ``vocabulary-``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    by_name: dict[str, list[ShapeResult]] = defaultdict(list)
    for shape in report.shapes:
        by_name[shape.name].append(shape)
    paths = []
    # Ids from this salt, and no date: equal results make equal files.
    with matplotlib.rc_context({"svg.hashsalt": "benchmark"}):
        for name, shapes in by_name.items():
            if len(shapes) == 1:
                figure, kind = _draw_memory(shapes[0], report), "memory"
            else:
                kind = "tokens" if len({shape.T for shape in shapes}) > 1 else "vocabulary"
                figure = _draw_sizes(kind, shapes, report)
            figure.legend(loc="outside right center", frameon=False)
            paths.append(folder / f"{kind}-{name}.svg")
            figure.savefig(paths[-1], metadata={"Date": None})
    return paths


def _draw_memory(shape: ShapeResult, report: Report) -> Figure:
    """The curve of the cache's budget and a point for everything else, between the times of three and four products."""
    figure = new_figure(f"Time and memory of the loss: {shape.name}", size=(9, 5.4))
    axes = figure.add_subplot()
    open_frame(axes)
    draw_grid(axes)
    setting = f"T {shape.T}, H {shape.H}, V {shape.V_local} · {report.setting}"
    axes.set_title(setting, loc="left", fontsize=10, color=INK)
    axes.set_xscale("log")
    axes.set_yscale("symlog", linthresh=1, linscale=0.3)  # some need nothing
    for label, milliseconds in (("3G", shape.stored_ms), ("4G", shape.recomputed_ms)):
        axes.axvline(milliseconds, color=OTHERS, linestyle="--", linewidth=1)
        top = {"xycoords": axes.get_xaxis_transform(), "xytext": (3, -10), "textcoords": "offset points"}
        axes.annotate(label, (milliseconds, 1), color=INK, **top)
    axes.axhline(shape.logits_bytes / _MIB, color=OTHERS, linestyle=":", linewidth=1.5, label="size of the logits")
    curve = {row.cache_fraction: row for row in shape.measurements if row.cache_fraction is not None}
    if curve:
        points = {fraction: _point(curve[fraction]) for fraction in sorted(curve)}
        line: dict[str, Any] = {"color": OURS, "marker": "o", "label": "vocab_parallel_fused"}
        axes.plot(*zip(*points.values(), strict=True), **line)
        for fraction in {min(points), max(points)}:
            above = {"xytext": (6, 4), "textcoords": "offset points"}
            axes.annotate(f"cache {fraction:.0%}", points[fraction], color=OURS, fontsize=9, **above)
    for row in shape.measurements:
        if row.cache_fraction is None:
            axes.plot(*_point(row), linestyle="none", label=row.method, **_style(row, report))
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    _write_numbers(axes)
    axes.set_xlabel("forward + backward, ms")
    axes.set_ylabel("memory above inputs and gradients, MiB")
    return figure


def _draw_sizes(kind: str, shapes: list[ShapeResult], report: Report) -> Figure:
    """A line per method, forward on the left, forward + backward on the right, on the times of the matrix products."""
    by_size = {shape.T if kind == "tokens" else shape.V_local: shape for shape in shapes}
    sizes = sorted(by_size)
    shapes = [by_size[size] for size in sizes]
    first = shapes[0]
    size = _SIZES[kind] + (" per rank" if kind == "vocabulary" and report.ranks > 1 else "")
    other = f"V {first.V_local}" if kind == "tokens" else f"T {first.T}"
    figure = new_figure(f"Time of the loss by the {size}: {first.name}", size=(11, 5.4))
    forward_axes, step_axes = figure.subplots(1, 2)
    wide: dict[str, Any] = {"color": OTHERS, "linewidth": 5, "solid_capstyle": "round"}
    forward_axes.plot(sizes, [shape.logits_ms for shape in shapes], label="cuBLAS: G, 3G", **wide)
    step_axes.plot(sizes, [shape.stored_ms for shape in shapes], **wide)
    for method in report.methods:
        rows = {size: row for size in sizes for row in by_size[size].measurements if row.method == method}
        if not rows:
            continue
        style = _style(next(iter(rows.values())), report) | {"markersize": 4}
        forward_axes.plot(rows.keys(), [row.forward_ms for row in rows.values()], label=method, **style)
        step_axes.plot(rows.keys(), [row.step_ms for row in rows.values()], **style)
        replayed = {size: row.graph_ms for size, row in rows.items() if row.graph_ms is not None}
        if replayed:
            dotted = {"linestyle": ":", "label": f"{method}, CUDA graph"}
            forward_axes.plot(replayed.keys(), replayed.values(), **style | dotted)
    for axes, title in ((forward_axes, "forward"), (step_axes, "forward + backward")):
        open_frame(axes)
        draw_grid(axes, "both")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes)
        axes.tick_params(axis="x", labelrotation=45)
        _write_numbers(axes)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_title(title, loc="left", fontsize=11, color=INK)
        axes.set_xlabel(f"{size} · H {first.H}, {other}")
        axes.set_ylabel("ms")
    return figure


def _write_numbers(axes: Axes) -> None:
    """Where a logarithmic axis would write powers."""
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(ScalarFormatter())


def _point(row: Measurement) -> tuple[float, float]:
    return row.step_ms, row.step_extra_bytes / _MIB


def _style(row: Measurement, report: Report) -> dict[str, Any]:
    """The same for a method in every picture of a run."""
    number = report.methods.index(row.method)
    color = OURS if row.package == OUR_PACKAGE else _COLORS[number % len(_COLORS)]
    return {"color": color, "marker": _MARKERS[number % len(_MARKERS)]}
