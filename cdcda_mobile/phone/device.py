"""A phone on a cable, over adb: what it is, what it is told, and what is put on it. Nothing stays on it but what was asked for."""

from __future__ import annotations

import re
import secrets
import shlex
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdcda_engine.variants import features_of
from cdcda_export.errors import ConfigError, DeviceError, DiskFull, MissingDependency
from cdcda_mobile.phone.classes import SLOW

_TEMPORARY = "/data/local/tmp"  # where the shell may run programs, on every Android
_EXIT = "cdcda-exit:"
_SPARE = 64 * 2**20  # bytes that are left free
_TIMEOUT_S = 600.0
# Efficiency cores by the part number in /proc/cpuinfo: Cortex-A53, A55, A510, A520; Qualcomm's Kryo 2xx, 3xx and 4xx Silver.
_LITTLE_PARTS = frozenset({"0xd03", "0xd05", "0xd46", "0xd80", "0x801", "0x803", "0x805"})
_ADVICE = {
    "unauthorized": "unlock it and confirm on its screen that this computer may debug it",
    "no": "this user may not open its USB port; install Android's udev rules, or add yourself to the group plugdev",
}
_FEW = 4


@dataclass(frozen=True)
class State:
    """How a phone is at a moment.

    Attributes:
        battery: per cent.
        charging: whether a cable feeds it.
        temperature: of the battery, in degrees Celsius.
        throttling: Android's thermal status, 0 for none; None where it does not say (before Android 10).
    """

    battery: int | None
    charging: bool | None
    temperature: float | None
    throttling: int | None


@dataclass(frozen=True)
class Core:
    """A core: its number, its highest clock in kHz (0: not said) and its part number ('' where it is off)."""

    number: int
    khz: int
    part: str


