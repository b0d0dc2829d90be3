"""Finished artifacts to any place that fsspec knows: what belongs to one lies there complete, or without a ``manifest.json``.

Credentials come from where fsspec and its backends look for them (the environment, their own files) and pass through nothing of ours.
"""

from __future__ import annotations

import json
import os
import posixpath
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cdcda_export.batch import Outcome
from cdcda_export.bundle import read_bundle
from cdcda_export.errors import CdcdaError, ConfigError, FileError, MissingDependency
from cdcda_export.manifest import MANIFEST, Manifest, read_manifest, sha256_json
from cdcda_export.progress import Progress
from cdcda_mobile.workspace import Workspace, folder_name

if TYPE_CHECKING:
    from cdcda_mobile.pipeline import UserJob

# What is being uploaded: a file's size says that it is complete, and this that it is of the same artifact.
_MARK = ".uploading"
# Backends raise what their libraries raise, and most of that is no OSError.
_FOREIGN_ERRORS = {
    "aiohttp": ("ClientError",),
    "azure.core.exceptions": ("AzureError",),
    "botocore.exceptions": ("BotoCoreError", "ClientError"),
    "fsspec.exceptions": ("FSTimeoutError",),
    "gcsfs.retry": ("HttpError",),
    "google.auth.exceptions": ("GoogleAuthError",),
    "paramiko.ssh_exception": ("SSHException",),
    "requests.exceptions": ("RequestException",),
}


def open_target(url: str) -> tuple[Any, str]:
    """Return the file system and the path that a URL names; nothing is written.

    Raises:
        ConfigError: it holds a password, or fsspec does not know it.
        MissingDependency: fsspec is not installed.
    """
    if "@" in url and urlsplit(url).password is not None:
        raise ConfigError("The URL of --upload holds a password; give it by the environment or fsspec's configuration instead.")
    try:
        import fsspec
    except ImportError as error:
        raise MissingDependency("fsspec", "fleet") from error
    try:
        system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:  # the package of this scheme, or the scheme itself
        raise ConfigError(f"Cannot upload to {url} ({str(error).rstrip('.')}); install that package, or name another URL.") from error
    except _storage_errors() as error:
        raise FileError(f"Cannot reach {url}: {_words(error)}.") from error
    return system, str(path)


def upload_finished(outcomes: Sequence[Outcome], jobs: Sequence[UserJob], url: str, progress: Progress) -> list[Outcome]:
    """Upload the artifacts of all that succeeded, and return the outcomes; one that could not be uploaded is a failure by name."""
    of = {job.user: job for job in jobs}
    done = {outcome.name: outcome for outcome in outcomes}
    exported = [outcome for outcome in outcomes if not outcome.error]
    if exported:
        progress.start("uploading", len(exported), "users")
    for outcome in exported:
        job = of[outcome.name]
        try:
            directory = Workspace(job.workspace).user_directory(job.user) / job.export.directory
            upload_artifact(directory, url, job.user)
        except CdcdaError as error:
            done[outcome.name] = replace(outcome, error=f"exported, but not uploaded: {error}")
        progress.advance()
    progress.done()
    return list(done.values())


def upload_artifact(directory: Path, url: str, user: str) -> bool:
    """Upload a finished artifact to ``url/<user's folder>/<format-quant>/``, the manifest last.

    An upload that was cut short leaves no manifest, and the next one sends only what is not there yet.

    Returns:
        Whether anything was sent: False where the same artifact lies there already.

    Raises:
        FileError: there is no finished artifact, or the target did not take it.
        ConfigError: as ``open_target``.
    """
    bundle, manifest = read_bundle(directory), read_manifest(directory)
    if manifest is None:
        raise FileError(f"{directory} holds no finished artifact; run cdcda-export first.")
    system, root = open_target(url)
    place = posixpath.join(root, folder_name(user), directory.name)
    beside = [entry["path"] for entry in bundle["files"].values() if not entry["beside"]]
    try:
        return _send(system, directory, place, manifest, beside)
    except _storage_errors() as error:
        raise FileError(f"Cannot upload {directory} to {url} ({_words(error)}); the next run goes on from there.") from error


