"""What the user is asked for: the table ``tasks.toml``, after the LaMP benchmark (Salemi et al. 2023, arXiv 2304.11406)."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from cdcda_export.errors import ConfigError, did_you_mean

Metric = Literal["text", "label", "rating"]


@dataclass(frozen=True)
class Lamp:
    """How one dataset of the benchmark holds a task: ``tasks.toml`` explains the fields."""

    name: str
    task: str
    question: re.Pattern[str]
    profile: tuple[str, str]
    profile_task: str
    query: re.Pattern[str] | None = None

    def asked(self, text: str) -> str:
        """Return a question without the words of its template; our own prompt is put around it later."""
        found = self.question.match(text)
        return found.group("x") if found else text


@dataclass(frozen=True)
class Task:
    """One kind of record; ``tasks.toml`` explains the fields. ``labels`` is empty for free text, ``lamp`` None outside the benchmark."""

    name: str
    instruction: str
    metric: Metric
    person: str
    input: str
    output: str
    columns: tuple[tuple[str, ...], tuple[str, ...]]
    labels: tuple[str, ...] = ()
    completion: str = ""
    teaches: str = ""
    lamp: Lamp | None = None

    @property
    def told_by(self) -> tuple[str, ...]:
        """The tasks whose records tell of the person where this one is asked: itself, what a profile holds, texts without an input."""
        profile = self.lamp.profile_task if self.lamp else ""
        return tuple(dict.fromkeys(filter(None, (self.name, profile, self.completion))))

    def prompt(self, text: str) -> str:
        """Return the user's turn for one input."""
        return self.instruction.replace("{input}", text)

    def query(self, text: str) -> str:
        """Return what the past is searched for where an input is asked about."""
        found = self.lamp.query.search(text) if self.lamp and self.lamp.query else None
        return " ".join(found.groups()) if found else text


def _task(name: str, row: dict[str, Any]) -> Task:
    labels, columns, lamp = tuple(row.pop("labels", ())), row.pop("columns"), row.pop("lamp", None)
    if lamp is not None:
        question = re.compile(lamp["question"], re.DOTALL)
        query = re.compile(lamp["query"], re.DOTALL) if "query" in lamp else None
        lamp = Lamp(lamp["name"], name, question, tuple(lamp["profile"]), lamp.get("profile_task", name), query)
    row["instruction"] = row["instruction"].replace("{labels}", ", ".join(labels))
    row["columns"] = (tuple(columns["input"]), tuple(columns["output"]))
    return Task(name=name, labels=labels, lamp=lamp, **row)


def _read() -> dict[str, Task]:
    table = tomllib.loads(files(__package__).joinpath("tasks.toml").read_text(encoding="utf-8"))
    return {name: _task(name, row) for name, row in table.items()}


TASKS: dict[str, Task] = _read()


def get_task(name: str) -> Task:
    """Return a task by name.

    Raises:
        ConfigError: there is no such task.
    """
    try:
        return TASKS[name]
    except KeyError:
        raise ConfigError(f"There is no task '{name}'.{did_you_mean(name, TASKS)}") from None
