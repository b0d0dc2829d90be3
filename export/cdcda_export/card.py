"""The card in the terminal: the last thing a user sees. Compact and coloured there, plain lines to grep anywhere else."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

from cdcda_export.card_facts import (
    NOT_APPLICABLE,
    Facts,
    Measure,
    cautions,
    compared,
    facts,
    headline,
    next_steps,
    tasks,
    verdict,
)
from cdcda_export.card_values import clean, finite, number, part, rows, shorten

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

_WIDTH, _MAX_WIDTH = 80, 100
_LABEL = 9  # cells of the left column
_SAMPLES, _WARNINGS, _TASKS = 3, 5, 5
_PLAIN_TEXT = 300  # characters of a sample where nothing limits the width
_COLOURS = {"good": "green", "bad": "red", "unknown": "yellow"}
_MARKS = {"good": "✓", "bad": "✗", "unknown": "?"}
_ROLES = ("base", "personal", "user")


def print_card(card: Mapping[str, Any], file: TextIO | None = None) -> None:
    """Print the card: rich on a terminal that can show it, plain text elsewhere.

    Args:
        card: the card as JSON holds it.
        file: where to; standard output when None.
    """
    stream = file or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    if not stream.isatty() or os.environ.get("TERM") == "dumb" or not encoding.lower().startswith("utf"):
        text = "\n".join(plain_lines(card)) + "\n"
        stream.write(text.encode(encoding, "replace").decode(encoding))  # a Latin-1 pipe gets "?", not a traceback
        stream.flush()
        return
    from rich.console import Console

    console = Console(file=stream, highlight=False)
    console.print(render_card(card, min(console.width, _MAX_WIDTH)))


def plain_lines(card: Mapping[str, Any]) -> list[str]:
    """Return the card as lines that each name what they say: no colour, no box, ASCII but for what users wrote."""
    lines = [f"{headline(card)}: {verdict(card).word}"]
    said = facts(card)
    lines += [f"{label}: {line}" for label, found in said[:3] for line in found]
    found = tasks(card)
    lines += [f"task {t.task} (n {t.n}): {'  '.join(map(compared, t.measures))}" for t in found] or [f"tasks: {NOT_APPLICABLE}"]
    samples = rows(card, "samples")[:_SAMPLES]
    for i, sample in enumerate(samples, 1):
        title = " ".join(filter(None, (clean(sample.get("task")), clean(sample.get("date")))))
        lines.append(f"sample {i} ({title}): {shorten(sample.get('input'), _PLAIN_TEXT)}")
        lines += [f"sample {i} {role}: {shorten(sample.get(role), _PLAIN_TEXT)}" for role in _ROLES]
    if not samples:
        lines.append(f"samples: {NOT_APPLICABLE}")
    lines += [f"{label}: {line}" for label, found in said[3:] for line in found]
    lines += [f"warning: {text}" for text in cautions(card)]
    lines += [f"next: {purpose}: {command}" for purpose, command in next_steps(card)]
    return lines


def render_card(card: Mapping[str, Any], width: int | None = None) -> RenderableType:
    """Return the card for a terminal.

    Args:
        card: the card as JSON holds it.
        width: cells to fit into; 80 when None.
    """
    from rich.console import Group
    from rich.text import Text

    cells = max(40, width or _WIDTH)
    said = facts(card)
    parts: list[RenderableType] = [_title(card, cells), _fact_table(said[:3])]
    parts += [Text(""), _task_table(card, cells), Text(""), *_sample_lines(card, cells)]
    parts += [Text(""), _fact_table(said[3:], curve=_sparkline(card))]
    found = cautions(card)
    if found:
        more = [f"and {len(found) - _WARNINGS} more warnings, in the report"] if len(found) > _WARNINGS else []
        shown = [*found[:_WARNINGS], *more]
        parts += [Text(""), _hanging([(Text("!", style="bold yellow"), Text(text, style="yellow")) for text in shown])]
    steps = next_steps(card)
    if steps:
        # Commands stay whole, however long, so that they can be copied.
        pairs = [(Text(f"{purpose}:", style="dim"), Text(command, style="bold cyan")) for purpose, command in steps]
        parts += [Text(""), _hanging(pairs)]
    return Group(*parts)


def _title(card: Mapping[str, Any], cells: int) -> RenderableType:
    from rich.text import Text

    found = verdict(card)
    style = _COLOURS[found.state]
    text = Text(f"{_MARKS[found.state]} ", style=f"bold {style}")
    text.append(shorten(headline(card), cells - len(found.word) - 6), style="bold")
    text.append(f"  {found.word} ", style=style)
    text.append("─" * max(0, cells - text.cell_len), style="dim")
    return text


def _fact_table(said: Facts, curve: str = "") -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 1))
    table.add_column(width=_LABEL, no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for label, lines in said:
        for i, line in enumerate(lines):
            shown = Text(line.replace(" -> ", " → "), style="dim" if line == NOT_APPLICABLE else "")
            table.add_row(label.capitalize() if i == 0 else "", _emphasised(shown, label, i))
        if label == "training" and curve:
            table.add_row("", Text(curve, style="cyan"))
    return table


def _emphasised(text: Text, label: str, line: int) -> Text:
    if label == "file" and line == 0:
        text.stylize("bold")
    if text.plain.startswith("quantized twice"):
        text.stylize("yellow")
    text.highlight_regex(r"(?<=KL )\S+|(?<=top-1 )\S+ %", "bold")
    text.highlight_regex(r"FAILED", "bold red")
    return text


def _task_table(card: Mapping[str, Any], cells: int) -> RenderableType:
    from rich.text import Text

    found = tasks(card)
    if not found:
        return _fact_table([("tasks", [NOT_APPLICABLE])])
    titles = [Text(shorten(t.task, 16), style="bold").append(f" n={t.n}", style="not bold dim") for t in found[:_TASKS]]
    left = max(title.cell_len for title in titles)
    pairs = [(Text("Task", style="dim"), Text("base → personal; ↓ less is better, ↑ more is better", style="dim"))]
    for title, result in zip(titles, found, strict=False):
        lines = _filled([_measure_text(measure) for measure in result.measures], cells - left - 1)
        pairs += [(title if i == 0 else Text(""), line) for i, line in enumerate(lines)]
    if len(found) > _TASKS:
        pairs.append((Text(""), Text(f"and {len(found) - _TASKS} more tasks, in the report", style="dim")))
    return _hanging(pairs)


def _filled(items: list[Text], cells: int) -> list[Text]:
    """Lay items out in lines, none broken across two."""
    lines = [items[0]]
    for item in items[1:]:
        if lines[-1].cell_len + 2 + item.cell_len <= cells:
            lines[-1] = lines[-1] + "  " + item
        else:
            lines.append(item)
    return lines


def _measure_text(measure: Measure) -> Text:
    from rich.text import Text

    arrow = "↓" if measure.lower_is_better else "↑"
    style = {True: "bold green", False: "bold red", None: "bold"}[measure.better]
    return Text(f"{arrow} {shorten(measure.name, 16)} {number(measure.base)} → ").append(number(measure.personal), style=style)


def _sample_lines(card: Mapping[str, Any], cells: int) -> list[RenderableType]:
    from rich.text import Text

    found = rows(card, "samples")[:_SAMPLES]
    if not found:
        return [_fact_table([("samples", [NOT_APPLICABLE])])]
    lines: list[RenderableType] = [Text(f"The first {len(found)} held-out prompts, not chosen", style="dim")]
    styles = {"base": "dim", "personal": "bold", "user": "italic"}
    for sample in found:
        title = f"{shorten(sample.get('task'), 16)} "
        asked = shorten(sample.get("input"), cells - len(title) - 1)
        lines.append(Text(title, style="bold cyan").append(asked, style="not bold cyan"))
        for role in _ROLES:
            text = Text(f"  {role:<{_LABEL}}", style="dim")
            text.append(shorten(sample.get(role), cells - _LABEL - 3) or "(nothing)", style=styles[role])
            lines.append(text)
    return lines


def _hanging(pairs: list[tuple[Text, Text]]) -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for left, right in pairs:
        table.add_row(left, right)
    return table


def _sparkline(card: Mapping[str, Any]) -> str:
    """Return validation NLL over the evaluations as one line of blocks, '' with fewer than two."""
    values = [v for v in (finite(p.get("validation_nll")) for p in rows(part(card, "training"), "curve")) if v is not None]
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    step = max(1, -(-len(values) // 40))
    blocks = "".join("▁▂▃▄▅▆▇█"[round(7 * (v - low) / ((high - low) or 1))] for v in values[::step])
    return f"{blocks} validation NLL {number(values[0])} → {number(low)}"
