"""Synthetic records for one user: ask, judge, keep; what is kept and what is not are both on disk, with reasons."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cdcda_export.errors import CdcdaError, TeacherError
from cdcda_export.manifest import write_atomic
from cdcda_export.progress import Progress
from cdcda_mobile.config import AugmentConfig, TeacherConfig
from cdcda_mobile.history import Record
from cdcda_mobile.pool import Pool
from cdcda_mobile.prompts import Ask, Planner
from cdcda_mobile.select import Selector
from cdcda_mobile.teacher import Answer, AnswerLog, Budget, Hired, Teacher, hire

KEPT = "kept.jsonl"
REJECTED = "rejected.jsonl"
ADVICE = (
    "The base model taught itself. A stronger teacher gives better data: set OPENAI_BASE_URL, OPENAI_API_KEY and --teacher-model "
    "for any OpenAI-compatible endpoint, or --teacher-gguf for a larger local model."
)
_DRAIN_S = 30.0
_AHEAD = 4  # requests per thread that may be asked before they are judged


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
    """An answer that was not kept: the raw text, and why."""

    id: str
    task: str
    strategy: str
    request: str
    reason: str
    text: str


@dataclass(frozen=True)
class AugmentResult:
    """What an augmentation gave and what it cost.

    ``requests`` were judged, ``paid_requests`` were sent in this run (the rest was answered before); the tokens are those of the
    judged ones; ``stopped`` is '' or what ended it before enough were kept.
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
    stopped: str = ""

    def metrics(self) -> dict[str, Any]:
        """Return counts, costs and the teacher's name, JSON-serialisable; no text of the user's."""
        return {
            "kept": len(self.kept),
            "rejected": len(self.rejected),
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

    Raises:
        TeacherError: the teacher cannot be used, or nothing at all could be kept.
        DataError: no training record may be shown.
        DiskFull: there is no room.
    """
    began, stop, log = time.monotonic(), threading.Event(), AnswerLog(answers)
    given = nullcontext(Hired(teacher, max(1, teacher_config.concurrency), False, False)) if teacher else None
    try:
        with given or hire(teacher_config, base_gguf, seed, progress, stop) as hired:
            planner = Planner(train, held_out, config, seed, inputs_only=hired.embedded)
            budget = Budget(teacher_config.max_requests, teacher_config.token_budget)
            run = _Run(planner, Selector(train, held_out, config), hired, log, budget, config, progress, stop)
            run.run()
    finally:
        stop.set()
        log.close()
    result = run.result(time.monotonic() - began)
    _warn(result, config, user, progress)
    write_atomic(directory / KEPT, _lines(result.kept))
    write_atomic(directory / REJECTED, _lines(result.rejected))
    return result


def _lines(rows: Sequence[Synthetic | Rejected]) -> str:
    return "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in rows)


def _warn(result: AugmentResult, config: AugmentConfig, user: str, progress: Progress) -> None:
    """Say that fewer records were kept than wanted.

    Raises:
        TeacherError: none was.
    """
    if len(result.kept) == config.keep:
        return
    why = f"{result.stopped} is reached" if result.stopped else f"{result.requests} requests were made, the most that are allowed"
    common = result.metrics()["reasons"]
    reason = f" The most common reason: {next(iter(common))}." if common else ""
    if not result.kept:
        raise TeacherError(
            f"None of the teacher's {result.requests} answers for user {user} could be kept ({why}).{reason} Name a stronger teacher "
            "(--teacher-base-url, --teacher-model or --teacher-gguf) or train on real records alone (--keep 0)."
        )
    progress.warn(f"Only {len(result.kept)} of {config.keep} synthetic records were kept: {why}.{reason}")


class _Run:
    """Asks ahead, judges in order, stops at the first request that completes the set."""

    def __init__(
        self,
        planner: Planner,
        selector: Selector,
        hired: Hired,
        log: AnswerLog,
        budget: Budget,
        config: AugmentConfig,
        progress: Progress,
        stop: threading.Event,
    ) -> None:
        self._planner, self._selector, self._hired, self._log = planner, selector, hired, log
        self._budget, self._progress, self._stop = budget, progress, stop
        self._keep, self._limit = config.keep, config.keep * config.max_attempts
        self._pool = Pool(hired.concurrency, self._pay)
        self._asks: dict[int, Ask] = {}
        self._ready: dict[int, Answer] = {}
        self._kept: list[Synthetic] = []
        self._rejected: list[Rejected] = []
        self._next = self._judged = self._paid = self._prompt_tokens = self._completion_tokens = 0
        self._stopped = ""
        self._started = self._shown = False

    def run(self) -> None:
        """Ask and judge until enough are kept, or a limit is reached.

        Raises:
            CdcdaError: what the first thread that failed raised, after the others' answers were saved.
        """
        try:
            while self._wants_more():
                self._ask_ahead()
                self._show()
                if self._judged in self._ready:
                    self._judge(self._judged, self._ready.pop(self._judged))
                elif self._pool.busy:
                    self._receive(self._pool.next())
                else:
                    break  # the budget is used up and everything that was asked is judged
        except CdcdaError:
            self._finish()
            raise
        self._finish()
        self._progress.done(f"{len(self._kept)} of {self._judged} answers kept")

    def _wants_more(self) -> bool:
        limit, spent = self._budget.token_budget, self._prompt_tokens + self._completion_tokens
        if limit and spent >= limit:  # counted over judged answers alone, this is the same for any concurrency
            self._stopped = f"--token-budget {limit}"
            return False
        return len(self._kept) < self._keep and self._judged < self._limit

    def _start_teacher(self) -> None:
        """Start the teacher here, not in a worker: a child process of its must outlive the workers."""
        if not self._started:
            self._started = True
            self._hired.teacher.start()
            self._shown = False  # that had a progress bar of its own

    def _show(self) -> None:
        if not self._shown:
            self._shown = True
            self._progress.start("writing synthetic records", self._keep, "kept")
            self._progress.advance(len(self._kept))

    def _ask_ahead(self) -> None:
        # So far that no thread is idle while all wait for one slow answer to be judged. As many as are still to be kept will be judged
        # in any case, so at most ``concurrency - 1`` answers are paid for nothing; a token budget is not to be passed by more either.
        concurrency, missing = self._hired.concurrency, self._keep - len(self._kept)
        ahead = concurrency if self._budget.token_budget else max(concurrency, min(missing, _AHEAD * concurrency))
        # Not past an answer that waits to be judged: it may be the last that is needed.
        while self._judged not in self._ready and self._next < min(self._limit, self._judged + ahead):
            if not self._budget.admit():
                self._stopped = self._budget.exhausted()
                return
            ask = self._planner.ask(self._next)
            self._asks[ask.k] = ask
            known = self._log.get(ask.request.key(self._hired.teacher.name))
            if known is not None:
                self._budget.spend(known.tokens)
                self._ready[ask.k] = known
            else:
                self._start_teacher()
                self._pool.submit(ask.k)
            self._next += 1

    def _pay(self, k: int) -> Answer:
        """Ask, in a worker's thread; the answer is on disk before anything else happens."""
        request, began = self._asks[k].request, time.monotonic()
        answer = self._hired.teacher.complete(request)
        name = self._hired.teacher.name
        self._log.append(request.key(name), name, answer, time.monotonic() - began)
        self._budget.spend(answer.tokens)
        return answer

    def _receive(self, item: tuple[int, Answer | Exception]) -> None:
        k, outcome = item
        if isinstance(outcome, Exception):
            raise outcome
        self._paid += 1
        self._ready[k] = outcome

    def _judge(self, k: int, answer: Answer) -> None:
        ask = self._asks.pop(k)
        verdict = self._selector.judge(ask, answer.text)
        name, key = f"synthetic-{k:05d}", ask.request.key(self._hired.teacher.name)
        if verdict.reason:
            self._rejected.append(Rejected(name, ask.task.name, ask.strategy, key, verdict.reason, answer.text))
        else:
            date = max(record.date for record in ask.examples)
            self._kept.append(Synthetic(name, date, ask.task.name, verdict.input, verdict.output, ask.strategy, key))
        self._judged += 1
        self._prompt_tokens += answer.prompt_tokens
        self._completion_tokens += answer.completion_tokens
        self._progress.advance(0 if verdict.reason else 1, f"of {self._judged} answers")

    def _finish(self) -> None:
        """Start nothing more; wait for answers that are under way where they cost money."""
        self._pool.cancel()
        if self._hired.local:
            self._stop.set()
            return
        until = time.monotonic() + _DRAIN_S
        while self._pool.busy and time.monotonic() < until:
            try:
                _, outcome = self._pool.next(until - time.monotonic())
            except queue.Empty:
                return
            self._paid += isinstance(outcome, Answer)

    def result(self, seconds: float) -> AugmentResult:
        """Return what came of it."""
        return AugmentResult(
            kept=tuple(self._kept),
            rejected=tuple(self._rejected),
            requests=self._judged,
            paid_requests=self._paid,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            seconds=seconds,
            teacher_name=self._hired.teacher.name,
            embedded=self._hired.embedded,
            stopped=self._stopped if len(self._kept) < self._keep else "",
        )
