"""The whole job on a tiny base, through the commands: what is built, reused, said, kept private and forgotten."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cdcda_export.errors import WorkspaceError
from cdcda_export.manifest import sha256_file
from cdcda_export.progress import Silent
from cdcda_export.recipe import ExportConfig, build_config, read_recipe
from cdcda_mobile.cli import SECTIONS, export_main, main
from cdcda_mobile.config import HistoryConfig
from cdcda_mobile.pipeline import UserJob, run_user_job
from fake_endpoint import FakeEndpoint
from job import KEY, USER, Desk, environment, hashes, set_table
from tiny import make_adapter

Capture = pytest.CaptureFixture[str]
STAGES = ["history", "augment", "adapter", "gguf-q4_0"]


@pytest.fixture(autouse=True)
def key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[FakeEndpoint]:
    with FakeEndpoint() as served:
        yield served


@pytest.fixture(scope="module")
def finished(endpoint: FakeEndpoint, tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """A job that is done; nobody writes here."""
    desk = set_table(tmp_path_factory.mktemp("finished"), endpoint)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", KEY)
        assert export_main(desk.arguments()) == 0
    return desk


@pytest.fixture
def runs(finished: Desk, tmp_path: Path) -> Path:
    """A copy of its runs, to go on from."""
    return Path(shutil.copytree(finished.runs, tmp_path / "runs"))


def card_of(argv: list[str], capsys: Capture) -> dict[str, Any]:
    """Run with ``--json``; standard output must hold that and nothing else."""
    capsys.readouterr()
    assert export_main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def plan_of(argv: list[str], capsys: Capture) -> dict[str, str]:
    """What ``--dry-run`` would run -> why."""
    capsys.readouterr()
    assert export_main([*argv, "--dry-run", "--json"]) == 0
    return {step["stage"]: step["why"] for step in json.loads(capsys.readouterr().out) if step["runs"]}


def reused(card: dict[str, Any]) -> list[str]:
    return [stage["name"] for stage in card["stages"] if stage["reused"]]


def test_the_whole_job(finished: Desk) -> None:
    card = json.loads((finished.run / "card.json").read_text())
    model = finished.run / "gguf-q4_0" / "model.gguf"
    assert card["artifact"]["sha256"] == sha256_file(model)
    assert card["artifact"]["bytes"] == model.stat().st_size
    assert sum(card["artifact"]["tensor_types"].values()) == 20
    assert card["verification"]["passed"]
    assert card["verification"]["token_ids"]["equal"] == card["verification"]["token_ids"]["texts"] > 0
    assert {row["task"]: row["n"] for row in card["tasks"]} == {"headline": 4, "rating": 2}
    assert card["training"]["records"] == {"train": 22, "validation": 2, "synthetic": 4, "test": 6, "malformed": 0}
    assert card["augmentation"]["kept"] == 4
    gain = card["personal_gain"]
    assert gain["nll_personal"] < gain["nll_base"]
    test = [json.loads(line) for line in (finished.run / "history" / "test.jsonl").read_text().splitlines()]
    assert [s["user"] for s in card["samples"]] == [r["output"] for r in test[:3]]
    page = (finished.run / "report.html").read_text()
    assert card["artifact"]["sha256"][:12] in page or "model.gguf" in page


def test_the_python_interface_gives_the_same_bytes(finished: Desk, tmp_path: Path) -> None:
    recipe = read_recipe(str(finished.folder / "small.toml"), SECTIONS)
    configs = {name: build_config(cls, recipe.get(name, {})) for name, cls in SECTIONS.items()}
    configs["history"] = HistoryConfig(data=str(finished.folder / "history.jsonl"))
    configs["teacher"] = build_config(SECTIONS["teacher"], recipe["teacher"], {"base_url": finished.teacher})
    card = run_user_job(UserJob(USER, tmp_path, finished.base, **configs), Silent())
    assert card["artifact"]["sha256"] == sha256_file(finished.run / "gguf-q4_0" / "model.gguf")
    assert reused(card) == []


def test_the_second_run_reuses_everything_at_once(finished: Desk, endpoint: FakeEndpoint, runs: Path, capsys: Capture) -> None:
    before, asked, began = hashes(runs), len(endpoint.requests), time.monotonic()
    card = card_of(finished.arguments(workspace=runs), capsys)
    assert time.monotonic() - began < 3
    assert reused(card) == STAGES
    assert len(endpoint.requests) == asked
    after = hashes(runs)
    assert {k: v for k, v in after.items() if not k.endswith(".lock")} == {k: v for k, v in before.items() if not k.endswith(".lock")}


def test_the_dry_run_says_what_and_why_and_writes_nothing(finished: Desk, runs: Path, tmp_path: Path, capsys: Capture) -> None:
    fresh = plan_of(finished.arguments(workspace=tmp_path / "fresh"), capsys)
    assert fresh == {"history": "not there yet", **dict.fromkeys(STAGES[1:], "follows history")}
    assert not (tmp_path / "fresh").exists()
    before = hashes(runs)
    assert plan_of(finished.arguments(workspace=runs), capsys) == {}
    changed = plan_of(finished.arguments("--rank", 3, workspace=runs), capsys)
    assert changed == {"adapter": "rank changed from 2 to 3", "gguf-q4_0": "follows adapter"}
    assert plan_of(finished.arguments("--redo", "augment", workspace=runs), capsys)["augment"] == "asked for with --redo"
    seeded = plan_of(finished.arguments("--seed", 1, workspace=runs), capsys)
    assert seeded["augment"] == "seed changed from 0 to 1"
    assert hashes(runs) == before
    (runs / USER / "gguf-q4_0" / "model.gguf").write_bytes(b"")
    assert plan_of(finished.arguments(workspace=runs), capsys) == {"gguf-q4_0": "its files changed on disk"}
    capsys.readouterr()
    assert export_main(finished.arguments("--dry-run", workspace=runs)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["reuse", "reuse", "reuse", "run"]


def test_the_dry_run_tells_an_interrupted_stage(finished: Desk, runs: Path, capsys: Capture) -> None:
    stage = runs / USER / "adapter"
    fingerprint = json.loads((stage / "manifest.json").read_text())["fingerprint"]
    stage.rename(stage.with_name("adapter.partial"))
    (stage.with_name("adapter.partial") / "manifest.json").unlink()
    (stage.with_name("adapter.partial") / ".fingerprint").write_text(fingerprint)
    assert plan_of(finished.arguments(workspace=runs), capsys)["adapter"] == "was interrupted, will resume"


def test_redo_builds_one_stage_anew(finished: Desk, endpoint: FakeEndpoint, runs: Path, capsys: Capture) -> None:
    asked = len(endpoint.requests)
    card = card_of(finished.arguments("--redo", "augment,export", workspace=runs), capsys)
    assert reused(card) == ["history", "adapter"]
    assert len(endpoint.requests) == asked  # the answers are paid for


def test_a_record_too_long_to_train_on_is_told_before_the_teacher_is_paid(
    finished: Desk, endpoint: FakeEndpoint, tmp_path: Path, capsys: Capture
) -> None:
    lines = (finished.folder / "history.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    first["input"] = "winch " * 2000
    (tmp_path / "long.jsonl").write_text("\n".join([json.dumps(first), *lines[1:]]))
    asked = len(endpoint.requests)
    assert export_main([*finished.arguments(workspace=tmp_path / "runs"), "--data", str(tmp_path / "long.jsonl")]) == 1
    assert "tokens, the limit is" in capsys.readouterr().err and len(endpoint.requests) == asked


def test_export_only_never_trains(finished: Desk, runs: Path, tmp_path: Path, capsys: Capture) -> None:
    card = card_of(finished.arguments("--export-only", "--quant", "q8_0", workspace=runs), capsys)
    assert card["artifact"]["file"].endswith("gguf-q8_0/model.gguf")
    assert [stage["name"] for stage in card["stages"]] == ["gguf-q8_0"]
    untouched = card_of(finished.arguments("--export-only", "--rank", 5, workspace=runs), capsys)
    assert untouched["training"]["rank"] == 2
    assert export_main(finished.arguments("--export-only", workspace=tmp_path / "none")) == 1
    assert "run again without --export-only" in capsys.readouterr().err
    assert not (tmp_path / "none" / USER / "adapter").exists()
    assert export_main(finished.arguments("--export-only", "--dry-run", workspace=tmp_path / "none")) == 1


def test_a_small_adapter_for_a_base_that_is_made_once(finished: Desk, runs: Path, capsys: Capture) -> None:
    argv = finished.arguments("--format", "gguf-lora", "--quant", "q8_0", workspace=runs)
    card = card_of(argv, capsys)
    adapter = runs / USER / "gguf-lora-q8_0" / "adapter.gguf"
    (shared,) = (runs / "_shared").glob("*/model.gguf")
    assert card["artifact"]["file"] == str(adapter)
    assert adapter.stat().st_size < shared.stat().st_size / 3
    made = shared.stat().st_mtime_ns
    card_of([*argv, "--redo", "export"], capsys)
    assert shared.stat().st_mtime_ns == made
    assert main(["chat", str(adapter.parent), "--prompt", "hello"]) == 0


def test_real_records_alone(finished: Desk, endpoint: FakeEndpoint, tmp_path: Path, capsys: Capture) -> None:
    asked = len(endpoint.requests)
    card = card_of(finished.arguments("--keep", 0, workspace=tmp_path), capsys)
    assert card["augmentation"] is None
    assert len(endpoint.requests) == asked
    assert not (tmp_path / USER / "augment").exists()


def test_verbs_stop_where_they_say(finished: Desk, tmp_path: Path, capsys: Capture) -> None:
    common = finished.arguments(workspace=tmp_path)
    assert main(["augment", *common]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / USER / "augment")
    assert not (tmp_path / USER / "adapter").exists()
    assert main(["train", *common, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 7
    assert not (tmp_path / USER / "gguf-q4_0").exists()
    assert main(["export", *common]) == 0
    assert main(["users", "--data", str(finished.folder / "history.jsonl")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == USER


def test_chat_with_a_prompt_and_from_standard_input(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert main(["chat", str(runs / USER), "--prompt", "/headline gravel winch"]) == 0
    one = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("/headline gravel winch\n\n/headlin x\n"))
    assert main(["chat", str(runs / USER)]) == 0
    out, err = capsys.readouterr()
    assert out == one
    assert "Did you mean 'headline'?" in err
    assert main(["chat", str(runs / USER), "--prompt", "/subjet x"]) == 2
    assert main(["chat", str(runs / "nobody"), "--prompt", "x"]) == 1
    assert "holds no finished artifact" in capsys.readouterr().err


def test_forget_leaves_nothing_of_the_user(runs: Path, capsys: Capture) -> None:
    assert main(["forget", "--user", USER, "--workspace", str(runs)]) == 0
    assert f"of user {USER}" in capsys.readouterr().out
    assert not (runs / USER).exists()
    left = b"".join(p.read_bytes() for p in runs.rglob("*") if p.is_file())
    assert b"winch" not in left
    assert main(["forget", "--user", USER, "--workspace", str(runs)]) == 1


def test_the_doctor_answers(tmp_path: Path, capsys: Capture) -> None:
    code = main(["doctor", "--workspace", str(tmp_path), "--json"])
    findings = {f["what"]: f["ok"] for f in json.loads(capsys.readouterr().out)}
    assert findings["llama-cpp-python"] and findings["llama.cpp"]
    assert code == (0 if all(findings.values()) else 1)
    main(["doctor", "--workspace", str(tmp_path)])
    assert KEY not in capsys.readouterr().out


def test_the_doctor_tells_of_a_llama_cpp_that_dies_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    (tmp_path / "cdcda_export").mkdir()
    (tmp_path / "cdcda_export" / "__init__.py").write_text("import os; os.kill(os.getpid(), 11)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert main(["doctor", "--workspace", str(tmp_path)]) == 1
    assert "dies on this processor of signal 11; compile it again: CXXFLAGS=" in capsys.readouterr().out


def test_nothing_private_leaks(finished: Desk, endpoint: FakeEndpoint) -> None:
    assert f"Bearer {KEY}" in endpoint.authorizations
    for path in finished.runs.rglob("*"):
        if path.is_file():
            assert KEY.encode() not in path.read_bytes(), path
    for path in (finished.run, *finished.run.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path
    sent = json.dumps(endpoint.requests)
    kept = (finished.run / "augment" / "kept.jsonl").read_text()
    bundle = (finished.run / "gguf-q4_0" / "bundle.json").read_text()
    for part in ("train", "validation", "test"):
        for line in (finished.run / "history" / f"{part}.jsonl").read_text().splitlines():
            record = json.loads(line)
            texts = [record["input"], *([record["output"]] if record["task"] == "headline" else [])]
            for text in texts:
                assert text not in bundle
                assert part == "train" or (text not in sent and text not in kept)
    assert USER not in sent


def test_a_held_out_record_among_the_training_ones_stops_the_job(finished: Desk, runs: Path, tmp_path: Path, capsys: Capture) -> None:
    """Somebody's hand put it there: the manifest is made to fit, and the gate must still hold."""
    kept = runs / USER / "augment" / "kept.jsonl"
    test = json.loads((runs / USER / "history" / "test.jsonl").read_text().splitlines()[0])
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    rows[0] |= {"task": test["task"], "input": test["input"].upper(), "output": test["output"]}
    kept.write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = json.loads((kept.parent / "manifest.json").read_text())
    manifest["outputs"]["kept.jsonl"] = {"sha256": sha256_file(kept), "bytes": kept.stat().st_size}
    (kept.parent / "manifest.json").write_text(json.dumps(manifest))
    assert export_main(finished.arguments(workspace=runs)) == WorkspaceError.exit_code
    assert "in the held-out set" in capsys.readouterr().err


