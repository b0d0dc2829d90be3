"""Safe names, one process at a time, one source per workspace."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from cdcda_export.errors import WorkspaceError
from cdcda_mobile.workspace import Workspace, folder_name


@pytest.mark.parametrize("user", ["../../etc", "/etc/passwd", "..", ".", ".hidden", "a/b", "a\\b", "a\0b", "", "  ", "x" * 500, "a\nb"])
def test_ids_that_point_elsewhere_are_refused(user: str) -> None:
    with pytest.raises(WorkspaceError):
        folder_name(user)


@pytest.mark.parametrize(
    ("user", "name"), [("42", "42"), ("ann@x.org", "ann@x.org"), ("_shared", "%5Fshared"), ("a%2Fb", "a%252Fb"), ("é", "%C3%A9")]
)
def test_other_ids_get_a_name_of_their_own(user: str, name: str, tmp_path: Path) -> None:
    assert folder_name(user) == name
    assert Workspace(tmp_path).user_directory(user).parent == tmp_path


def _hold(root: Path, ready: multiprocessing.Event, go: multiprocessing.Event) -> None:  # type: ignore[valid-type]
    with Workspace(root).locked("42"):
        ready.set()  # type: ignore[attr-defined]
        go.wait(20)  # type: ignore[attr-defined]


def test_a_second_process_is_refused_with_the_first_ones_pid(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    ready, go = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, ready, go))
    other.start()
    try:
        assert ready.wait(20)
        with pytest.raises(WorkspaceError, match=rf"pid {other.pid}"), Workspace(tmp_path).locked("42"):
            pass
        with Workspace(tmp_path).locked("43"):
            pass
    finally:
        go.set()
        other.join()
    with Workspace(tmp_path).locked("42"):
        assert (tmp_path / "42" / ".lock").read_text() == str(os.getpid())


def test_a_workspace_is_bound_to_its_source_and_base(tmp_path: Path) -> None:
    Workspace(tmp_path).bind("samples", "aa", "base.gguf")
    Workspace(tmp_path).bind("samples", "aa", "base.gguf")
    with pytest.raises(WorkspaceError, match="data source 'samples'.*another --workspace"):
        Workspace(tmp_path).bind("other.jsonl", "aa", "base.gguf")
    with pytest.raises(WorkspaceError, match=r"base model 'base\.gguf'"):
        Workspace(tmp_path).bind("samples", "bb", "other.gguf")
    (tmp_path / "workspace.json").write_text("{")
    with pytest.raises(WorkspaceError, match="damaged"):
        Workspace(tmp_path).bind("samples", "aa", "base.gguf")


def test_without_a_source_only_the_base_is_compared(tmp_path: Path) -> None:
    Workspace(tmp_path).bind(None, "aa", "base.gguf")
    assert list(tmp_path.iterdir()) == []
    Workspace(tmp_path).bind("samples", "aa", "base.gguf")
    Workspace(tmp_path).bind(None, "aa", "base.gguf")
    with pytest.raises(WorkspaceError, match="base model"):
        Workspace(tmp_path).bind(None, "bb", "base.gguf")
    with pytest.raises(WorkspaceError, match="data source"):
        Workspace(tmp_path).bind("other.jsonl", "aa", "base.gguf")


@pytest.mark.parametrize("root", ["file", "file/below", "x" * 300, "nowhere"])
def test_a_workspace_that_cannot_be_made_is_one_sentence(root: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing" / "folder")
    workspace = Workspace(tmp_path / root)
    with pytest.raises(WorkspaceError, match="another --workspace"):
        workspace.bind("samples", "aa", "base.gguf")
    with pytest.raises(WorkspaceError, match="another --workspace"), workspace.locked("42"):
        pass
    assert workspace.users() == []


def test_a_lock_or_a_binding_that_is_a_directory_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "42" / ".lock").mkdir(parents=True)
    with pytest.raises(WorkspaceError, match="42 cannot be worked in"), Workspace(tmp_path).locked("42"):
        pass
    (tmp_path / "workspace.json").mkdir()
    with pytest.raises(WorkspaceError, match=r"workspace\.json cannot be read"):
        Workspace(tmp_path).bind("samples", "aa", "base.gguf")


def test_only_what_may_be_a_users_folder_is_listed(tmp_path: Path) -> None:
    for name in ("42", "%5Fshared", "é", "%2Fetc", "..%2F..%2Fetc", "_shared", ".git", "x" * 200, "%34%32"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "linked").symlink_to(tmp_path / "42")
    assert Workspace(tmp_path).users() == ["42", "_shared"]


def test_forget_removes_everything_of_one_user_only(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    for user in ("42", "7"):
        with workspace.locked(user) as directory:
            (directory / "teacher").mkdir()
            (directory / "teacher" / "answers.jsonl").write_text("{}")
    assert workspace.users() == ["42", "7"]
    assert {p.name for p in workspace.forget("42")} >= {"answers.jsonl"}
    assert workspace.users() == ["7"]
    with pytest.raises(WorkspaceError, match="nothing of user 42"):
        workspace.forget("42")


def test_runs_are_not_written_through_links(tmp_path: Path) -> None:
    (tmp_path / "42").symlink_to("/tmp")
    with pytest.raises(WorkspaceError, match="symbolic link"):
        Workspace(tmp_path).user_directory("42")


def _bind(root: Path, gate: multiprocessing.Barrier) -> None:  # type: ignore[valid-type]
    gate.wait(20)  # type: ignore[attr-defined]
    Workspace(root).bind("samples", "aa", "base.gguf")


def test_many_processes_bind_a_new_workspace_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for round_ in range(3):
        gate = context.Barrier(6)
        processes = [context.Process(target=_bind, args=(tmp_path / str(round_), gate)) for _ in range(6)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0] * 6
