"""Train a cohort: many users on one frozen base, in groups whose rows share a pass, as many groups at once as there are cores.

On CPU cores one user's batch fills a pass, so most groups are one user and a core works on each; batches of one or two rows are put
together. On a GPU the cohort is one group. A user's numbers depend on nobody else: every operation is per token, per row or per user.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

import torch

from cdcda_export.decoder import Decoder, keep_freed_memory
from cdcda_export.errors import CdcdaError, FileError
from cdcda_export.progress import Progress
from cdcda_export.runtime import cpu_threads
from cdcda_mobile.config import TrainConfig
from cdcda_mobile.training.engine import Engine, engine_of
from cdcda_mobile.training.learner import Learner, Order, Trained, TrainResult
from cdcda_mobile.training.lora import Layout

# Rows that fill a pass on a core: fewer leave its products below nine tenths of their speed.
_ROWS_OF_A_PASS = 4


@dataclass(frozen=True)
class _Event:
    """What a working thread tells: a step of a user, or that the user is through."""

    index: int
    steps: int = 0
    loss: float = math.nan
    outcome: Trained | None = None


def train_cohort(
    decoder: Decoder,
    orders: Sequence[Order],
    config: TrainConfig,
    progress: Progress,
    members: Sequence[str] = (),
    finished: Callable[[int, Trained], None] | None = None,
) -> list[Trained]:
    """Train every order to its end, or to its early stop; a failure is returned in its place and stops nobody else.

    Args:
        decoder: the frozen base; the device it lies on decides how the cohort is computed.
        orders: what to train; checkpoints in their directories are resumed.
        config: see ``TrainConfig``.
        progress: counts the steps of all.
        members: the users of the cohort as it was begun, where some are finished already: groups stay as they were.
        finished: told in this thread as soon as an order is through.

    Returns:
        What became of each order, in order.
    """
    keep_freed_memory()
    layout = Layout(decoder, config.targets, config.rank, config.alpha, config.first_layer)
    threads = config.threads or cpu_threads()
    on_cpu = decoder.device.type == "cpu"
    groups = _grouped(orders, members, config, threads, on_cpu)
    parts = max(1, threads // len(groups)) if on_cpu else 1
    outcomes: list[Trained | None] = [None] * len(orders)
    with ExitStack() as stack:
        stack.enter_context(_single_threaded_products())
        pool = stack.enter_context(ThreadPoolExecutor(parts, initializer=torch.set_num_threads, initargs=(1,))) if parts > 1 else None
        made = []
        for group in groups:
            engine = engine_of(decoder, layout, pool)
            made.append(_Group([(index, orders[index]) for index in group], config, layout, engine, parts))
        # The longest first: the shortest fill the gaps at the end.
        made.sort(key=lambda group: -group.remaining_tokens())
        workers = min(threads, len(made)) if on_cpu else 1
        progress.start(_label(orders), sum(g.total_steps for g in made), "steps")
        for event in stack.enter_context(closing(_work(made, workers, on_cpu))):
            if event.outcome is not None:
                outcomes[event.index] = event.outcome
                if finished is not None:
                    finished(event.index, event.outcome)
            progress.advance(event.steps, _note(event, orders, outcomes))
        progress.done(_summary(outcomes))
    return [outcome for outcome in outcomes if outcome is not None]


def _grouped(orders: Sequence[Order], members: Sequence[str], config: TrainConfig, threads: int, on_cpu: bool) -> list[list[int]]:
    """Return which orders share a pass: a matter of the configuration and of the whole cohort, so that a resume finds the same groups."""
    everyone = list(dict.fromkeys([*members, *(order.user for order in orders)]))
    size = len(everyone)
    if on_cpu:
        size = max(1, min(-(-_ROWS_OF_A_PASS // config.batch_size), len(everyone) // threads))
    place = {user: index // size for index, user in enumerate(everyone)}
    groups: dict[int, list[int]] = {}
    for index, order in enumerate(orders):
        groups.setdefault(place[order.user], []).append(index)
    return list(groups.values())


class _Group:
    """Users whose rows share a pass; they take their steps together, and who is through leaves."""

    def __init__(self, orders: Sequence[tuple[int, Order]], config: TrainConfig, layout: Layout, engine: Engine, parts: int) -> None:
        self.config, self.engine = config, engine
        self.flats = torch.zeros(len(orders), layout.size, device=engine.device)
        self.learners = {
            index: Learner(order, config, layout, flat, parts) for (index, order), flat in zip(orders, self.flats, strict=True)
        }
        self.total_steps = sum(learner.total_steps for learner in self.learners.values())
        self._losses: list[tuple[list[int], torch.Tensor]] = []

    def remaining_tokens(self) -> int:
        return sum(len(row.ids) for learner in self.learners.values() for rows in learner.phases for row in rows)

    def run(self, tell: Callable[[_Event], None], stop: threading.Event) -> None:
        """Train all to their ends; between two steps ``stop`` is obeyed."""
        common = max(set.intersection(*(learner.steps_saved() for learner in self.learners.values())))
        for index, learner in self.learners.items():
            learner.resume(common)
            if common:
                tell(_Event(index, learner.state.step))
        if not common:
            self._evaluate(list(self.learners), {})
        self._dismiss(tell)
        while self.learners and not stop.is_set():
            self._step(tell)

    def _step(self, tell: Callable[[_Event], None]) -> None:
        began, own, elsewhere = time.monotonic(), time.thread_time(), self.engine.cpu_seconds
        indices = list(self.learners)
        learners = [self.learners[index] for index in indices]
        batches = [learner.batch() for learner in learners]
        losses = self.engine.gradients(
            batches, [learner.flat for learner in learners], [learner.gradient for learner in learners], learners[0].state.parts
        )
        self._losses.append((indices, losses))
        tokens = [sum(len(row.ids) for row in rows) for rows in batches]
        for learner, count in zip(learners, tokens, strict=True):
            learner.update(count)
        due = [index for index in indices if self.learners[index].due]
        found: dict[int, float] = {}
        if due or self.engine.device.type == "cpu" or learners[0].state.step % self.config.checkpoint_steps == 0:
            found = self._read_losses(tell)
        self._evaluate([index for index in due if index in self.learners], found)
        # Who stands in a pass pays for it by tokens.
        wall, cpu = time.monotonic() - began, time.thread_time() - own + self.engine.cpu_seconds - elsewhere
        for learner, count in zip(learners, tokens, strict=True):
            learner.state.seconds += wall * count / sum(tokens)
            learner.state.cpu_seconds += cpu * count / sum(tokens)
        self._save_and_dismiss(tell)
        for index in indices:
            tell(_Event(index, 1, found.get(index, math.nan)))

    def _read_losses(self, tell: Callable[[_Event], None]) -> dict[int, float]:
        """Read the losses since the last time and return the newest; whose loss is no number leaves."""
        newest: dict[int, float] = {}
        for indices, losses in self._losses:
            newest |= zip(indices, losses.tolist(), strict=True)
            for index in indices:
                learner = self.learners.get(index)
                if learner is None:
                    continue
                try:
                    learner.check(newest[index])
                except CdcdaError as error:
                    tell(_Event(index, learner.total_steps - learner.state.step, outcome=error))
                    del self.learners[index]
        self._losses.clear()
        return newest

    def _evaluate(self, indices: Sequence[int], losses: dict[int, float]) -> None:
        asked = [self.learners[index] for index in indices if self.learners[index].validation]
        found: dict[int, float] = {}
        if asked:
            nll = self.engine.nll([one.validation for one in asked], [one.flat for one in asked], asked[0].state.parts)
            found = {id(learner): value for learner, value in zip(asked, nll.tolist(), strict=True)}
        for index in indices:
            learner = self.learners[index]
            learner.judge(found.get(id(learner)), losses.get(index))

    def _save_and_dismiss(self, tell: Callable[[_Event], None]) -> None:
        leaving = any(learner.over for learner in self.learners.values())
        for learner in self.learners.values():
            # Who stays when another leaves goes on from there after a kill: in the same company, to the same bits.
            company = leaving and len(self.learners) > 1
            if not learner.over and (company or learner.state.step % self.config.checkpoint_steps == 0):
                learner.save()
        self._dismiss(tell)

    def _dismiss(self, tell: Callable[[_Event], None]) -> None:
        for index in [index for index, learner in self.learners.items() if learner.over]:
            learner = self.learners.pop(index)
            # Steps that an early stop saves count as done, so that the bar ends full.
            tell(_Event(index, learner.total_steps - learner.state.step, outcome=learner.result()))


def _work(groups: Sequence[_Group], workers: int, on_cpu: bool) -> Generator[_Event]:
    """Run the groups on threads and yield what they tell; closing the iterator stops them after the step that they are in."""
    told: queue.SimpleQueue[_Event | Future[None]] = queue.SimpleQueue()
    stop = threading.Event()

    def run(group: _Group) -> None:
        if on_cpu:
            torch.set_num_threads(1)
        try:
            if not stop.is_set():
                group.run(told.put, stop)
        except (CdcdaError, OSError) as error:
            # A disk that fails or a folder that is gone: it happens to this group.
            failure = error if isinstance(error, CdcdaError) else FileError(f"{error.filename or 'A file'}: {error.strerror or error}.")
            for index, learner in group.learners.items():
                told.put(_Event(index, learner.total_steps - learner.state.step, outcome=failure))

    with ThreadPoolExecutor(workers, thread_name_prefix="cohort") as pool:
        try:
            for group in groups:
                pool.submit(run, group).add_done_callback(told.put)
            left = len(groups)
            while left:
                event = told.get()
                if isinstance(event, _Event):
                    yield event
                else:
                    event.result()
                    left -= 1
        finally:
            stop.set()


@contextmanager
def _single_threaded_products() -> Iterator[None]:
    """Let numpy's BLAS work in the thread that calls it: the cores are busy with passes already."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1, user_api="blas"):
        yield


def _label(orders: Sequence[Order]) -> str:
    return "training the adapter" if len(orders) == 1 else f"training {len(orders)} adapters"


def _note(event: _Event, orders: Sequence[Order], outcomes: Sequence[Trained | None]) -> str:
    loss = "" if math.isnan(event.loss) else f"loss {event.loss:.3f}"
    if len(orders) == 1:
        return loss
    return f"{loss} ({orders[event.index].user}), {sum(o is not None for o in outcomes)} of {len(orders)} through"


def _summary(outcomes: Sequence[Trained | None]) -> str:
    if len(outcomes) == 1 and isinstance(outcomes[0], TrainResult):
        state = outcomes[0].state
        return "" if math.isinf(state.best_nll) else f"validation NLL {state.best_nll:.3f} at step {state.best_step}"
    failed = sum(isinstance(outcome, CdcdaError) for outcome in outcomes)
    return f"{failed} failed" if failed else ""
