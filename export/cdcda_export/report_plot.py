"""The plots of the report: inline SVG without a script, coloured by the page's style sheet so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cdcda_export.card_values import finite, number

_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 18, 34, 44
_SERIES = (("validation_nll", "validation", "validation NLL"), ("train_loss", "train", "training loss"))


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Return round numbers that span at least ``low`` to ``high``, about ``wanted`` of them."""
    if high - low < 1e-6 * max(1.0, abs(low)):
        low, high = low - 0.5, low + 0.5
    rough = (high - low) / max(1, wanted - 1)
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(s * scale for s in (1, 2, 2.5, 5, 10) if s * scale >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


@dataclass(frozen=True)
class _Frame:
    """Where data land in the picture: x and y ticks, and the width and height of the picture in units of its view box."""

    x: list[float]
    y: list[float]
    width: int
    height: int

    def px(self, value: float) -> float:
        """Return the horizontal position of a step."""
        share = (value - self.x[0]) / (self.x[-1] - self.x[0])
        return round(_LEFT + share * (self.width - _LEFT - _RIGHT), 1)

    def py(self, value: float) -> float:
        """Return the vertical position of a loss."""
        share = (value - self.y[0]) / (self.y[-1] - self.y[0])
        return round(self.height - _BOTTOM - share * (self.height - _TOP - _BOTTOM), 1)


def curve_points(curve: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """Return (step, value) of the evaluations that have both."""
    found = ((finite(point.get("step")), finite(point.get(key))) for point in curve)
    return sorted((x, y) for x, y in found if x is not None and y is not None and abs(x) < 1e9 and abs(y) < 1e6)


def curve_svg(curve: Sequence[Mapping[str, Any]], best_step: object, width: int, height: int) -> str:
    """Return the training curve, '' where no point can be drawn.

    Args:
        curve: evaluations with ``step``, ``train_loss`` and ``validation_nll``, each of which may be missing.
        best_step: the step whose weights were kept; marked where it is known.
        width: of the view box; the text keeps its size, so a narrow screen wants a narrow picture and not a shrunk one.
        height: of the view box.
    """
    series = [(css, name, curve_points(curve, key)) for key, css, name in _SERIES]
    values = [y for _, _, points in series for _, y in points]
    steps = [x for _, _, points in series for x, _ in points]
    if not values:
        return ""
    x_ticks = [t for t in ticks(min(0.0, *steps), max(steps), 5 if width < 500 else 9) if t == round(t)]
    if len(x_ticks) < 2:
        x_ticks = [min(0.0, *steps), max(1.0, *steps)]
    frame = _Frame(x_ticks, ticks(min(values), max(values)), width, height)
    drawn = [_axes(frame), _best(frame, best_step, series[0][2])]
    drawn += [_line(frame, css, name, points) for css, name, points in reversed(series)]
    drawn.append(_legend([(css, name) for css, name, points in series if points]))
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_spoken(series, best_step)}">{"".join(drawn)}</svg>'


def _spoken(series: Sequence[tuple[str, str, list[tuple[float, float]]]], best_step: object) -> str:
    said = [
        f"{name} from {number(points[0][1])} at step {points[0][0]:.0f} to {number(points[-1][1])} at step {points[-1][0]:.0f}"
        for _, name, points in series
        if points
    ]
    best = finite(best_step)
    return "Training curve: " + "; ".join([*said, *([f"best step {best:.0f}"] if best is not None else [])])


def _text(x: float, y: float, anchor: str, css: str, text: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" class="{css}">{text}</text>'


def _axes(frame: _Frame) -> str:
    left, right, bottom = _LEFT, frame.width - _RIGHT, frame.height - _BOTTOM
    digits = next(d for d in range(5) if d == 4 or all(abs(t - round(t, d)) < 1e-9 for t in frame.y))
    drawn = []
    for value in frame.y:
        y = frame.py(value)
        drawn.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
        drawn.append(_text(left - 8, y + 4, "end", "tick", f"{value:.{digits}f}"))
    for value in frame.x:
        x = frame.px(value)
        drawn.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 4}"/>')
        drawn.append(_text(x, bottom + 18, "middle", "tick", f"{value:.0f}"))
    drawn.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    drawn.append(_text((left + right) / 2, frame.height - 8, "middle", "tick", "training step"))
    middle = (_TOP + bottom) / 2
    drawn.append(f'<text x="14" y="{middle}" text-anchor="middle" class="tick" transform="rotate(-90 14 {middle})">nats per token</text>')
    return "".join(drawn)


def _best(frame: _Frame, best_step: object, validation: list[tuple[float, float]]) -> str:
    best = finite(best_step)
    if best is None or not frame.x[0] <= best <= frame.x[-1]:
        return ""
    x, top = frame.px(best), _TOP
    drawn = f'<line class="bestline" x1="{x}" x2="{x}" y1="{top}" y2="{frame.height - _BOTTOM}"/>'
    anchor, shift = ("end", -6) if x > frame.width / 2 else ("start", 6)
    drawn += _text(x + shift, top + 12, anchor, "", f"kept: step {best:.0f}")
    return drawn + "".join(f'<circle class="best" cx="{x}" cy="{frame.py(y)}" r="7"/>' for step, y in validation if step == best)


def _line(frame: _Frame, css: str, name: str, points: list[tuple[float, float]]) -> str:
    path = " ".join(f"{frame.px(x)},{frame.py(y)}" for x, y in points)
    line = f'<polyline class="{css}" points="{path}"/>' if len(points) > 1 else ""
    spots = (
        f'<circle class="{css}" cx="{frame.px(x)}" cy="{frame.py(y)}" r="3"><title>step {x:.0f}: {name} {number(y)}</title></circle>'
        for x, y in points
    )
    return line + "".join(spots)


def _legend(entries: Sequence[tuple[str, str]]) -> str:
    drawn, x = [], _LEFT
    for css, name in entries:
        drawn.append(f'<line class="{css}" x1="{x}" x2="{x + 26}" y1="14" y2="14"/>{_text(x + 33, 18, "start", "", name)}')
        x += 150
    return "".join(drawn)


def gate_svg(value: object, gate: object, name: str, show: Callable[[object], str], lower_is_better: bool) -> str:
    """Return a bullet graph of a measurement and its gate, '' where one is missing.

    Args:
        value: what was measured.
        gate: its bound.
        name: said to a screen reader.
        show: formats a number.
        lower_is_better: it may lie below its gate; otherwise it is a share that may lie above.
    """
    measured, bound = finite(value), finite(gate)
    if measured is None or bound is None:
        return ""
    end = 1.25 * max(measured, bound, 1e-9) if lower_is_better else 1.0
    width = 300
    at, mark = (round(width * min(1.0, max(0.0, v / end)), 1) for v in (measured, bound))
    below, above = ("within", "beyond") if lower_is_better else ("beyond", "within")
    passed = measured <= bound if lower_is_better else measured >= bound
    word = "at most" if lower_is_better else "at least"
    anchor = "end" if mark > width / 2 else "start"
    return (
        f'<svg viewBox="0 0 {width} 42" role="img" aria-label="{name} {show(measured)}; the gate is {word} {show(bound)}">'
        f'<rect class="{below}" x="0" y="2" width="{mark}" height="18"/>'
        f'<rect class="{above}" x="{mark}" y="2" width="{round(width - mark, 1)}" height="18"/>'
        f'<rect class="measured{"" if passed else " failed"}" x="0" y="7" width="{max(at, 1.5)}" height="8"/>'
        f'<line class="gate" x1="{mark}" x2="{mark}" y1="0" y2="22"/>'
        f"{_text(mark, 37, anchor, 'tick', f'gate: {word} {show(bound)}')}</svg>"
    )
