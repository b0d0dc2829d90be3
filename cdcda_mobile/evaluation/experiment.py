"""Train and measure arms for many users; every measurement is a small file that is there as soon as it is made.

A run that was stopped goes on where it was. Files hold numbers and hashes, never a text; adapters lie in the work folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cdcda_export.adapter import WEIGHTS, Adapter, read_adapter
from cdcda_export.artifact import types_of
from cdcda_export.base import Base
from cdcda_export.errors import CdcdaError, ConfigError, FileError
from cdcda_export.manifest import sha256_file, sha256_json, write_json
from cdcda_export.merge import merge_to_gguf
from cdcda_export.progress import Progress
from cdcda_export.quantization import get_quant
from cdcda_export.recipe import ExportConfig
from cdcda_export.runtime import LlamaCpp
from cdcda_export.verify import Probe
from cdcda_mobile.config import TrainConfig
from cdcda_mobile.dataset import encoding_of
from cdcda_mobile.evaluation.arms import Arm, Person, get_arm, rule_answers
from cdcda_mobile.evaluation.baselines import retrieval_probes
from cdcda_mobile.evaluation.metrics import score
from cdcda_mobile.evaluation.report import Cell, cells_of, hash_of
from cdcda_mobile.history import Record
from cdcda_mobile.tasks import get_task
from cdcda_mobile.user_training import forbid_leaks, forbid_shared_leaks, train_orders, training_settings

# The artifact before quantization, and the base file as it is where there is no adapter.
FLOAT = "f16"
_RETRIEVED = 4
_TRAINED = "training.json"


@dataclass(frozen=True)
class Settings:
    """How all arms of an experiment are trained and asked; the same for every arm.

    Attributes:
        train: the training, ``warm_start`` left empty.
        shared: the shared adapter for the arms that need it; None where there is none.
        exports: of the measured artifacts; one of them by name for each precision.
        answer_tokens: of a greedy answer at most.
        max_tokens: of prompt and answer together.
        origin: a hash of what else decides the synthetic records (prompts, teacher), kept with every measurement.
        machine: where it is computed, kept as well.
    """

    train: TrainConfig
    shared: Path | None = None
    exports: tuple[ExportConfig, ...] = (ExportConfig(quant=FLOAT), ExportConfig())
    answer_tokens: int = 48
    max_tokens: int = 1024
    origin: str = ""
    machine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def precisions(self) -> list[str]:
        """The names of the precisions."""
        return [export.resolved_quant for export in self.exports]


class Experiment:
    """Arms of many users on one base.

    Args:
        base: the base model.
        people: the users.
        settings: of all arms.
        work: a user's folder for adapters and models.
        results: a user's folder for measurements, ``<arm>-<seed>.json``.
        progress: told what goes on.

    Raises:
        WorkspaceError: a held-out record is among the training records of an arm.
    """

    def __init__(
        self,
        base: Base,
        people: Sequence[Person],
        settings: Settings,
        work: Callable[[str], Path],
        results: Callable[[str], Path],
        progress: Progress,
    ) -> None:
        self.base, self.people, self.settings, self.work, self.results, self.progress = base, people, settings, work, results, progress
        self.encoding = encoding_of(base.file)
        for person in people:
            for made in (*person.synthetic.values(), ()):
                forbid_leaks(person.train, made, person.held_out)
            if settings.shared is not None:
                forbid_shared_leaks(settings.shared, person.held_out, person.user)

    def run(self, arms: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
        """Make what is missing and return all cells, in the order of users, arms and seeds.

        Raises:
            ConfigError: an arm needs a shared adapter and none is named, or synthetic records that a user does not have.
            CdcdaError: a training failed; what was measured is kept.
        """
        wanted = [(person, name, seed) for person in self.people for name in arms for seed in self._seeds(get_arm(name), seeds)]
        missing = [one for one in wanted if self._known(*one) is None]
        for shared in (False, True):
            self._train([one for one in missing if get_arm(one[1]).trained and get_arm(one[1]).shared == shared], shared)
        self.progress.start("measuring", len(missing), "arms")
        for person, name, seed in missing:
            self._measure(person, name, seed)
            self.progress.advance(note=f"{name} of {person.user}")
        self.progress.done()
        return [cell for one in wanted for cell in self._known(*one) or []]

    @staticmethod
    def _seeds(arm: Arm, seeds: Sequence[int]) -> Sequence[int]:
        return seeds if arm.trained else seeds[:1]  # nothing is drawn in the others

    def answers(self, person: Person, name: str, seed: int, precision: str) -> list[str]:
        """Return the greedy answers to a user's test records that were measured, [] where an arm has none; they lie in the work folder.

        Raises:
            FileError: the work folder was removed since.
        """
        path = self._answers(person, name, seed, precision)
        if get_arm(name).rule:
            return []
        try:
            return [str(answer) for answer in json.loads(path.read_text(encoding="utf-8"))]
        except (OSError, ValueError):
            raise FileError(f"{path} is gone; remove {self._file(person, name, seed)} to measure it again.") from None

    def _answers(self, person: Person, name: str, seed: int, precision: str) -> Path:
        return self._folder(person, name, seed) / f"answers-{precision}.json"

    # What is known.

    def _made(self, person: Person, name: str, seed: int) -> dict[str, Any]:
        """Return everything that decides an adapter."""
        arm = get_arm(name)
        made = person.synthetic.get(arm.synthetic, ()) if arm.synthetic else ()
        records = {"train": hash_of(person.train), "validation": hash_of(person.validation), "synthetic": hash_of(made)}
        shared = self._shared_hash() if arm.shared else ""
        settings = training_settings(self.settings.train)
        return {"base": self.base.sha256, "arm": asdict(arm), "seed": seed, "records": records, "shared": shared, "training": settings}

    def _identity(self, person: Person, name: str, seed: int) -> str:
        """Return the hash of everything that decides a measurement."""
        asked: dict[str, Any] = {"answer_tokens": self.settings.answer_tokens, "max_tokens": self.settings.max_tokens}
        asked |= {"exports": [export.settings() for export in self.settings.exports]}
        return sha256_json({**self._made(person, name, seed), "test": hash_of(person.test), **asked})

    def _shared_hash(self) -> str:
        return sha256_file(self._shared() / WEIGHTS)

    def _shared(self) -> Path:
        if self.settings.shared is None:
            raise ConfigError("This arm stands on a shared adapter; train one with `cdcda train --shared` and name it.")
        return self.settings.shared

    def _file(self, person: Person, name: str, seed: int) -> Path:
        return self.results(person.user) / f"{name}-{seed}.json"

    def _known(self, person: Person, name: str, seed: int) -> list[Cell] | None:
        try:
            found = json.loads(self._file(person, name, seed).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        known = isinstance(found, dict) and found.get("identity") == self._identity(person, name, seed)
        return cells_of(found["cells"]) if known else None

    # Training.

    def _folder(self, person: Person, name: str, seed: int) -> Path:
        return self.work(person.user) / f"{name}-{seed}-{sha256_json(self._made(person, name, seed))[:12]}"

    def _train(self, jobs: Sequence[tuple[Person, str, int]], shared: bool) -> None:
        from cdcda_mobile.training.lora import save_adapter
        from cdcda_mobile.training.schedule import Example, Order
        from cdcda_mobile.training.warm_start import whole

        jobs = [job for job in jobs if not (self._folder(*job) / _TRAINED).exists()]
        orders = []
        for person, name, seed in jobs:
            arm, folder = get_arm(name), self._folder(person, name, seed)
            if arm.synthetic and arm.synthetic not in person.synthetic:
                raise ConfigError(f"User {person.user} has no {arm.synthetic} synthetic records for the arm '{name}'.")
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            made = person.synthetic[arm.synthetic] if arm.synthetic else ()
            examples = [Example(probe) for probe in self._probes(person.train)]
            examples += [Example(probe, self.settings.train.synthetic_weight[0], synthetic=True) for probe in self._probes(made)]
            schedule = self.settings.train.synthetic_schedule[0]
            orders.append(Order(f"{person.user}/{name}", examples, self._probes(person.validation), folder, seed, schedule))
        if not orders:
            return
        config = replace(self.settings.train, warm_start=str(self._shared()) if shared else "")

        def finished(at: int, outcome: Any) -> None:
            if not isinstance(outcome, CdcdaError):
                save_adapter(whole(outcome.layers, config.warm_start, self.base), self.base.name, orders[at].directory)
                for checkpoint in orders[at].directory.glob("checkpoint-*"):
                    checkpoint.unlink()
                write_json(orders[at].directory / _TRAINED, outcome.metrics())  # last: what says that the adapter is whole

        for outcome in train_orders(self.base, orders, config, self.progress, finished=finished):
            if isinstance(outcome, CdcdaError):
                raise outcome

    def _probes(self, records: Sequence[Record]) -> list[Probe]:
        return self.encoding.probes(records, self.settings.train.max_tokens)

    # Measuring.

    def _measure(self, person: Person, name: str, seed: int) -> None:
        arm, cells = get_arm(name), []
        if arm.rule:
            # A rule is read off all records that are known of the user; a task without one has no cell.
            few = (*person.train, *person.validation)
            tasks = {record.task for record in few}
            known = replace(person, test=tuple(record for record in person.test if record.task in tasks))
            cells = self._cells(known, name, seed, "none", rule_answers(few, known.test), None)
        else:
            self._folder(person, name, seed).mkdir(parents=True, exist_ok=True, mode=0o700)
            for export in self.settings.exports:
                precision = export.resolved_quant
                with self._model(person, name, seed, export) as runtime:
                    probes = self._asked(arm, person)
                    nll, ids = runtime.nll_and_greedy_many(probes, self.settings.answer_tokens)
                    answers = [runtime.decode(one).strip() for one in ids]
                tokens = [len(probe.answer) for probe in probes]
                cells += self._cells(person, name, seed, precision, answers, list(zip(nll, tokens, strict=True)))
                write_json(self._answers(person, name, seed, precision), answers)
        trained = self._folder(person, name, seed) / _TRAINED
        steps = json.loads(trained.read_text()) if trained.exists() else {}
        training = {key: steps[key] for key in ("steps", "best_step", "best_validation_nll", "seconds") if key in steps}
        decides = sha256_json(training_settings(self.settings.train))
        found = {
            "identity": self._identity(person, name, seed),
            "settings": decides,
            "origin": self.settings.origin,
            "machine": dict(self.settings.machine),
            "training": training,
            "cells": [asdict(cell) for cell in cells],
        }
        self._file(person, name, seed).parent.mkdir(parents=True, exist_ok=True)
        write_json(self._file(person, name, seed), found)

    def _asked(self, arm: Arm, person: Person) -> list[Probe]:
        if not arm.retrieval:
            return self._probes(person.test)
        few = (*person.train, *person.validation)
        return retrieval_probes(few, person.test, self.encoding, _RETRIEVED, self.settings.max_tokens, self.settings.answer_tokens)

    @contextmanager
    def _model(self, person: Person, name: str, seed: int, export: ExportConfig) -> Iterator[LlamaCpp]:
        arm, folder = get_arm(name), self._folder(person, name, seed)
        place = folder if arm.trained else self._shared() if arm.shared else None
        adapter = read_adapter(place, self.base.file) if place else None
        with loaded(self.base, adapter, export, folder, self.settings.max_tokens) as runtime:
            yield runtime

    def _cells(
        self, person: Person, arm: str, seed: int, precision: str, answers: Sequence[str], asked: Sequence[tuple[float, int]] | None
    ) -> list[Cell]:
        cells = []
        for task in dict.fromkeys(record.task for record in person.test):
            at = [index for index, record in enumerate(person.test) if record.task == task]
            found = score(get_task(task), [answers[i] for i in at], [person.test[i].output for i in at])
            nll, tokens = (sum(asked[i][0] for i in at), sum(asked[i][1] for i in at)) if asked else (None, 0)
            metrics = {found.metric: found.value, **found.more}
            tests = hash_of([person.test[i] for i in at])
            cells.append(Cell(task, person.user, arm, seed, precision, nll, tokens, metrics, len(at), tests))
        return cells


@contextmanager
def loaded(base: Base, adapter: Adapter | None, export: ExportConfig, folder: Path, n_ctx: int) -> Iterator[LlamaCpp]:
    """Load base and adapter as an artifact in llama.cpp; the file is gone afterwards.

    Args:
        base: the base model.
        adapter: what to merge; None for the base alone, which at full precision is the base's own file.
        export: the artifact's types.
        folder: where the file is written; nobody else may write there.
        n_ctx: of the runtime, in tokens.
    """
    precision = export.resolved_quant
    if adapter is None and precision == FLOAT:
        with LlamaCpp(base.file.path, n_ctx) as runtime:
            yield runtime
        return
    path = folder / f"model-{precision}.gguf"
    try:
        merge_to_gguf(base.file, adapter, types_of(export, base.file), get_quant(precision), path)
        with LlamaCpp(path, n_ctx) as runtime:
            yield runtime
    finally:
        path.unlink(missing_ok=True)
