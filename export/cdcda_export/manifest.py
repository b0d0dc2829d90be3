"""Stages meet only in directories: how one is built, finished, recognised and reused.

A stage is built in ``<name>.partial/``; ``manifest.json`` is written into it last and atomically, and only then does the
directory take its final name. So a directory with its final name is complete, whatever was killed and when.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from cdcda_export.errors import FileError, ManifestError
from cdcda_export.folders import discard, empty, make_private, writing

MANIFEST = "manifest.json"
FINGERPRINT = ".fingerprint"
_MARKS = (MANIFEST, FINGERPRINT)
SCHEMA = 1
_PACKAGES = ("cdcda-mobile", "numpy", "llama-cpp-python", "torch", "transformers", "peft", "onnxruntime", "onnx")


@dataclass(frozen=True)
class Manifest:
    """What a finished stage says of itself.

    ``fingerprint`` identifies stage, config and inputs; ``outputs`` maps file names inside the stage's directory to
    ``{"sha256": hex, "bytes": int}``; ``metrics`` is stage-specific and JSON-serialisable.
    """

    stage: str
    fingerprint: str
    config: dict[str, Any]
    inputs: dict[str, str]
    outputs: dict[str, dict[str, Any]]
    metrics: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    created: str = ""
    schema: int = SCHEMA


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file as hex."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise FileError(f"Cannot read {path}: {error.strerror or error}.") from error


def sha256_json(value: object) -> str:
    """Return the SHA-256 of a value's canonical JSON as hex."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide results, where installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_atomic(path: Path, data: bytes | str, mode: int = 0o600) -> None:
    """Write a file so that a reader sees the old content or the new, never a part; private by default."""
    payload = data.encode() if isinstance(data, str) else data
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        make_private(path.parent)
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(payload)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def write_json(path: Path, value: object) -> None:
    """Write a value as readable JSON, atomically and private."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False, sort_keys=False) + "\n")


def read_manifest(directory: Path) -> Manifest | None:
    """Return the manifest of a finished stage, or None where there is none.

    Raises:
        ManifestError: the file exists but is not a manifest; nothing in the directory is trusted then.
    """
    path = directory / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ManifestError(_corrupt(path, "cannot be read")) from error
    try:
        raw = json.loads(text)
        manifest = Manifest(**raw)
        well_formed = manifest.schema == SCHEMA and all({"sha256", "bytes"} <= set(o) for o in manifest.outputs.values())
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ManifestError(_corrupt(path, "is not a manifest")) from error
    if not well_formed:
        raise ManifestError(_corrupt(path, "has another schema"))
    return manifest


def _corrupt(path: Path, what: str) -> str:
    stage = path.parent.name
    return (
        f"{path} {what}, so nothing beside it is trusted; run again with `--redo {stage}` to build that stage anew "
        f"(the old directory is replaced only when the new one is complete)."
    )


class Stage:
    """One stage directory: find it finished, or build it in ``<name>.partial/`` and finish it.

    Args:
        directory: the final directory, for example ``runs/42/adapter``.
        config: everything that decides the outputs, JSON-serialisable.
        inputs: name -> hash of everything that is read.
        redo: distrust what is there, finished or partial.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any], inputs: Mapping[str, str], redo: bool = False) -> None:
        self.directory = directory
        self.name = directory.name
        self.config = dict(config)
        self.inputs = dict(inputs)
        self.redo = redo
        self.fingerprint = sha256_json({"stage": self.name, "config": self.config, "inputs": self.inputs, "schema": SCHEMA})
        self.partial = directory.with_name(f"{directory.name}.partial")
        self.old = directory.with_name(f"{directory.name}.old")

    def finished(self) -> Manifest | None:
        """Return the manifest if this very stage was finished before and its files are what they were."""
        if self.redo:
            return None
        self._recover()
        manifest = read_manifest(self.directory)
        if manifest is None or manifest.fingerprint != self.fingerprint:
            return None
        return manifest if outputs_intact(self.directory, manifest) else None

    def why(self) -> str:
        """Return why this stage has to be built, in a few words, or '' when it is finished; nothing on the disk changes.

        Raises:
            FileError: it has to be built, and something of another origin is in the way.
        """
        reason = self._reason()
        if reason:
            self._check_places()
        return reason

    def _reason(self) -> str:
        if self.redo:
            return "asked for with --redo"
        standing = self._standing()
        manifest = read_manifest(standing)
        if manifest is None:
            return "was interrupted, will resume" if self._resumes() else "not there yet"
        if manifest.fingerprint != self.fingerprint:
            return _difference(manifest, self)
        return "" if outputs_intact(standing, manifest) else "its files changed on disk"

    def _standing(self) -> Path:
        """Return the directory that holds the final name, or would if a killed swap were completed."""
        with writing(self.directory):
            if not self.directory.exists():
                for place in (self.partial, self.old):
                    if (place / MANIFEST).exists() and _is_ours(place):
                        return place
        return self.directory

    def _recover(self) -> None:
        """Complete a swap that was killed between taking the old name away and giving it to the new directory."""
        standing = self._standing()
        with writing(self.directory):
            if standing != self.directory:
                (standing / FINGERPRINT).unlink(missing_ok=True)
                os.replace(standing, self.directory)
            if (self.old / MANIFEST).exists() and _is_ours(self.old):
                discard(self.old, _MARKS)

    def _resumes(self) -> bool:
        """Say whether a killed run of the same fingerprint left its work; one that had finished is not built upon."""
        try:
            same = (self.partial / FINGERPRINT).read_text(encoding="utf-8") == self.fingerprint
            return same and not (self.partial / MANIFEST).exists()
        except (OSError, UnicodeDecodeError):
            return False

    def begin(self) -> Path:
        """Return the private directory to build in; what a killed run of the same fingerprint left is still there.

        Raises:
            FileError: it cannot be made, or something of another origin is in the way, which is never removed.
            DiskFull: there is no room.
        """
        self._check_places()
        with writing(self.partial):
            if self.partial.exists() and (self.redo or not self._resumes()):
                discard(self.partial, _MARKS)
            make_private(self.partial)
        self.redo = False
        write_atomic(self.partial / FINGERPRINT, self.fingerprint)
        return self.partial

    def _check_places(self) -> None:
        for place in (self.directory, self.partial, self.old):
            with writing(place):
                foreign = os.path.lexists(place) and not _is_ours(place)
            if foreign:
                raise FileError(f"{place} is there already and not ours, so it is not replaced; move it away or name another directory.")

    def finish(
        self, metrics: Mapping[str, Any], outputs: list[str], keep: tuple[str, ...] = (), hashes: Mapping[str, str] | None = None
    ) -> Manifest:
        """Hash the outputs, write the manifest last, and give the directory its final name.

        Files that are neither outputs nor named in ``keep`` (checkpoints, marks) are removed. ``hashes`` holds the SHA-256 of outputs
        that were hashed while they were written.

        Raises:
            FileError: an output is missing, or something of another origin has taken the directory's name meanwhile.
            DiskFull: there is no room.
        """
        known = hashes or {}
        hashed = {
            name: {"sha256": known.get(name) or sha256_file(self.partial / name), "bytes": (self.partial / name).stat().st_size}
            for name in outputs
        }
        with writing(self.partial):
            # The mark goes after the manifest came: until then it says whose directory this is.
            empty(self.partial, {*(o.split("/")[0] for o in outputs), *keep, FINGERPRINT})
        manifest = Manifest(
            stage=self.name,
            fingerprint=self.fingerprint,
            config=self.config,
            inputs=self.inputs,
            outputs=hashed,
            metrics=dict(metrics),
            versions=versions(),
            created=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        write_json(self.partial / MANIFEST, asdict(manifest))
        self._check_places()
        with writing(self.directory):
            (self.partial / FINGERPRINT).unlink(missing_ok=True)
            if self.old.exists():
                discard(self.old, _MARKS)
            if self.directory.exists():
                os.replace(self.directory, self.old)
            os.replace(self.partial, self.directory)
            if self.old.exists():
                discard(self.old, _MARKS)
        return manifest


def _is_ours(directory: Path) -> bool:
    """Say whether a stage made this directory, so that it may be replaced: it has our manifest or mark, or nothing in it.

    Raises:
        OSError: it cannot be read, or is no directory.
    """
    if directory.is_symlink():
        return False
    names = {child.name for child in directory.iterdir()} - {f".{FINGERPRINT}.tmp"}
    if names and names.isdisjoint(_MARKS):
        return False
    if MANIFEST not in names:
        return True
    try:
        stored = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return True  # a damaged one: it can be built anew with --redo
    return not isinstance(stored, dict) or not stored or not stored.keys().isdisjoint(("stage", "fingerprint", "schema"))


def _difference(manifest: Manifest, stage: Stage) -> str:
    for key in sorted({*manifest.inputs, *stage.inputs}):
        if manifest.inputs.get(key) != stage.inputs.get(key):
            return f"its input '{key}' changed"
    for key in sorted({*manifest.config, *stage.config}):
        before, now = manifest.config.get(key), stage.config.get(key)
        if before != now:
            return f"{key} changed from {before!r} to {now!r}"
    return "its definition changed"


def outputs_intact(directory: Path, manifest: Manifest) -> bool:
    """Say whether every output still has the size and hash that the manifest names."""
    for name, recorded in manifest.outputs.items():
        path = directory / name
        if not path.is_file() or path.stat().st_size != recorded["bytes"] or sha256_file(path) != recorded["sha256"]:
            return False
    return True
