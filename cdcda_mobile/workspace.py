"""Where a user's runs live: safe names, one process at a time, one data source and one base per workspace."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from cdcda_export.cache import locked
from cdcda_export.errors import WorkspaceError
from cdcda_export.folders import make_private
from cdcda_export.manifest import write_atomic, write_json

BINDING = "workspace.json"
_SAFE = "-._~@+ "
_MAX_NAME = 120


def folder_name(user: str) -> str:
    """Return the directory name of a user id: the id itself where it is plain, percent-encoded where it is not.

    Raises:
        WorkspaceError: the id is empty, too long, or made to point elsewhere.
    """
    if not user or not user.strip():
        raise WorkspaceError("The user id is empty; name one with --user.")
    if re.search(r"[/\\\x00-\x1f\x7f]", user) or user.strip(". ") == "" or user.startswith("."):
        raise WorkspaceError(f"The user id {user!r} looks like a path, so it cannot name a run; use an id without slashes or leading dots.")
    name = quote(user, safe=_SAFE)
    if name.startswith("_"):  # runs/_shared and runs/_cohorts are not users
        name = "%5F" + name[1:]
    if len(name) > _MAX_NAME:
        raise WorkspaceError(f"The user id is {len(user)} characters long; {_MAX_NAME} bytes are the limit.")
    return name


TOGETHER = "_eval"  # evaluations over several users


class Workspace:
    """A directory of runs, bound to one data source and one base model.

    Args:
        root: the directory, ``runs`` by default.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def user_directory(self, user: str) -> Path:
        """Return ``runs/<user>`` (not created)."""
        directory = self.root / folder_name(user)
        if os.path.islink(directory):
            raise WorkspaceError(f"{directory} is a symbolic link; runs are never written through links.")
        return directory

    def users(self) -> list[str]:
        """Return the users who have a run here: folders whose names are those of users, and no links."""
        if not os.path.isdir(self.root):
            return []
        return sorted(unquote(path.name) for path in self.root.iterdir() if _names_a_user(path))

    def bind(self, source: str | None, base_sha256: str, base_name: str) -> None:
        """Bind this workspace to its source and base, or check that it is bound to these.

        Args:
            source: where the histories come from; None if none is read, and what the workspace is bound to stays.
            base_sha256: the hash of the base model.
            base_name: what the base model is called.

        Raises:
            WorkspaceError: it belongs to another source or base, or cannot be read or made.
        """
        path = self.root / BINDING
        wanted = {"source": source, "base": base_name, "base_sha256": base_sha256}
        try:
            make_private(self.root)
            bound = json.loads(path.read_text(encoding="utf-8"))
            differing = next((key for key in ("source", "base_sha256") if wanted[key] not in (None, bound[key])), None)
        except FileNotFoundError:
            if source is None:
                return
            with locked(self.root, BINDING):  # the workers of a fleet come here at the same time
                if not path.exists():
                    write_json(path, wanted)
            return self.bind(source, base_sha256, base_name)
        except OSError as error:
            raise WorkspaceError(f"{path} cannot be read or made ({error.strerror or error}); name another --workspace.") from error
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise WorkspaceError(f"{path} is damaged; move {self.root} away or name another --workspace.") from error
        if differing:
            key = "source" if differing == "source" else "base"
            what = "data source" if key == "source" else "base model"
            raise WorkspaceError(
                f"{self.root} belongs to the {what} {bound[key]!r}, not {wanted[key]!r}; name another --workspace for this one."
            )

    @contextmanager
    def locked(self, user: str) -> Iterator[Path]:
        """Hold one user's directory for this process, and give it.

        Raises:
            WorkspaceError: another process holds it, or it cannot be made.
        """
        import fcntl

        directory = self.user_directory(user)
        try:
            make_private(directory)
            descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise WorkspaceError(f"{directory} cannot be worked in ({error.strerror or error}); name another --workspace.") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise WorkspaceError(
                f"Another process (pid {owner or 'unknown'}) is working on user {user}; wait for it, or stop it and run this again."
            ) from error
        try:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            yield directory
        finally:
            os.close(descriptor)

    def forget(self, user: str) -> list[Path]:
        """Remove everything that was derived from a user, and return what was removed.

        Raises:
            WorkspaceError: there is nothing, or another process is working on it.
        """
        directory = self.user_directory(user)
        if not directory.is_dir():
            raise WorkspaceError(f"There is nothing of user {user} in {self.root}.")
        with self.locked(user):
            removed = sorted(path for path in directory.rglob("*") if path.is_file())
            shutil.rmtree(directory)
        together = self.root / TOGETHER
        if f'"user": {json.dumps(user)}' in _text(together / "eval.json"):  # an evaluation over users that this one took part in
            removed += sorted(path for path in together.rglob("*") if path.is_file())
            shutil.rmtree(together)
        return removed


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _names_a_user(path: Path) -> bool:
    """Say whether a directory may be a user's: nothing else that lies in a workspace is run or removed as one."""
    try:
        return path.is_dir() and not path.is_symlink() and folder_name(unquote(path.name)) == path.name
    except WorkspaceError:
        return False


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows as JSON Lines, atomically and private."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON Lines file that a finished stage wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
