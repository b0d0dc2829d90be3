"""Make one artifact, open it in its real runtime, and hold it to its gate: the table of formats."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from cdcda_export.adapter import Adapter, PeftWeights, base_warning, read_adapter, read_peft
from cdcda_export.arrival import TensorCheck, check_lora, check_merged
from cdcda_export.base import Base
from cdcda_export.cache import locked
from cdcda_export.chat_template import ChatTemplate, template_of
from cdcda_export.errors import ConfigError, ManifestError, VerificationFailed, did_you_mean
from cdcda_export.gates import Gate, get_gate
from cdcda_export.ggml import GgmlType
from cdcda_export.gguf import GgufFile
from cdcda_export.lora_gguf import write_lora_gguf
from cdcda_export.manifest import Stage, sha256_file, sha256_json
from cdcda_export.merge import Importance, merge_to_gguf, quantized_base, untouched
from cdcda_export.onnx_arrival import check_onnx
from cdcda_export.progress import Progress
from cdcda_export.quantization import IGNORE_IMPORTANCE, QUANTS, choose_types, get_quant, is_double_quantized, quant_of_base
from cdcda_export.recipe import ExportConfig
from cdcda_export.reference import merged_reference
from cdcda_export.runtime import LlamaCpp
from cdcda_export.verify import Probe, Runtime, Verification, unverified, verify, verify_quick

ONNX_QUANTS = ("int8", "int4")

_Extra = TypeVar("_Extra")


@dataclass(frozen=True)
class Artifact:
    """A written artifact, not yet verified.

    ``main`` is the file a user asks for; ``files`` maps roles to paths; ``outputs`` are the names inside the stage's directory, and
    ``hashes`` their SHA-256 where writing them gave it.
    """

    format: str
    quant: str
    main: Path
    files: dict[str, Path]
    outputs: list[str]
    tensor_types: dict[str, int]
    double_quantized: str | None
    hashes: dict[str, str] = field(default_factory=dict)

    def as_card(self, directory: Path) -> dict[str, Any]:
        """Return the card's part of it; ``directory`` is where the artifact will finally lie."""
        return {
            "file": str(directory / self.main.name),
            "bytes": sum(path.stat().st_size for path in self.files.values() if path.parent == self.main.parent),
            "format": self.format,
            "quant": self.quant,
            "tensor_types": self.tensor_types,
            "double_quantized": self.double_quantized,
            "sha256": self.hashes.get(self.main.name) or sha256_file(self.main),
        }


def check_combination(config: ExportConfig, base: GgufFile) -> None:
    """Refuse what cannot work before anything expensive runs.

    Raises:
        ConfigError: the quantization is not one of this format's.
        QuantizationError: the base's rows cannot take it.
        UnsupportedArchitecture: the base's tensor mapping is not known.
    """
    from cdcda_export.architectures import get_architecture

    get_architecture(base.architecture, str(base.path))
    quant = config.resolved_quant
    known: Sequence[str] = ONNX_QUANTS if config.format == "onnx" else [name for name in QUANTS if name != "f32"]
    if quant not in known:
        raise ConfigError(f"--format {config.format} has no quantization '{quant}'.{did_you_mean(quant, known)}")
    if config.format == "onnx":
        return
    types = types_of(config, base)
    if config.importance != "none" and all(kind.name in IGNORE_IMPORTANCE for kind in types.values()):
        raise ConfigError(f"--importance user changes nothing at {quant}: 8 bits and floats are rounded the same way; leave it out.")


def types_of(config: ExportConfig, base: GgufFile) -> dict[str, GgmlType]:
    """Return the type of every tensor of a GGUF artifact.

    Raises:
        QuantizationError: the base's rows cannot take the quantization.
        ConfigError: an override of the recipe makes no sense.
    """
    quant = get_quant(config.resolved_quant)
    plain = choose_types(base, quant, config.allow_fallback, config.tensor_types)
    if config.importance == "none":
        return plain
    weighed = choose_types(base, quant, config.allow_fallback, config.tensor_types, importance=True)
    # llama-quantize gives a few tensors another type when it weighs. Where that is the coarse type they have in the base already, the
    # weighted search would find the old grid again and the person's change with it be lost: those keep the plain choice.
    return {name: plain[name] if kind == base[name].type and kind.block_size > 1 else kind for name, kind in weighed.items()}


