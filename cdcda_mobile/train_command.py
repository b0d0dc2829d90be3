"""What ``cdcda train`` does with its parsed arguments: one user, a cohort of them, or a shared adapter of those who agreed."""

from __future__ import annotations

import argparse

from cdcda_export.errors import ConfigError
from cdcda_export.progress import choose_progress
from cdcda_mobile.export_command import Configs, named_users, print_json, report, run_stage, user_job


def train(arguments: argparse.Namespace, configs: Configs) -> int:
    """Run ``cdcda train`` and return its exit code: 1 where one of many failed.

    Args:
        arguments: as ``cli.main_parser`` gives them.
        configs: section -> config dataclass.

    Raises:
        ConfigError: the arguments exclude each other, or say too little.
    """
    if arguments.user is not None and arguments.users is not None:
        raise ConfigError("--user and --users exclude each other.")
    if arguments.dry_run and arguments.user is None:
        raise ConfigError("--dry-run goes with --user; cdcda-export --users says what would run for many.")
    if arguments.shared:
        return _train_shared(arguments, configs)
    if arguments.user is not None:
        run_stage(arguments, configs, "adapter")
        return 0
    if arguments.users is None:
        raise ConfigError("Name whose adapter to train with --user (samples: 17, 42, 63, 88), or many with --users FILE|all.")
    from cdcda_export.base import Base
    from cdcda_mobile.cohorts import cohorts_of, run_cohort

    progress = choose_progress(arguments.quiet)
    base = Base(arguments.base, progress)
    jobs = [user_job(arguments, configs, user) for user in named_users(arguments, configs)]
    outcomes = [outcome for cohort in cohorts_of(jobs, base) for outcome in run_cohort(cohort, progress, base, until="adapter")]
    return report(outcomes, arguments.json, done="trained")


def _train_shared(arguments: argparse.Namespace, configs: Configs) -> int:
    if arguments.users in (None, "all"):
        raise ConfigError(
            "--shared takes only users who agreed to it: list their ids in a file, one per line, and name it with --users FILE."
        )
    from cdcda_mobile.shared import train_shared

    jobs = [user_job(arguments, configs, user) for user in named_users(arguments, configs)]
    directory, manifest = train_shared(jobs, choose_progress(arguments.quiet))
    if arguments.json:
        print_json(manifest.metrics)
    else:
        print(directory)
    return 0
