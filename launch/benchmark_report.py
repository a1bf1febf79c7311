"""What ``benchmark.py`` found, as JSON and as tables."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from files import replacing
from rich import box
from rich.table import Table

_MIB = 2**20


@dataclass(frozen=True)
class Measurement:
    """One method at one shape. Times are medians over rounds, of the slowest rank."""

    method: str
    package: str
    """The distribution that it comes from."""
    cache_fraction: float | None
    """Of a mode of this package that differs from others in nothing else."""
    forward_ms: float
    """Without gradients."""
    step_ms: float
    """Forward and backward."""
    forward_extra_bytes: int
    """Peak of allocated memory above inputs and results, of the rank with the largest."""
    step_extra_bytes: int
    loss_error: float
    """Relative to fp32, ``|x − ref| / |ref|``; of gradients in the Euclidean norm."""
    dhidden_error: float
    dweight_error: float
    graph_ms: float | None = None
    """Of the forward replayed as a CUDA graph, where that was tried."""
    alone_ms: float | None = None
    """Of the same shard's forward and backward without a group, on several ranks."""

    @property
    def exposed_ms(self) -> float | None:
        """What working together costs: messages that nothing hides, waiting, reductions."""
        return None if self.alone_ms is None else self.step_ms - self.alone_ms


@dataclass(frozen=True)
class ShapeResult:
    """All methods at one shape."""

    name: str
    T: int
    H: int
    V_local: int
    logits_bytes: int
    """What this rank's logits take in the dtype of the run."""
    logits_ms: float
    """cuBLAS: the logits ``[T, V_local]``; also called G."""
    dhidden_ms: float
    """cuBLAS: their gradient times the weight."""
    dweight_ms: float
    """cuBLAS: their gradient, transposed, times the hidden states."""
    measurements: list[Measurement]
    failures: dict[str, str]
    """Why a method gave no measurement."""

    @property
    def stored_ms(self) -> float:
        """3G: the products of a method that stores logits."""
        return self.logits_ms + self.dhidden_ms + self.dweight_ms

    @property
    def recomputed_ms(self) -> float:
        """4G: the products of a method that computes the logits twice."""
        return self.stored_ms + self.logits_ms


@dataclass(frozen=True)
class Report:
    """A run of the benchmark."""

    command: str
    device: str
    versions: dict[str, str]
    ranks: int
    sequence_parallel: bool
    dtype: str
    rounds: int
    shapes: list[ShapeResult]
    keep_gathered_hidden: bool = False

    @property
    def setting(self) -> str:
        """All but the shapes, in words."""
        ranks = f"{self.ranks} × {self.device}" if self.ranks > 1 else self.device
        parallel = ", sequence parallel" if self.sequence_parallel else ""
        parallel += ", gathered hidden states kept" if self.keep_gathered_hidden else ""
        versions = ", ".join(f"{name} {self.versions[name]}" for name in ("torch", "triton") if name in self.versions)
        return f"{ranks}{parallel}, {self.dtype}, {versions}"

    @property
    def methods(self) -> list[str]:
        """Every method of the run that gave a measurement, in the order of the run."""
        return list(dict.fromkeys(row.method for shape in self.shapes for row in shape.measurements))

    def save(self, path: Path) -> None:
        with replacing(path) as unfinished:
            unfinished.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Report":
        fields = json.loads(path.read_text(encoding="utf-8"))
        shapes = [
            ShapeResult(**shape | {"measurements": [Measurement(**row) for row in shape["measurements"]]})
            for shape in fields.pop("shapes")
        ]
        return cls(**fields, shapes=shapes)


def make_table(shape: ShapeResult, report: Report) -> Table:
    """One row per method, with the reason where it failed."""
    with_graph = any(row.graph_ms is not None for row in shape.measurements)
    several = report.ranks > 1
    table = Table(
        box=box.ROUNDED,
        title=(
            f"{shape.name}: T {shape.T}, H {shape.H}, V {shape.V_local}{' per rank' if several else ''}; "
            f"G {shape.logits_ms:.3f} ms, 3G {shape.stored_ms:.3f} ms, 4G {shape.recomputed_ms:.3f} ms, "
            f"logits {shape.logits_bytes / _MIB:,.0f} MiB"
        ),
    )
    table.add_column("method")
    headers = ["forward ms", *(["graph ms"] if with_graph else []), "/ G", "MiB", "fwd + bwd ms", "/ 3G", "/ 4G", "MiB"]
    for header in [*headers, *(["exposed ms"] if several else []), "loss error", "dhidden", "dweight"]:
        table.add_column(header, justify="right")
    for row in shape.measurements:
        table.add_row(
            row.method,
            f"{row.forward_ms:.3f}",
            *([_or_dash(row.graph_ms)] if with_graph else []),
            f"{row.forward_ms / shape.logits_ms:.2f}",
            f"{row.forward_extra_bytes / _MIB:,.0f}",
            f"{row.step_ms:.3f}",
            f"{row.step_ms / shape.stored_ms:.2f}",
            f"{row.step_ms / shape.recomputed_ms:.2f}",
            f"{row.step_extra_bytes / _MIB:,.0f}",
            *([_or_dash(row.exposed_ms)] if several else []),
            *(f"{error:.1e}" for error in (row.loss_error, row.dhidden_error, row.dweight_error)),
            style="bold" if row.cache_fraction is not None else None,
        )
    for method in shape.failures:
        table.add_row(method, "failed")
    table.caption = "\n".join(f"{method}: {reason}" for method, reason in shape.failures.items())
    table.caption_justify = "left"
    return table


def _or_dash(milliseconds: float | None) -> str:
    return "–" if milliseconds is None else f"{milliseconds:.3f}"
