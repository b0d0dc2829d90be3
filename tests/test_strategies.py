"""Strategies, the style card, what is shown before it is sent, and which candidates are kept."""

from __future__ import annotations

import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cdcda_export.base import Base, open_base
from cdcda_export.errors import ConfigError, DataError, FileError
from cdcda_export.progress import Silent
from cdcda_mobile.augmentation.augment import augment, wanted_of
from cdcda_mobile.augmentation.choice import LESS_ALIKE, LESS_DIVERSE, choose, shares
from cdcda_mobile.augmentation.held_out import HeldOut
from cdcda_mobile.augmentation.likeness import LikelihoodGain
from cdcda_mobile.augmentation.prompts import STRATEGIES, Planner, clipped
from cdcda_mobile.augmentation.public_inputs import read_inputs
from cdcda_mobile.augmentation.select import RULES, Selector
from cdcda_mobile.augmentation.style import card_lines, card_request, counted
from cdcda_mobile.augmentation.textual import farthest_first, grams, words
from cdcda_mobile.cli import main
from cdcda_mobile.config import RULE_NAMES, STRATEGY_NAMES, AugmentConfig, TeacherConfig, TrainConfig
from cdcda_mobile.dataset import encoding_of
from cdcda_mobile.history import Record
from cdcda_mobile.tasks import TASKS
from fake_endpoint import serving
from test_augment import HELD_OUT, TRAIN, plain, planner, run, sentence


def test_names_in_the_configuration_are_those_of_the_code() -> None:
    assert tuple(STRATEGIES) == STRATEGY_NAMES and tuple(RULES) == RULE_NAMES


def headlines(*outputs: str) -> list[Record]:
    return [Record(f"h{n}", f"2024-01-{1 + n:02}", "headline", sentence(n), output) for n, output in enumerate(outputs)]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_asks_for_its_fields_and_turns_through_the_records(strategy: str) -> None:
    texts = {"headline": [sentence(5000 + n) for n in range(4)]}
    ours = tuple(r for r in TRAIN if r.task == "headline")[:6]
    inputs = "others.jsonl" if strategy == "answer" else ""
    made = Planner(ours, HeldOut(()), plain(strategies=[strategy], inputs=inputs), 1, inputs_only=False, inputs=texts)
    asks = [made.ask(k) for k in range(12)]
    assert {tuple(ask.request.schema["required"]) for ask in asks} == {STRATEGIES[strategy].fields}
    assert len({ask.request.messages[0]["content"] for ask in asks}) == 1  # what a server computes once
    assert len({ask.request.key("m") for ask in asks}) == 12
    if strategy == "counterpart":
        assert Counter(ask.output for ask in asks) == {r.output: 2 for r in ours}
    if strategy == "answer":
        assert Counter(ask.input for ask in asks) == dict.fromkeys(texts["headline"], 3)
        verdict = Selector(ours, (), plain()).judge(asks[0], json.dumps({"output": sentence(9, 5)}))
        assert (verdict.input, verdict.output, verdict.reason) == (asks[0].input, sentence(9, 5), "")


def test_inputs_of_others_are_those_most_like_the_users_own() -> None:
    ours = tuple(r for r in TRAIN if r.task == "headline")[:3]
    near = [f"{record.input} And more of it." for record in ours]
    texts = {"headline": [*(sentence(5000 + n) for n in range(20)), *near]}
    made = Planner(ours, HeldOut(()), plain(strategies=["answer"], inputs="others.jsonl"), 1, inputs_only=False, inputs=texts)
    assert sorted(made.ask(k).input for k in range(3)) == sorted(near)
    assert sorted(made.ask(k).input for k in range(23)) == sorted(texts["headline"])


def test_an_input_of_somebody_elses_that_is_held_out_is_not_answered() -> None:
    held = next(r for r in HELD_OUT if r.task == "headline")
    texts = {"headline": [held.input.upper(), sentence(5001)]}
    made = Planner(TRAIN, HeldOut(HELD_OUT), plain(strategies=["answer"], inputs="others.jsonl"), 1, inputs_only=False, inputs=texts)
    assert {made.ask(k).input for k in range(60) if made.ask(k).strategy == "answer"} == {sentence(5001)}