def gate_of(config: ExportConfig, base: GgufFile) -> Gate:
    """Return the gate: the recipe's bounds where it sets them, else the measured one."""
    if config.max_kl and config.min_top1 and config.max_arrival_error:
        return Gate(config.max_kl, config.min_top1, config.max_arrival_error)
    quant = quant_of_base(base).name if config.resolved_quant == "base" else config.resolved_quant
    measured = get_gate(f"{quant}+importance" if config.importance != "none" else quant)
    return Gate(config.max_kl or measured.kl, config.min_top1 or measured.top1, config.max_arrival_error or measured.arrival)


@dataclass(frozen=True)
class Order:
    """What is to be written, and where.

    Attributes:
        base: the base model.
        adapter: the adapter, matched to it.
        config: format, quantization, verification.
        directory: the stage's partial directory.
        shared: where what belongs to no single user is kept (the base of ``gguf-lora``).
        importance: GGUF tensor -> mean squared input of each column, for the quantizer; None for none.
    """

    base: Base
    adapter: Adapter
    config: ExportConfig
    directory: Path
    shared: Path
    importance: Importance | None = None


def write_artifact(order: Order, progress: Progress) -> Artifact:
    """Write an artifact into a partial stage directory; nothing of it is verified yet."""
    return _WRITERS[order.config.format](order, progress)


def _write_merged(order: Order, progress: Progress) -> Artifact:
    base, quant, types = order.base.file, get_quant(order.config.resolved_quant), types_of(order.config, order.base.file)
    kept = None
    if next(untouched(base, order.adapter, types, order.importance), None) is not None:
        kept = quantized_base(base, order.base.sha256, types, quant)
    progress.start(f"merging and quantizing to {quant.name}", len(base), "tensors")
    path = order.directory / "model.gguf"
    result = merge_to_gguf(base, order.adapter, types, quant, path, lambda _: progress.advance(), order.importance, kept)
    progress.done(f"{result.bytes / 1e6:.1f} MB")
    hashes = {path.name: result.sha256}
    return Artifact("gguf", quant.name, path, {"model": path}, [path.name], result.types, result.double_quantized, hashes)


def _write_lora(order: Order, progress: Progress) -> Artifact:
    model = _shared_base(order, progress)
    result = write_lora_gguf(order.base.file, order.adapter, order.directory / "adapter.gguf")
    progress.say(f"adapter of {result.bytes / 1e6:.1f} MB for the shared base {model}")
    file, types = GgufFile(model), types_of(order.config, order.base.file)
    return Artifact(
        "gguf-lora",
        order.config.resolved_quant,
        result.path,
        {"adapter": result.path, "model": model},
        ["adapter.gguf"],
        file.type_histogram(),
        is_double_quantized(order.base.file, types),
        {"adapter.gguf": result.sha256},
    )


def _shared_base(order: Order, progress: Progress) -> Path:
    """Return the base in the quantization asked for, beside the users who share it; two of them do not make it twice."""
    quant = get_quant(order.config.resolved_quant)
    settings = {"quant": quant.name, "allow_fallback": order.config.allow_fallback, "tensor_types": order.config.settings()["tensor_types"]}
    # Two users who ask for other types of the same base must not replace each other's.
    name = f"base-{quant.name}-{sha256_json({'base': order.base.sha256, **settings})[:12]}"
    stage = Stage(order.shared / name, settings, {"base": order.base.sha256})
    with locked(order.shared, stage.name):
        try:
            manifest = stage.finished()
        except ManifestError:
            manifest = None  # it is made of the base alone and belongs to no user: build it anew instead of asking
        if manifest is None:
            progress.start(f"quantizing the base to {quant.name}")
            kept = quantized_base(order.base.file, order.base.sha256, types_of(order.config, order.base.file), quant)
            shutil.copyfile(kept.path, stage.begin() / "model.gguf")
            stage.finish({}, ["model.gguf"])
            progress.done()
    return stage.directory / "model.gguf"


