"""Cells become tables and a plot: seeds inside users, families corrected, nothing compared that was measured on other records."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from dataclasses import asdict, replace

import pytest

from cdcda_export.errors import DataError, FileError
from cdcda_mobile.evaluation.forest import forest_svg
from cdcda_mobile.evaluation.report import (
    Arm,
    Cell,
    arm_rows,
    arms_markdown,
    as_json,
    cells_of,
    compare_arms,
    comparisons_markdown,
    hash_of,
)  # fmt: skip
from cdcda_mobile.history import Record

REAL, BOTH = Arm("real", "f32"), Arm("real+synthetic", "f32")


def cell(user: str, arm: Arm, nll: float, rouge: float, seed: int = 0, task: str = "headline") -> Cell:
    return Cell(task, user, arm.name, seed, arm.precision, nll * 10, 10, {"ROUGE-L": rouge}, 5, f"hash of {task} of {user}")


def cells(users: int = 8) -> list[Cell]:
    """``BOTH`` is better in NLL by 0.1 for everybody, and no different in ROUGE."""
    found = []
    for i in range(users):
        for seed in (0, 1):
            found.append(cell(f"u{i}", REAL, 3.0 + 0.2 * i + 0.01 * seed, 0.2 + 0.01 * (i % 2), seed))
            found.append(cell(f"u{i}", BOTH, 2.9 + 0.2 * i + 0.01 * seed, 0.2 + 0.01 * ((i + 1) % 2), seed))
    return found


def test_arms_are_means_over_users() -> None:
    rows = arm_rows(cells(), ["NLL", "ROUGE-L"])
    assert [(r.arm, r.metric) for r in rows] == [(REAL, "NLL"), (BOTH, "NLL"), (REAL, "ROUGE-L"), (BOTH, "ROUGE-L")]
    assert rows[0].estimate.n == 8
    assert rows[0].estimate.mean == pytest.approx(3.0 + 0.2 * 3.5 + 0.005)
    assert "| headline | real | f32 | NLL | 3.705 | " in arms_markdown(rows)


def test_comparisons_are_one_family() -> None:
    found = compare_arms(cells(), [(BOTH, REAL)], ["NLL", "ROUGE-L"])
    nll, rouge = (comparison.difference for comparison in found)
    assert nll.mean == pytest.approx(-0.1)
    assert nll.p == 2 / 2**8
    assert nll.p_holm == pytest.approx(2 * nll.p)
    assert rouge.mean == pytest.approx(0.0)
    assert rouge.p_holm == rouge.p == 1.0
    text = comparisons_markdown(found)
    assert "| headline | real+synthetic (f32) − real (f32) | NLL ↓ | -0.100 | " in text
    assert "| 0.0078 | 0.0156 | " in text


def test_a_task_without_the_metric_is_passed_over() -> None:
    rating = replace(cell("u0", REAL, 1.0, 0.0, task="rating"), metrics={"MAE": 1.0})
    assert {r.task for r in arm_rows([*cells(2), rating], ["ROUGE-L"])} == {"headline"}
    assert compare_arms([*cells(2), rating], [(BOTH, REAL)], ["MAE"][:0]) == []


@pytest.mark.parametrize(
    ("spoilt", "reason"),
    [
        (replace(cell("u0", BOTH, 1.0, 0.0, seed=9), test_sha256="another"), "User u0 was measured on different headline records"),
        (cell("u0", BOTH, 1.0, 0.0), "User u0 was measured twice in real\\+synthetic \\(f32\\) with seed 0"),
        (cell("u9", BOTH, 1.0, 0.0), "User u9 was measured in one arm only"),
    ],
)
def test_what_was_measured_otherwise_is_not_compared(spoilt: Cell, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        compare_arms([*cells(), spoilt], [(BOTH, REAL)], ["NLL"])


def test_cells_survive_json_and_nothing_else_is_a_cell() -> None:
    found = cells(2)
    comparisons = compare_arms(found, [(BOTH, REAL)], ["NLL"])
    value = json.loads(json.dumps(as_json(found, arm_rows(found, ["NLL"]), comparisons)))
    assert cells_of(value["cells"]) == found
    assert value["arms"][0]["arm"] == {"name": "real", "precision": "f32"}
    assert value["comparisons"][0]["difference"]["mean"] == pytest.approx(-0.1)
    with pytest.raises(FileError, match="is no cell"):
        cells_of([{**asdict(found[0]), "text": "what they wrote"}])


def test_the_hash_says_which_records() -> None:
    one, other = Record("1", "2024", "headline", "a", "b"), Record("1", "2024", "headline", "a", "c")
    assert hash_of([one]) == hash_of([replace(other, output="b")]) != hash_of([other])


def test_the_plot_has_a_row_for_each_comparison_and_follows_light_and_dark() -> None:
    found = compare_arms(cells(), [(BOTH, REAL)], ["NLL", "ROUGE-L"])
    text = forest_svg(found)
    picture = ET.fromstring(text)
    marks = [circle.get("class") for circle in picture.iter("{http://www.w3.org/2000/svg}circle")]
    assert marks == ["mark", "open"]  # only the first is a claim
    assert "prefers-color-scheme: dark" in text
    assert "headline: real+synthetic − real (f32)" in text
    assert "NLL, headline: real+synthetic − real (f32): -0.100 [-0.100, -0.100], p 0.016" in (picture.get("aria-label") or "")
    assert forest_svg([]) == ""


def test_marks_stand_where_the_values_are() -> None:
    picture = ET.fromstring(forest_svg(compare_arms(cells(), [(BOTH, REAL)], ["NLL"])))
    name = "{http://www.w3.org/2000/svg}"
    zero = next(line for line in picture.iter(f"{name}line") if line.get("class") == "axis")
    (dot,) = picture.iter(f"{name}circle")
    assert float(dot.get("cx", "nan")) < float(zero.get("x1", "nan"))  # better, and so left of zero


def test_one_user_is_a_point_without_an_interval() -> None:
    found = compare_arms(cells(1), [(BOTH, REAL)], ["NLL"])
    assert "| -0.100 | – | 1.0000 | 1.0000 | – | 1 |" in comparisons_markdown(found)
    assert 'class="open"' in forest_svg(found)
    assert ">-0.100, p 1<" in forest_svg(found)