def test_what_nobody_answers_is_refused() -> None:
    with pytest.raises(ConfigError, match="Nothing answers the inputs"):
        plain(strategies=["new"], inputs="others.jsonl")
    with pytest.raises(DataError, match="holds no input of the task"):
        Planner(TRAIN, HeldOut(()), plain(strategies=["answer"], inputs="o"), 1, inputs_only=False, inputs={"commit": ["x.py"]})


def test_a_held_out_text_is_never_sent_and_a_script_without_spaces_is_no_way_around() -> None:
    secret = "今天市政府宣布新的公园将在明年春天开放"
    out = HeldOut([Record("t", "2024-09-09", "headline", "一个很短的输入文本在这里写着", secret)])
    assert out.shown_in(f"他说{secret}了") and not out.shown_in("今天市政府宣布")
    with pytest.raises(DataError, match="nothing was sent"):
        out.assert_not_shown([{"content": f"records: {secret}"}])
    assert words(clipped(secret * 200)) <= 110
    assert max(len(clipped(text * 2000)) for text in ("สวัสดีชาวโลก", "QUJDREVG", "lib/x.py\n")) < 1500


@pytest.mark.parametrize("text", ['{"output": "a \\ud83d b"}', "{" * 3000 + '"output"'])
def test_an_answer_that_no_file_can_hold_is_refused(text: str) -> None:
    ours = tuple(r for r in TRAIN if r.task == "headline")[:6]
    made = Planner(ours, HeldOut(()), plain(strategies=["answer"], inputs="o"), 1, inputs_only=False, inputs={"headline": [sentence(5000)]})

    def encode(task: str, given: str) -> bool:
        return bool(given.encode("utf-8"))

    assert Selector(ours, (), plain(without=[*RULES]), encode).judge(made.ask(0), text).rule == "schema"


def test_a_label_is_the_best_guess_and_a_text_is_drawn() -> None:
    texts = {name: [sentence(n) for n in range(4)] for name in ("rating", "headline")}
    made = Planner(TRAIN, HeldOut(()), plain(strategies=["answer"], inputs="o"), 1, inputs_only=False, inputs=texts)
    found = {(ask.strategy, ask.task.name): ask.request.temperature for ask in map(made.ask, range(40))}
    assert found["answer", "rating"] == 0.0 and found["answer", "headline"] == AugmentConfig().temperature


def test_what_the_student_has_no_room_for_is_not_kept(tiny_base: Path) -> None:
    ours, texts = tuple(r for r in TRAIN if r.task == "headline"), {"headline": ["a/b/c/d/e/f " * 60]}
    made = Planner(ours, HeldOut(()), plain(strategies=["answer"], inputs="others.jsonl"), 1, inputs_only=False, inputs=texts)
    encoding = encoding_of(open_base(tiny_base))
    for longest, rule in ((512, "fit"), (1024, "")):
        selector = Selector(ours, (), plain(without=[*RULES]), lambda task, given, most=longest: encoding.fits(task, given, most))
        assert selector.judge(made.ask(0), json.dumps({"output": sentence(9, 5)})).rule == rule


def test_a_label_is_one_of_the_closed_set_by_schema() -> None:
    rated = tuple(r for r in TRAIN if r.task == "rating")
    made = Planner(
        rated,
        HeldOut(()),
        plain(strategies=["answer", "new"], inputs="others.jsonl"),
        1,
        inputs_only=False,
        inputs={"rating": [sentence(7)]},
    )
    ask = made.ask(0)
    assert ask.strategy == "answer" and ask.request.schema["properties"]["output"]["enum"] == list(TASKS["rating"].labels)


