"""Does the teacher help? CDCDA against real records alone, another user's synthetic records, retrieval, a shared adapter, on real people.

Journalists (News Category Dataset, Misra 2022, CC BY 4.0) and committers of public repositories, 20 real records each, split by time.
All arms have the same maximum of steps, the same stopping rule and the same validation records; the teacher sees training records and,
as the strategy ``answer`` asks, other people's inputs. Everything that is chosen is in personalization.toml and was chosen on the
development users; the published table is the test users' one run under those settings.

Every measurement is a small JSON in results/personalization/TASK/USER/ARM-SEED.json as soon as it is made, so a run can be stopped at any
time; ``report`` makes tables of them and refuses what is incomplete or was measured in two ways. The teacher's answers and the adapters
lie in --work and hold people's words: they are never committed.

    CDCDA_DATA=... python benchmarks/personalization.py pools --teacher MODEL.gguf [--task NAME | --curve | --attempt NAME]
    CDCDA_DATA=... python benchmarks/personalization.py arms [--task NAME | --curve | --attempt NAME] [--arms A,B] [--part I/N]
    CDCDA_DATA=... python benchmarks/personalization.py report [--task NAME] [--seeds N]
"""

from __future__ import annotations

import argparse
import json
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from cdcda_export.manifest import sha256_json, write_atomic, write_json
from cdcda_export.progress import Plain
from cdcda_mobile.evaluation.arms import ARMS
from cdcda_mobile.evaluation.forest import forest_svg
from cdcda_mobile.evaluation.report import NLL, Arm, Cell, arm_rows, arms_markdown, cells_of, compare_arms, comparisons_markdown
from laboratory import RESULTS, print_table, write_results
from personal_laboratory import Laboratory
from personal_users import SOURCES, curve_people, people
from plot import Panel, svg

HERE = Path(__file__).resolve().parent
FIGURES = {  # figure: the arms whose difference it is, and what the second is called
    "cdcda_minus_real_nll": ("cdcda", "personal", "real records only"),
    "cdcda_minus_other_user_nll": ("cdcda", "cdcda-other", "with another user's synthetic records"),
    "selection_gain_nll": ("cdcda", "cdcda-unselected", "with unselected synthetic records"),
    "shared_cdcda_minus_shared_nll": ("shared+cdcda", "shared", "a shared adapter, CDCDA on top of it"),
    "shared_cdcda_minus_shared_real_nll": ("shared+cdcda", "shared+personal", "real records on top of a shared adapter, CDCDA there"),
    "cdcda_minus_bm25_nll": ("cdcda", "bm25", "retrieval (BM25)"),
    "cdcda_minus_rule_nll": ("cdcda", "rule", "a rule"),  # which has no likelihood: the metric alone
    "cdcda_minus_base_nll": ("cdcda", "base", "the base"),
}
PRECISIONS = ("f16", "q4_0")
MAIN_METRICS = ("ROUGE-L", "accuracy")
Machine = dict[str, Any]
TEACHER = "personalization_teacher"  # how its answers agree with what the inputs' own authors wrote
CURVE, CURVE_ARMS = "personalization_curve", ("personal", "cdcda")
ATTEMPTS = "personalization_attempts"


