"""The llama-cpp-python wheel: compiled once for a machine, kept in the user's cache folder, shared by all checkouts.

A wheel lies in ``~/.cache/cdcda/wheels/<key>/``, where the key covers everything that changes the machine code: version,
CMake arguments, processor (the build targets exactly this one), compiler and C library. It is built in a temporary
folder beside and renamed, so a wheel that is there is whole; a lock lets only one set-up compile at a time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from setup_errors import SetupError, failure_text

PACKAGE = "llama-cpp-python"
# The multimodal part doubles the compile time and nothing here uses it.
CMAKE_ARGS = "-DLLAVA_BUILD=OFF"
# Without AMX: what a GCC older than 12.4 or 13.3 (its bug 114098) makes of llama.cpp's AMX code crashes in the first matrix product.
CXXFLAGS = "-U__AMX_INT8__"
CPU_FIELDS = ("vendor_id", "cpu family", "model", "model name", "flags", "CPU implementer", "CPU part", "CPU variant", "Features")


@dataclass(frozen=True)
class WheelKey:
    """Everything that makes two builds differ."""

    version: str
    cmake_args: str
    flags: str
    machine: str
    cpu: str
    compiler: str
    libc: str

    def digest(self) -> str:
        """Sixteen hex digits, the name of the folder that holds the wheel."""
        text = json.dumps(asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def pinned_version(constraints: str, package: str = PACKAGE) -> str:
    """The version that the constraints hold a package at.

    Raises:
        SetupError: when the package is not pinned.
    """
    found = re.search(rf"^{re.escape(package)}\s*==\s*([^\s;#]+)", constraints, re.MULTILINE | re.IGNORECASE)
    if not found:
        raise SetupError(f"constraints.txt does not pin {package}; restore the file, or make it anew with `make constraints`.")
    return found.group(1)


def cpu_identity(cpuinfo: str) -> str:
    """The parts of /proc/cpuinfo that -march=native looks at, the same whatever the number and order of the cores."""
    lines = set()
    for line in cpuinfo.splitlines():
        name, _, value = (part.strip() for part in line.partition(":"))
        if name in CPU_FIELDS:
            lines.add(f"{name}={' '.join(sorted(value.split()))}")
    return "; ".join(sorted(lines))


def cmake_args(env: Mapping[str, str]) -> str:
    """Our CMake arguments followed by the user's own, which may overrule them."""
    return f"{CMAKE_ARGS} {env.get('CMAKE_ARGS', '')}".strip()


def cxxflags(env: Mapping[str, str]) -> str:
    """Our compiler flags followed by the user's own, which may overrule them."""
    return f"{CXXFLAGS} {env.get('CXXFLAGS', '')}".strip()


def key_of_this_machine(version: str, env: Mapping[str, str]) -> WheelKey:
    """The key of a build made here and now."""
    cpuinfo = Path("/proc/cpuinfo")
    cpu = cpu_identity(cpuinfo.read_text(errors="replace")) if cpuinfo.exists() else platform.processor()
    found = shutil.which(env.get("CXX") or "c++", path=env.get("PATH")) or shutil.which("g++", path=env.get("PATH"))
    compiler = "none"
    if found:
        shown = subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
        compiler = shown.partition("\n")[0]
    flags = " ".join([env.get("CFLAGS", ""), cxxflags(env), env.get("LDFLAGS", "")]).strip()
    return WheelKey(version, cmake_args(env), flags, platform.machine(), cpu, compiler, " ".join(platform.libc_ver()))


def cache_folder(env: Mapping[str, str]) -> Path:
    """Where this user's wheels are kept."""
    base = env.get("XDG_CACHE_HOME") or os.path.join(env.get("HOME") or os.path.expanduser("~"), ".cache")
    return Path(base) / "cdcda" / "wheels"


def find_wheel(folder: Path) -> Path | None:
    """The finished wheel in a key's folder; a file that is no whole archive is not one."""
    for wheel in sorted(folder.glob("llama_cpp_python-*.whl")):
        if zipfile.is_zipfile(wheel):
            return wheel
    return None


def parse_progress(line: str) -> tuple[int, int] | None:
    """Read how far the compiler is from a line of ninja ``[57/140] ...`` or make ``[ 41%] ...``; None for other lines."""
    ninja = re.match(r"\s*\[(\d+)/(\d+)\]", line)
    if ninja:
        return int(ninja.group(1)), int(ninja.group(2))
    make = re.match(r"\s*\[\s*(\d+)%\]", line)
    return (int(make.group(1)), 100) if make else None


