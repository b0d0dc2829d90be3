"""Quality beside speed: the table, the front that nothing beats, and what is recommended for which phone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cdcda_export.export import AdapterJob, export_adapter
from cdcda_export.progress import Silent
from cdcda_export.recipe import ExportConfig
from cdcda_mobile.cli import main
from cdcda_mobile.phone.bench import Fit
from cdcda_mobile.phone.predict import Speed
from cdcda_mobile.phone.tradeoff import Quality, Row, _with_front, front_svg, recommend

Capture = pytest.CaptureFixture[str]


def row(quant: str, speed: float | None, kl: float | None, kept: float | None = None, verdict: str = "fits", kind: str = "gguf") -> Row:
    decode = Speed(speed, 0.9 * speed, 1.1 * speed) if speed else None
    fit = Fit(verdict, 10, 100)
    return Row(f"{kind}-{quant}", kind, quant, 1, 10.0, Quality(kl, kept, {}), "galaxy-s23", decode, decode, 0.1, fit, None, None)


def test_the_front_is_what_nothing_beats() -> None:
    found = _with_front([row("q4_0", 60, 0.02), row("q4_1", 55, 0.03), row("q8_0", 40, 0.001), row("f16", 20, 0.001), row("x", None, 0.0)])
    assert [one.quant for one in found if one.front] == ["q4_0", "q8_0"]
    same = _with_front([row("a", 40, 0.01), row("b", 40, 0.01)])
    assert all(one.front for one in same)


def test_the_fastest_that_keeps_the_person_is_recommended() -> None:
    found = [
        row("q4_0", 60, 0.02, 0.896),
        row("q5_0", 50, 0.01, 0.95),
        row("q8_0", 40, 0.001, 1.0),
        row("int4", None, 0.01, 1.0, kind="onnx"),
    ]
    chosen = recommend(found, 0.0)
    assert chosen.row == found[1] and "at least 90% of the personal gain" in chosen.why
    assert chosen.refused == {
        "gguf-q4_0": "keeps 89.6% of the personal gain",
        "gguf-q8_0": "keeps the person too, but is slower",
        "onnx-int4": "its speed was not calibrated",
    }
    slow = recommend(found, 50.0)
    assert slow.row == found[0] and "Closest" in slow.why and slow.refused["gguf-q8_0"] == "may decode at 36.0 tok/s only"
    assert recommend(found, 100.0).row is None


def test_what_does_not_fit_or_was_not_measured_is_no_choice_where_there_is_another() -> None:
    found = [row("q8_0", 40, 0.001, 1.0, verdict="does not fit"), row("q4_0", 60, 0.02), row("q4_1", 50, 0.01)]
    chosen = recommend(found, 0.0)
    assert chosen.row == found[2] and "does not fit into the memory" in chosen.refused["gguf-q8_0"]
    assert chosen.refused["gguf-q4_0"] == "further from the float32 model"
    chosen = recommend([*found, row("q5_0", 45, 0.015, 0.99)], 0.0)
    assert chosen.row is not None and chosen.row.quant == "q5_0" and "was not measured" in chosen.refused["gguf-q4_0"]


def test_of_a_phone_whose_speed_nobody_knows_the_smallest_is_taken_that_keeps_the_person() -> None:
    found = [row("q8_0", None, 0.001, 1.0), replace(row("q5_0", None, 0.01, 0.98), bytes=5)]
    chosen = recommend(found, 0.0)
    assert chosen.row == found[1] and "smallest" in chosen.why and chosen.refused["gguf-q8_0"] == "keeps the person too, but is larger"
    assert recommend(found, 1.0).refused == dict.fromkeys(("gguf-q8_0", "gguf-q5_0"), "nothing is known of this phone's speed")


def test_the_plot_shows_every_row_that_has_both_numbers() -> None:
    found = _with_front([row("q4_0", 60, 0.02), row("q8_0", 40, 0.001), row("int4", None, 0.01), row("f16", 20, None)])
    root = ElementTree.fromstring(front_svg([*found, replace(found[0], phone="<other>")]))
    assert len(root.findall(".//{*}circle")) == 3
    assert front_svg([row("int4", None, 0.1)]) == ""


@pytest.fixture(scope="module")
def runs(llama_base: Path, llama_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace in which one user has two artifacts."""
    root = tmp_path_factory.mktemp("runs")
    for quant in ("q8_0", "f16"):
        export_adapter(AdapterJob(llama_adapter, llama_base, workspace=root, config=ExportConfig(quant=quant)), Silent())
    return root


def test_the_table_of_a_user_and_of_a_workspace(runs: Path, capsys: Capture) -> None:
    user = next((runs / "_adapters").iterdir())

    def measured(name: str, decode: list[float], phone: str = "galaxy-s23", unusable: str = "") -> None:
        content = {"class": phone, "unusable": unusable, "measured": {"decode": decode}}
        (user / "bench" / name).write_text(json.dumps(content))

    (user / "bench").mkdir(exist_ok=True)
    measured("gguf-q8_0-galaxy-s23-llama-bench.json", [30.0, 10.0, 20.0])
    measured("gguf-q8_0-galaxy-s23-pocketpal.json", [99.0])
    measured("gguf-q8_0-galaxy-a16-llama-bench.json", [98.0], "galaxy-a16", "other processes had its cores")
    measured("gguf-q8_0-device-SM-A166B-llama-bench.json", [8.0], "galaxy-a16")
    (user / "bench" / "gguf-f16-galaxy-s23-llama-bench.json").write_text("{")
    (user / "bench" / "gguf-f16-device-SM-A166B-llama-bench.json").write_text("[]")
    assert main(["bench", str(user), "--table", "--phone", "galaxy-s23,galaxy-a16"]) == 0
    out = capsys.readouterr().out
    assert len([line for line in out.splitlines() if " gguf-" in line]) == 4 and " 20.0 " in out and " 8.0 " in out and "fits" in out
    rows = json.loads((user / "bench" / "tradeoff.json").read_text())["rows"]
    assert {(one["phone"], one["name"]) for one in rows} == {
        (p, f"gguf-{q}") for p in ("galaxy-s23", "galaxy-a16") for q in ("q8_0", "f16")
    }
    assert all(one["quality"]["kl"] is not None and one["decode"]["low"] < one["decode"]["high"] for one in rows if one["decode"])
    known = {(one["phone"], one["quant"]): (one["host"], one["device"]) for one in rows if one["host"] or one["device"]}
    assert known == {("galaxy-s23", "q8_0"): (20.0, None), ("galaxy-a16", "q8_0"): (None, 8.0)}
    assert ElementTree.parse(user / "bench" / "tradeoff.svg").getroot() is not None
    assert main(["bench", str(runs / "_adapters"), "--table", "--phone", "galaxy-s23", "--json"]) == 0
    assert [one["users"] for one in json.loads(capsys.readouterr().out)] == [1, 1]


def test_a_recommendation_names_the_folder_and_says_why_not_the_others(runs: Path, capsys: Capture) -> None:
    user = next((runs / "_adapters").iterdir())
    assert main(["bench", str(user), "--recommend", "--phone", "galaxy-s23"]) == 0
    assert f"For a Samsung Galaxy S23: {user}/gguf-" in capsys.readouterr().out
    assert main(["bench", str(user), "--recommend", "--phone", "galaxy-s23", "--min-tok-s", "1e9", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["recommended"] is None
    assert main(["bench", str(user), "--recommend"]) == 2
    assert "name it with --phone" in capsys.readouterr().err
    assert main(["bench", str(runs / "nobody"), "--table"]) == 1
    assert "holds no finished artifact; make some with" in capsys.readouterr().err
