"""Stage directories: nothing half-written is trusted, nothing finished is lost, whatever is killed and when."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from cdcda_export.errors import DiskFull, FileError, ManifestError
from cdcda_export.folders import make_private
from cdcda_export.manifest import FINGERPRINT, MANIFEST, Stage, read_manifest, sha256_json, write_atomic, write_json


def _build(directory: Path, text: str = "one", **config: object) -> Stage:
    stage = Stage(directory, config, {"input": "abc"})
    partial = stage.begin()
    write_atomic(partial / "out.txt", text)
    (partial / "scratch").write_text("left over")
    stage.finish({"n": 1}, ["out.txt"])
    return stage


def test_a_finished_stage_is_reused_and_holds_only_its_outputs(tmp_path: Path) -> None:
    _build(tmp_path / "s")
    manifest = Stage(tmp_path / "s", {}, {"input": "abc"}).finished()
    assert manifest is not None
    assert manifest.metrics == {"n": 1}
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [MANIFEST, "out.txt"]
    assert stat.S_IMODE((tmp_path / "s" / "out.txt").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o700


def test_changed_config_input_or_file_is_noticed_and_said(tmp_path: Path) -> None:
    _build(tmp_path / "s", rank=4)
    assert Stage(tmp_path / "s", {"rank": 4}, {"input": "abc"}).why() == ""
    assert Stage(tmp_path / "s", {"rank": 8}, {"input": "abc"}).why() == "rank changed from 4 to 8"
    assert Stage(tmp_path / "s", {"rank": 4}, {"input": "xyz"}).why() == "its input 'input' changed"
    (tmp_path / "s" / "out.txt").write_text("two")
    stage = Stage(tmp_path / "s", {"rank": 4}, {"input": "abc"})
    assert stage.why() == "its files changed on disk"
    assert stage.finished() is None
    assert Stage(tmp_path / "new", {}, {}).why() == "not there yet"


def test_an_interrupted_stage_keeps_its_partial_only_for_the_same_fingerprint(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "s", {"a": 1}, {})
    (stage.begin() / "checkpoint").write_text("half")
    same = Stage(tmp_path / "s", {"a": 1}, {})
    assert same.why() == "was interrupted, will resume"
    assert (same.begin() / "checkpoint").read_text() == "half"
    assert not (Stage(tmp_path / "s", {"a": 2}, {}).begin() / "checkpoint").exists()


def test_the_old_artifact_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    _build(tmp_path / "s", "old", a=1)
    Stage(tmp_path / "s", {"a": 2}, {"input": "abc"}).begin()
    assert (tmp_path / "s" / "out.txt").read_text() == "old"
    _build(tmp_path / "s", "new", a=2)
    assert (tmp_path / "s" / "out.txt").read_text() == "new"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]


@pytest.mark.parametrize("killed_at", [1, 2])
def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int) -> None:
    _build(tmp_path / "s", "old", a=1)
    calls = 0
    replace = os.replace

    def dying(source: object, target: object) -> None:
        nonlocal calls
        if str(target).endswith((".old", "/s")):
            calls += 1
            if calls == killed_at:
                raise KeyboardInterrupt
        replace(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        _build(tmp_path / "s", "new", a=2)
    monkeypatch.undo()
    again = Stage(tmp_path / "s", {"a": 2}, {"input": "abc"})
    if killed_at == 2:  # the new directory was complete
        assert again.finished() is not None
        assert (tmp_path / "s" / "out.txt").read_text() == "new"
    else:
        assert (tmp_path / "s" / "out.txt").read_text() == "old"
        assert again.finished() is None
    _build(tmp_path / "s", "new", a=2)
    assert (tmp_path / "s" / "out.txt").read_text() == "new"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stage": "s"}', '{"schema": 9}', "\x00\xff", "[" * 100_000])
def test_a_corrupt_manifest_is_an_error_with_the_way_out(tmp_path: Path, text: str) -> None:
    _build(tmp_path / "s")
    (tmp_path / "s" / MANIFEST).write_text(text)
    with pytest.raises(ManifestError, match="--redo s"):
        Stage(tmp_path / "s", {}, {"input": "abc"}).finished()
    redo = Stage(tmp_path / "s", {}, {"input": "abc"}, redo=True)
    assert redo.finished() is None
    write_atomic(redo.begin() / "out.txt", "anew")
    redo.finish({}, ["out.txt"])
    assert (tmp_path / "s" / "out.txt").read_text() == "anew"


def test_another_schema_is_not_trusted(tmp_path: Path) -> None:
    _build(tmp_path / "s")
    path = tmp_path / "s" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 2}))
    with pytest.raises(ManifestError, match="another schema"):
        read_manifest(tmp_path / "s")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "f.json", {"a": 1})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match="free some space"):
        write_json(tmp_path / "f.json", {"a": 2})
    assert json.loads((tmp_path / "f.json").read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"]


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="Cannot write .*f.json"):
        write_json(tmp_path / "file" / "folder" / "f.json", {})
    (tmp_path / "f.json").mkdir()
    with pytest.raises(FileError, match="Cannot write .*f.json"):
        write_json(tmp_path / "f.json", {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.json", "file"]


def test_missing_folders_are_made_private(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a" / "b" / "c", "")
    make_private(tmp_path / "d" / "e")
    make_private(tmp_path / "d" / "e")
    for name in ("a", "a/b", "d", "d/e"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o700


def _everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


FOREIGN = {
    "documents": {"thesis.txt": "years of work"},
    "a web extension": {"manifest.json": '{"manifest_version": 3, "name": "mine"}', "background.js": ""},
}


@pytest.mark.parametrize("files", FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("place", ["s", "s.old", "s.partial"])
def test_what_others_made_is_never_removed(place: str, files: dict[str, str], tmp_path: Path) -> None:
    if place == "s.old":
        _build(tmp_path / "s", a=1)
    (tmp_path / place).mkdir()
    for name, text in files.items():
        (tmp_path / place / name).write_text(text)
    before = _everything(tmp_path)
    for redo in (False, True):
        stage = Stage(tmp_path / "s", {"a": 2}, {"input": "abc"}, redo)
        with pytest.raises(FileError, match=f"{place} is there already and not ours|--redo s"):
            if stage.finished() is None:
                stage.begin()
        with pytest.raises(FileError, match=f"{place} is there already and not ours|--redo s"):
            Stage(tmp_path / "s", {"a": 2}, {"input": "abc"}, redo).why()
    assert _everything(tmp_path) == before


@pytest.mark.parametrize("make", [lambda p: p.write_text(""), lambda p: p.symlink_to(p.parent), lambda p: p.symlink_to("nowhere")])
@pytest.mark.parametrize("place", ["s", "s.old", "s.partial"])
def test_files_and_links_in_the_way_are_one_sentence(place: str, make: Callable[[Path], object], tmp_path: Path) -> None:
    make(tmp_path / place)
    with pytest.raises(FileError, match=f"{place}"):
        Stage(tmp_path / "s", {}, {}).begin()
    assert os.path.lexists(tmp_path / place)


def test_documents_that_came_while_a_stage_was_built_are_not_replaced(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "s", {}, {})
    write_atomic(stage.begin() / "out.txt", "")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "thesis.txt").write_text("years of work")
    with pytest.raises(FileError, match="not ours"):
        stage.finish({}, ["out.txt"])
    assert (tmp_path / "s" / "thesis.txt").exists()


def test_an_empty_directory_may_be_named(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    assert _build(tmp_path / "s").finished() is not None


def test_a_parent_that_is_a_file_and_a_name_that_is_too_long_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="Cannot write"):
        Stage(tmp_path / "file" / "s", {}, {}).begin()
    with pytest.raises(FileError, match="Cannot write"):
        Stage(tmp_path / ("x" * 300), {}, {}).why()


def test_a_full_disk_is_said_when_a_stage_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(DiskFull, match="free some space"):
        Stage(tmp_path / "s", {}, {}).begin()


@pytest.mark.parametrize(("left", "why"), [("s.partial", ""), ("s.old", "a changed from 1 to 2")])
def test_asking_why_judges_as_if_recovered_and_changes_nothing(left: str, why: str, tmp_path: Path) -> None:
    """What a kill between the two renames leaves: no final name, the new directory or the old one beside it."""
    _build(tmp_path / "s", a=2 if left == "s.partial" else 1)
    os.replace(tmp_path / "s", tmp_path / left)
    before = _everything(tmp_path)
    stage = Stage(tmp_path / "s", {"a": 2}, {"input": "abc"})
    assert stage.why() == why
    assert _everything(tmp_path) == before
    assert (stage.finished() is None) == bool(why)
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_asking_why_leaves_the_old_directory_beside_the_new_one(tmp_path: Path) -> None:
    _build(tmp_path / "s")
    _build(tmp_path / "other")
    os.replace(tmp_path / "other", tmp_path / "s.old")
    assert Stage(tmp_path / "s", {}, {"input": "abc"}).why() == ""
    assert (tmp_path / "s.old").exists()
    assert Stage(tmp_path / "s", {}, {"input": "abc"}).finished() is not None
    assert not (tmp_path / "s.old").exists()


@pytest.mark.parametrize("name", ["rmtree", "unlink", "replace"])
def test_a_stage_that_is_killed_anywhere_can_be_built_again(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever step of removing and renaming a kill hits, the next run knows what is left as its own."""
    owner = shutil if name == "rmtree" else os if name == "replace" else Path
    real, survived = getattr(owner, name), 0
    for dies_at in range(1, 20):
        folder, calls = tmp_path / str(dies_at), 0

        def dying(*given: object, at: int = dies_at, **named: object) -> object:
            nonlocal calls
            calls += 1
            if calls == at:
                raise KeyboardInterrupt
            return real(*given, **named)

        _build(folder / "s", "old", a=1)
        (Stage(folder / "s", {"a": 3}, {}).begin() / "half").write_text("")
        monkeypatch.setattr(owner, name, dying)
        try:
            _build(folder / "s", "new", a=2)
            survived += 1
        except KeyboardInterrupt:
            pass
        monkeypatch.undo()
        again = Stage(folder / "s", {"a": 2}, {"input": "abc"})
        if again.finished() is None:
            _build(folder / "s", "new", a=2)
        assert again.finished() is not None
        assert sorted(p.name for p in folder.rglob("*")) == [MANIFEST, "out.txt", "s"]
    assert 0 < survived < 19


def test_a_finished_partial_is_not_built_upon(tmp_path: Path) -> None:
    """Killed between its manifest and its mark: the files are whole, and a resumed run would overwrite them one by one."""
    _build(tmp_path / "s", a=1)
    _build(tmp_path / "other", a=2)
    stage = Stage(tmp_path / "s", {"a": 2}, {"input": "abc"})
    os.replace(tmp_path / "other", stage.partial)
    (stage.partial / FINGERPRINT).write_text(stage.fingerprint)
    assert [p.name for p in stage.begin().iterdir()] == [FINGERPRINT]


def test_hashes_ignore_key_order() -> None:
    assert sha256_json({"a": 1, "b": "ü"}) == sha256_json({"b": "ü", "a": 1})
    assert sha256_json({"a": 1}) != sha256_json({"a": 2})
