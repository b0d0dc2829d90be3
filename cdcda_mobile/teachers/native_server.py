"""llama.cpp's own server, which answers several requests in one pass: found, or compiled once for this machine.

It is compiled from the source distribution of the very llama-cpp-python that is installed and kept in the cache folder
(``cdcda build-server``). Without it the local teacher is llama-cpp-python's server, which answers one request at a time.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from cdcda_export.cache import cache_folder, cached, find
from cdcda_export.converter import converter_version, unpack_sources
from cdcda_export.errors import ConfigError, DiskFull, TeacherError
from cdcda_export.progress import Progress
from cdcda_export.runtime import cpu_threads

SERVER_VARIABLE = "CDCDA_LLAMA_SERVER"
OFF = "off"
BUILD_COMMAND = "cdcda build-server"
_NAME = "llama-server"
_KIND = "servers"
_TOOLS = ("cmake", "ninja")
# What the Android engine is built with as well, but for the processor: this build is for this machine alone.
_CMAKE = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=ON",
    "-DGGML_OPENMP=ON",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_BUILD_APP=OFF",
)
_UNUSED = ("docs", "media", "models")  # half of the sources by size
# What -march=native looks at.
_CPU_FIELDS = ("vendor_id", "cpu family", "model", "model name", "flags", "CPU implementer", "CPU part", "CPU variant", "Features")
# A web page, the list of who asks what, gigabytes of old prompts and the network are nothing that a teacher of ours needs.
_OPTIONS = ("--jinja", "--reasoning", "off", "--reasoning-format", "none", "--no-ui", "--no-slots", "--cache-ram", "0", "--offline")
_HELP_TIMEOUT_S = 20.0


def native_server() -> Path | None:
    """Return llama.cpp's server, or None where llama-cpp-python's own must do.

    ``CDCDA_LLAMA_SERVER`` names one (``off``: none), else it is the one that was built here, else a ``llama-server`` on the path
    that knows every option we use.

    Raises:
        ConfigError: ``CDCDA_LLAMA_SERVER`` names no program.
    """
    named = os.environ.get(SERVER_VARIABLE, "")
    if named == OFF:
        return None
    if named:
        if not _is_program(Path(named)):
            raise ConfigError(f"{SERVER_VARIABLE} names {named}, which is no program; name a {_NAME}, or '{OFF}' for none.")
        return Path(named).absolute()
    built = find(_KIND, _inputs())
    if built is not None:
        return built.directory / _NAME
    on_path = shutil.which(_NAME)
    return Path(on_path) if on_path and _understands(Path(on_path)) else None


def server_command(server: Path, gguf: Path, alias: str, slots: int, context: int, threads: int) -> list[str]:
    """Return the command line that serves a GGUF on a free loopback port.

    Args:
        server: the program.
        gguf: the model.
        alias: its name at the endpoint.
        slots: requests that are answered at once.
        context: tokens of prompt and answer of each of them.
        threads: that compute.
    """
    numbers = {"--port": 0, "--parallel": slots, "--ctx-size": slots * context, "--threads": threads, "--threads-batch": threads}
    numbered = [word for option, value in numbers.items() for word in (option, str(value))]
    return [str(server), "--model", str(gguf), "--alias", alias, "--host", "127.0.0.1", *numbered, *_OPTIONS]


def _understands(server: Path) -> bool:
    """Tell whether a program lists every option that we use; one that does is new enough for what we send."""
    try:
        done = subprocess.run([server, "--help"], capture_output=True, timeout=_HELP_TIMEOUT_S, stdin=subprocess.DEVNULL, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    listed = set(re.findall(r"(?<!\S)--[a-z-]+", done.stdout.decode(errors="replace")))
    return {word for word in server_command(server, Path(), "", 1, 1, 1) if word.startswith("--")} <= listed


def _is_program(path: Path) -> bool:
    return path.is_file() and os.access(path, os.X_OK)


def _inputs() -> dict[str, object]:
    """Return what decides the machine code, but for the compiler: another one gives the same answers, but for last bits."""
    return {"version": converter_version(), "cmake": list(_CMAKE), "machine": platform.machine(), "processor": _processor()}


def _processor() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return [platform.processor()]
    pairs = ((name.strip(), sorted(value.split())) for name, _, value in (line.partition(":") for line in lines))
    return sorted({f"{name}={' '.join(value)}" for name, value in pairs if name in _CPU_FIELDS})


def build_native_server(progress: Progress) -> Path:
    """Return llama.cpp's server for this machine; compiled the first time, which takes about ten minutes on two cores.

    Two processes compile it once, and one that was stopped leaves nothing that would be trusted. The compiler's words are in
    ``servers/build.log`` of the cache folder.

    Raises:
        MissingDependency: llama-cpp-python is not installed.
        ConfigError: cmake or ninja is not there.
        FileError: the sources cannot be fetched, or the cache folder cannot be written.
        TeacherError: it cannot be compiled.
        DiskFull: there is no room for it.
    """

    def build(partial: Path) -> dict[str, str]:
        tools = {name: _tool(name) for name in _TOOLS}
        sources, target = partial / "sources", partial / "build"
        sources.mkdir()
        progress.start("fetching llama.cpp's sources")
        facts = unpack_sources(sources, lambda name: name.parts[0] not in _UNUSED, ("CMakeLists.txt", "tools/server", "LICENSE"))
        configure = [
            tools["cmake"],
            "-S",
            str(sources),
            "-B",
            str(target),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}",
            *_CMAKE,
        ]
        make = [tools["ninja"], "-C", str(target), "-j", str(cpu_threads()), _NAME]
        path = cache_folder() / _KIND / "build.log"
        with open(path, "w", encoding="utf-8", buffering=1) as log:
            progress.start("configuring llama.cpp's server")
            _run(configure, log, progress)
            _run(make, log, progress)
        progress.done()
        os.replace(target / "bin" / _NAME, partial / _NAME)
        for folder in (sources, target):
            shutil.rmtree(folder)
        return facts

    return cached(_KIND, _inputs(), build).directory / _NAME


def _tool(name: str) -> str:
    """Return a build tool of this Python's environment, else of the path."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if _is_program(beside) else shutil.which(name)
    if not found:
        raise ConfigError(f"Compiling llama.cpp's server needs {name}: run `pip install {' '.join(_TOOLS)}`, then the same command again.")
    return found


def _run(command: Sequence[str], log: TextIO, progress: Progress) -> None:
    """Run a step of the build into the log; a line ``[3/206] ...`` of ninja's moves the bar.

    Raises:
        DiskFull: the compiler found no room.
        TeacherError: it failed, with its first complaint.
    """
    complaint, done = "", 0
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.write(line)
                moved = re.match(r"\[(\d+)/(\d+)\]", line)
                if moved:
                    if not done:
                        progress.start("compiling llama.cpp's server", int(moved[2]), "files")
                    progress.advance(int(moved[1]) - done)
                    done = int(moved[1])
                elif not complaint and re.search(r"\berror\b|No space left", line, re.IGNORECASE):
                    complaint = line.strip()  # the first is the cause of the others
        except BaseException:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # ninja's compilers too
            raise
    if process.returncode:
        log.flush()
        said = complaint or f"exit status {process.returncode}"
        if "No space left" in said:
            raise DiskFull(
                "The disk filled up while llama.cpp's server was compiled; free some space, or name another folder with CDCDA_CACHE."
            )
        raise TeacherError(f"llama.cpp's server cannot be compiled ({said[:200].rstrip('.')}); everything that was said is in {log.name}.")
