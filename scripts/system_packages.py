"""What the operating system must provide, and how to get it there: installed where we may, named in one sentence otherwise."""

from __future__ import annotations

import glob
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import IO

from setup_errors import SetupError

# Programs that the tests start, and where Debian has them.
_FOR_TESTS = {
    "qemu-aarch64-static": "qemu-user-static",
    "javac": "default-jdk-headless",
    "mvn": "maven",
    "aapt2": "aapt",
    "zipalign": "zipalign",
    "apksigner": "apksigner",
    "dexdump": "dexdump",
    "mksh": "mksh",  # the shell of Android
}


def has_venv() -> bool:
    """Whether this interpreter can create a virtual environment with pip in it (Debian splits that off)."""
    return all(importlib.util.find_spec(name) is not None for name in ("venv", "ensurepip"))


def has_compiler(env: Mapping[str, str]) -> bool:
    """Whether C and C++ compilers are on the path."""
    path = env.get("PATH")
    c = any(shutil.which(name, path=path) for name in (env.get("CC") or "cc", "gcc", "clang"))
    cxx = any(shutil.which(name, path=path) for name in (env.get("CXX") or "c++", "g++", "clang++"))
    return c and cxx


def has_postgresql(env: Mapping[str, str], pattern: str = "/usr/lib/postgresql/*/bin/initdb") -> bool:
    """Whether a PostgreSQL server can be started by the tests; Debian keeps its binaries off the path."""
    return bool(shutil.which("initdb", path=env.get("PATH")) or glob.glob(pattern))


def missing_packages(env: Mapping[str, str], for_tests: bool) -> list[str]:
    """Debian names of the packages that set-up (and the tests, when asked) still lack."""
    missing = []
    if not has_venv():
        # /usr/bin/python3 is served by python3-venv; any other Debian Python by the package of its own version.
        default = os.path.realpath("/usr/bin/python3") == os.path.realpath(sys.executable)
        missing.append("python3-venv" if default else f"python3.{sys.version_info.minor}-venv")
    if not has_compiler(env):
        missing.append("g++")
    if for_tests and not has_postgresql(env):
        missing.append("postgresql")
    if for_tests:
        missing += [package for program, package in _FOR_TESTS.items() if not shutil.which(program, path=env.get("PATH"))]
    return missing


def missing_sentence(packages: Sequence[str], has_apt: bool) -> str:
    """One sentence that names everything that is missing and what to type."""
    names = " ".join(packages)
    plural = "s are" if len(packages) > 1 else " is"
    if has_apt:
        return f"{len(packages)} system package{plural} missing: run `sudo apt-get install {names}`, then the same command again."
    return f"{len(packages)} system package{plural} missing: install what Debian calls {names}, then run the same command again."


def root_prefix(run_as: int | None = None) -> list[str] | None:
    """The words that make a command run as root, [] for root itself, None where that would ask for a password."""
    if (os.geteuid() if run_as is None else run_as) == 0:
        return []
    if shutil.which("sudo") and subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False).returncode == 0:
        return ["sudo", "-n"]
    return None


def ensure(packages: Sequence[str], log: IO[str]) -> None:
    """Install the missing system packages.

    Raises:
        SetupError: where we may not install anything, or apt-get fails.
    """
    if not packages:
        return
    has_apt = shutil.which("apt-get") is not None
    prefix = root_prefix() if has_apt else None
    if prefix is None:
        raise SetupError(missing_sentence(packages, has_apt))
    print(f"Installing system packages: {' '.join(packages)}", flush=True)
    quiet = ["env", "DEBIAN_FRONTEND=noninteractive"]
    update = [*prefix, "apt-get", "update", "-qq"]
    install = [*prefix, *quiet, "apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]
    for command in (update, install):
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, check=False)
        # A stale list of one unrelated source makes `update` fail; only `install` decides.
        if done.returncode != 0 and command is install:
            raise SetupError(f"apt-get could not install {' '.join(packages)}; its reasons are at the end of {log.name}.")
