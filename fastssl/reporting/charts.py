"""Curves of the training as SVG within a page: its style sheet gives them the colors of a light or a dark page."""

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import Literal, NamedTuple

import numpy as np

from fastssl.common.figures import LINE_STYLES
from fastssl.reporting.runs import Curve
from fastssl.reporting.variants import Variant
from fastssl.training.metric_text import SHARES, label

WIDTH, HEIGHT = 420, 260  # units of a chart; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 54, 24, 10, 40  # around the panel; the last label below it may reach half out of it
MARGIN = 0.04  # between the lines and the ends of an axis, as a share of their span
POINTS = 150  # of a line, at most
MOST_LINES = 14  # of a chart; more cannot be told apart
COLORS = 7  # classes c0 to c6 of the page's style sheet
LOG_SPAN = 50  # largest / smallest value, from which on an axis is logarithmic
# In the order of the report. A metric that no run has logged gets no chart.
METRICS = (
    "loss", "knn", "rankme_h", "rankme_z", "sigma_h", "sigma_z", "kl_h", "kl_z", "std_z", "grad_norm",
    "images_per_second",
)  # fmt: skip


class Chart(NamedTuple):
    title: str
    svg: str


class _Axis(NamedTuple):
    low: float
    high: float
    is_log: bool

    def share(self, value: np.ndarray | float) -> np.ndarray:
        """Return where values are between the ends of the axis, from 0 to 1."""
        if self.is_log:
            return np.log(np.asarray(value) / self.low) / math.log(self.high / self.low)
        return (np.asarray(value) - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        if self.is_log:
            exponents = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            return [10.0**exponent for exponent in exponents] or [self.low, self.high]
        step = 10 ** math.floor(math.log10((self.high - self.low) / 3))
        step = next(step * factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (step * factor) <= 6)
        first = math.ceil(self.low / step)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def curve_charts(variants: Sequence[Variant]) -> list[Chart]:
    """Return a chart over epochs for each metric, and of the probe's accuracy one over time too."""
    shown = variants[:MOST_LINES]
    charts = []
    for metric in METRICS:
        charts += _chart(metric, "epoch", shown)
        if metric == "knn":
            charts += _chart(metric, "hours", shown)
    return charts


def legend(variants: Sequence[Variant]) -> str:
    """Return the names of the lines of all charts."""
    names = "".join(
        f'<li><svg viewBox="0 0 36 8" aria-hidden="true">'
        f'<path class="c{number % COLORS}" d="M0 4H36" {_dashes(number)}/></svg>{escape(variant.label)}</li>'
        for number, variant in enumerate(variants[:MOST_LINES])
    )
    left_out = len(variants) - MOST_LINES
    more = f"<p>The first {MOST_LINES} of {len(variants)} variants.</p>" if left_out > 0 else ""
    return f'<ul class="legend">{names}</ul>{more}'


def _chart(metric: str, over: Literal["epoch", "hours"], variants: Sequence[Variant]) -> list[Chart]:
    """Return the chart of a metric, none if no run has it."""
    scale = 100.0 if metric in SHARES else 1.0
    lines = []
    for number, variant in enumerate(variants):
        curves = [run.curves[metric] for run in variant.runs if metric in run.curves]
        if curves:
            x_P, y_P = mean_curve(curves, over)
            lines.append((number, x_P, scale * y_P))
    if not lines:
        return []
    unit = ", %" if metric in SHARES else ""
    title = f"{label(metric).partition(',')[0]}{unit} by {over}"
    x_axis = _axis([x_P for _, x_P, _ in lines], may_be_log=False)
    y_axis = _axis([y_P for _, _, y_P in lines], may_be_log=metric not in SHARES)
    return [Chart(title, _svg(title, over, x_axis, y_axis, lines))]


def mean_curve(curves: Sequence[Curve], over: Literal["epoch", "hours"]) -> tuple[np.ndarray, np.ndarray]:
    """Return (P,) positions and (P,) values of the mean of several runs' curves, to where the shortest one ends."""
    xs = [curve.epoch if over == "epoch" else curve.seconds / 3600 for curve in curves]
    start, end = max(x[0] for x in xs), min(x[-1] for x in xs)
    x_P = np.unique(np.concatenate([x[(x >= start) & (x <= end)] for x in xs]))
    if len(x_P) == 0:  # one ends before another begins
        x_P = xs[0]
    if len(x_P) > POINTS:
        x_P = np.linspace(x_P[0], x_P[-1], POINTS)
    return x_P, np.mean([np.interp(x_P, x, curve.value) for x, curve in zip(xs, curves)], axis=0)


def _axis(columns: Iterable[np.ndarray], may_be_log: bool) -> _Axis:
    values = np.concatenate(list(columns))
    low, high = float(values.min()), float(values.max())
    if may_be_log and low > 0 and high / low > LOG_SPAN:
        reach = (high / low) ** MARGIN
        return _Axis(low / reach, high * reach, is_log=True)
    if high - low <= 1e-9 * max(abs(high), 1e-9):
        reach = abs(low) / 2 or 0.5
    else:
        reach = MARGIN * (high - low)
    return _Axis(low - reach, high + reach, is_log=False)


def _svg(
    title: str, over: str, x_axis: _Axis, y_axis: _Axis, lines: Sequence[tuple[int, np.ndarray, np.ndarray]]
) -> str:
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    parts = []
    for tick in y_axis.ticks():
        y = TOP + height * (1 - float(y_axis.share(tick)))
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in x_axis.ticks():
        x = LEFT + width * float(x_axis.share(tick))
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick:.4g}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    parts.append(f'<text x="{LEFT + width / 2}" y="{HEIGHT - 6}" text-anchor="middle">{over}</text>')
    for number, x_P, y_P in lines:
        xs = LEFT + width * x_axis.share(x_P)
        ys = TOP + height * (1 - y_axis.share(y_P))
        points = "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(xs.tolist(), ys.tolist()))
        parts.append(f'<path class="c{number % COLORS}" d="M{points}" {_dashes(number)}/>')
        if len(x_P) == 1:
            parts.append(f'<circle class="c{number % COLORS}" cx="{xs[0]:.1f}" cy="{ys[0]:.1f}" r="2"/>')
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'


def _dashes(number: int) -> str:
    """Return the dashes of a line, in units of twice its width."""
    style = LINE_STYLES[number % len(LINE_STYLES)]
    if isinstance(style, str):
        return ""
    return f'stroke-dasharray="{" ".join(f"{2 * length:g}" for length in style[1])}"'
