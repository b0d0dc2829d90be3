"""The laboratory: the page of results is what the results say, a result names its machine, and the peer of training is a fair one."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from laboratory import RESULTS
from summary import PROJECT, README, render, with_tables


def test_the_pages_of_results_are_up_to_date() -> None:
    assert README.read_text(encoding="utf-8") == render(), "run python benchmarks/summary.py"
    page = PROJECT.read_text(encoding="utf-8")
    assert page == with_tables(page), "run python benchmarks/summary.py"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_result_says_where_it_was_measured(path: Path) -> None:
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["figures"] and result["raw"] and result["versions"]["python"] and result["hardware"]["cores"]
    assert all(value is None or isinstance(value, int | float) for value in result["figures"].values())
    assert (Path(__file__).parent.parent / "benchmarks" / f"{path.stem}.py").exists()


def test_a_plot_is_xml_and_holds_every_point() -> None:
    from plot import Panel, svg

    root = ElementTree.fromstring(svg([Panel("a < b", "users", "s", ["1", "2"], {"ours": [3.0, 2.0], "peer": [4.0, 4.0]})]))
    assert len(root.findall(".//{*}circle")) == 4


def test_tables_of_a_page_are_made_of_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import summary
    from personalization import FIGURES
    from phone_lab import PHONES

    figures = {"headline_cdcda_minus_real_nll": -0.2, "headline_cdcda_minus_real_nll_low": -0.3, "headline_cdcda_minus_real_nll_high": -0.1}
    (tmp_path / "personalization.json").write_text(json.dumps({"figures": figures}))
    speed = {"expected": 41.0, "low": 30.0, "high": 52.4}
    quality = {"kl": 0.4, "kept": 0.9, "metrics": {"tweet ROUGE-L": 0.2}}
    row = {"name": "gguf-q4_0", "bytes": 92e6, "fit": {"needed": 146e6}, "decode": speed, "quality": quality}
    runs = {"gguf-q4_0": {"measured": {"decode": [90.0, 99.0, 110.0]}}}
    (tmp_path / "phone_lab.json").write_text(
        json.dumps({"raw": {"rows": [row | {"phone": phone} for phone in PHONES], "refused": {"gguf-q4_1": "why"}, "runs": runs}})
    )
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    page = with_tables("a\n<!-- personalization -->\nold\n<!-- /personalization -->\nb\n<!-- phone_lab -->\n<!-- /phone_lab -->\n")
    assert "old" not in page and "| real records only | **-0.200** [-0.300, -0.100] |" in page and page.count("\n| ") >= len(FIGURES) + 3
    assert "| gguf-q4_0 | 92 MB | 146 MB | 0.4000 | 90% | tweet ROUGE-L 0.200 | 99 (92-108) | 41 (30-52) |" in page
    assert "| gguf-q4_1 | refused by its gate |" in page
    assert with_tables(page) == page


def test_nobody_is_both_tuned_on_and_tested(shared_data: Path) -> None:
    """Also not in the sister task: headlines and sections are the same people's articles."""
    from personal_users import SOURCES, people

    settings = tomllib.loads((RESULTS.parent / "personalization.toml").read_text(encoding="utf-8"))["users"]
    found = {task: people(shared_data, task, settings) for task in SOURCES}
    tuned = {person.user for one in found.values() for person in one.development} | set(settings["seen"])
    for one in found.values():
        tested = [person.user for person in one.test]
        assert len(set(tested)) == settings["test"]
        assert not tuned.intersection(tested)


def test_what_the_curves_people_wrote_is_never_among_the_others_inputs(shared_data: Path) -> None:
    from personal_users import curve_people, histories, public_inputs

    settings = tomllib.loads((RESULTS.parent / "personalization.toml").read_text(encoding="utf-8"))
    task = settings["curve"]["task"]
    everything = histories(shared_data, task)
    for real, (found, chosen) in curve_people(shared_data, task, settings["users"], settings["curve"]).items():
        assert [len(p.train) + len(p.validation) <= real for p in chosen] == [True] * settings["curve"]["users"]
        others = {row["input"] for row in public_inputs(found, task)}
        of_others = {record.input for user, rows in everything.items() if user not in {p.user for p in chosen} for record in rows}
        for person in chosen:
            assert not others & ({record.input for record in everything[person.user]} - of_others)


