"""Synthetic records for one user: ask, judge, keep; what is kept and what is not are both on disk, with reasons."""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cdcda_export.errors import TeacherError
from cdcda_export.manifest import write_atomic
from cdcda_export.progress import Progress
from cdcda_mobile.augmentation.asking import Asking, Desk, Judged
from cdcda_mobile.augmentation.choice import choose
from cdcda_mobile.augmentation.held_out import HeldOut
from cdcda_mobile.augmentation.prompts import Planner
from cdcda_mobile.augmentation.public_inputs import read_inputs
from cdcda_mobile.augmentation.select import Fits, Selector, anything
from cdcda_mobile.augmentation.style import card_lines, card_request, counted
from cdcda_mobile.augmentation.veil import Veil
from cdcda_mobile.config import AugmentConfig, TeacherConfig
from cdcda_mobile.history import Record
from cdcda_mobile.tasks import get_task
from cdcda_mobile.teachers.teacher import AnswerLog, Budget, Hired, Request, Teacher, hire

KEPT = "kept.jsonl"
REJECTED = "rejected.jsonl"
ADVICE = (
    "The base model taught itself. A stronger teacher gives better data: set OPENAI_BASE_URL, OPENAI_API_KEY and --teacher-model "
    "for any OpenAI-compatible endpoint, or --teacher-gguf for a larger local model."
)
# Scores records by how much like the user they are; higher is more.
Likeness = Callable[[Sequence[Record]], Sequence[float]]


@dataclass(frozen=True)
class Synthetic:
    """A record that was kept: a :class:`cdcda_mobile.history.Record` with its origin.

    ``date`` is that of the newest record in the prompt, ``request`` the key of the request in the answer log.
    """

    id: str
    date: str
    task: str
    input: str
    output: str
    strategy: str
    request: str


@dataclass(frozen=True)
class Rejected:
    """An answer that was not kept: the raw text, which rule objected, and why."""

    id: str
    task: str
    strategy: str
    request: str
    rule: str
    reason: str
    text: str


@dataclass(frozen=True)
class AugmentResult:
    """What an augmentation gave and what it cost.

    ``requests`` were judged; ``paid_requests`` were sent in this run, those for style cards and those ahead of need too; the tokens are
    those of the judged ones and of the style cards; ``wanted`` is how many were to be kept, ``stopped`` is '' or what ended it before that;
    ``redacted`` counts hidden values by kind.
    """

    kept: tuple[Synthetic, ...]
    rejected: tuple[Rejected, ...]
    requests: int
    paid_requests: int
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    teacher_name: str
    embedded: bool
    wanted: int
    stopped: str
    redacted: dict[str, int]

    def metrics(self) -> dict[str, Any]:
        """Return counts, costs and the teacher's name, JSON-serialisable; no text of the user's."""
        return {
            "kept": len(self.kept),
            "wanted": self.wanted,
            "rejected": len(self.rejected),
            "rules": dict(Counter(item.rule for item in self.rejected).most_common()),
            "reasons": dict(Counter(item.reason for item in self.rejected).most_common()),
            "tasks": dict(sorted(Counter(item.task for item in self.kept).items())),
            "strategies": dict(sorted(Counter(item.strategy for item in self.kept).items())),
            "acceptance": round(len(self.kept) / self.requests, 3) if self.requests else 0.0,
            "requests": self.requests,
            "paid_requests": self.paid_requests,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "seconds": round(self.seconds, 2),
            "teacher": self.teacher_name,
            "embedded": self.embedded,
            "advice": ADVICE if self.embedded else "",
            "stopped": self.stopped,
            "redacted": self.redacted,
        }


