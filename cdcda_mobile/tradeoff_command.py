"""``cdcda bench --table`` and ``--recommend``: read what was exported, predict, print."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from cdcda_export.card_values import duration, size
from cdcda_export.errors import ConfigError
from cdcda_export.manifest import write_atomic, write_json
from cdcda_mobile.phone.classes import get_phone
from cdcda_mobile.phone.predict import Speed
from cdcda_mobile.phone.tradeoff import Row, front_svg, recommend, table

# From the low end to the top: what the table shows where no phone is named.
USUAL = ("galaxy-a16", "pixel-7a", "galaxy-s23", "poco-f8-ultra")

_HEAD = (
    *("PHONE", "ARTIFACT", "USERS", "SIZE", "MEMORY", "DECODE tok/s", "PREFILL tok/s", "FIRST TOKEN"),
    *("HOST tok/s", "DEVICE tok/s", "KL", "GAIN KEPT", "TASKS"),
)


def show_table(arguments: argparse.Namespace) -> int:
    """Print the table of a user or a workspace, and write it with its plot beside the artifacts."""
    names = arguments.phone.split(",") if arguments.phone else USUAL
    found = table(arguments.artifact, [get_phone(name) for name in names], arguments.context)
    out = arguments.artifact / "bench"
    write_json(out / "tradeoff.json", {"rows": [row.as_json() for row in found]})
    plot = front_svg(found)
    if plot:
        write_atomic(out / "tradeoff.svg", plot)
    if arguments.json:
        print(json.dumps([row.as_json() for row in found], indent=2))
    else:
        print(_lines(found))
        print(f"{out / 'tradeoff.json'}{' and .svg' if plot else ''}")
    return 0


def show_recommendation(arguments: argparse.Namespace) -> int:
    """Print what to put on a phone; 1 where nothing will do.

    Raises:
        ConfigError: no phone is named, or several.
    """
    if not arguments.phone or "," in arguments.phone:
        raise ConfigError("--recommend picks for one phone: name it with --phone (cdcda bench --list-phones).")
    phone = get_phone(arguments.phone)
    chosen = recommend(table(arguments.artifact, [phone], arguments.context), arguments.min_tok_s)
    if arguments.json:
        row = chosen.row.as_json() if chosen.row else None
        print(json.dumps({"recommended": row, "why": chosen.why, "refused": chosen.refused}, indent=2))
    else:
        print(f"For a {phone.name}: {_described(arguments.artifact, chosen.row) if chosen.row else 'none'}")
        print(f"  {chosen.why}")
        for name, reason in chosen.refused.items():
            print(f"  not {name}: {reason}")
    return 0 if chosen.row else 1


def _described(path: Path, row: Row) -> str:
    speed = f"{_range(row.decode)} tok/s predicted" if row.decode else "speed unknown"
    place = path / row.name if row.users == 1 and (path / row.name).exists() else row.name
    return f"{place}, {size(row.bytes)}, {speed}, memory: {row.fit.verdict if row.fit else 'unknown'}"


def _range(speed: Speed | None) -> str:
    if speed is None:
        return "unknown"
    expected, low, high = speed.texts()
    return f"{expected} ({low}-{high})"


def _lines(found: Sequence[Row]) -> str:
    cells = [_HEAD]
    for row in found:
        q = row.quality
        cells.append(
            (
                row.phone,
                f"{'*' if row.front else ' '} {row.name}",
                str(row.users),
                size(row.bytes),
                f"{row.fit.verdict} ({size(row.fit.needed)})" if row.fit else "unknown",
                _range(row.decode) if row.format == "gguf" else "not calibrated",
                _range(row.prefill) if row.format == "gguf" else "not calibrated",
                duration(row.first_token) if row.first_token else "unknown",
                f"{row.host:.1f}" if row.host else "-",
                f"{row.device:.1f}" if row.device else "-",
                f"{q.kl:.4f}" if q.kl is not None else "-",
                f"{q.kept:.0%}" if q.kept is not None else "-",
                ", ".join(f"{name} {value:.3f}" for name, value in q.metrics.items()) or "-",
            )
        )
    widths = [max(len(row[column]) for row in cells) for column in range(len(_HEAD))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(
        [*lines, "* nothing exported is both faster and closer to the float32 model. Speeds of phones are predicted, 90 % interval."]
    )