def clock(seconds: float) -> str:
    """Seconds as m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def remaining(done: int, total: int, elapsed: float) -> float | None:
    """Seconds that a compile still needs, judged by the files so far; None while that would be a guess."""
    if done < 4 or elapsed < 5:
        return None
    return elapsed * (total - done) / done


def progress_text(done: int, total: int, elapsed: float, compiling: float) -> str:
    """The live line of a compile.

    Args:
        done: files compiled.
        total: files to compile; 0 while the sources are still on their way.
        elapsed: seconds since the job began.
        compiling: seconds since the first file was done.
    """
    if not total:
        return f"llama.cpp: fetching the sources, {clock(elapsed)}"
    left = remaining(done, total, compiling)
    tail = f", about {clock(left)} left" if left is not None else ""
    return f"llama.cpp: compiled {done} of {total} files, {clock(elapsed)} gone{tail}"


class WheelJob:
    """Gets the wheel in the background: found in the cache, waited for, or compiled.

    Call ``poll`` until it returns True, then read ``wheel``; call ``stop`` when leaving early.
    """

    def __init__(self, key: WheelKey, cache: Path, python: Path, log: Path) -> None:
        self.key = key
        self.folder = cache / key.digest()
        self.wheel: Path | None = None
        self.note = ""
        self._python = python
        self._log_path = log
        self._lock: IO[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: IO[str] | None = None
        self._build: Path | None = None
        self._began = time.monotonic()
        self._first: float | None = None
        self._count = (0, 0)

    def poll(self) -> bool:
        """Move the job on without blocking; True once the wheel is there.

        Raises:
            SetupError: when the compile fails.
        """
        if self.wheel is None:
            self.wheel = None if self._process else find_wheel(self.folder)
        if self.wheel is not None:
            self.stop()
            return True
        if self._process is None:
            if self._take_lock():
                # Another set-up may have finished between our look and the lock.
                if find_wheel(self.folder) is None:
                    self._start()
            else:
                self.note = f"llama.cpp: another set-up on this machine compiles it, waiting, {clock(time.monotonic() - self._began)}"
            return False
        self._read_progress()
        if self._process.poll() is not None:
            self._finish(self._process.returncode)
        return False

    def stop(self) -> None:
        """End the compiler if it runs, remove what is unfinished, and release the lock."""
        if self._process is not None and self._process.poll() is None:
            # The compiler's children are in its own group: pip, cmake, ninja and g++ all go.
            os.killpg(self._process.pid, signal.SIGTERM)
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        self._process = None
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        if self._build is not None:
            shutil.rmtree(self._build, ignore_errors=True)
            self._build = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take_lock(self) -> bool:
        if self._lock is not None:
            return True
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = open(self.folder / "lock", "w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return False
        self._lock = lock
        return True

    def _start(self) -> None:
        for stale in self.folder.glob("build-*"):  # of a set-up that was killed: we hold the lock, so nobody uses it
            shutil.rmtree(stale, ignore_errors=True)
        (self.folder / "key.json").write_text(json.dumps(asdict(self.key), indent=2) + "\n")
        self._build = Path(tempfile.mkdtemp(prefix="build-", dir=self.folder))
        env = dict(os.environ)
        env["CMAKE_ARGS"] = self.key.cmake_args
        env["CXXFLAGS"] = cxxflags(env)
        env["TMPDIR"] = str(self._build)  # so that killing us leaves nothing elsewhere
        env["SKBUILD_NINJA_MAKE_FALLBACK"] = "false"  # plain make would compile one file at a time
        tools = str(Path(__file__).with_name("build-constraints.txt"))
        env.update({"PIP_CONSTRAINT": tools, "PIP_BUILD_CONSTRAINT": tools})  # older pips read the first, newer the second
        env.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 2))
        # pip's own cache of wheels does not look at CMAKE_ARGS: keep out of it.
        command = [str(self._python), "-m", "pip", "wheel", "--no-cache-dir", "--no-deps", "--verbose"]
        command += ["--no-binary", PACKAGE, "--wheel-dir", str(self._build / "out"), f"{PACKAGE}=={self.key.version}"]
        with open(self._log_path, "wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )
        self._reader = open(self._log_path, errors="replace")
        self._began = time.monotonic()

    def _read_progress(self) -> None:
        now = time.monotonic()
        if self._reader is not None:
            for line in self._reader.read().splitlines():
                self._count = max(self._count, parse_progress(line) or (0, 0))
        if self._count[1] and self._first is None:
            self._first = now
        compiling = now - self._first if self._first is not None else 0.0
        self.note = progress_text(*self._count, elapsed=now - self._began, compiling=compiling)

    def _finish(self, code: int) -> None:
        built = sorted((self._build or self.folder).glob("out/llama_cpp_python-*.whl")) if code == 0 else []
        if not built:
            text = self._log_path.read_text(errors="replace")
            raise SetupError(failure_text(f"Compiling {PACKAGE}", text, self._log_path))
        os.replace(built[0], self.folder / built[0].name)
        self.wheel = self.folder / built[0].name
