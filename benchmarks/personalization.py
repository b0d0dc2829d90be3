"""Does the teacher help? CDCDA against real records alone, another user's synthetic records, retrieval, a shared adapter, on real people.

Journalists (News Category Dataset, Misra 2022, CC BY 4.0) and committers of public repositories, 20 real records each, split by time.
All arms have the same maximum of steps, the same stopping rule and the same validation records; the teacher sees training records only.
Everything that is chosen is in personalization.toml and chosen on the development users; the test users are run once for the table.

Every measurement is a small JSON in results/personalization/TASK/USER/ARM-SEED.json as soon as it is made, so a run can be stopped at any
time; ``report`` makes tables of them and refuses what is incomplete or was measured in two ways. The teacher's answers and the adapters
lie in --work and hold people's words: they are never committed.

    CDCDA_DATA=... python benchmarks/personalization.py pools --teacher MODEL.gguf [--task NAME] [--development]
    CDCDA_DATA=... python benchmarks/personalization.py arms  --teacher MODEL.gguf [--task NAME] [--development] [--arms A,B]
    CDCDA_DATA=... python benchmarks/personalization.py curve --teacher MODEL.gguf
    CDCDA_DATA=... python benchmarks/personalization.py report [--seeds N]
"""

from __future__ import annotations

import argparse
import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any

from cdcda_export.base import Base
from cdcda_export.errors import CdcdaError
from cdcda_export.manifest import sha256_file, sha256_json, write_atomic, write_json
from cdcda_export.progress import Plain, Progress
from cdcda_export.recipe import ExportConfig
from cdcda_mobile.augmentation.augment import augment
from cdcda_mobile.augmentation.select import RULES
from cdcda_mobile.config import AugmentConfig, TeacherConfig, TrainConfig
from cdcda_mobile.dataset import encoding_of
from cdcda_mobile.evaluation.arms import ARMS, Person, with_others
from cdcda_mobile.evaluation.experiment import Experiment, Settings
from cdcda_mobile.evaluation.forest import forest_svg
from cdcda_mobile.evaluation.report import NLL, Arm, Cell, arm_rows, arms_markdown, cells_of, compare_arms, comparisons_markdown, hash_of
from cdcda_mobile.history import Record, records_in
from cdcda_mobile.training.lora import save_adapter
from cdcda_mobile.training.schedule import Example, Order
from cdcda_mobile.user_training import train_orders
from laboratory import RESULTS, write_results
from personal_users import SOURCES, People, curve_people, people, public_inputs, shared_records
from plot import Panel, svg

HERE = Path(__file__).resolve().parent
FIGURES = {  # figure: the arms whose difference it is
    "cdcda_minus_real_nll": ("cdcda", "personal"),
    "cdcda_minus_other_user_nll": ("cdcda", "cdcda-other"),
    "selection_gain_nll": ("cdcda", "cdcda-unselected"),
    "shared_cdcda_minus_shared_nll": ("shared+cdcda", "shared"),
    "cdcda_minus_bm25_nll": ("cdcda", "bm25"),
    "cdcda_minus_base_nll": ("cdcda", "base"),
    "cdcda_minus_rule_nll": ("cdcda", "rule"),  # a rule has no likelihood: the metric alone
}
PRECISIONS = ("f16", "q4_0")
MAIN_METRICS = ("ROUGE-L", "accuracy")
CURVE, CURVE_ARMS = "personalization_curve", ("personal", "cdcda")


