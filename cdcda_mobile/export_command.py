"""What ``cdcda-export`` does with its parsed arguments: one user, many users, or adapters from elsewhere."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdcda_export.errors import CdcdaError, ConfigError, FileError, WorkspaceError
from cdcda_export.progress import Progress, choose_progress

if TYPE_CHECKING:
    from cdcda_export.base import Base
    from cdcda_export.batch import Outcome
    from cdcda_export.export import AdapterJob
    from cdcda_mobile.pipeline import Pipeline, Step, UserJob

Configs = dict[str, Any]


def export(arguments: argparse.Namespace, configs: Configs) -> int:
    """Run ``cdcda-export`` and return its exit code: 1 where one of many failed.

    Args:
        arguments: as ``cli.export_parser`` gives them.
        configs: section -> config dataclass.

    Raises:
        ConfigError: the arguments exclude each other, or say too little.
    """
    given = [f"--{name}" for name in ("user", "users", "adapter") if getattr(arguments, name) is not None]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} exclude each other: --user and --users train adapters, --adapter brings them.")
    if not given:
        raise ConfigError("Name whose model to make with --user (samples: 17, 42, 63, 88), or bring an adapter with --adapter DIR.")
    if arguments.adapter is None:
        for name in ("out", "text", "calibration"):
            if getattr(arguments, name) is not None:
                raise ConfigError(f"--{name} goes with --adapter; a user's artifact lies in {arguments.workspace}/USER.")
    _check_fleet(arguments)
    progress = choose_progress(arguments.quiet)
    if arguments.adapter is not None:
        return _export_adapters(arguments, configs, progress)
    return _export_users(arguments, configs, progress)


def _check_fleet(arguments: argparse.Namespace) -> None:
    """Refuse flags of a fleet that would do nothing.

    Raises:
        ConfigError: one would.
    """
    if arguments.users is None and (arguments.engine != "local" or arguments.upload):
        raise ConfigError(f"{'--upload' if arguments.upload else '--engine ray'} is for many users; name them with --users FILE or all.")
    if arguments.address and arguments.engine != "ray":
        raise ConfigError("--address names a Ray cluster; add --engine ray, or leave it out.")


def user_job(arguments: argparse.Namespace, configs: Configs, user: str) -> UserJob:
    """Return the job of one user."""
    from cdcda_mobile.pipeline import UserJob

    redo = tuple(name.strip() for name in arguments.redo.split(",") if name.strip())
    return UserJob(
        user=user,
        workspace=arguments.workspace,
        base=arguments.base,
        seed=arguments.seed,
        export_only=getattr(arguments, "export_only", False),
        redo=redo,
        **configs,
    )


def dry_run(pipeline: Pipeline, as_json: bool) -> None:
    """Say what a user's job would do and why."""
    steps = pipeline.plan()
    if as_json:
        print_json([dataclasses.asdict(step) for step in steps])
        return
    for step in steps:
        print(f"{'run  ' if step.runs else 'reuse'}  {step.stage:<14} {step.why}")


def run_stage(arguments: argparse.Namespace, configs: Configs, stage: str) -> None:
    """Run one user's job up to a stage, or say what would run, and print where its result lies."""
    from cdcda_mobile.pipeline import Pipeline

    pipeline = Pipeline(user_job(arguments, configs, arguments.user), choose_progress(arguments.quiet))
    if arguments.dry_run:
        dry_run(pipeline, arguments.json)
        return
    if getattr(arguments, "show_requests", False):
        requests = list(pipeline.shown_requests())
        for request in requests:
            print(json.dumps(request, ensure_ascii=False))
        if not requests:
            print("Nothing would be sent: all that is wanted was answered before, or the limits leave room for nothing.", file=sys.stderr)
        return
    metrics = pipeline.run(until=stage)
    if arguments.json:
        print_json(metrics)
    else:
        print(pipeline.directory / stage)


