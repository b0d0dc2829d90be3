"""Stage directories: nothing half-written is trusted, nothing finished is lost, whatever is killed and when."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path

import pytest

from cdcda_export.errors import DiskFull, ManifestError
from cdcda_export.manifest import MANIFEST, Stage, read_manifest, sha256_json, write_atomic, write_json


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


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stage": "s"}', '{"schema": 9}', "\x00\xff"])
def test_a_corrupt_manifest_is_an_error_with_the_way_out(tmp_path: Path, text: str) -> None:
    _build(tmp_path / "s")
    (tmp_path / "s" / MANIFEST).write_text(text)
    with pytest.raises(ManifestError, match="--redo s"):
        Stage(tmp_path / "s", {}, {"input": "abc"}).finished()
    redo = Stage(tmp_path / "s", {}, {"input": "abc"}, redo=True)
    assert redo.finished() is None


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


def test_hashes_ignore_key_order() -> None:
    assert sha256_json({"a": 1, "b": "ü"}) == sha256_json({"b": "ü", "a": 1})
    assert sha256_json({"a": 1}) != sha256_json({"a": 2})
