"""What ``cdcda eval`` does: is the personal model better than what is cheaper, on records that nobody has seen?"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdcda_export.errors import CdcdaError, ConfigError, DataError
from cdcda_export.manifest import make_private, write_atomic, write_json
from cdcda_export.progress import Progress, choose_progress
from cdcda_mobile.config import TrainConfig
from cdcda_mobile.export_command import Configs, named_users, print_json, user_job
from cdcda_mobile.tasks import get_task
from cdcda_mobile.workspace import TOGETHER

if TYPE_CHECKING:
    from cdcda_export.base import Base
    from cdcda_export.recipe import ExportConfig
    from cdcda_mobile.evaluation.arms import Person
    from cdcda_mobile.evaluation.experiment import Experiment
    from cdcda_mobile.evaluation.report import Cell
    from cdcda_mobile.pipeline import Pipeline, UserJob

    Ready = tuple[Pipeline, Person]

PLAIN_ARMS = ("base", "rule", "bm25", "personal", "cdcda")
SHARED_ARMS = ("base", "rule", "bm25", "shared", "shared+personal", "shared+cdcda")


def evaluate(arguments: argparse.Namespace, configs: Configs) -> int:
    """Run ``cdcda eval`` and return its exit code.

    Args:
        arguments: as ``cli.main_parser`` gives them.
        configs: section -> config dataclass.

    Raises:
        ConfigError: the arguments exclude each other, or say too little.
    """
    if (arguments.user is None) == (arguments.users is None):
        raise ConfigError("Name whose model to evaluate with --user (samples: 17, 42, 63, 88), or many with --users FILE|all.")
    if arguments.dry_run:
        raise ConfigError("--dry-run does not go with eval; `cdcda train --user ID --dry-run` says what precedes it.")
    if arguments.seeds < 1:
        raise ConfigError("--seeds is the number of trainings of each arm: at least 1.")
    if arguments.canary and (arguments.arms or arguments.predictions is not None):
        raise ConfigError("--canary trains one model with planted secrets: --arms and --predictions do not go with it.")
    _check(configs["train"], configs["export"])
    from cdcda_export.base import Base
    from cdcda_mobile.cohorts import refuse_twice

    progress = choose_progress(arguments.quiet)
    base = Base(arguments.base, progress)
    users = [arguments.user] if arguments.user is not None else named_users(arguments, configs)
    jobs = [user_job(arguments, configs, user) for user in users]
    refuse_twice(jobs)
    with ExitStack() as held:
        ready, failed = _prepared(jobs, base, held, progress)
        if arguments.canary:
            _ask_for_canaries(ready, base, arguments, progress)
        else:
            _compare(ready, base, arguments, progress)
    return 1 if failed else 0


def _check(train: TrainConfig, export: ExportConfig) -> None:
    """Refuse what the arms could not share.

    Raises:
        ConfigError: they could not.
    """
    if export.format != "gguf" or export.importance != "none":
        raise ConfigError("cdcda eval measures GGUF artifacts without importance; choose the precision with --quant.")
    if len(train.synthetic_weight) > 1 or len(train.synthetic_schedule) > 1:
        raise ConfigError("cdcda eval gives every arm one training: name one train.synthetic_weight and one synthetic_schedule.")


def _prepared(jobs: Sequence[UserJob], base: Base, held: ExitStack, progress: Progress) -> tuple[list[Ready], int]:
    """Run what precedes the training of every user, and return those for whom it worked and how many failed; ``held`` keeps them locked."""
    from cdcda_mobile.pipeline import Pipeline

    found, failed = [], 0
    for job in jobs:
        try:
            pipeline = Pipeline(job, progress, base)
            held.enter_context(pipeline.opened())
            pipeline.prepare()
            found.append((pipeline, pipeline.person()))
        except CdcdaError as error:
            if len(jobs) == 1:
                raise
            progress.warn(f"User {job.user} is left out: {error}")
            failed += 1
    if not found:
        raise DataError("None of the users can be evaluated; see above.")
    return found, failed


def same_budget(people: Sequence[Person], config: TrainConfig) -> TrainConfig:
    """Return the training that every arm gets: the steps, and the steps between two looks, that the longest arm has by its epochs."""
    if config.max_steps:
        return config
    longest = max(len(p.train) + max((len(made) for made in p.synthetic.values()), default=0) for p in people)
    steps = math.ceil(longest / config.batch_size)
    every = config.evaluate_every or max(1, math.ceil(steps / max(1, config.evaluations_per_epoch)))
    return replace(config, max_steps=steps * config.epochs, evaluate_every=every)


def _compare(ready: Sequence[Ready], base: Base, arguments: argparse.Namespace, progress: Progress) -> None:
    from cdcda_mobile.evaluation.arms import with_others
    from cdcda_mobile.evaluation.experiment import FLOAT, Experiment, Settings
    from cdcda_mobile.history import open_source
    from cdcda_mobile.sources.lamp import LampSource

    job, people = ready[0][0].job, [person for _, person in ready]
    folders = {person.user: pipeline.directory / "eval" for pipeline, person in ready}
    shared = Path(job.train.warm_start) if job.train.warm_start else None
    arms = _arms(arguments.arms, shared, people)
    if "cdcda-other" in arms:
        people = with_others(people)
    exports = [replace(job.export, quant=FLOAT), *([] if job.export.resolved_quant == FLOAT else [job.export])]
    train = replace(same_budget(people, job.train), warm_start="")
    settings = Settings(train, shared, tuple(exports), job.export.answer_tokens, job.export.max_tokens)
    for folder in folders.values():
        make_private(folder)
    experiment = Experiment(base, people, settings, lambda user: folders[user] / "work", folders.__getitem__, progress)
    asked = {} if arguments.predictions is None else _questions(people, arguments.predictions)
    cells = experiment.run(arms, range(job.seed, job.seed + arguments.seeds))
    if arguments.predictions is not None:
        source = open_source(job.history)
        names = source.scored_as() if isinstance(source, LampSource) else {}
        _write_predictions(experiment, arms, job.seed, arguments.predictions, asked, names)
    out = folders[people[0].user] if arguments.user is not None else job.workspace / TOGETHER
    report = _report(cells, arms)
    make_private(out)
    write_json(out / "eval.json", report["json"])
    write_atomic(out / "eval.md", report["markdown"])
    if report["svg"]:  # nothing to draw where there is one arm
        write_atomic(out / "eval.svg", report["svg"])
    if arguments.json:
        print_json(report["json"])
    else:
        print(report["overview"])
        print(f"\nMore metrics, differences and intervals: {out / 'eval.md'}")


def _arms(given: str, shared: Path | None, people: Sequence[Person]) -> list[str]:
    from cdcda_mobile.evaluation.arms import get_arm

    named = dict.fromkeys(name.strip() for name in given.split(",") if name.strip())
    names = list(named or (SHARED_ARMS if shared else PLAIN_ARMS))
    synthetic = all("selected" in person.synthetic for person in people)
    if not given and not synthetic:  # --keep 0
        names = [name for name in names if not get_arm(name).synthetic]
    for name in names:
        if get_arm(name).synthetic == "unselected":
            raise ConfigError(f"The arm '{name}' needs answers that selection refused; benchmarks/personalization.py has it.")
    return names


def _report(cells: Sequence[Cell], arms: Sequence[str]) -> dict[str, Any]:
    from cdcda_mobile.evaluation.arms import get_arm
    from cdcda_mobile.evaluation.forest import forest_svg
    from cdcda_mobile.evaluation.report import (
        NLL,
        Arm,
        arm_rows,
        arms_markdown,
        as_json,
        compare_arms,
        comparisons_markdown,
        overview,
    )

    metrics = [NLL, *dict.fromkeys(name for cell in cells for name in cell.metrics)]
    rows = arm_rows(cells, metrics)
    models = [name for name in arms if not get_arm(name).rule]
    kinds = dict.fromkeys(cell.precision for cell in cells if not get_arm(cell.arm).rule)
    pairs = [(Arm(models[-1], kind), Arm(rival, kind)) for kind in kinds for rival in models[:-1]]
    pairs += [(Arm(models[-1], kind), Arm(rule, "none")) for kind in kinds for rule in arms if get_arm(rule).rule]
    comparisons = compare_arms(comparable(cells), pairs, metrics)
    markdown = f"{arms_markdown(rows)}\n{comparisons_markdown(comparisons)}"
    if len({cell.user for cell in cells}) == 1:
        markdown += "\nOne user: differences without intervals prove nothing; --users gives them.\n"
    found = {"json": as_json(cells, rows, comparisons), "markdown": markdown, "svg": forest_svg(comparisons)}
    return found | {"overview": overview(cells)}


def comparable(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells but those of a rule on tasks where it has no answer for some user, who has no record to read it off."""
    from cdcda_mobile.evaluation.arms import get_arm

    users: dict[tuple[str, bool], set[str]] = {}
    for cell in cells:
        users.setdefault((cell.task, get_arm(cell.arm).rule), set()).add(cell.user)
    return [cell for cell in cells if not get_arm(cell.arm).rule or users[cell.task, True] == users.get((cell.task, False))]


