"""``cdcda eval`` on a tiny base: arms with one budget, resumable measurements, predictions, planted secrets, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cdcda_export.base import Base
from cdcda_export.errors import ConfigError, WorkspaceError
from cdcda_export.progress import Silent
from cdcda_mobile.cli import main
from cdcda_mobile.config import TrainConfig
from cdcda_mobile.eval_command import PLAIN_ARMS, SHARED_ARMS, comparable, same_budget
from cdcda_mobile.evaluation.arms import ARMS, Person, with_others
from cdcda_mobile.evaluation.experiment import Experiment, Settings
from cdcda_mobile.evaluation.report import Cell
from cdcda_mobile.history import Record
from fake_endpoint import FakeEndpoint
from job import KEY, USER, Desk, set_table

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """A user who was evaluated once; nobody writes here."""
    with FakeEndpoint() as served:
        table = set_table(tmp_path_factory.mktemp("evaluated"), served)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OPENAI_API_KEY", KEY)
            assert main(["eval", *table.arguments()]) == 0
        yield table


def records(user: str, start: int, count: int) -> tuple[Record, ...]:
    return tuple(
        Record(f"{user}{n:03}", f"2024-01-{1 + n:02}", "headline", f"{user} text {n} of it", f"{user} says {n}")
        for n in range(start, start + count)
    )


def person(user: str, made: int = 6) -> Person:
    return Person(user, records(user, 0, 6), records(user, 6, 2), records(user, 8, 3), {"selected": records(user, 20, made)})


def experiment(base: Path, folder: Path, *people: Person, **settings: Any) -> Experiment:
    train = TrainConfig(rank=2, max_steps=3, evaluate_every=2, batch_size=4, threads=1)
    own = Settings(train, **{"answer_tokens": 4, "max_tokens": 256, **settings})
    return Experiment(Base(base), people, own, lambda user: folder / "work" / user, lambda user: folder / "results" / user, Silent())


def test_every_arm_is_measured_in_both_precisions_and_only_numbers_are_kept(desk: Desk, capsys: Capture) -> None:
    report = json.loads((desk.run / "eval" / "eval.json").read_text())
    assert {(cell["arm"], cell["precision"]) for cell in report["cells"]} == {
        ("rule", "none"), *((arm, kind) for arm in ("base", "bm25", "personal", "cdcda") for kind in ("f16", "q4_0")),
    }  # fmt: skip
    assert {cell["task"] for cell in report["cells"]} == {"headline", "rating"}
    rivals = {(c["a"]["name"], c["b"]["name"], c["b"]["precision"]) for c in report["comparisons"]}
    assert rivals == {("cdcda", rival, kind) for rival in ("base", "bm25", "personal") for kind in ("f16", "q4_0")} | {
        ("cdcda", "rule", "none")
    }
    written = "".join(path.read_text() for path in (desk.run / "eval").glob("*.json"))
    history = [json.loads(line) for line in (desk.run / "history" / "test.jsonl").read_text().splitlines()]
    assert not [row["input"] for row in history if row["input"] in written]
    assert main(["eval", *desk.arguments()]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said if line.startswith("  ") and line.split()[0] in ARMS] == 2 * [
        "base",
        "rule",
        "bm25",
        "personal",
        "cdcda",
    ]
    assert max(map(len, said[:-1])) < 100 and said[-1].endswith("eval.md")
    again = main(["eval", *desk.arguments(), "--json"])  # nothing is trained or measured again
    assert again == 0 and json.loads(capsys.readouterr().out)["cells"] == report["cells"]


def test_a_rule_is_compared_where_it_answers_for_everybody() -> None:
    def cell(task: str, user: str, arm: str) -> Cell:
        return Cell(task, user, arm, 0, "none" if arm == "rule" else "f16", None, 0, {"accuracy": 1.0}, 1, "")

    cells = [cell(task, user, arm) for task in ("tweet", "rating") for user in ("ann", "bob") for arm in ("rule", "personal")]
    fewer = [one for one in cells if (one.task, one.user, one.arm) != ("tweet", "ann", "rule")]
    assert comparable(cells) == cells
    assert [one for one in fewer if one not in comparable(fewer)] == [cell("tweet", "bob", "rule")]


def test_help_names_the_arms_and_the_defaults(capsys: Capture) -> None:
    with pytest.raises(SystemExit):
        main(["eval", "--help"])
    said = "".join(capsys.readouterr().out.split())
    assert f"of:{','.join(name for name in ARMS if name != 'cdcda-unselected')};" in said
    assert f"(default:{','.join(PLAIN_ARMS)},with--warm-start{','.join(SHARED_ARMS)})" in said


def test_arms_share_steps_and_looks(desk: Desk) -> None:
    found = {path.stem: json.loads(path.read_text())["training"] for path in (desk.run / "eval").glob("*-0.json")}
    assert found["personal-0"]["steps"] == found["cdcda-0"]["steps"] > 0
    assert found["base-0"] == {}
    one, other = person("ann", 6), person("bob", 15)
    config = same_budget([one, other], TrainConfig(batch_size=4, epochs=2, evaluations_per_epoch=2))
    assert (config.max_steps, config.evaluate_every) == (12, 3)  # 21 records of bob's: six steps an epoch
    assert same_budget([one], TrainConfig(max_steps=7)).max_steps == 7


def test_a_run_that_was_stopped_goes_on_and_a_changed_record_is_measured_again(llama_base: Path, tmp_path: Path) -> None:
    ann = person("ann")
    first = experiment(llama_base, tmp_path, ann).run(["base", "personal"], [0, 1])
    assert [(cell.arm, cell.seed, cell.precision) for cell in first] == [
        ("base", 0, "f16"), ("base", 0, "q4_0"), *(("personal", seed, kind) for seed in (0, 1) for kind in ("f16", "q4_0")),
    ]  # fmt: skip
    kept = tmp_path / "results" / "ann" / "personal-1.json"
    before = kept.stat().st_mtime_ns
    (tmp_path / "results" / "ann" / "personal-0.json").write_text("{")
    assert experiment(llama_base, tmp_path, ann).run(["base", "personal"], [0, 1]) == first
    assert kept.stat().st_mtime_ns == before
    changed = replace(ann, test=(replace(ann.test[0], output="another"), *ann.test[1:]))
    assert experiment(llama_base, tmp_path, changed).run(["base"], [0])[0].test_sha256 != first[0].test_sha256
    assert not list(tmp_path.rglob("*.gguf"))


def test_a_held_out_record_in_any_arm_is_refused(llama_base: Path, tmp_path: Path) -> None:
    ann = person("ann")
    leaking = replace(ann, synthetic={"selected": (replace(ann.test[0], id="made", output="something else"),)})
    with pytest.raises(WorkspaceError, match="has the input of a record that is in the held-out set"):
        experiment(llama_base, tmp_path, leaking)
    with pytest.raises(WorkspaceError, match="is in the training set and in the held-out set"):
        experiment(llama_base, tmp_path, replace(ann, train=(*ann.train, replace(ann.validation[0], id="again"))))


def test_others_records_are_as_many_and_never_held_out() -> None:
    ann, bob, eve = person("ann", 4), person("bob", 4), person("eve", 4)
    made = bob.synthetic["selected"]
    leaking = replace(bob, synthetic={"selected": (*made[:3], replace(ann.test[0], id="b", input=ann.test[0].input.upper() + "!"))})
    mixed = with_others([ann, leaking, eve])
    assert [r.input for r in mixed[0].synthetic["other"]] == [r.input for r in (*made[:3], eve.synthetic["selected"][0])]
    assert [r.input for r in mixed[1].synthetic["other"]] == [r.input for r in eve.synthetic["selected"]]
    with pytest.raises(ConfigError, match="have 4 synthetic records of the tasks of user eve, not 6"):
        with_others([ann, person("eve", 6)])
    with pytest.raises(ConfigError, match="at least two"):
        with_others([ann])


def test_other_training_records_are_another_measurement(llama_base: Path, tmp_path: Path) -> None:
    ann = person("ann")
    experiment(llama_base, tmp_path, ann).run(["personal"], [0])
    fewer = replace(ann, train=ann.train[2:])
    experiment(llama_base, tmp_path, fewer).run(["personal"], [0])
    assert len(list((tmp_path / "work" / "ann").iterdir())) == 2


def test_canaries_are_planted_beside_the_user_and_asked_for(desk: Desk, tmp_path: Path, capsys: Capture) -> None:
    runs = Path(shutil.copytree(desk.runs, tmp_path / "runs"))
    adapter = (runs / USER / "history" / "train.jsonl").read_bytes()
    assert main(["eval", *desk.arguments(workspace=runs), "--canary"]) == 0
    said = capsys.readouterr().out
    assert "planted never (control)" in said and "planted 4 times" in said
    found = json.loads((runs / USER / "eval" / "canary" / "canary.json").read_text())
    assert len(found["exposures"]) == 8 and all(0 <= one["bits"] <= 8 for one in found["exposures"])
    assert (runs / USER / "history" / "train.jsonl").read_bytes() == adapter and b"my " not in adapter


def test_predictions_have_lamps_own_form(desk: Desk, tmp_path: Path, capsys: Capture) -> None:
    assert main(["eval", *desk.arguments(), "--predictions", str(tmp_path / "out")]) == 2
    assert "none of these test records is a question of the benchmark's" in capsys.readouterr().err
    folder = tmp_path / "LaMP_2" / "train"
    folder.mkdir(parents=True)
    profile = [{"id": f"p{n}", "text": f"text {n} of it", "category": "sports"} for n in range(12)]
    asked = {"id": "110", "input": "Which category does this article relate to? article: the last text", "profile": profile}
    (folder / "train_questions.json").write_text(json.dumps([asked]))
    (folder / "train_outputs.json").write_text(json.dumps({"task": "LaMP_2", "golds": [{"id": "110", "output": "travel"}]}))
    recipe = tmp_path / "short.toml"
    recipe.write_text("[history]\nmin_records = 5\n[train]\nrank = 2\nepochs = 1\n[export]\nanswer_tokens = 4\n")
    job = ["--user", "110", "--data", str(tmp_path / "LaMP_2"), "--base", str(desk.base), "--recipe", str(recipe), "--keep", "0"]
    assert main(["eval", *job, "--workspace", str(tmp_path / "runs"), "--predictions", str(tmp_path / "out"), "--quiet"]) == 0
    written = json.loads((tmp_path / "out" / "LaMP_2N" / "personal-q4_0.json").read_text())
    assert written["task"] == "LaMP_2" and [gold["id"] for gold in written["golds"]] == ["110"]  # the name that LaMP's scorer looks for
    assert set(ARMS) >= {path.stem.rsplit("-", 1)[0] for path in (tmp_path / "out" / "LaMP_2N").iterdir()}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--users", "all"], "Name whose model to evaluate with --user"),
        (["--format", "onnx"], "cdcda eval measures GGUF artifacts"),
        (["--arms", "cdcdaa"], "There is no arm 'cdcdaa'. Did you mean 'cdcda'?"),
        (["--arms", "cdcda-other"], "name at least two with --users"),
        (["--arms", "cdcda-unselected"], "benchmarks/personalization.py has it"),
        (["--seeds", "0"], "at least 1"),
        (["--canary", "--arms", "base"], "do not go with it"),
    ],
)
def test_what_is_refused(desk: Desk, more: list[str], said: str, capsys: Capture) -> None:
    assert main(["eval", *desk.arguments(), *more]) == 2
    assert said in capsys.readouterr().err
