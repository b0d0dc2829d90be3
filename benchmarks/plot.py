"""Line plots of results as SVG that follows light and dark: a few lines of text instead of a dependency."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from cdcda_export.report_plot import ticks

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 400, 280, 52, 16, 56, 44
_STYLE = """
svg { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; background: #ffffff; }
text { fill: #1f2328; } .muted { fill: #5c636c; } .title { font-weight: 600; }
.grid { stroke: #dedbd3; } .axis { stroke: #5c636c; }
polyline { fill: none; stroke-width: 2; } .a { stroke: #0b6b66; } .b { stroke: #5f6f8a; stroke-dasharray: 6 4; }
circle.a { fill: #0b6b66; } circle.b { fill: #ffffff; stroke-dasharray: none; }
@media (prefers-color-scheme: dark) {
  svg { background: #14171a; } text { fill: #e5e3de; } .muted { fill: #a4abb3; } .grid { stroke: #343a41; } .axis { stroke: #a4abb3; }
  .a { stroke: #62cdc3; } .b { stroke: #93a5c6; } circle.a { fill: #62cdc3; } circle.b { fill: #14171a; }
}
"""


@dataclass(frozen=True)
class Panel:
    """One plot: values over places that stand at equal distances.

    Attributes:
        title: of the plot.
        x_label: what the places are.
        y_label: the unit of the values.
        x: names of the places.
        lines: name -> a value at every place; at most two.
        from_zero: values stand on zero; False where zero means nothing, as with likelihoods.
    """

    title: str
    x_label: str
    y_label: str
    x: Sequence[str]
    lines: dict[str, Sequence[float]]
    from_zero: bool = True


def svg(panels: Sequence[Panel]) -> str:
    """Return the panels side by side."""
    drawn = "".join(f'<g transform="translate({at * _WIDTH} 0)">{_panel(panel)}</g>' for at, panel in enumerate(panels))
    spoken = "; ".join(f"{panel.title}: {_spoken(panel)}" for panel in panels)
    width = _WIDTH * len(panels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {_HEIGHT}" width="{width}" height="{_HEIGHT}" role="img" '
        f'aria-label="{escape(spoken)}"><style>{_STYLE}</style>{drawn}</svg>\n'
    )


def _spoken(panel: Panel) -> str:
    return ", ".join(f"{name} from {values[0]:.3g} to {values[-1]:.3g} {panel.y_label}" for name, values in panel.lines.items())


def _text(x: float, y: float, text: str, css: str = "muted", anchor: str = "middle") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">{escape(text)}</text>'


def _panel(panel: Panel) -> str:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    known = [value for values in panel.lines.values() for value in values]
    marks = ticks(0.0 if panel.from_zero else min(known), max(known))
    places = [_LEFT + 16 + at * (right - _LEFT - 32) / max(1, len(panel.x) - 1) for at in range(len(panel.x))]

    def height(value: float) -> float:
        return bottom - (value - marks[0]) / (marks[-1] - marks[0]) * (bottom - _TOP)

    drawn = [_text(_LEFT, 18, panel.title, "title", "start")]
    for mark in marks:
        y = height(mark)
        drawn.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(_text(_LEFT - 8, y + 4, f"{mark:g}", anchor="end"))
    drawn.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    drawn += [_text(x, bottom + 18, name) for x, name in zip(places, panel.x, strict=True)]
    drawn.append(_text((_LEFT + right) / 2, _HEIGHT - 8, panel.x_label))
    middle = (_TOP + bottom) / 2
    drawn.append(f'<g transform="rotate(-90 14 {middle})">{_text(14, middle, panel.y_label)}</g>')
    for at, (name, values) in enumerate(panel.lines.items()):
        css, x = "ab"[at], _LEFT + 150 * at
        points = [(place, height(value)) for place, value in zip(places, values, strict=True)]
        drawn.append(f'<polyline class="{css}" points="{" ".join(f"{px:.1f},{py:.1f}" for px, py in points)}"/>')
        drawn += [
            f'<circle class="{css}" cx="{px:.1f}" cy="{py:.1f}" r="3"><title>{escape(name)}: {value:.3g}</title></circle>'
            for (px, py), value in zip(points, values, strict=True)
        ]
        drawn.append(f'<polyline class="{css}" points="{x},34 {x + 24},34"/>{_text(x + 31, 38, name, "", "start")}')
    return "".join(drawn)


def costs_svg(costs: dict[str, Any], pairs: dict[str, Any] | None) -> str:
    """Return what ``train_speed`` says of cost; the peer stands beside ours where it was measured, at its share of one epoch.

    Args:
        costs: samples of one epoch, by cohort size and by records per user.
        pairs: the comparison, None where there is none.
    """
    size = {int(count): sample["seconds"] / int(count) for count, sample in costs["by_size"].items()}
    history = dict(sorted((int(count), sample["seconds"] / costs["users"]) for count, sample in costs["by_records"].items()))
    lines: dict[str, Sequence[float]] = {"ours": list(size.values())}
    if pairs:
        peer = statistics.median(sample["seconds"] for sample in pairs["peer"]) / pairs["users"] / pairs["epochs"]
        lines["PEFT + Trainer"] = [peer] * len(size)
    panels = [
        Panel("Seconds per user and epoch", "users of the cohort", "seconds", [str(count) for count in size], lines),
        Panel(f"With {costs['users']} users", "records per user", "seconds", [str(n) for n in history], {"ours": list(history.values())}),
    ]
    return svg(panels)