def tables(cells: Sequence[Cell]) -> tuple[dict[str, float], dict[str, Any], str, str]:
    """Return figures, data, Markdown and the plot of finished cells."""
    metrics = [NLL, *dict.fromkeys(name for cell in cells for name in cell.metrics)]
    there = {cell.place for cell in cells}
    pairs = [(Arm(a, kind), Arm(b, "none" if ARMS[b].rule else kind)) for a, b, _ in FIGURES.values() for kind in PRECISIONS]
    compared = compare_arms(cells, [pair for pair in pairs if set(pair) <= there], metrics)
    rows = arm_rows(cells, metrics)
    figures: dict[str, float] = {}
    for name, (a, b, _) in FIGURES.items():
        for one in compared:
            if (one.a, one.b.name) != (Arm(a, "f16"), b) or one.metric not in (NLL, *MAIN_METRICS):
                continue
            place = f"{one.task}_{name if one.metric == NLL else name.replace('_nll', '_metric')}"
            found = {"": one.difference.mean, "_low": one.difference.low, "_high": one.difference.high}
            figures |= {f"{place}{end}": value for end, value in found.items() if value is not None}
    data = {
        "arms": [[row.task, *row.arm, row.metric, row.estimate.mean, row.estimate.low, row.estimate.high, row.estimate.n] for row in rows],
        "comparisons": [[c.task, str(c.a), str(c.b), c.metric, *astuple(c.difference)] for c in compared],
    }
    return figures, data, f"{arms_markdown(rows)}\n{comparisons_markdown(compared)}", forest_svg(compared)


def readme_table(result: Mapping[str, Any]) -> str:
    """Return the table that README.md shows: what CDCDA gains over each arm, with intervals, on every task."""
    figures = result["figures"]
    kinds = {"nll": "NLL", "metric": "metric"}
    lines = [["CDCDA against", *(f"{task}, {kind}" for task in SOURCES for kind in kinds.values())], ["---"] * (1 + 2 * len(SOURCES))]
    for name, (_, _, told) in FIGURES.items():
        places = [f"{task}_{name.removesuffix('nll')}{kind}" for task in SOURCES for kind in kinds]
        lines.append([told, *(_interval(figures, place) for place in places)])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _interval(figures: Mapping[str, float], place: str) -> str:
    """Return a difference and its interval; bold where it leaves out zero, '' where there is none."""
    if place not in figures:
        return ""
    middle, low, high = (figures[place + end] for end in ("", "_low", "_high"))
    mark = "**" if low > 0 or high < 0 else ""
    return f"{mark}{middle:+.3f}{mark} [{low:+.3f}, {high:+.3f}]"


def finished_cells(folder: Path, users: Sequence[str], arms: Sequence[str], seeds: Sequence[int]) -> tuple[list[Cell], list[Machine]]:
    """Return the cells of a task, and the machines that they were measured on.

    Args:
        folder: of the task.
        users: who was measured.
        arms: in which arms.
        seeds: and with which seeds, where anything is drawn.

    Raises:
        SystemExit: one is missing, was measured in another way than the rest, or stands there for nobody.
    """
    paths = {folder / user / f"{arm}-{seed}.json" for user in users for arm in arms for seed in (seeds if ARMS[arm].trained else seeds[:1])}
    there = set(folder.rglob("*.json"))
    if paths - there:
        missing = min(paths - there)
        raise SystemExit(
            f"{len(paths - there)} of {len(paths)} measurements of {folder} are missing, {missing.name} of {missing.parent.name} is one."
        )
    if {path.parent.name for path in there - paths} - set(users):
        raise SystemExit(f"{folder} holds measurements of people who are not in the experiment; remove them.")
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(paths)]
    if len({(row["settings"], row.get("origin", "")) for row in rows}) > 1:
        raise SystemExit(f"{folder} holds measurements under several settings; remove those of the old ones.")
    machines = {json.dumps(row.get("machine", {}), sort_keys=True) for row in rows}
    return [cell for row in rows for cell in cells_of(row["cells"])], [json.loads(text) for text in sorted(machines)]


def attempts_table(settings: Mapping[str, Any]) -> list[list[Any]]:
    """Return task, attempt, arm, metric, mean over the development users, and how many they are, of what was tried."""
    rows: list[list[Any]] = []
    for name, tasks in settings["attempts"].items():
        for task in tasks:
            paths = sorted((RESULTS / ATTEMPTS / name / task).rglob("*.json"))
            cells = [cell for path in paths for cell in cells_of(json.loads(path.read_text(encoding="utf-8"))["cells"])]
            metrics = [NLL, *(metric for metric in MAIN_METRICS if any(metric in cell.metrics for cell in cells))]
            found = arm_rows([cell for cell in cells if cell.precision == PRECISIONS[0]], metrics)
            rows += [[task, name, row.arm.name, row.metric, row.estimate.mean, row.estimate.n] for row in found]
    return rows


