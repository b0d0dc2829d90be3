"""Export PEFT adapters, with no user and without torch: merge, quantize, verify, bundle, card."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cdcda_export.adapter import CONFIG, WEIGHTS, Adapter
from cdcda_export.artifact import Artifact, Order, check_combination, gate_of, load_adapter, make_artifact
from cdcda_export.base import NEUTRAL_PROMPT, Base
from cdcda_export.bundle import read_bundle, write_bundle
from cdcda_export.cache import locked
from cdcda_export.errors import AdapterError, ConfigError, FileError
from cdcda_export.gguf import GgufFile
from cdcda_export.manifest import Manifest, Stage, read_manifest, sha256_file, sha256_json, versions, write_json
from cdcda_export.merge import Importance
from cdcda_export.progress import Progress
from cdcda_export.recipe import VERIFICATIONS, ExportConfig
from cdcda_export.report import write_report
from cdcda_export.runtime import LlamaCpp
from cdcda_export.verify import Probe, Runtime, Verification, neutral_texts, paragraphs

_SAMPLES = 3


@dataclass(frozen=True)
class AdapterJob:
    """What ``cdcda-export --adapter`` is asked for.

    Attributes:
        adapter: the PEFT directory.
        base: the base: a GGUF, a Hugging Face directory or hub id; None for the default one.
        out: the artifact's directory; None for ``<workspace>/_adapters/<name>/<format>-<quant>``.
        workspace: where shared parts live.
        text: a file of paragraphs (separated by blank lines) to verify on; None for the neutral text that ships.
        calibration: a file of paragraphs to gather importance on; needed for ``--importance user``, never verified on.
        config: format, quantization, gate.
        redo: distrust what is there.
    """

    adapter: Path
    base: Path | None = None
    out: Path | None = None
    workspace: Path = Path("runs")
    text: Path | None = None
    calibration: Path | None = None
    config: ExportConfig = ExportConfig()
    redo: bool = False

    @property
    def directory(self) -> Path:
        """Where the artifact will lie."""
        return self.out or self.workspace / "_adapters" / self.adapter.resolve().name / self.config.directory


def adapter_inputs(directory: Path, kind: str) -> dict[str, str]:
    """Return the hashes of all that an artifact of a format takes from an adapter's directory.

    Raises:
        AdapterError: the directory does not exist.
    """
    if not os.path.isdir(directory):  # Path.is_dir raises on a name that is too long
        raise AdapterError(f"There is no adapter directory {directory}.")
    names = [CONFIG, WEIGHTS]
    found = {}
    if kind == "gguf-lora":  # which describes itself as the adapter's card and folder do
        names.append("README.md")
        found["adapter/name"] = directory.resolve().name
    return found | {f"adapter/{name}": sha256_file(directory / name) for name in names if (directory / name).is_file()}


def gate_hash(config: ExportConfig, base: GgufFile) -> str:
    """Return what identifies the gate: a tighter one makes a finished artifact stale."""
    return sha256_json(asdict(gate_of(config, base)))


def reusable(stage: Stage, level: str) -> Manifest | None:
    """Return the manifest of a finished artifact that was checked at this level or a stricter one, and whose every file is there."""
    manifest = stage.finished()
    if manifest is None or VERIFICATIONS.index(manifest.metrics.get("verify", "off")) > VERIFICATIONS.index(level):
        return None
    try:
        read_bundle(stage.directory)
    except FileError:
        return None  # its shared base is gone
    return manifest


def why_not_reusable(stage: Stage, level: str) -> str:
    """Return why an artifact has to be built, in a few words, or '' when it is there and was checked enough."""
    why = stage.why()
    if why or reusable(stage, level) is not None:
        return why
    return f"was not checked at level {level}, or its shared base is gone"


def _texts(path: Path | None) -> list[str]:
    if path is None:
        return neutral_texts()
    try:
        found = paragraphs(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"Cannot read the text {path}: {error}.") from error
    if not found:
        raise ConfigError(f"{path} holds no paragraph of at least 20 characters.")
    return found


def _calibration_texts(job: AdapterJob) -> list[str]:
    if job.config.importance == "none":
        if job.calibration is not None:
            raise ConfigError("--calibration is read with --importance user only; add that, or leave it out.")
        return []
    if job.calibration is None:
        raise ConfigError("--importance user needs the user's own training text: name a file of paragraphs with --calibration.")
    found = _texts(job.calibration)
    if set(found) & set(_texts(job.text)):
        raise ConfigError(f"{job.calibration} shares paragraphs with the text that is verified on; what is tested must not calibrate.")
    return found


def stage_of(job: AdapterJob, base: Base) -> Stage:
    """Return the stage of an adapter export."""
    check_combination(job.config, base.file)
    calibration = _calibration_texts(job)
    place, adapter = job.directory.resolve(), job.adapter.resolve()
    if place == adapter or place in adapter.parents:
        raise ConfigError(f"The artifact would be written over the adapter in {job.adapter}; name another --out.")
    inputs = {
        "base": base.sha256,
        "gate": gate_hash(job.config, base.file),
        "text": sha256_json(_texts(job.text)),
        **adapter_inputs(job.adapter, job.config.format),
    }
    if calibration:
        inputs["calibration"] = sha256_json(calibration)
    return Stage(job.directory, job.config.settings(), inputs, job.redo)


def export_adapter(job: AdapterJob, progress: Progress, base: Base | None = None) -> dict[str, Any]:
    """Export one adapter, and return its card.

    A finished artifact of the same inputs is reused. The artifact is complete and verified when this returns, or an error was raised.

    Args:
        job: what to export.
        progress: told of every step.
        base: the base if it is open already, as in a batch.

    Raises:
        ExportError: the adapter and the base do not fit.
        VerificationFailed: the artifact is outside its gate.
    """
    base = base or Base(job.base, progress)
    stage = stage_of(job, base)
    with locked(job.directory.parent, job.directory.name):
        _forbid_replacing_another(job)
        manifest = reusable(stage, job.config.verify)
        if manifest is not None:
            return dict(manifest.metrics["card"]) | {"stages": [{"name": stage.name, "seconds": 0.0, "reused": True}]}
        began = time.monotonic()
        partial = stage.begin()
        card, outputs, hashes = _build(job, base, partial, progress)
        card["stages"] = [{"name": stage.name, "seconds": time.monotonic() - began, "reused": False}]
        write_json(partial / "card.json", card)
        write_report(card, partial / "report.html")
        metrics = {"card": card, "verify": job.config.verify, "adapter": _identity(job)}
        stage.finish(metrics, [*outputs, "card.json", "report.html"], hashes=hashes)
        return card


def _identity(job: AdapterJob) -> str:
    """Return whose artifact it is: a hash of the adapter's place, so that retraining there replaces it and another adapter does not."""
    return sha256_json(str(job.adapter.resolve()))


