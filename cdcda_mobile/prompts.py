"""What the teacher is asked: request number k is a function of the training records, the configuration, the seed and k alone.

Two ways to make a record. ``keep-output``: a real output of the user's is kept and the teacher writes an input that could have led to
it; what the student learns to say stays the user's own words. ``pair``: the teacher writes input and output. The embedded
teacher, too small to write like somebody, is asked for inputs only; labels and scores are always the user's own mix.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cdcda_export.errors import DataError
from cdcda_mobile.config import AugmentConfig
from cdcda_mobile.history import Record
from cdcda_mobile.tasks import Task, get_task
from cdcda_mobile.teacher import Request
from cdcda_mobile.textual import normalized, words

KEEP_OUTPUT = "keep-output"
PAIR = "pair"
_SHOWN_WORDS = 110  # of an input in a prompt: three examples and the answer fit the local teacher's context
_TOKENS_PER_WORD = 1.7
_LEAK_WORDS = 5  # shorter texts, such as "4" or "fix typo", recur by chance


@dataclass(frozen=True)
class Ask:
    """Request number ``k`` with what is needed to judge its answer; ``output`` is '' where the teacher writes it."""

    k: int
    task: Task
    strategy: str
    examples: tuple[Record, ...]
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


class Planner:
    """Makes the requests.

    Args:
        train: records that may be shown to the teacher, but for those that hold a text of ``held_out``.
        held_out: validation and test records; read only to keep them out.
        config: how many examples, and how to sample.
        seed: of every choice.
        inputs_only: never ask for outputs (a weak teacher).

    Raises:
        DataError: no training record may be shown.
    """

    def __init__(self, train: Sequence[Record], held_out: Sequence[Record], config: AugmentConfig, seed: int, inputs_only: bool) -> None:
        texts = {normalized(t) for r in held_out for t in (r.input, r.output)}
        self._secrets = tuple(sorted(t for t in texts if len(t.split()) >= _LEAK_WORDS))
        self._exact = {(r.task, normalized(r.input)) for r in held_out}
        self._config, self._seed, self._inputs_only = config, seed, inputs_only
        self._records: dict[str, list[Record]] = {}
        for record in train:
            if not self._repeats_held_out(record):
                self._records.setdefault(record.task, []).append(record)
        if not self._records:
            raise DataError("Every training record repeats a held-out text, so none may be shown to the teacher; use --keep 0.")
        self._tasks = Proportion({name: len(records) for name, records in self._records.items()})
        self._labels = {name: Proportion(Counter(r.output for r in records)) for name, records in self._records.items()}

    def _repeats_held_out(self, record: Record) -> bool:
        if (record.task, normalized(record.input)) in self._exact:
            return True
        text = f" {normalized(record.input)} \n {normalized(record.output)} "
        return any(f" {secret} " in text for secret in self._secrets)

    def ask(self, k: int) -> Ask:
        """Return request number k, from 0."""
        name, number = self._tasks.at(k)
        chance = random.Random(f"{self._seed}:{k}")
        task, records = get_task(name), self._records[name]
        if task.labels:
            made = self._for_label(task, records, number, chance)
        elif len(records) > 1 and (self._inputs_only or number % 2 == 0):
            made = self._for_output(task, records, number, chance)
        else:
            made = PAIR, tuple(chance.sample(records, min(self._config.examples, len(records)))), ""
        strategy, examples, output = made
        request = self._request(task, strategy, examples, output, records, k)
        return Ask(k, task, strategy, examples, output, request)

    def _for_label(self, task: Task, records: Sequence[Record], number: int, chance: random.Random) -> tuple[str, tuple[Record, ...], str]:
        """Ask for an input of one label, shown by inputs of that label first."""
        label, _ = self._labels[task.name].at(number)
        alike = [record for record in records if record.output == label]
        others = [record for record in records if record.output != label]
        count = self._config.examples
        chosen = chance.sample(alike, min(count, len(alike)))
        chosen = chance.sample(others, min(count - len(chosen), len(others))) + chosen
        return KEEP_OUTPUT, tuple(chosen), label

    def _for_output(self, task: Task, records: Sequence[Record], number: int, chance: random.Random) -> tuple[str, tuple[Record, ...], str]:
        """Ask for another input to a real output; every record lends its output once before one does twice."""
        turn = number if self._inputs_only else number // 2
        order = list(range(len(records)))
        random.Random(f"{self._seed}:{task.name}:{turn // len(records)}").shuffle(order)
        source = records[order[turn % len(records)]]
        others = [record for record in records if record is not source]
        return KEEP_OUTPUT, tuple(chance.sample(others, min(self._config.examples, len(others)))), source.output

    def _request(self, task: Task, strategy: str, examples: Sequence[Record], output: str, records: Sequence[Record], k: int) -> Request:
        lengths = sorted(min(words(record.input), _SHOWN_WORDS) for record in records)
        names = ("input",) if strategy == KEEP_OUTPUT else ("input", "output")
        messages = [{"role": "system", "content": _system(task, strategy, lengths[len(lengths) // 2])}]
        for record in examples:
            sides = {"input": _clipped(record.input), "output": record.output}
            answer = json.dumps({name: sides[name] for name in names}, ensure_ascii=False)
            messages.append({"role": "user", "content": _question(task, strategy, record.output)})
            messages.append({"role": "assistant", "content": answer})
        messages.append({"role": "user", "content": _question(task, strategy, output)})
        self._assert_private(messages)
        longest = 2 * lengths[-1] + (0 if strategy == KEEP_OUTPUT else 2 * max(words(r.output) for r in records))
        return Request(
            messages=tuple(messages),
            schema={
                "type": "object",
                "properties": {name: {"type": "string"} for name in names},
                "required": list(names),
                "additionalProperties": False,
            },
            seed=int.from_bytes(hashlib.sha256(f"{self._seed}:{k}".encode()).digest()[:4]) & 0x7FFFFFFF,
            temperature=self._config.temperature,
            top_p=self._config.top_p,
            max_tokens=min(self._config.max_tokens, int(longest * _TOKENS_PER_WORD) + 16),
        )

    def _assert_private(self, messages: Sequence[Mapping[str, str]]) -> None:
        """Hold the rule that no held-out text is ever shown to the teacher."""
        shown = " \n ".join(f" {normalized(message['content'])} " for message in messages)
        leaked = next((secret for secret in self._secrets if f" {secret} " in shown), None)
        if leaked is not None:
            raise AssertionError("a held-out text stands in a request to the teacher")


def _clipped(text: str) -> str:
    parts = text.split(" ")
    return text if len(parts) <= _SHOWN_WORDS else " ".join(parts[:_SHOWN_WORDS])


def _question(task: Task, strategy: str, output: str) -> str:
    return f"{task.output_name}: {output}" if strategy == KEEP_OUTPUT else "Another one."


def _system(task: Task, strategy: str, length: int) -> str:
    one = f"one {task.input_name} of about {length} words"
    if strategy == KEEP_OUTPUT:
        kind = f"You write as one particular person. For each {task.output_name} write {one} that leads this person to it"
    else:
        kind = f"You write as one particular person: {one}, and this person's {task.output_name} for it"
    return f"{kind}. Keep the voice, change the facts, copy nothing. Answer in JSON."
