"""llama.cpp's own server, which answers several requests in one pass: found, or compiled once for this machine.

It is compiled from the source distribution of the very llama-cpp-python that is installed and kept in the cache folder
(``cdcda build-server``). Without it the local teacher is llama-cpp-python's server, which answers one request at a time.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from cdcda_export.cache import find
from cdcda_export.compiling import CMAKE, NATIVE, Build, compiled
from cdcda_export.converter import converter_version
from cdcda_export.errors import ConfigError
from cdcda_export.progress import Progress

SERVER_VARIABLE = "CDCDA_LLAMA_SERVER"
OFF = "off"
BUILD_COMMAND = "cdcda build-server"
_NAME = "llama-server"
_KIND = "servers"
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
    return {"version": converter_version(), "cmake": [*CMAKE, *NATIVE], "machine": platform.machine(), "processor": _processor()}


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
        BuildError: it cannot be compiled.
        DiskFull: there is no room for it.
    """

    def make(compiler: Build) -> dict[str, str]:
        facts = compiler.unpack(("tools/server",))
        os.replace(compiler.make("build", NATIVE, (_NAME,)) / _NAME, compiler.folder / _NAME)
        return facts

    return compiled(_KIND, _inputs(), "llama.cpp's server", progress, make) / _NAME