class Device:
    """One phone.

    Args:
        adb: adbutils' handle.
    """

    def __init__(self, adb: Any) -> None:
        self._adb = adb
        self.serial = str(adb.serial)

    def run(self, command: str) -> str:
        """Run a shell command and return what it said.

        Raises:
            DeviceError: it failed, or the phone is gone.
        """
        done = self._ask(command)
        if done.returncode:
            said = done.output.strip().splitlines()
            raise DeviceError(f"The phone refused `{command[:60]}`: {said[-1] if said else f'exit status {done.returncode}'}.")
        return str(done.output).strip()

    def try_run(self, command: str) -> str:
        """Run a shell command; return '' where it fails.

        Raises:
            DeviceError: the phone is gone.
        """
        done = self._ask(command)
        return "" if done.returncode else str(done.output).strip()

    def _ask(self, command: str) -> Any:
        with _explained():
            return self._adb.shell2(command, timeout=_TIMEOUT_S)

    def stream(self, command: str, line: Callable[[str], None]) -> int:
        """Run a shell command, give every line as it comes, and return its exit status.

        Raises:
            DeviceError: the phone is gone.
        """
        rest, status = b"", None
        with _explained(), self._adb.shell(f"{command}; echo {_EXIT}$?", stream=True, timeout=_TIMEOUT_S) as connection:
            connection.conn.settimeout(_TIMEOUT_S)
            while chunk := connection.recv(4096):
                *lines, rest = (rest + chunk).split(b"\n")
                for text in (one.decode(errors="replace").rstrip("\r") for one in lines):
                    if text.startswith(_EXIT):
                        status = int(text.removeprefix(_EXIT))
                    else:
                        line(text)
        if status is None:
            remedy = f"plug it in, remove what was put there (adb shell rm -r {_TEMPORARY}/cdcda-*)"
            raise DeviceError(f"The phone was unplugged during the run; {remedy} and run the same command again.")
        return status

    # What it is.

    def prop(self, name: str) -> str:
        """Return a system property, '' where it is not set."""
        return self.run(f"getprop {shlex.quote(name)}")

    @property
    def abi(self) -> str:
        """Its instruction set, as Android names it."""
        return self.prop("ro.product.cpu.abi")

    def describe(self) -> dict[str, str]:
        """Return what the phone says of itself; nothing that tells this phone from another of its model."""
        names = {
            "manufacturer": "ro.product.manufacturer",
            "model": "ro.product.model",
            "soc": "ro.soc.model",
            "android": "ro.build.version.release",
            "api": "ro.build.version.sdk",
            "abi": "ro.product.cpu.abi",
        }
        return {key: self.prop(name) for key, name in names.items()}

    def features(self) -> set[str]:
        """Return what all cores have."""
        return features_of(self.run("cat /proc/cpuinfo"))

    def cores(self) -> list[Core]:
        """Return the cores that can be used."""
        parts = parts_of(self.run("cat /proc/cpuinfo"))
        listing = self.run(
            "cd /sys/devices/system/cpu && for c in cpu[0-9]*; do echo $c $(cat $c/cpufreq/cpuinfo_max_freq 2>/dev/null); done"
        )
        found = []
        for name, _, khz in (text.strip().partition(" ") for text in listing.splitlines()):
            number = int(name.removeprefix("cpu"))
            found.append(Core(number, int(khz or 0), parts.get(number, "")))
        return sorted(found, key=lambda core: core.number)

    def state(self) -> State:
        """Return battery and temperature, None for what it does not say."""
        battery = dict(re.findall(r"^\s*([\w ]+): (\S+)\s*$", self.try_run("dumpsys battery"), re.MULTILINE))
        fed = [value for name, value in battery.items() if name.endswith("powered")]
        status = re.search(r"Thermal Status: (\d+)", self.try_run("dumpsys thermalservice"))
        return State(
            battery=int(battery["level"]) if "level" in battery else None,
            charging="true" in fed if fed else None,
            temperature=int(battery["temperature"]) / 10 if "temperature" in battery else None,
            throttling=int(status[1]) if status else None,
        )

    # What is put on it.

    def free_bytes(self, folder: str) -> int:
        """Return how much room a folder's file system has."""
        line = self.run(f"df -k {shlex.quote(folder)}").splitlines()[-1]
        return int(line.split()[3]) * 1024

    def sha256(self, path: str) -> str:
        """Return the hash of a file, '' where there is none."""
        return self.try_run(f"sha256sum {shlex.quote(path)}").partition(" ")[0]

    def push(self, source: Path, target: str, advance: Callable[[int], object], mode: int = 0o644) -> None:
        """Put a file on the phone; it has its name only when it is whole.

        Args:
            source: here.
            target: there.
            advance: told of bytes that went.
            mode: of the file there.

        Raises:
            DiskFull: the phone has no room for it.
            DeviceError: the phone is gone or refuses.
        """
        partial = f"{target}.partial"
        self.run(f"rm -f {shlex.quote(partial)}")  # of a push that was cut short
        self._need_room(source, target.rpartition("/")[0])
        try:
            with _explained(), source.open("rb") as stream:
                self._adb.sync.push(_Counted(stream, advance), partial, mode=mode, check=True)
        except DeviceError as error:
            if "FAIL" not in str(error):
                raise
            raise DeviceError(f"The phone does not take {target}: it has no room, or gives no permission.") from error
        self.run(f"mv {shlex.quote(partial)} {shlex.quote(target)}")

    def deliver(self, source: Path, target: str, advance: Callable[[int], object]) -> None:
        """Put a file into an app's folder, where phones let the shell write but not adb itself: it goes to the shell's folder first.

        Args:
            source: here.
            target: there; it has its name only when it is whole.
            advance: told of bytes that went.

        Raises:
            DiskFull: the phone has no room for it twice.
            DeviceError: the phone is gone or refuses.
        """
        # Always the same name: what a push that was cut short left there goes with the next one.
        waiting, partial = f"{_TEMPORARY}/cdcda-push", shlex.quote(f"{target}.partial")
        clean = f"rm -f {waiting} {waiting}.partial {partial}"
        self.run(clean)
        self._need_room(source, _TEMPORARY, copies=2)
        try:
            self.push(source, waiting, advance)
            # Not mv alone: from one file system to another it keeps the owner, which an app's folder does not let anybody set.
            self.run(f"cp {waiting} {partial} && mv {partial} {shlex.quote(target)}")
        finally:
            with suppress(DeviceError):  # unplugged: the first reason is the one to hear
                self.run(clean)

    def _need_room(self, source: Path, folder: str, copies: int = 1) -> None:
        need = copies * source.stat().st_size
        if self.free_bytes(folder) < need + _SPARE:
            raise DiskFull(f"The phone has no room for {source.name} ({need / 1e6:.0f} MB are needed); free some storage on it.")

    @contextmanager
    def staging(self) -> Iterator[str]:
        """Give a folder on the phone that is gone afterwards, with what runs in it."""
        folder = f"{_TEMPORARY}/cdcda-{secrets.token_hex(4)}"
        self.run(f"mkdir -p {folder}")
        try:
            yield folder
        finally:
            with suppress(DeviceError):  # unplugged: the first reason is the one to hear
                self.run(f"test -f {folder}/pid && kill -9 $(cat {folder}/pid) 2>/dev/null; rm -rf {folder}")


