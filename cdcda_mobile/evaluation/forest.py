"""The forest plot of paired differences, as SVG that follows light and dark: one row per comparison, one panel per metric."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from cdcda_export.report_plot import ticks
from cdcda_mobile.evaluation.report import LOWER_IS_BETTER, Comparison

_WIDTH, _LEFT, _RIGHT, _ROW, _TOP, _BOTTOM = 980, 350, 240, 26, 54, 40
_CLAIM = 0.05
_STYLE = """
svg { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; background: #ffffff; }
text { fill: #1f2328; } .muted { fill: #5c636c; } .title { font-weight: 600; }
.grid { stroke: #dedbd3; } .axis { stroke: #5c636c; }
.mark { stroke: #0b6b66; stroke-width: 2; fill: #0b6b66; } .open { stroke: #5f6f8a; stroke-width: 2; fill: #ffffff; }
@media (prefers-color-scheme: dark) {
  svg { background: #14171a; } text { fill: #e5e3de; } .muted { fill: #a4abb3; } .grid { stroke: #343a41; } .axis { stroke: #a4abb3; }
  .mark { stroke: #62cdc3; fill: #62cdc3; } .open { stroke: #93a5c6; fill: #14171a; }
}
"""


def forest_svg(comparisons: Sequence[Comparison]) -> str:
    """Return the plot, '' where there is nothing to compare; filled marks are claims that survive Holm's correction at 5 %."""
    metrics = list(dict.fromkeys(comparison.metric for comparison in comparisons))
    drawn, height = [], 0
    for metric in metrics:
        mine = [comparison for comparison in comparisons if comparison.metric == metric]
        drawn.append(f'<g transform="translate(0 {height})">{_panel(metric, mine)}</g>')
        height += _TOP + _ROW * len(mine) + _BOTTOM
    if not drawn:
        return ""
    spoken = "; ".join(f"{c.metric}, {_name(c)}: {_said(c)}" for c in comparisons)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" role="img" '
        f'aria-label="{escape(spoken)}"><style>{_STYLE}</style>{"".join(drawn)}</svg>\n'
    )


def _name(comparison: Comparison) -> str:
    same = comparison.a.precision == comparison.b.precision
    a, b = (comparison.a.name, str(comparison.b)) if same else (str(comparison.a), str(comparison.b))
    return f"{comparison.task}: {a} − {b}"


def _bounds(comparison: Comparison) -> tuple[float, float]:
    """Return the interval; a single user has none and is drawn as a point."""
    d = comparison.difference
    return (d.mean, d.mean) if d.low is None or d.high is None else (d.low, d.high)


def _said(comparison: Comparison) -> str:
    d = comparison.difference
    interval = "" if d.low is None or d.high is None else f" [{d.low:+.3f}, {d.high:+.3f}]"
    return f"{d.mean:+.3f}{interval}, p {_p(comparison):.2g}"


def _p(comparison: Comparison) -> float:
    d = comparison.difference
    return d.p if d.p_holm is None else d.p_holm


def _text(x: float, y: float, text: str, css: str = "muted", anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{escape(text)}</text>'


def _panel(metric: str, comparisons: Sequence[Comparison]) -> str:
    right, bottom = _WIDTH - _RIGHT, _TOP + _ROW * len(comparisons)
    bounds = [_bounds(comparison) for comparison in comparisons]
    marks = ticks(min(0.0, *(low for low, _ in bounds)), max(0.0, *(high for _, high in bounds)))

    def place(value: float) -> float:
        return _LEFT + (value - marks[0]) / (marks[-1] - marks[0]) * (right - _LEFT)

    better = ("first arm better", "second arm better") if metric in LOWER_IS_BETTER else ("second arm better", "first arm better")
    drawn = [_text(8, 18, f"{metric}: difference over the same users", "title", "start")]
    drawn += [_text(_LEFT, 40, f"← {better[0]}", anchor="start"), _text(right, 40, f"{better[1]} →", anchor="end")]
    for mark in marks:
        css = "axis" if mark == 0 else "grid"
        drawn.append(f'<line class="{css}" x1="{place(mark):.1f}" x2="{place(mark):.1f}" y1="{_TOP - 6}" y2="{bottom}"/>')
        drawn.append(_text(place(mark), bottom + 16, f"{mark:g}"))
    for row, (comparison, (low, high)) in enumerate(zip(comparisons, bounds, strict=True)):
        y, css = _TOP + _ROW * row + _ROW / 2, "mark" if _p(comparison) < _CLAIM else "open"
        drawn.append(_text(8, y + 4, _name(comparison), "", "start"))
        drawn.append(f'<line class="{css}" x1="{place(low):.1f}" x2="{place(high):.1f}" y1="{y}" y2="{y}"/>')
        drawn.append(f'<circle class="{css}" cx="{place(comparison.difference.mean):.1f}" cy="{y}" r="4"/>')
        drawn.append(_text(_WIDTH - 8, y + 4, _said(comparison), anchor="end"))
    return "".join(drawn)
