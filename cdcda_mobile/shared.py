"""A shared task adapter: what the consenting users of a list have in common, learned once and put under each one's own adapter.

Only real training records are used; one that is held out for anyone in the list is left out. Beside the adapter a private file keeps whose
records they were, and hashes of their texts: so that ``forget`` can name the adapter, and nobody's held-out records are believed in that
were trained on here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdcda_export.base import Base
from cdcda_export.cache import locked
from cdcda_export.errors import CdcdaError, ConfigError
from cdcda_export.manifest import Manifest, read_manifest, sha256_json, write_json
from cdcda_export.progress import Progress, Silent
from cdcda_mobile.cohorts import refuse_twice
from cdcda_mobile.history import Record, text_of
from cdcda_mobile.pipeline import Pipeline, UserJob
from cdcda_mobile.user_training import finish_training, train_orders, training_stage

if TYPE_CHECKING:
    from cdcda_mobile.training.schedule import Order

_ORIGIN = "origin.json"


@dataclass(frozen=True)
class _Pool:
    """The records of all users, and the hashes of their finished histories."""

    train: list[Record]
    validation: list[Record]
    hashes: dict[str, str]

    @property
    def tasks(self) -> str:
        return "+".join(sorted({record.task for record in self.train}))


def train_shared(jobs: Sequence[UserJob], progress: Progress) -> tuple[Path, Manifest]:
    """Train one adapter on the training records of all the jobs' users, and return its directory and manifest.

    Args:
        jobs: the users who agreed to it; of one source, base and configuration.
        progress: told what goes on.

    Raises:
        CdcdaError: a user's history cannot be read; nobody is left out in silence.
    """
    first = jobs[0]
    if first.train.warm_start:
        raise ConfigError("A shared adapter starts from the base alone; leave --warm-start to cdcda train --user.")
    refuse_twice(jobs)
    jobs, base = sorted(jobs, key=lambda job: job.user), Base(first.base, progress)
    with ExitStack() as stack:
        pool = _pooled(jobs, base, progress, stack)
        users = [job.user for job in jobs]
        # Another list is another adapter: who started from the old one can still find it.
        folder = first.workspace / "_shared" / f"{pool.tasks}-{sha256_json(users)[:8]}"
        stack.enter_context(locked(folder, "adapter", "name another --workspace"))
        inputs = {"base": base.sha256, **pool.hashes}
        stage = training_stage(folder / "adapter", first.train, first.seed, inputs, "adapter" in first.redo)
        finished = stage.finished()
        if finished is not None:
            return stage.directory, finished
        order = _order(pool, stage.begin(), first, base)
        # Before the first step: what is trained on is named even if the training never ends.
        say_whose(stage.directory, users, pool.train)
        (outcome,) = train_orders(base, [order], first.train, progress)
        if isinstance(outcome, CdcdaError):
            raise outcome
        counts = {"train": len(pool.train), "validation": len(pool.validation), "synthetic": 0, "users": len(jobs)}
        metrics = outcome.metrics() | {"records": counts, "rank": first.train.rank, "epochs": first.train.epochs}
        return stage.directory, finish_training(stage, outcome, base, first.train, metrics)


def _pooled(jobs: Sequence[UserJob], base: Base, progress: Progress, stack: ExitStack) -> _Pool:
    """Read and split every history, and leave out what is held out for anyone."""
    parts: dict[str, list[Record]] = {"train": [], "validation": [], "test": []}
    hashes: dict[str, str] = {}
    progress.start("reading histories", len(jobs), "users")
    for index, job in enumerate(jobs):
        # What is synthetic was made for one person.
        quiet = Silent()
        pipeline = Pipeline(replace(job, augment=replace(job.augment, keep=0)), quiet, base)
        stack.enter_context(pipeline.opened())
        pipeline.prepare()
        for text in quiet.warnings:
            progress.warn(f"{job.user}: {text}")
        for name, records in parts.items():
            records += pipeline.records(name)
        hashes |= {f"{index}/{name}": output["sha256"] for name, output in pipeline.history.outputs.items()}
        progress.advance()
    progress.done()
    asked = {text_of(record) for record in parts["test"]}
    validation = [record for record in parts["validation"] if text_of(record) not in asked]
    held_out = asked | {text_of(record) for record in validation}
    train = [record for record in parts["train"] if text_of(record) not in held_out]
    left_out = len(parts["train"]) - len(train)
    if left_out:
        progress.warn(f"{left_out} training records are not used: their texts are held out for another user.")
    if not train:
        raise ConfigError("No training record is left; name users with other records.")
    return _Pool(train, validation, hashes)


def _order(pool: _Pool, partial: Path, job: UserJob, base: Base) -> Order:
    from cdcda_mobile.dataset import check_token_ids, encoding_of
    from cdcda_mobile.training.schedule import Example, Order

    encoding = encoding_of(base.file)
    probes = encoding.probes(pool.train, job.train.max_tokens)
    check_token_ids(base.file, encoding, probes)
    held_out = encoding.probes(pool.validation, job.train.max_tokens)
    return Order("of the shared adapter", [Example(probe) for probe in probes], held_out, partial, job.seed)


def say_whose(directory: Path, users: Sequence[str], train: Sequence[Record]) -> None:
    """Write beside a shared adapter's directory whose it is, and the hashes of the texts that it is trained on."""
    write_json(directory.parent / _ORIGIN, {"users": list(users), "texts": sorted(sha256_json(text_of(record)) for record in train)})


def is_shared(directory: Path) -> bool:
    """Say whether an adapter is known to be of users who agreed."""
    return (directory.parent / _ORIGIN).is_file()


def trained_on(directory: Path) -> set[str]:
    """Return the hashes of the texts that a shared adapter was trained on; none are known of an adapter from elsewhere."""
    return set(_origin(directory.parent / _ORIGIN).get("texts", []))


def shared_with(workspace: Path, user: str) -> list[Path]:
    """Return what of a workspace was learned from a user's records too: shared adapters, and those of others on top of them."""
    found = []
    for path in sorted((workspace / "_shared").glob(f"*/{_ORIGIN}")):
        if user in _origin(path).get("users", []):
            found.append(path.parent)
            found += _on_top_of(workspace, path.parent / "adapter")
    return found


def _on_top_of(workspace: Path, shared: Path) -> Iterator[Path]:
    manifest = read_manifest(shared)
    if manifest is None:
        return
    hashes = {output["sha256"] for output in manifest.outputs.values()}
    for path in sorted(workspace.glob("*/adapter/manifest.json")):
        own = read_manifest(path.parent)
        if own is not None and any(name.startswith("warm_start/") and found in hashes for name, found in own.inputs.items()):
            yield path.parent


def _origin(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
