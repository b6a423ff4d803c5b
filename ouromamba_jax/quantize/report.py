"""What a quantisation did, site by site, and what a model weighs."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from ouromamba_jax.ops.qtensor import packed_rows
from ouromamba_jax.quantize.activation import Calibrated, KernelLayout, Levels
from ouromamba_jax.report.tables import markdown_table


class Measured(NamedTuple):
    """Sums over the entries of some samples: of squares, of squared errors, of outliers, and how many there are."""

    signal: Array | float
    noise: Array | float
    outliers: Array | float
    entries: Array | float


def compare(exact: Array, rounded: Array, listed: Array | None = None) -> Measured:
    """What rounding does to an array, and the outliers among the entries of what was rounded, if there are any."""
    exact, rounded = exact.astype(jnp.float32), rounded.astype(jnp.float32)
    outliers = jnp.zeros(()) if listed is None else jnp.sum(listed, dtype=jnp.float32)
    entries = jnp.float32(1 if listed is None else listed.size)
    return Measured(jnp.sum(exact**2), jnp.sum((exact - rounded) ** 2), outliers, entries)


@dataclass(frozen=True)
class SiteReport:
    """One matmul or scan operand.

    Attributes:
      path: dotted path of the module, with the operand's name behind it for scans.
      kind: "matmul", "operand" or "parameter".
      weight_bits, act_bits, outlier_bits: None where there is no such tensor.
      granularity: which entries share a scale.
      outlier_rate: share of entries treated as outliers on the calibration images.
      second_byte: whether outliers are shifted into a second byte, since they exceed what one holds.
      sqnr_db: signal to quantisation noise of a matmul's output, or of the operand itself, on float inputs.
      quiet_tokens: tokens that the calibration images hardly excite (all directions), or where the images enter the
        model, that are the same in all of them: their steps are guesses.
      rules: (field, value, pattern of the rule that set it) of every setting that is not the config's.

    Examples:
      >>> from ouromamba_jax.quantize import SiteReport
      >>> site = SiteReport("blocks.0.mixer.in_proj", "matmul", 4, 4, 8, "token", outlier_rate=0.05, sqnr_db=20.0)
      >>> site.mean_bits  # 0.95 of the entries have 4 bits, 0.05 have 8
      4.2
    """

    path: str
    kind: str
    weight_bits: int | None
    act_bits: int | None
    outlier_bits: int | None
    granularity: str
    outlier_rate: float
    sqnr_db: float
    second_byte: bool = False
    quiet_tokens: int = 0
    rules: tuple[tuple[str, Any, str], ...] = ()

    @property
    def mean_bits(self) -> float | None:
        """act_bits + outlier_rate * (outlier_bits - act_bits)."""
        if self.act_bits is None:
            return None
        return self.act_bits + self.outlier_rate * ((self.outlier_bits or self.act_bits) - self.act_bits)


@dataclass(frozen=True)
class QuantReport:
    """Every quantised site, every parameter and operand that stayed float, and how the tuning went.

    Attributes:
      sites: one entry per matmul and scan operand; a layer that stands at several paths is listed at the first.
      kept_float: (path, number of entries, reason) of every parameter that stayed float.
      tuning: mean loss of every epoch, by stage; empty without tuning.
      float_operands: (path, reason) of the activations of scans and attention that are not rounded.

    Examples:
      >>> import ouromamba_jax as om
      >>> from ouromamba_jax.quantize import SiteReport
      >>> site = SiteReport("blocks.0.mixer.in_proj", "matmul", 4, 4, 8, "token", outlier_rate=0.05, sqnr_db=20.0)
      >>> report = om.QuantReport(sites=(site,), kept_float=(), tuning={})
      >>> report.mean_bits, report.mean_sqnr_db
      (4.2, 20.0)
    """

    sites: tuple[SiteReport, ...]
    kept_float: tuple[tuple[str, int, str], ...]
    tuning: dict[str, tuple[float, ...]]
    float_operands: tuple[tuple[str, str], ...] = ()

    @property
    def outlier_rate(self) -> float:
        """Mean over the matmuls' inputs; 0 if there is none."""
        rates = [s.outlier_rate for s in self.sites if s.kind == "matmul"]
        return float(np.mean(rates)) if rates else 0.0

    @property
    def mean_bits(self) -> float:
        """Mean over the matmuls' inputs; NaN if none is quantised."""
        found = [s.mean_bits for s in self.sites if s.kind == "matmul" and s.mean_bits is not None]
        return float(np.mean(found)) if found else float("nan")

    @property
    def mean_sqnr_db(self) -> float:
        """Mean over the matmuls' outputs; NaN if there is none."""
        found = [s.sqnr_db for s in self.sites if s.kind == "matmul"]
        return float(np.mean(found)) if found else float("nan")

    def rows(self) -> list[list[str]]:
        """The sites as table rows under `HEADERS`."""
        return [
            [
                s.path,
                s.kind,
                f"W{s.weight_bits or '-'}A{s.act_bits or '-'}O{s.outlier_bits or '-'}",
                s.granularity,
                f"{100 * s.outlier_rate:.2f} %",
                "yes" if s.second_byte else "",
                f"{s.sqnr_db:.1f} dB",
                "; ".join(f"{name}={value} by {pattern}" for name, value, pattern in s.rules),
            ]
            for s in self.sites
        ]

    def summary(self) -> str:
        """What the activations got, the three matmuls that lost most, and `warnings`."""
        matmuls = sorted((s for s in self.sites if s.kind == "matmul"), key=lambda s: s.sqnr_db)
        worst = ", ".join(f"{s.path} {s.sqnr_db:.1f} dB" for s in matmuls[:3])
        activations = (
            "activations in float"
            if np.isnan(self.mean_bits)
            else (
                f"activations of {self.mean_bits:.2f} bits on average, {100 * self.outlier_rate:.1f} % of them outliers"
            )
        )
        lines = [f"{len(matmuls)} matmuls, {activations}", f"lowest SQNR: {worst or 'none'}", *self.warnings()]
        return "\n".join(lines)

    def warnings(self) -> list[str]:
        """A sentence, if the calibration images hardly excite some tokens, or are all the same there."""
        quiet = [s for s in self.sites if s.quiet_tokens]
        if not quiet:
            return []
        worst = max(quiet, key=lambda s: s.quiet_tokens)
        return [
            f"The calibration images hardly excite some tokens of {len(quiet)} of {len(self.sites)} sites "
            f"(e.g. {worst.quiet_tokens} of {worst.path}), whose steps are guesses: calibrate with images that differ "
            "there, without bars or frames."
        ]

    def markdown(self) -> str:
        """The whole report as a Markdown page."""
        lines = [f"- `{path}` ({count} entries): {reason}" for path, count, reason in self.kept_float]
        lines += [f"- `{path}` (activation): {reason}" for path, reason in self.float_operands]
        floats = "\n".join(lines) or "nothing"
        legend = " ".join(LEGEND)
        return f"{self.summary()}\n\n{markdown_table(self.rows(), HEADERS)}\n{legend}\n\nKept in float:\n\n{floats}\n"

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values; what is not finite becomes None."""
        data = asdict(self) | {name: getattr(self, name) for name in ("mean_bits", "outlier_rate", "mean_sqnr_db")}
        return finite(data)

    def __str__(self) -> str:
        rows = [list(HEADERS), *self.rows()]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEADERS))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += ["", *LEGEND, *self.warnings(), "", "kept in float:"]
        lines += [f"  {path} ({count} entries): {reason}" for path, count, reason in self.kept_float]
        lines += [f"  {path} (activation): {reason}" for path, reason in self.float_operands]
        return "\n".join(lines)


def finite(tree: Any) -> Any:
    """The tree with None for floats that are not finite, which JSON does not have."""
    return jax.tree.map(lambda x: None if isinstance(x, float) and not np.isfinite(x) else x, tree)


HEADERS = ("site", "kind", "bits", "scales", "outliers", "2nd byte", "SQNR", "set by rules")
LEGEND = (
    "bits: of weights (W), activations (A) and their outliers (O); outliers: share of the entries;",
    "2nd byte: outliers shifted beyond what one byte holds; SQNR: of a matmul's output, of an operand itself",
)


@dataclass(frozen=True)
class MemoryReport:
    """Bytes a model's tensors need, as a checkpoint stores them: levels without gaps.

    Attributes:
      levels: integer weights and scan parameters.
      scales: weight and activation scales, thresholds, shifts and channel lists.
      float_parameters: what stayed float.
      fp16: bytes of the same model with every parameter in 16 bits.

    Examples:
      >>> import ouromamba_jax as om
      >>> om.MemoryReport(levels=700, scales=100, float_parameters=200, fp16=3500).compression
      3.5
    """

    levels: int
    scales: int
    float_parameters: int
    fp16: int

    @property
    def total(self) -> int:
        return self.levels + self.scales + self.float_parameters

    @property
    def compression(self) -> float:
        """fp16 / total."""
        return self.fp16 / self.total

    def _beside_fp16(self) -> str:
        if self.total <= self.fp16:
            return f"{self.compression:.2f}x smaller than FP16"
        return f"{1 / self.compression:.2f}x larger than FP16"

    def __str__(self) -> str:
        return (
            f"{self.total / 1e6:.2f} MB ({self.levels / 1e6:.2f} levels, {self.scales / 1e6:.2f} scales, "
            f"{self.float_parameters / 1e6:.2f} float), {self._beside_fp16()}"
        )


def memory_report(model: nnx.Module) -> MemoryReport:
    """Counts the bytes of a float or quantised model; also works on the shapes of `nnx.eval_shape`.

    Examples:
      >>> import ouromamba_jax as om
      >>> om.memory_report(om.load("vim_micro")).compression  # float32 is twice as big as FP16
      0.5
    """
    levels = scales = floats = parameters = 0
    for _, leaf in nnx.to_flat_state(nnx.state(model)):
        if isinstance(leaf, KernelLayout):
            continue
        array = leaf.get_value()
        if isinstance(leaf, Levels):
            rows, columns = leaf.shape
            levels += packed_rows(rows, leaf.bits) * columns
            parameters += rows * columns
        elif isinstance(leaf, Calibrated):
            scales += array.size * array.dtype.itemsize
        else:
            floats += array.size * array.dtype.itemsize
            parameters += array.size
    return MemoryReport(levels, scales, floats, 2 * parameters)