def test_texts_without_inputs_become_pairs() -> None:
    tweets = [Record(f"t{n}", f"2024-01-{1 + n:02}", "tweet_completion", sentence(n)[:9], sentence(n)) for n in range(8)]
    made = Planner(tweets, HeldOut(()), plain(), 1, inputs_only=False)
    ask = next(ask for ask in map(made.ask, range(4)) if ask.strategy == "counterpart")
    assert ask.task.name == "tweet" and ask.output in {t.output for t in tweets}
    assert "plain wording of a tweet" in ask.request.messages[1]["content"]
    assert sentence(3)[:9] + "\n" not in ask.request.messages[0]["content"]  # the beginnings that we cut are no records of anybody's
    verdict = Selector(tweets, (), plain()).judge(ask, json.dumps({"input": sentence(99)}))
    assert (verdict.input, verdict.output) == (sentence(99), ask.output)


def test_the_records_that_are_shown_are_spread() -> None:
    assert farthest_first([grams("a b c d"), grams("a b c d e"), grams("x y z"), grams("a b c")], 3) == [0, 2, 3]
    alike = [replace(TRAIN[1], id=f"a{n}", date=f"2024-02-{n + 1:02}", input=TRAIN[1].input + f" {n}") for n in range(9)]
    made = planner((*alike, TRAIN[4], TRAIN[5]), (), examples=3)
    shown = made.ask(0).request.messages[0]["content"]
    assert TRAIN[4].input in shown and TRAIN[5].input in shown


# The style card.


def test_what_can_be_counted() -> None:
    lines = counted(headlines("Why We Love Old Trains", "How To Mend A Kettle", "What Nobody Tells You?"))
    assert lines[0] == "length of the headline: 4 to 5 words, mostly about 5"
    assert "headline: Capitals On Most Words" in lines and "headline: starts with a capital letter" in lines
    assert "headline: begins with a word and a colon" in counted(headlines("fix: one thing", "docs: another", "ci: a third"))
    assert counted([r for r in TRAIN if r.task == "rating"])[0].startswith("score: 1 ")


def test_the_teachers_part_of_the_card() -> None:
    request = card_request(headlines("one two", "three four"), 0, 100)
    assert "three four" in request.messages[0]["content"] and set(request.schema["required"]) == {"subjects", "habits"}
    assert card_lines('{"subjects": ["trains", "tea"], "habits": ["dry wit"]}') == ["subjects: trains; tea", "habits: dry wit"]
    assert card_lines("no idea") == card_lines('{"subjects": 3}') == card_lines('{"subjects": ["\\ud83d", "a\\u0000", " "]}') == []


def test_the_card_is_asked_for_once_and_stands_in_every_request(tmp_path: Path) -> None:
    with serving() as endpoint:
        first = run(endpoint, tmp_path, plain(style=True))
        assert first.paid_requests == len(endpoint.requests)
        cards = [body for body in endpoint.requests if "subjects" in json.dumps(body["response_format"])]
        assert len(cards) == 2  # two tasks
        others = [body for body in endpoint.requests if body not in cards]
        assert all("What marks this person:" in body["messages"][0]["content"] for body in others)
        endpoint.requests.clear()
        assert run(endpoint, tmp_path, plain(style=True)).paid_requests == 0
        assert endpoint.requests == []


# What would be sent.


