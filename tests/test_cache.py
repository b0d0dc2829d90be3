"""The cache of what belongs to a base alone: built once, whole or not there, never in two processes at a time."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cdcda_export.cache import cache_folder, cached, locked, sha256_of
from cdcda_export.errors import FileError
from cdcda_export.manifest import sha256_file

LARGE = 1 << 20
INPUTS = {"base": "a hash", "types": ["Q4_0"]}


def _writer(text: str, calls: list[str]) -> object:
    def build(folder: Path) -> dict[str, str]:
        calls.append(text)
        (folder / "model.bin").write_text(text)
        return {"said": text}

    return build


def test_an_entry_is_built_once_and_other_inputs_are_another_entry(tmp_path: Path) -> None:
    calls: list[str] = []
    first = cached("bases", INPUTS, _writer("one", calls), tmp_path)
    again = cached("bases", dict(reversed(INPUTS.items())), _writer("never", calls), tmp_path)
    other = cached("bases", INPUTS | {"types": ["Q8_0"]}, _writer("two", calls), tmp_path)
    assert calls == ["one", "two"]
    assert first == again
    assert first.facts == {"said": "one"} and (first.directory / "model.bin").read_text() == "one"
    assert other.directory != first.directory


@pytest.mark.parametrize("harm", ["cut", "emptied", "removed", "changed", "facts cut"])
def test_a_damaged_entry_is_built_anew(harm: str, tmp_path: Path) -> None:
    calls: list[str] = []
    entry = cached("bases", INPUTS, _writer("whole", calls), tmp_path)
    model = entry.directory / "model.bin"
    if harm == "cut":
        model.write_text("who")
    elif harm == "emptied":
        model.write_text("")
    elif harm == "removed":
        model.unlink()
    elif harm == "changed":
        seen = model.stat()
        model.write_text("whole"[::-1])
        os.utime(model, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    else:
        facts = entry.directory / "facts.json"
        facts.write_text(facts.read_text()[:20])
    assert (cached("bases", INPUTS, _writer("again", calls), tmp_path).directory / "model.bin").read_text() == "again"
    assert calls == ["whole", "again"]


def test_a_builder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> dict[str, str]:
        (folder / "half").write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cached("bases", INPUTS, build, tmp_path)
    assert [p for p in (tmp_path / "bases").iterdir() if p.is_dir()] == []


def test_a_builder_that_is_killed_leaves_nothing_that_is_trusted(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from cdcda_export.cache import cached\n"
        "def build(folder):\n    (folder / 'model.bin').write_text('half'); os.kill(os.getpid(), 9)\n"
        "cached('bases', {'base': 'x'}, build, Path(sys.argv[1]))"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -9
    calls: list[str] = []
    assert (cached("bases", {"base": "x"}, _writer("whole", calls), tmp_path).directory / "model.bin").read_text() == "whole"


def test_two_who_want_the_same_entry_build_it_once(tmp_path: Path) -> None:
    calls: list[str] = []
    gate = threading.Barrier(4)

    def want() -> None:
        gate.wait()
        cached("bases", INPUTS, _writer("once", calls), tmp_path)

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == ["once"]


def test_who_waits_for_another_says_so_and_only_then(tmp_path: Path) -> None:
    said: list[str] = []
    with locked(tmp_path, "free", waiting=lambda: said.append("free")):
        pass
    holding, told = threading.Event(), threading.Event()

    def hold() -> None:
        with locked(tmp_path, "taken"):
            holding.set()
            told.wait(20)

    other = threading.Thread(target=hold)
    other.start()
    holding.wait(20)
    with locked(tmp_path, "taken", waiting=lambda: (said.append("taken"), told.set())[0]):
        pass
    other.join()
    assert said == ["taken"]


def test_a_folder_that_cannot_be_written_has_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"Cannot write .*file/bases/\w+ .Not a directory.*CDCDA_CACHE"):
        cached("bases", INPUTS, _writer("x", []), tmp_path / "file")
    with (
        pytest.raises(FileError, match=r"Cannot write .*file/out .Not a directory.; name another folder\.") as raised,
        locked(tmp_path / "file", "out"),
    ):
        pass
    assert "CDCDA_CACHE" not in str(raised.value)


def test_hashing_needs_no_cache_folder_and_leaves_none_of_others_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    large = tmp_path / "large"
    large.write_bytes(bytes(LARGE))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CDCDA_CACHE", str(tmp_path / "file"))
    assert sha256_of(large) == sha256_file(large)
    monkeypatch.setenv("CDCDA_CACHE", str(tmp_path / "a" / "b"))
    assert sha256_of(large) == sha256_file(large)
    for folder in ("a", "a/b", "a/b/hashes"):
        assert stat.S_IMODE((tmp_path / folder).stat().st_mode) == 0o700


def test_the_cache_lies_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CDCDA_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("CDCDA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "cdcda"


def test_a_large_hash_is_remembered_and_a_changed_file_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDCDA_CACHE", str(tmp_path / "own"))
    path = tmp_path / "base.gguf"
    path.write_bytes(b"1" * LARGE)
    first = sha256_of(path)
    assert first == sha256_file(path)
    # Only what was remembered can give another hash than the file's.
    (memo,) = (tmp_path / "own" / "hashes").iterdir()
    memo.write_text(memo.read_text().replace(first, "remembered"))
    assert sha256_of(path) == "remembered"
    # The same size and time stamp do not hide a change.
    seen = path.stat()
    path.write_bytes(b"2" * LARGE)
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert sha256_of(path) == sha256_file(path) != first
    with pytest.raises(FileError):
        sha256_of(tmp_path / "missing")
    with pytest.raises(FileError):
        sha256_of(tmp_path / ("x" * 5000))


def test_what_is_built_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of some size is not read again to be trusted: its hash was taken when it was made."""
    monkeypatch.setenv("CDCDA_CACHE", str(tmp_path))

    def build(folder: Path) -> dict[str, str]:
        (folder / "model.bin").write_bytes(bytes(LARGE))
        return {}

    entry = cached("bases", INPUTS, build)
    (memo,) = (tmp_path / "hashes").iterdir()
    memo.write_text(memo.read_text().replace(sha256_file(entry.directory / "model.bin"), "remembered"))
    assert sha256_of(entry.directory / "model.bin") == "remembered"
