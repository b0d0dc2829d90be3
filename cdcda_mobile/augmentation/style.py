"""The style card: what marks one person, distilled once from their training records, partly counted and partly by the teacher.

It stands in the first turn of every request about the task; the teacher's part is one request, logged like all others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from statistics import median

from cdcda_mobile.augmentation.prompts import LISTED_WORDS, clipped
from cdcda_mobile.augmentation.select import first_object
from cdcda_mobile.augmentation.textual import words
from cdcda_mobile.history import Record
from cdcda_mobile.sources.records import is_plain_text
from cdcda_mobile.tasks import get_task
from cdcda_mobile.teachers.teacher import Request

_MOST_POINTS = 4
_MOST_WORDS = 25  # of a point
_HABIT = 0.6  # a trait that so many of the outputs have is a habit; that so few have, a habit not to
_FIELDS = {
    "subjects": "what this person writes about",
    "habits": "how this person writes: tone, form, typical words, what others would not do",
}


def counted(records: Sequence[Record]) -> list[str]:
    """Return what can be counted of the outputs of one task: their length, capitals, endings and marks; of labels, the mix."""
    task, outputs = get_task(records[0].task), [record.output for record in records]
    if task.labels:
        order = sorted(set(outputs), key=lambda label: (-outputs.count(label), label))
        return [f"{task.output}: " + ", ".join(f"{label} {outputs.count(label)}" for label in order)]
    lengths = sorted(words(output) for output in outputs)
    lines = [f"length of the {task.output}: {lengths[0]} to {lengths[-1]} words, mostly about {round(median(lengths))}"]
    traits = {
        "starts with a capital letter": lambda text: text[:1].isupper(),
        "Capitals On Most Words": lambda text: _title_case(text),
        "ends with a full stop": lambda text: text.endswith("."),
        "ends with a mark of exclamation or question": lambda text: text.endswith(("!", "?")),
        "begins with a word and a colon": lambda text: ":" in text.split(" ")[0],
        "begins with a bracket": lambda text: text.startswith(("[", "(")),
        "has quotation marks": lambda text: any(mark in text for mark in "\"'“‘«"),
        "has emoji": lambda text: any(ord(char) > 0x1F000 for char in text),
    }
    for trait, has in traits.items():
        share = sum(map(has, outputs)) / len(outputs)
        if share >= _HABIT:
            lines.append(f"{task.output}: {trait}" + ("" if share == 1 else ", mostly"))
    if not any(_title_case(output) for output in outputs) and not any(output[:1].isupper() for output in outputs):
        lines.append(f"{task.output}: all in small letters at the beginning")
    return lines


def _title_case(text: str) -> bool:
    long = [word for word in text.split() if len(word) > 3 and word[0].isalpha()]
    return len(long) > 1 and sum(word[0].isupper() for word in long) / len(long) > 0.8


def card_request(records: Sequence[Record], seed: int, max_tokens: int) -> Request:
    """Return the request that lets the teacher describe a person from records of one task."""
    task = get_task(records[0].task)
    listed: list[str] = []
    room = LISTED_WORDS
    for record in reversed(records):
        output = f"{task.output}: {clipped(record.output)}"
        text = output if task.teaches else f"{task.input}: {clipped(record.input)}\n{output}"
        if listed and words(text) > room:
            break
        listed.append(text)
        room -= words(text)
    listed.reverse()
    points = {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": _MOST_POINTS}
    asked = "; ".join(f"`{name}`, {meaning}" for name, meaning in _FIELDS.items())
    messages = (
        {"role": "system", "content": f"These are records of one particular person, {task.person}.\n\n" + "\n\n".join(listed)},
        {
            "role": "user",
            "content": f"Describe the person in short points, so that somebody else could write like them: {asked}. Answer in JSON.",
        },
    )
    return Request(
        messages=messages,
        schema={"type": "object", "properties": dict.fromkeys(_FIELDS, points), "required": list(_FIELDS), "additionalProperties": False},
        seed=int.from_bytes(hashlib.sha256(f"{seed}:style:{task.name}".encode()).digest()[:4]) & 0x7FFFFFFF,
        temperature=0.2,
        top_p=0.95,
        max_tokens=2 * max_tokens,
    )


def card_lines(text: str) -> list[str]:
    """Return the lines of the teacher's part, [] where the answer cannot be read: the card is then what was counted."""
    value = first_object(text)
    lines = []
    for name in _FIELDS:
        points = value.get(name) if isinstance(value, dict) else None
        said = [point for point in points if isinstance(point, str) and is_plain_text(point)] if isinstance(points, list) else []
        short = list(filter(None, (" ".join(point.split()[:_MOST_WORDS]) for point in said)))[:_MOST_POINTS]
        if short:
            lines.append(f"{name}: {'; '.join(short)}")
    return lines
