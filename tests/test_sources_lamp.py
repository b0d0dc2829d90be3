"""LaMP's file format: every task, both splits, streaming, and what does not belong together. The files are our own."""

from __future__ import annotations

import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from cdcda_export.errors import ConfigError, DataError, FileError, UnknownUser
from cdcda_mobile.history import Malformed, list_users, open_source, read_history, split_by_time
from cdcda_mobile.sources import json_stream
from cdcda_mobile.sources.json_stream import iter_json_array
from cdcda_mobile.sources.lamp import DATASETS, LampSource
from cdcda_mobile.sources.records import beginning_of
from cdcda_mobile.tasks import TASKS
from history_rows import config

NEWS = "food & drink, sports, education"
ASK = {
    "LaMP_1": 'For an author who has written the paper with the title "T", which reference is related? '
    'Just answer with [1] or [2] without explanation. [1]: "{x}" [2]: "B"',
    "LaMP_2N": "Which category does this article relate to among the following categories? Just answer with the category name "
    f"without further explanation. categories: [{NEWS}] article: {{x}}",
    "LaMP_2M": "Which tag does this movie relate to among the following tags? Just answer with the tag name without further "
    "explanation. tags: [comedy, action] description: {x}",
    "LaMP_3": "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5 without further "
    "explanation. review: {x}",
    "LaMP_4": "Generate a headline for the following article: {x}",
    "LaMP_5": "Generate a title for the following abstract of a paper: {x}",
    "LaMP_6": "Generate a subject for the following email: {x}",
    "LaMP_7": "Paraphrase the following tweet without any explanation before or after it: {x}",
}
ITEM: dict[str, dict[str, Any]] = {
    "LaMP_1": {"title": "title {n}", "abstract": "abstract {n}"},
    "LaMP_2N": {"text": "text {n}", "title": "title {n}", "category": "sports"},
    "LaMP_2M": {"description": "plot {n}", "tag": "comedy"},
    "LaMP_3": {"text": "review {n}", "score": "4"},
    "LaMP_4": {"text": "article {n}", "title": "title {n}"},
    "LaMP_5": {"title": "title {n}", "abstract": "abstract {n}"},
    "LaMP_6": {"text": "mail {n}", "title": "subject {n}"},
    "LaMP_7": {"text": "this is tweet number {n} of mine"},
}
GOLD = {"LaMP_1": "[2]", "LaMP_2N": "sports", "LaMP_2M": "action", "LaMP_3": "5"}


def item(name: str, number: int, date: str = "") -> dict[str, Any]:
    made = {"id": f"p{number}", **{key: value.replace("{n}", str(number)) for key, value in ITEM[name].items()}}
    return {**made, "date": date} if date else made


def question(name: str, number: int, profile: list[dict[str, Any]], user: str = "") -> dict[str, Any]:
    made = {"id": str(number), "input": ASK[name].replace("{x}", f"unseen: text {number}"), "profile": profile}
    return {**made, "user_id": user} if user else made


