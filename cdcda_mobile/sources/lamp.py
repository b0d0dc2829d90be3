"""Histories in the file format of the LaMP benchmark (Salemi et al. 2023, arXiv 2304.11406).

``<split>_questions.json`` is an array of ``{"id", "input", "profile": [...]}``; ``<split>_outputs.json`` is
``{"task": "LaMP_3", "golds": [{"id", "output"}]}``. In the time split a question has a ``user_id`` and profile items have a
``date``. In the user split neither is there: every question is a person of its own, named by the question's id.
"""

from __future__ import annotations

import datetime as dt
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdcda_export.errors import ConfigError, DataError
from cdcda_mobile.config import HistoryConfig
from cdcda_mobile.sources.columns import check_map
from cdcda_mobile.sources.json_stream import iter_json_array, json_value
from cdcda_mobile.sources.records import Malformed, Row, Unusable, as_user, normal_date
from cdcda_mobile.tasks import TASKS, Lamp

_FOLDER = re.compile(r"LaMP_\d[A-Z]?", re.IGNORECASE)
_SPLIT = re.compile(r"(?:^|_)(train|dev|test)_questions\.json$")
_RANK = {"train": 1, "dev": 2, "test": 3}


# The tasks that the benchmark has, by its own names.
DATASETS: dict[str, Lamp] = {task.lamp.name: task.lamp for task in TASKS.values() if task.lamp}


@dataclass(frozen=True)
class _File:
    """One questions file: its dataset, whether it is of the time split, and its place in time."""

    path: Path
    name: str
    dataset: Lamp
    timed: bool
    rank: int

    def questions(self) -> Iterator[tuple[str, Any]]:
        for number, question in enumerate(iter_json_array(self.path), 1):
            yield f"{self.name} question {number}", question

    @property
    def outputs(self) -> Path:
        return self.path.with_name(self.path.name.replace("_questions.json", "_outputs.json"))

    def owner(self, question: Any) -> str:
        """Return the user of a question, "" where it names nobody."""
        return as_user(question.get("user_id" if self.timed else "id")) if isinstance(question, dict) else ""

    def golds(self, wanted: set[str]) -> Iterator[tuple[str, Any]]:
        """Yield (question id, output) where the outputs file has one of the wanted questions."""
        if not wanted or not self.outputs.is_file():
            return
        for gold in iter_json_array(self.outputs, key="golds"):
            if isinstance(gold, dict) and as_user(gold.get("id")) in wanted:
                yield as_user(gold["id"]), gold.get("output")


def find_questions(directory: Path) -> list[Path]:
    """Return the questions files of a directory and its sub-directories: train, dev, test, then others."""
    files = directory.rglob("*_questions.json")
    return sorted(files, key=lambda path: (_rank(path), path.as_posix()))


def _rank(path: Path) -> int:
    found = _SPLIT.search(path.name)
    return _RANK[found.group(1)] if found else len(_RANK) + 1


def _recognise(path: Path, question: Any, config: HistoryConfig) -> Lamp:
    """Tell the dataset of a file by the words of its first question, else by a folder's name, else by the task asked for."""
    text = question.get("input") if isinstance(question, dict) else None
    for dataset in DATASETS.values():
        if isinstance(text, str) and dataset.question.match(text):
            return dataset
    named = _FOLDER.findall(path.as_posix())[-1:]
    by_number = [dataset for dataset in DATASETS.values() if named and dataset.name.lower().startswith(named[0][:6].lower())]
    if by_number:
        # Where a number has several datasets, by the letter after it, else by the fields of the profile.
        exact = [dataset for dataset in by_number if dataset.name.lower() == named[0].lower()]
        return (exact or [dataset for dataset in by_number if _holds(question, dataset)] or by_number)[0]
    for dataset in DATASETS.values():
        if config.task == dataset.task:
            return dataset
    raise DataError(f"The first question of {path} fits no LaMP task: name it with --task, or the folder LaMP_1 ... LaMP_7.")


def _holds(question: Any, dataset: Lamp) -> bool:
    """Say whether the first item of a question's profile has the fields of a dataset."""
    profile = question.get("profile") if isinstance(question, dict) else None
    item = profile[0] if isinstance(profile, list) and profile else None
    return isinstance(item, dict) and {field for field in dataset.profile if field} <= item.keys()


