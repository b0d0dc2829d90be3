"""A whole job in a few seconds: a tiny base, one invented user over two tasks, a teacher on loopback, and the commands as processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cdcda_export.manifest import sha256_file
from fake_endpoint import FakeEndpoint
from tiny import make_gguf

USER = "ann"
KEY = "sk-a-key-that-must-stand-nowhere-4711"
_WORDS = (
    "harbour winch gravel lantern thistle kettle orchard barge pewter saddle willow copper ferry button meadow cellar "
    "anchor barley candle drizzle ember fiddle granite hollow ivory juniper knuckle ladder marble nettle oyster parsnip"
).split()
RECIPE = """
[augment]
keep = {keep}
examples = 2
pool = 1.0
style = false
without = ["language"]  # the teacher of the tests speaks none

[teacher]
retries = 1

[train]
rank = 2
epochs = {epochs}
patience = 999
batch_size = 4
checkpoint_steps = 2
learning_rate = 0.01
threads = 1

[export]
max_kl = 50.0
min_top1 = 0.01
max_arrival_error = 50.0
answer_tokens = 6
"""


def write_history(path: Path, user: str = USER, count: int = 30) -> Path:
    """Dated records of one user, two in three headlines, the others ratings; every text is unlike every other."""
    chance, rows = random.Random(f"history of {user}"), []
    for i in range(count):
        text = " ".join(chance.sample(_WORDS, 9))
        task, output = ("rating", str(1 + i % 5)) if i % 3 == 2 else ("headline", " ".join(chance.sample(_WORDS, 6)))
        row = {"user": user, "id": f"{i:03}", "date": f"2024-{1 + i // 28:02}-{1 + i % 28:02}", "task": task}
        rows.append(json.dumps(row | {"input": text, "output": output}))
    path.write_text("\n".join(rows) + "\n")
    return path


@dataclass(frozen=True)
class Desk:
    """A folder with all that a job needs; every process and call works in it."""

    folder: Path
    base: Path
    teacher: str

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def run(self) -> Path:
        return self.runs / USER

    def arguments(self, *more: object, user: str = USER, workspace: Path | None = None) -> list[str]:
        """The arguments of ``cdcda-export`` for the small job."""
        files = {"--data": self.folder / "history.jsonl", "--base": self.base, "--recipe": self.folder / "small.toml"}
        files["--workspace"] = workspace or self.runs
        named = [str(part) for pair in files.items() for part in pair]
        teacher = ["--teacher-base-url", self.teacher] if self.teacher else []
        return ["--user", user, *named, *teacher, "--quiet", *(str(m) for m in more)]


def set_table(folder: Path, teacher: FakeEndpoint | str, base: Path | None = None, keep: int = 4, epochs: int = 1) -> Desk:
    """Lay out base, history and recipe in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_history(folder / "history.jsonl")
    (folder / "small.toml").write_text(RECIPE.format(keep=keep, epochs=epochs))
    return Desk(folder, base or make_gguf(folder / "tiny-base.gguf"), teacher if isinstance(teacher, str) else teacher.url)


def environment(**more: str) -> dict[str, str]:
    """The environment of a process: this one's, without a teacher, and with one thread."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("OPENAI_")}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | more


def command(*arguments: object) -> list[str]:
    """``cdcda ARGUMENTS`` with this interpreter."""
    return [sys.executable, "-m", "cdcda_mobile.cli", *(str(a) for a in arguments)]


def spawn(arguments: Sequence[object], cwd: Path, **more: str) -> subprocess.Popen[str]:
    """Start ``cdcda export`` in a session of its own."""
    return subprocess.Popen(
        command("export", *arguments),
        cwd=cwd,
        env=environment(**more),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], timeout_s: float = 120) -> tuple[int, str, str]:
    """Wait for a process, and return its exit code and what it wrote."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill_group(process)
        raise
    return process.returncode, out, err


def kill_group(process: subprocess.Popen[str]) -> None:
    """SIGKILL a process with all of its children, and wait for it."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.communicate()


def _processes() -> dict[int, tuple[int, int]]:
    """Live processes -> (parent, process group); Linux."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent, group = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:3]
            except (OSError, ValueError):
                continue  # it ended meanwhile
            if state != "Z":
                found[int(entry.name)] = int(parent), int(group)
    return found


def group_members(group: int) -> list[int]:
    """The live processes of a process group."""
    return [pid for pid, (_, own) in _processes().items() if own == group]


def children(parent: int) -> list[int]:
    """The live children of a process."""
    return [pid for pid, (own, _) in _processes().items() if own == parent]


def wait_until(reached: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 60) -> bool:
    """Wait for a moment in a process's life; False if it ended before."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if reached():
            return True
        if process.poll() is not None:
            return reached()
        time.sleep(0.002)
    kill_group(process)
    raise AssertionError("the moment to wait for did not come")


def hashes(directory: Path) -> dict[str, str]:
    """Every file below a directory with its hash."""
    return {str(p.relative_to(directory)): sha256_file(p) for p in sorted(directory.rglob("*")) if p.is_file()}
