"""The report's figures as inline SVG.

matplotlib draws them in placeholder colours, which are then replaced by CSS variables: the page's own light or dark
theme colours the figures too. The three series colours are Okabe and Ito's (safe for colour-blind readers), and
series differ in line style as well.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from jmlr.evaluate import Interval, SummaryRow

_INK, _GRID = "#010101", "#020202"
_SERIES = ("#030303", "#040404", "#050505", "#060606")
_CSS = {_INK: "currentColor", _GRID: "var(--line)"} | {c: f"var(--series-{i})" for i, c in enumerate(_SERIES, 1)}
_STYLES = ("-", "--", ":", "-.")
_PHASES = ("joint", "rag", "closed-book")
_MOST_POINTS = 400
_RC = {
    "svg.fonttype": "none",  # text stays text: readable by screen readers, in the page's font
    "font.size": 9,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure ready for the page: heading, inline SVG (with its alternative text inside), caption."""

    title: str
    svg: str
    caption: str


def draw_all(rows: Sequence[SummaryRow], history: Sequence[Mapping[str, Any]]) -> list[Picture]:
    """Every figure for which there is something to show; rows of `history` as in `jmlr.report.write_report`."""
    labels = {row.name: row.label for row in rows}
    pictures = [
        system_bars(rows, "accuracy", "Accuracy by system"),
        system_bars(rows, "recall_at_1", "Recall@1 by system"),
        loss_curves(history, "loss_lm", "Language model loss", "nats per answer token", labels),
        loss_curves(history, "loss_rank", "Rank loss of the retriever", "nats per pair", labels),
        recall_curves(history, labels),
    ]
    return [picture for picture in pictures if picture is not None]


def system_bars(rows: Sequence[SummaryRow], measure: str, title: str) -> Picture | None:
    """Horizontal bars with intervals, one a system; `measure` names an `Interval` attribute of the rows."""
    bars: list[tuple[SummaryRow, Interval]] = []
    for row in rows:
        interval = getattr(row, measure)
        if interval is not None and math.isfinite(interval.mean):
            bars.append((row, interval))
    if not bars:
        return None
    with matplotlib.rc_context(_RC):
        figure, axes = _axes(height=0.75 + 0.36 * len(bars))
        for place, (row, interval) in enumerate(bars):
            colour = _SERIES[0] if row.name == "joint" else _SERIES[3]
            axes.barh(place, interval.mean, height=0.62, color=colour)
            if math.isfinite(interval.low):
                error = [[max(0.0, interval.mean - interval.low)], [max(0.0, interval.high - interval.mean)]]
                axes.errorbar(interval.mean, place, xerr=error, color=_INK, capsize=3, linewidth=1.2)
        axes.set_yticks(range(len(bars)), [row.label for row, _ in bars])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, 1)
        text = ", ".join(f"{row.label} {_words(interval)}" for row, interval in bars)
        return Picture(title, _svg(figure, f"{title}: {text}."), "Whiskers: confidence intervals over topics.")


def loss_curves(
    history: Sequence[Mapping[str, Any]], key: str, title: str, unit: str, labels: Mapping[str, str]
) -> Picture | None:
    """One curve a phase: every measurement faint, their running mean strong."""
    phases = _series(history, key)
    if not phases:
        return None
    with matplotlib.rc_context(_RC):
        figure, axes = _axes()
        summary = []
        for phase, (steps, values) in phases.items():
            colour, style = _look(phase, list(phases))
            smooth = _running_mean(values)
            thin = _thin(len(steps))
            if len(steps) > 4:
                axes.plot(steps[thin], values[thin], color=colour, alpha=0.25, linewidth=0.7)
            marker = "o" if len(steps) == 1 else None
            name = labels.get(phase, phase)
            axes.plot(
                steps[thin], smooth[thin], color=colour, linestyle=style, marker=marker, linewidth=1.8, label=name
            )
            summary.append(f"{name} from {smooth[0]:.3g} to {smooth[-1]:.3g} in {int(steps[-1])} steps")
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        _legend(axes)
        return Picture(title, _svg(figure, f"{title}: {'; '.join(summary)}."), "Strong: running mean.")


