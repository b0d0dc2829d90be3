"""The building blocks of the report: every one escapes what it is given, but for parameters that are said to be HTML."""

from __future__ import annotations

import html
from collections.abc import Iterable

from cdcda_export.card_facts import NOT_APPLICABLE
from cdcda_export.card_values import clean

_LONG, _LONGEST = 320, 8000  # characters of a sample: shown at once, and at all
_NONE = f'<p class="none">{NOT_APPLICABLE.capitalize()}</p>'


def escaped(value: object) -> str:
    """Return text safe to stand in HTML, on one line."""
    return html.escape(clean(value))


def section(title: str, *content: str) -> str:
    """Return a section; without content it says that it does not apply."""
    body = "\n".join(filter(None, content))
    return f"<section>\n<h2>{title}</h2>\n{body or _NONE}\n</section>"


def definitions(css: str, pairs: Iterable[tuple[str, str]]) -> str:
    """Return a definition list; values are HTML already."""
    return f'<dl class="{css}">\n' + "".join(f"<dt>{name}</dt><dd>{value}</dd>\n" for name, value in pairs) + "</dl>"


def quoted(value: object) -> str:
    """Return what somebody wrote, in paragraphs; a long text folds away."""
    text = clean(value, lines=True)
    if not text:
        return '<p class="none">(nothing)</p>'
    if len(text) <= _LONG:
        return f"<p>{html.escape(text)}</p>"
    whole = html.escape(text[:_LONGEST] + ("…" if len(text) > _LONGEST else ""))
    cut = clean(text[:_LONG].rpartition(" ")[0] or text[:_LONG])
    return f"<p>{html.escape(cut)}…</p><details><summary>Whole text</summary><p>{whole}</p></details>"


def table(caption: str, columns: Iterable[tuple[str, str]], bodies: Iterable[str]) -> str:
    """Return a table; a column is its name and class, a body is HTML already."""
    head = "".join(f'<th scope="col" class="{css}">{name}</th>' for name, css in columns)
    body = "\n".join(bodies)
    return f'<div class="scroll"><table>\n<caption>{caption}</caption>\n<thead><tr>{head}</tr></thead>\n{body}\n</table></div>'


def bars(entries: Iterable[tuple[str, float, str, bool]]) -> str:
    """Return labelled bars: name, length, what to show, and whether it is the main one."""
    found = list(entries)
    longest = max((length for _, length, _, _ in found), default=0.0) or 1.0
    items = "".join(
        f'<li><span class="what">{escaped(name)}</span><div class="track" aria-hidden="true">'
        f'<div class="fill{" main" if main else ""}" style="width:{100 * max(0.0, length) / longest:.2f}%"></div></div>'
        f'<span class="value">{shown}</span></li>\n'
        for name, length, shown, main in found
    )
    return f'<ul class="bars">\n{items}</ul>'
