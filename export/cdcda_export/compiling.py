"""Programs of llama.cpp, compiled from the sources that the installed llama-cpp-python was made of: cmake, ninja and a bar that moves.

Both the server of this machine (:mod:`cdcda_mobile.teachers.native_server`) and the engine of phones (:mod:`cdcda_engine.build`) are made
here; what differs is the compiler and what it is told.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from cdcda_export.cache import cache_folder, cached
from cdcda_export.converter import unpack_sources
from cdcda_export.errors import BuildError, ConfigError, DiskFull
from cdcda_export.progress import Progress
from cdcda_export.runtime import cpu_threads

TOOLS = ("cmake", "ninja")
# Static programs without anything that none of ours needs: TLS, a web page, tests.
CMAKE = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_BUILD_APP=OFF",
)
# What a GCC older than 12.4 or 13.3 (its bug 114098) makes of llama.cpp's AMX code crashes in the first product.
WITHOUT_AMX = "-U__AMX_INT8__"
# For this machine alone.
NATIVE = ("-DGGML_NATIVE=ON", "-DGGML_OPENMP=ON", f"-DCMAKE_CXX_FLAGS={WITHOUT_AMX}")
_UNUSED = ("docs", "media", "models")  # half of the sources by size


def compiled(kind: str, inputs: Mapping[str, Any], what: str, progress: Progress, make: Callable[[Build], dict[str, str]]) -> Path:
    """Return the folder of what was compiled, from the cache folder or made now; the compiler's words are in ``<kind>/build.log`` there.

    Args:
        kind: names the folder in the cache folder.
        inputs: everything that decides the machine code.
        what: it is called in messages.
        progress: told what goes on.
        make: puts what is kept into ``Build.folder``, and returns facts of it.

    Raises:
        ConfigError, FileError, BuildError, DiskFull: see ``Build``.
    """

    def build(partial: Path) -> dict[str, str]:
        with open(cache_folder() / kind / "build.log", "w", encoding="utf-8", buffering=1) as log:
            compiler = Build(what, partial, log, progress)
            facts = make(compiler)
            compiler.clear()
        return facts

    entry = cached(kind, inputs, build, waiting=lambda: progress.start(f"waiting for another process that compiles {what}"))
    progress.done()
    return entry.directory


@dataclass
class Build:
    """One build of llama.cpp in a folder of its own.

    Raises:
        ConfigError: cmake or ninja is not there.

    Attributes:
        what: it is called in messages, for example "llama.cpp's server".
        folder: where sources and objects lie.
        log: receives everything that is said.
        progress: told what goes on.
    """

    what: str
    folder: Path
    log: TextIO
    progress: Progress

    def __post_init__(self) -> None:
        """Find the tools before anything is fetched."""
        self._tools = {name: self._tool(name) for name in TOOLS}
        self._made: set[Path] = {self.sources}

    @property
    def sources(self) -> Path:
        """Where the sources lie."""
        return self.folder / "sources"

    def unpack(self, expected: Sequence[str]) -> dict[str, str]:
        """Write the sources; return the name and the hash of the distribution that they came in.

        Args:
            expected: files and folders without which it is not the right one.

        Raises:
            FileError: it cannot be fetched.
        """
        self.sources.mkdir()
        self.progress.start("fetching llama.cpp's sources")
        return unpack_sources(self.sources, lambda name: name.parts[0] not in _UNUSED, ("CMakeLists.txt", "LICENSE", *expected))

    def make(self, name: str, options: Sequence[str], programs: Sequence[str], environment: Mapping[str, str] | None = None) -> Path:
        """Configure, compile and return the folder of the finished programs.

        A second call with the same name compiles what other options change, and nothing else.

        Args:
            name: of the folder for objects.
            options: for cmake, beside ``CMAKE``.
            programs: what is made.
            environment: further variables.

        Raises:
            BuildError: it cannot be compiled.
            DiskFull: there is no room for it.
        """
        cmake, ninja, target = self._tools["cmake"], self._tools["ninja"], self.folder / name
        self._made.add(target)
        self.progress.start(f"configuring {self.what}")
        configure = [cmake, "-S", str(self.sources), "-B", str(target), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        self._run([*configure, *CMAKE, *options], environment)
        self._run([ninja, "-C", str(target), "-j", str(cpu_threads()), *programs], environment)
        self.progress.done()
        return target / "bin"

    def clear(self) -> None:
        """Remove sources and objects."""
        for place in self._made:
            shutil.rmtree(place)

    def _tool(self, name: str) -> str:
        """Return a build tool of this Python's environment, else of the path."""
        beside = Path(sys.executable).parent / name
        found = str(beside) if beside.is_file() and os.access(beside, os.X_OK) else shutil.which(name)
        if not found:
            raise ConfigError(f"Compiling {self.what} needs {name}: run `pip install {' '.join(TOOLS)}`, then the same command again.")
        return found

    def _run(self, command: Sequence[str], environment: Mapping[str, str] | None) -> None:
        """Run a step into the log; a line ``[3/206] ...`` of ninja's moves the bar."""
        complaint, done = "", 0
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        ) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    self.log.write(line)
                    moved = re.match(r"\[(\d+)/(\d+)\]", line)
                    if moved:
                        if not done:
                            self.progress.start(f"compiling {self.what}", int(moved[2]), "files")
                        self.progress.advance(int(moved[1]) - done)
                        done = int(moved[1])
                    elif not complaint and re.search(r"\berror\b|No space left", line, re.IGNORECASE):
                        complaint = line.strip()  # the first is the cause of the others
            except BaseException:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)  # ninja's compilers too
                raise
        if process.returncode:
            self.log.flush()
            said = complaint or f"exit status {process.returncode}"
            if "No space left" in said:
                raise DiskFull(
                    f"The disk filled up while {self.what} was compiled; free some space, or name another folder with CDCDA_CACHE."
                )
            raise BuildError(f"{self.what} cannot be compiled ({said[:200].rstrip('.')}); everything that was said is in {self.log.name}.")