def print_json(value: object) -> None:
    """Print a value as readable JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _export_users(arguments: argparse.Namespace, configs: Configs, progress: Progress) -> int:
    from cdcda_export.artifact import check_combination
    from cdcda_export.base import Base
    from cdcda_mobile.cohorts import cohorts_of, run_cohort
    from cdcda_mobile.pipeline import Pipeline, check_redo
    from cdcda_mobile.upload import open_target, upload_finished

    if arguments.user is not None:
        pipeline = Pipeline(user_job(arguments, configs, arguments.user), progress)
        if arguments.dry_run:
            dry_run(pipeline, arguments.json)
        else:
            _show(pipeline.run(), arguments.json)
        return 0
    if arguments.upload:
        open_target(arguments.upload)  # a mistyped URL is told before the work, not after it
    users, base = named_users(arguments, configs), Base(arguments.base, progress)
    check_combination(configs["export"], base.file)
    check_redo(user_job(arguments, configs, users[0]))
    if arguments.dry_run:
        return _plan_of_many(users, lambda user: Pipeline(user_job(arguments, configs, user), progress, base).plan(), arguments.json)
    jobs = [user_job(arguments, configs, user) for user in users]
    if arguments.engine == "ray":
        from cdcda_mobile.fleet.driver import run_fleet

        return report(run_fleet(jobs, base, progress, arguments.address or "", arguments.upload or ""), arguments.json)
    outcomes: list[Outcome] = []
    for cohort in cohorts_of(jobs, base):
        done = run_cohort(cohort, progress, base)
        outcomes += upload_finished(done, cohort, arguments.upload, progress) if arguments.upload else done
    return report(outcomes, arguments.json)


def _plan_of_many(users: Sequence[str], plan: Callable[[str], list[Step]], as_json: bool) -> int:
    """Say what would run for every user; one whose plan cannot be made is named and the others are planned."""
    found: dict[str, Any] = {}
    for user in users:
        try:
            found[user] = [dataclasses.asdict(step) for step in plan(user)]
        except CdcdaError as error:
            found[user] = {"error": str(error)}
    if as_json:
        print_json(found)
        return 0
    width = max(map(len, users))
    for user, steps in found.items():
        if isinstance(steps, dict):
            print(f"fail   {user:<{width}}  {steps['error']}")
            continue
        running = [step for step in steps if step["runs"]]
        first = running[0] if running else steps[-1]
        print(f"{'run  ' if running else 'reuse'}  {user:<{width}}  {first['stage']}: {first['why']}")
    return 0


def named_users(arguments: argparse.Namespace, configs: Configs) -> list[str]:
    """Return the users that ``--users`` names: those of a file, or all of the source (``--export-only``: all who have an adapter).

    Raises:
        FileError: the file cannot be read.
        ConfigError: it names nobody.
        WorkspaceError: nobody has an adapter.
    """
    if arguments.users != "all":
        try:
            lines = Path(arguments.users).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(f"Cannot read the users in {arguments.users} ({error}); name a file with one id per line, or 'all'.") from error
        users = [line.strip() for line in lines if line.strip()]
        if not users:
            raise ConfigError(f"{arguments.users} names no user; write one id per line.")
        return users
    if not getattr(arguments, "export_only", False):
        from cdcda_mobile.history import list_users

        return list(list_users(configs["history"]))
    from cdcda_mobile.workspace import Workspace

    workspace = Workspace(arguments.workspace)
    users = [user for user in workspace.users() if (workspace.user_directory(user) / "adapter").is_dir()]
    if not users:
        raise WorkspaceError(f"No user in {arguments.workspace} has a trained adapter; run without --export-only to train them.")
    return users


def _export_adapters(arguments: argparse.Namespace, configs: Configs, progress: Progress) -> int:
    from cdcda_export.base import Base
    from cdcda_export.export import AdapterJob, export_adapter, stage_of, why_not_reusable

    adapters: list[Path] = arguments.adapter
    many = len(adapters) > 1

    def job(adapter: Path) -> AdapterJob:
        out = arguments.out / adapter.resolve().name if many and arguments.out else arguments.out
        return AdapterJob(
            adapter,
            arguments.base,
            out,
            arguments.workspace,
            arguments.text,
            arguments.calibration,
            configs["export"],
            bool(arguments.redo),
        )

    redo = {name.strip() for name in arguments.redo.split(",") if name.strip()}
    known = ("export", configs["export"].directory)
    if not redo <= set(known):
        raise ConfigError(f"There is no stage '{min(redo - set(known))}' of an adapter's export to redo. One of: {', '.join(known)}.")
    jobs = {str(adapter): job(adapter) for adapter in adapters}
    _forbid_clashes(list(jobs.values()))
    base: Base = Base(arguments.base, progress)
    if arguments.dry_run:
        for planned in jobs.values():
            why = why_not_reusable(stage_of(planned, base), planned.config.verify)
            print(f"{'run  ' if why else 'reuse'}  {planned.directory}  {why or 'finished, nothing it depends on changed'}")
        return 0
    if not many:
        _show(export_adapter(jobs[str(adapters[0])], progress, base), arguments.json)
        return 0
    names = [str(adapter) for adapter in adapters]
    return _batch(names, lambda name, quiet: export_adapter(jobs[name], quiet, base), arguments, progress, "adapters")


def _forbid_clashes(jobs: Sequence[AdapterJob]) -> None:
    places: dict[Path, Path] = {}
    for job in jobs:
        other = places.setdefault(job.directory, job.adapter)
        if other != job.adapter:
            raise ConfigError(f"{other} and {job.adapter} would both be written to {job.directory}; give each its own --out.")


def _batch(
    names: list[str], make: Callable[[str, Progress], dict[str, Any]], arguments: argparse.Namespace, progress: Progress, unit: str
) -> int:
    from cdcda_export.batch import run_batch

    return report(run_batch(names, make, progress, unit), arguments.json)


def report(outcomes: Sequence[Outcome], as_json: bool, done: str = "exported") -> int:
    """Print what became of many users or adapters and return the exit code: 1 where one failed."""
    from cdcda_export.batch import summary_lines

    failed = sum(bool(outcome.error) for outcome in outcomes)
    if as_json:
        found = [dataclasses.asdict(outcome) for outcome in outcomes]
        print_json({done: len(outcomes) - failed, "failed": failed, "outcomes": found})
    else:
        print("\n".join(summary_lines(outcomes, done)))
    return 1 if failed else 0


def _show(card: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(card)
        return
    from cdcda_export.card import print_card

    print_card(card)
