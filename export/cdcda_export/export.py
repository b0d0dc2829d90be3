"""Export any PEFT adapter, with no user and without torch: merge, quantize, verify, bundle, card."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cdcda_export.adapter import CONFIG, WEIGHTS
from cdcda_export.artifact import (
    Order,
    check_combination,
    gate_of,
    load_adapter,
    open_artifact,
    open_base,
    verify_artifact,
    write_artifact,
)
from cdcda_export.bundle import write_bundle
from cdcda_export.chat_template import template_of
from cdcda_export.errors import AdapterError, ConfigError, FileError
from cdcda_export.gguf import GgufFile
from cdcda_export.manifest import Stage, read_manifest, sha256_file, sha256_json, versions, write_json
from cdcda_export.progress import Progress
from cdcda_export.recipe import ExportConfig
from cdcda_export.report import write_report
from cdcda_export.runtime import LlamaCpp
from cdcda_export.verify import Probe, make_probe, neutral_texts, paragraphs

_NEUTRAL_PROMPT = "Continue this text:"
_SAMPLES = 3


@dataclass(frozen=True)
class AdapterJob:
    """What ``cdcda-export --adapter`` is asked for.

    Attributes:
        adapter: the PEFT directory.
        base: the base GGUF, None for the default one.
        out: the artifact's directory; None for ``<workspace>/_adapters/<name>/<format>-<quant>``.
        workspace: where shared parts live.
        text: a file of paragraphs (separated by blank lines) to verify on; None for the neutral text that ships.
        config: format, quantization, gate.
        redo: distrust what is there.
    """

    adapter: Path
    base: Path | None = None
    out: Path | None = None
    workspace: Path = Path("runs")
    text: Path | None = None
    config: ExportConfig = ExportConfig()
    redo: bool = False

    @property
    def directory(self) -> Path:
        """Where the artifact will lie."""
        return self.out or self.workspace / "_adapters" / self.adapter.resolve().name / self.config.directory


def adapter_hashes(directory: Path) -> dict[str, str]:
    """Return the hashes of an adapter's two files.

    Raises:
        AdapterError: the directory or one of them does not exist.
    """
    if not directory.is_dir():
        raise AdapterError(f"There is no adapter directory {directory}.")
    return {f"adapter/{name}": sha256_file(directory / name) for name in (CONFIG, WEIGHTS) if (directory / name).exists()}


def gate_hash(config: ExportConfig) -> str:
    """Return what identifies the gate: a tighter one makes a finished artifact stale."""
    return sha256_json(asdict(gate_of(config)))


def _texts(path: Path | None) -> list[str]:
    if path is None:
        return neutral_texts()
    try:
        found = paragraphs(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"Cannot read the text {path}: {error}.") from error
    if not found:
        raise ConfigError(f"{path} holds no paragraph of at least 20 characters to verify on.")
    return found


def neutral_probes(base: GgufFile, texts: Sequence[str], max_tokens: int) -> list[Probe]:
    """Return texts as exchanges: the first words asked, the rest answered; ids are llama.cpp's own on the base."""
    template = template_of(base)
    with LlamaCpp(base.path, vocab_only=True) as encoder:
        probes = []
        for text in texts:
            words = text.split()
            head, tail = " ".join(words[:8]), " ".join(words[8:]) or text
            probes.append(make_probe(template, encoder, [encoder.eos], f"{_NEUTRAL_PROMPT}\n\n{head}", tail, max_tokens))
        return probes


def stage_of(job: AdapterJob, base_sha256: str) -> Stage:
    """Return the stage of an adapter export."""
    inputs = {
        "base": base_sha256,
        "gate": gate_hash(job.config),
        "text": sha256_json(_texts(job.text)),
        **adapter_hashes(job.adapter),
    }
    return Stage(job.directory, asdict(job.config), inputs, job.redo)


