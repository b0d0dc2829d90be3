"""Where arms are made: a teacher writes synthetic records, then adapters are trained and measured; each step can have its own machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from cdcda_export.base import Base
from cdcda_export.errors import CdcdaError
from cdcda_export.manifest import sha256_file, sha256_json, write_atomic, write_json
from cdcda_export.progress import Progress
from cdcda_export.recipe import ExportConfig
from cdcda_mobile.augmentation.augment import augment
from cdcda_mobile.augmentation.select import RULES
from cdcda_mobile.config import AugmentConfig, TeacherConfig, TrainConfig
from cdcda_mobile.dataset import encoding_of
from cdcda_mobile.evaluation.arms import ARMS, Person, rule_answers, with_others
from cdcda_mobile.evaluation.experiment import Experiment, Settings
from cdcda_mobile.evaluation.metrics import score
from cdcda_mobile.evaluation.report import Cell, hash_of
from cdcda_mobile.history import Record, records_in
from cdcda_mobile.shared import say_whose
from cdcda_mobile.tasks import get_task
from cdcda_mobile.training.lora import save_adapter
from cdcda_mobile.training.schedule import Example, Order
from cdcda_mobile.user_training import train_orders
from laboratory import hardware
from personal_users import People, public_inputs, shared_records

_KEPT, _ORIGIN = "kept.jsonl", "origin.json"


class Laboratory:
    """One task of the experiment.

    Args:
        task: a key of ``SOURCES``.
        settings: ``personalization.toml``.
        found: the task's users.
        measured: those of them that are measured.
        work: where synthetic records and adapters lie.
        results: receives a folder for each user.
        progress: told what goes on.
    """

    def __init__(
        self, task: str, settings: dict[str, Any], found: People, measured: Sequence[Person], work: Path, results: Path, progress: Progress
    ) -> None:
        self.task, self.settings, self.progress = task, settings, progress
        self.found, self.people = found, measured
        self.base = Base(None, progress)
        self.encoding = encoding_of(self.base.file)
        self.work, self.results = work, results
        own = settings["tasks"][task]
        self.train = TrainConfig(**settings["train"] | own.get("train", {}))
        self.work.mkdir(parents=True, exist_ok=True, mode=0o700)
        inputs, text = self.work / "inputs.jsonl", "".join(json.dumps(row) + "\n" for row in public_inputs(self.found, task))
        if not inputs.exists() or inputs.read_text(encoding="utf-8") != text:  # several processes may share the folder
            write_atomic(inputs, text)
        self.augment = AugmentConfig(**settings["augment"] | own.get("augment", {}), inputs=str(inputs))

    # Synthetic records.

    def pools(self, names: Sequence[str], teacher: Path) -> None:
        """Let the teacher write the synthetic records that some arms need; what is there already stays."""
        digest = sha256_file(teacher)
        kinds = {ARMS[name].synthetic for name in names}
        for person in self.people:
            self._write(person, "selected", self.augment, teacher, digest)
            if "unselected" in kinds:
                # The same requests in the same order, whatever can be read taken as it comes: what selection has to beat.
                keep = len(records_in(self.work / person.user / "selected" / _KEPT))
                plain = replace(self.augment, keep=keep, pool=1.0, without=[*RULES], per_real=100.0)
                self._write(person, "unselected", plain, teacher, digest)

    def _write(self, person: Person, kind: str, config: AugmentConfig, teacher: Path, digest: str) -> None:
        folder = self.work / person.user
        out = folder / kind
        out.mkdir(parents=True, exist_ok=True, mode=0o700)
        origin = {"settings": self._asked(), "teacher": digest}
        if self._origin(out) == origin:
            return
        (out / _ORIGIN).unlink(missing_ok=True)
        result = augment(
            person.train,
            person.held_out,
            person.user,
            config,
            TeacherConfig(gguf=str(teacher)),
            self.base.file.path,
            0,
            out,
            folder / "answers.jsonl",
            self.progress,
            fits=lambda task, given: self.encoding.fits(task, given, self.train.max_tokens),
        )
        write_json(out / "metrics.json", result.metrics())
        write_json(out / _ORIGIN, origin)  # last: what says that the records are whole

    def _asked(self) -> str:
        """Return a hash of what decides the synthetic records beside teacher and the users' own: settings and others' inputs."""
        return sha256_json({**asdict(self.augment), "inputs": sha256_file(Path(self.augment.inputs))})

    @staticmethod
    def _origin(folder: Path) -> dict[str, str]:
        try:
            return dict(json.loads((folder / _ORIGIN).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    def written(self, names: Sequence[str]) -> tuple[list[Person], str]:
        """Return the users with the synthetic records that some arms need, and a hash of where these come from.

        Raises:
            SystemExit: some are missing, or were written under other settings or by several teachers.
        """
        kinds = {ARMS[name].synthetic for name in names} - {""}
        needed = sorted({"selected" if kind == "other" else kind for kind in kinds})
        people, teachers = [], set()
        for person in self.people:
            folders = {kind: self.work / person.user / kind for kind in needed}
            for folder in folders.values():
                origin = self._origin(folder)
                if origin.get("settings") != self._asked():
                    raise SystemExit(f"{folder} has no synthetic records under the present settings; run `personalization.py pools` first.")
                teachers.add(origin["teacher"])
            people.append(replace(person, synthetic={kind: tuple(records_in(folder / _KEPT)) for kind, folder in folders.items()}))
        if len(teachers) > 1:
            raise SystemExit(f"{self.work} holds synthetic records of several teachers; run `personalization.py pools` with one of them.")
        return (with_others(people) if "other" in kinds else people), sha256_json([self._asked(), *teachers])

    def agreement(self) -> dict[str, float]:
        """Return how the teacher's answers to others' inputs agree with what those people wrote: the task's metric, a mean over users.

        ``teacher`` is of the kept synthetic records, ``usual`` of each user's own most frequent label or opening to the same inputs: what
        knowing nothing of the input gives.
        """
        people, _ = self.written(["cdcda"])
        golds = {record.input: record.output for rows in self.found.others.values() for record in rows}
        found: dict[str, list[float]] = {"teacher": [], "usual": []}
        for person in people:
            made = [replace(record, output=golds[record.input]) for record in person.synthetic["selected"] if record.input in golds]
            said = [record.output for record in person.synthetic["selected"] if record.input in golds]
            usual = rule_answers((*person.train, *person.validation), made)
            for name, answers in (("teacher", said), ("usual", usual)):
                if made:
                    found[name].append(score(get_task(self.task), answers, [record.output for record in made]).value)
        return {name: fmean(values) for name, values in found.items()}

    # Arms.

    def shared(self) -> Path:
        """Return the adapter of other users, trained once."""
        records: list[Record] = shared_records(self.found, self.settings["users"])
        folder = self.work / f"shared-{sha256_json([hash_of(records), asdict(self.train)])[:12]}" / "adapter"
        if (folder / "whole.json").exists():
            return folder
        folder.mkdir(exist_ok=True, parents=True, mode=0o700)
        say_whose(folder, sorted({record.id.partition("-")[0] for record in records}), records)
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

    def arms(self, names: Sequence[str], seeds: Sequence[int], precisions: Sequence[str], part: int = 0, parts: int = 1) -> list[Cell]:
        """Train and measure.

        Args:
            names: of the arms.
            seeds: of the trained ones.
            precisions: of the measured artifacts.
            part: of all users every ``parts``-th from this one on.
            parts: how many processes or machines share the users.
        """
        shared = self.shared() if any(ARMS[name].shared for name in names) else None
        people, origin = self.written(names)
        # What quantization does is measured on some seeds, and everything else on all.
        some = self.settings["users"]["quantized_seeds"]
        trained = [name for name in names if ARMS[name].trained]
        cells = self._measured(people[part::parts], names, seeds[:some], precisions, shared, origin)
        return cells + self._measured(people[part::parts], trained, seeds[some:], precisions[:1], shared, origin)

    def _measured(
        self,
        people: Sequence[Person],
        names: Sequence[str],
        seeds: Sequence[int],
        precisions: Sequence[str],
        shared: Path | None,
        origin: str,
    ) -> list[Cell]:
        if not seeds:
            return []
        exports = tuple(ExportConfig(quant=kind) for kind in precisions)
        settings = Settings(self.train, shared, exports, answer_tokens=32, max_tokens=768, origin=origin, machine=_machine())
        arms, results = (lambda user: self.work / user / "arms"), (lambda user: self.results / user)
        return Experiment(self.base, people, settings, arms, results, self.progress).run(names, seeds)


def _machine() -> dict[str, Any]:
    """Return what computes: the processor asks the artifacts, the GPU trains where there is one."""
    import torch

    return {**hardware(), "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""}