class _Counted:
    """A stream that tells how far it was read."""

    def __init__(self, stream: Any, advance: Callable[[int], object]) -> None:
        self._stream, self._advance = stream, advance

    def read(self, size: int) -> bytes:
        chunk: bytes = self._stream.read(size)
        self._advance(len(chunk))
        return chunk


@contextmanager
def _explained() -> Iterator[None]:
    """Turn adb's errors into one sentence."""
    from adbutils.errors import AdbError

    try:
        yield
    except (AdbError, EOFError, OSError, AssertionError, ValueError, struct.error, subprocess.SubprocessError) as error:
        # adbutils reads answers that were cut short without a look at their length.
        raise DeviceError(f"The phone does not answer ({error}); check the cable and run the same command again.") from error


def connect(serial: str = "") -> Device:
    """Return a phone.

    Args:
        serial: which one; '' for the only one there is.

    Raises:
        MissingDependency: adbutils is not installed.
        DeviceError: no phone is there, or it does not trust this machine.
        ConfigError: there are several, or not that one.
    """
    try:
        import adbutils
    except ImportError as error:
        raise MissingDependency("adbutils", "phone") from error

    with _explained():
        client = adbutils.AdbClient()
        states = {info.serial: info.state for info in client.list()}
    ready = [name for name, state in states.items() if state == "device"]
    if serial and serial not in states:
        raise ConfigError(f"There is no phone {serial} on adb. Connected: {', '.join(states) or 'none'}.")
    if serial and serial not in ready or not serial and states and not ready:
        name = serial or next(iter(states))
        state = states[name]
        advice = _ADVICE.get(state, "unplug it and plug it in again")
        raise DeviceError(f"The phone {name} is {'not accessible' if state == 'no' else state}: {advice}.")
    if not ready:
        raise DeviceError(
            "No phone is connected: switch on USB debugging (Settings, System, Developer options), plug it in and confirm on its screen."
        )
    if not serial and len(ready) > 1:
        raise ConfigError(f"Several phones are connected; name one with --device: {', '.join(ready)}.")
    return Device(client.device(serial or ready[0]))


def parts_of(cpuinfo: str) -> dict[int, str]:
    """Return core -> part number of a ``/proc/cpuinfo``."""
    found, number = {}, -1
    for name, _, value in (line.partition(":") for line in cpuinfo.splitlines()):
        if name.strip() == "processor":
            number = int(value)
        elif name.strip() == "CPU part":
            found[number] = value.strip()
    return found


def big_cores(cores: list[Core]) -> list[int]:
    """Return the cores that should compute, the fastest first: those that make nobody wait; where all are little, four of them."""
    fastest = max((core.khz for core in cores), default=0)
    ordered = sorted(cores, key=lambda core: -core.khz)
    big = [core.number for core in ordered if core.part not in _LITTLE_PARTS and core.khz >= SLOW * fastest]
    return big or [core.number for core in ordered[:_FEW]]
