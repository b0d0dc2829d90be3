"""Killed in each stage and at random moments, and run again: the same bytes, nothing paid twice, nobody left behind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cdcda_export.manifest import sha256_file
from fake_endpoint import FakeEndpoint, Reply, invent
from job import Desk, children, environment, finish, group_members, kill_group, set_table, spawn, wait_until

KILLS = 10
ARTIFACT = "gguf-q4_0/model.gguf"


class Till:
    """Answers slowly, and counts every request whose answer the log held already."""

    def __init__(self) -> None:
        self.log = Path()
        self.paid_twice = 0

    def __call__(self, body: dict[str, Any]) -> Reply:
        reply = replace(invent(body), delay_s=0.1)
        if json.loads(reply.body)["choices"][0]["message"]["content"] in logged(self.log):
            self.paid_twice += 1
        return reply


def logged(path: Path) -> list[str]:
    """The answers on disk, but for a line that was cut."""
    whole = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []
    return [json.loads(line)["text"] for line in whole]


@pytest.fixture(scope="module")
def till() -> Till:
    return Till()


@pytest.fixture(scope="module")
def endpoint(till: Till) -> Iterator[FakeEndpoint]:
    with FakeEndpoint(till) as served:
        yield served


@pytest.fixture(scope="module")
def desk(endpoint: FakeEndpoint, till: Till, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    made = set_table(tmp_path_factory.mktemp("kill"), endpoint, keep=8, epochs=4)
    till.log = made.run / "teacher" / "answers.jsonl"
    return made


@pytest.fixture(scope="module")
def undisturbed(desk: Desk) -> tuple[str, float]:
    """The hash of an undisturbed run, and how long it took."""
    began = time.monotonic()
    code, _, err = finish(spawn(desk.arguments(workspace=desk.folder / "undisturbed"), desk.folder))
    assert code == 0, err
    return sha256_file(desk.folder / "undisturbed" / desk.run.name / ARTIFACT), time.monotonic() - began


def kill_the_parent(pid: int) -> None:
    """SIGKILL one process, and see that its children follow it."""
    family = children(pid)
    os.kill(pid, signal.SIGKILL)
    until = time.monotonic() + 10
    while (left := [*group_members(pid), *(p for p in family if Path(f"/proc/{p}").exists())]) and time.monotonic() < until:
        time.sleep(0.05)
    assert left == []


def run_to_the_end(desk: Desk, workspace: Path, expected: str) -> None:
    code, _, err = finish(spawn(desk.arguments(workspace=workspace), desk.folder))
    assert code == 0, err
    run = workspace / desk.run.name
    assert sha256_file(run / ARTIFACT) == expected
    assert not [p for p in run.rglob("*") if p.name.endswith((".partial", ".old", ".tmp"))]


# A process that kills itself at a moment too short to be met from outside.
_SELF_KILL = """
import os, signal, sys
from cdcda_mobile.cli import export_main
number, name = int(sys.argv[1]), sys.argv[2]
replace = os.replace
def counted(source, target, **more):
    global number
    if str(target).endswith(name):
        number -= 1
        if number == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target, **more)
os.replace = counted
sys.exit(export_main(sys.argv[3:]))
"""


def test_killed_in_each_stage(desk: Desk, till: Till, undisturbed: tuple[str, float]) -> None:
    run = desk.run
    moments: dict[str, Callable[[], bool]] = {
        "augment": lambda: 2 <= len(logged(run / "teacher" / "answers.jsonl")) < 8,
        "adapter": lambda: any((run / "adapter.partial").glob("checkpoint-*.safetensors")),
        "gguf-q4_0": lambda: (run / "gguf-q4_0.partial").exists(),
    }
    process = spawn_self_killer(desk, 1, "/history.partial/test.jsonl")
    assert finish(process)[0] == -signal.SIGKILL
    assert (run / "history.partial" / "train.jsonl").exists()
    assert not (run / "history").exists()
    for stage, reached in moments.items():
        process = spawn(desk.arguments(), desk.folder)
        assert wait_until(reached, process), process.communicate()
        kill_the_parent(process.pid)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert (run / f"{stage}.partial").exists(), stage
        assert not (run / stage).exists(), stage
    run_to_the_end(desk, desk.runs, undisturbed[0])
    assert till.paid_twice == 0


def spawn_self_killer(desk: Desk, number: int, ending: str, *more: object) -> subprocess.Popen[str]:
    """A job that dies before the number-th rename to a path that ends so."""
    return subprocess.Popen(
        [sys.executable, "-c", _SELF_KILL, str(number), ending, *desk.arguments(*more)],
        cwd=desk.folder,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def test_killed_within_the_swap_of_an_old_artifact_for_a_new_one(desk: Desk, undisturbed: tuple[str, float]) -> None:
    """The old directory is moved away and the new one has no name yet: the moment with the most to lose."""
    if not (desk.run / ARTIFACT).exists():  # this test alone
        run_to_the_end(desk, desk.runs, undisturbed[0])
    process = spawn_self_killer(desk, 1, "/gguf-q4_0", "--redo", "gguf-q4_0")
    assert finish(process)[0] == -signal.SIGKILL
    assert not (desk.run / "gguf-q4_0").exists()
    assert (desk.run / "gguf-q4_0.old" / "model.gguf").exists()
    run_to_the_end(desk, desk.runs, undisturbed[0])


def test_killed_at_random_moments(desk: Desk, till: Till, undisturbed: tuple[str, float]) -> None:
    expected, seconds = undisturbed
    chance, kills, round_ = random.Random(3), 0, 0
    workspace = desk.folder / "random-0"
    till.log = workspace / desk.run.name / "teacher" / "answers.jsonl"
    while kills < KILLS:
        process = spawn(desk.arguments(workspace=workspace), desk.folder)
        ended = not wait_until_time(process, chance.uniform(0.1, 1.0) * seconds)
        if ended:
            assert finish(process)[0] == 0
            assert sha256_file(workspace / desk.run.name / ARTIFACT) == expected
            round_ += 1
            workspace = desk.folder / f"random-{round_}"
            till.log = workspace / desk.run.name / "teacher" / "answers.jsonl"
            continue
        kill_the_parent(process.pid)
        process.communicate()
        kills += 1
    run_to_the_end(desk, workspace, expected)
    assert till.paid_twice == 0


def wait_until_time(process: subprocess.Popen[str], seconds: float) -> bool:
    """Let a process run so long; False if it ended before."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if process.poll() is not None:
            return False
        time.sleep(0.005)
    return process.poll() is None


def test_the_local_teacher_dies_with_its_killed_parent(desk: Desk, tmp_path: Path) -> None:
    process = spawn([*replace(desk, teacher="").arguments(workspace=tmp_path / "runs")], desk.folder)
    try:
        assert wait_until(lambda: bool(children(process.pid)), process), process.communicate()
        kill_the_parent(process.pid)
    finally:
        kill_group(process)
