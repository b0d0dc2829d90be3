"""Every error that CDCDA raises on purpose.

The message is one sentence that says what is wrong and what to do next; the command line prints it
without a traceback and exits with ``exit_code``. Anything else that escapes is a bug and keeps its traceback.

    CdcdaError
    ├── ConfigError            an option, a recipe or a combination of them makes no sense
    ├── MissingDependency      an optional package is not installed; names the install line
    ├── FileError              a file is missing, unreadable, truncated or not what it claims
    │   └── ManifestError      a manifest.json cannot be trusted
    ├── DiskFull               there is no room for the artifact
    ├── ExportError            this adapter and this base cannot become that artifact
    │   ├── UnsupportedArchitecture
    │   ├── AdapterError       the adapter is not a LoRA we can apply to this base
    │   └── QuantizationError  a tensor cannot take the type that was asked for
    ├── BuildError             a program of llama.cpp's cannot be compiled here
    ├── VerificationFailed     the artifact exists but did not pass its gate
    ├── DataError              a user's history cannot be used
    │   └── UnknownUser
    ├── TeacherError           the server LLM did not give what was asked of it
    ├── DeviceError            no phone on the cable, or it did not do what was asked of it
    ├── WorkspaceError         a run directory is locked, foreign or unsafe
    └── Interrupted            stopped by the user; the next run resumes
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable


class CdcdaError(Exception):
    """Base of every intended error; ``str(error)`` is one sentence for the user."""

    exit_code = 1


class ConfigError(CdcdaError):
    """An option, a recipe or a combination of them makes no sense."""

    exit_code = 2


class MissingDependency(CdcdaError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"This needs the package {package}: run `pip install 'cdcda-mobile[{extra}]'`.")


class FileError(CdcdaError):
    """A file is missing, unreadable, truncated or not what it claims to be."""


class ManifestError(FileError):
    """A ``manifest.json`` cannot be trusted."""


class DiskFull(CdcdaError):
    """There is no room for what has to be written."""


class ExportError(CdcdaError):
    """This adapter and this base cannot become the artifact that was asked for."""


class UnsupportedArchitecture(ExportError):
    """The tensor mapping of this architecture is not known."""


class AdapterError(ExportError):
    """The adapter is not a LoRA that can be applied to this base."""


class QuantizationError(ExportError):
    """A tensor cannot take the type that was asked for."""


class BuildError(CdcdaError):
    """A program of llama.cpp's cannot be compiled here."""


class VerificationFailed(CdcdaError):
    """The artifact did not pass its gate."""


class DataError(CdcdaError):
    """A user's history cannot be used."""


class UnknownUser(DataError):
    """The source holds no such user."""


class TeacherError(CdcdaError):
    """The server LLM did not give what was asked of it."""


class DeviceError(CdcdaError):
    """There is no phone on the cable, or it did not do what was asked of it."""


class WorkspaceError(CdcdaError):
    """A run directory is locked, foreign or unsafe."""


class Interrupted(CdcdaError):
    """Stopped by the user; the next run resumes."""

    exit_code = 130


def did_you_mean(wrong: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest known name, or the list of known names."""
    names = sorted(known)
    close = difflib.get_close_matches(wrong, names, n=1, cutoff=0.5)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(names)}." if names else ""


def is_disk_full(error: OSError) -> bool:
    """Say whether an operating-system error means that there is no room left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