def _write_onnx(order: Order, progress: Progress) -> Artifact:
    from cdcda_export.onnx import export_onnx

    quant, peft = order.config.resolved_quant, read_peft(order.adapter.path)
    result = export_onnx(order.base.file, order.base.sha256, peft, quant, order.directory, progress)
    main = result.files["model.onnx"]
    files = {"model": main} | {name: path for name, path in sorted(result.files.items()) if path != main}
    return Artifact("onnx", quant, main, files, sorted(result.files), result.tensor_types, None, result.hashes)


_WRITERS: dict[str, Callable[[Order, Progress], Artifact]] = {"gguf": _write_merged, "gguf-lora": _write_lora, "onnx": _write_onnx}


@contextmanager
def open_artifact(artifact: Artifact, n_ctx: int) -> Iterator[tuple[Runtime, ChatTemplate]]:
    """Load an artifact in its real runtime, and give the chat template that it carries itself."""
    if artifact.format == "onnx":
        from cdcda_export.onnx import OnnxModel

        source = artifact.main.with_name("chat_template.jinja").read_text(encoding="utf-8")
        with OnnxModel(artifact.main.parent) as model:
            yield model, ChatTemplate(source)
        return
    with LlamaCpp(artifact.files["model"], n_ctx=n_ctx, adapter=artifact.files.get("adapter")) as runtime:
        yield runtime, template_of(GgufFile(artifact.files["model"]))


# Every rewritten tensor read back from the file and compared with what base and adapter say it should be.
CHECKS: dict[str, Callable[[GgufFile, Artifact, PeftWeights], list[TensorCheck]]] = {
    "gguf": lambda base, artifact, peft: check_merged(base, GgufFile(artifact.main), peft),
    "gguf-lora": lambda base, artifact, peft: check_lora(base, artifact.main, peft),
    "onnx": lambda base, artifact, peft: check_onnx(base, artifact.main, peft),
}


def verify_artifact(
    artifact: Artifact,
    runtime: Runtime,
    template: ChatTemplate,
    probes: Sequence[Probe],
    base: Base,
    adapter: Adapter,
    config: ExportConfig,
    progress: Progress,
) -> Verification:
    """Verify an opened artifact at the level that the config asks for, ``full`` or ``quick``.

    Raises:
        VerificationFailed: it is outside its gate.
    """
    progress.start("reading the rewritten tensors back")
    checks, gate = CHECKS[artifact.format](base.file, artifact, read_peft(adapter.path)), gate_of(config, base.file)
    progress.done(f"{len(checks)} tensors")
    if config.verify == "quick":
        result = verify_quick(runtime, template, probes, gate, progress, checks)
    else:
        with merged_reference(base, adapter, config.max_tokens) as (reference, name):
            result = verify(runtime, template, probes, reference, name, gate, progress, checks)
    if not result.passed:
        raise VerificationFailed(f"The {config.directory} artifact did not pass its gate and is not shipped: {'; '.join(result.failures)}.")
    return result


def make_artifact(
    order: Order,
    probes: Callable[[], Sequence[Probe]],
    progress: Progress,
    evaluate: Callable[[Runtime, Sequence[Probe], Verification], _Extra],
) -> tuple[Artifact, Verification, _Extra | None]:
    """Write an artifact and verify it at the level that the config asks for.

    Args:
        order: what to write.
        probes: gives the held-out exchanges to verify on; not asked at level ``off``.
        progress: told of every step.
        evaluate: asked at level ``full``, while the artifact is loaded, for what else the card should say.

    Raises:
        VerificationFailed: it is outside its gate.
    """
    artifact = write_artifact(order, progress)
    if order.config.verify == "off":
        return artifact, unverified(), None
    exchanges = probes()
    full = order.config.verify == "full"
    # A quick check reads one text, and llama.cpp's memory and time to load grow with the context it is given.
    context = order.config.max_tokens if full else min(len(probe.ids) for probe in exchanges) + 1
    with open_artifact(artifact, context) as (runtime, template):
        result = verify_artifact(artifact, runtime, template, exchanges, order.base, order.adapter, order.config, progress)
        extra = evaluate(runtime, exchanges, result) if full else None
    return artifact, result, extra


def load_adapter(path: Path, base: Base, progress: Progress) -> Adapter:
    """Read an adapter, and warn if it names another base."""
    adapter = read_adapter(path, base.file)
    warning = base_warning(adapter, base.file, base.name)
    if warning:
        progress.warn(warning)
    return adapter
