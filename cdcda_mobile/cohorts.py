"""Many users: cohorts that fit into memory, prepared, trained together and exported; failures are named, the others finish."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cdcda_export.base import Base
from cdcda_export.batch import Outcome, outcome_of
from cdcda_export.errors import CdcdaError, ConfigError, DiskFull, is_disk_full
from cdcda_export.manifest import sha256_json, write_json
from cdcda_export.progress import Progress, Silent
from cdcda_mobile.pipeline import Pipeline, UserJob
from cdcda_mobile.user_training import train_users

if TYPE_CHECKING:
    from cdcda_mobile.config import TrainConfig

# The largest cohort that --cohort auto makes: beyond it nothing gets faster, and a kill loses more.
_MOST = 64


def cohorts_of(jobs: Sequence[UserJob], base: Base) -> list[list[UserJob]]:
    """Divide users into cohorts, of ``--cohort`` users or as many as memory holds; the division is recorded, so that a resume keeps it.

    Raises:
        ConfigError: a user is named twice.
    """
    refuse_twice(jobs)
    job = jobs[0]
    if job.export_only:
        size = _MOST
    elif job.train.cohort != "auto":
        size = int(job.train.cohort)
    else:
        name = sha256_json([[job.user for job in jobs], asdict(job.train), job.seed, base.sha256])[:12]
        record = job.workspace / "_cohorts" / f"{name}.json"
        size = _recorded(record) or _fitting(base, job.train)
        write_json(record, {"size": size, "users": len(jobs)})
    return [list(jobs[at : at + size]) for at in range(0, len(jobs), size)]


def refuse_twice(jobs: Sequence[UserJob]) -> None:
    """Refuse a user who is named twice.

    Raises:
        ConfigError: one is.
    """
    users = [job.user for job in jobs]
    twice = sorted({user for user in users if users.count(user) > 1})
    if twice:
        raise ConfigError(f"'{twice[0]}' is named twice; name each user once.")


def run_cohort(jobs: Sequence[UserJob], progress: Progress, base: Base | None = None, until: str = "export") -> list[Outcome]:
    """Prepare, train and export the users of one cohort, and return what became of each, in order.

    Args:
        jobs: users of one workspace, base and configuration.
        progress: told what goes on; what a single user's stages say is not shown, their warnings are on the cards.
        base: the base, where it is open already.
        until: ``adapter`` stops after the training.
    """
    base = base or Base(jobs[0].base, progress)
    return _Cohort(jobs, progress, base, until).run()


class _Cohort:
    def __init__(self, jobs: Sequence[UserJob], progress: Progress, base: Base, until: str) -> None:
        self.jobs, self.progress, self.base, self.until = jobs, progress, base, until
        self.pipelines: dict[str, Pipeline] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.seconds = dict.fromkeys((job.user for job in jobs), 0.0)
        self.locks: dict[str, ExitStack] = {}

    def run(self) -> list[Outcome]:
        try:
            self._each("reading histories", [job.user for job in self.jobs], self._open)
            augments = self.jobs[0].augment.keep and not self.jobs[0].export_only
            self._each("augmenting" if augments else "preparing", list(self.pipelines), self._prepare)
            if not self.jobs[0].export_only:
                self._train()
            if self.until == "export":
                self._each("exporting", list(self.pipelines), self._export)
        finally:
            for lock in self.locks.values():
                lock.close()
        return [self.outcomes[job.user] for job in self.jobs]

    def _each(self, label: str, users: Sequence[str], work: Callable[[str], None]) -> None:
        """Do the work for one user after another; who fails is named and leaves. A full disk ends the cohort."""
        self.progress.start(label, len(users), "users")
        for user in users:
            if user in self.outcomes:  # the disk was full
                continue
            began = time.monotonic()
            try:
                work(user)
            except (CdcdaError, OSError) as error:
                self._fail(user, error)
            self.seconds[user] += time.monotonic() - began
            failed = sum(bool(outcome.error) for outcome in self.outcomes.values())
            self.progress.advance(note=f"{failed} failed" if failed else "")
        self.progress.done()

    def _fail(self, user: str, error: CdcdaError | OSError) -> None:
        self.outcomes[user] = Outcome(user, self.seconds[user], error=str(error))
        self.pipelines.pop(user, None)
        if user in self.locks:
            self.locks.pop(user).close()
        if isinstance(error, DiskFull) or (isinstance(error, OSError) and is_disk_full(error)):
            for other in [*self.pipelines, *(job.user for job in self.jobs if job.user not in self.outcomes)]:
                self.outcomes.setdefault(other, Outcome(other, error="not tried: the disk was full"))
            self.pipelines.clear()

    def _open(self, user: str) -> None:
        job = next(job for job in self.jobs if job.user == user)
        pipeline = Pipeline(job, Silent(), self.base)
        with ExitStack() as stack:
            stack.enter_context(pipeline.opened())
            self.locks[user] = stack.pop_all()
        self.pipelines[user] = pipeline

    def _prepare(self, user: str) -> None:
        self.pipelines[user].prepare()

    def _train(self) -> None:
        members = [job.user for job in self.jobs]
        pipelines = dict(self.pipelines)
        trainings = {user: pipeline.to_train() for user, pipeline in pipelines.items()}
        failures: dict[str, CdcdaError] = {}
        for user, trained in zip(trainings, train_users(list(trainings.values()), self.progress, members), strict=True):
            reused = trainings[user].reused
            seconds = 0.0 if reused or isinstance(trained, CdcdaError) else float(trained.metrics["seconds"])
            self.seconds[user] += seconds
            try:
                pipelines[user].take(trained, reused, seconds)
            except CdcdaError as error:
                failures[user] = error
                continue
            if self.until == "adapter":
                self.outcomes[user] = self._trained(user, pipelines[user])
        # Last: a full disk names all as not tried who have no outcome yet.
        for user, failure in failures.items():
            self._fail(user, failure)

    def _trained(self, user: str, pipeline: Pipeline) -> Outcome:
        size = sum(output["bytes"] for output in pipeline.adapter.outputs.values())
        reused = all(timing["reused"] for timing in pipeline.timings)
        warnings = tuple(getattr(pipeline.progress, "warnings", ()))
        return Outcome(user, self.seconds[user], str(pipeline.directory / "adapter"), size, reused=reused, warnings=warnings)

    def _export(self, user: str) -> None:
        began = time.monotonic()
        card = self.pipelines[user].export()
        self.outcomes[user] = outcome_of(user, self.seconds[user] + time.monotonic() - began, card)


def _recorded(record: Path) -> int:
    """Return the size that a run of the same cohort chose, 0 where there was none."""
    try:
        return int(json.loads(record.read_text(encoding="utf-8"))["size"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def _fitting(base: Base, config: TrainConfig) -> int:
    """Return how many users' adapters fit into two thirds of the free memory beside what the passes need."""
    from cdcda_mobile.training.memory import bytes_free, bytes_of_passes, bytes_of_user

    room = bytes_free(base.decoder) * 2 // 3 - bytes_of_passes(base.decoder, config)
    return max(1, min(_MOST, room // bytes_of_user(base.decoder, config)))
