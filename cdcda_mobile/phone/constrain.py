"""A process with as many cores and as much memory as a phone gives an app, and the proof that nothing else slowed it down.

Cores are taken away by affinity, with one thread for each that is left: under a quota, threads that wait for each other spin their share
away. Memory is limited by a control group where one can be made (version 2, else 1), else by the process' own limit of private memory; the
model is read into memory, not mapped, so that it counts.
"""

from __future__ import annotations

import json
import os
import resource
import secrets
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cdcda_export.errors import ConfigError

_ROOT = Path("/sys/fs/cgroup")
_NAME = "cdcda-bench"


@dataclass(frozen=True)
class Outcome:
    """How a constrained process ended.

    Attributes:
        complaint: the end of what it wrote on standard error.
        status: its exit status, negative for a signal.
        out_of_memory: whether it asked for more than it may have.
        held_by: what held its memory: ``cgroup v2``, ``cgroup v1``, ``rlimit`` or ``none``.
        throttled: periods in which a quota stopped it or a group around it.
    """

    complaint: str
    status: int
    out_of_memory: bool
    held_by: str
    throttled: int


@dataclass(frozen=True)
class Holder:
    """Holds a process to a limit of memory.

    Attributes:
        name: how.
        memory: bytes.
        directory: of the control group; None without one.
    """

    name: str = "none"
    memory: int = 0
    directory: Path | None = None

    def was_exceeded(self, status: int, complaint: str) -> bool:
        """Tell whether a process that ended with a status and a complaint was stopped by the limit."""
        if self.directory is not None:
            return any(_counter(self.directory / name, "oom_kill") for name in ("memory.events", "memory.oom_control"))
        return self.name == "rlimit" and status != 0 and _starved(complaint, status)

    def close(self) -> None:
        """Remove the group."""
        if self.directory is not None:
            with suppress(OSError):
                self.directory.rmdir()


def enter(cores: Sequence[int], group: str, memory: int) -> None:
    """Go within limits: called by a process of itself, before it starts a thread.

    Args:
        cores: the processors that are left.
        group: directory of the control group, '' for none.
        memory: bytes of private writable memory, where there is no group; 0 for no limit.
    """
    os.sched_setaffinity(0, cores)
    if group:
        (Path(group) / "cgroup.procs").write_text("0")
    elif memory:
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))


def hold_memory(memory: int, root: Path = _ROOT, own: str | None = None) -> Holder:
    """Return the strictest way to hold a process to a number of bytes that this machine allows.

    Args:
        memory: bytes; 0 for no limit.
        root: where control groups are mounted.
        own: this process' own groups, as ``/proc/self/cgroup`` has them.
    """
    if not memory:
        return Holder()
    for parent, version in _parents(root, Path("/proc/self/cgroup").read_text() if own is None else own):
        holder = _group(parent, version, memory)
        if holder is not None:
            return holder
    return Holder("rlimit", memory)


def _parents(root: Path, own: str) -> Iterator[tuple[Path, int]]:
    """Yield folders in which a group of ours may be made, the nearest first."""
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers and (root / "cgroup.controllers").exists():
            here = root / path.lstrip("/")
            # A group with processes in it may have no groups with a controller below it, so the one above is tried too.
            yield from ((folder, 2) for folder in (here, here.parent) if folder.is_relative_to(root))
        elif "memory" in controllers.split(","):
            yield root / "memory" / path.lstrip("/"), 1
            yield root / "memory", 1


def _group(parent: Path, version: int, memory: int) -> Holder | None:
    directory = parent / f"{_NAME}-{os.getpid()}-{secrets.token_hex(4)}"
    limits = {"memory.max": memory, "memory.swap.max": 0} if version == 2 else {"memory.limit_in_bytes": memory, "memory.swappiness": 0}
    first = next(iter(limits))
    try:
        directory.mkdir()
    except OSError:
        return None
    holder = Holder(f"cgroup v{version}", memory, directory)
    try:
        for name, value in limits.items():
            # Where swap is off, its file may be missing; without the limit itself the group is worth nothing.
            if name == first or (directory / name).exists():
                (directory / name).write_text(str(value))
        (directory / "cgroup.procs").open("r+").close()
    except OSError:
        holder.close()
        return None
    return holder


def _counter(path: Path, name: str) -> int:
    with suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
    return 0


def throttled_periods(root: Path = _ROOT, own: str | None = None) -> int:
    """Return in how many periods a quota stopped this process' group or one around it."""
    total = 0
    for line in (Path("/proc/self/cgroup").read_text() if own is None else own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root if not controllers else root / controllers if (root / controllers).exists() else root / "cpu"
        here = base / path.lstrip("/")
        for folder in (here, *here.parents):
            if not folder.is_relative_to(base):
                break
            total += _counter(folder / "cpu.stat", "nr_throttled")
    return total


def choose_cores(wanted: int) -> tuple[int, ...]:
    """Return at most so many of the cores that this process may use: physical ones before their twins.

    Raises:
        ConfigError: none is wanted.
    """
    if wanted < 1:
        raise ConfigError("A run needs at least one core.")
    usable = sorted(os.sched_getaffinity(0))
    firsts: dict[str, list[int]] = {}
    for core in usable:
        twins = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        firsts.setdefault(twins.read_text().strip() if twins.exists() else str(core), []).append(core)
    rounds = max(map(len, firsts.values()))
    ordered = [cores[turn] for turn in range(rounds) for cores in firsts.values() if turn < len(cores)]
    return tuple(sorted(ordered[:wanted]))


def run_constrained(
    command: Sequence[str], given: Mapping[str, Any], cores: Sequence[int], memory: int, on_line: Callable[[str], None] = lambda line: None
) -> Outcome:
    """Run a program that calls ``enter`` with what it is given, and wait for it.

    Args:
        command: the program and its arguments.
        given: its standard input, as JSON; ``limits`` is added to it.
        cores: the processors it may use.
        memory: bytes; 0 for no limit.
        on_line: called with every line that it writes on standard output.
    """
    before, holder = throttled_periods(), hold_memory(memory)
    limits = {"cores": list(cores), "group": str(holder.directory or ""), "memory": memory if holder.name == "rlimit" else 0}
    try:
        with tempfile.TemporaryFile("w+", errors="replace") as complaints:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": complaints}
            with subprocess.Popen(list(command), text=True, errors="replace", **pipes) as process:
                assert process.stdin is not None and process.stdout is not None
                try:
                    with suppress(BrokenPipeError), process.stdin:
                        process.stdin.write(json.dumps({**given, "limits": limits}))
                    for line in process.stdout:
                        on_line(line)
                except BaseException:
                    process.kill()
                    raise
            complaints.seek(0)
            complaint = complaints.read()[-2000:]
        exceeded = holder.was_exceeded(process.returncode, complaint)
        return Outcome(complaint, process.returncode, exceeded, holder.name, throttled_periods() - before)
    finally:
        holder.close()


def _starved(complaint: str, status: int) -> bool:
    """Tell whether a process that failed under a limit of its own failed for want of memory."""
    words = ("bad_alloc", "memoryerror", "failed to allocate", "unable to allocate", "cannot allocate", "out of memory", "std::bad")
    return status in (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGABRT) or any(word in complaint.casefold() for word in words)
