"""What the teacher is asked: request number k is a function of the training records, the style card, the configuration, the seed and k.

The strategies, each a way to make a record:

* ``counterpart``: a real output of the user's is kept, and the teacher writes another input that leads to it. What the student learns to
  say stays the user's own words. Labels and scores are asked for in the user's own mix; of a text that has no input (a tweet, a note) the
  teacher writes the plain wording, so that a history without pairs becomes pairs.
* ``new``: another situation, both sides in the user's voice.
* ``rewrite``: another situation, the answer that anybody would give, and that answer made into the user's.
* ``answer``: a real input of somebody else's (``augment.inputs``), one that is like the user's own, answered in the user's voice.

All requests about one task begin with the same turn: who the person is and the records that show it best. The embedded teacher, too
small for that, sees a few examples as turns of the chat, and is asked for inputs only; of texts without an input there are no examples.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cdcda_export.errors import DataError
from cdcda_mobile.augmentation.held_out import HeldOut
from cdcda_mobile.augmentation.public_inputs import NearestInputs
from cdcda_mobile.augmentation.textual import farthest_first, grams, words
from cdcda_mobile.config import AugmentConfig
from cdcda_mobile.history import Record
from cdcda_mobile.tasks import Task, get_task
from cdcda_mobile.teachers.teacher import Request

_SHOWN_WORDS = 110  # of a text in a prompt
_SHOWN_CHARACTERS = 12 * _SHOWN_WORDS  # where a script without spaces, a token or a file pasted in makes one word of everything
LISTED_WORDS = 500  # of all records in the first turn: with the answer they fit the local teacher's context
_BEGINNING = re.compile(rf"\s*(?:\S+\s*){{0,{_SHOWN_WORDS - 1}}}\S+")
_TURNS = 3  # examples that the embedded teacher sees
_TOKENS_PER_WORD = 1.7


@dataclass(frozen=True)
class Strategy:
    """One way to ask: which fields the answer has, and the question about a record of the user's.

    In the question ``{input}`` and ``{output}`` are the task's words for the two sides, ``{record}`` is a record as it is listed,
    ``{given}`` is what is kept of it, ``{length}`` the usual number of words of an input.
    """

    fields: tuple[str, ...]
    question: str


STRATEGIES: dict[str, Strategy] = {
    "counterpart": Strategy(
        ("input",),
        "This person gave this {output}:\n{given}\n\nWrite another {input} that leads this person to exactly this {output}, in other words "
        "and with other details than above, in about {length} words.",
    ),
    "new": Strategy(
        ("input", "output"),
        "Write one more record of this person. It is none of the above; the nearest is this one:\n\n{record}\n\nWrite the {input}, about "
        "{length} words on another matter, and the {output} as only this person would write it.",
    ),
    "rewrite": Strategy(
        ("input", "plain", "output"),
        "Write one more record of this person, not far from this one:\n\n{record}\n\nFirst the {input}, about {length} words, then as "
        "`plain` the {output} that anybody would give, then as `output` the {output} that only this person would write.",
    ),
    "answer": Strategy(("output",), "Write the {output} that this person would give here, in their own manner:\n\n{input}: {given}"),
}
_LABELLED = Strategy(
    ("input",),
    # No record beside the question: a weak teacher would copy it.
    "Write another {input} that this person would answer with the {output} `{given}`, in about {length} words, on a matter that is not "
    "above.",
)


@dataclass(frozen=True)
class Ask:
    """Request number ``k`` with what is needed to judge its answer; ``input`` and ``output`` are '' where the teacher writes them."""

    k: int
    task: Task
    strategy: str
    examples: tuple[Record, ...]
    input: str
    output: str
    request: Request


class Proportion:
    """An endless sequence of names in which every prefix has them as close to their weights as can be.

    Args:
        weights: at least one name with a weight above zero.
    """

    def __init__(self, weights: Mapping[str, int]) -> None:
        self._weights, self._total = dict(sorted(weights.items())), sum(weights.values())
        self._given = Counter[str]()
        self._places: list[tuple[str, int]] = []

    def at(self, k: int) -> tuple[str, int]:
        """Return the k-th name, from 0, and how often it stood before."""
        while len(self._places) <= k:
            step = len(self._places) + 1
            name = max(self._weights, key=lambda n: self._weights[n] * step / self._total - self._given[n])
            self._places.append((name, self._given[name]))
            self._given[name] += 1
        return self._places[k]


class _Subject:
    """One task of the user's: its records, what is shown of them in every request, and the turns of strategies and labels."""

    def __init__(self, name: str, records: Sequence[Record], config: AugmentConfig, inputs: Sequence[str], inputs_only: bool) -> None:
        self.records, self.paired = list(records), not get_task(name).teaches
        self.inputs = NearestInputs(inputs)
        self.task = get_task(_made(name))
        lengths = sorted(min(words(r.input if self.paired else r.output), _SHOWN_WORDS) for r in self.records)
        self.length = lengths[len(lengths) // 2]
        self.shown = self._spread(config.examples)
        self.labels = Proportion(Counter(r.output for r in records)) if self.task.labels else None
        possible = {"counterpart": True, "new": self.labels is None, "rewrite": self.labels is None and self.paired, "answer": bool(inputs)}
        wanted = ["counterpart"] if inputs_only else [s for s in config.strategies if possible[s]]
        self.strategies = Proportion(dict.fromkeys(wanted or ["counterpart"], 1))

    def _spread(self, count: int) -> tuple[Record, ...]:
        """Return the records that show the person best: the newest, then always the one least like those before; as many as have room."""
        newest = list(reversed(self.records))
        room = LISTED_WORDS
        chosen: list[Record] = []
        for index in farthest_first([grams(f"{r.input} {r.output}") for r in newest], len(newest)):
            shown = (newest[index].input, newest[index].output) if self.paired else (newest[index].output,)
            size = sum(min(words(text), _SHOWN_WORDS) for text in shown)
            if len(chosen) < count and (size <= room or not chosen):
                chosen.append(newest[index])
                room -= size
        return tuple(sorted(chosen, key=lambda r: (r.date, r.id)))

    def listed(self, record: Record) -> str:
        """Return a record as the teacher sees it."""
        output = f"{self.task.output}: {clipped(record.output)}"
        return f"{self.task.input}: {clipped(record.input)}\n{output}" if self.paired else output


class Planner:
    """Makes the requests.

    Args:
        train: records that may be shown to the teacher, but for those that hold a held-out text.
        held_out: what must never be shown.
        config: how many examples, which strategies, how to sample.
        seed: of every choice.
        inputs_only: never ask for outputs (a weak teacher).
        card: lines that describe the person, by task; see :mod:`cdcda_mobile.augmentation.style`.
        inputs: inputs of others by task, for the strategy ``answer``.
        hide: makes of such an input what the teacher may see.

    Raises:
        DataError: no training record may be shown, or there is nothing that the only strategy could answer.
    """

    def __init__(
        self,
        train: Sequence[Record],
        held_out: HeldOut,
        config: AugmentConfig,
        seed: int,
        inputs_only: bool,
        card: Mapping[str, Sequence[str]] | None = None,
        inputs: Mapping[str, Sequence[str]] | None = None,
        hide: Callable[[str], str] = str,
    ) -> None:
        self._held_out, self._config, self._seed, self._turns, self._hide = held_out, config, seed, inputs_only, hide
        grouped: dict[str, list[Record]] = {}
        for record in train:
            if not held_out.repeated_by(record):
                grouped.setdefault(record.task, []).append(record)
        if not grouped:
            raise DataError("Every training record repeats a held-out text, so none may be shown to the teacher; use --keep 0.")
        public = {name: [text for text in (inputs or {}).get(_made(name), ()) if not held_out.stands_in(name, text)] for name in grouped}
        if config.strategies == ["answer"] and not inputs_only and not any(public.values()):
            raise DataError(f"{config.inputs} holds no input of the task {', '.join(grouped)} that may be shown; see augment.inputs.")
        self._subjects = {name: _Subject(name, rows, config, public[name], inputs_only) for name, rows in grouped.items()}
        self._tasks = Proportion({name: len(rows) for name, rows in grouped.items()})
        self._card = {name: [line for line in (card or {}).get(name, ()) if not held_out.shown_in(line)] for name in grouped}

    def ask(self, k: int) -> Ask:
        """Return request number k, from 0."""
        name, number = self._tasks.at(k)
        subject, chance = self._subjects[name], random.Random(f"{self._seed}:{k}")
        strategy, turn = subject.strategies.at(number)
        near, given = self._near(name, strategy, turn, chance)
        input_, output = (given, "") if strategy == "answer" else ("", given)
        if self._turns:
            shown = self._few(subject, near, chance)
        else:
            shown = (*subject.shown, near) if "{record}" in STRATEGIES[strategy].question else subject.shown
        messages = self._few_shot(subject, shown, output) if self._turns else self._messages(name, strategy, near, given)
        self._held_out.assert_not_shown(messages)
        request = self._request(subject, strategy, messages, k)
        return Ask(k, subject.task, strategy, tuple(dict.fromkeys(shown)), input_, output, request)

    def _near(self, name: str, strategy: str, turn: int, chance: random.Random) -> tuple[Record, str]:
        """Return the record that a request is about, and what is kept: the output, a label, or an input of somebody else's."""
        subject = self._subjects[name]
        if subject.labels is not None and strategy == "counterpart":
            label, _ = subject.labels.at(turn)
            return chance.choice([record for record in subject.records if record.output == label]), label
        record = self._in_turn(name, strategy, turn)
        if strategy == "answer":
            return record, self._hide(subject.inputs.at(turn, lambda number: self._in_turn(name, strategy, number)))
        return record, record.output if strategy == "counterpart" else ""

    def _in_turn(self, name: str, strategy: str, turn: int) -> Record:
        """Return the record of a turn: every one has its turn once before one has it twice."""
        records = self._subjects[name].records
        cycle, at = divmod(turn, len(records))
        order = list(range(len(records)))
        random.Random(f"{self._seed}:{name}:{strategy}:{cycle}").shuffle(order)
        return records[order[at]]

    def _messages(self, name: str, strategy: str, near: Record, given: str) -> list[dict[str, str]]:
        subject = self._subjects[name]
        task, way = subject.task, STRATEGIES[strategy]
        if subject.labels is not None and strategy == "counterpart":
            way = _LABELLED
        parts = {"given": clipped(given), "record": subject.listed(near), "length": subject.length}
        question = way.question.format(input=task.input, output=task.output, **parts)
        return [
            {"role": "system", "content": self._system(name)},
            {"role": "user", "content": f"{question}\n\nAnswer in JSON with {_named(way.fields)}."},
        ]

    def _system(self, name: str) -> str:
        subject = self._subjects[name]
        task, records = subject.task, "\n\n".join(subject.listed(record) for record in subject.shown)
        sides = f"the {task.input} and this person's {task.output}" if subject.paired else f"this person's {task.output}"
        closed = f" The {task.output} is always one of: {', '.join(task.labels)}." if task.labels else ""
        about = "".join(f"\n- {line}" for line in self._card[name])
        card = f"\n\nWhat marks this person:{about}" if about else ""
        return f"You write as one particular person, {task.person}. These are records of the person: {sides}.{closed}\n\n{records}{card}"

    # The embedded teacher.

    def _few(self, subject: _Subject, near: Record, chance: random.Random) -> tuple[Record, ...]:
        """Return a few records for turns of the chat: those with the label that is asked for, else any but the one that is asked about.

        Texts without an input are no examples, for nobody wrote their plain wording: then the one that is asked about stands alone.
        """
        if not subject.paired:
            return (near,)
        count = min(_TURNS, self._config.examples)
        if subject.labels is None:
            others = [record for record in subject.records if record is not near] or [near]
            return tuple(chance.sample(others, min(count, len(others))))
        alike = [record for record in subject.records if record.output == near.output]
        others = [record for record in subject.records if record.output != near.output]
        chosen = chance.sample(alike, min(count, len(alike)))
        return tuple(chance.sample(others, min(count - len(chosen), len(others))) + chosen)

    def _few_shot(self, subject: _Subject, shown: Sequence[Record], output: str) -> list[dict[str, str]]:
        task = subject.task
        asked = {"role": "user", "content": f"{task.output}: {clipped(output)}"}
        if not subject.paired:
            how = f"in about {subject.length} words: the same facts, said as anybody would say them"
            return [{"role": "system", "content": f"Write the {task.input} that you are given, {how}. Answer in JSON."}, asked]
        one = f"one {task.input} of about {subject.length} words"
        kind = f"You write as one particular person. For each {task.output} write {one} that leads this person to it"
        messages = [{"role": "system", "content": f"{kind}. Keep the voice, change the facts, copy nothing. Answer in JSON."}]
        for record in shown:
            messages.append({"role": "user", "content": f"{task.output}: {clipped(record.output)}"})
            messages.append({"role": "assistant", "content": json.dumps({"input": clipped(record.input)}, ensure_ascii=False)})
        return [*messages, asked]

    def _request(self, subject: _Subject, strategy: str, messages: Sequence[dict[str, str]], k: int) -> Request:
        fields = STRATEGIES[strategy].fields
        longest = {"output": max(words(r.output) for r in subject.records), "plain": max(words(r.output) for r in subject.records)}
        longest["input"] = max(min(words(r.input), _SHOWN_WORDS) for r in subject.records) if subject.paired else longest["output"]
        closed = {"output": {"type": "string", "enum": list(subject.task.labels)}} if subject.task.labels else {}
        return Request(
            messages=tuple(messages),
            schema={
                "type": "object",
                "properties": {name: closed.get(name, {"type": "string"}) for name in fields},
                "required": list(fields),
                "additionalProperties": False,
            },
            seed=int.from_bytes(hashlib.sha256(f"{self._seed}:{k}".encode()).digest()[:4]) & 0x7FFFFFFF,
            # Inputs differ already, so of a closed set the teacher's best guess is wanted: a draw would only add mistakes.
            temperature=0.0 if "output" in closed and fields == ("output",) else self._config.temperature,
            top_p=self._config.top_p,
            max_tokens=min(self._config.max_tokens, int(2 * sum(longest[name] for name in fields) * _TOKENS_PER_WORD) + 16),
        )


def clipped(text: str) -> str:
    """Return the beginning of a text, as much as a prompt has room for."""
    found = _BEGINNING.match(text)
    cut = (found[0] if found else text)[:_SHOWN_CHARACTERS]
    counted = words(cut)  # more than the pattern sees where there are no spaces
    return cut[: len(cut) * _SHOWN_WORDS // counted] if counted > _SHOWN_WORDS else cut


def _made(name: str) -> str:
    """Return the task of the records that are made from those of a task."""
    return get_task(name).teaches or name


def _named(fields: Sequence[str]) -> str:
    quoted = [f"`{name}`" for name in fields]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"
