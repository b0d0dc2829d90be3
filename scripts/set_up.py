"""Create or bring up to date ``.venv``: system packages, uv, everything that uv installs, and the llama.cpp wheel.

Started by ``scripts/setup.sh`` with any Python 3.11 or newer; needs the standard library only. A second run with
nothing changed answers from a stamp in a fraction of a second. ``.venv/.incomplete`` marks a venv that a set-up was
working on: when a killed set-up left it, the venv is made anew, because no installer says what it had half written.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import system_packages
from llama_wheel import PACKAGE, WheelJob, cache_folder, clock, cmake_args, cxxflags, find_wheel, key_of_this_machine, pinned_version
from setup_errors import SetupError, failure_text

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("train", "onnx", "hf", "data", "fleet", "privacy", "phone", "dev", "all")
PLAIN_EVERY = 20.0  # seconds between progress lines where there is no terminal


class Venv:
    """The paths of a virtual environment and what its stamp says."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / ".venv"
        self.python = self.folder / "bin" / "python"
        self.uv = self.folder / "bin" / "uv"
        self.log = self.folder / "setup.log"
        self.packages_log = self.folder / "packages.log"
        self.build_log = self.folder / "llama-cpp-build.log"
        self.stamp = self.folder / ".setup.json"
        self.incomplete = self.folder / ".incomplete"

    def version(self) -> str | None:
        """Python's version in the venv, None where there is no working venv."""
        config = self.folder / "pyvenv.cfg"
        if not (self.python.exists() and config.exists()):
            return None
        found = re.search(r"^version(?:_info)?\s*=\s*(\d+\.\d+\S*)", config.read_text(), re.MULTILINE)
        return found.group(1) if found else None

    def read_stamp(self) -> dict[str, object]:
        """The stamp of the last set-up that ended well, {} where there is none."""
        try:
            stamp = json.loads(self.stamp.read_text())
        except (OSError, ValueError):
            return {}
        return stamp if isinstance(stamp, dict) else {}

    def usable(self) -> bool:
        """Whether the venv can be added to, rather than made anew."""
        version = self.version()
        if version is None or self.incomplete.exists():
            return False
        moved = self.read_stamp().get("root", str(self.root)) != str(self.root)  # scripts in it name the old place
        return not moved and tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= (3, 11)


