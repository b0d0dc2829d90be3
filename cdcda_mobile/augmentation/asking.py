"""Ask the teacher ahead, judge its answers in order, and stop at the first request that completes the candidates."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from cdcda_export.errors import CdcdaError
from cdcda_export.progress import Progress
from cdcda_mobile.augmentation.prompts import Ask
from cdcda_mobile.augmentation.select import Judge
from cdcda_mobile.teachers.pool import Pool
from cdcda_mobile.teachers.teacher import Answer, AnswerLog, Budget, Hired, Request

_DRAIN_S = 30.0
_AHEAD = 4  # times the concurrency


@dataclass(frozen=True)
class Judged:
    """An answer with its request, its log key, and the record or the reason why it is none."""

    ask: Ask
    key: str
    text: str
    input: str
    output: str
    rule: str
    reason: str


class Desk:
    """Where requests are answered: from the log where they were answered before, else by the teacher, within the budget.

    Args:
        hired: the teacher.
        log: of all answers that ever came.
        budget: how much may be asked.

    Attributes:
        cards: the answers that style cards were made of.
        cards_paid: how many of them were asked for in this run.
    """

    def __init__(self, hired: Hired, log: AnswerLog, budget: Budget) -> None:
        self.hired, self.budget, self._log = hired, budget, log
        self.cards: list[Answer] = []
        self.cards_paid = 0
        self._started = False

    def key(self, request: Request) -> str:
        """Return the key of a request in the log."""
        return request.key(self.hired.teacher.name)

    def known(self, request: Request) -> Answer | None:
        """Return the answer that came before, if there is one."""
        answer = self._log.get(self.key(request))
        if answer is not None:
            self.budget.spend(answer.tokens)
        return answer

    def start_teacher(self) -> bool:
        """Start the teacher, once, and say whether it was now; not in a worker: a child process of its must outlive the workers."""
        if self._started:
            return False
        self._started = True
        self.hired.teacher.start()
        return True

    def pay(self, request: Request) -> Answer:
        """Ask the teacher; the answer is on disk before anything else happens. Safe to call from several threads."""
        began = time.monotonic()
        answer = self.hired.teacher.complete(request)
        self._log.append(self.key(request), self.hired.teacher.name, answer, time.monotonic() - began)
        self.budget.spend(answer.tokens)
        return answer


class Asking:
    """One run over the requests 0, 1, 2, ...

    Args:
        plan: makes request number k.
        judge: says what becomes of an answer.
        desk: answers.
        wanted: how many candidates complete the set.
        limit: how many requests are made at the most.
        progress: told of every answer.
        stop: set once nothing may be tried again.

    Attributes:
        judged: all answers, in the order of their requests.
        paid: how many were sent in this run.
        prompt_tokens, completion_tokens: of the judged ones.
        stopped: '' or the limit that ended it.
    """

    def __init__(
        self, plan: Callable[[int], Ask], judge: Judge, desk: Desk, wanted: int, limit: int, progress: Progress, stop: threading.Event
    ) -> None:
        self._plan, self._judge, self._desk, self._wanted, self._limit = plan, judge, desk, wanted, limit
        self._progress, self._stop = progress, stop
        self._pool = Pool(desk.hired.concurrency, self._pay)
        self._asks: dict[int, Ask] = {}
        self._ready: dict[int, Answer] = {}
        self.judged: list[Judged] = []
        self.paid = self.prompt_tokens = self.completion_tokens = 0
        self.stopped = ""
        self._next = self._good = 0
        self._shown = False

    def run(self) -> None:
        """Ask and judge until there are enough candidates, or a limit is reached.

        Raises:
            CdcdaError: what the first thread that failed raised, after the others' answers were saved.
        """
        try:
            while self._wants_more():
                self._ask_ahead()
                self._show()
                now = len(self.judged)
                if now in self._ready:
                    self._take(now, self._ready.pop(now))
                elif self._pool.busy:
                    self._receive(self._pool.next())
                else:
                    break  # the budget is used up and everything that was asked is judged
        except CdcdaError:
            self._finish()
            raise
        self._finish()
        self._progress.done(f"{self._good} of {len(self.judged)} answers can be used")

    def _wants_more(self) -> bool:
        cards = sum(card.prompt_tokens + card.completion_tokens for card in self._desk.cards)
        limit, spent = self._desk.budget.token_budget, cards + self.prompt_tokens + self.completion_tokens
        if limit and spent >= limit:  # counted over judged answers alone, this is the same for any concurrency
            self.stopped = f"--token-budget {limit}"
            return False
        return self._good < self._wanted and len(self.judged) < self._limit

    def _show(self) -> None:
        if not self._shown:
            self._shown = True
            self._progress.start("writing synthetic records", self._wanted, "candidates")
            self._progress.advance(self._good)

    def _ask_ahead(self) -> None:
        # So far that no thread is idle while all wait for one slow answer to be judged. As many as are still wanted will be judged in any
        # case, so at most ``concurrency - 1`` answers are paid for nothing; a token budget is not to be passed by more either.
        now, concurrency = len(self.judged), self._desk.hired.concurrency
        ahead = concurrency if self._desk.budget.token_budget else max(concurrency, min(self._wanted - self._good, _AHEAD * concurrency))
        # Not past an answer that waits to be judged: it may be the last that is needed.
        while now not in self._ready and self._next < min(self._limit, now + ahead):
            if not self._desk.budget.admit():
                self.stopped = self._desk.budget.exhausted()
                return
            ask = self._plan(self._next)
            self._asks[ask.k] = ask
            known = self._desk.known(ask.request)
            if known is not None:
                self._ready[ask.k] = known
            else:
                if self._desk.start_teacher():
                    self._shown = False  # that had a progress bar of its own
                self._pool.submit(ask.k)
            self._next += 1

    def _pay(self, k: int) -> Answer:
        return self._desk.pay(self._asks[k].request)

    def _receive(self, item: tuple[int, Answer | Exception]) -> None:
        k, outcome = item
        if isinstance(outcome, Exception):
            raise outcome
        self.paid += 1
        self._ready[k] = outcome

    def _take(self, k: int, answer: Answer) -> None:
        ask = self._asks.pop(k)
        verdict = self._judge.judge(ask, answer.text)
        key = self._desk.key(ask.request)
        self.judged.append(Judged(ask, key, answer.text, verdict.input, verdict.output, verdict.rule, verdict.reason))
        self._good += not verdict.reason
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens
        bad, tokens = len(self.judged) - self._good, self.prompt_tokens + self.completion_tokens
        self._progress.advance(0 if verdict.reason else 1, f"{bad} rejected, {tokens:,} tokens")

    def _finish(self) -> None:
        """Start nothing more; wait for answers that are under way where they cost money."""
        self._pool.cancel()
        if self._desk.hired.local:
            self._stop.set()
            return
        until = time.monotonic() + _DRAIN_S
        while self._pool.busy and time.monotonic() < until:
            try:
                _, outcome = self._pool.next(until - time.monotonic())
            except queue.Empty:
                return
            self.paid += isinstance(outcome, Answer)
