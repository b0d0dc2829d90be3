"""The last stage of a user's job: the trained adapter becomes a verified artifact with a bundle and a card."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdcda_export.adapter import Adapter
from cdcda_export.artifact import Artifact, Order, load_adapter, make_artifact
from cdcda_export.base import Base
from cdcda_export.bundle import write_bundle
from cdcda_export.export import adapter_inputs, gate_hash, next_commands
from cdcda_export.manifest import Manifest, Stage, versions
from cdcda_export.merge import Importance
from cdcda_export.progress import Progress
from cdcda_export.recipe import ExportConfig
from cdcda_export.runtime import LlamaCpp
from cdcda_export.verify import Probe, Runtime, Verification
from cdcda_mobile.dataset import encoding_of
from cdcda_mobile.history import Record, records_in
from cdcda_mobile.tasks import get_task

_SAMPLES = 3


@dataclass(frozen=True)
class UserExport:
    """One user's export.

    Attributes:
        user: whose model.
        directory: the user's run; ``history`` and ``adapter`` are finished in it.
        shared: where what belongs to no single user is kept.
        base: the base model.
        config: what artifact to make.
        history: the manifest of the split history.
        trained: the manifest of the adapter.
        augmented: the manifest of the synthetic records, None for none.
    """

    user: str
    directory: Path
    shared: Path
    base: Base
    config: ExportConfig
    history: Manifest
    trained: Manifest
    augmented: Manifest | None

    def stage(self, redo: bool) -> Stage:
        """Return the stage of the verified artifact."""
        inputs = {
            "base": self.base.sha256,
            "gate": gate_hash(self.config, self.base.file),
            "history/test.jsonl": self.history.outputs["test.jsonl"]["sha256"],
            **adapter_inputs(self.directory / "adapter", self.config.format),
        }
        if self.config.importance != "none":
            inputs["history/train.jsonl"] = self.history.outputs["train.jsonl"]["sha256"]
        return Stage(self.directory / self.config.directory, self.config.settings(), inputs, redo)

    def run(self, stage: Stage, progress: Progress) -> Manifest:
        """Build the artifact, and return the stage's manifest with the card in its metrics.

        Raises:
            ExportError: the adapter and the base do not fit.
            VerificationFailed: the artifact is outside its gate.
        """
        partial = stage.begin()
        adapter = load_adapter(self.directory / "adapter", self.base, progress)
        test = records_in(self.directory / "history" / "test.jsonl")

        def probes() -> list[Probe]:
            return encoding_of(self.base.file).probes(test, self.config.max_tokens)

        def evaluate(runtime: Runtime, exchanges: Sequence[Probe], result: Verification) -> dict[str, Any]:
            return self._evaluate(runtime, test, exchanges, result, progress)

        order = Order(self.base, adapter, self.config, partial, self.shared, self._importance(adapter, probes, progress))
        artifact, result, evaluated = make_artifact(order, probes, progress, evaluate)
        described = artifact.as_card(stage.directory)
        presets = [{"task": name, "instruction": get_task(name).instruction} for name in dict.fromkeys(r.task for r in test)]
        checked = result.as_card()
        records = self.trained.metrics["records"]
        learned = {"records": records["train"], "synthetic": records["synthetic"]}
        bundled = write_bundle(partial, self.base, artifact, described, checked, presets, learned)
        card = (evaluated or _NOT_EVALUATED) | self._facts(described, checked, artifact, progress)
        return stage.finish({"card": card, "verify": self.config.verify}, [*artifact.outputs, *bundled], hashes=artifact.hashes)

    def _importance(self, adapter: Adapter, held_out: Any, progress: Progress) -> Importance | None:
        """Weigh the input channels on the user's training records; what is held out never takes part."""
        if self.config.importance == "none":
            return None
        from cdcda_export.importance import check_disjoint, importance_of

        training = encoding_of(self.base.file).probes(records_in(self.directory / "history" / "train.jsonl"), self.config.max_tokens)
        check_disjoint(training, held_out())
        return importance_of(self.base, adapter, training, progress)

    def _evaluate(
        self, runtime: Runtime, test: Sequence[Record], probes: Sequence[Probe], result: Verification, progress: Progress
    ) -> dict[str, Any]:
        from cdcda_mobile.evaluation.answers import answer_all, task_rows

        limit = self.config.answer_tokens
        answers = answer_all(runtime, probes, limit, progress, "answering the test prompts (personal)")
        with LlamaCpp(self.base.file.path, n_ctx=self.config.max_tokens) as base:
            base_answers = answer_all(base, probes, limit, progress, "answering the test prompts (base)")
            base_nll = base.nll_many(probes)
        tokens = sum(len(p.answer) for p in probes)
        nll_base, nll_f32, nll = sum(base_nll) / tokens, float(result.nll_reference or 0.0), float(result.nll or 0.0)
        return {
            "personal_gain": {
                "nll_base": nll_base,
                "nll_personal_f32": nll_f32,
                "nll_personal": nll,
                "survived": (nll_base - nll) / (nll_base - nll_f32) if nll_base > nll_f32 else None,
                "tokens": tokens,
            },
            "tasks": task_rows(test, probes, base_nll, result.probe_nll, base_answers, answers),
            "samples": [
                {"task": r.task, "date": r.date, "input": r.input, "base": b, "personal": a, "user": r.output}
                for r, a, b in zip(test[:_SAMPLES], answers, base_answers, strict=False)
            ],
        }

    def _facts(self, described: dict[str, Any], checked: dict[str, Any], artifact: Artifact, progress: Progress) -> dict[str, Any]:
        trained, history = self.trained.metrics, self.history.metrics
        records = {**trained["records"], "test": history["test"], "malformed": history["malformed"]}
        commands = next_commands(self.directory / self.config.directory, artifact)
        commands[0:2] = [
            ["Talk to it", f"cdcda chat {shlex.quote(str(self.directory))}"],
            ["Read the report", str(self.directory / "report.html")],
        ]
        used = self.augmented is not None and "augment/kept.jsonl" in self.trained.inputs
        return {
            "user": self.user,
            "base": {"name": self.base.name, "sha256": self.base.sha256},
            "artifact": described,
            "verification": checked,
            "training": {**trained, "records": records},
            "augmentation": self.augmented.metrics if self.augmented is not None and used else None,
            "warnings": list(getattr(progress, "warnings", [])),
            "next": commands,
            "versions": versions(),
        }


# Below level ``full`` nothing is answered: the card says what was not asked.
_NOT_EVALUATED: dict[str, Any] = {"personal_gain": None, "tasks": [], "samples": []}
