"""Folders that are made, emptied and removed, and what the operating system says against it as one sentence."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from cdcda_export.errors import DiskFull, FileError, is_disk_full


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the operating system has against writing here into an error of ours.

    Raises:
        DiskFull: there is no room.
        FileError: anything else.
    """
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull(f"No room left to write {path}; free some space and run the same command again.") from error
        raise FileError(f"Cannot write {path}: {error.strerror or error}.") from error


def make_private(directory: Path) -> None:
    """Make a directory and those above it that are missing, for their owner alone (``mkdir`` gives its mode to the last one only).

    Raises:
        OSError: it cannot be made.
    """
    if not directory.is_dir():
        make_private(directory.parent)
        try:
            directory.mkdir(mode=0o700)
        except FileExistsError as error:  # another process was faster, or it is a file
            if not directory.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory)) from error


def empty(directory: Path, keep: Collection[str]) -> None:
    """Remove everything in a directory but what is named; links are removed, not followed."""
    for child in directory.iterdir():
        if child.name not in keep:
            shutil.rmtree(child) if child.is_dir() and not child.is_symlink() else child.unlink()


def discard(directory: Path, last: Collection[str]) -> None:
    """Remove a directory, and in it what is named last: if this is cut short, those still say what the directory was."""
    empty(directory, last)
    shutil.rmtree(directory)