def curve_svg(cells: Mapping[int, Sequence[Cell]]) -> str:
    """Return the learning curve: mean NLL over the number of real records."""
    means = {real: {row.arm.name: row.estimate.mean for row in arm_rows(found, [NLL])} for real, found in cells.items()}
    lines = {arm: [means[real][arm] for real in means] for arm in CURVE_ARMS}
    return svg([Panel("test NLL per token, mean over users", "real records", "nats", [str(real) for real in means], lines, False)])


def report(settings: dict[str, Any], data: Path, seeds: Sequence[int], tasks: Sequence[str]) -> None:
    """Print the tables; of all tasks, write figures and plots too.

    Raises:
        SystemExit: something is missing or was measured in two ways.
    """
    cells: list[Cell] = []
    machines: dict[str, list[Machine]] = {}
    for task in tasks:
        users = [person.user for person in people(data, task, settings["users"]).test]
        found, machines[task] = finished_cells(RESULTS / "personalization" / task, users, [*ARMS], seeds)
        cells += found
    figures, data_of_tables, markdown, plot = tables(cells)
    print(markdown)
    if set(tasks) != set(SOURCES):
        return  # a part is for reading: what is published holds all tasks
    for path in sorted((RESULTS / TEACHER).glob("*.json")):
        agreed = json.loads(path.read_text(encoding="utf-8"))
        figures |= {f"{path.stem}_{name}_agreement": value for name, value in agreed.items()}
    write_atomic(RESULTS / "personalization.svg", plot, mode=0o644)
    attempts = attempts_table(settings)
    head = ["task", "attempt", "arm", "metric", "mean", "development users"]
    print_table(head, attempts)
    lines = [head, ["---"] * len(head), *([*map(str, row[:4]), f"{row[4]:.3f}", str(row[5])] for row in attempts)]
    tried = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    page = f"# Personalization: every arm, every comparison, every attempt\n\n{markdown}\n\n## Attempts on development users\n\n{tried}\n"
    write_atomic(RESULTS / "personalization.md", page, mode=0o644)
    raw = {"settings": settings, "seeds": list(seeds), "measured_on": machines, **data_of_tables, "attempts": attempts}
    curve = settings["curve"]
    if (RESULTS / CURVE).exists():
        measured = {}
        for real, (_, chosen) in curve_people(data, curve["task"], settings["users"], curve).items():
            folder = RESULTS / CURVE / str(real) / curve["task"]
            measured[real], _ = finished_cells(folder, [person.user for person in chosen], CURVE_ARMS, seeds)
            of_curve, raw[f"curve_{real}"], _, _ = tables(measured[real])
            figures |= {f"curve_{real}_{name}": value for name, value in of_curve.items()}
        write_atomic(RESULTS / f"{CURVE}.svg", curve_svg(measured), mode=0o644)
    write_results("personalization", figures, raw)