_BLOCKED = """
import sys
BLOCKED = {"torch", "transformers", "peft", "openai", "tokenizers"}
class Without:
    def __init__(self, finder): self.finder = finder
    def __getattr__(self, name): return getattr(self.finder, name)
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in BLOCKED else self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
import importlib.util
assert all(importlib.util.find_spec(name) is None for name in BLOCKED)
from cdcda_mobile.cli import export_main
sys.exit(export_main(sys.argv[1:]))
"""


@pytest.mark.parametrize("kind", ["gguf", "gguf-lora"])
def test_an_adapter_is_exported_where_there_is_no_torch(kind: str, finished: Desk, tmp_path: Path) -> None:
    make_adapter(tmp_path / "theirs", finished.base)
    argv = ["--adapter", "theirs", "--base", finished.base, "--format", kind, "--quant", "q8_0", "--json"]
    command = [sys.executable, "-c", _BLOCKED, *(str(a) for a in argv)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    card = json.loads(done.stdout)
    assert card["verification"]["passed"]
    assert card["personal_gain"] is None
    assert card["user"] is None
    again = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment(), timeout=120, check=False)
    assert json.loads(again.stdout)["stages"][0]["reused"]


def test_defaults_of_the_recipe_are_those_of_the_classes() -> None:
    for section, values in read_recipe("default", SECTIONS).items():
        for key, value in values.items():
            default = getattr(SECTIONS[section](), key)
            assert value == default or (section, key, default, value) == ("export", "quant", "", ExportConfig().resolved_quant)
