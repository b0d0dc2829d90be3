"""What a fleet shows while it works: a table that is redrawn in place on a terminal, lines elsewhere, nothing when asked."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cdcda_export.card_values import clean, duration
from cdcda_export.progress import Live, Plain, Progress, Silent

_NAMED = 3


@dataclass(frozen=True)
class Event:
    """How far one cohort is; the newest says everything, so that one that gets lost does no harm.

    Attributes:
        cohort: its number.
        where: the machine and the cores that work on it.
        label: the step it is at.
        done: of the step, in ``unit``.
        total: None if that is not known.
        unit: of ``done`` and ``total``.
        note: such as a loss.
        warning: something the user should know; such an event says nothing else.
    """

    cohort: int
    where: str = ""
    label: str = ""
    done: int = 0
    total: int | None = None
    unit: str = ""
    note: str = ""
    warning: str = ""


class Reporter(Silent):
    """The progress of a cohort, in the worker: sends events to whoever shows them.

    Args:
        cohort: its number.
        where: the machine and the cores that work on it.
        send: takes an event and returns at once.
    """

    _EVERY_S = 0.3  # a table is read by people, and every event is a message

    def __init__(self, cohort: int, where: str, send: Any) -> None:
        super().__init__()
        self._cohort, self._where, self._send = cohort, where, send
        self._label, self._unit, self._note = "", "", ""
        self._done = 0
        self._total: int | None = None
        self._sent = 0.0

    def start(self, label: str, total: int | None = None, unit: str = "") -> None:
        """Say the step's name."""
        self._label, self._total, self._unit, self._note, self._done = label, total, unit, "", 0
        self._tell()

    def advance(self, n: int = 1, note: str = "") -> None:
        """Say how far it is, not more often than a person can read."""
        self._done += n
        self._note = note
        if time.monotonic() - self._sent >= self._EVERY_S:
            self._tell()

    def done(self, note: str = "") -> None:
        """Say that the step ended."""
        self._note = note or self._note
        self._tell()

    def warn(self, text: str) -> None:
        """Remember the warning, and send it."""
        super().warn(text)
        self._send(Event(self._cohort, self._where, warning=text))

    def _tell(self) -> None:
        self._sent = time.monotonic()
        self._send(Event(self._cohort, self._where, self._label, self._done, self._total, self._unit, self._note))


class View:
    """Shows nothing, and counts; ``Lines`` and ``Table`` show what it is told.

    Args:
        users: how many there are.
    """

    def __init__(self, users: int) -> None:
        self.users, self.finished, self.failed = users, 0, 0
        self.began = time.monotonic()
        self.names: dict[int, str] = {}
        self.states: dict[int, Event] = {}

    def waits(self, cohort: int, users: Sequence[str]) -> None:
        """A cohort was handed in."""
        more = f" and {len(users) - _NAMED} more" if len(users) > _NAMED else ""
        self.names[cohort] = clean(", ".join(users[:_NAMED]) + more)

    def told(self, event: Event) -> None:
        """A worker said how far its cohort is."""
        if event.cohort not in self.names:
            return  # it has ended: this one came late
        if event.warning:
            self.line(f"warning: {self.names[event.cohort]}: {event.warning}")
            return
        before = self.states.get(event.cohort)
        self.states[event.cohort] = event
        if before is None or before.label != event.label:
            self.stage(event)

    def stage(self, event: Event) -> None:
        """A cohort came to another step."""

    def ended(self, cohort: int, users: int, failed: int) -> None:
        """A cohort is done; ``failed`` of its users are failures."""
        self.finished, self.failed = self.finished + users, self.failed + failed
        names = self.names.pop(cohort, "")
        self.states.pop(cohort, None)
        if users:
            self.line(f"{names}: {'done' if not failed else f'{failed} failed'} ({self.totals()})")

    def line(self, text: str) -> None:
        """State a fact."""

    def totals(self) -> str:
        """Return how far all of it is, in a few words."""
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{self.finished} of {self.users} users{failed}, {duration(time.monotonic() - self.began)}"

    def draw(self) -> None:
        """Show what changed; called a few times a second."""

    def close(self) -> None:
        """End."""


class Lines(View):
    """A line for every step of every cohort, through a progress that writes lines."""

    def __init__(self, users: int, progress: Progress) -> None:
        super().__init__(users)
        self._progress = progress

    def stage(self, event: Event) -> None:
        """Write the step's name."""
        size = f" ({event.total} {event.unit})".replace(" )", ")") if event.total is not None else ""
        self.line(f"{self.names[event.cohort]}: {event.label}{size} on {event.where}")

    def line(self, text: str) -> None:
        """Write the line."""
        self._progress.say(text)


class Table(Lines):
    """A row for every cohort under way, redrawn in place; what ended is a line above."""

    def __init__(self, users: int, progress: Progress) -> None:
        super().__init__(users, progress)
        from rich.console import Console
        from rich.live import Live as Screen

        self._screen = Screen(console=Console(stderr=True), auto_refresh=False, transient=True)
        self._screen.start()

    def stage(self, event: Event) -> None:
        """Do nothing: the table shows it."""

    def line(self, text: str) -> None:
        """Print above the table."""
        self._screen.console.print(text, highlight=False, markup=False)

    def draw(self) -> None:
        """Draw the table anew."""
        self._screen.update(self.table(), refresh=True)

    def table(self) -> Any:
        """Return the table as it is now, below the totals."""
        from rich import box
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table as Grid
        from rich.text import Text

        waiting = len(self.names.keys() - self.states.keys())
        title = self.totals() + (f", {waiting} cohort{'s' if waiting > 1 else ''} waiting" if waiting else "")
        grid = Grid("users", "step", "", "", "", "on", box=box.SIMPLE_HEAD, pad_edge=False)
        for cohort, event in sorted(self.states.items()):
            bar = ProgressBar(total=event.total or None, completed=event.done, width=16) if event.total else Text("")
            count = f"{event.done}/{event.total} {event.unit}" if event.total else ""
            grid.add_row(*(Text(t) for t in (self.names[cohort], event.label)), bar, *(Text(t) for t in (count, event.note, event.where)))
        return Group(Text(title), grid) if self.states else Text(title)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._screen.stop()


def choose_view(users: int, progress: Progress) -> View:
    """Return what shows a fleet the way that a progress shows its steps."""
    if isinstance(progress, Live):
        return Table(users, progress)
    return Lines(users, progress) if isinstance(progress, Plain) else View(users)
