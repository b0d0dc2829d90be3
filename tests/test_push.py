"""``cdcda push``: only what was verified, into the app's own folder, whole or not at all, and nothing twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdcda_apk import APPLICATION_ID
from cdcda_export.errors import DiskFull
from cdcda_export.export import AdapterJob, export_adapter
from cdcda_export.progress import Silent
from cdcda_export.recipe import ExportConfig
from cdcda_mobile.cli import main
from cdcda_mobile.phone.device import connect
from fake_adb import FakePhone, phones

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakePhone]:
    apps = (APPLICATION_ID, "org.example.two")
    one = FakePhone(tmp_path / "phone", packages=(*apps, "org.example.unopened"), opened=apps)
    with phones(monkeypatch, one):
        yield one


def exported(tmp_path: Path, base: Path, adapter: Path, **config: str) -> Path:
    job = AdapterJob(adapter, base, workspace=tmp_path / "runs", config=ExportConfig(**{"quant": "q8_0", **config}))
    export_adapter(job, Silent())
    return job.directory


def models(phone: FakePhone, application: str = APPLICATION_ID) -> dict[str, Path]:
    root = phone.local(f"/sdcard/Android/data/{application}/files/models")
    return {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.is_file()} if root.exists() else {}


def test_a_bundle_arrives_whole_and_the_second_time_nothing_is_sent(
    phone: FakePhone, tmp_path: Path, llama_base: Path, llama_adapter: Path, capsys: Capture
) -> None:
    directory = exported(tmp_path, llama_base, llama_adapter)
    assert main(["push", "--bundle", str(directory), "--quiet"]) == 0
    assert "(2 files sent, 0 were there); choose it in the app" in capsys.readouterr().out
    name = f"{directory.parent.name}-{directory.name}"
    there = models(phone)
    assert sorted(there) == [f"{name}/LICENCES.txt", f"{name}/bundle.json", f"{name}/model.gguf"]
    assert list(phone.local("/data/local/tmp").iterdir()) == []
    assert there[f"{name}/model.gguf"].read_bytes() == (directory / "model.gguf").read_bytes()
    assert json.loads(there[f"{name}/bundle.json"].read_text()) == json.loads((directory / "bundle.json").read_text())
    assert main(["push", "--bundle", str(directory), "--quiet"]) == 0
    assert "(1 files sent, 1 were there)" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{", "[1]", "{}"])
def test_a_damaged_bundle_in_a_run_is_one_sentence(
    content: str, phone: FakePhone, tmp_path: Path, llama_base: Path, llama_adapter: Path, capsys: Capture
) -> None:
    directory = exported(tmp_path, llama_base, llama_adapter)
    (directory / "bundle.json").write_text(content)
    assert main(["push", "--bundle", str(directory.parent), "--quiet"]) == 1
    assert capsys.readouterr().err == f"cdcda push: {directory} was changed since it was exported; run cdcda-export again.\n"
    assert models(phone) == {}


def test_the_base_of_a_lora_lies_beside_it_on_the_phone(phone: FakePhone, tmp_path: Path, llama_base: Path, llama_adapter: Path) -> None:
    directory = exported(tmp_path, llama_base, llama_adapter, format="gguf-lora")
    assert main(["push", "--bundle", str(directory), "--application-id", "org.example.two", "--quiet"]) == 0
    there = models(phone, "org.example.two")
    bundle = json.loads(next(path for name, path in there.items() if name.endswith("bundle.json")).read_text())
    for entry in bundle["files"].values():
        path = next(path for name, path in there.items() if name.endswith(f"/{entry['path']}"))
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"] and entry["beside"]
    assert set(bundle["files"]) == {"model", "adapter"}


def test_what_is_cut_short_is_no_model_to_the_app(
    phone: FakePhone, tmp_path: Path, llama_base: Path, llama_adapter: Path, capsys: Capture
) -> None:
    directory = exported(tmp_path, llama_base, llama_adapter)
    assert main(["push", "--bundle", str(directory), "--quiet"]) == 0
    model = models(phone)[f"{directory.parent.name}-{directory.name}/model.gguf"]
    model.write_bytes(b"GGUF half of it")
    phone.free_kb = 10
    phone.lay_out()
    capsys.readouterr()
    assert main(["push", "--bundle", str(directory), "--quiet"]) == 1
    assert "The phone has no room for model.gguf" in capsys.readouterr().err
    assert not [name for name in models(phone) if name.endswith("bundle.json")]


def test_a_cable_that_is_pulled_while_the_phone_copies_leaves_nothing_that_the_app_would_take(
    phone: FakePhone, tmp_path: Path, llama_base: Path, llama_adapter: Path, capsys: Capture
) -> None:
    directory = exported(tmp_path, llama_base, llama_adapter)
    phone.unplug_at = "cp "
    assert main(["push", "--bundle", str(directory), "--quiet"]) == 1
    assert models(phone) == {}
    left = phone.local("/data/local/tmp") / "cdcda-push"
    left.write_bytes(b"of a push whose cable was pulled for good")
    phone.unplug_at = ""
    assert main(["push", "--bundle", str(directory), "--quiet"]) == 0
    assert len(models(phone)) == 3 and not left.exists()


@pytest.mark.parametrize("asked", ["pm path", "test -d"])
def test_a_cable_that_is_pulled_before_is_not_an_app_that_is_missing(
    asked: str, phone: FakePhone, tmp_path: Path, llama_base: Path, llama_adapter: Path, capsys: Capture
) -> None:
    phone.unplug_at = asked
    assert main(["push", "--bundle", str(exported(tmp_path, llama_base, llama_adapter)), "--quiet"]) == 1
    assert "The phone does not answer" in capsys.readouterr().err


def test_a_phone_has_to_have_room_for_the_copy_too(phone: FakePhone, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    with model.open("wb") as stream:
        stream.truncate(60_000_000)
    phone.free_kb = 150_000  # once and what is left free, not twice
    phone.lay_out()
    with pytest.raises(DiskFull, match="no room for model.gguf .120 MB are needed"):
        connect().deliver(model, f"/sdcard/Android/data/{APPLICATION_ID}/files/model.gguf", lambda count: None)


def test_what_may_not_leave_or_cannot_run_is_refused(
    phone: FakePhone, tmp_path: Path, llama_base: Path, llama_adapter: Path, capsys: Capture
) -> None:
    quick = exported(tmp_path / "quick", llama_base, llama_adapter, verify="quick")
    assert main(["push", "--bundle", str(quick), "--quiet"]) == 1
    assert "--verify full before it goes" in capsys.readouterr().err
    directory = exported(tmp_path, llama_base, llama_adapter)
    assert main(["push", "--bundle", str(directory), "--application-id", "org.example.three", "--quiet"]) == 1
    assert "The app org.example.three is not on the phone: install it" in capsys.readouterr().err
    assert main(["push", "--bundle", str(directory), "--application-id", "org.example.unopened", "--quiet"]) == 1
    assert "The app org.example.unopened was never opened on the phone, and has no folder yet: open it once" in capsys.readouterr().err
    assert main(["push", "--bundle", str(directory), "--application-id", "a; rm -rf /", "--quiet"]) == 2
    assert "is no application id" in capsys.readouterr().err
    assert main(["push", "--user", "nobody", "--workspace", str(tmp_path / "runs"), "--quiet"]) == 1
    assert "holds no finished gguf or gguf-lora artifact" in capsys.readouterr().err
    assert models(phone) == {} and not phone.local("/sdcard/Android/data/org.example.unopened").exists()
