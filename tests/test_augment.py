"""Augmentation: what is asked, what is kept, that nothing held out is ever shown, and that interruptions change nothing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cdcda_export.base import default_base
from cdcda_export.errors import DataError, TeacherError
from cdcda_export.progress import Silent
from cdcda_mobile.augmentation.augment import AugmentResult, augment
from cdcda_mobile.augmentation.held_out import HeldOut
from cdcda_mobile.augmentation.prompts import LISTED_WORDS, Planner, Proportion
from cdcda_mobile.augmentation.select import Selector, first_object
from cdcda_mobile.augmentation.textual import grams, jaccard, loops, normalized, words
from cdcda_mobile.config import AugmentConfig, TeacherConfig
from cdcda_mobile.history import Record
from fake_endpoint import FakeEndpoint, Reply, chat, failure, invent, serving

SECRET = "sk-very-secret-0123456789"
NOUNS = "harbour kettle ledger lantern orchard saddle thimble verandah whistle anchor barley candle".split()
VERBS = "borrowed carried counted dropped folded guarded hammered inspected juggled knitted lifted mended".split()


def sentence(number: int, length: int = 12) -> str:
    chance = random.Random(number)
    return " ".join(chance.choice(NOUNS if i % 2 else VERBS) + chance.choice("aeiou") for i in range(length))


def records(start: int, count: int, ratings: int = 3) -> tuple[Record, ...]:
    """Dated records; every ``ratings``-th is a rating."""
    made = []
    for n in range(start, start + count):
        date = f"2024-{1 + n // 28:02d}-{1 + n % 28:02d}"
        rated = n % ratings == 0
        output = str(1 + n % 5) if rated else sentence(1000 + n, 5)
        made.append(Record(f"r{n:03d}", date, "rating" if rated else "headline", sentence(n), output))
    return tuple(made)


TRAIN, HELD_OUT = records(0, 40), records(40, 15)


def plain(keep: int = 12, **more: Any) -> AugmentConfig:
    """A configuration that keeps every candidate, in whatever language the endpoint invents, and asks for no style card."""
    return AugmentConfig(**{"keep": keep, "pool": 1.0, "style": False, "without": ["language"], **more})


def planner(train: tuple[Record, ...] = TRAIN, held_out: tuple[Record, ...] = HELD_OUT, weak: bool = False, **more: Any) -> Planner:
    return Planner(train, HeldOut(held_out), plain(**more), 1, inputs_only=weak)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def run(
    endpoint: FakeEndpoint,
    folder: Path,
    config: AugmentConfig | None = None,
    progress: Silent | None = None,
    train: tuple[Record, ...] = TRAIN,
    held_out: tuple[Record, ...] = HELD_OUT,
    seed: int = 3,
    **teacher: Any,
) -> AugmentResult:
    folder.mkdir(parents=True, exist_ok=True)
    wanted = TeacherConfig(base_url=endpoint.url, **{"retries": 2, **teacher})
    return augment(
        train, held_out, "42", config or plain(), wanted, folder / "no.gguf", seed, folder / "stage.partial",
        folder / "answers.jsonl", progress or Silent(),
    )  # fmt: skip


def stage(folder: Path) -> dict[str, bytes]:
    return {name: (folder / "stage.partial" / name).read_bytes() for name in ("kept.jsonl", "rejected.jsonl")}


def every_third_fails(body: dict[str, Any]) -> Reply:
    return chat("I would rather not.") if body["seed"] % 3 == 0 else invent(body)


# The whole.


def test_records_are_kept_in_the_users_proportions_and_written_down(tmp_path: Path) -> None:
    with serving(every_third_fails) as endpoint:
        result = run(endpoint, tmp_path)
    rows = [json.loads(line) for line in stage(tmp_path)["kept.jsonl"].splitlines()]
    assert len(rows) == len(result.kept) == 12
    assert set(rows[0]) == {"id", "date", "task", "input", "output", "strategy", "request"}
    assert {row["strategy"] for row in rows} == {"counterpart", "new"}
    assert 2 <= Counter(row["task"] for row in rows)["rating"] <= 6
    own_outputs = {r.output for r in TRAIN}
    assert all((row["output"] in own_outputs) == (row["strategy"] == "counterpart") for row in rows)
    rejected = [json.loads(line) for line in stage(tmp_path)["rejected.jsonl"].splitlines()]
    assert rejected and all(row["reason"] == "not JSON" and row["text"] == "I would rather not." for row in rejected)
    logged = {json.loads(line)["key"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()}
    assert {row["request"] for row in (*rows, *rejected)} <= logged
    assert result.requests == len(rows) + len(rejected) <= result.paid_requests == len(endpoint.requests)
    assert result.prompt_tokens == 100 * result.requests
    metrics = json.loads(json.dumps(result.metrics()))
    assert metrics["kept"] == 12 and metrics["teacher"] == "fake-1" and not metrics["embedded"] and metrics["advice"] == ""


def test_an_answer_with_half_of_a_character_is_rejected_and_written_down(tmp_path: Path) -> None:
    def cut(body: dict[str, Any]) -> Reply:
        reply = invent(body)
        return replace(reply, body=reply.body.replace('\\"}', '\\ud83d\\"}')) if body["seed"] % 3 == 0 else reply

    with serving(cut) as endpoint:
        result = run(endpoint, tmp_path)
        assert run(endpoint, tmp_path).kept == result.kept
    reasons = {row["reason"] for row in map(json.loads, stage(tmp_path)["rejected.jsonl"].splitlines())}
    assert any("broken characters" in reason for reason in reasons)


def test_the_result_is_the_same_for_any_concurrency(tmp_path: Path) -> None:
    def jittery(body: dict[str, Any]) -> Reply:
        return replace(every_third_fails(body), delay_s=body["seed"] % 7 / 200)

    outcomes, most = [], []
    for concurrency in (1, 4):
        with serving(jittery) as endpoint:
            run(endpoint, tmp_path / str(concurrency), concurrency=concurrency)
            most.append(endpoint.most_running)
        outcomes.append(stage(tmp_path / str(concurrency)))
    assert outcomes[0] == outcomes[1]
    assert most[0] == 1 and 1 < most[1] <= 4


def test_one_slow_answer_leaves_no_thread_idle_and_little_is_asked_for_nothing(tmp_path: Path) -> None:
    others, in_time = threading.Event(), list[bool]()

    def first_is_slow(body: dict[str, Any]) -> Reply:
        if body is endpoint.requests[0]:
            in_time.append(others.wait(10))
        elif len(endpoint.requests) == 8:
            others.set()  # the other thread answered six meanwhile
        return invent(body)

    with serving(first_is_slow) as endpoint:
        result = run(endpoint, tmp_path, plain(), concurrency=2)
    assert in_time == [True] and len(result.kept) == 12
    assert len(endpoint.requests) - result.requests <= 1


def test_another_seed_asks_something_else(tmp_path: Path) -> None:
    with serving() as endpoint:
        run(endpoint, tmp_path / "a", seed=1)
        run(endpoint, tmp_path / "b", seed=2)
    assert stage(tmp_path / "a")["kept.jsonl"] != stage(tmp_path / "b")["kept.jsonl"]


@pytest.mark.parametrize("concurrency", [1, 4])
def test_an_interrupted_run_pays_nothing_twice_and_ends_the_same(tmp_path: Path, concurrency: int) -> None:
    with serving(every_third_fails) as endpoint:
        run(endpoint, tmp_path / "whole", concurrency=concurrency)
    with serving(every_third_fails) as endpoint:
        endpoint.answer = lambda body: every_third_fails(body) if len(endpoint.requests) <= 7 else failure(401)
        with pytest.raises(TeacherError, match="does not accept the key"):
            run(endpoint, tmp_path / "cut", concurrency=concurrency)
        first = [json.dumps(body) for body in endpoint.requests[:7]]
        log = tmp_path / "cut" / "answers.jsonl"
        assert len(log.read_text().splitlines()) == 7
        with log.open("a") as stream:
            stream.write('{"key": "torn by SIGK')
        endpoint.requests.clear()
        endpoint.answer = every_third_fails
        result = run(endpoint, tmp_path / "cut", concurrency=concurrency)
        assert not set(first) & {json.dumps(body) for body in endpoint.requests}
        assert result.paid_requests == len(endpoint.requests) < result.requests
        endpoint.requests.clear()
        run(endpoint, tmp_path / "cut", concurrency=concurrency)
        assert endpoint.requests == []  # everything is known
    assert stage(tmp_path / "cut") == stage(tmp_path / "whole")


JOB = """
import sys
from pathlib import Path
from test_augment import plain, Endpoint, Silent, run
run(Endpoint(sys.argv[1]), Path(sys.argv[2]), plain(), concurrency=2)
"""


class Endpoint:
    """The address of an endpoint that another process runs."""

    def __init__(self, url: str) -> None:
        self.url = url


def test_sigkill_in_the_middle_pays_nothing_twice(tmp_path: Path) -> None:
    with serving(every_third_fails) as endpoint:
        run(endpoint, tmp_path / "whole", concurrency=2)
        endpoint.requests.clear()
        endpoint.answer = lambda body: replace(every_third_fails(body), delay_s=0.1)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        with subprocess.Popen([sys.executable, "-c", JOB, endpoint.url, str(tmp_path / "cut")], env=environment) as process:
            until = time.monotonic() + 30
            while len(endpoint.requests) < 6 and time.monotonic() < until:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        arrived = len((tmp_path / "cut" / "answers.jsonl").read_bytes().splitlines())
        assert arrived >= 4
        sent = len(endpoint.requests)
        run(endpoint, tmp_path / "cut", concurrency=2)
        bodies = Counter(json.dumps(body) for body in endpoint.requests)
        assert sum(count - 1 for count in bodies.values()) <= sent - arrived  # only what had not arrived is asked again
    assert stage(tmp_path / "cut") == stage(tmp_path / "whole")


def test_no_held_out_text_is_in_any_prompt_and_no_user_id(tmp_path: Path) -> None:
    quoting = Record("q", "2024-01-01", "headline", f"She wrote: {HELD_OUT[1].input}. And left.", "some other words entirely here")
    same_input = replace(TRAIN[1], id="s", input=HELD_OUT[2].input.upper() + "!")
    with serving() as endpoint:
        run(endpoint, tmp_path, plain(40), train=(*TRAIN, quoting, same_input))
    assert len(endpoint.requests) >= 40
    held = {normalized(text) for r in HELD_OUT for text in (r.input, r.output) if len(text.split()) > 1}
    assert len(held) > 20
    for body in endpoint.requests:
        prompt = normalized(json.dumps(body))
        assert not [text for text in held if text in prompt]
    shown = normalized(json.dumps([body["messages"] for body in endpoint.requests]))
    assert normalized(TRAIN[1].input) in shown  # the search would have found something


def test_records_that_all_repeat_held_out_texts_cannot_be_shown(tmp_path: Path) -> None:
    with serving() as endpoint, pytest.raises(DataError, match="none may be shown"):
        run(endpoint, tmp_path, train=HELD_OUT)
    assert endpoint.requests == []


def test_the_key_is_nowhere(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with serving(every_third_fails, failure(500, f"bad {SECRET}")) as endpoint:
        result = run(endpoint, tmp_path)
        endpoint.answer = lambda body: failure(401, f"wrong key {SECRET}")
        with pytest.raises(TeacherError) as caught:
            run(endpoint, tmp_path, plain(30))
    assert SECRET in endpoint.authorizations[0]
    written = "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())
    assert SECRET not in written + json.dumps(result.metrics()) + str(caught.value) + str(caught.value.__cause__)
    assert SECRET not in "".join(capfd.readouterr()) + json.dumps(endpoint.requests)


# Budgets.


def test_a_request_budget_keeps_what_is_there_and_is_one_budget_over_runs(tmp_path: Path) -> None:
    progress = Silent()
    with serving() as endpoint:
        result = run(endpoint, tmp_path, progress=progress, max_requests=5)
        assert len(endpoint.requests) == 5 == result.requests
        again = run(endpoint, tmp_path, max_requests=5)
        assert len(endpoint.requests) == 5 and again.kept == result.kept and again.paid_requests == 0
    assert 0 < len(result.kept) <= 5
    assert result.stopped == "--max-requests 5"
    assert progress.warnings == [f"Only {len(result.kept)} of 12 synthetic records were kept: --max-requests 5 is reached."]


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_token_budget_stops_at_the_same_record_for_any_concurrency(tmp_path: Path, concurrency: int) -> None:
    with serving() as endpoint:
        result = run(endpoint, tmp_path, token_budget=601, concurrency=concurrency)
    assert result.requests == 6  # 120 tokens each
    assert len(endpoint.requests) <= 6 + concurrency - 1
    assert result.stopped == "--token-budget 601"


def test_a_budget_that_allows_nothing_useful_is_an_error(tmp_path: Path) -> None:
    with serving(lambda body: chat("no")) as endpoint:
        with pytest.raises(TeacherError, match=r"None of the teacher's 2 answers.*--max-requests 2.*not JSON.*--keep 0"):
            run(endpoint, tmp_path, max_requests=2)


def test_attempts_are_limited(tmp_path: Path) -> None:
    progress = Silent()
    good = [None]
    with serving(lambda body: invent(body) if good and not good.pop() else chat("{}")) as endpoint:
        result = run(endpoint, tmp_path, plain(4, max_attempts=3), progress)
    assert result.requests == len(endpoint.requests) == 12
    assert len(result.kept) == 1
    assert "Only 1 of 4" in progress.warnings[0] and "12 requests" in progress.warnings[0]


def test_a_failure_in_one_thread_saves_the_answers_of_the_others(tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> Reply:
        return failure(403) if len(endpoint.requests) == 1 else replace(invent(body), delay_s=0.3)

    with serving(answer) as endpoint:
        with pytest.raises(TeacherError, match="403"):
            run(endpoint, tmp_path, concurrency=3)
        sent = len(endpoint.requests)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == sent - 1


def test_a_bug_in_a_teacher_is_not_waited_for(tmp_path: Path) -> None:
    class Broken:
        name = "broken"

        def start(self) -> None: ...

        def complete(self, request: Any) -> Any:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        augment(TRAIN, HELD_OUT, "42", AugmentConfig(), TeacherConfig(), tmp_path, 0, tmp_path, tmp_path / "a.jsonl", Silent(), Broken())
    assert threading.active_count() < 20


# What is asked.


def test_proportions_hold_at_every_length() -> None:
    proportion = Proportion({"a": 5, "b": 3, "c": 2})
    names = [proportion.at(k)[0] for k in range(100)]
    for length in range(1, 101):
        counted = Counter(names[:length])
        assert all(abs(counted[n] - length * w / 10) <= 1 for n, w in {"a": 5, "b": 3, "c": 2}.items())
    assert proportion.at(99)[1] == names[:99].count(names[99])


def test_a_request_does_not_depend_on_the_ones_before() -> None:
    forward, once = (planner() for _ in range(2))
    asks = [forward.ask(k) for k in range(30)]
    assert once.ask(29) == asks[29]
    assert len({ask.request.key("m") for ask in asks}) == 30
    assert len({ask.request.seed for ask in asks}) == 30


def test_a_weak_teacher_is_asked_for_inputs_to_every_real_output_in_turn() -> None:
    weak = planner(held_out=(), weak=True)
    asks = [ask for ask in (weak.ask(k) for k in range(60)) if ask.task.name == "headline"]
    headlines = [r for r in TRAIN if r.task == "headline"]
    assert {ask.strategy for ask in asks} == {"counterpart"}
    assert {ask.output for ask in asks[: len(headlines)]} == {r.output for r in headlines}
    for ask in asks:
        assert len(ask.examples) == 3
        assert ask.output not in {r.output for r in ask.examples}
        assert ask.request.messages[-1]["content"] == f"headline: {ask.output}"
        assert set(ask.request.schema["properties"]) == {"input"}


@pytest.mark.parametrize(("bare", "made"), [("tweet_completion", "tweet"), ("writing_completion", "writing")])
def test_a_weak_teacher_sees_no_beginning_of_a_text_as_its_plain_wording(bare: str, made: str) -> None:
    texts = tuple(Record(f"t{n}", f"2024-01-{1 + n:02}", bare, sentence(n)[:9], sentence(n)) for n in range(8))
    weak = planner(texts, (), weak=True)
    asks = [weak.ask(k) for k in range(8)]
    assert {ask.output for ask in asks} == {text.output for text in texts}
    for ask in asks:
        system, asked = ask.request.messages  # no turn of an assistant's
        assert ask.task.name == made and asked["content"].endswith(f": {ask.output}") and ask.task.input in system["content"]
        assert [record.output for record in ask.examples] == [ask.output]
        cut = only(" ".join(ask.output.split()[:4]))
        assert Selector(texts, (), plain(without=["language", "length"])).judge(ask, cut).reason == "copy of an example in the prompt"


def test_labels_follow_the_users_mix_with_examples_of_the_same_label() -> None:
    rated = planner(tuple(r for r in TRAIN if r.task == "rating"), ())
    asks = [rated.ask(k) for k in range(28)]
    own = Counter(r.output for r in TRAIN if r.task == "rating")
    assert Counter(ask.output for ask in asks) == {label: 2 * n for label, n in own.items()}
    assert all(f"with the score `{ask.output}`" in ask.request.messages[-1]["content"] for ask in asks)


def test_one_record_alone_and_long_ones_can_be_asked_with() -> None:
    alone = replace(TRAIN[1], input=" ".join(["long"] * 5000))
    for weak in (False, True):
        ask = planner((alone,), (), weak).ask(0)
        assert ask.strategy == "counterpart" and ask.examples == (alone,)
        assert len(json.dumps(ask.request.messages).split()) < 250
        assert ask.request.max_tokens <= AugmentConfig().max_tokens


@pytest.mark.parametrize("task", ["reply", "writing_completion"])
@pytest.mark.parametrize("weak", [True, False])
def test_long_answers_of_the_users_and_long_inputs_of_others_leave_room_for_the_teachers(task: str, weak: bool) -> None:
    long = tuple(Record(f"l{n}", f"2024-01-{n:02d}", task, sentence(n), sentence(100 + n, 3000)) for n in range(1, 9))
    strategies = {"strategies": ["counterpart", "new", "rewrite", "answer"], "inputs": "others.jsonl"}
    texts = {"reply": [sentence(900, 3000)], "writing": [sentence(900, 3000)]}
    made = Planner(long, HeldOut(()), plain(**strategies), 1, inputs_only=weak, inputs=texts)
    asks = [made.ask(k) for k in range(12)]
    assert max(sum(words(message["content"]) for message in ask.request.messages) for ask in asks) < LISTED_WORDS + 300
    kept = [ask.output for ask in asks if ask.strategy == "counterpart"]
    assert kept and set(kept) <= {record.output for record in long}


# What is kept.

ASKS = planner(examples=4)
KEEP = next(ask for ask in map(ASKS.ask, range(20)) if ask.strategy == "counterpart" and not ask.task.labels)
BOTH = next(ask for ask in map(ASKS.ask, range(20)) if ask.strategy == "new")
UNSHOWN = next(r for r in TRAIN if r.task == "headline" and r not in (*KEEP.examples, *BOTH.examples))
HELD = next(r for r in HELD_OUT if r.task == "headline")
GOOD, SHORT = sentence(7777), sentence(8888, 5)


def both(**sides: str) -> str:
    return json.dumps({"input": GOOD, "output": SHORT} | sides, ensure_ascii=False)


def only(text: str) -> str:
    return json.dumps({"input": text}, ensure_ascii=False)


def judge(ask: Any, text: str) -> str:
    return Selector(TRAIN, HELD_OUT, AugmentConfig()).judge(ask, text).reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (only(GOOD), ""),
        (f"Of course:\n```json\n{only(GOOD)}\n```", ""),
        ("", "empty answer"),
        ("  \n", "empty answer"),
        (only(GOOD)[:-3], "not JSON"),
        ('["input"]', "not JSON"),
        (json.dumps({"input": GOOD, "output": "x"}), "does not fit the schema"),
        (json.dumps({"input": 3}), "does not fit the schema"),
        (only(" "), "empty text"),
        (only("barely three words"), "input: too short"),
        (only(sentence(5, 40)), "input: too long"),
        (only("the old mill " * 4), "input: repeats itself"),
        (only(GOOD + " hahahahahaha"), "input: repeats itself"),
        (only("1 2 3 4 5 6 7 8 9 10 11 kettle"), "input: too few letters"),
        (only("Старый чайник стоял на берегу и считал корабли до вечера"), "input: another script than the user's"),
        (only(GOOD + " <b>kettle</b>"), "input: markup that the user never writes"),
        (only("Here is " + GOOD), "input: talks to us instead"),
        (only(KEEP.examples[0].input.upper()), "copy of an example in the prompt"),
        (only(KEEP.examples[1].input + " and so on"), "copy of an example in the prompt"),
        (only(UNSHOWN.input), "near duplicate of a known input"),
        (only(UNSHOWN.input + " again"), "near duplicate of a known input"),
        (only(HELD.input.title() + "."), "held-out overlap"),
        (only(HELD.input + " more words here"), "held-out overlap"),
        (only("Hello " + KEEP.output + " my friend today"), "input repeats the output"),
    ],
)
def test_every_rule_for_an_input_to_a_real_output(text: str, reason: str) -> None:
    assert judge(KEEP, text) == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (both(), ""),
        (both(output=""), "empty text"),
        (json.dumps({"input": GOOD}), "does not fit the schema"),
        (both(output=sentence(1, 30)), "output: too long"),
        (both(output=UNSHOWN.output.upper()), "output is already known"),
        (both(output=HELD.output), "held-out overlap"),
        (both(output="x\x07" + SHORT), "output: broken characters"),
    ],
)
def test_every_rule_for_a_pair(text: str, reason: str) -> None:
    assert judge(BOTH, text) == reason


def test_what_was_kept_is_known_from_then_on() -> None:
    selector = Selector(TRAIN, HELD_OUT, AugmentConfig())
    assert selector.judge(BOTH, both()).reason == ""
    assert selector.judge(BOTH, both(output=sentence(9, 5))).reason == "near duplicate of a known input"
    assert selector.judge(BOTH, both(input=sentence(9999))).reason == "output is already known"


def test_a_label_outside_the_set_is_refused() -> None:
    rating = next(ask for ask in map(ASKS.ask, range(20)) if ask.task.labels)
    assert judge(replace(rating, output="6"), only(GOOD)) == "label outside the set"
    assert judge(rating, only(GOOD)) == ""


def test_a_held_out_label_is_no_overlap() -> None:
    rating = next(ask for ask in map(ASKS.ask, range(20)) if ask.task.labels and ask.output in {r.output for r in HELD_OUT})
    assert judge(rating, only(GOOD)) == ""


def test_texts_in_other_scripts_are_measured_too() -> None:
    assert words("one two-three") == 3
    assert words("今天天气很好我们去公园") == 5
    assert grams("今天天气很好") and jaccard(grams("今天天气很好"), grams("今天天气真好")) < 1
    assert grams("fix") == {("fix",)}
    assert not loops("this is a text, and it is a good one")
    assert first_object('{broken {"a": 1} tail') == {"a": 1}
    assert first_object("nothing") is None


@pytest.mark.model
def test_the_embedded_teacher_gives_records_and_a_second_run_starts_nothing(tmp_path: Path) -> None:
    def once() -> AugmentResult:
        return augment(
            TRAIN, HELD_OUT, "42", AugmentConfig(keep=4, pool=1.0), TeacherConfig(), default_base(), 0, tmp_path / "stage.partial",
            tmp_path / "answers.jsonl", Silent(),
        )  # fmt: skip

    first = once()
    written = stage(tmp_path)
    assert first.embedded and len(first.kept) == 4 and "OPENAI_BASE_URL" in first.metrics()["advice"]
    second = once()
    assert stage(tmp_path) == written
    assert second.paid_requests == 0 and second.seconds < min(1.0, first.seconds)