def fingerprint(venv: Venv, env: Mapping[str, str]) -> str:
    """A hash of all that decides what the venv should hold, but for the extras."""
    parts = [str(venv.root), venv.version() or "", cmake_args(env), cxxflags(env)]
    parts += [(venv.root / name).read_text() for name in ("pyproject.toml", "constraints.txt")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def is_current(venv: Venv, extras: Sequence[str], env: Mapping[str, str]) -> bool:
    """Whether the venv holds what these extras ask for."""
    if not venv.usable():
        return False
    stamp = venv.read_stamp()
    had = stamp.get("extras")
    return stamp.get("fingerprint") == fingerprint(venv, env) and isinstance(had, list) and ("all" in had or set(extras) <= set(had))


class Screen:
    """One live line on a terminal, a plain line now and then elsewhere."""

    def __init__(self, out: IO[str], live: bool) -> None:
        self._out = out
        self._live = live
        self._shown = False
        self._last = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line that stays."""
        self.clear()
        self._out.write(text + "\n")
        self._out.flush()

    def clear(self) -> None:
        """Take the live line away."""
        if self._shown:
            self._out.write("\r\033[K")
            self._out.flush()
            self._shown = False

    def update(self, text: str) -> None:
        """Show how things stand."""
        now = time.monotonic()
        if self._live:
            width = shutil.get_terminal_size().columns - 1
            self._out.write("\r\033[K" + text[:width])
            self._out.flush()
            self._shown = True
        elif now - self._last >= PLAIN_EVERY:
            self._last = now
            self.say(text)


def uv_environment(pip_config: str, env: Mapping[str, str], same_disk: bool) -> dict[str, str]:
    """The environment for uv, which does not read pip's settings: an index or a CA file set up for pip is passed on.

    Args:
        pip_config: what ``pip config list`` prints.
        env: the environment we run in; what it says to uv directly wins.
        same_disk: whether uv's cache and the venv share a file system, so that files can be linked.
    """
    settings = dict(re.findall(r"^(?:global|install|:env:)\.([\w-]+)='(.*)'$", pip_config, re.MULTILINE))
    wanted = {
        "UV_DEFAULT_INDEX": settings.get("index-url", ""),
        "UV_INDEX": settings.get("extra-index-url", ""),
        "SSL_CERT_FILE": settings.get("cert", ""),
        "UV_HTTP_TIMEOUT": "180",
        "UV_LINK_MODE": "" if same_disk else "copy",
    }
    result = dict(env)
    result.update({name: value for name, value in wanted.items() if value and name not in env})
    result.update({"UV_NO_PROGRESS": "1", "UV_PYTHON_DOWNLOADS": "never", "NO_COLOR": "1"})
    return result


def on_same_disk(venv: Venv, env: Mapping[str, str]) -> bool:
    """Whether uv can link from its cache into the venv."""
    place = Path(env.get("UV_CACHE_DIR") or Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uv")
    while not place.exists():
        place = place.parent
    return place.stat().st_dev == venv.folder.stat().st_dev


def uv_command(venv: Venv, extras: Sequence[str], wheel: Path | None) -> list[str]:
    """The uv call that installs everything else (no wheel yet), or all of it, our own packages included."""
    command = [str(venv.uv), "pip", "install", "--python", str(venv.python), "--constraints", str(venv.root / "constraints.txt")]
    if wheel is None:
        # An override with a marker that never holds takes the one slow package out of the whole resolution.
        override = venv.folder / "without-llama.txt"
        override.write_text(f"{PACKAGE}; sys_platform == 'never'\n")
        command += ["--overrides", str(override), "--requirements", str(venv.root / "pyproject.toml")]
        return command + [word for extra in extras for word in ("--extra", extra)]
    command += ["--find-links", str(wheel.parent), "--only-binary", PACKAGE]
    command += ["--reinstall-package", PACKAGE]  # the one that is there may have been compiled otherwise
    command += ["--build-constraints", str(venv.root / "constraints.txt")]  # setuptools, which builds our own package
    return [*command, "--editable", f"{venv.root}[{','.join(extras)}]" if extras else str(venv.root)]


@contextmanager
def half_written(venv: Venv) -> Iterator[None]:
    """Mark the venv while an installer works on it; the mark outlives a kill and Ctrl-C, not an installer's own failure."""
    venv.incomplete.touch()
    try:
        yield
    except SetupError:
        venv.incomplete.unlink(missing_ok=True)
        raise
    venv.incomplete.unlink(missing_ok=True)


def run_step(what: str, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
    """Run a command into the log.

    Raises:
        SetupError: when it fails, with the cause where its output shows one.
    """
    start = log.stat().st_size if log.exists() else 0
    with open(log, "a") as out:
        code = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=env, cwd=ROOT, check=False
        ).returncode
    if code != 0:
        raise SetupError(failure_text(what, log.read_text(errors="replace")[start:], log))


def create_venv(venv: Venv, screen: Screen) -> None:
    """Make an empty venv with pip and uv in it, or add uv to one that is usable."""
    if venv.version() is None:
        version = ".".join(str(part) for part in sys.version_info[:3])
        screen.say(f"Creating {venv.folder.name} with Python {version}")
        # Inside an activated venv sys.executable would make the new one hang off the old one.
        base = getattr(sys, "_base_executable", "") or sys.executable
        with half_written(venv):
            run_step("Creating the virtual environment", [base, "-m", "venv", str(venv.folder)], venv.log)
    if not venv.uv.exists():
        pin = f"uv=={pinned_version((venv.root / 'constraints.txt').read_text(), 'uv')}"
        with half_written(venv):
            run_step("Installing uv", [str(venv.python), "-m", "pip", "install", "--quiet", pin], venv.log)


def install(venv: Venv, extras: Sequence[str], screen: Screen) -> None:
    """Install everything: uv takes the wheels while the compiler works on llama.cpp."""
    show = [str(venv.python), "-m", "pip", "config", "list"]
    pip_config = subprocess.run(show, capture_output=True, text=True, check=False).stdout
    env = uv_environment(pip_config, os.environ, on_same_disk(venv, os.environ))
    key = key_of_this_machine(pinned_version((venv.root / "constraints.txt").read_text()), os.environ)
    job = WheelJob(key, cache_folder(os.environ), venv.python, venv.build_log)
    if find_wheel(job.folder) is None:
        screen.say(f"Compiling {PACKAGE} {key.version} for this machine, once (4 to 7 minutes on 2 cores); packages meanwhile")
    else:
        screen.say("Installing packages (llama.cpp was compiled earlier and comes from the cache)")
    command = uv_command(venv, extras, None)
    venv.incomplete.touch()
    with open(venv.packages_log, "w") as out:
        packages = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, env=env, cwd=venv.root)
    try:
        wait_for_both(job, packages, venv, screen)
    finally:
        job.stop()
        if packages.poll() is None:
            packages.terminate()
            packages.wait()
    with half_written(venv):
        run_step("Installing the project", uv_command(venv, extras, job.wheel), venv.log, env)
    load = [str(venv.python), "-c", "import llama_cpp"]
    run_step(f"Loading {PACKAGE} from {job.wheel} (delete that file to compile it again)", load, venv.log)