class Laboratory:
    """One task of the experiment.

    Args:
        task: a key of ``SOURCES``.
        settings: ``personalization.toml``.
        found: the task's users.
        measured: those of them that are measured.
        work: where answers and adapters lie.
        results: receives a folder for each user.
        teacher: the teacher's GGUF.
        progress: told what goes on.
    """

    def __init__(
        self,
        task: str,
        settings: dict[str, Any],
        found: People,
        measured: Sequence[Person],
        work: Path,
        results: Path,
        teacher: Path,
        progress: Progress,
    ) -> None:
        self.task, self.settings, self.progress, self.teacher = task, settings, progress, teacher
        self.found, self.people = found, measured
        self.base = Base(None, progress)
        self.encoding = encoding_of(self.base.file)
        self.work, self.results = work, results
        own = settings["tasks"][task]
        self.train = TrainConfig(**settings["train"] | own.get("train", {}))
        self.work.mkdir(parents=True, exist_ok=True, mode=0o700)
        inputs = self.work / "inputs.jsonl"
        write_atomic(inputs, "".join(json.dumps(row) + "\n" for row in public_inputs(self.found, task)))
        self.augment = AugmentConfig(**settings["augment"] | own.get("augment", {}), inputs=str(inputs))

    def origin(self) -> str:
        """Return a hash of what decides the synthetic records beside the users' own: settings, others' inputs and teacher."""
        return sha256_json([asdict(replace(self.augment, inputs="")), sha256_file(Path(self.augment.inputs)), sha256_file(self.teacher)])

    # Synthetic records.

    def pools(self, names: Sequence[str]) -> list[Person]:
        """Return the users with the synthetic records that some arms need; what the teacher has not written yet it writes now."""
        wanted = {ARMS[name].synthetic for name in names}
        made = []
        for person in self.people:
            found = {"selected": self._written(person, "selected", self.augment)}
            if "unselected" in wanted:
                # The same requests in the same order, whatever can be read taken as it comes: what selection has to beat.
                plain = replace(self.augment, keep=len(found["selected"]), pool=1.0, without=[*RULES], per_real=100.0)
                found["unselected"] = self._written(person, "unselected", plain)
            made.append(replace(person, synthetic=found))
        return with_others(made) if "other" in wanted else made

    def _written(self, person: Person, name: str, config: AugmentConfig) -> tuple[Record, ...]:
        folder = self.work / person.user
        out = folder / name
        out.mkdir(parents=True, exist_ok=True, mode=0o700)
        result = augment(
            person.train,
            person.held_out,
            person.user,
            config,
            TeacherConfig(gguf=str(self.teacher)),
            self.base.file.path,
            0,
            out,
            folder / "answers.jsonl",
            self.progress,
            fits=lambda task, given: self.encoding.fits(task, given, self.train.max_tokens),
        )
        write_json(out / "metrics.json", result.metrics())
        return tuple(records_in(out / "kept.jsonl"))

    # Arms.

    def shared(self) -> Path:
        """Return the adapter of other users, trained once."""
        records = shared_records(self.found, self.settings["users"])
        folder = self.work / f"shared-{sha256_json([hash_of(records), asdict(self.train)])[:12]}"
        if (folder / "whole.json").exists():
            return folder
        folder.mkdir(exist_ok=True, mode=0o700)
        probes = self.encoding.probes(records, self.train.max_tokens)
        held = len(probes) // 10
        order = Order("shared", [Example(probe) for probe in probes[held:]], probes[:held], folder)
        steps = 3 * len(probes) // 8
        config = replace(self.train, batch_size=8, max_steps=steps, evaluate_every=max(1, steps // 12))
        (outcome,) = train_orders(self.base, [order], config, self.progress)
        if isinstance(outcome, CdcdaError):
            raise outcome
        save_adapter(outcome.layers, self.base.name, folder)
        write_json(folder / "whole.json", outcome.metrics())
        return folder

    def arms(self, names: Sequence[str], seeds: Sequence[int], precisions: Sequence[str]) -> list[Cell]:
        """Train and measure."""
        shared = self.shared() if any(ARMS[name].shared for name in names) else None
        exports = tuple(ExportConfig(quant=kind) for kind in precisions)
        settings = Settings(self.train, shared, exports, answer_tokens=32, max_tokens=768, origin=self.origin())
        experiment = Experiment(
            self.base, self.pools(names), settings, lambda user: self.work / user / "arms", lambda user: self.results / user, self.progress
        )
        return experiment.run(names, seeds)


def tables(cells: Sequence[Cell]) -> tuple[dict[str, float], dict[str, Any], str, str]:
    """Return figures, data, Markdown and the plot of finished cells."""
    metrics = [NLL, *dict.fromkeys(name for cell in cells for name in cell.metrics)]
    there = {cell.place for cell in cells}
    pairs = [(Arm(a, kind), Arm(b, "none" if ARMS[b].rule else kind)) for a, b in FIGURES.values() for kind in PRECISIONS]
    compared = compare_arms(cells, [pair for pair in pairs if set(pair) <= there], metrics)
    rows = arm_rows(cells, metrics)
    figures: dict[str, float] = {}
    for name, (a, b) in FIGURES.items():
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


def finished_cells(folder: Path, users: Sequence[str], arms: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """Return the cells of a task.

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
    return [cell for row in rows for cell in cells_of(row["cells"])]


def curve_svg(cells: Mapping[int, Sequence[Cell]]) -> str:
    """Return the learning curve: mean NLL over the number of real records."""
    means = {real: {row.arm.name: row.estimate.mean for row in arm_rows(found, [NLL])} for real, found in cells.items()}
    lines = {arm: [means[real][arm] for real in means] for arm in CURVE_ARMS}
    return svg([Panel("test NLL per token, mean over users", "real records", "nats", [str(real) for real in means], lines)])


def report(settings: dict[str, Any], data: Path, seeds: Sequence[int]) -> None:
    """Write tables, figures and plots of everything that was measured.

    Raises:
        SystemExit: something is missing or was measured in two ways.
    """
    cells: list[Cell] = []
    for task in SOURCES:
        users = [person.user for person in people(data, task, settings["users"]).test]
        cells += finished_cells(RESULTS / "personalization" / task, users, [*ARMS], seeds)
    figures, found, markdown, plot = tables(cells)
    print(markdown)
    write_atomic(RESULTS / "personalization.svg", plot, mode=0o644)
    raw = {"settings": settings, "seeds": list(seeds), **found}
    curve = settings["curve"]
    if (RESULTS / CURVE).exists():
        measured = {}
        for real, (_, chosen) in curve_people(data, curve["task"], settings["users"], curve).items():
            folder = RESULTS / CURVE / str(real) / curve["task"]
            measured[real] = finished_cells(folder, [person.user for person in chosen], CURVE_ARMS, seeds)
            raw[f"curve_{real}"] = tables(measured[real])[1]
        write_atomic(RESULTS / f"{CURVE}.svg", curve_svg(measured), mode=0o644)
    write_results("personalization", figures, raw)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("pools", "arms", "curve", "report"))
    parser.add_argument("--teacher", type=Path, help="GGUF of the teacher")
    parser.add_argument("--task", choices=(*SOURCES,), action="append")
    parser.add_argument("--development", action="store_true", help="the users that choices are tuned on; results stay in --work")
    parser.add_argument("--arms", default=",".join(ARMS), help="comma-separated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--users", type=int, default=0, help="only so many of them (0: all)")
    parser.add_argument("--work", type=Path, default=Path("runs/_personalization"))
    parser.add_argument("--quick", action="store_true", help="two development users, one seed, one precision")
    options = parser.parse_args()
    settings = tomllib.loads((HERE / "personalization.toml").read_text(encoding="utf-8"))
    if "CDCDA_DATA" not in os.environ:
        parser.error("CDCDA_DATA has to name the shared data")
    data, progress = Path(os.environ["CDCDA_DATA"]), Plain()
    if options.quick:
        options.development, options.users, options.seeds = True, 2, 1
    seeds, names = settings["users"]["seeds"][: options.seeds], options.arms.split(",")
    if options.stage == "report":
        report(settings, data, seeds)
        return
    if options.teacher is None:
        parser.error("--teacher has to name the teacher's GGUF, also where all its answers are known: they are known by its hash")
    if options.stage == "curve":
        task, curve = settings["curve"]["task"], settings["curve"]
        for (real, (found, chosen)), steps in zip(
            curve_people(data, task, settings["users"], curve).items(), curve["max_steps"], strict=True
        ):
            work, results = options.work / f"curve-{real}" / task, RESULTS / CURVE / str(real) / task
            longer = {**settings, "train": {**settings["train"], "max_steps": steps}}
            laboratory = Laboratory(task, longer, found, chosen[: options.users or None], work, results, options.teacher, progress)
            print(f"{real} real records\n{tables(laboratory.arms(CURVE_ARMS, seeds, PRECISIONS[:1]))[2]}")
        return
    for task in options.task or SOURCES:
        results = (options.work / "development" if options.development else RESULTS / "personalization") / task
        found = people(data, task, settings["users"])
        chosen = (found.development if options.development else found.test)[: options.users or None]
        laboratory = Laboratory(task, settings, found, chosen, options.work / task, results, options.teacher, progress)
        if options.stage == "pools":
            laboratory.pools(names)
        else:
            print(tables(laboratory.arms(names, seeds, PRECISIONS[:1] if options.quick else PRECISIONS))[2])


if __name__ == "__main__":
    main()
