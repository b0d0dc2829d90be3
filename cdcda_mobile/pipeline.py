"""The main job: history -> augment -> train -> merge+quantize -> verify -> bundle, each stage reused when nothing it depends on changed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdcda_export.artifact import check_combination
from cdcda_export.base import Base
from cdcda_export.errors import CdcdaError, ConfigError, WorkspaceError
from cdcda_export.export import reusable, why_not_reusable
from cdcda_export.manifest import Manifest, Stage, outputs_intact, read_manifest, sha256_file, sha256_json, write_json
from cdcda_export.progress import Progress
from cdcda_export.recipe import ExportConfig
from cdcda_export.report import write_report
from cdcda_mobile.config import AugmentConfig, HistoryConfig, TeacherConfig, TrainConfig
from cdcda_mobile.history import Record, Split, read_history, records_in, split_by_time
from cdcda_mobile.redaction.library import chosen_model
from cdcda_mobile.teachers.teacher import endpoint_of
from cdcda_mobile.user_training import UserTraining, train_users, training_settings
from cdcda_mobile.workspace import Workspace, write_lines

if TYPE_CHECKING:
    from cdcda_mobile.evaluation.arms import Person
    from cdcda_mobile.user_export import UserExport

STAGES = ("history", "augment", "adapter", "export")


@dataclass(frozen=True)
class UserJob:
    """What ``cdcda-export --user`` is asked for; every field but ``user`` has a default."""

    user: str
    workspace: Path = Path("runs")
    base: Path | None = None
    seed: int = 0
    export_only: bool = False
    redo: tuple[str, ...] = ()
    history: HistoryConfig = field(default_factory=HistoryConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    export: ExportConfig = field(default_factory=ExportConfig)


@dataclass(frozen=True)
class Step:
    """One line of ``--dry-run``: a stage, whether it would run, and why."""

    stage: str
    directory: str
    runs: bool
    why: str


def check_redo(job: UserJob) -> None:
    """Refuse to redo what is no stage.

    Raises:
        ConfigError: there is no such stage.
    """
    for name in job.redo:
        if name not in STAGES and name != job.export.directory:
            raise ConfigError(f"There is no stage '{name}' to redo. One of: {', '.join((*STAGES, job.export.directory))}.")


class Pipeline:
    """One user's job over one workspace."""

    def __init__(self, job: UserJob, progress: Progress, base: Base | None = None) -> None:
        check_redo(job)
        self.job, self.progress = job, progress
        self.base = base or Base(job.base, progress)
        check_combination(job.export, self.base.file)
        self.workspace = Workspace(job.workspace)
        self.directory = self.workspace.user_directory(job.user)
        self.timings: list[dict[str, Any]] = []
        self.split: Split | None = None
        self.augmented: Manifest | None = None

    # Stages: what each one depends on.

    def history_stage(self, split: Split) -> Stage:
        """Return the stage of the split history."""
        inputs = {name: sha256_json([asdict(r) for r in getattr(split, name)]) for name in ("train", "validation", "test")}
        return self._stage("history", {}, inputs)

    def augment_stage(self, history: Manifest) -> Stage:
        """Return the stage of the synthetic records."""
        teacher = {"base_url": endpoint_of(self.job.teacher), "model": self.job.teacher.model, "gguf": self.job.teacher.gguf}
        inputs = {f"history/{name}": output["sha256"] for name, output in history.outputs.items()}
        gguf = sha256_file(Path(self.job.teacher.gguf)) if self.job.teacher.gguf else self.base.sha256
        config = {**asdict(self.job.augment), "teacher": teacher, "seed": self.job.seed}
        if self.job.augment.inputs:
            inputs["inputs"] = sha256_file(Path(self.job.augment.inputs))
        config["longest"] = self.job.train.max_tokens
        if self.job.augment.likeness:
            config["train"] = training_settings(self.job.train)
        if self.job.augment.redact:
            config["redact_names"] = chosen_model(self.job.augment.redact_names)  # another finder shows the teacher other texts
        return self._stage("augment", config, {**inputs, "teacher_gguf": gguf})

    def training(self, history: Manifest, augmented: Manifest | None) -> UserTraining:
        """Return the training of the adapter."""
        redo = "adapter" in self.job.redo
        return UserTraining(self.job.user, self.directory, self.base, self.job.train, self.job.seed, history, augmented, redo)

    def user_export(self, history: Manifest, adapter: Manifest, augmented: Manifest | None) -> UserExport:
        """Return the export of the finished adapter."""
        from cdcda_mobile.user_export import UserExport

        shared = self.job.workspace / "_shared"
        return UserExport(self.job.user, self.directory, shared, self.base, self.job.export, history, adapter, augmented)

    def _stage(self, name: str, config: dict[str, Any], inputs: dict[str, str]) -> Stage:
        return Stage(self.directory / name, config, inputs, name in self.job.redo)

    @property
    def _redo_export(self) -> bool:
        return "export" in self.job.redo or self.job.export.directory in self.job.redo

    # The job.

    def plan(self) -> list[Step]:
        """Return what ``run`` would do and why; nothing is written."""
        steps: list[Step] = []
        if self.job.export_only:
            history, adapter = self._finished("history"), self._finished("adapter")
            for name in ("history", "adapter"):
                steps.append(Step(name, str(self.directory / name), False, "finished (--export-only never trains)"))
            steps.append(self._export_step(self.user_export(history, adapter, None)))
            return steps
        steps.append(self._step(self.history_stage(self._split())))
        finished = self._finished
        makers: list[tuple[str, Callable[[], Step]]] = []
        if self.job.augment.keep:
            makers.append(("augment", lambda: self._step(self.augment_stage(finished("history")))))
        augmented = (lambda: finished("augment")) if self.job.augment.keep else (lambda: None)
        makers.append(("adapter", lambda: self._step(self.training(finished("history"), augmented()).stage())))
        export = self.job.export.directory
        makers.append((export, lambda: self._export_step(self.user_export(finished("history"), finished("adapter"), augmented()))))
        for name, make in makers:
            blocked = next((step.stage for step in steps if step.runs), None)
            steps.append(Step(name, str(self.directory / name), True, f"follows {blocked}") if blocked else make())
        return steps

    @staticmethod
    def _step(stage: Stage, why: Callable[[Stage], str] = Stage.why) -> Step:
        reason = why(stage)
        return Step(stage.name, str(stage.directory), bool(reason), reason or "finished, nothing it depends on changed")

    def _export_step(self, export: UserExport) -> Step:
        return self._step(export.stage(self._redo_export), lambda stage: why_not_reusable(stage, self.job.export.verify))

    def run(self, until: str = "export") -> dict[str, Any]:
        """Run the missing stages and return the card.

        Args:
            until: ``augment`` or ``adapter`` stops after that stage and returns its metrics instead.
        """
        with self.opened():
            self.prepare()
            if until == "augment":
                return dict(self.augmented.metrics) if self.augmented else {}
            if not self.job.export_only:
                began, training = time.monotonic(), self.to_train()
                self.take(train_users([training], self.progress)[0], training.reused, time.monotonic() - began)
            return dict(self.adapter.metrics) if until == "adapter" else self.export()

    def shown_requests(self) -> Iterator[dict[str, Any]]:
        """Yield what the augment stage would send to the teacher; nothing is sent or written."""
        from cdcda_mobile.augmentation.shown_requests import shown_requests

        split, job = self._split(), self.job
        held_out, log = (*split.validation, *split.test), self.directory / "teacher" / "answers.jsonl"
        return shown_requests(split.train, held_out, job.augment, job.teacher, self.base.file.path, job.seed, log, self.progress)

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the user's directory in a workspace that is bound to this job's source and base."""
        # First: a mistyped user or source must leave no folder and bind no workspace.
        if self.job.export_only:
            self._finished("adapter")
        else:
            self._split()
        with self.workspace.locked(self.job.user):
            # What is exported only was read long ago, from whatever source the workspace is bound to.
            self.workspace.bind(None if self.job.export_only else self._source(), self.base.sha256, self.base.name)
            yield

    def prepare(self) -> None:
        """Run the stages before the training, or find them finished where nothing is trained."""
        if self.job.export_only:
            self.history, self.augmented = self._finished("history"), read_manifest(self.directory / "augment")
            self.adapter = self._finished("adapter")
            return
        self.history = self._timed("history", self.history_stage(self._split()), self._run_history)
        if self.job.augment.keep:
            self.augmented = self._timed("augment", self.augment_stage(self.history), self._run_augment)

    def person(self) -> Person:
        """Return the user as an experiment takes them, after ``prepare``."""
        from cdcda_mobile.evaluation.arms import Person

        kept = self.directory / "augment" / "kept.jsonl"
        made = records_in(kept) if self.augmented else []
        parts = {name: tuple(self.records(name)) for name in ("train", "validation", "test")}
        return Person(self.job.user, **parts, synthetic={"selected": tuple(made)} if made else {})

    def to_train(self) -> UserTraining:
        """Return the training that follows ``prepare``."""
        return self.training(self.history, self.augmented)

    def take(self, trained: Manifest | CdcdaError, reused: bool, seconds: float) -> None:
        """Go on from what became of the training.

        Raises:
            CdcdaError: it failed.
        """
        if isinstance(trained, CdcdaError):
            raise trained
        self.adapter = trained
        self.timings.append({"name": "adapter", "seconds": seconds, "reused": reused})

    def export(self) -> dict[str, Any]:
        """Run the stages after the training and return the card."""
        export = self.user_export(self.history, self.adapter, self.augmented)
        stage = export.stage(self._redo_export)
        level = self.job.export.verify
        return self._card(self._timed(stage.name, stage, lambda s: export.run(s, self.progress), lambda stage: reusable(stage, level)))

    def _source(self) -> str:
        data = self.job.history.data
        if "://" in data:  # a password in a database URL stays out of the workspace
            from sqlalchemy import make_url

            return make_url(data).render_as_string(hide_password=True)
        return data if data == "samples" else str(Path(data).resolve())

    def _finished(self, name: str) -> Manifest:
        manifest = read_manifest(self.directory / name)
        if manifest is None or not outputs_intact(self.directory / name, manifest):
            raise WorkspaceError(f"User {self.job.user} has no finished {name} in {self.directory}; run again without --export-only.")
        return manifest

    def _timed(
        self,
        name: str,
        stage: Stage,
        build: Callable[[Stage], Manifest],
        finished: Callable[[Stage], Manifest | None] = Stage.finished,
    ) -> Manifest:
        began = time.monotonic()
        manifest = finished(stage)
        reused = manifest is not None
        if manifest is None:
            manifest = build(stage)
        self.timings.append({"name": name, "seconds": time.monotonic() - began, "reused": reused})
        return manifest

    def _split(self) -> Split:
        if self.split is None:
            history = read_history(self.job.user, self.job.history)
            self.split = split_by_time(history, self.job.history)
            refused = (*history.malformed, *self.split.dropped)
            if refused:
                shown = "; ".join(f"{m.place}: {m.reason}" for m in refused[:3])
                more = f" and {len(refused) - 3} more (all in history/malformed.jsonl)" if len(refused) > 3 else ""
                self.progress.warn(f"{len(refused)} of the rows read are not used: {shown}{more}.")
            self._refused = [asdict(m) for m in refused]
        return self.split

    def _run_history(self, stage: Stage) -> Manifest:
        split, partial = self._split(), stage.begin()
        parts = {name: getattr(split, name) for name in ("train", "validation", "test")}
        for name, records in parts.items():
            write_lines(partial / f"{name}.jsonl", [asdict(r) for r in records])
        write_lines(partial / "malformed.jsonl", self._refused)
        counts = {name: len(records) for name, records in parts.items()}
        self.progress.say(
            f"history of {self.job.user}: {counts['train']} training, {counts['validation']} validation and {counts['test']} test records"
        )
        return stage.finish({**counts, "malformed": len(self._refused)}, [*(f"{n}.jsonl" for n in parts), "malformed.jsonl"])

    def records(self, name: str) -> list[Record]:
        """Return a part of the finished history: ``train``, ``validation`` or ``test``."""
        return records_in(self.directory / "history" / f"{name}.jsonl")

    def _run_augment(self, stage: Stage) -> Manifest:
        from cdcda_mobile.augmentation.augment import augment
        from cdcda_mobile.dataset import encoding_of

        encoding, longest = encoding_of(self.base.file), self.job.train.max_tokens
        train, validation, test = (self.records(name) for name in ("train", "validation", "test"))
        encoding.probes([*train, *validation, *test], longest)  # a record that cannot be trained on is told before the teacher is paid
        directory = stage.begin()
        likeness = None
        if self.job.augment.likeness:
            from cdcda_mobile.augmentation.likeness import LikelihoodGain

            scratch = directory / "likeness"
            likeness = LikelihoodGain(self.base, self.job.user, train, validation, self.job.train, self.job.seed, scratch, self.progress)
        result = augment(
            train=tuple(train),
            held_out=(*validation, *test),
            user=self.job.user,
            config=self.job.augment,
            teacher_config=self.job.teacher,
            base_gguf=self.base.file.path,
            seed=self.job.seed,
            directory=directory,
            answers=self.directory / "teacher" / "answers.jsonl",
            progress=self.progress,
            likeness=likeness,
            fits=lambda task, given: encoding.fits(task, given, longest),
        )
        return stage.finish(result.metrics(), ["kept.jsonl", "rejected.jsonl"])

    def _card(self, manifest: Manifest) -> dict[str, Any]:
        card = {**manifest.metrics["card"], "stages": self.timings, "created": manifest.created}
        if any(not stage["reused"] for stage in self.timings) or not (self.directory / "report.html").exists():
            write_json(self.directory / "card.json", card)
            write_report(card, self.directory / "report.html")
        return card


def run_user_job(job: UserJob, progress: Progress) -> dict[str, Any]:
    """Run everything that is missing for one user and return the card."""
    return Pipeline(job, progress).run()