def test_a_report_is_made_of_everything_and_of_one_experiment(tmp_path: Path) -> None:
    from dataclasses import asdict

    from cdcda_mobile.evaluation.report import Cell
    from personalization import finished_cells, tables

    def put(user: str, arm: str, seed: int, nll: float, settings: str = "a") -> None:
        cell = Cell("headline", user, arm, seed, "f16", 10 * nll, 10, {"ROUGE-L": nll / 10}, 3, f"tests of {user}")
        path = tmp_path / user / f"{arm}-{seed}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"settings": settings, "origin": "x", "cells": [asdict(cell)]}))

    users, arms = ["u1", "u2", "u3"], ["base", "cdcda"]
    for number, user in enumerate(users):
        put(user, "base", 0, 5.0)
        for seed in (0, 1):
            put(user, "cdcda", seed, 4.0 + 0.1 * number + seed)
    cells, machines = finished_cells(tmp_path, users, arms, [0, 1])
    figures = tables(cells)[0]
    assert machines == [{}] and len(cells) == 9 and figures["headline_cdcda_minus_base_nll"] == pytest.approx(-0.4)
    with pytest.raises(SystemExit, match="3 of 12 measurements .* are missing"):
        finished_cells(tmp_path, users, arms, [0, 1, 2])
    with pytest.raises(SystemExit, match="not in the experiment"):
        finished_cells(tmp_path, users[:2], arms, [0, 1])
    put("u3", "cdcda", 1, 5.2, settings="b")
    with pytest.raises(SystemExit, match="several settings"):
        finished_cells(tmp_path, users, arms, [0, 1])


def test_an_attempt_was_measured_under_its_own_settings() -> None:
    from cdcda_export.manifest import sha256_json
    from cdcda_mobile.config import TrainConfig
    from cdcda_mobile.user_training import training_settings
    from personalization import ATTEMPTS, changed

    settings = tomllib.loads((RESULTS.parent / "personalization.toml").read_text(encoding="utf-8"))
    seen = 0
    for name, tasks in settings["attempts"].items():
        for task, changes in tasks.items():
            used = changed(settings, task, changes)
            want = sha256_json(training_settings(TrainConfig(**used["train"] | used["tasks"][task].get("train", {}))))
            for path in (RESULTS / ATTEMPTS / name / task).rglob("*.json"):
                assert json.loads(path.read_text(encoding="utf-8"))["settings"] == want, path
                seen += 1
    assert seen == len([*(RESULTS / ATTEMPTS).rglob("*.json")])


def test_the_clock_knows_the_parts_of_a_training() -> None:
    from training_profile import _PARTS

    assert [name for owner, name, _ in _PARTS if not hasattr(owner, name)] == []


def test_the_peer_of_training_takes_the_same_steps(llama_base: Path, tmp_path: Path) -> None:
    """PEFT and Trainer with gradient accumulation reach our losses: same rows, rates, first values and weighting of tokens."""
    from cdcda_export.base_model import load_base_model
    from cdcda_export.decoder import Decoder
    from cdcda_export.gguf import GgufFile
    from cdcda_export.progress import Silent
    from cdcda_export.verify import Probe
    from cdcda_mobile.config import TrainConfig
    from cdcda_mobile.training.cohort import train_cohort
    from cdcda_mobile.training.learner import TrainResult
    from cdcda_mobile.training.schedule import Example, Order
    from peer_training import Peer, PeerOptions

    base, config = GgufFile(llama_base), TrainConfig(rank=2, learning_rate=0.02, batch_size=4, threads=1)
    probes = [Probe("", "", tuple(range(20, 23 + n % 5)), tuple(range(40 + n, 42 + n + n % 3))) for n in range(14)]
    order = Order("ann", [Example(probe) for probe in probes[:10]], probes[10:], tmp_path)
    (ours,) = train_cohort(Decoder(base), [order], config, Silent())
    assert isinstance(ours, TrainResult)
    want = [point["validation_nll"] for point in ours.state.curve]
    assert want[-1] < want[0] - 0.01
    for batch in (1, 4):
        directory = tmp_path / f"batch-{batch}"
        run = Peer(base, load_base_model(base), config, PeerOptions(batch)).train(replace(order, directory=directory))
        found = [point["validation_nll"] for point in run.curve if "validation_nll" in point]
        assert found == pytest.approx(want, rel=1e-4)
        assert (directory / "adapter_model.safetensors").exists() and len(run.steps) == ours.state.step
