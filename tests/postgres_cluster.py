"""A throw-away PostgreSQL cluster from the binaries of the machine, reached through a unix socket only."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


def find_binaries() -> Path:
    """The folder that holds initdb and pg_ctl; Debian keeps it off the PATH."""
    on_path = shutil.which("initdb")
    folders = [Path(on_path).resolve().parent] if on_path else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in folders:
        if (folder / "initdb").is_file() and (folder / "pg_ctl").is_file():
            return folder
    pytest.fail("PostgreSQL is not installed, which this test needs: apt-get install postgresql.")


def unprivileged() -> dict[str, Any]:
    """How to start a program as somebody other than root, because PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    pytest.fail("This test runs as root and finds no user postgres or nobody to run PostgreSQL as.")


@contextmanager
def cluster() -> Iterator[str]:
    """Start a cluster, yield its SQLAlchemy URL, stop it and remove its files."""
    binaries, other = find_binaries(), unprivileged()
    # Not under pytest's own folder: root's is closed to others, and a socket's path must stay under 108 bytes.
    home = Path(tempfile.mkdtemp(prefix="cdcda-pg-"))
    if other:
        os.chown(home, other["user"], other["group"])

    def call(program: str, *arguments: str) -> None:
        command = [str(binaries / program), *arguments]
        with (home / "call.log").open("wb") as log:
            done = subprocess.run(command, cwd=home, stdout=log, stderr=log, stdin=subprocess.DEVNULL, timeout=120, **other)
        if done.returncode:
            server_log = home / "server.log"
            said = (home / "call.log").read_text() + (server_log.read_text() if server_log.is_file() else "")
            pytest.fail(f"{program} failed:\n{said[-2000:]}")

    data = str(home / "data")
    try:
        call("initdb", "-D", data, "-U", "cdcda", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")
        options = f"-k {home} -c listen_addresses='' -c fsync=off -c max_connections=10 -c shared_buffers=16MB"
        call("pg_ctl", "-D", data, "-l", str(home / "server.log"), "-o", options, "-w", "start")
        try:
            yield f"postgresql+psycopg://cdcda@/postgres?host={home}"
        finally:
            call("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(home, ignore_errors=True)
