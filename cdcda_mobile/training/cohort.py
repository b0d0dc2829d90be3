"""Train a cohort: many users on one frozen base, in groups whose rows share a pass, as many groups at once as there are cores.

On CPU cores one user's batch fills a pass, so most groups are one user and a core works on each; batches of less than four rows are put
together. On a GPU the cohort is one group. A user's numbers depend on nobody else: every operation is per token, per row or per user.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

import torch

from cdcda_export.decoder import Decoder, keep_freed_memory
from cdcda_export.errors import CdcdaError
from cdcda_export.progress import Progress
from cdcda_export.runtime import cpu_threads
from cdcda_mobile.config import TrainConfig
from cdcda_mobile.training.engine import engine_of
from cdcda_mobile.training.group import Event, Group
from cdcda_mobile.training.learner import Trained, TrainResult
from cdcda_mobile.training.lora import Layout
from cdcda_mobile.training.schedule import Order, Schedule

# Rows that fill a pass on a core: fewer leave its products below nine tenths of their speed.
_ROWS_OF_A_PASS = 4


@dataclass(frozen=True)
class _Plan:
    """How a cohort is computed: the orders of each group, and in how many passes a batch is cut."""

    groups: list[list[int]]
    parts: int
    workers: int


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
    on_cpu = _on_cpu(decoder)
    schedules = [Schedule(order, config) for order in orders]
    plan = _planned(orders, schedules, members, config, on_cpu)
    outcomes: list[Trained | None] = [None] * len(orders)
    with ExitStack() as stack:
        stack.enter_context(_one_thread_each())
        pool = stack.enter_context(_threads(plan.parts, "pass")) if plan.parts > 1 else None

        def group(indices: Sequence[int], tell: Callable[[Event], None]) -> Group:
            chosen = [(index, orders[index]) for index in indices]
            return Group(chosen, config, layout, engine_of(decoder, layout, pool), plan.parts, tell)

        progress.start(_label(orders), sum(schedule.total_steps for schedule in schedules), "steps")
        for event in stack.enter_context(closing(_work(plan, group))):
            if event.outcome is not None and outcomes[event.index] is None:
                outcomes[event.index] = event.outcome
                if finished is not None:
                    finished(event.index, event.outcome)
            progress.advance(event.steps, _note(event, orders, outcomes))
        progress.done(_summary(outcomes))
    return [outcome for outcome in outcomes if outcome is not None]


def _planned(orders: Sequence[Order], schedules: Sequence[Schedule], members: Sequence[str], config: TrainConfig, on_cpu: bool) -> _Plan:
    """Divide a cohort: a matter of the configuration and of all its members, so that a resume finds the same groups and passes."""
    threads = config.threads or cpu_threads()
    everyone = list(dict.fromkeys([*members, *(order.user for order in orders)]))
    size = max(1, min(-(-_ROWS_OF_A_PASS // config.batch_size), len(everyone) // threads)) if on_cpu else len(everyone)
    place = {user: index // size for index, user in enumerate(everyone)}
    groups: dict[int, list[int]] = {}
    for index, order in enumerate(orders):
        groups.setdefault(place[order.user], []).append(index)
    # The longest first: the shortest fill the gaps at the end.
    longest = sorted(groups.values(), key=lambda group: -sum(schedules[index].tokens for index in group))
    parts = max(1, threads // -(-len(everyone) // size)) if on_cpu else 1
    return _Plan(longest, parts, min(threads, len(longest)) if on_cpu else 1)


def _work(plan: _Plan, make: Callable[[Sequence[int], Callable[[Event], None]], Group]) -> Generator[Event]:
    """Run the groups on threads and yield what they tell; closing the iterator stops them after the step that they are in."""
    told: queue.SimpleQueue[Event | Future[None]] = queue.SimpleQueue()
    stop = threading.Event()

    def run(indices: Sequence[int]) -> None:
        # What a group holds is made here and gone with it: only those at work take memory.
        if stop.is_set():
            return
        try:
            make(indices, told.put).run(stop)
        except torch.cuda.OutOfMemoryError:
            error = CdcdaError("The GPU's memory is full; give a smaller --cohort.")
            for index in indices:
                told.put(Event(index, outcome=error))

    with _threads(plan.workers, "cohort") as pool:
        try:
            for indices in plan.groups:
                pool.submit(run, indices).add_done_callback(told.put)
            left = len(plan.groups)
            while left:
                event = told.get()
                if isinstance(event, Event):
                    yield event
                else:
                    event.result()
                    left -= 1
        finally:
            stop.set()


def _on_cpu(decoder: Decoder) -> bool:
    return decoder.device.type == "cpu"


def _threads(count: int, name: str) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, name, initializer=torch.set_num_threads, initargs=(1,))


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let every product run in the thread that asks for it, the cores are busy with passes already; afterwards all is as it was."""
    from threadpoolctl import threadpool_limits

    before = torch.get_num_threads()
    with threadpool_limits(limits=1, user_api="blas"):
        yield
    # What a thread of ours sets holds for every thread that is made later.
    torch.set_num_threads(before)


def _label(orders: Sequence[Order]) -> str:
    return "training the adapter" if len(orders) == 1 else f"training {len(orders)} adapters"


def _note(event: Event, orders: Sequence[Order], outcomes: Sequence[Trained | None]) -> str:
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