def augment(
    train: tuple[Record, ...],
    held_out: tuple[Record, ...],
    user: str,
    config: AugmentConfig,
    teacher_config: TeacherConfig,
    base_gguf: Path,
    seed: int,
    directory: Path,
    answers: Path,
    progress: Progress,
    teacher: Teacher | None = None,
    likeness: Likeness | None = None,
    fits: Fits = anything,
) -> AugmentResult:
    """Let a teacher write synthetic records for one user and keep the good ones.

    The same records, configuration and seed give the same result for any concurrency and after any interruption, as far as the
    teacher answers the same request the same way; answers that arrived once are never asked for again.

    Args:
        train: the user's training records, the only ones that are shown to the teacher.
        held_out: validation and test records, used only to keep everything away from them.
        user: named in messages to the person at the terminal; never sent.
        config: how many to keep and how to ask.
        teacher_config: whom to ask, and the budget.
        base_gguf: the base model, which teaches itself where no teacher is named.
        seed: of all choices.
        directory: receives ``kept.jsonl`` and ``rejected.jsonl``.
        answers: the append-only log, which outlives the directory.
        progress: told of every record.
        teacher: asked instead of the one that ``teacher_config`` names; the caller closes it.
        likeness: ranks the candidates; None to rank none.
        fits: says whether the student has room for the answer to an input of a task.

    Raises:
        TeacherError: the teacher cannot be used, or nothing at all could be kept.
        DataError: no training record may be shown.
        DiskFull: there is no room.
    """
    began, veil = time.monotonic(), Veil(train, config, progress)
    wanted = wanted_of(config, len(train))
    selector = veil.judge(Selector(train, held_out, config, fits))
    with _hired(teacher, teacher_config, base_gguf, seed, answers, progress) as (desk, stop):
        embedded = desk.hired.embedded
        planner = planned(train, held_out, veil, config, seed, embedded, lambda request: _at_once(request, desk, progress))
        asking = Asking(planner.ask, selector, desk, candidates_of(config, wanted, embedded), wanted * config.max_attempts, progress, stop)
        asking.run()
    kept, rejected = _chosen(asking.judged, wanted, config, likeness)
    result = AugmentResult(
        kept=kept,
        rejected=rejected,
        requests=len(asking.judged),
        paid_requests=asking.paid + desk.cards_paid,
        prompt_tokens=asking.prompt_tokens + sum(answer.prompt_tokens for answer in desk.cards),
        completion_tokens=asking.completion_tokens + sum(answer.completion_tokens for answer in desk.cards),
        seconds=time.monotonic() - began,
        teacher_name=desk.hired.teacher.name,
        embedded=desk.hired.embedded,
        wanted=wanted,
        stopped=asking.stopped if len(kept) < wanted else "",
        redacted=veil.counts,
    )
    _warn(result, config, user, progress)
    write_atomic(directory / KEPT, _lines(result.kept))
    write_atomic(directory / REJECTED, _lines(result.rejected))
    return result


def wanted_of(config: AugmentConfig, real: int) -> int:
    """Return how many synthetic records are kept beside so many real ones."""
    return max(min(config.keep, 1), int(min(config.keep, config.per_real * real)))


def candidates_of(config: AugmentConfig, wanted: int, embedded: bool) -> int:
    """Return how many candidates are gathered; the base that teaches itself is slow and its records are much alike, so none to spare."""
    return wanted if embedded else math.ceil(wanted * config.pool)


@contextmanager
def _hired(
    teacher: Teacher | None, config: TeacherConfig, base_gguf: Path, seed: int, answers: Path, progress: Progress
) -> Iterator[tuple[Desk, threading.Event]]:
    """Give a desk with the teacher, and the event that ends all tries; both are gone with the block."""
    stop, log = threading.Event(), AnswerLog(answers)
    budget = Budget(config.max_requests, config.token_budget)
    try:
        if teacher is not None:
            yield Desk(Hired(teacher, max(1, config.concurrency), False, False), log, budget), stop
        else:
            with hire(config, base_gguf, seed, progress, stop) as hired:
                yield Desk(hired, log, budget), stop
    finally:
        stop.set()
        log.close()