def export_adapter(job: AdapterJob, progress: Progress) -> dict[str, Any]:
    """Export one adapter, and return its card.

    A finished artifact of the same inputs is reused. The artifact is complete and verified when this returns, or an error was raised.

    Raises:
        ExportError: the adapter and the base do not fit.
        VerificationFailed: the artifact is outside its gate.
    """
    base = open_base(job.base)
    check_combination(job.config, base)
    base_sha256 = sha256_file(base.path)
    stage = stage_of(job, base_sha256)
    manifest = stage.finished()
    if manifest is None:
        began = time.monotonic()
        partial = stage.begin()
        card = _build(job, base, base_sha256, partial, progress)
        card["stages"] = [{"name": stage.name, "seconds": time.monotonic() - began, "reused": False}]
        write_json(partial / "card.json", card)
        write_report(card, partial / "report.html")
        stage.finish({"card": card}, [*card.pop("_outputs"), "card.json", "report.html"])
        return card
    card = dict(manifest.metrics["card"])
    card["stages"] = [{"name": stage.name, "seconds": 0.0, "reused": True}]
    return card


def _build(job: AdapterJob, base: GgufFile, base_sha256: str, partial: Path, progress: Progress) -> dict[str, Any]:
    adapter = load_adapter(job.adapter, base, progress)
    probes = neutral_probes(base, _texts(job.text), job.config.max_tokens)
    artifact = write_artifact(Order(base, base_sha256, adapter, job.config, partial, job.workspace / "_shared"), progress)
    with open_artifact(artifact, job.config.max_tokens) as (runtime, template):
        verification = verify_artifact(artifact, runtime, template, probes, base, adapter, job.config, progress)
        answers = [runtime.decode(runtime.greedy(list(p.prompt), job.config.answer_tokens)) for p in probes[:_SAMPLES]]
    with LlamaCpp(base.path, n_ctx=job.config.max_tokens) as runtime:
        base_answers = [runtime.decode(runtime.greedy(list(p.prompt), job.config.answer_tokens)) for p in probes[:_SAMPLES]]
    described = artifact.as_card(job.directory)
    bundled = write_bundle(partial, base, base_sha256, artifact.files, described, verification.as_card(), [])
    return {
        "user": None,
        "adapter": str(job.adapter),
        "base": {"name": base.path.name, "sha256": base_sha256},
        "artifact": described,
        "verification": verification.as_card(),
        "personal_gain": None,
        "tasks": [],
        "samples": [
            {
                "task": "text",
                "input": p.user_text.removeprefix(_NEUTRAL_PROMPT).strip(),
                "base": b,
                "personal": a,
                "user": p.answer_text,
            }
            for p, a, b in zip(probes, answers, base_answers, strict=False)
        ],
        "training": None,
        "augmentation": None,
        "warnings": list(getattr(progress, "warnings", [])),
        "next": next_commands(job.directory, artifact.format, artifact.main.name),
        "versions": versions(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "_outputs": [*artifact.outputs, *bundled],
    }


def next_commands(directory: Path, kind: str, file: str) -> list[list[str]]:
    """Return what a user can do with an artifact, as (purpose, command) pairs."""
    commands = [["Talk to it", f"cdcda chat {shlex.quote(str(directory))}"], ["Read the report", str(directory / "report.html")]]
    if kind == "gguf":
        commands.append(["Run it in llama.cpp", f"llama-cli -m {shlex.quote(str(directory / file))}"])
    if kind == "gguf-lora":
        commands.append(["Run it in llama.cpp", f"llama-cli -m BASE.gguf --lora {shlex.quote(str(directory / file))}"])
    return commands


def read_card(directory: Path) -> dict[str, Any]:
    """Return the card of a finished artifact directory.

    Raises:
        FileError: there is no finished artifact in it.
    """
    manifest = read_manifest(directory)
    if manifest is None or "card" not in manifest.metrics:
        raise FileError(f"{directory} holds no finished artifact; run cdcda-export first.")
    return dict(manifest.metrics["card"])
