"""A fleet: cohorts of users as Ray tasks, on this machine or on a cluster; a worker that dies costs time, and no user.

Everything a task leaves lies in the users' directories, so a task that is tried again goes on from there where the disk is shared.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cdcda_export.base import Base
from cdcda_export.batch import Outcome
from cdcda_export.progress import Progress
from cdcda_mobile.cohorts import cohorts_of, run_cohort
from cdcda_mobile.fleet.cluster import Share, cluster, share_of
from cdcda_mobile.fleet.view import Event, View, choose_view
from cdcda_mobile.fleet.worker import Task, Work, work_on
from cdcda_mobile.pipeline import UserJob

# A user who was alone when the worker died is guilty; a cohort's deaths count as one against each of its users.
_DEATHS_OF_A_COHORT, _DEATHS_OF_A_USER = 2, 3
# Of the driver's environment, what tasks see: it travels as an argument, which stays in memory, unlike Ray's runtime_env.
_FORWARDED = ("OPENAI_", "AWS_", "AZURE_", "GOOGLE_", "FSSPEC_")
_POLL_S = 0.3


class Board:
    """An actor: workers write on it how far they are, the driver reads and wipes it."""

    def __init__(self) -> None:
        self.events: dict[int, Event] = {}
        self.warnings: list[Event] = []

    def tell(self, event: Event) -> None:
        """Keep the newest event of every cohort, and all warnings."""
        if event.warning:
            self.warnings.append(event)
        else:
            self.events[event.cohort] = event

    def read(self) -> list[Event]:
        """Return what is new."""
        new = [*self.warnings, *self.events.values()]
        self.warnings, self.events = [], {}
        return new


def run_fleet(
    jobs: Sequence[UserJob], base: Base, progress: Progress, address: str = "", upload: str = "", work: Work = run_cohort
) -> list[Outcome]:
    """Run the jobs as Ray tasks and return what became of each, in order.

    Args:
        jobs: users of one workspace, base and configuration.
        base: the base, opened; workers open it for themselves.
        progress: how to show what goes on.
        address: of a Ray cluster; '' starts one on this machine's cores and stops it at the end.
        upload: where artifacts go too, as an fsspec URL; '' for nowhere.
        work: what a worker does with a cohort.

    Raises:
        ConfigError: there is no such cluster, or no core in it.
        MissingDependency: Ray is not installed.
    """
    longest = max(map(len, cohorts_of(jobs, base)))
    progress.start(f"connecting to Ray at {address}" if address else "starting Ray")
    # Ray prints to standard output what it thinks of dying workers; that one belongs to the summary.
    with contextlib.redirect_stdout(io.StringIO()), cluster(address) as ray:
        share = share_of(ray, jobs)
        progress.done(f"{share.workers} workers of {share.cores} cores".replace("1 cores", "1 core"))
        most = longest if jobs[0].train.cohort != "auto" else max(1, longest // share.beside)
        view = choose_view(len(jobs), progress)
        try:
            fleet = _Fleet(ray, share, upload, view, work)
            for cohort in divided(jobs, most, share.workers):
                fleet.hand_in(cohort)
            found = fleet.run()
        finally:
            view.close()
    return [found[job.user] for job in jobs]


def divided(jobs: Sequence[UserJob], most: int, workers: int) -> list[list[UserJob]]:
    """Divide users into cohorts of at most ``most``, the last ones smaller: they decide when the last worker is done."""
    least = max(1, min(most // 4, len(jobs) // workers))
    cohorts, at = [], 0
    while at < len(jobs):
        size = min(most, max(least, -(-(len(jobs) - at) // workers)))
        cohorts.append(list(jobs[at : at + size]))
        at += size
    return cohorts


class _Fleet:
    """The driver's side: hands cohorts in, tries again what a dying worker left, and gathers outcomes."""

    def __init__(self, ray: Any, share: Share, upload: str, view: View, work: Work) -> None:
        self.ray, self.view = ray, view
        self.running: dict[Any, Task] = {}
        self.found: dict[str, Outcome] = {}
        self.count = 0
        environment = {name: value for name, value in os.environ.items() if name.startswith(_FORWARDED)}
        self.order = Task(0, (), share.cores, os.getcwd(), upload, work, environment)
        # Our own retries know whose fault a death may be; Ray's would try a poisonous cohort again as it is.
        self.task = ray.remote(num_cpus=share.cores, num_gpus=share.gpus, max_retries=0)(work_on)
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self.board = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(Board).remote()

    def hand_in(self, jobs: Sequence[UserJob], deaths: int = 0) -> None:
        """Let Ray find a worker for a cohort."""
        self.count += 1
        order = replace(self.order, number=self.count, jobs=tuple(jobs), deaths=deaths)
        self.view.waits(order.number, [job.user for job in jobs])
        self.running[self.task.remote(order, self.board)] = order

    def run(self) -> dict[str, Outcome]:
        """Wait for everything and return the outcomes by user; if this is interrupted, the tasks end too."""
        try:
            while self.running:
                done, _ = self.ray.wait(list(self.running), timeout=_POLL_S)
                self._show()
                for reference in done:
                    self._take(reference)
        finally:
            for reference in self.running:
                self.ray.cancel(reference, force=True)
        return self.found

    def _show(self) -> None:
        try:
            for event in self.ray.get(self.board.read.remote(), timeout=10):
                self.view.told(event)
        except self.ray.exceptions.RayError:
            pass  # its node died: it begins anew elsewhere, and nothing but a line is lost
        self.view.draw()

    def _take(self, reference: Any) -> None:
        order = self.running.pop(reference)
        try:
            outcomes = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            cause = getattr(error, "cause", error)
            self._lost(order, f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}", died=False)
            return
        except self.ray.exceptions.RayError as error:
            memory = isinstance(error, self.ray.exceptions.OutOfMemoryError)
            self._lost(order, "out of memory" if memory else "killed or crashed", died=True)
            return
        self.found |= {outcome.name: outcome for outcome in outcomes}
        self.view.ended(order.number, len(outcomes), sum(bool(outcome.error) for outcome in outcomes))

    def _lost(self, order: Task, why: str, died: bool) -> None:
        """Try a cohort again whose worker died, or its users one by one: what only one of them does must not harm the others."""
        state, deaths, users = self.view.states.get(order.number), order.deaths + 1, [job.user for job in order.jobs]
        at = f", while {state.label}" if state is not None and state.label else ""
        alone = len(users) == 1
        if alone and (not died or deaths >= _DEATHS_OF_A_USER):
            text = f"its worker died {deaths} times ({why}{at})" if died else f"an unexpected {why}"
            self.found[users[0]] = Outcome(users[0], error=f"{text}; run cdcda-export for this user alone to see more")
            self.view.ended(order.number, 1, 1)
            return
        self.view.line(f"{self.view.names[order.number]}: {'a worker died' if died else 'failed'} ({why}{at}), trying again")
        self.view.ended(order.number, 0, 0)
        if alone or (died and deaths < _DEATHS_OF_A_COHORT):
            self.hand_in(order.jobs, deaths)
            return
        for job in order.jobs:
            self.hand_in([job], 1 if died else 0)
