"""Users as Ray tasks on real clusters: everybody is exported or named, whoever dies and whenever."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from cdcda_export.base import Base
from cdcda_export.batch import Outcome
from cdcda_export.bundle import require_verified
from cdcda_export.errors import ConfigError
from cdcda_export.progress import Live, Plain, Progress, Silent
from cdcda_mobile.cli import export_main
from cdcda_mobile.config import TrainConfig
from cdcda_mobile.fleet.cluster import share_of
from cdcda_mobile.fleet.driver import divided, run_fleet
from cdcda_mobile.fleet.view import Event, Lines, Reporter, Table, View, choose_view
from cdcda_mobile.pipeline import UserJob
from job import KEY, RECIPE, environment, finish, kill_group, spawn, wait_until, write_history
from ray_host import TOKEN, hosted
from tiny import make_gguf

GOOD = ("ann", "bob", "cyd", "dan")
SHORT = "few"  # who has too few records


@dataclass(frozen=True)
class Town:
    """A folder with five users, and a short one for Ray's own files."""

    folder: Path
    scratch: Path
    runs: Path

    def arguments(self, *more: object) -> list[str]:
        files = {"--data": "history.jsonl", "--base": "base.gguf", "--recipe": "small.toml"}
        named = [str(part) for name, file in files.items() for part in (name, self.folder / file)]
        return ["--users", "all", *named, "--workspace", str(self.runs), *map(str, more)]

    def spawn(self, *more: object) -> subprocess.Popen[str]:
        return spawn(self.arguments(*more), self.folder, TMPDIR=str(self.scratch), OPENAI_API_KEY=KEY)


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Town]:
    folder, scratch = tmp_path_factory.mktemp("town"), Path(tempfile.mkdtemp(prefix="f"))
    make_gguf(folder / "base.gguf")
    rows = [write_history(folder / "one.jsonl", user, 5 if user == SHORT else 30).read_text() for user in (*GOOD, SHORT)]
    (folder / "history.jsonl").write_text("".join(rows))
    (folder / "small.toml").write_text(RECIPE.format(keep=0, epochs=12).replace("[train]", '[train]\ncohort = "2"'))
    yield Town(folder, scratch, folder / "runs")
    shutil.rmtree(scratch)


def texts_below(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Every file that can be read, while others write and remove."""
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                yield path, path.read_bytes()
        except OSError:
            continue


def nothing_left(town: Town, process: subprocess.Popen[str]) -> bool:
    """Whether a fleet's processes and its folder are gone; Ray's workers have groups of their own, but the session is one."""
    until = time.monotonic() + 10
    while left := [*session_members(process.pid), *town.scratch.glob("cdcda-*")]:
        if time.monotonic() > until:
            raise AssertionError(left)
        time.sleep(0.05)
    return True


def session_members(session: int) -> list[int]:
    """The live processes of a session; Linux."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            state, _, _, own = (entry / "stat").read_text().rsplit(")", 1)[1].split()[:4]
        except OSError:
            continue
        if int(own) == session and state != "Z":
            found.append(int(entry.name))
    return found


def one_in_training(town: Town) -> str | None:
    """A user who is being trained and has a checkpoint."""
    return next((path.parent.parent.name for path in sorted(town.runs.glob("*/adapter.partial/checkpoint*"))), None)


def test_a_killed_worker_costs_no_user(town: Town) -> None:
    """The whole life of a fleet, on two real workers."""
    process = town.spawn("--engine", "ray", "--upload", (town.folder / "up").as_uri())
    try:
        assert wait_until(lambda: holder(town, process) is not None, process, 120), process.communicate()
        os.kill(holder(town, process) or 0, signal.SIGKILL)
        assert wait_until(lambda: any(town.runs.glob("*/gguf-q4_0")), process, 120), process.communicate()
        logs = dict(texts_below(town.scratch))
        assert len(logs) > 5 and [path for path, text in logs.items() if KEY.encode() in text] == []
        code, out, err = finish(process)
    finally:
        kill_group(process)
    assert code == 1 and "a worker died (killed or crashed" in err, err
    assert "raylet" not in out + err and KEY not in out + err
    lines = out.splitlines()
    assert [line.split()[1] for line in lines[:4]] == list(GOOD) and all(line.startswith("ok ") for line in lines[:4]), out
    assert lines[4].startswith(f"FAILED  {SHORT}  User {SHORT} has 5 usable records")
    assert lines[5].startswith("4 exported (0 of them reused), 1 failed")
    for user in GOOD:
        for root in (town.runs, town.folder / "up"):
            assert require_verified(root / user / "gguf-q4_0")["verification"]["passed"] is True
    assert not [path for path, text in texts_below(town.folder) if KEY.encode() in text]
    assert nothing_left(town, process)


