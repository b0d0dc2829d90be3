"""Finished artifacts elsewhere: complete or without a manifest, sent once, resumed, and with no text and no password in them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cdcda_export.batch import Outcome
from cdcda_export.bundle import SCHEMA, read_bundle
from cdcda_export.errors import ConfigError, FileError
from cdcda_export.manifest import Stage, outputs_intact, read_manifest, sha256_file, write_json
from cdcda_export.progress import Silent
from cdcda_mobile.pipeline import UserJob
from cdcda_mobile.upload import open_target, upload_artifact, upload_finished

SECRET = "words of the user's own"


class Shop(MemoryFileSystem):
    """A store that remembers what was done to it and closes after so many deeds."""

    protocol = "shop"
    store: dict[str, Any] = {}
    pseudo_dirs = [""]
    deeds: list[str] = []
    closes_after = 10**6
    error: Callable[[], Exception] = OSError

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(path.removeprefix("shop://") if isinstance(path, str) else path)

    def _note(self, deed: str, path: str) -> None:
        if len(Shop.deeds) >= Shop.closes_after:
            raise Shop.error()
        Shop.deeds.append(f"{deed} {path.rpartition('/')[2]}")

    def put_file(self, lpath: str, rpath: str, *args: Any, **kwargs: Any) -> None:
        self._note("put", rpath)
        super().put_file(lpath, rpath, *args, **kwargs)

    def pipe_file(self, path: str, value: bytes, *args: Any, **kwargs: Any) -> None:
        self._note("pipe", path)
        super().pipe_file(path, value, *args, **kwargs)

    def mv(self, path1: str, path2: str, *args: Any, **kwargs: Any) -> None:
        self._note("mv", path2)
        super().mv(path1, path2, *args, **kwargs)


fsspec.register_implementation("shop", Shop, clobber=True)


@pytest.fixture(autouse=True)
def shop() -> Iterator[type[Shop]]:
    for system in (Shop, MemoryFileSystem):
        system.store.clear()
        system.pseudo_dirs[:] = [""]
    Shop.deeds, Shop.closes_after, Shop.error = [], 10**6, OSError
    yield Shop


def make_artifact(workspace: Path, user: str = "ann", letter: str = "a", shared: bool = False) -> Path:
    """What an export leaves, in little."""
    stage = Stage(workspace / user / "gguf-q4_0", {}, {"letter": letter})
    partial = stage.begin()
    (partial / "model.gguf").write_text(letter * 100)
    files = {"model": {"file": "model.gguf", "path": "model.gguf", "beside": True}}
    if shared:
        base = workspace / "_shared" / "base-1" / "model.gguf"
        base.parent.mkdir(parents=True, exist_ok=True)
        base.write_text("base")
        files["base"] = {"file": base.name, "path": "../../_shared/base-1/model.gguf", "beside": False, "sha256": sha256_file(base)}
    write_json(partial / "bundle.json", {"schema": SCHEMA, "files": files})
    stage.finish({"verify": "full", "card": {"samples": [{"input": SECRET}]}}, ["model.gguf", "bundle.json"])
    return stage.directory


def stored() -> dict[str, bytes]:
    system, _ = open_target("shop://x")
    return {path: system.cat_file(path) for path in system.find("/")}


def test_the_manifest_comes_last_and_nothing_is_sent_twice(tmp_path: Path, shop: type[Shop]) -> None:
    directory = make_artifact(tmp_path)
    assert upload_artifact(directory, "shop://store/models", "ann") is True
    assert shop.deeds == ["pipe .uploading", "put model.gguf", "put bundle.json", "pipe .uploading.manifest.json", "mv manifest.json"]
    names = sorted(path.rpartition("/")[2] for path in stored())
    assert names == ["bundle.json", "manifest.json", "model.gguf"]
    assert all(path.startswith("/store/models/ann/gguf-q4_0/") for path in stored())
    shop.deeds.clear()
    assert upload_artifact(directory, "shop://store/models/", "ann") is False
    assert shop.deeds == []
    assert not [path for path, text in stored().items() if SECRET.encode() in text], "the card's texts stay at home"


@pytest.mark.parametrize("closes_after", range(5))
def test_an_interrupted_upload_has_no_manifest_and_goes_on(tmp_path: Path, shop: type[Shop], closes_after: int) -> None:
    directory = make_artifact(tmp_path)
    shop.closes_after = closes_after
    with pytest.raises(FileError, match="goes on from there"):
        upload_artifact(directory, "shop://s", "ann")
    assert not [path for path in stored() if path.endswith("/manifest.json")]
    shop.closes_after = 10**6
    assert upload_artifact(directory, "shop://s", "ann") is True
    assert shop.deeds.count("put model.gguf") == 1 and shop.deeds.count("put bundle.json") == 1
    assert len(stored()) == 3


def test_a_file_that_was_cut_is_sent_again(tmp_path: Path, shop: type[Shop]) -> None:
    directory = make_artifact(tmp_path)
    shop.closes_after = 3
    with pytest.raises(FileError):
        upload_artifact(directory, "shop://s", "ann")
    system, _ = open_target("shop://s")
    shop.closes_after = 10**6
    system.pipe_file("/s/ann/gguf-q4_0/model.gguf", b"a" * 50)
    upload_artifact(directory, "shop://s", "ann")
    assert stored()["/s/ann/gguf-q4_0/model.gguf"] == b"a" * 100


@pytest.mark.parametrize("closes_after", [10**6, 2])
def test_a_new_artifact_of_the_same_sizes_replaces_the_old_one(tmp_path: Path, shop: type[Shop], closes_after: int) -> None:
    upload_artifact(make_artifact(tmp_path / "one"), "shop://s", "ann")
    system, _ = open_target("shop://s")
    system.pipe_file("/s/ann/gguf-q4_0/notes.txt", b"somebody else's")
    shop.deeds.clear()
    shop.closes_after = closes_after
    newer = make_artifact(tmp_path / "two", letter="b")
    if closes_after == 2:
        with pytest.raises(FileError):
            upload_artifact(newer, "shop://s", "ann")
        assert "/s/ann/gguf-q4_0/manifest.json" not in stored()
        shop.closes_after = 10**6
    upload_artifact(newer, "shop://s", "ann")
    there = stored()
    assert there["/s/ann/gguf-q4_0/model.gguf"] == b"b" * 100
    assert there["/s/ann/gguf-q4_0/notes.txt"] == b"somebody else's"
    assert json.loads(there["/s/ann/gguf-q4_0/manifest.json"])["inputs"] == {"letter": "b"}


def test_what_many_share_is_sent_once_and_the_whole_can_be_read_there(tmp_path: Path) -> None:
    url = (tmp_path / "far").as_uri()
    for user in ("ann", "_bob"):
        folder = {"ann": "ann", "_bob": "%5Fbob"}[user]
        directory = make_artifact(tmp_path / "runs", folder, shared=True)
        assert upload_artifact(directory, url, user) is True
        there = tmp_path / "far" / folder / "gguf-q4_0"
        manifest = read_manifest(there)
        assert manifest is not None and manifest.metrics == {"verify": "full"} and outputs_intact(there, manifest)
        assert read_bundle(there)["files"]["base"]["path"] == "../../_shared/base-1/model.gguf"
        (tmp_path / "far" / "_shared" / "base-1" / "model.gguf").chmod(0o400)
    assert sorted(p.name for p in (tmp_path / "far").rglob("*") if p.is_file() and p.name.startswith(".")) == []


def test_memory_takes_it_too(tmp_path: Path) -> None:
    upload_artifact(make_artifact(tmp_path), "memory://models", "ann")
    assert fsspec.filesystem("memory").exists("/models/ann/gguf-q4_0/manifest.json")


def test_outcomes_name_who_was_not_uploaded(tmp_path: Path) -> None:
    make_artifact(tmp_path, "ann")
    jobs = [UserJob(user, tmp_path) for user in ("bob", "cyd", "ann")]
    given = [Outcome("bob", error="is bad."), Outcome("cyd"), Outcome("ann")]
    bob, cyd, ann = upload_finished(given, jobs, "memory://m", Silent())
    assert (bob.error, ann.error) == ("is bad.", "")
    assert cyd.error.startswith("exported, but not uploaded: ") and "no finished artifact" in cyd.error


def test_urls_that_cannot_be_used_are_one_sentence() -> None:
    with pytest.raises(ConfigError, match="holds a password") as caught:
        open_target("ftp://me:hush-hush@host/models")
    assert "hush" not in str(caught.value)
    with pytest.raises(ConfigError, match="Protocol not known"):
        open_target("nowhere://x")


def test_what_backends_raise_is_one_sentence(tmp_path: Path, shop: type[Shop]) -> None:
    from fsspec.exceptions import FSTimeoutError

    shop.closes_after = 1
    for error, words in ((PermissionError("no\nentry"), "no entry"), (FSTimeoutError(), "FSTimeoutError")):
        shop.error = lambda error=error: error  # type: ignore[misc]
        with pytest.raises(FileError, match=words):
            upload_artifact(make_artifact(tmp_path), "shop://s", "ann")
