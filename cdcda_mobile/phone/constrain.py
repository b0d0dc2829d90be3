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
_STARVED = (
    *("bad_alloc", "memoryerror", "failed to allocate", "unable to allocate", "cannot allocate", "out of memory", "insufficient memory"),
    *("memory allocation", "failed to map segment", "thread creation failed", "can't start new thread"),
)


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
        """Tell whether a process that ended with a status and a complaint had too little memory: the kernel counted it, or it says so."""
        killed = self.directory and any(_counter(self.directory / name, "oom_kill") for name in ("memory.events", "memory.oom_control"))
        return bool(killed) or status != 0 and is_starved(complaint)

    def close(self) -> None:
        """Remove the group."""
        if self.directory is not None:
            with suppress(OSError):
                self.directory.rmdir()


def enter(cores: Sequence[int], memory: int) -> None:
    """Go within limits: called by a process of itself, before it starts a thread.

    Args:
        cores: the processors that are left.
        memory: bytes of private writable memory, where no group holds it; 0 for no limit.
    """
    os.sched_setaffinity(0, cores)
    if memory:
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
    for left in parent.glob(f"{_NAME}-*"):  # of a run that was killed; the kernel refuses where a process is in it
        if not Path("/proc", left.name.split("-")[2]).exists():
            with suppress(OSError):
                left.rmdir()
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
    try:
        with tempfile.TemporaryFile("w+", errors="replace") as complaints:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": complaints}
            with subprocess.Popen(list(command), text=True, errors="replace", **pipes) as process:
                assert process.stdin is not None and process.stdout is not None
                holder = _put(process.pid, holder)
                limits = {"cores": list(cores), "memory": memory if holder.name == "rlimit" else 0}
                try:
                    with suppress(BrokenPipeError), process.stdin:
                        process.stdin.write(json.dumps({**given, "limits": limits}))
                    for line in process.stdout:
                        on_line(line)
                except BaseException:
                    process.kill()
                    raise
            complaints.seek(0)
            complaint = complaints.read()
        exceeded = holder.was_exceeded(process.returncode, complaint)
        return Outcome(complaint[-2000:], process.returncode, exceeded, holder.name, throttled_periods() - before)
    finally:
        holder.close()


def _put(process: int, holder: Holder) -> Holder:
    """Put a process that waits for its input into the group, and return what holds it: the rlimit, where the kernel refuses."""
    if holder.directory is None:
        return holder
    try:
        (holder.directory / "cgroup.procs").write_text(str(process))
    except OSError:
        holder.close()
        return Holder("rlimit", holder.memory)
    return holder


def is_starved(complaint: str) -> bool:
    """Tell whether a runtime, Python, OpenMP or the loader of libraries complains of too little memory."""
    return any(word in complaint.casefold() for word in _STARVED)
