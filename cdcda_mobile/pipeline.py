"""The main job: history -> augment -> train -> merge+quantize -> verify -> bundle, each stage reused when nothing it depends on changed."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cdcda_export.artifact import (
    Artifact,
    Order,
    check_combination,
    load_adapter,
    open_artifact,
    open_base,
    verify_artifact,
    write_artifact,
)
from cdcda_export.bundle import write_bundle
from cdcda_export.errors import ConfigError, WorkspaceError
from cdcda_export.export import adapter_hashes, gate_hash, next_commands
from cdcda_export.gguf import GgufFile
from cdcda_export.manifest import (
    Manifest,
    Stage,
    outputs_intact,
    read_manifest,
    sha256_file,
    sha256_json,
    versions,
    write_atomic,
    write_json,
)
from cdcda_export.progress import Progress
from cdcda_export.recipe import ExportConfig
from cdcda_export.report import write_report
from cdcda_export.runtime import LlamaCpp
from cdcda_export.verify import Verification, nll_of
from cdcda_mobile.config import AugmentConfig, HistoryConfig, TeacherConfig, TrainConfig
from cdcda_mobile.history import Record, Split, read_history, split_by_time
from cdcda_mobile.tasks import get_task
from cdcda_mobile.workspace import Workspace

STAGES = ("history", "augment", "adapter", "export")
_SAMPLES = 3


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


class Pipeline:
    """One user's job over one workspace."""

    def __init__(self, job: UserJob, progress: Progress) -> None:
        for name in job.redo:
            if name not in STAGES and name != job.export.directory:
                raise ConfigError(f"There is no stage '{name}' to redo. One of: {', '.join((*STAGES, job.export.directory))}.")
        self.job, self.progress = job, progress
        self.base: GgufFile = open_base(job.base)
        check_combination(job.export, self.base)
        self.base_sha256 = sha256_file(self.base.path)
        self.workspace = Workspace(job.workspace)
        self.directory = self.workspace.user_directory(job.user)
        self.timings: list[dict[str, Any]] = []
        self.split: Split | None = None
        self._decoder: Any = None

    # Stages: what each one depends on.

    def history_stage(self, split: Split) -> Stage:
        """Return the stage of the split history."""
        inputs = {name: sha256_json([asdict(r) for r in getattr(split, name)]) for name in ("train", "validation", "test")}
        return self._stage("history", {}, inputs)

    def augment_stage(self, history: Manifest) -> Stage:
        """Return the stage of the synthetic records."""
        teacher = {key: getattr(self.job.teacher, key) for key in ("base_url", "model", "gguf")}
        inputs = {f"history/{name}": output["sha256"] for name, output in history.outputs.items()}
        gguf = sha256_file(Path(self.job.teacher.gguf)) if self.job.teacher.gguf else self.base_sha256
        config = {**asdict(self.job.augment), "teacher": teacher, "seed": self.job.seed}
        return self._stage("augment", config, {**inputs, "teacher_gguf": gguf})

    def adapter_stage(self, history: Manifest, augmented: Manifest | None) -> Stage:
        """Return the stage of the trained adapter."""
        inputs = {f"history/{name}": history.outputs[name]["sha256"] for name in ("train.jsonl", "validation.jsonl")}
        if augmented is not None:
            inputs["augment/kept.jsonl"] = augmented.outputs["kept.jsonl"]["sha256"]
        config = {key: value for key, value in asdict(self.job.train).items() if key != "checkpoint_steps"}
        return self._stage("adapter", {**config, "seed": self.job.seed}, {"base": self.base_sha256, **inputs})

    def export_stage(self, history: Manifest) -> Stage:
        """Return the stage of the verified artifact."""
        inputs = {
            "base": self.base_sha256,
            "gate": gate_hash(self.job.export),
            "history/test.jsonl": history.outputs["test.jsonl"]["sha256"],
        }
        inputs |= adapter_hashes(self.directory / "adapter")
        return self._stage(self.job.export.directory, asdict(self.job.export), inputs)

    def _stage(self, name: str, config: dict[str, Any], inputs: dict[str, str]) -> Stage:
        redo = name in self.job.redo or ("export" in self.job.redo and name == self.job.export.directory)
        return Stage(self.directory / name, config, inputs, redo)

    # The job.

    def plan(self) -> list[Step]:
        """Return what ``run`` would do and why; nothing is written."""
        steps: list[Step] = []
        if self.job.export_only:
            history, adapter = self._finished("history"), self._finished("adapter")
            for name in ("history", "adapter"):
                steps.append(Step(name, str(self.directory / name), False, "finished (--export-only never trains)"))
            steps.append(self._step(self.export_stage(history)) if adapter else steps[-1])
            return steps
        steps.append(self._step(self.history_stage(self._split())))
        makers: list[tuple[str, Callable[[], Stage]]] = []
        if self.job.augment.keep:
            makers.append(("augment", lambda: self.augment_stage(self._finished("history"))))
        augmented = (lambda: self._finished("augment")) if self.job.augment.keep else (lambda: None)
        makers.append(("adapter", lambda: self.adapter_stage(self._finished("history"), augmented())))
        makers.append((self.job.export.directory, lambda: self.export_stage(self._finished("history"))))
        for name, make in makers:
            blocked = next((step.stage for step in steps if step.runs), None)
            if blocked:
                steps.append(Step(name, str(self.directory / name), True, f"follows {blocked}"))
            else:
                steps.append(self._step(make()))
        return steps

    @staticmethod
    def _step(stage: Stage) -> Step:
        why = stage.why()
        return Step(stage.name, str(stage.directory), bool(why), why or "finished, nothing it depends on changed")

    def run(self, until: str = "export") -> dict[str, Any]:
        """Run the missing stages and return the card.

        Args:
            until: ``augment`` or ``adapter`` stops after that stage and returns its metrics instead.
        """
        if not self.job.export_only:
            self._split()  # first: a mistyped user or source must leave no folder and bind no workspace
        with self.workspace.locked(self.job.user):
            self.workspace.bind(self._source(), self.base_sha256, self.base.path.name)
            if self.job.export_only:
                history, augmented = self._finished("history"), read_manifest(self.directory / "augment")
                adapter = self._finished("adapter")
            else:
                history = self._timed("history", self.history_stage(self._split()), self._run_history)
                augmented = None
                if self.job.augment.keep:
                    augmented = self._timed("augment", self.augment_stage(history), self._run_augment)
                if until == "augment":
                    return dict(augmented.metrics) if augmented else {}
                adapter = self._timed("adapter", self.adapter_stage(history, augmented), self._run_train)
            if until == "adapter":
                return dict(adapter.metrics)
            stage = self.export_stage(history)
            manifest = self._timed(stage.name, stage, lambda s: self._run_export(s, history, augmented, adapter))
            return self._card(manifest)

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

    def _timed(self, name: str, stage: Stage, build: Callable[[Stage], Manifest]) -> Manifest:
        began = time.monotonic()
        manifest = stage.finished()
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
        return [Record(**row) for row in read_lines(self.directory / "history" / f"{name}.jsonl")]

    def _run_augment(self, stage: Stage) -> Manifest:
        from cdcda_mobile.augment import augment

        result = augment(
            train=tuple(self.records("train")),
            held_out=(*self.records("validation"), *self.records("test")),
            user=self.job.user,
            config=self.job.augment,
            teacher_config=self.job.teacher,
            base_gguf=self.base.path,
            seed=self.job.seed,
            directory=stage.begin(),
            answers=self.directory / "teacher" / "answers.jsonl",
            progress=self.progress,
        )
        return stage.finish(result.metrics(), ["kept.jsonl", "rejected.jsonl"])

    def decoder(self) -> Any:
        """Return the base as a torch model, loaded once."""
        if self._decoder is None:
            self.progress.start("loading the base model")
            import torch

            from cdcda_export.decoder import Decoder

            self._decoder = Decoder(self.base, "cuda" if torch.cuda.is_available() else "cpu")
            self.progress.done()
        return self._decoder

    def _run_train(self, stage: Stage) -> Manifest:
        from cdcda_mobile.dataset import check_token_ids, encoding_of
        from cdcda_mobile.lora import save_adapter
        from cdcda_mobile.train import Example, Trainer

        config, partial = self.job.train, stage.begin()
        encoding = encoding_of(self.base)
        train, validation = self.records("train"), self.records("validation")
        synthetic = [Record(**{k: row[k] for k in ("id", "date", "task", "input", "output")}) for row in self._synthetic_rows()]
        self._forbid_leaks(train, synthetic)
        probes = encoding.probes(train, config.max_tokens)
        check_token_ids(self.base, encoding, probes)
        examples = [Example(p) for p in probes]
        examples += [Example(p, config.synthetic_weight) for p in encoding.probes(synthetic, config.max_tokens)]
        trainer = Trainer(self.decoder(), examples, encoding.probes(validation, config.max_tokens), config, self.job.seed, partial)
        result = trainer.run(self.progress)
        files = save_adapter(result.lora, result.best, config, self.base.path.stem, partial)
        counts = {"train": len(train), "validation": len(validation), "synthetic": len(synthetic)}
        return stage.finish({**result.metrics(), "records": counts, "rank": config.rank, "epochs": config.epochs}, files)

    def _synthetic_rows(self) -> list[dict[str, Any]]:
        return read_lines(self.directory / "augment" / "kept.jsonl") if self.job.augment.keep else []

    def _forbid_leaks(self, train: Sequence[Record], synthetic: Sequence[Record]) -> None:
        """Hold the rule that no test record is ever trained on.

        Raises:
            WorkspaceError: one is.
        """
        held_out = {(r.task, " ".join(r.input.split()).lower()) for r in (*self.records("test"), *self.records("validation"))}
        for record in (*train, *synthetic):
            if (record.task, " ".join(record.input.split()).lower()) in held_out:
                raise WorkspaceError(f"Record {record.id} is in the training set and in the held-out set; run with --redo augment.")

    def _run_export(self, stage: Stage, history: Manifest, augmented: Manifest | None, trained: Manifest) -> Manifest:
        from cdcda_mobile.dataset import encoding_of

        config, partial = self.job.export, stage.begin()
        adapter = load_adapter(self.directory / "adapter", self.base, self.progress)
        test = self.records("test")
        probes = encoding_of(self.base).probes(test, config.max_tokens)
        shared = self.job.workspace / "_shared"
        order = Order(self.base, self.base_sha256, adapter, config, partial, shared)
        artifact = write_artifact(order, self.progress)
        with open_artifact(artifact, config.max_tokens) as (runtime, template):
            result = verify_artifact(artifact, runtime, template, probes, self.base, adapter, config, self.progress, self._decoder)
            card = self._evaluate(runtime, test, probes, result)
        described = artifact.as_card(stage.directory)
        presets = [{"task": name, "instruction": get_task(name).instruction} for name in dict.fromkeys(r.task for r in test)]
        bundled = write_bundle(partial, self.base, self.base_sha256, artifact.files, described, result.as_card(), presets)
        card |= self._card_facts(described, result, history, augmented, trained, artifact)
        return stage.finish({"card": card}, [*artifact.outputs, *bundled])

    def _evaluate(self, runtime: Any, test: list[Record], probes: list[Any], result: Verification) -> dict[str, Any]:
        from cdcda_mobile.evaluate import answer_all, task_rows

        limit = self.job.export.answer_tokens
        answers = answer_all(runtime, probes, limit, self.progress, "answering the test prompts (personal)")
        with LlamaCpp(self.base.path, n_ctx=self.job.export.max_tokens) as base:
            base_answers = answer_all(base, probes, limit, self.progress, "answering the test prompts (base)")
            base_nll = [float(nll_of(base.logits(p.ids)[p.answer_positions()], p.answer).sum()) for p in probes]
        tokens = sum(len(p.answer) for p in probes)
        nll_base = sum(base_nll) / tokens
        gain_f32 = nll_base - result.nll_reference
        return {
            "personal_gain": {
                "nll_base": nll_base,
                "nll_personal_f32": result.nll_reference,
                "nll_personal": result.nll,
                "survived": (nll_base - result.nll) / gain_f32 if gain_f32 > 0 else None,
                "tokens": tokens,
            },
            "tasks": task_rows(test, probes, base_nll, result.probe_nll, base_answers, answers),
            "samples": [
                {"task": r.task, "date": r.date, "input": r.input, "base": b, "personal": a, "user": r.output}
                for r, a, b in zip(test[:_SAMPLES], answers, base_answers, strict=False)
            ],
        }

    def _card_facts(
        self,
        artifact: dict[str, Any],
        result: Verification,
        history: Manifest,
        augmented: Manifest | None,
        trained: Manifest,
        made: Artifact,
    ) -> dict[str, Any]:
        records = {**trained.metrics["records"], "test": history.metrics["test"], "malformed": history.metrics["malformed"]}
        directory = self.directory / self.job.export.directory
        commands = next_commands(directory, made.format, made.main.name)
        commands[0:2] = [
            ["Talk to it", f"cdcda chat {shlex.quote(str(self.directory))}"],
            ["Read the report", str(self.directory / "report.html")],
        ]
        return {
            "user": self.job.user,
            "base": {"name": self.base.path.name, "sha256": self.base_sha256},
            "artifact": artifact,
            "verification": result.as_card(),
            "training": {**trained.metrics, "records": records},
            "augmentation": augmented.metrics if augmented is not None and "augment/kept.jsonl" in trained.inputs else None,
            "warnings": list(getattr(self.progress, "warnings", [])),
            "next": commands,
            "versions": versions(),
        }

    def _card(self, manifest: Manifest) -> dict[str, Any]:
        card = {**manifest.metrics["card"], "stages": self.timings, "created": manifest.created}
        if any(not stage["reused"] for stage in self.timings) or not (self.directory / "report.html").exists():
            write_json(self.directory / "card.json", card)
            write_report(card, self.directory / "report.html")
        return card


def run_user_job(job: UserJob, progress: Progress) -> dict[str, Any]:
    """Run everything that is missing for one user and return the card."""
    return Pipeline(job, progress).run()


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSON Lines, atomically and private."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON Lines file that a finished stage wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