def recall_curves(history: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> Picture | None:
    """Recall@1 (solid) and recall@7 (dashed) over steps; ticks at the bottom where the index was refreshed."""
    measured = {key: _series(history, key) for key in ("recall@1", "recall@7")}
    phases = list(dict.fromkeys(phase for series in measured.values() for phase in series))
    if not phases:
        return None
    title = "Retrieval of the supporting passage"
    with matplotlib.rc_context(_RC):
        figure, axes = _axes()
        summary = []
        for style, (key, series) in zip(("-", "--"), measured.items(), strict=True):
            for phase, (steps, values) in series.items():
                colour, _ = _look(phase, phases)
                name = f"{key}, {labels.get(phase, phase)}" if len(phases) > 1 else key
                thin = _thin(len(steps))
                axes.plot(
                    steps[thin], values[thin], color=colour, linestyle=style, marker="o", markersize=3, label=name
                )
                summary.append(f"{name} from {values[0]:.2f} to {values[-1]:.2f}")
        refreshed = [row["step"] for row in history if row.get("refresh")]
        if refreshed:
            axes.plot(
                refreshed,
                np.full(len(refreshed), 0.03),
                color=_INK,
                marker="|",
                linestyle="none",
                label="index refreshed",
                transform=axes.get_xaxis_transform(),
            )
            summary.append(f"the index was refreshed {len(refreshed)} times")
        axes.set_ylim(0, 1.02)
        axes.set_xlabel("step")
        axes.set_ylabel("recall")
        _legend(axes)
        return Picture(title, _svg(figure, f"{title}: {'; '.join(summary)}."), "Measured during training.")


def _series(history: Sequence[Mapping[str, Any]], key: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    points: dict[str, list[tuple[float, float]]] = {}
    for row in history:
        value = row.get(key)
        if value is not None and math.isfinite(value):
            points.setdefault(str(row.get("phase", "joint")), []).append((row["step"], value))
    known = [phase for phase in _PHASES if phase in points]
    ordered = known + [phase for phase in points if phase not in known]
    series = {}
    for phase in ordered:
        array = np.asarray(sorted(points[phase]), dtype=np.float64)
        series[phase] = (array[:, 0], array[:, 1])
    return series


def _look(phase: str, phases: Sequence[str]) -> tuple[str, str]:
    # The known phases keep their colour in every figure, whatever else is drawn.
    place = _PHASES.index(phase) if phase in _PHASES else len(_PHASES) + list(phases).index(phase)
    return _SERIES[place % len(_SERIES)], _STYLES[place % len(_STYLES)]


def _running_mean(values: np.ndarray) -> np.ndarray:
    window = max(1, len(values) // 25)
    total = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return (total[ends] - total[starts]) / (ends - starts)


def _thin(points: int) -> np.ndarray:
    return np.unique(np.linspace(0, points - 1, min(points, _MOST_POINTS)).round().astype(int))


def _axes(height: float = 2.7) -> tuple[Figure, Axes]:
    # Narrow on purpose: on a phone the whole figure is scaled down by little, and its text stays readable.
    figure = Figure(figsize=(4.4, height), layout="constrained")
    return figure, figure.subplots()


def _legend(axes: Axes) -> None:
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=8)


def _words(interval: Interval) -> str:
    if not math.isfinite(interval.low):
        return f"{interval.mean:.2f}"
    return f"{interval.mean:.2f} ({interval.low:.2f} to {interval.high:.2f})"


def _svg(figure: Figure, alternative: str) -> str:
    figure.patch.set_alpha(0)
    for axes in figure.axes:
        axes.patch.set_alpha(0)
    buffer = io.StringIO()
    # A hash salt of its own keeps the clip-path ids of two figures on one page apart, and the file reproducible.
    with matplotlib.rc_context({"svg.hashsalt": alternative}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->|<defs>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    # Names like "axes_1" would occur once a figure, and ids must be unique on a page.
    wanted = set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in wanted else "", svg)
    for placeholder, css in _CSS.items():
        svg = svg.replace(placeholder, css)
    label = html.escape(alternative, quote=True)
    return re.sub(r"\s*\n\s*", "\n", svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)).strip()
