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
from cdcda_export.folders import make_private
from cdcda_export.manifest import sha256_file, sha256_json, write_json

_FACTS = "facts.json"
_LARGE_BYTES = 1 << 18  # what is smaller is hashed in less time than its hash is looked up
_NAME_ANOTHER = "name another cache folder with CDCDA_CACHE"


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


def cached(
    kind: str,
    inputs: Mapping[str, Any],
    build: Callable[[Path], Mapping[str, Any]],
    root: Path | None = None,
    waiting: Callable[[], None] | None = None,
) -> Entry:
    """Return an entry, building it if it is not there or not what it was; two processes that want the same one build it once.

    Args:
        kind: what it is; names the folder, for example ``bases``.
        inputs: everything that decides the content: hashes, settings, versions. JSON-serialisable.
        build: writes files into the directory it is given (fsynced by whoever writes large ones) and returns facts.
        root: the cache folder, None for the user's.
        waiting: called when another process builds it already, before we wait for that.

    Raises:
        DiskFull: there is no room for it.
        FileError: the cache folder cannot be written.
    """
    directory = _place(kind, inputs, root)
    folder = directory.parent
    entry = _read(directory)
    if entry is not None:
        return entry
    with locked(folder, directory.name, _NAME_ANOTHER, waiting):
        entry = _read(directory)  # another process may have finished it between our look and the lock
        if entry is not None:
            return entry
        partial = directory.with_name(f"{directory.name}.partial")
        try:
            for stale in (partial, directory):
                shutil.rmtree(stale, ignore_errors=True)
            partial.mkdir(mode=0o700)
            facts = dict(build(partial))
            files = {str(p.relative_to(partial)): sha256_file(p) for p in sorted(partial.rglob("*")) if p.is_file()}
            write_json(partial / _FACTS, {"inputs": dict(inputs), "facts": facts, "files": files})
            os.replace(partial, directory)
        except OSError as error:
            raise _explained(error, folder, _NAME_ANOTHER) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        for name, digest in files.items():
            _remember(directory / name, digest)
        return Entry(directory, facts)


def find(kind: str, inputs: Mapping[str, Any], root: Path | None = None) -> Entry | None:
    """Return what :func:`cached` would return without building, or None; it waits for nobody."""
    return _read(_place(kind, inputs, root))


def _place(kind: str, inputs: Mapping[str, Any], root: Path | None) -> Path:
    return (root or cache_folder()) / kind / sha256_json(dict(inputs))[:20]


def _read(directory: Path) -> Entry | None:
    """Return a whole entry; one in which somebody changed a file is not one."""
    try:
        stored = json.loads((directory / _FACTS).read_text(encoding="utf-8"))
        if all(sha256_of(directory / name) == digest for name, digest in stored["files"].items()):
            return Entry(directory, dict(stored["facts"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, FileError):
        return None
    return None


@contextlib.contextmanager
def locked(folder: Path, name: str, advice: str = "name another folder", waiting: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold ``name`` in a folder for this process, waiting for another one that holds it.

    Args:
        folder: made if it is not there.
        name: what is held.
        advice: what the user is told to do if the folder cannot be written.
        waiting: called before we wait for another process.

    Raises:
        FileError: the folder cannot be written.
        DiskFull: there is no room in it.
    """
    import fcntl

    try:
        make_private(folder)
        descriptor = os.open(folder / f".{name}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise _explained(error, folder / name, advice) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if waiting:
                waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _explained(error: OSError, folder: Path, advice: str) -> DiskFull | FileError:
    if is_disk_full(error):
        return DiskFull(f"No room left in {folder}; free some space, or {advice}.")
    return FileError(f"Cannot write {folder} ({error.strerror or error}); {advice}.")


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256; a large one is read once: the next time its size, times and inode vouch for it.

    Raises:
        FileError: it cannot be read.
    """
    try:
        memo, mark = _memo(path)
    except OSError as error:
        raise FileError(f"Cannot read {path}: {error.strerror or error}.") from error
    if mark[0] < _LARGE_BYTES:
        return sha256_file(path)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(memo.read_text(encoding="utf-8"))
        if stored["mark"] == mark:
            return str(stored["sha256"])
    digest = sha256_file(path)
    _remember(path, digest, mark)
    return digest


def _memo(path: Path) -> tuple[Path, list[int]]:
    """Return where a file's hash is remembered, and what tells whether the file is still the same.

    Anybody can set a file's size and time of modification back, nobody its time of change.
    """
    resolved = os.path.realpath(path)
    seen = os.stat(resolved)
    mark = [seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, seen.st_ino, seen.st_dev]
    return cache_folder() / "hashes" / f"{sha256_json(resolved)[:20]}.json", mark


def _remember(path: Path, digest: str, mark: list[int] | None = None) -> None:
    with contextlib.suppress(OSError, FileError, DiskFull):  # a cache that cannot be written costs time, nothing else
        memo, now = _memo(path)
        if now[0] >= _LARGE_BYTES:
            write_json(memo, {"mark": mark or now, "sha256": digest})
