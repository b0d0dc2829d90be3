"""A shared task adapter: what the consenting users of a list have in common, learned once and put under each one's own adapter.

Only training records are used, never a synthetic one; a training record that is held out for anyone in the list is left out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cdcda_export.base import Base
from cdcda_export.cache import locked
from cdcda_export.errors import CdcdaError, ConfigError
from cdcda_export.manifest import Manifest, sha256_json, write_json
from cdcda_export.progress import Progress, Silent
from cdcda_mobile.history import Record
from cdcda_mobile.pipeline import Pipeline, UserJob
from cdcda_mobile.user_training import finish_training, train_orders, training_stage

if TYPE_CHECKING:
    from cdcda_mobile.training.learner import Order

_USERS = "users.json"


def train_shared(jobs: Sequence[UserJob], progress: Progress) -> tuple[Path, Manifest]:
    """Train one adapter on the training records of all the jobs' users, and return its directory and manifest.

    Args:
        jobs: the users who agreed to it; of one source, base and configuration.
        progress: told what goes on.

    Raises:
        CdcdaError: a user's history cannot be read; nobody is left out in silence.
    """
    if jobs[0].train.warm_start:
        raise ConfigError("A shared adapter starts from the base alone; leave --warm-start to cdcda train --user.")
    base = Base(jobs[0].base, progress)
    parts: dict[str, list[Record]] = {"train": [], "validation": [], "test": []}
    hashes: dict[str, str] = {}
    with ExitStack() as stack:
        progress.start("reading histories", len(jobs), "users")
        for job in jobs:
            # What is synthetic was made for one person.
            pipeline = Pipeline(replace(job, augment=replace(job.augment, keep=0)), Silent(), base)
            stack.enter_context(pipeline.opened())
            pipeline.prepare()
            for name, records in parts.items():
                records += pipeline.records(name)
            hashes |= {f"{sha256_json(job.user)[:12]}/{name}": o["sha256"] for name, o in pipeline.history.outputs.items()}
            progress.advance()
        progress.done()
        folder = jobs[0].workspace / "_shared" / "+".join(sorted({record.task for record in parts["train"]}))
        stack.enter_context(locked(folder, "adapter", "name another --workspace"))
        stage = training_stage(folder / "adapter", jobs[0].train, jobs[0].seed, {"base": base.sha256, **hashes}, "adapter" in jobs[0].redo)
        finished = stage.finished()
        if finished is not None:
            return stage.directory, finished
        held_out = {_text(record) for record in (*parts["validation"], *parts["test"])}
        training = [record for record in parts["train"] if _text(record) not in held_out]
        if len(training) < len(parts["train"]):
            progress.warn(f"{len(parts['train']) - len(training)} training records are held out for another user and are not used.")
        if not training:
            raise ConfigError("No training record is left; name users with other records.")
        counts = {"train": len(training), "validation": len(parts["validation"]), "synthetic": 0, "users": len(jobs)}
        order = _order(training, parts["validation"], stage.begin(), jobs[0], base)
        (outcome,) = train_orders(base, [order], jobs[0].train, progress)
        if isinstance(outcome, CdcdaError):
            raise outcome
        write_json(stage.partial / _USERS, sorted(job.user for job in jobs))
        config = jobs[0].train
        metrics = outcome.metrics() | {"records": counts, "rank": config.rank, "epochs": config.epochs}
        return stage.directory, finish_training(stage, outcome, base, config, metrics, [_USERS])


def shared_with(workspace: Path, user: str) -> list[Path]:
    """Return the shared adapters of a workspace that a user's records took part in."""
    found = []
    for path in sorted((workspace / "_shared").glob(f"*/adapter/{_USERS}")):
        try:
            users = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if user in users:
            found.append(path.parent)
    return found


def _text(record: Record) -> tuple[str, str]:
    return record.task, " ".join(record.input.split()).lower()


def _order(training: Sequence[Record], validation: Sequence[Record], partial: Path, job: UserJob, base: Base) -> Order:
    from cdcda_mobile.dataset import check_token_ids, encoding_of
    from cdcda_mobile.training.learner import Example, Order

    encoding = encoding_of(base.file)
    probes = encoding.probes(training, job.train.max_tokens)
    check_token_ids(base.file, encoding, probes)
    held_out = encoding.probes(validation, job.train.max_tokens)
    return Order("shared", [Example(probe) for probe in probes], held_out, partial, job.seed)
