"""The arms of an experiment: what a user could have instead of CDCDA, each made with the same budget from the same few records."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from cdcda_export.errors import ConfigError, did_you_mean
from cdcda_mobile.evaluation.baselines import majority_answers, opening_answers
from cdcda_mobile.history import Record, text_of
from cdcda_mobile.tasks import get_task


@dataclass(frozen=True)
class Arm:
    """One way to answer for a user.

    Attributes:
        trained: on the user's real records.
        synthetic: which synthetic records are added: a name in ``Person.synthetic``, '' for none.
        shared: on top of the shared adapter.
        retrieval: the user's nearest records stand in the prompt.
        rule: no model at all.
    """

    trained: bool = False
    synthetic: str = ""
    shared: bool = False
    retrieval: bool = False
    rule: bool = False


ARMS: dict[str, Arm] = {
    "base": Arm(),
    "rule": Arm(rule=True),
    "bm25": Arm(retrieval=True),
    "shared": Arm(shared=True),
    "personal": Arm(trained=True),
    "cdcda": Arm(trained=True, synthetic="selected"),
    "cdcda-unselected": Arm(trained=True, synthetic="unselected"),
    "cdcda-other": Arm(trained=True, synthetic="other"),
    "shared+personal": Arm(trained=True, shared=True),
    "shared+cdcda": Arm(trained=True, synthetic="selected", shared=True),
}


def get_arm(name: str) -> Arm:
    """Return an arm by name.

    Raises:
        ConfigError: there is no such arm.
    """
    if name not in ARMS:
        raise ConfigError(f"There is no arm '{name}'.{did_you_mean(name, ARMS)}")
    return ARMS[name]


@dataclass(frozen=True)
class Person:
    """One user of an experiment.

    Attributes:
        user: the id.
        train: real training records.
        validation: real records that decide the best step; they count among the user's few.
        test: what is asked.
        synthetic: synthetic records by name: ``selected``, ``unselected`` (the first that can be read, as many), ``other`` (as many that
            were selected for another user).
    """

    user: str
    train: tuple[Record, ...]
    validation: tuple[Record, ...]
    test: tuple[Record, ...]
    synthetic: Mapping[str, tuple[Record, ...]] = field(default_factory=dict)

    @property
    def held_out(self) -> tuple[Record, ...]:
        """What no training set and no prompt may hold."""
        return (*self.validation, *self.test)


def rule_answers(train: Sequence[Record], test: Sequence[Record]) -> list[str]:
    """Return answers without a model: the user's most frequent label, or the opening that their texts begin with most often.

    Raises:
        DataError: a task has no training record.
    """
    majority, opening = majority_answers(train, test), opening_answers(train, test)
    return [m if get_task(record.task).labels else o for record, m, o in zip(test, majority, opening, strict=True)]


def with_others(people: Sequence[Person]) -> list[Person]:
    """Return the same users, each with as many synthetic records of somebody else's, of the same tasks and none of them held out here.

    They are the next user's, and where those do not suffice the one's after.

    Raises:
        ConfigError: there is one user only, or the others have too few.
    """
    if len(people) < 2:
        raise ConfigError("The arm 'cdcda-other' takes another user's synthetic records: name at least two with --users.")
    found = []
    for index, person in enumerate(people):
        own = person.synthetic.get("selected", ())
        tasks, held = {record.task for record in own}, {(record.task, text_of(record)[0]) for record in person.held_out}
        theirs = (record for other in (*people[index + 1 :], *people[:index]) for record in other.synthetic.get("selected", ()))
        fitting = (record for record in theirs if record.task in tasks and (record.task, text_of(record)[0]) not in held)
        taken = tuple(replace(r, id=f"other-{n:05}") for n, r in enumerate(itertools.islice(fitting, len(own))))
        if len(taken) < len(own):
            raise ConfigError(f"The other users have {len(taken)} synthetic records of the tasks of user {person.user}, not {len(own)}.")
        found.append(replace(person, synthetic={**person.synthetic, "other": taken}))
    return found
