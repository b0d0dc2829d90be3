"""Many users through the commands: cohorts, the shared adapter and the person on top of it, and synthetic records chosen by validation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file, save_file

from cdcda_export.base import Base
from cdcda_export.base_model import load_base_model
from cdcda_export.decoder import Decoder, Lora
from cdcda_export.errors import AdapterError, ConfigError, DiskFull
from cdcda_export.gguf import GgufFile
from cdcda_export.progress import Silent
from cdcda_export.recipe import ExportConfig
from cdcda_mobile.cli import export_main, main
from cdcda_mobile.config import AugmentConfig, HistoryConfig, TrainConfig
from cdcda_mobile.training.lora import save_adapter
from cdcda_mobile.training.warm_start import folded, shared_layers
from fake_endpoint import FakeEndpoint
from job import USER, Desk, set_table, write_history
from tiny import make_adapter

USERS = (USER, "ben", "cleo")
# Tiny random models are far from what the gates were measured on.
LOOSE = ExportConfig(max_kl=50.0, min_top1=0.01, max_arrival_error=50.0, answer_tokens=6)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[FakeEndpoint]:
    with FakeEndpoint() as served:
        yield served


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, endpoint: FakeEndpoint) -> Desk:
    """Three users on one table, and no synthetic records."""
    folder = tmp_path_factory.mktemp("table")
    table = set_table(folder, endpoint, keep=0)
    texts = [write_history(folder / f"{user}.jsonl", user).read_text() for user in USERS]
    (folder / "history.jsonl").write_text("".join(texts))
    return table


def many(desk: Desk, *more: str) -> list[str]:
    """Arguments for many users instead of one."""
    return [*desk.arguments()[2:], *more]


def metrics_of(run: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run / "adapter" / "manifest.json").read_text())["metrics"]
    return found


def test_a_cohort_through_the_command_and_a_second_run_that_reuses_all(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    assert export_main(many(desk, "--users", "all", "--cohort", "2", "--json")) == 0
    report = json.loads(capsys.readouterr().out)
    assert [outcome["name"] for outcome in report["outcomes"]] == sorted(USERS)
    assert all(outcome["level"] == "full" and not outcome["reused"] for outcome in report["outcomes"])
    for user in USERS:
        metrics = metrics_of(desk.runs / user)
        assert metrics["tokens"] > 0 and metrics["cpu_seconds"] > 0 and metrics["peak_rss_bytes"] > 0
    assert export_main(many(desk, "--users", "all", "--cohort", "2", "--json")) == 0
    assert all(outcome["reused"] for outcome in json.loads(capsys.readouterr().out)["outcomes"])


def test_the_automatic_size_is_recorded_and_kept(desk: Desk, tmp_path: Path) -> None:
    from cdcda_mobile.cohorts import cohorts_of
    from cdcda_mobile.pipeline import UserJob

    base = Base(desk.base)
    jobs = [UserJob(user, workspace=tmp_path / "runs", base=desk.base) for user in "abcdef"]
    assert [len(cohort) for cohort in cohorts_of(jobs, base)] == [6]  # tiny models: all fit
    (record,) = (tmp_path / "runs" / "_cohorts").glob("*.json")
    record.write_text(json.dumps({"size": 4, "users": 6}))
    assert [len(cohort) for cohort in cohorts_of(jobs, base)] == [4, 2]
    few = [replace(job, train=replace(job.train, cohort="5")) for job in jobs]
    assert [len(cohort) for cohort in cohorts_of(few, base)] == [5, 1]
    with pytest.raises(ConfigError, match="'a' is named twice"):
        cohorts_of([jobs[0], jobs[0]], base)


def test_memory_decides_the_automatic_size(desk: Desk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from cdcda_mobile.cohorts import cohorts_of
    from cdcda_mobile.pipeline import UserJob
    from cdcda_mobile.training import memory

    base = Base(desk.base)
    jobs = [UserJob(f"user{index}", workspace=tmp_path / "runs", base=desk.base) for index in range(5)]
    wanted = memory.bytes_of_passes(base.decoder, jobs[0].train) + 3 * memory.bytes_of_user(base.decoder, jobs[0].train)
    monkeypatch.setattr(memory, "bytes_free", lambda decoder: wanted * 3 // 2 + 3)
    assert [len(cohort) for cohort in cohorts_of(jobs, base)] == [3, 2]


def test_a_user_without_a_history_fails_by_name(desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    listed = tmp_path / "users.txt"
    listed.write_text("nobody\nben\n")
    assert main(["train", *many(desk, "--users", str(listed)), "--workspace", str(tmp_path / "runs")]) == 1
    out = capsys.readouterr().out
    assert "FAILED  nobody" in out and "1 trained (0 of them reused), 1 failed" in out
    assert (tmp_path / "runs" / "ben" / "adapter" / "manifest.json").exists()
    assert not (tmp_path / "runs" / "nobody").exists()


def test_two_stages_and_one_adapter(desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    agreed = tmp_path / "agreed.txt"
    agreed.write_text("ben\ncleo\n")
    assert main(["train", "--shared", *many(desk, "--users", str(agreed))]) == 0
    directory = Path(capsys.readouterr().out.strip())
    assert directory.parent.parent == desk.runs / "_shared" and directory.parent.name.startswith("headline+rating-")
    metrics = metrics_of(directory.parent)
    assert metrics["records"] == {"train": 44, "validation": 4, "synthetic": 0, "users": 2}
    origin = directory.parent / "origin.json"
    assert json.loads(origin.read_text())["users"] == ["ben", "cleo"] and origin.stat().st_mode & 0o077 == 0
    # What is handed on says nothing of who they are.
    assert not [path for path in directory.iterdir() if "cleo" in path.read_text(errors="replace")]
    workspace = tmp_path / "runs"
    arguments = desk.arguments("--warm-start", str(directory), workspace=workspace)
    assert export_main(arguments) == 0
    capsys.readouterr()
    # What the person's adapter holds is both: twice the rank, and the first half is the shared one.
    config = json.loads((workspace / USER / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 4
    base = Base(desk.base)
    both, shared = shared_layers(workspace / USER / "adapter", base), shared_layers(directory, base)
    assert all(torch.equal(both[name].down[:2], lora.down) for name, lora in shared.items())
    # The training began where the shared adapter had ended.
    point = json.loads((workspace / USER / "adapter" / "manifest.json").read_text())["metrics"]["curve"][0]
    alone = metrics_of(desk.runs / USER)["curve"]
    assert isinstance(alone, list) and point["validation_nll"] < alone[0]["validation_nll"]
    assert export_main([*arguments, "--dry-run"]) == 0
    assert "run  " not in capsys.readouterr().out
    # Theirs is on top of it too, in the same workspace.
    assert main(["train", *desk.arguments("--warm-start", str(directory), user="cleo")]) == 0
    capsys.readouterr()
    assert main(["forget", "--user", "ben", "--workspace", str(desk.runs)]) == 0
    told = capsys.readouterr().out
    assert f"{directory.parent} was learned from this user's records too" in told
    assert f"{desk.runs / 'cleo' / 'adapter'} was learned" in told


def test_sharing_is_never_by_default(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    for users in (["--users", "all"], []):
        assert main(["train", "--shared", *many(desk, *users)]) != 0
        assert "agreed" in capsys.readouterr().err
    assert main(["train", "--shared", "--dry-run", *many(desk, "--users", "x.txt")]) != 0
    assert "--dry-run goes with --user" in capsys.readouterr().err
    assert main(["train", *many(desk)]) != 0
    assert "--user" in capsys.readouterr().err
    assert main(["train", *desk.arguments("--users", "all")]) != 0
    assert "exclude each other" in capsys.readouterr().err


def test_folding_adds_up(llama_base: Path, tmp_path: Path) -> None:
    base = Base(llama_base)
    shared = shared_layers(make_adapter(tmp_path / "shared", llama_base, seed=1, rank=3, alpha=6.0), base)
    personal = shared_layers(make_adapter(tmp_path / "mine", llama_base, seed=2, rank=2, alpha=5.0), base)
    personal = {name: lora for name, lora in personal.items() if "layers.1" in name}
    both = folded(shared, personal)
    for name, lora in both.items():
        assert lora.down.shape[0] == 5 and lora.scale == 1.0
        expected = shared[name].up @ shared[name].down * shared[name].scale
        if name in personal:
            expected = expected + personal[name].up @ personal[name].down * personal[name].scale
        torch.testing.assert_close(lora.up @ lora.down, expected)
    row, decoder = [3, 1, 4, 1, 5, 9, 2, 6], base.decoder
    torch.testing.assert_close(decoder.logits([row], both), decoder.folded(shared).logits([row], personal), rtol=1e-3, atol=1e-3)
    before = {name: weight.clone() for name, weight in decoder.weights.items()}
    decoder.folded(shared)
    assert all(torch.equal(weight, before[name]) for name, weight in decoder.weights.items())


def test_folding_ranks_that_differ_from_module_to_module(llama_base: Path) -> None:
    decoder = Base(llama_base).decoder
    chance = torch.Generator().manual_seed(0)

    def lora(name: str, rank: int, scale: float) -> Lora:
        rows, columns = decoder.weights[f"{name}.weight"].shape
        return Lora(torch.randn(rank, columns, generator=chance), torch.randn(rows, rank, generator=chance) * 0.1, scale)

    one, two = (f"model.layers.0.self_attn.{module}" for module in ("q_proj", "o_proj"))
    shared, personal = {one: lora(one, 2, 0.5), two: lora(two, 6, 2.0)}, {one: lora(one, 3, 1.0)}
    both = folded(shared, personal)
    assert {found.down.shape[0] for found in both.values()} == {9}
    for name in (one, two):
        expected = sum(part[name].up @ part[name].down * part[name].scale for part in (shared, personal) if name in part)
        torch.testing.assert_close(both[name].up @ both[name].down, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="rank or scale"):
        save_adapter(shared, "tiny", llama_base.parent / "nowhere")


def test_a_folded_adapter_loads_in_peft(llama_base: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    base = Base(llama_base)
    parts = [shared_layers(make_adapter(tmp_path / str(seed), llama_base, seed=seed, rank=2, alpha=4.0), base) for seed in (1, 2)]
    both: dict[str, Lora] = folded(parts[0], parts[1])
    save_adapter(both, "tiny", tmp_path / "both")
    model = PeftModel.from_pretrained(load_base_model(GgufFile(llama_base)), str(tmp_path / "both"))
    row = [3, 1, 4, 1, 5, 9]
    with torch.no_grad():
        torch.testing.assert_close(
            Decoder(GgufFile(llama_base)).logits([row], both), model(torch.tensor([row])).logits[0], rtol=1e-3, atol=1e-3
        )


def test_a_warm_start_that_does_not_fit_is_refused(desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export_main(desk.arguments("--warm-start", str(tmp_path / "none"), workspace=tmp_path / "runs")) != 0
    assert "none" in capsys.readouterr().err
    base = Base(desk.base)
    adapter = make_adapter(tmp_path / "more", desk.base)
    weights = load_file(adapter / "adapter_model.safetensors")
    norm = base.decoder.weights["model.norm.weight"].numpy()
    save_file(weights | {"base_model.model.model.norm.weight": norm}, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="changes model.norm.weight too"):
        shared_layers(adapter, base)


def test_validation_chooses_weight_and_schedule(tmp_path: Path, endpoint: FakeEndpoint) -> None:
    desk = set_table(tmp_path, endpoint, keep=4)
    recipe = (tmp_path / "small.toml").read_text()
    mixes = 'synthetic_weight = [0.1, 1.0]\nsynthetic_schedule = ["mixed", "synthetic-first"]\n'
    (tmp_path / "small.toml").write_text(recipe.replace("[export]", mixes + "\n[export]"))
    assert export_main(desk.arguments()) == 0
    metrics = metrics_of(desk.run)
    chosen = metrics["synthetic"]
    assert isinstance(chosen, dict) and len(chosen["tried"]) == 4
    best = min(chosen["tried"], key=lambda one: one["best_validation_nll"])
    assert (chosen["weight"], chosen["schedule"]) == (best["weight"], best["schedule"])
    assert metrics["best_validation_nll"] == best["best_validation_nll"]
    assert len({one["best_validation_nll"] for one in chosen["tried"]}) > 1
    shutil.rmtree(desk.run)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("synthetic_schedule = ['mixt']", "Did you mean 'mixed'"),
        ("synthetic_weight = []", "at least one"),
        ("synthetic_weight = [-1.0]", "not negative"),
        ("synthetic_weight = [nan]", "not negative"),
        ("synthetic_weight = ['much']", "not negative"),
        ("checkpoint_steps = 0", "above 0"),
        ("clip = 0.0", "above 0"),
        ("threads = -1", "0 (all cores)"),
        ("cohort = 'many'", "a number of users, or auto"),
    ],
)
def test_settings_that_mean_nothing(desk: Desk, tmp_path: Path, line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.toml").write_text(f"[train]\n{line}\n")
    assert export_main([*desk.arguments(workspace=tmp_path / "runs"), "--recipe", str(tmp_path / "bad.toml")]) != 0
    assert message in capsys.readouterr().err


def test_what_a_shared_adapter_has_seen_is_nobodys_test(desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Dora never agreed, but ben wrote what she wrote last: on top of an adapter that ben's records are in, her gain means nothing."""
    rows = [json.loads(line) for line in write_history(tmp_path / "ben.jsonl", "ben").read_text().splitlines()]
    last = json.loads(write_history(tmp_path / "dora.jsonl", "dora").read_text().splitlines()[-1])
    rows[3] |= {name: last[name] for name in ("task", "input", "output")}
    texts = [json.dumps(row) + "\n" for row in rows] + [(tmp_path / "dora.jsonl").read_text()]
    (tmp_path / "history.jsonl").write_text("".join(texts))
    (tmp_path / "agreed.txt").write_text("ben\n")
    source = ["--data", str(tmp_path / "history.jsonl")]
    assert (
        main(["train", "--shared", *many(desk, "--users", str(tmp_path / "agreed.txt"), "--workspace", str(tmp_path / "runs"), *source)])
        == 0
    )
    directory = capsys.readouterr().out.strip()
    arguments = [*desk.arguments("--warm-start", directory, user="dora", workspace=tmp_path / "runs"), *source]
    assert main(["train", *arguments]) != 0
    assert "1 held-out records of user dora were training records" in capsys.readouterr().err
    # With her in the list the record is left out, and said so.
    (tmp_path / "agreed.txt").write_text("ben\ndora\n")
    assert (
        main(["train", "--shared", *many(desk, "--users", str(tmp_path / "agreed.txt"), "--workspace", str(tmp_path / "runs"), *source)])
        == 0
    )
    both = Path(capsys.readouterr().out.strip())
    assert both != Path(directory)
    assert json.loads((both / "manifest.json").read_text())["metrics"]["records"]["train"] == 43
    assert main(["train", *[str(both) if a == directory else a for a in arguments]]) == 0