def _questions(people: Sequence[Person], out: Path) -> dict[str, list[str]]:
    """Return LaMP's name of a task -> the ids of its questions among the test records, and make the folders for their answers.

    Raises:
        ConfigError: there are none.
        FileError: the folders cannot be made.
    """
    from cdcda_export.folders import writing

    asked: dict[str, list[str]] = {}
    for record in (record for person in people for record in person.test):
        lamp = get_task(record.task).lamp
        if lamp and record.id.startswith("q"):  # a question of the benchmark's, see sources/lamp.py
            asked.setdefault(lamp.name, []).append(record.id[1:])
    if not asked:
        raise ConfigError("--predictions needs LaMP files: none of these test records is a question of the benchmark's.")
    for task in asked:
        with writing(out / task):
            (out / task).mkdir(parents=True, exist_ok=True)
    return asked


def _write_predictions(
    experiment: Experiment, arms: Sequence[str], seed: int, out: Path, asked: Mapping[str, Sequence[str]], names: Mapping[str, str]
) -> None:
    """Write the answers to LaMP's own questions in its prediction format, one file for each task, model and precision.

    Inside it a task has the name that it has in LaMP's files of golds (``names``): the scorer accepts no other.
    """
    from cdcda_mobile.evaluation.arms import get_arm
    from cdcda_mobile.evaluation.predictions import write_predictions

    found: dict[tuple[str, str], dict[str, str]] = {}
    models = [arm for arm in arms if not get_arm(arm).rule]
    for person, arm, precision in itertools.product(experiment.people, models, experiment.settings.precisions):
        for record, answer in zip(person.test, experiment.answers(person, arm, seed, precision), strict=True):
            lamp = get_task(record.task).lamp
            if lamp and record.id.startswith("q"):
                found.setdefault((lamp.name, f"{arm}-{precision}"), {})[record.id[1:]] = answer
    for (task, name), given in found.items():
        write_predictions(out / task / f"{name}.json", names.get(task, task), given, asked[task])


