"""The people of the personalization experiment: real users of the shared data, their few records, and everybody else.

Headlines and sections come from the News Category Dataset (Misra 2022, arXiv 2209.11429, CC BY 4.0), commits from public repositories.
"""

from __future__ import annotations

import gzip
import json
import random
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cdcda_mobile.config import HistoryConfig
from cdcda_mobile.evaluation.arms import Person
from cdcda_mobile.history import History, Record, Split, check_split, split_by_time, text_of

Row = dict[str, Any]
_LONGEST = 300  # characters of an input: a commit of a hundred files fits no training, and costs what ten others do
_SECTIONS_AT_LEAST = 2  # among the few records: a user with one section has nothing to be learned


@dataclass(frozen=True)
class Source:
    """A file of the shared data and the two sides that a task takes of its rows."""

    file: str
    input: str
    output: str

    def record(self, number: int, row: Row, task: str) -> Record | None:
        """Return a row as a record, None where a side is empty or too long."""
        given, said = row[self.input], row[self.output]
        given = "\n".join(given) if isinstance(given, list) else given.strip()
        said = said.strip().lower() if task == "news_section" else said.strip()
        return Record(f"{number:06}", row["date"], task, given, said) if given and said and len(given) <= _LONGEST else None


SOURCES = {
    "headline": Source("headlines.jsonl.gz", "text", "title"),
    "news_section": Source("headlines.jsonl.gz", "text", "category"),
    "commit": Source("commits.jsonl.gz", "files", "subject"),
}


@dataclass(frozen=True)
class People:
    """One task's users: who is tuned on, who is tested once, and the records of all others."""

    development: list[Person]
    test: list[Person]
    others: dict[str, list[Record]]


def histories(data: Path, task: str) -> dict[str, list[Record]]:
    """Return user -> records, as the file has them."""
    found: dict[str, list[Record]] = defaultdict(list)
    with gzip.open(data / "personal" / SOURCES[task].file, "rt", encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            row = json.loads(line)
            record = SOURCES[task].record(number, row, task)
            if record is not None:
                found[row["user"]].append(record)
    return dict(found)


def few(user: str, records: list[Record], real: int, validation: int, tests: int) -> Person | None:
    """Return a user with the newest few records before the test part, or None where there are not enough.

    Args:
        user: the pseudonym.
        records: all of them.
        real: how many are known of the user, those for validation included.
        validation: the newest of these.
        tests: at most so many of the last 20 %, evenly spread.
    """
    if len(records) < real:
        return None
    config = HistoryConfig(min_records=5, validation_fraction=0.0)
    split = split_by_time(History(user, tuple(records), (), ""), config)
    known = list(split.train)[-real:]
    train, held = known[:-validation], known[-validation:]
    texts = {text_of(record) for record in held}
    train = [record for record in train if text_of(record) not in texts]
    count = min(tests, len(split.test))
    test = tuple(split.test[index * len(split.test) // count] for index in range(count))
    if len(train) + len(held) < 0.9 * real or not train or len(held) < validation:
        return None
    check_split(Split(tuple(train), tuple(held), test))
    return Person(user, tuple(train), tuple(held), test)


def people(data: Path, task: str, settings: Row) -> People:
    """Divide a task's users; the division is a matter of the task and the settings alone."""
    everybody = histories(data, task)
    able: list[Person] = []
    for user in sorted(everybody):
        if len(everybody[user]) < settings["least_records"]:
            continue
        person = few(user, everybody[user], settings["real"], settings["validation"], settings["tests"])
        if person and (task != "news_section" or len({record.output for record in person.train}) >= _SECTIONS_AT_LEAST):
            able.append(person)
    random.Random(f"users of {task}").shuffle(able)
    able.sort(key=lambda person: person.user not in settings["seen"])
    first, last = settings["development"], settings["development"] + settings["test"]
    chosen = {person.user for person in able[:last]}
    return People(able[:first], able[first:last], {user: rows for user, rows in everybody.items() if user not in chosen})


def curve_people(data: Path, task: str, settings: Row, curve: Row) -> dict[int, tuple[People, list[Person]]]:
    """Return number of real records -> the same users with so many, and everybody else without them.

    They are nobody who was tuned on, and have enough records for the most; what others wrote, of which the teacher answers inputs, is
    never their own.
    """
    everybody, most, known = histories(data, task), max(curve["real"]), people(data, task, settings)
    tuned = {person.user for person in known.development}
    names = [user for user in sorted(everybody) if user not in tuned]
    random.Random(f"curve of {task}").shuffle(names)
    chosen: dict[int, list[Person]] = {real: [] for real in curve["real"]}
    for user in names:
        persons = {real: few(user, everybody[user], real, max(1, real // 5), settings["tests"]) for real in curve["real"]}
        if len(chosen[most]) < curve["users"] and all(persons.values()):
            for real, person in persons.items():
                chosen[real].append(person)
    measured = {person.user for person in chosen[most]}
    others = {user: rows for user, rows in known.others.items() if user not in measured}
    return {real: (replace(known, test=persons, others=others), persons) for real, persons in chosen.items()}


def public_inputs(found: People, task: str) -> list[Row]:
    """Return inputs of all others, shuffled, as ``augment.inputs`` takes them."""
    texts = sorted({record.input for rows in found.others.values() for record in rows})
    random.Random(f"inputs of {task}").shuffle(texts)
    return [{"task": task, "input": text} for text in texts]


def shared_records(found: People, settings: Row) -> list[Record]:
    """Return what the shared adapter learns: a few records of each of some other users, but no text that anybody here is judged by."""
    held = {text_of(record) for person in (*found.development, *found.test) for record in person.held_out}
    names = sorted(found.others)
    random.Random("shared").shuffle(names)
    taken = 0
    chosen: list[Record] = []
    for user in names:
        known = few(user, found.others[user], settings["real"], settings["validation"], settings["tests"])
        if known is None or taken == settings["shared"]:
            continue
        taken += 1
        chosen += [replace(record, id=f"{user}-{record.id}") for record in known.train if text_of(record) not in held]
    return chosen
