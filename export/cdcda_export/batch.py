"""Many exports of one base in one process: each succeeds or fails by name, and none takes another one down."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cdcda_export.card_values import clean, duration, size
from cdcda_export.errors import CdcdaError, ConfigError, DiskFull, is_disk_full
from cdcda_export.progress import Progress, Silent


@dataclass(frozen=True)
class Outcome:
    """What became of one export; ``error`` is '' where it succeeded, ``level`` how far it was verified."""

    name: str
    seconds: float = 0.0
    file: str = ""
    bytes: int = 0
    level: str = ""
    reused: bool = False
    error: str = ""
    warnings: tuple[str, ...] = ()


def run_batch(names: Sequence[str], export: Callable[[str, Progress], dict[str, Any]], progress: Progress, unit: str) -> list[Outcome]:
    """Export one after another and return what became of each, in order.

    Args:
        names: users or adapters.
        export: makes one artifact and returns its card; what it says on the way is not shown, its warnings are on the card.
        progress: moves once per name.
        unit: what a name is, for the progress.

    Raises:
        ConfigError: a name stands twice.
    """
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"'{twice[0]}' is named twice; one run exports each of the {unit} once.")
    outcomes: list[Outcome] = []
    progress.start("exporting", len(names), unit)
    for at, name in enumerate(names):
        began = time.monotonic()
        try:
            card = export(name, Silent())
        except (CdcdaError, OSError) as error:
            outcomes.append(Outcome(name, time.monotonic() - began, error=str(error)))
            if isinstance(error, DiskFull) or (isinstance(error, OSError) and is_disk_full(error)):
                outcomes += [Outcome(later, error="not tried: the disk was full") for later in names[at + 1 :]]
                break
        else:
            outcomes.append(outcome_of(name, time.monotonic() - began, card))
        failed = sum(bool(outcome.error) for outcome in outcomes)
        progress.advance(note=f"{failed} failed" if failed else "")
    progress.done()
    return outcomes


def outcome_of(name: str, seconds: float, card: dict[str, Any]) -> Outcome:
    """Return what a card says in short."""
    artifact, reused = card["artifact"], all(stage["reused"] for stage in card["stages"])
    level, warnings = card["verification"]["level"], tuple(card.get("warnings", ()))
    return Outcome(name, seconds, artifact["file"], artifact["bytes"], level, reused, warnings=warnings)


def summary_lines(outcomes: Sequence[Outcome], done: str = "exported") -> list[str]:
    """Return one line for every one of them, the failed ones last, and one for all; ``done`` is what was done with them."""
    good, bad = [o for o in outcomes if not o.error], [o for o in outcomes if o.error]
    width = max((len(outcome.name) for outcome in outcomes), default=0)
    lines = []
    for o in good:
        took = "reused" if o.reused else duration(o.seconds)
        lines.append(f"ok      {o.name:<{width}}  {took:>7}  {size(o.bytes):>9}  {_LEVELS[o.level]}  {o.file}")
        lines += [f"        {'':<{width}}  warning: {clean(text)}" for text in o.warnings]
    lines += [f"FAILED  {o.name:<{width}}  {o.error}" for o in bad]
    reused, seconds = sum(o.reused for o in good), sum(o.seconds for o in outcomes)
    lines.append(f"{len(good)} {done} ({reused} of them reused), {len(bad)} failed, {duration(seconds)} of work")
    return lines


_LEVELS = {"full": "verified       ", "quick": "checked quickly", "off": "not verified   ", "": "trained        "}
