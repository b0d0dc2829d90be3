"""Hugging Face models as bases: a directory or a hub id becomes a GGUF once, by llama.cpp's own converter, and is kept in the cache.

Only safetensors, configs and tokenizer files are read: no pickle is opened and no code that a model brings along is run.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from cdcda_export.cache import cached, sha256_of
from cdcda_export.converter import CONVERT_MODEL, converter_version, run_converter
from cdcda_export.errors import DiskFull, FileError, MissingDependency, UnsupportedArchitecture, is_disk_full
from cdcda_export.progress import Progress
from cdcda_export.safetensors_file import read_header

# transformers' class -> the GGUF architecture; what cdcda_export.architectures can map.
HF_ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "Gemma3ForCausalLM": "gemma3"}
# What a conversion reads, and all that is fetched from a hub.
_PATTERNS = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*")
_OUTTYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_INDEX = "model.safetensors.index.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def resolve_base(path_or_id: str | Path, progress: Progress) -> Path:
    """Return the GGUF of a base model.

    Args:
        path_or_id: a GGUF file, a directory with ``config.json`` and safetensors, or a hub id (``org/name``).
        progress: told about fetching and converting, which happen once per model.

    Raises:
        FileError: there is no such model, or it is incomplete, a pickle, quantized, or cannot be fetched.
        UnsupportedArchitecture: its architecture cannot be exported.
        MissingDependency: a package that the conversion needs is not installed.
        ExportError: llama.cpp's converter refused it.
        DiskFull: there is no room for it.
    """
    try:
        path = Path(path_or_id).expanduser()
        is_directory, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError) as error:  # too long a name, an unknown user after ~
        raise FileError(f"There is no base model {str(path_or_id)[:80]!r} ({_first_line(error)[:80]}).") from error
    if is_directory:
        return convert_directory(path, _name_of(path), progress)
    if exists or path.suffix == ".gguf" or not _HUB_ID.fullmatch(str(path_or_id)):
        return path  # whoever opens it says what is wrong with it
    return convert_directory(_fetch(str(path_or_id), progress), path.name, progress)


def convert_directory(directory: Path, name: str, progress: Progress) -> Path:
    """Return the GGUF of a Hugging Face directory, in the type that its weights are stored in; converted the first time.

    Args:
        directory: holds ``config.json``, the tokenizer's files and safetensors.
        name: what the model is called (``general.name`` derives from it).
        progress: told about the conversion.

    Raises:
        FileError, UnsupportedArchitecture, MissingDependency, ExportError, DiskFull: see ``resolve_base``.
    """
    check_directory(directory)
    inputs = conversion_inputs(directory, name)

    def build(partial: Path) -> dict[str, Any]:
        # The converter sees the hashed files and no others: no pickles, no code.
        staged = partial / "source" / name
        staged.mkdir(parents=True)
        for file in inputs["files"]:
            (staged / file).symlink_to((directory / file).resolve())
        target = partial / "model.gguf"
        progress.start("converting the base model (once)", 100, "%")
        seen = 0

        def advance(percent: int) -> None:
            nonlocal seen
            progress.advance(max(0, percent - seen))
            seen = max(seen, percent)

        run_converter(CONVERT_MODEL, [staged, "--outfile", target, "--outtype", inputs["outtype"]], advance)
        shutil.rmtree(partial / "source")
        with target.open("rb") as stream:
            os.fsync(stream.fileno())
        progress.done(f"{target.stat().st_size / 1e6:.0f} MB, {inputs['outtype']}")
        return {"name": name}

    return cached("bases", inputs, build).directory / "model.gguf"


def conversion_inputs(directory: Path, name: str) -> dict[str, Any]:
    """Return all that decides a conversion's result: the model's name and files by content, the type, the converter's version."""
    files = sorted(path for pattern in _PATTERNS for path in directory.glob(pattern) if path.is_file())
    return {
        "name": name,
        "outtype": _outtype(_weights(directory)),
        "converter": converter_version(),
        "files": {path.name: sha256_of(path) for path in files},
    }


