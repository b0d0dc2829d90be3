"""What a fleet's worker does: it makes its process what the driver's is, takes its share of the cores, and works on a cohort."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cdcda_export.base import Base
from cdcda_export.batch import Outcome
from cdcda_export.cache import cache_folder
from cdcda_export.errors import CdcdaError, FileError
from cdcda_export.folders import make_private
from cdcda_export.progress import Progress
from cdcda_mobile.fleet.view import Reporter
from cdcda_mobile.pipeline import UserJob
from cdcda_mobile.upload import upload_finished

Work = Callable[[Sequence[UserJob], Progress, Base], list[Outcome]]


@dataclass(frozen=True)
class Task:
    """What a worker is told. ``environment`` holds secrets, so it is never shown."""

    number: int
    jobs: tuple[UserJob, ...]
    cores: int
    folder: str
    upload: str
    work: Work
    environment: dict[str, str] = field(repr=False)
    deaths: int = 0


def work_on(order: Task, board: Any) -> list[Outcome]:
    """Work on a cohort; runs in a worker."""
    try:
        reporter = Reporter(order.number, _settle(order), board.tell.remote)
        outcomes = order.work(order.jobs, reporter, _base(order.jobs[0].base))
        return upload_finished(outcomes, order.jobs, order.upload, reporter) if order.upload else outcomes
    except CdcdaError as error:
        return [Outcome(job.user, error=str(error)) for job in order.jobs]


def _settle(order: Task) -> str:
    """Make this worker's process what the driver's is: its folder, its secrets, and no more cores than its share. Return its name."""
    for name in [name for name in os.environ if name.startswith("OPENAI_")]:
        del os.environ[name]  # a node's own endpoint must not get records that the driver would send elsewhere
    os.environ.update(order.environment)
    if os.path.isdir(order.folder):
        os.chdir(order.folder)
    elif not order.jobs[0].workspace.is_absolute():
        raise FileError(f"{socket.gethostname()} has no folder {order.folder}; start from a shared one, or name an absolute --workspace.")
    cores = _pin(order.cores)
    return f"{socket.gethostname()} core{'s' if len(cores) > 1 else ''} {','.join(map(str, cores))}"


@functools.cache
def _pin(count: int) -> tuple[int, ...]:
    """Take cores that no other worker of this machine has, for this process's life: every library here counts the cores it may use.

    A lock holds each core, and the kernel gives it back when the process ends, however that happens.
    """
    import fcntl

    usable = sorted(os.sched_getaffinity(0))
    folder = cache_folder() / "cores" / socket.gethostname()
    taken: list[int] = []
    with contextlib.suppress(OSError):
        make_private(folder)
        for core in usable:
            if len(taken) == count:
                break
            descriptor = os.open(folder / str(core), os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                taken.append(core)
            except OSError:
                os.close(descriptor)
    if len(taken) < count:  # more workers than cores, or no place for locks: share, but never take more than is due
        at = os.getpid() % len(usable)
        taken = sorted((usable[at:] + usable[:at])[:count])
    os.sched_setaffinity(0, taken)
    return tuple(taken)


@functools.lru_cache(maxsize=1)
def _base(path: Path | None) -> Base:
    """Return the base, loaded once in a worker's life."""
    return Base(path)
