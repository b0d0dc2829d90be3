"""How long work tells that it moves: a bar with an ETA on a terminal, plain lines elsewhere, nothing when asked.

Library code takes a ``Progress``; only the command line chooses which one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, TextIO


class Progress(Protocol):
    """What long work may say."""

    def start(self, label: str, total: int | None = None, unit: str = "") -> None:
        """Begin a step of ``total`` units; ends the step before it."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Report ``n`` more units done, with a short note such as a loss."""

    def done(self, note: str = "") -> None:
        """End the step."""

    def say(self, text: str) -> None:
        """State a fact in one line."""

    def warn(self, text: str) -> None:
        """State something the user should know before trusting the result."""


class Silent:
    """Says nothing; warnings are remembered in ``warnings``."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def start(self, label: str, total: int | None = None, unit: str = "") -> None:
        """Do nothing."""

    def advance(self, n: int = 1, note: str = "") -> None:
        """Do nothing."""

    def done(self, note: str = "") -> None:
        """Do nothing."""

    def say(self, text: str) -> None:
        """Do nothing."""

    def warn(self, text: str) -> None:
        """Remember the warning."""
        self.warnings.append(text)


class Plain(Silent):
    """One line when a step begins and one when it ends: for logs and pipes."""

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()
        self._stream = stream or sys.stderr
        self._label = ""
        self._began = 0.0

    def _line(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def start(self, label: str, total: int | None = None, unit: str = "") -> None:
        """Write the step's name."""
        self.done()
        self._label, self._began = label, time.monotonic()
        self._line(f"{label} ..." if total is None else f"{label} ({total} {unit}) ...".replace(" )", ")"))

    def done(self, note: str = "") -> None:
        """Write the step's duration."""
        if self._label:
            self._line(f"{self._label}: done in {time.monotonic() - self._began:.1f} s{', ' + note if note else ''}")
            self._label = ""

    def say(self, text: str) -> None:
        """Write the line."""
        self._line(text)

    def warn(self, text: str) -> None:
        """Write and remember the warning."""
        super().warn(text)
        self._line(f"warning: {text}")


class Live(Silent):
    """A bar with count, note, elapsed time and ETA, redrawn in place (rich)."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console

        self._console = Console(stderr=True)
        self._bar: Any = None
        self._task: Any = None
        self._label = ""
        self._began = 0.0

    def start(self, label: str, total: int | None = None, unit: str = "") -> None:
        """Open a bar."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self.done()
        self._label, self._began = label, time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn(unit + " {task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._task = self._bar.add_task(label, total=total, note="")
        self._bar.start()

    def advance(self, n: int = 1, note: str = "") -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, advance=n, note=note)

    def done(self, note: str = "") -> None:
        """Close the bar and leave one line."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            seconds = time.monotonic() - self._began
            self._console.print(f"[green]✓[/] {self._label} [dim]{seconds:.1f} s{', ' + note if note else ''}[/]", highlight=False)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, highlight=False, markup=False)

    def warn(self, text: str) -> None:
        """Print and remember the warning."""
        super().warn(text)
        self._console.print(f"! {text}", style="yellow", highlight=False, markup=False)


def choose_progress(quiet: bool = False) -> Progress:
    """Return a live bar on a terminal, plain lines elsewhere, silence when asked."""
    if quiet:
        return Silent()
    return Live() if sys.stderr.isatty() else Plain()


def progress_of_bytes(progress: Progress, label: str, total: int) -> Callable[[int], None]:
    """Begin a step of so many bytes, shown in MB, and return what is told of bytes that are done."""
    mega, seen = 10**6, 0
    progress.start(label, total // mega, "MB")

    def advance(count: int) -> None:
        nonlocal seen
        progress.advance((seen + count) // mega - seen // mega)
        seen += count

    return advance
