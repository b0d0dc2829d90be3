"""Which column of a source is the user, the date, the task, the input and the output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from cdcda_export.errors import ConfigError, did_you_mean
from cdcda_mobile.config import HistoryConfig
from cdcda_mobile.sources.records import Malformed, Row, as_user
from cdcda_mobile.tasks import TASKS, get_task

FIELDS = ("user", "id", "date", "task", "input", "output")

_SYNONYMS: dict[str, tuple[str, ...]] = {
    "user": ("user", "user_id", "userid", "username", "author", "author_id", "owner", "sender"),
    "id": ("id", "record_id", "uuid", "message_id", "guid"),
    "date": ("date", "datetime", "timestamp", "time", "created_at", "created", "sent", "published", "day", "year"),
    "task": ("task",),
    "input": ("input", "text", "body", "content", "article", "description", "prompt"),
    "output": ("output", "target", "gold", "completion"),
}


def check_map(config: HistoryConfig) -> None:
    """Refuse a mapping or a task that cannot be meant.

    Raises:
        ConfigError: an unknown key of the mapping, or an unknown task.
    """
    for key in config.map:
        if key not in FIELDS:
            raise ConfigError(f"The column mapping has no key '{key}'.{did_you_mean(key, FIELDS)}")
    if config.task:
        get_task(config.task)


def _completes(task: str) -> bool:
    return task in TASKS and bool(TASKS[task].completion)


class Columns:
    """The columns of one source, found once from its header.

    Args:
        found: column names of the source.
        config: the mapping and the task for rows without one.
        where: name of the source for messages.
        needs_user: False where the source as a whole belongs to one user.

    Raises:
        ConfigError: a mapped column is not there, or a needed one cannot be guessed.
    """

    def __init__(self, found: Iterable[str], config: HistoryConfig, where: str, needs_user: bool = True) -> None:
        check_map(config)
        self._found = {name.casefold(): name for name in reversed(list(found))}
        self._names = sorted(self._found.values())
        self._config = config
        self._where = where
        for field, name in config.map.items():
            if name not in self._names:
                raise ConfigError(f"{where} has no column '{name}' to be the {field}.{did_you_mean(name, self._names)}")
        self.user = self._simple("user")
        self.id = self._simple("id")
        self.date = self._simple("date")
        self.task = self._simple("task")
        self._pairs = {task: self._pair(task) for task in (TASKS if self.task else [config.task])}
        self._check(needs_user)

    def _simple(self, field: str) -> str:
        if field in self._config.map:
            return self._config.map[field]
        return next((self._found[name] for name in _SYNONYMS[field] if name in self._found), "")

    def _pair(self, task: str) -> tuple[str, str]:
        """Return the input and the output column for one task, "" where there is none; a lone text is an output where the task allows."""
        known = TASKS.get(task)  # a column such as "title" is an output for one task and nothing for another
        inputs, outputs = known.columns if known else ((), ())
        mapped = self._config.map
        source = mapped.get("input") or self._first("input", inputs, {mapped.get("output", "")})
        target = mapped.get("output") or self._first("output", outputs, {source})
        if known and known.completion and not (source and target):
            return "", source or target
        return source, target

    def _first(self, field: str, special: tuple[str, ...], taken: set[str]) -> str:
        free = {key: name for key, name in self._found.items() if name not in taken}
        candidates = (field, *special, *_SYNONYMS[field])
        return next((free[name] for name in candidates if name in free), "")

    def _check(self, needs_user: bool) -> None:
        if not self.task and not self._config.task:
            raise ConfigError(f"{self._where} has no task column: name the task of its records with --task, one of {', '.join(TASKS)}.")
        pairs = self._pairs.values()
        missing = [
            name
            for name, there in (
                ("user", bool(self.user) or not needs_user),
                ("date", bool(self.date)),
                ("input", any(source for source, _ in pairs) or any(self._pairs[task][1] for task in self._pairs if _completes(task))),
                ("output", any(target for _, target in pairs)),
            )
            if not there
        ]
        if missing:
            raise ConfigError(
                f"{self._where} has no column for the {missing[0]} among {', '.join(self._names) or 'no columns at all'}: "
                f"say which it is with --map {missing[0]}=COLUMN."
            )

    def needed(self) -> list[str]:
        """Return every column that some row may need, in a fixed order."""
        names = {self.user, self.id, self.date, self.task}
        for pair in self._pairs.values():
            names.update(pair)
        return sorted(names - {""})

    def user_of(self, values: Mapping[str, object]) -> str:
        """Return the user of a row, or "" where it names nobody."""
        return as_user(values.get(self.user)) if self.user else ""

    def row(self, values: Mapping[str, object], place: str, number: int) -> Row | Malformed:
        """Rename the columns of one row."""
        task = values.get(self.task) if self.task else None
        if task is None or task == "":
            task = self._config.task or None
        task = task.strip() if isinstance(task, str) else task
        source, target = self._pairs.get(task, ("", "")) if isinstance(task, str) else ("", "")
        if task in TASKS and not (target and (source or _completes(task))):
            lacking = "output" if source else "input"
            return Malformed(place, f"no column for the {lacking} of task {task} among {', '.join(self._names)}")
        fields = {"task": task, "input": values.get(source) if source else None, "output": values.get(target)}
        fields["id"] = values.get(self.id) if self.id else None
        fields["date"] = values.get(self.date)
        return Row(place, number, fields)
