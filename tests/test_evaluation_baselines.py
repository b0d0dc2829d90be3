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
from cdcda_mobile.history import Record
from cdcda_mobile.tasks import get_task

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
