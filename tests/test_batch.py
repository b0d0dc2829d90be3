"""Many exports in one process: every one is verified or named, and none harms another."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cdcda_export.batch import Outcome, run_batch, summary_lines
from cdcda_export.bundle import require_verified
from cdcda_export.errors import AdapterError, ConfigError, DiskFull
from cdcda_export.gguf import GgufFile
from cdcda_export.manifest import Stage, sha256_file
from cdcda_export.progress import Silent
from cdcda_mobile.cli import export_main
from cdcda_mobile.history import Record
from cdcda_mobile.workspace import write_lines
from tiny import make_adapter, make_gguf


def _card(name: str) -> dict[str, Any]:
    return {
        "artifact": {"file": f"runs/{name}", "bytes": 1},
        "stages": [{"name": "gguf-q4_0", "reused": name == "old"}],
        "verification": {"level": "full"},
    }


def test_failures_are_named_and_the_others_finish() -> None:
    def export(name: str, _: object) -> dict[str, Any]:
        if name == "bad":
            raise AdapterError("its adapter is broken.")
        return _card(name)

    outcomes = run_batch(["one", "bad", "old"], export, Silent(), "users")
    assert [(o.name, o.error, o.reused) for o in outcomes] == [
        ("one", "", False),
        ("bad", "its adapter is broken.", False),
        ("old", "", True),
    ]
    lines = summary_lines(outcomes)
    assert lines[0].startswith("ok") and "verified" in lines[0]
    assert lines[2] == "FAILED  bad  its adapter is broken."
    assert lines[3].startswith("2 exported (1 of them reused), 1 failed")


def test_a_full_disk_ends_the_batch_and_says_who_was_not_tried() -> None:
    def export(name: str, _: object) -> dict[str, Any]:
        if name == "two":
            raise DiskFull("no room.")
        return _card(name)

    outcomes = run_batch(["one", "two", "three"], export, Silent(), "users")
    assert [o.error for o in outcomes] == ["", "no room.", "not tried: the disk was full"]


def test_warnings_of_one_are_not_on_the_card_of_the_next() -> None:
    seen: list[list[str]] = []

    def export(name: str, progress: Silent) -> dict[str, Any]:
        progress.warn(f"about {name}")
        seen.append(list(progress.warnings))
        return _card(name)

    run_batch(["one", "two"], export, Silent(), "users")
    assert seen == [["about one"], ["about two"]]


def test_a_name_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="'one' is named twice"):
        run_batch(["one", "one"], lambda name, _: _card(name), Silent(), "users")
    assert summary_lines([Outcome("x", error="why")])[-1].startswith("0 exported")


def _trained_user(workspace: Path, user: str, base: Path, seed: int) -> None:
    """Lay out what training leaves: a finished history and a finished adapter."""
    words = ["harbour", "winch", "gravel", "lantern", "thistle", "kettle", "orchard", "barge"]
    records = [
        Record(f"{i:03}", f"2024-01-{i + 1:02}", "headline", f"{user} the {words[i % 8]} number {i}", f"{words[(i + seed) % 8]} again")
        for i in range(8)
    ]
    history = Stage(workspace / user / "history", {}, {"user": user})
    partial = history.begin()
    parts = {"train": records[:4], "validation": records[4:6], "test": records[6:]}
    for name, rows in parts.items():
        write_lines(partial / f"{name}.jsonl", [asdict(r) for r in rows])
    counts = {name: len(rows) for name, rows in parts.items()}
    history.finish({**counts, "malformed": 0}, [f"{name}.jsonl" for name in parts])
    trained = Stage(workspace / user / "adapter", {}, {"user": user})
    make_adapter(trained.begin(), base, seed=seed, rank=2, alpha=2.0)
    metrics = {"records": {"train": 4, "validation": 2, "synthetic": 0}, "rank": 2, "epochs": 1}
    trained.finish(metrics, ["adapter_config.json", "adapter_model.safetensors"])


def _arguments(folder: Path, base: Path, *more: str) -> list[str]:
    return ["--base", str(base), "--workspace", str(folder / "runs"), "--quant", "q8_0", "--quiet", *more]


def test_a_hundred_users_and_one_corrupt_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_gguf(tmp_path / "base.gguf")
    users = [f"user{i:03}" for i in range(100)]
    for seed, user in enumerate(users):
        _trained_user(tmp_path / "runs", user, base, seed)
    weights = tmp_path / "runs" / "user041" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    # The manifest vouches for the file, so that it is the adapter's reader who must notice.
    manifest = weights.with_name("manifest.json")
    stated = json.loads(manifest.read_text())
    stated["outputs"][weights.name] = {"sha256": sha256_file(weights), "bytes": 1000}
    manifest.write_text(json.dumps(stated))
    arguments = _arguments(tmp_path, base, "--users", "all", "--export-only", "--json")
    assert export_main(arguments) == 1
    report = json.loads(capsys.readouterr().out)
    assert (report["exported"], report["failed"]) == (99, 1)
    failed = [o for o in report["outcomes"] if o["error"]]
    assert [o["name"] for o in failed] == ["user041"]
    assert "truncated" in failed[0]["error"]
    for user in users:
        directory = tmp_path / "runs" / user / "gguf-q8_0"
        if user == "user041":
            assert not directory.exists()
        else:
            assert require_verified(directory)["verification"]["passed"] is True
    one, other = (GgufFile(tmp_path / "runs" / user / "gguf-q8_0" / "model.gguf")["blk.0.attn_q.weight"] for user in users[:2])
    assert bytes(one.data) != bytes(other.data)
    # The next run does only what is missing.
    shutil.rmtree(tmp_path / "runs" / "user041")
    assert export_main(arguments) == 0
    again = json.loads(capsys.readouterr().out)
    assert len(again["outcomes"]) == 99 and all(o["reused"] for o in again["outcomes"])


def test_users_from_a_file_and_what_is_wrong_with_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_gguf(tmp_path / "base.gguf")
    for seed, user in enumerate(("ann", "bob")):
        _trained_user(tmp_path / "runs", user, base, seed)
    (tmp_path / "who.txt").write_text("bob\n\n  ann \nnobody\n")
    arguments = _arguments(tmp_path, base, "--export-only", "--verify", "quick")
    assert export_main([*arguments, "--users", str(tmp_path / "who.txt")]) == 1
    said = capsys.readouterr()
    assert said.out.count("checked quickly") == 2
    assert "FAILED  nobody  User nobody has no finished" in said.out
    assert export_main([*arguments, "--users", str(tmp_path / "missing.txt")]) == 1
    assert "one id per line" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("\n")
    assert export_main([*arguments, "--users", str(tmp_path / "empty.txt")]) == 2
    assert export_main([*arguments, "--users", "all", "--user", "ann"]) == 2
    assert "exclude each other" in capsys.readouterr().err


def test_an_empty_workspace_has_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_gguf(tmp_path / "base.gguf")
    assert export_main(_arguments(tmp_path, base, "--users", "all", "--export-only")) == 1
    assert "has a trained adapter" in capsys.readouterr().err


def test_many_adapters_of_one_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = make_gguf(tmp_path / "base.gguf")
    adapters = [make_adapter(tmp_path / name, base, seed=seed, rank=2, alpha=2.0) for seed, name in enumerate(("a", "b"))]
    arguments = _arguments(tmp_path, base, "--adapter", *map(str, adapters), "--verify", "off")
    assert export_main(arguments) == 0
    assert capsys.readouterr().out.count("not verified") == 2
    clashing = make_adapter(tmp_path / "elsewhere" / "a", base, seed=5)
    assert export_main([*arguments[:-2], str(clashing)]) == 2
    assert "would both be written to" in capsys.readouterr().err
    assert export_main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("reuse") == 2
