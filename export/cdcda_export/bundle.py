"""What leaves the house: the artifact, ``bundle.json`` and the licences. The app reads only this; no text of the user's is in it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdcda_export.cache import sha256_of
from cdcda_export.errors import FileError, VerificationFailed
from cdcda_export.gguf import GgufFile
from cdcda_export.manifest import outputs_intact, read_manifest, write_atomic, write_json

if TYPE_CHECKING:
    from cdcda_export.artifact import Artifact
    from cdcda_export.base import Base

BUNDLE, LICENCES = "bundle.json", "LICENCES.txt"
SCHEMA = 3


def kv_bytes_per_token(base: GgufFile) -> int:
    """Return the size of one token's keys and values in float16, in bytes."""
    heads = int(base.hparam("attention.head_count"))
    head_dim = int(base.hparam("attention.key_length", int(base.hparam("embedding_length")) // heads))
    return 2 * 2 * int(base.hparam("block_count")) * int(base.hparam("attention.head_count_kv", heads)) * head_dim


# Fitted to the peaks of SmolLM2-135M and Qwen2.5-0.5B in llama.cpp; benchmarks/latency.py holds it against measured ones.
_UBATCH, _CACHE_STEP, _RUNTIME_BYTES, _TOKEN_BYTES = 512, 256, 15_000_000, 152
_FEED_FORWARD_ROWS, _HIDDEN_ROWS = 2.75, 5


def memory_needed(base: GgufFile, weights: int, context: int) -> int:
    """Return the bytes that a GGUF takes at its peak in llama.cpp: weights, cache, a batch of activations, and the vocabulary.

    Args:
        base: the model, or one with the same shape.
        weights: bytes of everything that is loaded.
        context: tokens.
    """
    cache = -(-context // _CACHE_STEP) * _CACHE_STEP * kv_bytes_per_token(base)
    columns = _FEED_FORWARD_ROWS * int(base.hparam("feed_forward_length")) + _HIDDEN_ROWS * int(base.hparam("embedding_length"))
    vocabulary = base["token_embd.weight"].shape[0] * _TOKEN_BYTES
    return int(weights + cache + _UBATCH * 4 * columns + vocabulary + _RUNTIME_BYTES)


def write_bundle(
    directory: Path,
    base: Base,
    artifact: Artifact,
    described: dict[str, Any],
    verification: dict[str, Any],
    presets: Sequence[dict[str, str]],
    learned_from: Mapping[str, int] | None,
) -> list[str]:
    """Write ``bundle.json`` and the licences beside an artifact.

    Args:
        directory: the artifact's directory; a file elsewhere (the base of ``gguf-lora``) is named by its way from here.
        base: the base model.
        artifact: what was written.
        described: the artifact's part of the card.
        verification: the gates and what was measured.
        presets: name and instruction of the tasks that the app offers.
        learned_from: how many ``records`` of the user's and ``synthetic`` ones; None for an adapter from elsewhere.

    Returns:
        The names written.
    """
    file = base.file
    context = min(int(file.hparam("context_length")), 2048)
    weights = sum(path.stat().st_size for path in artifact.files.values())
    bundle = {
        "schema": SCHEMA,
        "format": artifact.format,
        "quant": artifact.quant,
        "tensor_types": described["tensor_types"],
        "files": {role: _entry(directory, path, artifact.hashes) for role, path in artifact.files.items()},
        "base": {
            "name": str(file.get_value("general.name") or Path(base.name).stem),
            "file": base.name,
            "sha256": base.sha256,
            "architecture": file.architecture,
            "license": str(file.get_value("general.license") or "unknown"),
        },
        "context_length": context,
        "memory_bytes": memory_needed(file, weights, context),
        "cache_bytes_per_token": kv_bytes_per_token(file),
        "presets": list(presets),
        "learned_from": dict(learned_from) if learned_from is not None else None,
        "verification": verification,
        "licences": LICENCES,
    }
    write_json(directory / BUNDLE, bundle)
    write_atomic(directory / LICENCES, _licences(file))
    return [BUNDLE, LICENCES]


def _entry(directory: Path, path: Path, hashes: Mapping[str, str]) -> dict[str, Any]:
    beside = path.parent == directory
    return {
        "file": path.name,
        "path": path.name if beside else os.path.relpath(path, directory),
        "bytes": path.stat().st_size,
        "sha256": hashes[path.name] if beside and path.name in hashes else sha256_of(path),
        "beside": beside,
    }


def read_bundle(directory: Path) -> dict[str, Any]:
    """Return the ``bundle.json`` of a finished artifact whose every file is what it was, those elsewhere included.

    Raises:
        FileError: there is no finished artifact, or something of it was changed or is gone.
    """
    manifest = read_manifest(directory)
    if manifest is None or BUNDLE not in manifest.outputs:
        raise FileError(f"{directory} holds no finished artifact; run cdcda-export first.")
    if not outputs_intact(directory, manifest):
        raise FileError(f"{directory} was changed since it was exported; run cdcda-export again.")
    bundle: dict[str, Any] = json.loads((directory / BUNDLE).read_text(encoding="utf-8"))
    if bundle.get("schema") != SCHEMA:
        raise FileError(f"{directory} was exported by another version of cdcda-mobile; run cdcda-export again.")
    for entry in bundle["files"].values():
        path = directory / entry["path"]
        if not entry["beside"] and (not path.is_file() or sha256_of(path) != entry["sha256"]):
            raise FileError(f"The shared base of {directory} is gone or was changed; run cdcda-export again.")
    return bundle


def require_verified(directory: Path) -> dict[str, Any]:
    """Return the ``bundle.json`` of an artifact that may go onto a phone: finished, unchanged, verified in full.

    Raises:
        FileError: there is no finished artifact, or it was changed.
        VerificationFailed: it was checked quickly or not at all.
    """
    bundle = read_bundle(directory)
    verification = bundle["verification"]
    if verification["level"] != "full" or verification["passed"] is not True:
        raise VerificationFailed(
            f"{directory} was exported with --verify {verification['level']}; run cdcda-export again with --verify full before it goes "
            "onto a phone."
        )
    return bundle


def _licences(base: GgufFile) -> str:
    name = base.get_value("general.name") or base.path.stem
    licence = base.get_value("general.license") or "unknown: ask its publisher"
    author = base.get_value("general.organization") or base.get_value("general.author") or "its authors"
    return (
        f"Base model: {name}, by {author}. Licence: {licence}.\n"
        "The weights were changed: a personal LoRA adapter was merged or lies beside them, and they were quantized.\n\n"
        "Runtime: llama.cpp and ggml, Copyright (c) 2023-2026 The ggml authors. Licence: MIT.\n"
        "Exporter: CDCDA-mobile. Licence: Apache-2.0.\n"
    )