def main() -> None:
    """Write, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("pools", "arms", "report"))
    parser.add_argument("--teacher", type=Path, help="GGUF of the teacher (pools)")
    parser.add_argument("--task", choices=(*SOURCES,), action="append")
    parser.add_argument("--curve", action="store_true", help="the people of the learning curve instead")
    parser.add_argument("--attempt", metavar="NAME", help="the development users, under the changes that [attempts] names")
    parser.add_argument("--arms", default=",".join(ARMS), help="comma-separated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--users", type=int, default=0, help="only so many of them (0: all)")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="measure every N-th user from the I-th on, beside other processes")
    parser.add_argument("--work", type=Path, default=Path("runs/_personalization"))
    parser.add_argument("--quick", action="store_true", help="two development users, one seed, one precision")
    options = parser.parse_args()
    settings = tomllib.loads((HERE / "personalization.toml").read_text(encoding="utf-8"))
    if "CDCDA_DATA" not in os.environ:
        parser.error("CDCDA_DATA has to name the shared data")
    if options.stage == "pools" and options.teacher is None:
        parser.error("--teacher has to name the teacher's GGUF")
    data = Path(os.environ["CDCDA_DATA"])
    if options.quick:
        options.attempt, options.users, options.seeds = "present", 2, 1
    if options.attempt not in (None, *settings["attempts"]):
        parser.error(f"there is no attempt {options.attempt}; one of: {', '.join(settings['attempts'])}")
    if options.attempt and not options.quick and set(options.task or ()) - set(settings["attempts"][options.attempt]):
        parser.error(f"{options.attempt} was tried on {' and '.join(settings['attempts'][options.attempt])} only")
    seeds, names, precisions = settings["users"]["seeds"][: options.seeds], options.arms.split(","), PRECISIONS
    if options.stage == "report":
        report(settings, data, seeds, options.task or [*SOURCES])
        return
    if options.curve:
        names = [*CURVE_ARMS]
    if options.curve or options.attempt:
        precisions = PRECISIONS[:1]
    part, parts = (int(number) for number in options.part.split("/"))
    for laboratory in curve_laboratories(settings, data, options) if options.curve else laboratories(settings, data, options):
        print(laboratory.work)
        if options.stage == "pools":
            laboratory.pools(names, options.teacher)
            if not (options.curve or options.attempt or options.users):
                (RESULTS / TEACHER).mkdir(exist_ok=True)
                write_json(RESULTS / TEACHER / f"{laboratory.task}.json", laboratory.agreement())
        else:
            print(tables(laboratory.arms(names, seeds, precisions, part - 1, parts))[2])


def laboratories(settings: dict[str, Any], data: Path, options: argparse.Namespace) -> Iterator[Laboratory]:
    """Give the laboratory of each task."""
    attempt = settings["attempts"].get(options.attempt)
    for task in options.task or (SOURCES if options.quick else attempt) or SOURCES:
        found = people(data, task, settings["users"])
        work, results, chosen, used = options.work / task, RESULTS / "personalization" / task, found.test, settings
        if attempt is not None:
            used = changed(settings, task, attempt.get(task, {}))
            # Attempts that ask the teacher for the same share what it wrote.
            asked = sha256_json(used["augment"] | used["tasks"][task].get("augment", {}))[:8]
            work = options.work / "development" / asked / task
            results = (options.work / "quick" if options.quick else RESULTS / ATTEMPTS / options.attempt) / task
            chosen = found.development
        yield Laboratory(task, used, found, chosen[: options.users or None], work, results, Plain())


def changed(settings: dict[str, Any], task: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings with what an attempt changes for a task."""
    own = settings["tasks"][task]
    own = own | {part: own.get(part, {}) | changes.get(part, {}) for part in ("augment", "train")}
    return {**settings, "tasks": {**settings["tasks"], task: own}}


def curve_laboratories(settings: dict[str, Any], data: Path, options: argparse.Namespace) -> Iterator[Laboratory]:
    """Give the laboratory of each number of real records."""
    curve, task = settings["curve"], settings["curve"]["task"]
    for (real, (found, chosen)), steps in zip(curve_people(data, task, settings["users"], curve).items(), curve["max_steps"], strict=True):
        work, results = options.work / f"curve-{real}" / task, RESULTS / CURVE / str(real) / task
        longer = {**settings, "train": {**settings["train"], "max_steps": steps}}
        yield Laboratory(task, longer, found, chosen[: options.users or None], work, results, Plain())


if __name__ == "__main__":
    main()
