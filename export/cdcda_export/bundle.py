"""What leaves the house: the artifact, ``bundle.json`` and the licences. The app reads only this; no text of the user's is in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cdcda_export.cache import sha256_of
from cdcda_export.errors import FileError, VerificationFailed
from cdcda_export.gguf import GgufFile
from cdcda_export.manifest import outputs_intact, read_manifest, write_atomic, write_json

BUNDLE, LICENCES = "bundle.json", "LICENCES.txt"
SCHEMA = 1


def kv_bytes_per_token(base: GgufFile) -> int:
    """Return the size of one token's keys and values in float16, in bytes."""
    heads = int(base.hparam("attention.head_count"))
    head_dim = int(base.hparam("attention.key_length", int(base.hparam("embedding_length")) // heads))
    return 2 * 2 * int(base.hparam("block_count")) * int(base.hparam("attention.head_count_kv", heads)) * head_dim


def write_bundle(
    directory: Path,
    base: GgufFile,
    base_sha256: str,
    files: dict[str, Path],
    artifact: dict[str, Any],
    verification: dict[str, Any],
    presets: Sequence[dict[str, str]],
    hashes: Mapping[str, str],
) -> list[str]:
    """Write ``bundle.json`` and the licences beside an artifact.

    Args:
        directory: the artifact's directory.
        base: the base model.
        base_sha256: its hash.
        files: role (``model``, ``adapter``) -> file; paths inside ``directory`` are written relative, others by name only.
        artifact: format, quant, tensor types.
        verification: the gates and what was measured.
        presets: name and instruction of the tasks that the app offers.
        hashes: SHA-256 of files, by name, that are known already.

    Returns:
        The names written.
    """
    entries = {
        role: {
            "file": path.name,
            "bytes": path.stat().st_size,
            "sha256": hashes.get(path.name) if path.parent == directory and path.name in hashes else sha256_of(path),
            "beside": path.parent == directory,
        }
        for role, path in files.items()
    }
    context = min(int(base.hparam("context_length")), 2048)
    weights = sum(path.stat().st_size for path in files.values())
    bundle = {
        "schema": SCHEMA,
        "format": artifact["format"],
        "quant": artifact["quant"],
        "tensor_types": artifact["tensor_types"],
        "files": entries,
        "base": {
            "name": str(base.get_value("general.name") or base.path.stem),
            "file": base.path.name,
            "sha256": base_sha256,
            "architecture": base.architecture,
            "license": str(base.get_value("general.license") or "unknown"),
        },
        "context_length": context,
        "memory_bytes": weights + context * kv_bytes_per_token(base),
        "presets": list(presets),
        "verification": verification,
        "licences": LICENCES,
    }
    write_json(directory / BUNDLE, bundle)
    write_atomic(directory / LICENCES, _licences(base))
    return [BUNDLE, LICENCES]


def require_verified(directory: Path) -> dict[str, Any]:
    """Return the ``bundle.json`` of an artifact that may go onto a phone: finished, unchanged, verified in full.

    Raises:
        FileError: there is no finished artifact, or it was changed.
        VerificationFailed: it was checked quickly or not at all.
    """
    manifest = read_manifest(directory)
    if manifest is None or not outputs_intact(directory, manifest):
        raise FileError(f"{directory} is unfinished or was changed since it was exported; run cdcda-export again.")
    bundle: dict[str, Any] = json.loads((directory / BUNDLE).read_text(encoding="utf-8"))
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