def _forbid_replacing_another(job: AdapterJob) -> None:
    manifest = read_manifest(job.directory)
    if manifest is not None and manifest.metrics.get("adapter", _identity(job)) != _identity(job):
        raise ConfigError(f"{job.directory} holds the artifact of another adapter of that name; give {job.adapter} its own --out.")


def _build(job: AdapterJob, base: Base, partial: Path, progress: Progress) -> tuple[dict[str, Any], list[str], dict[str, str]]:
    adapter = load_adapter(job.adapter, base, progress)
    importance = _importance(job, base, adapter, progress)
    order = Order(base, adapter, job.config, partial, job.workspace / "_shared", importance)

    def probes() -> list[Probe]:
        return base.neutral_probes(_texts(job.text), job.config.max_tokens)

    def evaluate(runtime: Runtime, exchanges: Sequence[Probe], _: Verification) -> list[dict[str, str]]:
        return _samples(runtime, base, exchanges[:_SAMPLES], job.config)

    artifact, verification, samples = make_artifact(order, probes, progress, evaluate)
    described = artifact.as_card(job.directory)
    bundled = write_bundle(partial, base, artifact, described, verification.as_card(), [], None)
    card = {
        "user": None,
        "adapter": str(job.adapter),
        "base": {"name": base.name, "sha256": base.sha256},
        "artifact": described,
        "verification": verification.as_card(),
        "personal_gain": None,
        "tasks": [],
        "samples": samples or [],
        "training": None,
        "augmentation": None,
        "warnings": list(getattr(progress, "warnings", [])),
        "next": next_commands(job.directory, artifact),
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return card, [*artifact.outputs, *bundled], artifact.hashes


def _importance(job: AdapterJob, base: Base, adapter: Adapter, progress: Progress) -> Importance | None:
    if job.config.importance == "none":
        return None
    from cdcda_export.importance import importance_of

    return importance_of(base, adapter, base.neutral_probes(_calibration_texts(job), job.config.max_tokens), progress)


def _samples(runtime: Runtime, base: Base, probes: Sequence[Probe], config: ExportConfig) -> list[dict[str, str]]:
    answers = [runtime.decode(runtime.greedy(list(p.prompt), config.answer_tokens)) for p in probes]
    with LlamaCpp(base.file.path, n_ctx=config.max_tokens) as plain:
        base_answers = [plain.decode(plain.greedy(list(p.prompt), config.answer_tokens)) for p in probes]
    return [
        {
            "task": "text",
            "input": p.user_text.removeprefix(NEUTRAL_PROMPT).strip(),
            "base": b,
            "personal": a,
            "user": p.answer_text,
        }
        for p, a, b in zip(probes, answers, base_answers, strict=True)
    ]


def next_commands(directory: Path, artifact: Artifact) -> list[list[str]]:
    """Return what a user can do with an artifact, as (purpose, command) pairs."""
    commands = [["Talk to it", f"cdcda chat {shlex.quote(str(directory))}"], ["Read the report", str(directory / "report.html")]]
    main = shlex.quote(str(directory / artifact.main.name))
    if artifact.format == "gguf":
        commands.append(["Run it in llama.cpp", f"llama-cli -m {main}"])
    if artifact.format == "gguf-lora":
        commands.append(["Run it in llama.cpp", f"llama-cli -m {shlex.quote(str(artifact.files['model']))} --lora {main}"])
    return commands
