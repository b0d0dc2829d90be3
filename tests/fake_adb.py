"""An adb server with one phone: the real protocol over a socket, a sandbox folder for storage, QEMU for the processor.

What the shell is told runs in ``sh`` with the phone's paths turned into the sandbox's; an ARM program that is pushed there gets a wrapper
that starts it under QEMU, as a kernel of that processor would.
"""

from __future__ import annotations

import os
import shutil
import socket
import socketserver
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

QEMU = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
_PATHS = ("/data/local/tmp", "/sdcard", "/proc/cpuinfo", "/sys/devices")
_CORE = "processor\t: {number}\nFeatures\t: {features}\nCPU part\t: {part}\n\n"


@dataclass
class FakePhone:
    """What the phone is, and how it misbehaves.

    Attributes:
        root: its storage.
        serial: its name on adb.
        state: what the server says of it.
        cpu: of QEMU.
        features: of its cores.
        properties: of getprop.
        packages: that are installed.
        opened: of those, the ones that were opened, for which Android made a folder.
        free_kb: of its storage.
        unplug_at: a word in a command during which the cable is pulled.
        commands: what the shell was told.
    """

    root: Path
    serial: str = "FAKE0001"
    state: str = "device"
    cpu: str = "max"
    features: str = "fp asimd asimdhp asimddp i8mm"
    properties: dict[str, str] = field(
        default_factory=lambda: {
            "ro.product.manufacturer": "Example",
            "ro.product.model": "One Two/3",
            "ro.soc.model": "SM8550",
            "ro.build.version.release": "14",
            "ro.build.version.sdk": "34",
            "ro.product.cpu.abi": "arm64-v8a",
        }
    )
    packages: tuple[str, ...] = ()
    opened: tuple[str, ...] = ()
    free_kb: int = 10_000_000
    unplug_at: str = ""
    commands: list[str] = field(default_factory=list)

    def lay_out(self) -> None:
        """Make its folders and programs."""
        for name in ("data/local/tmp", "sdcard/Android/data", "proc", "bin"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        for name in self.opened:
            self.local(f"/sdcard/Android/data/{name}/files").mkdir(parents=True, exist_ok=True)
        parts = ["0xd05"] * 2 + ["0xd44"]
        text = "".join(_CORE.format(number=n, features=self.features, part=part) for n, part in enumerate(parts))
        (self.root / "proc" / "cpuinfo").write_text(text)
        for number, khz in enumerate((1_800_000, 1_800_000, 3_000_000)):
            clock = self.root / "sys" / "devices" / "system" / "cpu" / f"cpu{number}" / "cpufreq" / "cpuinfo_max_freq"
            clock.parent.mkdir(parents=True, exist_ok=True)
            clock.write_text(f"{khz}\n")
        cases = "".join(f"{name}) echo '{value}';;\n" for name, value in self.properties.items())
        self._program("getprop", f'case "$1" in\n{cases}esac')
        battery = "  USB powered: true\\n  AC powered: false\\n  level: 81\\n  temperature: 297"
        self._program("dumpsys", f'case "$1" in battery) printf "{battery}\\n";; thermalservice) echo "Thermal Status: 0";; esac')
        self._program("df", f'echo "Filesystem 1K-blocks Used Available"; echo "/dev/x 1 1 {self.free_kb} 1% /"')
        known = "".join(f"{name}) echo package:/data/app/{name}.apk; exit 0;;\n" for name in self.packages)
        self._program("pm", f'case "$2" in\n{known}esac\nexit 1')

    def _program(self, name: str, body: str) -> None:
        path = self.root / "bin" / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def local(self, path: str) -> Path:
        """Return where a path of the phone's lies."""
        return self.root / path.lstrip("/")

    def shell(self, command: str) -> subprocess.Popen[bytes]:
        """Start a shell with a command."""
        self.commands.append(command)
        for path in _PATHS:
            command = command.replace(path, str(self.local(path)))
        environment = {"PATH": f"{self.root / 'bin'}:/usr/bin:/bin", "HOME": str(self.root)}
        return subprocess.Popen(
            ["sh", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment
        )

    def received(self, path: Path, mode: int) -> None:
        """Give a pushed file its mode."""
        path.chmod(mode & 0o777)

    def renamed(self) -> None:
        """Put a wrapper before every program for another processor that lies in the sandbox under its final name."""
        for path in self.local("/data/local/tmp").rglob("*"):
            if path.is_file() and os.access(path, os.X_OK) and not path.name.endswith((".elf", ".partial")):
                with path.open("rb") as stream:
                    head = stream.read(20)
                if head[:4] == b"\x7fELF" and head[18:20] == b"\xb7\x00":
                    program = path.with_name(f"{path.name}.elf")
                    path.rename(program)
                    path.write_text(f'#!/bin/sh\nexec {QEMU} -cpu {self.cpu} {program} "$@"\n')
                    path.chmod(0o755)


class _Handler(socketserver.BaseRequestHandler):
    server: _Server

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            chunk = self.request.recv(count - len(data))
            if not chunk:
                raise ConnectionError
            data += chunk
        return data

    def _okay(self, text: str | None = None) -> None:
        self.request.sendall(b"OKAY" + (b"" if text is None else f"{len(text):04x}{text}".encode()))

    def handle(self) -> None:
        try:
            while True:
                self._service(self._read(int(self._read(4), 16)).decode())
        except (ConnectionError, _Done):
            pass

    def _service(self, name: str) -> None:
        phones = {phone.serial: phone for phone in self.server.phones}
        if name == "host:version":
            self._okay("0029")
            raise _Done
        if name == "host:devices":
            self._okay("".join(f"{phone.serial}\t{phone.state}\n" for phone in phones.values()))
            raise _Done
        if name.startswith("host:tport:serial:"):
            self.phone = phones[name.removeprefix("host:tport:serial:")]
            self._okay()
            self.request.sendall(struct.pack("<Q", 1))
        elif name.startswith("shell:"):
            self._okay()
            self._shell(name.removeprefix("shell:"))
            raise _Done
        elif name == "sync:":
            self._okay()
            self._sync()
        else:
            text = f"unknown service {name}"
            self.request.sendall(f"FAIL{len(text):04x}{text}".encode())
            raise _Done

    def _shell(self, command: str) -> None:
        self.phone.renamed()
        process = self.phone.shell(command)
        assert process.stdout is not None
        if self.phone.unplug_at and self.phone.unplug_at in command:
            process.kill()
            return
        while chunk := os.read(process.stdout.fileno(), 4096):
            self.request.sendall(chunk)
        process.wait()

    def _sync(self) -> None:
        while True:
            kind, length = self._read(4).decode(), struct.unpack("<I", self._read(4))[0]
            path = self._read(length).decode()
            if kind == "STAT":
                place = self.phone.local(path)
                found = place.stat() if place.exists() else None
                values = (found.st_mode, found.st_size & 0xFFFFFFFF, int(found.st_mtime)) if found else (0, 0, 0)
                self.request.sendall(b"STAT" + struct.pack("<III", *values))
            elif kind == "SEND":
                name, _, mode = path.rpartition(",")
                place = self.phone.local(name)
                with place.open("wb") as stream:
                    while True:
                        word, size = self._read(4), struct.unpack("<I", self._read(4))[0]
                        if word == b"DONE":
                            break
                        stream.write(self._read(size))
                if name.startswith("/sdcard/Android/"):  # adb gives what it wrote an owner, and an app's folder lets nobody do that
                    text = b"remote fchown failed: Operation not permitted"
                    self.request.sendall(b"FAIL" + struct.pack("<I", len(text)) + text)
                    raise _Done
                self.phone.received(place, int(mode))
                self.request.sendall(b"OKAY" + struct.pack("<I", 0))
            else:
                raise _Done


class _Done(Exception):
    """The conversation is over."""


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = daemon_threads = True
    phones: list[FakePhone]


@contextmanager
def adb_server(*phones: FakePhone) -> Iterator[int]:
    """Serve phones on a free port of this machine; give the port."""
    for phone in phones:
        phone.lay_out()
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.phones = list(phones)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()


@contextmanager
def phones(monkeypatch: pytest.MonkeyPatch, *connected: FakePhone) -> Iterator[None]:
    """Let every adb client of this process find these phones, and no other adb server."""
    monkeypatch.delenv("ANDROID_SERIAL", raising=False)
    monkeypatch.setenv("ADBUTILS_ADB_PATH", "/bin/false")
    with adb_server(*connected) as port:
        monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", str(port))
        yield


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: Any = one.getsockname()[1]
    return int(port)