def wait_for_both(job: WheelJob, packages: subprocess.Popen[bytes], venv: Venv, screen: Screen) -> None:
    """Poll the compiler and uv until both are done.

    Raises:
        SetupError: as soon as either fails.
    """
    began, installed, log = time.monotonic(), False, venv.packages_log
    while True:
        compiled = job.poll()
        if not installed and packages.poll() is not None:
            venv.incomplete.unlink(missing_ok=True)  # uv ended by itself, so what it left is consistent
            text = log.read_text(errors="replace")
            if packages.returncode != 0:
                raise SetupError(failure_text("Installing packages", text, log))
            installed = True
            screen.say(f"Packages installed in {clock(time.monotonic() - began)}")
        if compiled and installed:
            return
        parts = [] if compiled else [job.note]
        if not installed:
            doing = (log.read_text(errors="replace").strip().splitlines() or ["resolving"])[-1].strip()
            parts.append(f"packages: {doing}, {clock(time.monotonic() - began)}")
        screen.update(" | ".join(part for part in parts if part))
        time.sleep(0.2)


@contextmanager
def only_one(root: Path, screen: Screen) -> Iterator[None]:
    """Hold the lock of this checkout, so that two set-ups do not write one venv."""
    with open(root / ".venv.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            screen.say("Another set-up works in this folder; waiting for it.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def set_up(venv: Venv, extras: Sequence[str], for_tests: bool, screen: Screen) -> None:
    """Bring the venv to where these extras are installed; returns at once when it is there already.

    Raises:
        SetupError: with the sentence to print.
    """
    lacking = system_packages.missing_packages(os.environ, for_tests)
    current = is_current(venv, extras, os.environ)
    if current and not (for_tests and lacking):
        return
    began = time.monotonic()
    if not current and not venv.usable() and venv.folder.exists():
        if venv.version() is not None or venv.incomplete.exists():
            screen.say(f"{venv.folder.name} is unfinished, moved or of an old Python: making it anew")
        shutil.rmtree(venv.folder)
    venv.folder.mkdir(exist_ok=True)
    with open(venv.log, "a") as log:
        system_packages.ensure(lacking, log)
    if current:
        return
    had = venv.read_stamp().get("extras")
    wanted = sorted({*extras, *(had if isinstance(had, list) else [])})
    venv.stamp.unlink(missing_ok=True)
    create_venv(venv, screen)
    install(venv, wanted, screen)
    stamp = {"root": str(venv.root), "fingerprint": fingerprint(venv, os.environ), "extras": wanted}
    venv.stamp.write_text(json.dumps(stamp) + "\n")
    screen.say(f"Set up in {clock(time.monotonic() - began)}")


def build_programs(venv: Venv) -> None:
    """Let the venv compile llama.cpp's own server and the engine of phones, which the tests start, where the user's cache has none yet.

    Raises:
        SetupError: when that fails; the command has said why.
    """
    for verb in ("build-server", "build-engine"):
        command = [str(venv.folder / "bin" / "cdcda"), verb]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=venv.root)
        try:
            failed = process.wait()
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)  # it ends its compilers, as at Ctrl-C; a kill would leave them
                process.wait()
        if failed:
            raise SetupError(f"The tests need what `cdcda {verb}` makes; what stops it stands above.")


def main(argv: Sequence[str] | None = None) -> int:
    """Parse the arguments and set up; errors are one sentence on stderr and exit status 1."""
    parser = argparse.ArgumentParser(description="Create or update .venv for this project.")
    parser.add_argument("--extras", default="train", help=f"comma-separated, of {', '.join(EXTRAS)} (default: %(default)s)")
    parser.add_argument(
        "--tests", action="store_true", help="also see to the system packages and the programs of llama.cpp that the tests need"
    )
    args = parser.parse_args(argv)
    extras = [extra for extra in args.extras.split(",") if extra]
    unknown = sorted(set(extras) - set(EXTRAS))
    if unknown:
        parser.error(f"unknown extras: {', '.join(unknown)}")
    # make and CI end us with SIGTERM: clean up as for Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    screen = Screen(sys.stdout, sys.stdout.isatty() and os.environ.get("TERM") != "dumb")
    try:
        with only_one(ROOT, screen):
            set_up(Venv(ROOT), extras, args.tests, screen)
            if args.tests:
                build_programs(Venv(ROOT))
    except SetupError as error:
        screen.clear()
        print(error, file=sys.stderr)
        return 1
    except OSError as error:  # a folder we may not write, a full disk
        screen.clear()
        print(f"Set-up stopped at {error.filename or 'a file'}: {error.strerror}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        screen.clear()
        print("Stopped. Nothing half-installed will be used: the next run starts the set-up again.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
