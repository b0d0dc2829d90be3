"""What is kept of a teacher's answers, and why the rest is not.

An answer becomes a candidate when no rule of :data:`RULES` objects; each can be left out (``augment.without``), but for those that
keep held-out texts away and those that do not fit. Of the candidates :mod:`cdcda_mobile.augmentation.choice` keeps the best.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from cdcda_mobile.augmentation.prompts import Ask
from cdcda_mobile.augmentation.textual import contained, grams, jaccard, languages, letter_share, loops, normalized, scripts, words
from cdcda_mobile.config import AugmentConfig
from cdcda_mobile.history import Record
from cdcda_mobile.tasks import get_task

_HELD_OUT_JACCARD = 0.5
_COPIED_SHARE = 0.6
_ECHOED_SHARE = 0.5  # unless the user's own outputs quote more of their inputs
_REWORDED_SHARE = 0.7  # the same for the plain wording of a text
_LETTERS_BELOW = 0.12  # how far under the user's own lowest share of letters a text may fall
_FOREIGN_LETTERS = 0.1
# By so much log likelihood another language must beat the user's: it does for none of 2,300 real headlines, articles and commit subjects.
_FOREIGN_NATS = 15.0
_MARKUP = frozenset("<>{}[]|\\`#*_~^=@")
_REACHABLE_WORDS = 0.4  # words that fit one token of max_tokens, at the worst
# Task and input of a record.
Fits = Callable[[str, str], bool]
_PREFACES = ("here is", "here are", "sure", "as an ai", "certainly", "i'm sorry", "i am sorry")


def anything(task: str, given: str) -> bool:
    """Say that every record fits."""
    return True


@dataclass(frozen=True)
class Verdict:
    """Either the two sides of a good record, or the rule that objects and the reason why."""

    input: str = ""
    output: str = ""
    rule: str = ""
    reason: str = ""


@dataclass(frozen=True)
class _Own:
    """What one side of the user's own records of a task looks like."""

    shortest: float
    longest: float
    letters: float
    scripts: frozenset[str]
    characters: frozenset[str]
    languages: frozenset[str]


def first_object(text: str) -> object:
    """Return the first JSON object in a text, which some endpoints wrap in prose or a code fence; None where there is none."""
    decoder, start = json.JSONDecoder(strict=False), text.find("{")  # local grammars let line breaks pass
    while start >= 0:
        try:
            return decoder.raw_decode(text, start)[0]
        except (ValueError, RecursionError):
            start = text.find("{", start + 1)
    return None


@dataclass(frozen=True)
class _Candidate:
    """An answer under judgement, with what the rules look at."""

    ask: Ask
    sides: dict[str, str]
    grams: dict[str, frozenset[tuple[str, ...]]]

    @property
    def written(self) -> tuple[str, ...]:
        """The sides that the teacher wrote."""
        return tuple(side for side in ("input", "output") if not getattr(self.ask, side))

    @property
    def free(self) -> tuple[str, ...]:
        """Those of them that are free text."""
        return tuple(side for side in self.written if side == "input" or not self.ask.task.labels)


class Judge(Protocol):
    """Who says whether an answer becomes a record, such as a :class:`Selector`."""

    def judge(self, ask: Ask, text: str) -> Verdict:
        """Judge one answer."""
        ...