def shown(job: list[str], capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert main([*job, "--show-requests"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.fixture
def job(tmp_path: Path) -> list[str]:
    """Four records, whatever the teacher says, asked for one after the other."""
    recipe = tmp_path / "r.toml"
    rules = '"language", "length", "copy", "duplicate", "echo", "text"'
    recipe.write_text(f"[augment]\nkeep = 4\npool = 1.0\nwithout = [{rules}]\n[teacher]\nconcurrency = 1\n")
    return ["augment", "--user", "42", "--recipe", str(recipe), "--quiet", "--workspace", str(tmp_path / "runs")]


def test_shown_requests_are_those_that_are_sent(tmp_path: Path, capsys: pytest.CaptureFixture[str], job: list[str]) -> None:
    with serving() as endpoint:
        job += ["--teacher-base-url", endpoint.url, "--teacher-model", "fake-1"]
        before = shown(job, capsys)
        assert endpoint.requests == [] and not (tmp_path / "runs").exists()
        assert {row["to"] for row in before} == {f"{endpoint.url}/chat/completions"}
        assert shown([*job, "--max-requests", "3"], capsys) == before[:3] and shown([*job, "--keep", "0"], capsys) == []
        tasks = sum("subjects" in json.dumps(row) for row in before)
        assert main([*job, "--max-requests", str(tasks + 1)]) == 0  # the cards, and one of the others
        assert endpoint.requests[:tasks] == [row["body"] for row in before[:tasks]]
        assert shown([*job, "--token-budget", "1"], capsys) == []
        assert main([*job, "--token-budget", "1", "--show-requests"]) == 0
        assert capsys.readouterr().err.startswith("Nothing would be sent")
        after = shown(job, capsys)
        assert len(after) == len(before) - tasks - 1 and "answer to the first request" not in json.dumps(after)
        unnamed = shown(job[:-2], capsys)
        assert len(unnamed) == len(before) and unnamed[0]["body"]["model"] == "(the first that the endpoint lists)"
        endpoint.requests.clear()
        assert main([*job, "--redo", "augment"]) == 0 and endpoint.requests == [row["body"] for row in after]
        assert shown(job, capsys) == []
    assert len([row for row in before if "the teacher's answer to the first request" in json.dumps(row["body"])]) == 4


@pytest.mark.parametrize(("server", "form"), [("off", "json_object"), (sys.executable, "json_schema")])
def test_a_local_teacher_is_asked_in_its_own_form(
    server: str, form: str, job: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CDCDA_LLAMA_SERVER", server)
    rows = shown(job, capsys)
    assert len(rows) == 4 and {row["to"] for row in rows} == {"this machine"}
    assert {row["body"]["response_format"]["type"] for row in rows} == {form} and rows[0]["body"]["repeat_penalty"] == 1.1
    assert ("cache_prompt" in rows[0]["body"]) == (server != "off")


# Selection.


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_can_be_left_out(rule: str) -> None:
    bad = {
        "length": {"input": "two words"},
        "text": {"input": sentence(7777) + " <b>kettle</b>"},
        "language": {"input": "Die Regierung hat gestern ein neues Gesetz beschlossen, das viele betrifft"},
        "copy": {"input": ""},
        "duplicate": {"input": ""},
        "echo": {"input": "", "output": sentence(8888, 5)},
        "label": {"input": sentence(7777)},
    }[rule]
    english = [
        replace(r, input=f"The {r.input.replace(' ', ' of the ', 2)} and it is what they have", output=f"They say {r.output}")
        for r in TRAIN
        if r.task == "headline"
    ]
    train = [r for r in TRAIN if r.task == "rating"] if rule == "label" else english
    made = Planner(train, HeldOut(()), plain(examples=2, strategies=["new"]), 1, inputs_only=False)
    ask = made.ask(0)
    if rule == "label":
        ask = replace(ask, output="6")
    if rule == "copy":
        bad["input"] = ask.examples[0].input
    if rule == "duplicate":
        bad["input"] = next(r for r in train if r not in ask.examples).input
    if rule == "echo":
        bad["input"] = f"well {bad['output']} it is so and they know of it"
    text = json.dumps({name: bad.get(name, "They say " + sentence(8888, 4)) for name in ask.request.schema["required"]})
    others = [name for name in RULES if name != rule]
    config = plain(without=others)
    assert Selector(train, (), config).judge(ask, text).rule == rule
    assert Selector(train, (), replace(config, without=[*RULES])).judge(ask, text).reason == ""


def test_likeness_leaves_the_best_and_diversity_spreads_them() -> None:
    texts = ["a b c d", "a b c d e", "x y z w", "p q r s", "k l m n"]
    found = choose(texts, ["g"] * 5, 2, [0.9, 0.8, 0.7, 0.1, 0.05], alike=0.6)
    assert found.kept == (0, 2)
    assert found.reasons == {1: LESS_DIVERSE, 3: LESS_ALIKE, 4: LESS_ALIKE}
    assert choose(texts, ["g"] * 5, 9, None, 0.5).kept == (0, 1, 2, 3, 4)


def test_groups_keep_their_shares() -> None:
    assert shares(Counter({"a": 10, "b": 5, "c": 1}), 8) == {"a": 5, "b": 3, "c": 0}
    assert shares(Counter({"a": 2}), 8) == {"a": 2}
    groups = ["a"] * 10 + ["b"] * 5
    kept = choose([f"t{n} u v" for n in range(15)], groups, 6, None, 1.0).kept
    assert Counter(groups[index] for index in kept) == {"a": 4, "b": 2}


def test_candidates_beyond_what_is_kept_are_rejected_with_the_reason(tmp_path: Path) -> None:
    def longest(rows: Sequence[Record]) -> list[float]:
        return [float(len(row.input)) for row in rows]

    with serving() as endpoint:
        hired, config = TeacherConfig(base_url=endpoint.url, retries=2), plain(8, pool=2.0, alike=0.5)
        places = (tmp_path / "no.gguf", 3, tmp_path, tmp_path / "answers.jsonl")
        result = augment(TRAIN, HELD_OUT, "42", config, hired, *places, Silent(), likeness=longest)
    assert len(result.kept) == 8 and len(result.rejected) == 8 and {row.rule for row in result.rejected} == {"choice"}
    assert {row.reason for row in result.rejected} <= {LESS_ALIKE, LESS_DIVERSE} and len(endpoint.requests) >= 16


def test_never_more_synthetic_records_than_the_cap_allows(tmp_path: Path) -> None:
    with serving() as endpoint:
        result = run(endpoint, tmp_path, plain(40, per_real=0.25))
    assert len(result.kept) == result.wanted == 10


@pytest.mark.parametrize(("keep", "per_real", "wanted"), [(0, 4.0, 0), (8, 0.01, 1), (8, 1.5, 4), (8, 4.0, 8), (8, math.inf, 8)])
def test_the_cap_goes_by_the_real_records(keep: int, per_real: float, wanted: int) -> None:
    assert wanted_of(plain(keep, per_real=per_real), 3) == wanted


def test_likelihood_gain_ranks_what_the_user_said_above_what_nobody_did(llama_base: Path, tmp_path: Path) -> None:
    ours = headlines(*[f"said {n} and {n}" for n in range(8)])
    config = TrainConfig(rank=2, max_steps=12, evaluate_every=6, batch_size=4, threads=1, learning_rate=0.01, max_tokens=256)
    gain = LikelihoodGain(Base(llama_base), "ann", ours[:6], ours[6:], config, 0, tmp_path, Silent())
    strange = [replace(r, output="QZX %% JJJ @@") for r in ours[:3]]
    scores = gain([*ours[:3], *strange])
    assert min(scores[:3]) > max(scores[3:])
    assert gain([*ours[:3], *strange]) == scores


# Inputs of others.


def test_inputs_of_others_are_read_and_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"task": "headline", "input": " a "}\n\n{"task": "headline", "input": "a"}\n{"task": "commit", "input": "x.py"}\n')
    assert read_inputs(path) == {"headline": ["a"], "commit": ["x.py"]}
    path.write_text('\ufeff{"task": "commit", "input": ["x.py", "y.py"]}\n', encoding="utf-8")
    assert read_inputs(path) == {"commit": ["x.py\ny.py"]}
    for row in (
        '{"task": "headline"}',
        '{"task": "headline", "input": " "}',
        '{"task": "headline", "input": "a \\ud83d"}',
        '{"task": [], "input": "a"}',
    ):
        path.write_text(row)
        with pytest.raises(DataError, match="in.jsonl:1 is no JSON object"):
            read_inputs(path)
    with pytest.raises(FileError, match="Cannot read"):
        read_inputs(tmp_path / "none")


@pytest.mark.parametrize(
    "wrong",
    [
        {"pool": 0.5},
        {"pool": math.inf},
        {"max_tokens": 0},
        {"alike": 0.0},
        {"per_real": 0},
        {"strategies": ["answer"]},
        {"likeness": "charm"},
        {"without": ["lenght"]},
        {"strategies": ["nwe"]},
    ],
)
def test_settings_that_make_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        AugmentConfig(**wrong)
