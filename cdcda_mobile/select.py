"""What is kept of a teacher's answers, and why the rest is not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

from cdcda_mobile.config import AugmentConfig
from cdcda_mobile.history import Record
from cdcda_mobile.prompts import KEEP_OUTPUT, Ask
from cdcda_mobile.tasks import Task, get_task
from cdcda_mobile.textual import contained, grams, jaccard, letter_share, loops, normalized, scripts, words

_HELD_OUT_JACCARD = 0.5
_COPIED_SHARE = 0.6
_ECHOED_SHARE = 0.5  # unless the user's own outputs quote more of their inputs
_LETTERS_BELOW = 0.12  # how far under the user's own lowest share of letters a text may fall
_FOREIGN_LETTERS = 0.1
_MARKUP = frozenset("<>{}[]|\\`#*_~^=@")
_REACHABLE_WORDS = 0.4  # words that fit one token of max_tokens, at the worst
_PREFACES = ("here is", "here are", "sure", "as an ai", "certainly", "i'm sorry", "i am sorry")


@dataclass(frozen=True)
class Verdict:
    """Either the two sides of a good record, or the reason why there is none."""

    input: str = ""
    output: str = ""
    reason: str = ""


@dataclass(frozen=True)
class _Own:
    """What one side of the user's own records of a task looks like."""

    shortest: float
    longest: float
    letters: float
    scripts: frozenset[str]
    characters: frozenset[str]


def first_object(text: str) -> object:
    """Return the first JSON object in a text, which some endpoints wrap in prose or a code fence; None where there is none."""
    decoder, start = json.JSONDecoder(strict=False), text.find("{")  # local grammars let line breaks pass
    while start >= 0:
        try:
            return decoder.raw_decode(text, start)[0]
        except ValueError:
            start = text.find("{", start + 1)
    return None


class Selector:
    """Judges answers in the order of their requests; what it keeps counts as known from then on.

    Args:
        train: the user's real records.
        held_out: validation and test records, to which nothing may come near.
        config: ``near_duplicate`` and ``max_tokens``.
    """

    def __init__(self, train: Sequence[Record], held_out: Sequence[Record], config: AugmentConfig) -> None:
        self._config = config
        self._known = [(normalized(r.input), grams(r.input)) for r in train]
        self._outputs = {normalized(r.output) for r in train}
        self._held_texts = {normalized(t) for r in held_out for t in _texts(r)}
        self._held_grams = [grams(t) for r in held_out for t in _texts(r)]
        self._own: dict[tuple[str, str], _Own] = {}
        self._echo: dict[str, float] = {}
        for task in {record.task for record in train}:
            alike = [record for record in train if record.task == task]
            self._own[task, "input"] = self._describe([r.input for r in alike])
            self._own[task, "output"] = self._describe([r.output for r in alike])
            self._echo[task] = max(_ECHOED_SHARE, *(contained(grams(r.output), grams(r.input)) for r in alike))

    def _describe(self, texts: Sequence[str]) -> _Own:
        lengths = [words(text) for text in texts]
        everything = "".join(texts)
        return _Own(
            shortest=min(0.5 * min(lengths), _REACHABLE_WORDS * self._config.max_tokens),
            longest=2.0 * max(lengths),
            letters=min(letter_share(text) for text in texts) - _LETTERS_BELOW,
            scripts=frozenset(scripts(everything)),
            characters=frozenset(everything),
        )

    def judge(self, ask: Ask, text: str) -> Verdict:
        """Say whether an answer becomes a record; a record that does is remembered."""
        sides, reason = _parsed(ask, text)
        reason = reason or self._why_invalid(ask, sides) or self._why_known(ask, sides)
        if reason:
            return Verdict(reason=reason)
        self._known.append((normalized(sides["input"]), grams(sides["input"])))
        if not ask.output:
            self._outputs.add(normalized(sides["output"]))
        return Verdict(sides["input"], sides["output"])

    def _why_invalid(self, ask: Ask, sides: dict[str, str]) -> str:
        for side in ("input",) if ask.output else ("input", "output"):
            reason = _why_no_text(sides[side], self._own[ask.task.name, side])
            if reason:
                return f"{side}: {reason}"
        return _why_no_label(ask.task, sides["output"])

    def _why_known(self, ask: Ask, sides: dict[str, str]) -> str:
        given, new = normalized(sides["input"]), grams(sides["input"])
        if self._held_out(sides["input"]) or (not ask.task.labels and self._held_out(sides["output"])):
            return "held-out overlap"
        for record in ask.examples:
            if normalized(record.input) == given or contained(new, grams(record.input)) > _COPIED_SHARE:
                return "copy of an example in the prompt"
        if any(text == given or jaccard(new, other) > self._config.near_duplicate for text, other in self._known):
            return "near duplicate of a known input"
        echoed = contained(grams(sides["output"]), new)
        if normalized(sides["output"]) == given or (not ask.task.labels and echoed > self._echo[ask.task.name]):
            return "input repeats the output"
        if not ask.output and normalized(sides["output"]) in self._outputs:
            return "output is already known"
        return ""

    def _held_out(self, text: str) -> bool:
        if normalized(text) in self._held_texts:
            return True
        new = grams(text)
        return any(jaccard(new, other) > _HELD_OUT_JACCARD for other in self._held_grams)


def _texts(record: Record) -> tuple[str, ...]:
    """Return the sides of a held-out record that say something of it; a label or a score does not."""
    return (record.input,) if get_task(record.task).labels else (record.input, record.output)


def _parsed(ask: Ask, text: str) -> tuple[dict[str, str], str]:
    """Return both sides of the answer, and '' or why it cannot be read."""
    if not text.strip():
        return {}, "empty answer"
    value = first_object(text)
    if not isinstance(value, dict):
        return {}, "not JSON"
    names = ("input",) if ask.strategy == KEEP_OUTPUT else ("input", "output")
    if set(value) != set(names) or not all(isinstance(value[name], str) for name in names):
        return {}, "does not fit the schema"
    sides = {name: " ".join(value[name].split()) for name in names}
    if not all(sides.values()):
        return {}, "empty text"
    return {"output": ask.output, **sides}, ""


def _why_no_text(text: str, own: _Own) -> str:
    length = words(text)
    if length < own.shortest:
        return "too short"
    if length > own.longest:
        return "too long"
    if any(0xD800 <= ord(char) <= 0xDFFF or ord(char) < 32 or char == "\ufffd" for char in text):
        return "broken characters"
    if loops(text):
        return "repeats itself"
    if letter_share(text) < own.letters:
        return "too few letters"
    counted = scripts(text)
    if counted and 1 - sum(counted[name] for name in own.scripts) / counted.total() > _FOREIGN_LETTERS:
        return "another script than the user's"
    if (_MARKUP & set(text)) - own.characters:
        return "markup that the user never writes"
    if text.casefold().startswith(_PREFACES):
        return "talks to us instead"
    return ""


def _why_no_label(task: Task, output: str) -> str:
    return "" if not task.labels or output in task.labels else "label outside the set"