def _at_once(request: Request, desk: Desk, progress: Progress) -> str:
    """Return the answer to one request before all others, '' where the budget has no room for it."""
    if not desk.budget.admit():
        return ""
    answer = desk.known(request)
    if answer is None:
        desk.start_teacher()
        progress.start("reading the user's style")
        answer = desk.pay(request)
        desk.cards_paid += 1
        progress.done()
    desk.cards.append(answer)
    return answer.text


def planned(
    train: Sequence[Record],
    held_out: Sequence[Record],
    veil: Veil,
    config: AugmentConfig,
    seed: int,
    embedded: bool,
    answered: Callable[[Request], str],
) -> Planner:
    """Return the planner of all requests but those for the style card, which are answered here.

    Args:
        train: training records.
        held_out: validation and test records.
        veil: what is hidden from the teacher.
        config: see ``AugmentConfig``.
        seed: of all choices.
        embedded: whether the base teaches itself; its prompts have no room for a style card.
        answered: answers the request for a style card.
    """
    card: dict[str, list[str]] = {}
    out = HeldOut(veil.kept_out(held_out))
    # As they are too: what is hidden of a text depends on the words around it, so a quoted one can look different.
    may_be_shown = [
        shown for record, shown in zip(train, veil.shown(train), strict=True) if not (out.repeated_by(record) or out.repeated_by(shown))
    ]
    if config.style and not embedded:
        for name in dict.fromkeys(record.task for record in may_be_shown):
            records = [record for record in may_be_shown if record.task == name]
            request = card_request(records, seed, config.max_tokens)
            out.assert_not_shown(request.messages)
            card[name] = counted(records) + card_lines(answered(request))
    inputs = read_inputs(Path(config.inputs)) if config.inputs else {}
    return Planner(may_be_shown, out, config, seed, embedded, card, inputs, veil.text)


def _chosen(
    judged: Sequence[Judged], wanted: int, config: AugmentConfig, likeness: Likeness | None
) -> tuple[tuple[Synthetic, ...], tuple[Rejected, ...]]:
    """Return what is kept of the candidates, and everything that is not, in the order of the requests."""
    good = [one for one in judged if not one.reason]
    made = [_record(one) for one in good]
    groups = [(one.task, one.strategy, one.output if get_task(one.task).labels else "") for one in made]
    scores = likeness([Record(m.id, m.date, m.task, m.input, m.output) for m in made]) if likeness and made else None
    choice = choose([f"{m.input} {m.output}" for m in made], groups, wanted, scores, config.alike)
    why = {made[place].id: reason for place, reason in choice.reasons.items()}
    rejected = []
    for one in judged:
        name = _name(one)
        if one.reason or name in why:
            rule = one.rule if one.reason else "choice"
            rejected.append(Rejected(name, one.ask.task.name, one.ask.strategy, one.key, rule, one.reason or why[name], one.text))
    return tuple(made[place] for place in choice.kept), tuple(rejected)


def _name(one: Judged) -> str:
    return f"synthetic-{one.ask.k:05d}"


def _record(one: Judged) -> Synthetic:
    date = max(record.date for record in one.ask.examples)
    return Synthetic(_name(one), date, one.ask.task.name, one.input, one.output, one.ask.strategy, one.key)


def _lines(rows: Sequence[Synthetic | Rejected]) -> str:
    return "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)


def _warn(result: AugmentResult, config: AugmentConfig, user: str, progress: Progress) -> None:
    """Say that fewer records were kept than wanted.

    Raises:
        TeacherError: none was.
    """
    if len(result.kept) == result.wanted:
        return
    why = f"{result.stopped} is reached" if result.stopped else f"{result.requests} requests were made, the most that are allowed"
    common = result.metrics()["reasons"]
    reason = f" The most common reason: {next(iter(common))}." if common else ""
    if not result.kept:
        raise TeacherError(
            f"None of the teacher's {result.requests} answers for user {user} could be kept ({why}).{reason} Name a stronger teacher "
            "(--teacher-base-url, --teacher-model or --teacher-gguf) or train on real records alone (--keep 0)."
        )
    progress.warn(f"Only {len(result.kept)} of {result.wanted} synthetic records were kept: {why}.{reason}")