def holder(town: Town, process: subprocess.Popen[str]) -> int | None:
    """The worker that trains somebody, by the lock that it holds."""
    user = one_in_training(town)
    text = (town.runs / user / ".lock").read_text() if user else ""
    if not text or int(text) == process.pid or not Path(f"/proc/{text}").exists():
        return None
    return int(text) if b"ray::" in Path(f"/proc/{text}/cmdline").read_bytes() else None


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cluster of two cores that knows nothing of our environment."""
    scratch = Path(tempfile.mkdtemp(prefix="f"))
    before = {name: os.environ.get(name) for name in TOKEN}
    os.environ.update(TOKEN)
    # Without the hooks of coverage too: Ray starts a dozen processes.
    env = {name: value for name, value in environment().items() if name != "OMP_NUM_THREADS" and not name.startswith("COV")}
    tests = str(Path(__file__).parent)
    with hosted(scratch, 2, env | {"PYTHONPATH": os.pathsep.join(dict.fromkeys([tests, *sys.path]))}) as found:
        yield found
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    shutil.rmtree(scratch)


def test_ctrl_c_ends_the_tasks_and_keeps_what_they_did(town: Town, address: str) -> None:
    folder = replace(town, runs=town.folder / "stopped")
    process = folder.spawn("--engine", "ray", "--address", address)
    assert wait_until(lambda: one_in_training(folder) is not None, process, 120), process.communicate()
    worker = holder(folder, process)
    process.send_signal(signal.SIGINT)
    code, out, err = finish(process)
    assert (code, out) == (130, "") and err.splitlines()[-1].endswith("run the same command again to go on from there."), err
    assert worker is not None
    until = time.monotonic() + 10
    while Path(f"/proc/{worker}").exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert not Path(f"/proc/{worker}").exists(), "its cluster lives on, its tasks do not"
    assert one_in_training(folder) is not None, "what the next run goes on from"


def trade(jobs: Sequence[UserJob], progress: Progress, base: Base) -> list[Outcome]:
    """What a worker does in these tests: it notes what it sees, and dies of one user and stumbles over another."""
    users = [job.user for job in jobs]
    seen = {
        "users": users,
        "pid": os.getpid(),
        "base": id(base),
        "cores": sorted(os.sched_getaffinity(0)),
        "omp": os.environ.get("OMP_NUM_THREADS"),
        "key": os.environ.get("OPENAI_API_KEY"),
        "folder": os.getcwd(),
    }
    with (jobs[0].workspace / "seen.jsonl").open("a") as stream:
        stream.write(json.dumps(seen) + "\n")
    progress.start("trading", len(users), "users")
    progress.warn("prices are high")
    time.sleep(0.3)
    if "poison" in users:
        os.kill(os.getpid(), signal.SIGKILL)
    if "bug" in users:
        raise TypeError("of the third kind")
    return [Outcome(user, 1.0, f"runs/{user}", 1, "full", error="is bad." if user == "bad" else "") for user in users]


def test_one_poisonous_user_takes_nobody_along(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.chdir(tmp_path)
    users = ["a", "poison", "b", "c", "bug", "bad", "d", "e"]
    base, log = make_gguf(tmp_path / "base.gguf"), io.StringIO()
    jobs = [UserJob(user, Path("."), base, train=TrainConfig(cohort="3")) for user in users]
    outcomes = run_fleet(jobs, Base(base), Plain(log), address, work=trade)
    errors = {outcome.name: outcome.error for outcome in outcomes}
    assert list(errors) == users
    assert [user for user in users if not errors[user]] == ["a", "b", "c", "d", "e"]
    assert errors["bad"] == "is bad."
    assert errors["poison"].startswith("its worker died 3 times (killed or crashed, while trading); run cdcda-export for this user alone")
    assert errors["bug"].startswith("an unexpected TypeError: of the third kind; run")

    seen = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    tried = [line["users"] for line in seen]
    assert [t for t in tried if "poison" in t] == [["a", "poison", "b"]] * 2 + [["poison"]] * 2
    assert [t for t in tried if "bug" in t] == [["c", "bug", "bad"], ["bug"]]
    assert len({(line["pid"], line["base"]) for line in seen}) == len({line["pid"] for line in seen}) < len(seen)
    assert all(len(line["cores"]) == 1 and line["omp"] == "1" for line in seen)
    assert all(line["key"] == KEY and line["folder"] == str(tmp_path) for line in seen)
    said = log.getvalue()
    assert "a, poison, b: a worker died (killed or crashed, while trading), trying again\n" in said
    assert "warning: c, bug, bad: prices are high" in said and "poison: 1 failed" in said
    assert KEY not in said


def test_a_cluster_that_is_not_there_and_flags_that_make_no_sense(town: Town, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*more: str) -> str:
        assert export_main(town.arguments("--quiet", *more)) == 2
        return capsys.readouterr().err

    assert "--address names a Ray cluster; add --engine ray" in refused("--address", "auto")
    assert "Cannot use the Ray cluster at 127.0.0.1:1 ([Errno 111]" in refused("--engine", "ray", "--address", "127.0.0.1:1")
    assert "address of a Ray client" in refused("--engine", "ray", "--address", "ray://127.0.0.1:1")
    assert "Protocol not known: nowhere" in refused("--upload", "nowhere://x")
    for flags in (["--engine", "ray"], ["--upload", "memory://x"]):
        assert export_main(["--user", "42", *flags]) == 2
        assert f"{flags[0]}" in capsys.readouterr().err


def test_local_needs_no_ray_and_ray_names_what_to_install(town: Town, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['ray'] = None\n"
        "from cdcda_mobile.cli import export_main\n"
        "print(export_main(sys.argv[1:]), export_main([*sys.argv[1:], '--engine', 'ray']))\n"
        "assert sys.modules['ray'] is None and 'cdcda_mobile.fleet' in sys.modules\n"
    )
    (tmp_path / "who.txt").write_text("ann\n")
    more = ["--users", tmp_path / "who.txt", "--workspace", tmp_path / "runs", "--upload", (tmp_path / "up").as_uri()]
    arguments = [*town.arguments("--quiet", "--verify", "off", "--epochs", "1"), *more]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False, env=environment()
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "up" / "ann" / "gguf-q4_0" / "manifest.json").exists()
    assert "ok      ann" in done.stdout and done.stdout.endswith("0 1\n")
    assert done.stderr == "cdcda-export: This needs the package ray: run `pip install 'cdcda-mobile[fleet]'`.\n"


@pytest.mark.parametrize(
    ("users", "most", "workers", "sizes"),
    [
        (1, 64, 2, [1]),
        (8, 64, 2, [4, 4]),
        (3, 64, 2, [2, 1]),
        (100, 16, 2, [16, 16, 16, 16, 16, 10, 5, 4, 1]),
        (5, 2, 9, [1] * 5),
        (7, 3, 1, [3, 3, 1]),
    ],
)
def test_cohorts_keep_every_worker_busy(users: int, most: int, workers: int, sizes: list[int]) -> None:
    jobs = [UserJob(str(user)) for user in range(users)]
    cohorts = divided(jobs, most, workers)
    assert [job for cohort in cohorts for job in cohort] == jobs
    assert [len(cohort) for cohort in cohorts] == sizes


@pytest.mark.parametrize(
    ("nodes", "users", "threads", "expected"),
    [
        ([{"CPU": 2.0}], 9, 0, (1, 0, 2, 2)),
        ([{"CPU": 8.0}], 2, 0, (4, 0, 2, 2)),
        ([{"CPU": 8.0}], 99, 4, (4, 0, 2, 2)),
        ([{"CPU": 4.0}, {"CPU": 4.0}], 2, 0, (4, 0, 2, 1)),
        ([{"CPU": 2.0}], 9, 16, (2, 0, 1, 1)),
        ([{"CPU": 16.0, "GPU": 2.0}, {"CPU": 64.0}], 99, 0, (8, 1, 2, 2)),
    ],
)
def test_the_share_of_a_worker(nodes: list[dict[str, float]], users: int, threads: int, expected: tuple[int, ...]) -> None:
    ray = SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": node} for node in nodes] + [{"Alive": False, "Resources": {}}])
    share = share_of(ray, [UserJob(str(user), train=TrainConfig(threads=threads)) for user in range(users)])
    assert (share.cores, share.gpus, share.workers, share.beside) == expected


def test_a_cluster_without_cores_is_one_sentence() -> None:
    ray = SimpleNamespace(nodes=lambda: [{"Alive": True, "Resources": {}}])
    with pytest.raises(ConfigError, match="no node with a core"):
        share_of(ray, [UserJob("a")])


def test_a_reporter_says_what_matters_and_not_too_often() -> None:
    sent: list[Event] = []
    reporter = Reporter(3, "node core 0", sent.append)
    reporter.start("training", 1000, "steps")
    for _ in range(1000):
        reporter.advance(note="loss 1.0")
    reporter.done()
    reporter.warn("mind")
    assert len(sent) < 20 and sent[0].label == "training" and (sent[-2].done, sent[-2].total) == (1000, 1000)
    assert (sent[-1].warning, reporter.warnings) == ("mind", ["mind"])


def test_the_table_holds_what_is_under_way() -> None:
    from rich.console import Console

    view = Table(5, Silent())
    try:
        view.waits(1, ["ann", "bob", "cyd", "\x1b[31mdan"])
        view.waits(2, ["eve"])
        view.told(Event(1, "node core 0", "training", 30, 60, "steps", "loss 2.5"))
        console = Console(file=io.StringIO(), width=120)
        console.print(view.table())
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert all(part in text for part in ("ann, bob, cyd and 1 more", "30/60 steps", "loss 2.5", "node core 0", "1 cohort waiting"))
        view.ended(1, 4, 1)
        view.told(Event(1, "node core 0", "late"))
        assert "4 of 5 users, 1 failed" in view.totals() and view.states == {}
    finally:
        view.close()


def test_the_view_follows_the_progress() -> None:
    assert type(choose_view(1, Silent())) is View
    assert type(choose_view(1, Plain(io.StringIO()))) is Lines
    table = choose_view(1, Live())
    table.close()
    assert type(table) is Table