def write(folder: Path, part: str, name: str, questions: list[Any], golds: dict[str, str] | None = None, prefix: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{prefix}{part}_questions.json").write_text(json.dumps(questions))
    if golds is not None:
        made = {"task": name, "golds": [{"id": key, "output": value} for key, value in golds.items()]}
        (folder / f"{prefix}{part}_outputs.json").write_text(json.dumps(made))


@pytest.mark.parametrize("name", DATASETS)
def test_user_split_of_every_task(name: str, tmp_path: Path) -> None:
    profile = [item(name, number) for number in (3, 1, 2)]
    gold = GOLD.get(name, "the gold text")
    write(tmp_path, "train", name, [question(name, 110, profile), question(name, 120, profile[:1])], {"110": gold, "120": gold})
    assert list_users(config(tmp_path)) == ["110", "120"]
    read = read_history("110", config(tmp_path))
    assert read.malformed == ()
    assert [record.id for record in read.records] == ["p3", "p1", "p2", "q110"]  # the order of the file, then the question
    assert [record.date for record in read.records[:3]] == ["0001-01-01", "0001-01-02", "0001-01-03"]
    assert read.records[2].date < read.records[3].date < "0002"
    dataset = DATASETS[name]
    alone = TASKS[dataset.task].completion  # a profile of texts without inputs
    assert {record.task for record in read.records[:3]} == {dataset.profile_task if dataset.profile[0] else alone}
    last = read.records[3]
    assert (last.task, last.output) == (dataset.task, gold)
    assert last.input == (question(name, 110, [])["input"] if name == "LaMP_1" else "unseen: text 110")


@pytest.mark.parametrize(
    ("name", "pair"),
    [
        ("LaMP_1", ("abstract 1", "title 1")),
        ("LaMP_2N", ("text 1", "sports")),
        ("LaMP_2M", ("plot 1", "comedy")),
        ("LaMP_3", ("review 1", "4")),
        ("LaMP_4", ("article 1", "title 1")),
        ("LaMP_5", ("abstract 1", "title 1")),
        ("LaMP_6", ("mail 1", "subject 1")),
        ("LaMP_7", ("this", "this is tweet number 1 of mine")),
    ],
)
def test_profile_items_become_pairs(name: str, pair: tuple[str, str], tmp_path: Path) -> None:
    write(tmp_path, "dev", name, [question(name, 1, [item(name, 1)])])
    (record,) = read_history("1", config(tmp_path)).records
    assert (record.input, record.output) == pair


@pytest.mark.parametrize("name", DATASETS)
def test_time_split_joins_a_users_questions(name: str, tmp_path: Path) -> None:
    early = [item(name, number, f"2015-0{number}-01") for number in range(1, 5)]
    late = [*early, item(name, 5, "2016-01-01"), item(name, 6, "2016-02-01")]
    folder = tmp_path / "time" / name
    gold = GOLD.get(name, "gold")
    write(folder / "train", "train", name, [question(name, 1, early, "u7"), question(name, 2, late, "u8")], {"1": gold, "2": gold})
    write(folder / "dev", "dev", name, [question(name, 11, late, "u7")], {"11": gold})
    write(folder / "test", "test", name, [question(name, 21, late, "u7")])  # its answers are withheld
    assert list_users(config(tmp_path)) == ["u7", "u8"]
    read = read_history("u7", config(tmp_path))
    assert read.malformed == ()
    assert [record.id for record in read.records] == ["p1", "p2", "p3", "p4", "q1", "p5", "p6", "q11"]
    assert read.records[4].date == "2015-04-01T00:00:01"
    assert read.records[-1].date == "2016-02-01T00:00:02"
    split = split_by_time(read, config(tmp_path))
    assert [record.id for record in split.test] == ["p6", "q11"]


def test_prefix_and_years(tmp_path: Path) -> None:
    profile = [item("LaMP_5", 1, "2014"), item("LaMP_5", 2, "2011")]
    write(tmp_path / "x", "train", "LaMP_5", [question("LaMP_5", 1, profile, "u")], {"1": "gold"}, prefix="LaMP_5_")
    read = read_history("u", config(tmp_path))
    assert [(record.id, record.date) for record in read.records] == [
        ("p2", "2011"),
        ("p1", "2014"),
        ("q1", "2014-01-01T00:00:01"),
    ]


def test_bad_items_are_reported_with_their_place(tmp_path: Path) -> None:
    profile: list[Any] = [
        item("LaMP_3", 1, "2015-01-01"),
        item("LaMP_3", 2),
        {**item("LaMP_3", 3, "2015-01-01"), "score": "9"},
        7,
    ]
    profile += [{**item("LaMP_3", 4, "2015-01-01"), "text": ""}, {**item("LaMP_3", 1, "2015-01-01"), "id": "again"}]
    questions: list[Any] = [
        question("LaMP_3", 1, profile, "u"),
        "no object",
        {"id": "3", "input": "x", "profile": []},
        {"id": "4", "user_id": "u", "input": "x"},
        {"user_id": "u", "input": "x", "profile": []},
    ]
    write(tmp_path, "train", "LaMP_3", questions, {"1": "7"})
    read = read_history("u", config(tmp_path))
    assert [record.id for record in read.records] == ["p1"]
    place = "train_questions.json question"
    assert [(bad.place, bad.reason) for bad in read.malformed] == [
        (f"{place} 1 profile item 2", "no date"),
        (f"{place} 1 profile item 3", "'9' is not one of the 5 labels of rating"),
        (f"{place} 1 profile item 4", "not an object but int"),
        (f"{place} 1 profile item 5", "empty input"),
        (f"{place} 2", "no user_id"),
        (f"{place} 3", "no user_id"),
        (f"{place} 4", "no profile"),
        (f"{place} 5", "no id"),
        (f"{place} 1", "'7' is not one of the 5 labels of rating"),
        (f"{place} 1 profile item 6", f"duplicate of {place} 1 profile item 1"),
    ]


def test_a_question_id_in_two_files_is_two_people(tmp_path: Path) -> None:
    for part, number in (("train", 1), ("dev", 2)):
        write(tmp_path, part, "LaMP_4", [question("LaMP_4", 5, [item("LaMP_4", number)])])
    read = read_history("5", config(tmp_path))
    assert [record.id for record in read.records] == ["p1"]
    assert read.malformed[0].place == "dev_questions.json question 1"
    assert "already stands in train_questions.json question 1" in read.malformed[0].reason


def test_tasks_and_splits_are_not_mixed(tmp_path: Path) -> None:
    write(tmp_path / "a", "train", "LaMP_3", [question("LaMP_3", 1, [item("LaMP_3", 1)])])
    write(tmp_path / "b", "train", "LaMP_4", [question("LaMP_4", 1, [item("LaMP_4", 1)])])
    with pytest.raises(ConfigError, match="holds LaMP_3 and LaMP_4, where the same number is not the same person"):
        list_users(config(tmp_path))
    (record,) = read_history("1", config(tmp_path, task="headline")).records
    assert record.task == "headline"
    with pytest.raises(ConfigError, match=r"holds LaMP_3 \(rating\) and LaMP_4 \(headline\), nothing for the task tweet"):
        read_history("1", config(tmp_path, task="tweet"))
    write(tmp_path / "time", "train", "LaMP_4", [question("LaMP_4", 1, [item("LaMP_4", 1, "2015")], "u")])
    with pytest.raises(ConfigError, match="user split and of the time split"):
        read_history("1", config(tmp_path, task="headline"))


def test_a_dataset_has_the_name_of_its_outputs_files(tmp_path: Path) -> None:
    write(tmp_path / "LaMP_2", "train", "LaMP_2", [question("LaMP_2M", 1, [item("LaMP_2M", 1)])], {"1": "action"})
    write(tmp_path / "LaMP_4", "train", "LaMP_4", [question("LaMP_4", 1, [item("LaMP_4", 1)])])
    for task, names in (("movie_tag", {"LaMP_2M": "LaMP_2"}), ("headline", {})):
        source = open_source(config(tmp_path, task=task))
        assert isinstance(source, LampSource) and source.scored_as() == names
    outputs = tmp_path / "LaMP_2" / "train_outputs.json"
    for text in ('[{"id": "1", "output": "action"}]', '{"golds": []}', '{"golds": [], "task": 2}'):
        outputs.write_text(text)
        source = open_source(config(tmp_path / "LaMP_2"))
        assert isinstance(source, LampSource) and source.scored_as() == {}


def test_both_kinds_of_lamp_2(tmp_path: Path) -> None:
    write(tmp_path / "LaMP_2", "train", "LaMP_2", [question("LaMP_2N", 1, [item("LaMP_2N", 1)])])
    write(tmp_path / "LaMP_2" / "new", "train", "LaMP_2", [question("LaMP_2M", 1, [item("LaMP_2M", 1)])])
    assert read_history("1", config(tmp_path, task="movie_tag")).records[0].output == "comedy"
    assert read_history("1", config(tmp_path, task="news_category")).records[0].output == "sports"
    assert read_history("1", config(tmp_path / "LaMP_2" / "new")).records[0].task == "movie_tag"


def test_other_words_are_recognised_by_folder_or_task(tmp_path: Path) -> None:
    plain = {"id": "1", "input": "What shall we call it?", "profile": [item("LaMP_6", 1)]}
    film = {"id": "1", "input": "Which?", "profile": [item("LaMP_2M", 1)]}
    news = {"id": "1", "input": "Which?", "profile": [item("LaMP_2N", 1)]}
    write(tmp_path / "plain", "train", "", [plain])
    write(tmp_path / "films" / "lamp_2", "train", "", [film])
    write(tmp_path / "news" / "LaMP_2", "train", "", [news])
    write(tmp_path / "mails" / "LaMP_6", "train", "", [plain], {"1": "gold"})
    with pytest.raises(DataError, match="fits no LaMP task: name it with --task"):
        read_history("1", config(tmp_path / "plain"))
    assert read_history("1", config(tmp_path / "plain", task="subject")).records[0].output == "subject 1"
    assert read_history("1", config(tmp_path / "films")).records[0].task == "movie_tag"
    assert read_history("1", config(tmp_path / "news")).records[0].task == "news_category"
    assert read_history("1", config(tmp_path / "mails")).records[1].input == "What shall we call it?"


def test_unknown_user_mapping_and_empty_files(tmp_path: Path) -> None:
    write(tmp_path, "train", "LaMP_4", [question("LaMP_4", 1100, [item("LaMP_4", 1)])])
    with pytest.raises(UnknownUser, match="Did you mean '1100'"):
        read_history("110", config(tmp_path))
    with pytest.raises(ConfigError, match="leave --map away"):
        read_history("110", config(tmp_path, map={"input": "text"}))
    write(tmp_path, "train", "LaMP_4", [])
    with pytest.raises(DataError, match="is empty"):
        read_history("110", config(tmp_path))


# Tweets


def test_a_tweet_is_completed_from_10_to_25_percent() -> None:
    draw = random.Random(1)
    shares = []
    for _ in range(300):
        tweet = " ".join(f"w{draw.randrange(10**6)}" for _ in range(100))
        given = beginning_of(tweet)
        assert tweet.startswith(given)
        assert beginning_of(tweet) == given
        shares.append(len(given.split()))
    assert min(shares) == 10
    assert max(shares) == 25
    assert len(set(shares)) == 16


def test_a_tweet_of_one_word_is_malformed(tmp_path: Path) -> None:
    profile = [{"id": "a", "text": "Goal!"}, {"id": "b", "text": "Goal number two"}, {"id": "c"}]
    write(tmp_path, "train", "LaMP_7", [question("LaMP_7", 1, profile)])
    read = read_history("1", config(tmp_path))
    assert len(read.records) == 1
    assert [bad.reason for bad in read.malformed] == ["a text of one word cannot be completed", "no output"]
    assert read.malformed[0] == Malformed("train_questions.json question 1 profile item 1", "a text of one word cannot be completed")


# The incremental reader


def test_items_come_out_as_json_reads_them_whatever_the_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [1, 23, -4.5e10, 'a"b\\c\u20ac\U0001f642', None, True, {"k": [1, {"x": []}]}, [], "", 123456789, {"golds": "no"}]
    path = tmp_path / "a.json"
    for text in (json.dumps(values), json.dumps(values, indent=3, ensure_ascii=False), "\ufeff " + json.dumps(values) + "\n"):
        path.write_text(text, encoding="utf-8")
        for chunk in (1, 2, 7, 1 << 16):
            monkeypatch.setattr(json_stream, "_CHUNK", chunk)
            assert list(iter_json_array(path)) == values


def test_the_array_of_an_object(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"task": "LaMP_3", "more": {"golds": [0]}, "golds": [1, 2], "rest": 5}')
    assert list(iter_json_array(path, "golds")) == [1, 2]
    path.write_text('{"task": "LaMP_3"}')
    assert list(iter_json_array(path, "golds")) == []
    path.write_text("[ ]")
    assert list(iter_json_array(path, "golds")) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cut short"),
        ('[{"a": 1}, {"b": ', "cut short"),
        ('[{"a": 1}, {"b": "long', "cut short"),
        ('[{"a": 1}', "cut short"),
        ('{"a": 1}', "expected '\\['"),
        ("[1 2]", "expected '\\]', found '2'"),
        ('[{"a": 1}, {b: 1}, ' + '"x", ' * 20 + "]", "character 12 on"),
        ("[" * 200_000, "nesting too deep"),
        ("[1" + "0" * 5000 + "]", "number is too long"),
    ],
)
def test_broken_json_is_one_sentence(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(FileError, match=said):
        list(iter_json_array(path))
    path.write_bytes(b'["\xff\xfe"]')
    with pytest.raises(FileError, match="not UTF-8"):
        list(iter_json_array(path))
    path.unlink()
    with pytest.raises(FileError, match="cannot be read: No such file"):
        list(iter_json_array(path))


def test_an_error_in_the_middle_is_found_before_the_end_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, {b: 1}, ' + '"x", ' * 2_000_000 + '"y"]')
    tracemalloc.start()
    with pytest.raises(FileError, match="character 12 on"):
        list(iter_json_array(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_truncated_file_is_not_half_trusted(tmp_path: Path) -> None:
    write(tmp_path, "train", "LaMP_4", [question("LaMP_4", number, [item("LaMP_4", 1)]) for number in range(50)])
    path = tmp_path / "train_questions.json"
    path.write_text(path.read_text()[:-200])
    with pytest.raises(FileError, match="cut short"):
        read_history("0", config(tmp_path))


def test_one_user_of_thousands_is_read_in_little_memory(tmp_path: Path) -> None:
    profile = [{**item("LaMP_4", number), "text": f"article {number} " + "word " * 100} for number in range(20)]
    block = json.dumps(profile)
    path = tmp_path / "train_questions.json"
    with path.open("w") as file:
        file.write("[")
        for number in range(4000):
            start = ", " if number else ""
            text = ASK["LaMP_4"].replace("{x}", f"text {number}")
            file.write(f'{start}{{"id": "{number}", "input": "{text}", "profile": {block}}}')
        file.write("]")
    with (tmp_path / "train_outputs.json").open("w") as file:
        json.dump({"task": "LaMP_4", "golds": [{"id": str(number), "output": f"gold {number}"} for number in range(4000)]}, file)
    assert path.stat().st_size > 40_000_000
    tracemalloc.start()
    read = read_history("3999", config(tmp_path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(read.records) == 21
    assert read.records[-1].output == "gold 3999"
    assert peak < 2_000_000, f"{peak} bytes for one user of a file of {path.stat().st_size}"