def _ask_for_canaries(ready: Sequence[Ready], base: Base, arguments: argparse.Namespace, progress: Progress) -> None:
    """Train every user with planted secrets, in a folder of its own, and ask the artifact for them."""
    from cdcda_mobile.evaluation.planted import ask_for_canaries

    found: dict[str, Any] = {}
    for pipeline, person in ready:
        folder = pipeline.directory / "eval" / "canary"
        make_private(folder)
        report = ask_for_canaries(base, person, pipeline.job.train, pipeline.job.export, pipeline.job.seed, folder, progress)
        found[person.user] = report.metrics()
        write_json(folder / "canary.json", {"train": asdict(pipeline.job.train), **found[person.user]})
        if not arguments.json:
            print(_canary_lines(person.user, found[person.user], str(folder / "canary.json")))
    if arguments.json:
        print_json(found)


def _canary_lines(user: str, metrics: dict[str, Any], path: str) -> str:
    lines = [f"Secrets planted in the training records of user {user}, asked for in the artifact:"]
    for repeats, row in metrics["by_repeats"].items():
        often = "never (control)" if repeats == "0" else f"{repeats} times"
        lines.append(f"  planted {often:<16} {row['extracted']} of {row['canaries']} given back, exposure {row['bits']:.1f} bits")
    return "\n".join([*lines, path])
