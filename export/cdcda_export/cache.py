"""What is derived from a base model alone and serves every user of it: made once, kept in the user's cache folder, never half-written.

An entry is a directory that takes its name last, under a lock, so one that is there is whole. Its name is a hash of everything that
decides its content. Nothing in the cache belongs to a person, and all of it can be deleted at any time.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdcda_export.errors import DiskFull, FileError, is_disk_full
from cdcda_export.manifest import sha256_file, sha256_json, write_json

_FACTS = "facts.json"


def cache_folder() -> Path:
    """Return where entries are kept: ``CDCDA_CACHE``, else ``cdcda`` in ``XDG_CACHE_HOME`` or ``~/.cache``."""
    named = os.environ.get("CDCDA_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cdcda"


@dataclass(frozen=True)
class Entry:
    """A finished entry: its directory, and what its builder said of it (JSON-serialisable)."""

    directory: Path
    facts: dict[str, Any]


def cached(kind: str, inputs: Mapping[str, Any], build: Callable[[Path], Mapping[str, Any]], root: Path | None = None) -> Entry:
    """Return an entry, building it if it is not there; two processes that want the same one build it once.

    Args:
        kind: what it is; names the folder, for example ``bases``.
        inputs: everything that decides the content: hashes, settings, versions. JSON-serialisable.
        build: writes files into the directory it is given (fsynced by whoever writes large ones) and returns facts.
        root: the cache folder, None for the user's.

    Raises:
        DiskFull: there is no room for it.
        FileError: the cache folder cannot be written.
    """
    folder = (root or cache_folder()) / kind
    directory = folder / sha256_json(dict(inputs))[:20]
    entry = _read(directory)
    if entry is not None:
        return entry
    with locked(folder, directory.name):
        entry = _read(directory)  # another process may have finished it between our look and the lock
        if entry is not None:
            return entry
        partial = directory.with_name(f"{directory.name}.partial")
        for stale in (partial, directory):
            shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir(mode=0o700)
        try:
            facts = dict(build(partial))
            sizes = {str(p.relative_to(partial)): p.stat().st_size for p in sorted(partial.rglob("*")) if p.is_file()}
            write_json(partial / _FACTS, {"inputs": dict(inputs), "facts": facts, "sizes": sizes})
            os.replace(partial, directory)
        except OSError as error:
            raise _explained(error, folder) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return Entry(directory, facts)


def _read(directory: Path) -> Entry | None:
    """Return a whole entry; one that somebody cut short or emptied is not one."""
    try:
        stored = json.loads((directory / _FACTS).read_text(encoding="utf-8"))
        if all((directory / name).stat().st_size == size for name, size in stored["sizes"].items()):
            return Entry(directory, dict(stored["facts"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None


@contextlib.contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Hold ``name`` in a folder for this process, waiting for another one that holds it.

    Raises:
        FileError: the folder cannot be written.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(folder / f".{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise _explained(error, folder) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _explained(error: OSError, folder: Path) -> DiskFull | FileError:
    if is_disk_full(error):
        return DiskFull(f"No room left in the cache folder {folder}; free some space, or name another with CDCDA_CACHE.")
    return FileError(f"Cannot write the cache folder {folder} ({error.strerror or error}); name another with CDCDA_CACHE.")


def sha256_of(path: Path) -> str:
    """Return a large file's SHA-256, read once: the next time its size, time stamp and inode vouch for it.

    Raises:
        FileError: it cannot be read.
    """
    path = path.resolve()
    try:
        seen = path.stat()
    except OSError as error:
        raise FileError(f"Cannot read {path}: {error.strerror or error}.") from error
    mark = [seen.st_size, seen.st_mtime_ns, seen.st_ino, seen.st_dev]
    memo = cache_folder() / "hashes" / f"{sha256_json(str(path))[:20]}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(memo.read_text(encoding="utf-8"))
        if stored["mark"] == mark:
            return str(stored["sha256"])
    digest = sha256_file(path)
    with contextlib.suppress(FileError, DiskFull):  # a cache that cannot be written costs time, nothing else
        write_json(memo, {"mark": mark, "sha256": digest})
    return digest
