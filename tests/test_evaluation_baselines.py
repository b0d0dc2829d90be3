"""Retrieval and rules: BM25 by a library's values, prompts that fit, rules that read only the training records."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdcda_export.errors import DataError, ExportError
from cdcda_export.gguf import GgufFile
from cdcda_mobile.dataset import Encoding, encoding_of
from cdcda_mobile.evaluation.baselines import (
    Bm25,
    Past,
    majority_answers,
    opening_answers,
    opening_of,
    retrieval_probes,
    retrieval_turn,
)  # fmt: skip
from cdcda_mobile.history import Record, read_history
from cdcda_mobile.sources.lamp import DATASETS
from cdcda_mobile.tasks import get_task
from history_rows import config
from test_sources_lamp import GOLD, item, question, write

DOCUMENTS = ["the cat sat on the mat", "the dog chased the cat", "a bird sang at dawn", "the mat was red", "dogs and cats and birds"]


def record(number: int, task: str, text: str, output: str) -> Record:
    return Record(f"r{number}", f"2024-01-{number:02}", task, text, output)


@pytest.fixture(scope="module")
def encoding(llama_base: Path) -> Encoding:
    return encoding_of(GgufFile(llama_base))


def test_bm25_gives_the_values_of_rank_bm25() -> None:
    # rank_bm25 0.2.2: BM25Okapi over whitespace tokens; "the" is in most documents, so its weight is the floor
    expected = [0.6221811127872972, 0.6701162161180949, 0.0, 1.4639154662812388, 0.0]
    index = Bm25(DOCUMENTS)
    assert index.scores("the red cat").tolist() == pytest.approx(expected)
    assert index.nearest("the red cat", 2) == [3, 1]
    assert index.nearest("nothing of it", 2) == [4, 3]  # of equals the later one
    assert Bm25([]).nearest("anything", 3) == []


def test_the_past_is_searched_within_the_task() -> None:
    train = [
        record(1, "headline", "grain barge sank", "Barge lost"),
        record(2, "headline", "the fair opened", "Fair fun"),
        record(3, "headline", "geese on the lock", "Geese"),
        record(4, "rating", "barge tour was slow", "2"),
    ]
    past = Past(train)
    assert [r.id for r in past.nearest(record(9, "headline", "another barge sank", "?"), 1)] == ["r1"]
    assert [r.id for r in past.nearest(record(9, "headline", "unheard Fair", "?"), 1)] == ["r2"]  # an output is searched too
    assert past.nearest(record(9, "commit", "a.py", "?"), 2) == []


@pytest.mark.parametrize("name", DATASETS)
def test_every_question_of_lamps_is_asked_with_what_its_profile_tells(name: str, tmp_path: Path) -> None:
    write(tmp_path, "train", name, [question(name, 110, [item(name, number) for number in (1, 2)])], {"110": GOLD.get(name, "gold")})
    *profile, asked = read_history("110", config(tmp_path)).records
    turn = retrieval_turn(asked, Past(profile).nearest(asked, 4))
    assert turn.endswith(f". {get_task(asked.task).prompt(asked.input)}") and asked.task == DATASETS[name].task
    told = {
        "LaMP_1": '"title 2", and "title 1" are written by this person. ',
        "LaMP_7": '"this is tweet number 2 of mine", and "this is tweet number 1 of mine" are written by this person. ',
    }
    assert turn.startswith(told.get(name, turn)) and all(past.output in turn for past in profile)


def test_papers_are_searched_for_the_candidates_and_tweets_as_a_whole() -> None:
    papers = [
        record(1, "paper_title", "an author who writes", "which reference"),
        record(2, "paper_title", "of winches", "Rope"),
        record(3, "paper_title", "of locks", "Water"),
        record(4, "paper_title", "of gulls", "Sky"),
    ]
    asked = 'For an author who has written the paper with the title "gulls", which reference is related? [1]: "On winches" [2]: "Of Rope"'
    assert [r.id for r in Past(papers).nearest(record(9, "citation", asked, "[1]"), 1)] == ["r2"]
    tweets = [
        record(1, "tweet_completion", "the barge", "the barge sank at noon"),
        record(2, "tweet", "a plain word", "barge ahoy"),
        record(3, "tweet_completion", "so it", "so it goes"),
    ]
    tweet = record(9, "tweet", "it went down at noon", "?")
    shown = Past(tweets).nearest(tweet, 3)
    assert shown[0].id == "r1" and {r.id for r in shown} == {"r1", "r2", "r3"}
    assert retrieval_turn(tweet, [tweets[1], tweets[0]]).startswith(
        '"barge ahoy" is the tweet for "a plain word", and "the barge sank at noon" is written by this person. '
    )


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ("headline", '"out" is the {output} for "in", and "out2" is the {output} for "in2". '),
        ("rating", 'out is the {output} for "in", and out2 is the {output} for "in2". '),
        ("movie_tag", 'the {output} for the {input}: "in" is "out", and the {output} for the {input}: "in2" is "out2". '),
    ],
)
def test_the_turn_tells_the_past_and_then_asks(task: str, told: str) -> None:
    row = get_task(task)
    shown = [record(1, task, "in", "out"), record(2, task, "in2", "out2")]
    question = record(9, task, "what now", "?")
    expected = told.replace("{output}", row.output).replace("{input}", row.input)
    assert retrieval_turn(question, shown) == expected + row.prompt("what now")
    assert retrieval_turn(question, []) == row.prompt("what now")


def test_what_does_not_fit_is_left_out_the_farthest_first(encoding: Encoding) -> None:
    train = [record(i, "headline", f"barge {'mud ' * (8 - i)}", f"T{i}") for i in range(1, 6)]
    test = [record(9, "headline", "barge", "Gold")]

    def shown(limit: int) -> list[str]:
        (probe,) = retrieval_probes(train, test, encoding, 3, limit, 8)
        assert len(probe.prompt) + 8 <= limit
        return [f"T{i}" for i in range(1, 6) if f'"T{i}" is' in probe.user_text]

    nearest = [r.output for r in Past(train).nearest(test[0], 3)]
    assert shown(1000) == sorted(nearest)
    turn = retrieval_turn(test[0], Past(train).nearest(test[0], 3))
    all_three = len(encoding.tokenizer.encode(encoding.template.prompt(turn))) + 8
    assert shown(all_three) == sorted(nearest)
    assert shown(all_three - 1) == sorted(nearest[:2])
    alone = len(encoding.probe(test[0], 1000).prompt)
    assert shown(alone + 8) == []
    with pytest.raises(ExportError, match="Record r9"):
        retrieval_probes(train, test, encoding, 3, alone, 8)


def test_the_probe_answers_with_the_users_own_output(encoding: Encoding) -> None:
    test = record(9, "headline", "barge", "Gold")
    (probe,) = retrieval_probes([record(1, "headline", "barge one", "T1")], [test], encoding, 2, 500, 8)
    assert probe.answer == encoding.probe(test, 500).answer
    assert len(probe.prompt) > len(encoding.probe(test, 500).prompt)


TRAIN = [
    record(1, "rating", "fine", "4"),
    record(2, "rating", "bad", "2"),
    record(3, "rating", "good", "4"),
    record(4, "rating", "poor", "2"),
    record(5, "commit", "src/a.py", "fix: the winch"),
    record(6, "commit", "docs/b.md", "docs: say so"),
    record(7, "commit", "src/c.py", "fix: the lock"),
    record(8, "commit", "src/winch.py", "Oil it"),
]


def test_rules_read_the_past() -> None:
    test = [record(20, "rating", "good enough", "5"), record(21, "commit", "src/winch.py", "fix: again")]
    assert majority_answers(TRAIN, test[:1]) == ["2"]  # as frequent as 4, and newer
    assert opening_answers(TRAIN, test[1:]) == ["fix: "]


def test_rules_say_where_there_is_no_past() -> None:
    test = [record(20, "tweet", "x", "y")]
    for rule in (majority_answers, opening_answers):
        with pytest.raises(DataError, match="no training record of the task tweet"):
            rule(TRAIN, test)


@pytest.mark.parametrize(
    ("output", "opening"), [("fix(ui): a b", "fix(ui): "), ("Oil the winch", "Oil"), ("at 10:30 sharp", "at"), ("a: b: c", "a: "), ("", "")]
)
def test_an_opening_is_a_prefix_with_a_colon_or_a_word(output: str, opening: str) -> None:
    assert opening_of(output) == opening
