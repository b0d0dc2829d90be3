"""The app without a model: found, or built by Maven from the sources beside this package, once."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from cdcda_export.cache import cache_folder, cached
from cdcda_export.errors import BuildError, ConfigError, FileError
from cdcda_export.progress import Progress

_SHIPPED = Path(__file__).with_name("shell.apk")  # in a wheel
_MODULE = Path(__file__).resolve().parents[2] / "app"  # in a checkout
_TOOLS = {"mvn": "maven", "javac": "default-jdk-headless", "aapt2": "aapt"}
_SDK_AAPT2 = Path("build-tools", "34.0.0", "aapt2")  # below ANDROID_HOME, where pom.xml takes the SDK's tools
_GOOGLE = ("com.android.tools:r8", "androidx.test")


def find_shell(given: Path | None, progress: Progress) -> Path:
    """Return the shell.

    Args:
        given: named by the user; None for the one that this package ships with or can build.
        progress: told what goes on.

    Raises:
        FileError: there is none.
        ConfigError: what builds it is not installed.
        BuildError: it cannot be built.
    """
    if given is not None:
        if not given.is_file():
            raise FileError(f"There is no shell {given}; leave --shell away to use the one of this package.")
        return given
    if not (_MODULE / "pom.xml").is_file():
        if _SHIPPED.is_file():
            return _SHIPPED
        raise FileError("This installation has no app: name a built one with --shell, or work from a checkout (android_demo/app).")
    return cached("shells", {"sources": _hash(_MODULE)}, lambda partial: _build(partial, progress)).directory / "shell.apk"


def _hash(module: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted([module / "pom.xml", *(module / "src" / "main").rglob("*")]):
        if path.is_file():
            digest.update(f"{path.relative_to(module).as_posix()}\0".encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _build(partial: Path, progress: Progress) -> dict[str, str]:
    sdk = os.environ.get("ANDROID_HOME")
    there = {"aapt2"} if sdk and (Path(sdk) / _SDK_AAPT2).is_file() else set()
    missing = [package for tool, package in _TOOLS.items() if tool not in there and not shutil.which(tool)]
    if missing:
        raise ConfigError(
            f"Building the app needs {' and '.join(missing)}: `apt install {' '.join(missing)}`, then the same command again."
        )
    progress.start("building the app (Maven; a minute, once)")
    sources = partial / "sources"
    shutil.copytree(_MODULE, sources, ignore=shutil.ignore_patterns("target"))
    # What it needs to look at screens is not needed to build them.
    said = _run(["mvn", "--batch-mode", "--quiet", "-Dmaven.test.skip=true", "package"], sources)
    (sources / "target" / "shell.apk").rename(partial / "shell.apk")
    shutil.rmtree(sources)
    progress.done()
    return {"maven": said[:200]}


def _run(command: Sequence[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False, stdin=subprocess.DEVNULL)
    said = f"{done.stdout}\n{done.stderr}".strip()
    if done.returncode:
        log = cache_folder() / "shells" / "build.log"
        log.write_text(said, encoding="utf-8")
        if any(name in said for name in _GOOGLE) and "Could not" in said:
            raise BuildError(
                "Maven does not find Google's artifacts: add Google's Maven repository to your Maven settings (~/.m2/settings.xml), then "
                "run the same command again."
            )
        errors = [line for line in said.splitlines() if "ERROR" in line] or [f"exit status {done.returncode}"]
        raise BuildError(f"The app cannot be built ({errors[0][:200].strip()}); everything that was said is in {log}.")
    return said