def check_directory(directory: Path) -> None:
    """Refuse what cannot be converted, before anything expensive runs.

    Raises:
        FileError: files are missing, it is a pickle or quantized, or brings code of its own.
        UnsupportedArchitecture: its architecture cannot be exported.
    """
    if not (directory / "config.json").is_file():
        raise FileError(f"{directory} holds no config.json; name a GGUF file, or a directory that transformers' save_pretrained wrote.")
    config = _read_json(directory / "config.json")
    tokenizer_config = _read_json(directory / "tokenizer_config.json") if (directory / "tokenizer_config.json").is_file() else {}
    named = config.get("architectures") or ["none"]
    named = named[0] if isinstance(named, list) else named
    if not isinstance(named, str) or named not in HF_ARCHITECTURES:
        known = ", ".join(HF_ARCHITECTURES)
        raise UnsupportedArchitecture(f"{directory} is a {_word(named)}, which cannot be exported; these can: {known}.")
    for name, values in (("config.json", config), ("tokenizer_config.json", tokenizer_config)):
        if values.get("auto_map"):
            raise FileError(f"{directory} brings code of its own (auto_map in {name}), which is never run; use a model without.")
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise FileError(f"{directory} is quantized already ({_word(method)}); name the model in float16, bfloat16 or float32.")
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise FileError(f"{directory} holds no tokenizer.json or tokenizer.model; copy the tokenizer's files beside config.json.")
    missing = [path.name for path in _weights(directory) if not path.is_file()]
    if missing:
        raise FileError(f"{directory} lacks {_word(missing[0])}, which its index names; copy the whole model.")


def _weights(directory: Path) -> list[Path]:
    """Return the checkpoint's safetensors files."""
    if (directory / _INDEX).is_file():
        places = _read_json(directory / _INDEX).get("weight_map")
        names = list(places.values()) if isinstance(places, dict) else []
        # A path would lead out of the directory that was named.
        if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
            raise FileError(f"{directory / _INDEX} does not name the files of its weights; fetch the model again.")
        return [directory / name for name in sorted(set(names))]
    found = sorted(directory.glob("model*.safetensors"))
    if not found and any(directory.glob("*.bin")):
        raise FileError(f"{directory} holds only pickles (.bin), which are never loaded; save the model with safe_serialization=True.")
    if not found:
        raise FileError(f"{directory} holds no model.safetensors; save the model with transformers' save_pretrained.")
    return found


def _outtype(paths: list[Path]) -> str:
    """Return the converter's type that loses nothing: the stored one, or float32 where it is mixed."""
    kinds = {entry.dtype for path in paths for entry in read_header(path).values()}
    strange = kinds - _OUTTYPES.keys()
    if strange:
        raise FileError(f"{paths[0].parent} stores weights as {_word(min(strange))}; name the model in float16, bfloat16 or float32.")
    return _OUTTYPES[kinds.pop()] if len(kinds) == 1 else "f32"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{path} is not readable JSON; fetch the model again.") from error
    if not isinstance(values, dict):
        raise FileError(f"{path} is not a JSON object; fetch the model again.")
    return values


def _name_of(directory: Path) -> str:
    """Return a directory's name; that of the model for a snapshot in the hub's own cache (``models--org--name/snapshots/HASH``)."""
    directory = directory.resolve()
    hub = re.fullmatch(r"models--.+--(.+)", directory.parent.parent.name) if directory.parent.name == "snapshots" else None
    return hub[1] if hub else directory.name or "model"


def _fetch(hub_id: str, progress: Progress) -> Path:
    """Return a hub model's snapshot: the local one where it is whole, else a download of the files that a conversion reads."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as error:
        raise MissingDependency("huggingface_hub", "hf") from error
    try:
        local = Path(snapshot_download(hub_id, local_files_only=True))
        check_directory(local)
        return local
    except (LocalEntryNotFoundError, FileError):
        pass  # nothing local, or only part of it
    except (OSError, ValueError) as error:
        raise FileError(f"'{hub_id}' is no file, no directory and no valid hub id ({_first_line(error)}).") from error
    progress.start(f"fetching {hub_id}")
    try:
        fetched = Path(snapshot_download(hub_id, allow_patterns=list(_PATTERNS), ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and is_disk_full(error):
            raise DiskFull(f"The disk filled up while {hub_id} was fetched; free some space and run again.") from error
        raise FileError(
            f"There is no file or directory {hub_id}, and no model of that name could be fetched ({_first_line(error)});"
            " check the name and the network, or name a GGUF file."
        ) from error
    progress.done()
    return fetched


def _word(value: object) -> str:
    """Return what a model says of itself as a short word that cannot disturb a sentence or a terminal."""
    return re.sub(r"[^\w.-]+", " ", str(value))[:40].strip()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".: ")
