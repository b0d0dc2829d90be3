"""Values of a card, checked and formatted: nothing here trusts the type of what it is given.

A card is JSON and holds text that users and models wrote. What is missing or of a wrong type becomes None, an empty list or
"n/a", and text loses everything that a terminal or a browser would obey.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

# Whole CSI and OSC sequences, so that no "[31m" remains where a colour was; then two-character escapes. The 8-bit forms are
# dropped as the control characters they are: "\x9d" is common in text that was once decoded wrongly, and starts nothing there.
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b\n]*(?:\x07|\x1b\\)|\x1b[ -/]*[0-~]?")
_JOINERS = "\u200c\u200d"  # invisible, but scripts and emoji need them


def part(card: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a part of the card, empty where it is missing."""
    value = card.get(key)
    return value if isinstance(value, Mapping) else {}


def rows(card: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """Return a list of the card, empty where it is missing, without what is no object."""
    value = card.get(key)
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list | tuple) else []


def clean(value: object, lines: bool = False) -> str:
    """Return text without escape sequences, control characters, direction overrides and lone surrogates.

    Args:
        value: anything; None becomes ''.
        lines: keep line breaks; otherwise all white space becomes single spaces.
    """
    text = _ESCAPES.sub("", "" if value is None else str(value)).replace("\r\n", "\n").replace("\r", "\n")
    kept = []
    for character in text:
        category = unicodedata.category(character)
        if category == "Cs":
            kept.append("\ufffd")
        elif category in ("Zl", "Zp") or character in "\n\t":
            kept.append("\n" if category[0] == "Z" else character)
        elif category != "Cc" and (category != "Cf" or character in _JOINERS):
            kept.append(character)
    joined = "".join(kept)
    return joined.strip() if lines else " ".join(joined.split())


def finite(value: object) -> float | None:
    """Return a number, or None for anything else, NaN and infinity included."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:  # an integer beyond the range of floats
        return None
    return found if math.isfinite(found) else None


def number(value: object, digits: int = 3) -> str:
    """Return a measurement with fixed decimals; whole numbers that came as ``int`` stay whole."""
    found = finite(value)
    if found is None:
        return "n/a"
    if isinstance(value, int) and abs(found) < 1e15:
        return str(value)
    return f"{found:.{digits}f}" if abs(found) < 1e7 else f"{found:.3g}"


def significant(value: object) -> str:
    """Return a number with three significant digits: KL spans 0.0001 to 1."""
    found = finite(value)
    return "n/a" if found is None else f"{found:.3g}"


def percent(value: object) -> str:
    """Return a share as a percentage with at most one decimal."""
    found = finite(value)
    return "n/a" if found is None else f"{100 * found:.1f}".removesuffix(".0") + " %"


def size(value: object) -> str:
    """Return a number of bytes in decimal units."""
    found = finite(value)
    if found is None:
        return "n/a"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if found >= scale:
            return f"{found / scale:.1f} {unit}"
    return f"{found:.0f} bytes"


def duration(value: object) -> str:
    """Return seconds as people say them."""
    found = finite(value)
    if found is None:
        return "n/a"
    if found < 9.95:
        return f"{found:.1f} s"
    whole = round(found)
    if whole < 120:
        return f"{whole} s"
    minutes, seconds = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"


def counts(value: object) -> list[tuple[str, int]]:
    """Return name and count pairs, the most frequent first."""
    if not isinstance(value, Mapping):
        return []
    found = [(clean(name), int(n)) for name, n in value.items() if finite(n) is not None]
    return sorted(found, key=lambda pair: (-pair[1], pair[0]))


def shorten(value: object, cells: int) -> str:
    """Return text in one line of at most ``cells`` terminal cells, with an ellipsis where it was cut."""
    from rich.cells import cell_len, set_cell_size

    text = clean(value)
    return text if cell_len(text) <= cells else set_cell_size(text, cells - 1).rstrip() + "…"