class LampSource:
    """A directory of LaMP files of one task and one split, streamed question by question.

    Profile items become records as the table of datasets says. Two profiles hold no pairs of their task:

    * LaMP-1 (title, abstract) gives ``paper_title`` records, abstract to title.
    * LaMP-7 (tweets) gives completions: the input is the beginning of the tweet, the output is the whole of it.

    A question with a gold output follows its own profile in time. Without dates (user split) the order of the file is kept by
    counting days from 0001-01-01, which are valid dates and plainly not real ones.

    Raises:
        ConfigError: the directory mixes tasks or splits, whose users are different people under the same numbers.
        DataError: the files fit no LaMP task.
    """

    def __init__(self, directory: Path, config: HistoryConfig) -> None:
        check_map(config)
        if config.map:
            raise ConfigError("LaMP files have fixed columns: leave --map away.")
        self.label = str(directory)
        self._files = self._choose(directory, config)

    def _choose(self, directory: Path, config: HistoryConfig) -> list[_File]:
        files = []
        for path in find_questions(directory):
            first = next(iter_json_array(path), None)
            if first is None:
                continue
            timed = isinstance(first, dict) and "user_id" in first
            dataset = _recognise(path, first, config)
            files.append(_File(path, path.relative_to(directory).as_posix(), dataset, timed, _rank(path)))
        there = sorted({file.dataset.name for file in files})
        if config.task:
            files = [file for file in files if file.dataset.task == config.task]
            if there and not files:
                tasks = " and ".join(f"{name} ({DATASETS[name].task})" for name in there)
                raise ConfigError(f"{directory} holds {tasks}, nothing for the task {config.task}.")
        elif len(there) > 1:
            raise ConfigError(
                f"{directory} holds {' and '.join(there)}, where the same number is not the same person: "
                "choose one with --task, or give its folder."
            )
        if len({file.timed for file in files}) > 1:
            raise ConfigError(f"{directory} holds files of the user split and of the time split: give the folder of one.")
        return files

    def rows(self, user: str) -> Iterator[Row | Malformed]:
        """Yield the user's profile items and questions; questions that name nobody are malformed whoever asks."""
        reading = _Reading()
        home = ""
        for file in self._files:
            asked: dict[str, _Question] = {}
            for place, question in file.questions():
                owner = file.owner(question)
                if not owner:
                    yield Malformed(place, "not a question with an id" if not file.timed else "no user_id")
                elif owner == user and not file.timed and home:
                    yield Malformed(place, f"its id is a user of its own and already stands in {home}")
                elif owner == user:
                    home = place
                    yield from reading.profile(file, place, question)
                    if identity := as_user(question.get("id")):
                        asked[identity] = _Question(place, question.get("input"), reading.after(file.rank))
                    else:
                        yield Malformed(place, "no id")
            for identity, output in file.golds(set(asked)):
                yield reading.answer(file.dataset, identity, asked[identity], output)

    def users(self) -> Iterator[str]:
        """Yield the user of every question."""
        for file in self._files:
            for _, question in file.questions():
                if owner := file.owner(question):
                    yield owner

    def scored_as(self) -> dict[str, str]:
        """Return dataset -> the name in its outputs files, under which LaMP's scorer knows it (``LaMP_2`` for either of the two)."""
        named = {file.dataset.name: json_value(file.outputs, "task") for file in self._files if file.outputs.is_file()}
        return {dataset: name for dataset, name in named.items() if isinstance(name, str) and name}


@dataclass(frozen=True)
class _Question:
    place: str
    text: object
    date: str


class _Reading:
    """What is remembered while one user is read: the profiles of a user's questions overlap in the time split."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._position = 0
        self._number = 0
        self._last = ""

    def _next(self) -> int:
        self._number += 1
        return self._number

    def profile(self, file: _File, place: str, question: dict[str, Any]) -> Iterator[Row | Malformed]:
        """Yield the items of one profile that no earlier question of the user had."""
        items = question.get("profile")
        self._last = ""
        if not isinstance(items, list):
            yield Malformed(place, "no profile")
            return
        dated = file.timed or any(isinstance(item, dict) and "date" in item for item in items)
        new = set()
        for number, item in enumerate(items, 1):
            where = f"{place} profile item {number}"
            if not isinstance(item, dict):
                yield Malformed(where, f"not an object but {type(item).__name__}")
                continue
            date = item.get("date") if dated else self._day()
            self._last = max(self._last, _date_or_none(date))
            mark = json.dumps(item, sort_keys=True)
            if mark not in self._seen:
                new.add(mark)
                yield self._item(file.dataset, where, item, date)
        self._seen |= new

    def _item(self, dataset: Lamp, place: str, item: dict[str, Any], date: object) -> Row | Malformed:
        fields = {"id": item.get("id"), "date": date, "task": dataset.profile_task}
        source, target = dataset.profile
        fields["input"], fields["output"] = item.get(source) if source else None, item.get(target)
        return Row(place, self._next(), fields)

    def _day(self) -> str:
        """Return the next made-up date."""
        self._position += 1
        return dt.date.fromordinal(self._position).isoformat()

    def after(self, rank: int) -> str:
        """Return a date just after the profile that was read last: train before dev before test."""
        if not self._last:
            return ""
        # A partial date such as 2019 is its own beginning.
        padded = self._last + "0001-01-01"[len(self._last) :]
        try:
            return (dt.datetime.fromisoformat(padded) + dt.timedelta(seconds=rank)).isoformat()
        except OverflowError:  # the last second of the year 9999
            return self._last

    def answer(self, dataset: Lamp, identity: str, question: _Question, output: object) -> Row:
        """Return the row of a question and its gold output."""
        text = dataset.asked(question.text) if isinstance(question.text, str) else question.text
        fields = {"id": f"q{identity}", "date": question.date, "task": dataset.task, "input": text, "output": output}
        return Row(question.place, self._next(), fields)


def _date_or_none(date: object) -> str:
    try:
        return normal_date(date)
    except Unusable:
        return ""  # the item itself is reported by whoever cleans its row