def test_who_is_listed_twice_is_refused(desk: Desk, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "agreed.txt").write_text("ben\nben\n")
    assert main(["train", "--shared", *many(desk, "--users", str(tmp_path / "agreed.txt"))]) != 0
    assert "'ben' is named twice" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["prepare", "export"])
def test_a_full_disk_ends_the_cohort_and_says_who_was_not_tried(
    desk: Desk, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cdcda_mobile.cohorts import run_cohort
    from cdcda_mobile.pipeline import Pipeline, UserJob

    work = getattr(Pipeline, stage)

    def failing(self: Pipeline) -> object:
        if self.job.user == "ben":
            raise DiskFull("no room.")
        return work(self)

    monkeypatch.setattr(Pipeline, stage, failing)
    history = HistoryConfig(data=str(desk.folder / "history.jsonl"))
    train = TrainConfig(rank=2, epochs=1, threads=1)
    jobs = [
        UserJob(user, tmp_path / "runs", desk.base, history=history, augment=AugmentConfig(keep=0), train=train, export=LOOSE)
        for user in USERS
    ]
    found = run_cohort(jobs, Silent())
    assert [outcome.name for outcome in found] == list(USERS)
    assert found[1].error == "no room." and found[2].error == "not tried: the disk was full"
    assert found[0].error == ("" if stage == "export" else "not tried: the disk was full")