class Selector:
    """Judges answers in the order of their requests; what passes counts as known from then on.

    Args:
        train: the user's real records.
        held_out: validation and test records, to which nothing may come near.
        config: ``near_duplicate``, ``max_tokens`` and the rules that are left out.
        fits: says whether there is room for the answer to an input, given the task's name and the input.
    """

    def __init__(self, train: Sequence[Record], held_out: Sequence[Record], config: AugmentConfig, fits: Fits = anything) -> None:
        self._config, self._fits = config, fits
        self._rules = [name for name in RULES if name not in config.without]
        self._known = [(normalized(r.input), grams(r.input)) for r in train]
        self._outputs = {normalized(r.output) for r in train}
        self._held_texts = {normalized(t) for r in held_out for t in _texts(r)}
        self._held_grams = [grams(t) for r in held_out for t in _texts(r)]
        self._own: dict[tuple[str, str], _Own] = {}
        self._echo: dict[str, float] = {}
        for made in {get_task(record.task).teaches or record.task: None for record in train}:
            alike = [record for record in train if made in (record.task, get_task(record.task).teaches)]
            pairs = [record for record in alike if record.task == made]
            # The plain wording of a text is about as long as the text, and has some of its words.
            self._own[made, "input"] = self._describe([r.input for r in pairs] or [r.output for r in alike])
            self._own[made, "output"] = self._describe([r.output for r in alike])
            least = _ECHOED_SHARE if len(pairs) == len(alike) else _REWORDED_SHARE
            self._echo[made] = max(least, *(contained(grams(r.output), grams(r.input)) for r in pairs), 0.0)

    def _describe(self, texts: Sequence[str]) -> _Own:
        lengths = [words(text) for text in texts]
        everything = "".join(texts)
        return _Own(
            shortest=min(0.5 * min(lengths), _REACHABLE_WORDS * self._config.max_tokens),
            longest=2.0 * max(lengths),
            letters=min(letter_share(text) for text in texts) - _LETTERS_BELOW,
            scripts=frozenset(scripts(everything)),
            characters=frozenset(everything),
            languages=_languages(texts),
        )

    def judge(self, ask: Ask, text: str) -> Verdict:
        """Say whether an answer becomes a candidate; one that does is remembered."""
        sides, reason = _parsed(ask, text)
        if reason:
            return Verdict(rule="schema", reason=reason)
        for side, given in sides.items():
            if "\n" not in self._own[ask.task.name, side].characters:
                sides[side] = " ".join(given.split())
        candidate = _Candidate(ask, sides, {side: grams(sides[side]) for side in ("input", "output")})
        if self._near_held_out(candidate):
            return Verdict(rule="held-out", reason="held-out overlap")
        if not self._fits(ask.task.name, sides["input"]):
            return Verdict(rule="fit", reason="longer than the training takes (train.max_tokens)")
        for name in self._rules:
            reason = RULES[name](self, candidate)
            if reason:
                return Verdict(rule=name, reason=reason)
        self._known.append((normalized(sides["input"]), candidate.grams["input"]))
        if not ask.output:
            self._outputs.add(normalized(sides["output"]))
        return Verdict(sides["input"], sides["output"])

    def _near_held_out(self, candidate: _Candidate) -> bool:
        sides = ("input",) if candidate.ask.task.labels else ("input", "output")
        if any(normalized(candidate.sides[side]) in self._held_texts for side in sides):
            return True
        return any(jaccard(candidate.grams[side], other) > _HELD_OUT_JACCARD for side in sides for other in self._held_grams)

    # The rules: each returns '' or what it objects to.

    def _each_free(self, candidate: _Candidate, why: Callable[[str, _Own], str]) -> str:
        for side in candidate.free:
            reason = why(candidate.sides[side], self._own[candidate.ask.task.name, side])
            if reason:
                return f"{side}: {reason}"
        return ""

    def _length(self, candidate: _Candidate) -> str:
        return self._each_free(candidate, _why_length)

    def _text(self, candidate: _Candidate) -> str:
        return self._each_free(candidate, _why_no_text)

    def _language(self, candidate: _Candidate) -> str:
        return self._each_free(candidate, _why_language)

    def _label(self, candidate: _Candidate) -> str:
        task = candidate.ask.task
        return "" if not task.labels or candidate.sides["output"] in task.labels else "label outside the set"

    def _copy(self, candidate: _Candidate) -> str:
        for record in candidate.ask.examples:
            for side in candidate.free:
                theirs = getattr(record, side if record.task == candidate.ask.task.name else "output")
                same = normalized(theirs) == normalized(candidate.sides[side])
                if same or contained(candidate.grams[side], grams(theirs)) > _COPIED_SHARE:
                    return "copy of an example in the prompt"
        return ""

    def _duplicate(self, candidate: _Candidate) -> str:
        given, new = normalized(candidate.sides["input"]), candidate.grams["input"]
        if any(text == given or jaccard(new, other) > self._config.near_duplicate for text, other in self._known):
            return "near duplicate of a known input"
        if "output" in candidate.free and normalized(candidate.sides["output"]) in self._outputs:
            return "output is already known"
        return ""

    def _echoes(self, candidate: _Candidate) -> str:
        if candidate.ask.task.labels:
            return ""
        given, said = normalized(candidate.sides["input"]), normalized(candidate.sides["output"])
        echoed = contained(candidate.grams["output"], candidate.grams["input"])
        return "input repeats the output" if said == given or echoed > self._echo[candidate.ask.task.name] else ""


# In the order in which they are asked.
RULES: dict[str, Callable[[Selector, _Candidate], str]] = {
    "length": Selector._length,
    "text": Selector._text,
    "language": Selector._language,
    "label": Selector._label,
    "copy": Selector._copy,
    "duplicate": Selector._duplicate,
    "echo": Selector._echoes,
}


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
    names = ask.request.schema["required"]
    if set(value) != set(names) or not all(isinstance(value[name], str) for name in names):
        return {}, "does not fit the schema"
    written = {name: _tidy(value[name]) for name in names}
    if not all(written.values()):
        return {}, "empty text"
    if any("\ud800" <= char <= "\udfff" for text in written.values() for char in text):
        return {}, "half of a character"  # no tokenizer and no file takes it
    return {side: written.get(side) or getattr(ask, side) for side in ("input", "output")}, ""


def _tidy(text: str) -> str:
    """Return a text without stray spaces and empty lines."""
    return "\n".join(filter(None, (" ".join(line.split()) for line in text.splitlines())))


def _why_length(text: str, own: _Own) -> str:
    length = words(text)
    if length < own.shortest:
        return "too short"
    return "too long" if length > own.longest else ""


def _why_no_text(text: str, own: _Own) -> str:
    if any((ord(char) < 32 and char != "\n") or char == "\ufffd" for char in text):
        return "broken characters"
    if loops(text):
        return "repeats itself"
    if letter_share(text) < own.letters:
        return "too few letters"
    if (_MARKUP & set(text)) - own.characters:
        return "markup that the user never writes"
    return "talks to us instead" if text.casefold().startswith(_PREFACES) else ""


def _why_language(text: str, own: _Own) -> str:
    counted = scripts(text)
    if counted and 1 - sum(counted[name] for name in own.scripts) / counted.total() > _FOREIGN_LETTERS:
        return "another script than the user's"
    spoken = languages(text)
    strange = max(spoken.values()) - max(spoken[name] for name in own.languages) > _FOREIGN_NATS
    return "another language than the user's" if strange else ""


def _languages(texts: Sequence[str]) -> frozenset[str]:
    """Return the language of all texts together, and those of texts that are plainly in another one."""
    everything = languages(" ".join(texts))
    main = max(everything, key=lambda name: everything[name])
    found = {main}
    for text in texts:
        spoken = languages(text)
        best = max(spoken, key=lambda name: spoken[name])
        if spoken[best] - spoken[main] > _FOREIGN_NATS:
            found.add(best)
    return frozenset(found)