def _send(system: Any, directory: Path, place: str, manifest: Manifest, beside: Sequence[str]) -> bool:
    """Send what is missing.

    Args:
        system: an fsspec file system.
        directory: the artifact.
        place: its path there.
        manifest: the artifact's own.
        beside: paths, from the directory, of what it shares with others (the base of ``gguf-lora``).
    """
    payload = _public(manifest)
    system.invalidate_cache()
    there = _sizes(system, place)
    if MANIFEST in there and system.cat_file(f"{place}/{MANIFEST}") == payload:
        return False
    mark = sha256_json(payload.decode()).encode()
    goes_on = _MARK in there and system.cat_file(f"{place}/{_MARK}") == mark
    system.makedirs(place, exist_ok=True)
    if not goes_on:
        # Another artifact's files can have the very sizes of this one's, so they go first; what we never wrote stays.
        for name in (MANIFEST, _MARK, *manifest.outputs):
            if name in there:
                system.rm_file(f"{place}/{name}")
        there = {}
        system.pipe_file(f"{place}/{_MARK}", mark)
    for name in beside:
        _send_shared(system, directory / name, posixpath.normpath(posixpath.join(place, name)))
    for name, output in manifest.outputs.items():
        if there.get(name) != output["bytes"]:
            _put(system, directory / name, f"{place}/{name}")
    # Named last, so that whoever sees it sees a whole one.
    system.pipe_file(f"{place}/{_MARK}.{MANIFEST}", payload)
    system.mv(f"{place}/{_MARK}.{MANIFEST}", f"{place}/{MANIFEST}")
    system.rm_file(f"{place}/{_MARK}")
    return True


def _send_shared(system: Any, path: Path, target: str) -> None:
    """Send what many users share, once: its folder is named by a hash of what it was made of."""
    if not (system.exists(target) and system.size(target) == path.stat().st_size):
        system.makedirs(posixpath.dirname(target), exist_ok=True)
        _put(system, path, target)


def _put(system: Any, path: Path, target: str) -> None:
    """Send a file. Object stores show it when it is whole; on a local disk two workers must not write into the same one."""
    if "file" in (system.protocol if isinstance(system.protocol, tuple) else (system.protocol,)):
        partial = f"{target}.{os.getpid()}.tmp"
        system.makedirs(posixpath.dirname(target), exist_ok=True)
        system.put_file(str(path), partial)
        system.mv(partial, target)
    else:
        system.put_file(str(path), target)


def _sizes(system: Any, place: str) -> dict[str, int]:
    """Return the names below a path, and how long each file is."""
    try:
        found = system.find(place, detail=True)
    except FileNotFoundError:
        return {}
    prefix = system._strip_protocol(place).rstrip("/") + "/"
    return {str(name).removeprefix(prefix): int(info["size"] or 0) for name, info in found.items()}


def _public(manifest: Manifest) -> bytes:
    """Return the manifest that leaves the house: the card in it holds texts of the user's, and those stay."""
    kept = {key: manifest.metrics[key] for key in ("verify",) if key in manifest.metrics}
    return (json.dumps(asdict(replace(manifest, metrics=kept)), indent=2, ensure_ascii=False) + "\n").encode()


def _storage_errors() -> tuple[type[Exception], ...]:
    """Return what a backend may raise; only one that is loaded can."""
    found: list[type[Exception]] = [OSError, NotImplementedError]
    for module, names in _FOREIGN_ERRORS.items():
        if module in sys.modules:
            found += [getattr(sys.modules[module], name) for name in names if hasattr(sys.modules[module], name)]
    return tuple(found)


def _words(error: BaseException) -> str:
    """Return what a backend says, in one line."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
