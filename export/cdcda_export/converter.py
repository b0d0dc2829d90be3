"""llama.cpp's own converters, from the source distribution of the very llama-cpp-python that is installed.

No wheel carries them. They are fetched once through pip, kept in the cache folder, and need no network afterwards.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePosixPath

from cdcda_export.cache import cached, sha256_of
from cdcda_export.errors import DiskFull, ExportError, FileError, MissingDependency

SDIST_VARIABLE = "CDCDA_LLAMA_CPP_SDIST"
CONVERT_MODEL, CONVERT_LORA = "convert_hf_to_gguf.py", "convert_lora_to_gguf.py"
_VENDORED = "vendor/llama.cpp"
_FILES = (CONVERT_MODEL, CONVERT_LORA, "LICENSE")
_FOLDERS = ("conversion", "gguf-py/gguf")
# Import name -> package. The converters import torch, transformers and yaml always, the rest for some tokenizers.
_NEEDED = {
    "torch": "torch",
    "transformers": "transformers",
    "yaml": "pyyaml",
    "sentencepiece": "sentencepiece",
    "google.protobuf": "protobuf",
}
_NOISE = re.compile(r"^(\s|\^|Writing:|INFO:|WARNING:|DEBUG:|$)")


def converter_version() -> str:
    """Return the version of llama-cpp-python whose converters are used.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        return version("llama-cpp-python")
    except PackageNotFoundError as error:
        raise MissingDependency("llama-cpp-python", "hf") from error


def converters() -> Path:
    """Return the folder that holds ``convert_hf_to_gguf.py`` and ``convert_lora_to_gguf.py``; fetched the first time.

    ``CDCDA_LLAMA_CPP_SDIST`` may name the source distribution where there is no package index.

    Raises:
        FileError: it cannot be fetched, or the named file is another one.
        DiskFull: there is no room for it.
    """
    wanted = converter_version()

    def build(partial: Path) -> dict[str, str]:
        def needed(name: PurePosixPath) -> bool:
            return str(name) in _FILES or any(name.is_relative_to(folder) for folder in _FOLDERS)

        return unpack_sources(partial, needed, (*_FILES, *_FOLDERS))

    return cached("converters", {"version": wanted}, build).directory


def unpack_sources(target: Path, needed: Callable[[PurePosixPath], bool], expected: Sequence[str]) -> dict[str, str]:
    """Write files of the llama.cpp that the installed llama-cpp-python was made of into a folder.

    Args:
        target: an empty folder.
        needed: tells by its name inside llama.cpp whether a file is wanted.
        expected: files and folders without which the archive is not the right one.

    Returns:
        Name and SHA-256 of the source distribution.

    Raises:
        FileError: it cannot be fetched, or the file that ``CDCDA_LLAMA_CPP_SDIST`` names is another one.
        MissingDependency: llama-cpp-python is not installed.
    """
    wanted, named = converter_version(), os.environ.get(SDIST_VARIABLE)
    sdist = Path(named) if named else _fetch(wanted, target)
    facts = {"sdist": sdist.name, "sha256": sha256_of(sdist)}
    _extract(sdist, wanted, target, needed, expected)
    if not named:
        sdist.unlink()
    return facts


def _fetch(wanted: str, folder: Path) -> Path:
    """Let pip fetch the source distribution from whatever index it is set up for; nothing is compiled."""
    remedy = f"name the file llama_cpp_python-{wanted}.tar.gz with {SDIST_VARIABLE}"
    if importlib.util.find_spec("pip") is None:
        raise FileError(f"llama.cpp's sources have to be fetched once, and {sys.prefix} has no pip for it: install pip, or {remedy}.")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check", "--retries", "1"]
    command += ["--no-deps", "--no-binary", "llama-cpp-python", "--dest", str(folder), f"llama-cpp-python=={wanted}"]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    found = list(folder.glob("*.tar.gz"))
    if done.returncode or not found:
        said = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")] or done.stderr.splitlines() or ["no reason given"]
        raise FileError(
            f"Cannot fetch the sources of llama-cpp-python {wanted} (pip: {said[-1].removeprefix('ERROR:').strip().rstrip('.')}); "
            f"check the network, or {remedy}."
        )
    return found[0]


def _extract(sdist: Path, wanted: str, target: Path, needed: Callable[[PurePosixPath], bool], expected: Sequence[str]) -> None:
    """Write the needed files of llama.cpp, and nothing else of the archive.

    Only regular files below llama.cpp's folder are read, by names without ``..``: no member can leave ``target``. (tarfile's own
    filter is not in every Python 3.11.)
    """
    root = PurePosixPath(f"llama_cpp_python-{wanted}", _VENDORED)
    try:
        with tarfile.open(sdist, "r:gz") as archive:
            for member in archive:
                path = PurePosixPath(member.name)
                if not member.isfile() or ".." in path.parts or not path.is_relative_to(root):
                    continue
                name = path.relative_to(root)
                source = archive.extractfile(member) if needed(name) else None
                if source is not None:
                    (target / name).parent.mkdir(parents=True, exist_ok=True)
                    (target / name).write_bytes(source.read())
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise FileError(f"{sdist} is no readable source distribution ({error}); fetch llama_cpp_python-{wanted}.tar.gz again.") from error
    missing = [name for name in expected if not (target / name).exists()]
    if missing:
        raise FileError(f"{sdist} lacks {root / missing[0]}; {SDIST_VARIABLE} must name llama_cpp_python-{wanted}.tar.gz.")


def run_converter(script: str, arguments: Sequence[str | Path], on_percent: Callable[[int], None] | None = None) -> None:
    """Run one of llama.cpp's converters in a process of its own, offline.

    Args:
        script: ``CONVERT_MODEL`` or ``CONVERT_LORA``.
        arguments: its command line.
        on_percent: called with the share of the file that is written, 0 to 100.

    Raises:
        MissingDependency: a package that the converter imports is not installed.
        DiskFull: there was no room for its file.
        ExportError: the converter failed; carries its last line.
    """
    for module, package in _NEEDED.items():
        if not _is_installed(module):
            raise MissingDependency(f"{package} (for llama.cpp's converter)", "hf")
    command = [sys.executable, str(converters() / script), *map(str, arguments)]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "NO_LOCAL_GGUF"} | offline
    last: deque[str] = deque(maxlen=40)
    # The pipe also ends the converter when this process is killed: it cannot write its progress any more.
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True, errors="replace"
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:  # universal newlines: every redraw of its bar is a line
                percent = re.match(r"Writing:\s+(\d+)%", line)
                if percent and on_percent:
                    on_percent(int(percent[1]))
                if not _NOISE.match(line):
                    last.append(line.strip())
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        reason = re.sub(r"^ERROR:[\w.-]+:", "", last[-1]) if last else f"exit code {process.returncode}"
        if os.strerror(errno.ENOSPC) in reason:
            raise DiskFull("The disk filled up during the conversion; free some space, or name another cache folder with CDCDA_CACHE.")
        raise ExportError(f"llama.cpp's {script} failed: {reason.rstrip('.')}.")


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False
